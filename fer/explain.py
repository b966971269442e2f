"""What a prediction rests on: heat maps of a face, and whether they say more than chance and random weights do.

A map looks convincing whatever it shows, so each stands beside two checks: the map of the same network with random
weights (Adebayo et al. 2018, arXiv 1810.03292), and how fast the prediction falls as the parts that it names are
replaced first, instead of in random order (the deletion of Petsiuk et al. 2018, arXiv 1806.07421).
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from fer.device import seed_all
from fer.errors import UserError
from fer.input import model_input
from fer.models import build_model
from fer.models.embedding_difference import DifferenceOfEmbeddingsNetwork
from fer.models.ensemble import EnsembleNetwork
from fer.models.transformer import Transformer
from fer.predict import Predictor
from fer.statistics import Interval, mean

CELLS = 12  # of a map, along each side of the face
WINDOW = 3  # cells along each side of what occlusion replaces at once
STEPS = 16  # of a deletion curve
ORDERS = 5  # random ones, whose curves are averaged
OCCLUSION, GRAD_CAM = "occlusion", "Grad-CAM"


@dataclass(frozen=True, eq=False)
class Map:
    """A heat map [CELLS, CELLS] of one face, higher where the prediction rests more, and what checks it."""

    values: np.ndarray
    control: np.ndarray  # the same of random weights
    curve: np.ndarray  # [STEPS + 1]: probability of the prediction, the highest cells replaced first
    control_curve: np.ndarray  # of the trained network, in the order of the control
    chance: np.ndarray  # in random order, mean of ORDERS

    @property
    def similarity(self) -> float:
        """Spearman's correlation of map and control; 0 where one of them is the same everywhere."""
        if np.ptp(self.values) == 0 or np.ptp(self.control) == 0:
            return 0.0
        return float(stats.spearmanr(self.values.ravel(), self.control.ravel()).statistic)

    @property
    def area(self) -> float:
        """How far the prediction lies below that in random order, on average over the share replaced: -1 to 1."""
        return float(np.trapezoid(self.chance - self.curve)) / STEPS

    @property
    def control_area(self) -> float:
        """The same for the order of the control."""
        return float(np.trapezoid(self.chance - self.control_curve)) / STEPS


@dataclass(frozen=True, eq=False)
class Explained:
    """A face's prediction and its maps by method."""

    label: int
    probability: float
    maps: dict[str, Map]


def explain(predictor: Predictor, faces: np.ndarray, seed: int = 0) -> Iterator[Explained]:
    """Each face with its maps: uint8 [B, H, W] or [B, H, W, 3], as `predictor.faces.prepare` returns them.

    The same for the same seed, from which the random weights and orders are drawn. Raises UserError for a model that
    needs another face beside each.
    """
    if any(predictor.run.model.images_beside().values()):
        raise UserError("explain: this model needs a neutral face beside each face; name another run")
    methods = {OCCLUSION: occlusion} | ({} if no_grad_cam(predictor) else {GRAD_CAM: grad_cam})
    control = with_random_weights(predictor, seed)
    for number, face in enumerate(faces):
        rng = np.random.default_rng([seed, number])
        probabilities = predictor.probabilities(face[None])[0]
        label = int(probabilities.argmax())
        orders = (rng.permutation(CELLS**2) for _ in range(ORDERS))
        chance = np.mean([deletion(predictor, face, label, order) for order in orders], 0)
        maps = {}
        for name, method in methods.items():
            ours, other = method(predictor, face, label), method(control, face, label)
            curve, control_curve = (deletion(predictor, face, label, highest_first(one, rng)) for one in (ours, other))
            maps[name] = Map(ours, other, curve, control_curve, chance)
        yield Explained(label, float(probabilities[label]), maps)


def with_random_weights(predictor: Predictor, seed: int) -> Predictor:
    """The same architecture and preprocessing, as it would be before any training."""
    other, run = copy(predictor), predictor.run
    with torch.random.fork_rng(devices=[]):
        seed_all(seed, torch.device("cpu"))
        network = build_model(run.model, run.input, len(predictor.classes), pretrained=False)
    other.model = network.to(predictor.device).eval()
    return other


# Replacing parts of a face


def edges(face: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the cells of a face [H, W, ...] begin, down and across, and where the last ends: int [CELLS + 1] each."""
    down, across = (np.linspace(0, side, CELLS + 1).round().astype(int) for side in face.shape[:2])
    return down, across


def occlusion(predictor: Predictor, face: np.ndarray, label: int) -> np.ndarray:
    """By how much the probability of `label` falls without each cell: float [CELLS, CELLS].

    A window of WINDOW x WINDOW cells, moved cell by cell, is replaced by the face's mean (Zeiler & Fergus 2014, arXiv
    1311.2901, section 4.2); a cell has the mean of the windows that cover it.
    """
    (down, across), places = edges(face), CELLS - WINDOW + 1
    pictures = np.repeat(face[None], places**2 + 1, 0)  # the last stays as it is
    corners = [(row, column) for row in range(places) for column in range(places)]
    for picture, (row, column) in zip(pictures, corners):
        rows, columns = slice(down[row], down[row + WINDOW]), slice(across[column], across[column + WINDOW])
        picture[rows, columns] = grey(face)
    found = predictor.probabilities(pictures)[:, label].astype(np.float64)
    total, covered = np.zeros((CELLS, CELLS)), np.zeros((CELLS, CELLS))
    for (row, column), value in zip(corners, found):
        total[row : row + WINDOW, column : column + WINDOW] += found[-1] - value
        covered[row : row + WINDOW, column : column + WINDOW] += 1
    return total / covered


def deletion(predictor: Predictor, face: np.ndarray, label: int, order: np.ndarray) -> np.ndarray:
    """Probability of `label` as more and more cells are replaced by the face's mean, in this order: [STEPS + 1]."""
    down, across = edges(face)
    pictures = np.repeat(face[None], STEPS + 1, 0)
    for place, cell in enumerate(order):
        row, column = divmod(int(cell), CELLS)
        first = place * STEPS // CELLS**2 + 1  # the picture from which on it is gone
        pictures[first:, down[row] : down[row + 1], across[column] : across[column + 1]] = grey(face)
    return predictor.probabilities(pictures)[:, label]


def highest_first(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The cells of a map from the highest to the lowest; equal ones in random order."""
    mixed = rng.permutation(values.size)
    return mixed[np.argsort(-values.ravel()[mixed], kind="stable")]


def grey(face: np.ndarray) -> np.ndarray:
    """The mean of a face, of each channel: what a replaced part shows."""
    return face.mean((0, 1)).round().astype(np.uint8)


# Grad-CAM


def no_grad_cam(predictor: Predictor) -> str:
    """Why there is no Grad-CAM for this model; "" if there is."""
    network = predictor.model
    if isinstance(network, EnsembleNetwork):
        return "an ensemble has no map of its own; explain one of its members"
    if any(isinstance(module, Transformer) for module in network.modules()):
        return "its backbone is no convolutional network"
    if isinstance(network, DifferenceOfEmbeddingsNetwork):
        return "its head sees frozen embeddings, not maps"
    if _last_map(network, predictor) is None:
        return "no feature map of more than one pixel"
    return ""


def grad_cam(predictor: Predictor, face: np.ndarray, label: int) -> np.ndarray:
    """How much each cell adds to the logit of `label`, by the last map of more than one pixel: [CELLS, CELLS].

    sum_k mean(dy / dA_k) * A_k of Selvaraju et al. 2017 (arXiv 1610.02391, equations 1 and 2) without the ReLU, so that
    all cells have a rank; in fp32. Behind a spatial transformer the map is turned back to the face as it came.
    """
    network = predictor.model.requires_grad_(False)  # so that nothing before the map is kept
    layer, kept = _last_map(network, predictor), []
    assert layer is not None

    def keep(module: nn.Module, given: object, found: Tensor) -> Tensor:
        kept.append(found.detach().requires_grad_())
        return kept[-1].clone()  # as what follows may work in place

    pixels = torch.from_numpy(np.ascontiguousarray(face[None])).to(predictor.device)
    images = model_input(pixels, predictor.run.input)
    handle = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logit = network(pixel_values=images)[0, label]
        (slope,) = torch.autograd.grad(logit, kept[-1])
    finally:
        handle.remove()
    found = (slope.mean((2, 3), keepdim=True) * kept[-1].detach()).sum(1, keepdim=True)
    found = F.interpolate(found, size=images.shape[2:], mode="bilinear")
    if getattr(network, "stn", None) is not None:
        found = _turned_back(found, network.stn.theta(images))
    return F.adaptive_avg_pool2d(found, CELLS)[0, 0].double().cpu().numpy()


def _last_map(network: nn.Module, predictor: Predictor) -> nn.Module | None:
    """The module of the backbone, or of a network without one, that returns the last map of more than one pixel."""
    seen: list[nn.Module] = []

    def see(module: nn.Module, given: object, found: object) -> None:
        if isinstance(found, Tensor) and found.ndim == 4 and min(found.shape[2:]) > 1:
            seen.append(module)

    handles = [module.register_forward_hook(see) for module in getattr(network, "backbone", network).modules()]
    example = network.example(predictor.run.input)["pixel_values"]  # type: ignore[operator]
    try:
        with torch.no_grad():
            network(pixel_values=torch.zeros_like(example, device=predictor.device))
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1] if seen else None


def _turned_back(found: Tensor, theta: Tensor) -> Tensor:
    """A map [1, 1, S, S] of what a spatial transformer shows, over the image that it was given; 0 outside its view."""
    inverse = torch.linalg.inv(theta[:, :, :2])
    back = torch.cat([inverse, -inverse @ theta[:, :, 2:]], 2)
    return F.grid_sample(found, F.affine_grid(back, list(found.shape), align_corners=True), align_corners=True)


# Over many faces


@dataclass(frozen=True)
class Verdict:
    """What the checks of a method say over all faces: means with 95 % intervals (t)."""

    method: str
    faces: int
    similarity: Interval
    area: Interval
    control_area: Interval
    gain: Interval  # of area over control_area, face by face

    @property
    def words(self) -> str:
        """What that means."""
        if self.faces < 2:
            return "one face says nothing about the method; take more"
        if not self.area.low > 0:
            return "no better than chance: what the map names first matters no more than what a random order does"
        if not self.gain.low > 0:
            return "better than chance, but no better than with random weights: it shows the face, not what was learned"
        return "better than chance and than with random weights"


def verdicts(found: list[Explained]) -> list[Verdict]:
    """One for each method."""
    rows = []
    for method in found[0].maps if found else ():
        maps = [one.maps[method] for one in found]
        areas, controls = np.array([one.area for one in maps]), np.array([one.control_area for one in maps])
        similarity = mean(np.array([one.similarity for one in maps]))
        rows.append(Verdict(method, len(maps), similarity, mean(areas), mean(controls), mean(areas - controls)))
    return rows
