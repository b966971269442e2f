"""A finished run as something to give away: a folder that `Predictor` loads, or one ONNX file for other programs."""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fer.card import card
from fer.checkpoint import META, SUMS, WEIGHTS, load_meta, read_weights
from fer.errors import UserError, first_line
from fer.files import new_folder, refuse_beside, sha256
from fer.formats import read_run
from fer.input import normalize, to_float
from fer.models import packages
from fer.models.ensemble import Ensemble
from fer.predict import Predictor
from fer.run import Run
from fer.run_folder import BEST, read_summary

CORE = ("torch", "transformers", "numpy", "pandas", "scipy", "pillow", "safetensors", "pydantic")
TOLERANCE = 1e-4  # in probabilities, between ONNX Runtime and torch


def requirements(run: Run) -> list[str]:
    """What a program needs to load the run's checkpoint, with the versions that are installed here."""
    return [f"{name}=={version(name).split('+')[0]}" for name in (*CORE, *packages(run.model))]


def write_folder(run_folder: Path, target: Path) -> None:
    """Write the best checkpoint of a finished run with model card, requirements and checksums to the folder `target`.

    Raises UserError if the run is not finished, its weights are missing or damaged, or `target` exists.
    """
    summary, meta = _finished(run_folder), load_meta(run_folder / BEST)
    read_weights(run_folder / BEST)  # which tells if they are damaged
    if target.exists():
        raise UserError(f"{target}: exists already; name another with --out")
    refuse_beside(target)
    with new_folder(target) as partial:
        shutil.copyfile(run_folder / BEST / WEIGHTS, partial / WEIGHTS)
        shutil.copyfile(run_folder / BEST / META, partial / META)
        (partial / "README.md").write_text(card(summary, meta))
        needs = requirements(read_run(meta, run_folder / BEST / META))
        (partial / "requirements.txt").write_text("\n".join(needs) + "\n")
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(partial.iterdir())]
        (partial / SUMS).write_text("".join(sums))


def _finished(run_folder: Path) -> dict[str, Any]:
    summary = read_summary(run_folder)
    if summary is None:
        raise UserError(f"{run_folder}: is not finished; `fer train` finishes it")
    return summary


class Whole(nn.Module):
    """From faces to probabilities in one graph: uint8 [B, H, W] or [B, H, W, 3] as the data have them -> [B, C]."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.network, self.settings, self.temperature = predictor.model, predictor.run.input, predictor.temperature

    def forward(self, faces: Tensor) -> Tensor:
        images = to_float(faces, self.settings.image_size)
        side = self.settings.image_size
        prepared = torch.empty(images.shape[0], self.settings.channels, side, side)
        normalize(images, self.settings, prepared)
        return torch.softmax(self.network(pixel_values=prepared).float() / self.temperature, 1)


def write_onnx(run_folder: Path, target: Path) -> float:
    """Write preprocessing, network and softmax as one ONNX file: `faces` -> `probabilities`, in fp32.

    The file is kept if ONNX Runtime gives torch's probabilities for batches of 1, 3 and 7; returns the largest
    difference. Raises UserError if it does not, the run is not finished, `target` exists, a package is missing, the
    network cannot be exported, or compares faces with others that come with each image.
    """
    summary, onnx = _finished(run_folder), _onnx()
    if target.exists():
        raise UserError(f"{target}: exists already; name another with --out")
    predictor = Predictor(run_folder, "cpu")
    if any(predictor.run.model.images_beside().values()):
        raise UserError(f"{run_folder}: needs a neutral face with every image, so it cannot be one ONNX file")
    _simplify(predictor)
    whole, shape = Whole(predictor).eval(), predictor.faces.prepared
    faces = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet():
            program = torch.onnx.export(
                whole, (faces,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("faces")},),
                input_names=["faces"], output_names=["probabilities"], external_data=False, verbose=False,
            )  # fmt: skip
        assert program is not None  # as dynamo is on
        program.save(partial)
        _describe(onnx, partial, summary, predictor)
        difference = _difference(partial, whole, shape)
        if not difference <= TOLERANCE:
            raise UserError(f"{run_folder}: ONNX Runtime's probabilities differ by {difference:.2g}; not exported")
        partial.replace(target)
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"{run_folder}: torch cannot export this network to ONNX: {_cause(error)}") from None
    finally:
        partial.unlink(missing_ok=True)
    return difference


def _onnx() -> Any:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -c constraints.txt -e '.[onnx]'") from None
    return onnx


def _simplify(predictor: Predictor) -> None:
    """In fp32, and with attention in single steps: what the exporter and ONNX Runtime take."""
    model = predictor.run.model
    for network in predictor.model.modules():
        if hasattr(network, "set_attn_implementation"):
            network.set_attn_implementation("eager")
    if isinstance(model, Ensemble):
        plain = [member.model_copy(update={"precision": "fp32"}) for member in model.members]
        predictor.model.settings = model.model_copy(update={"members": plain})


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's hints are for torch's developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _describe(onnx: Any, path: Path, summary: dict[str, Any], predictor: Predictor) -> None:
    """What a program must know beside the graph, as metadata of the file."""
    model = onnx.load(path)
    about = {
        "run_id": summary["run_id"],
        "classes": json.dumps(summary["classes"]),
        "face_shape": json.dumps(predictor.faces.prepared),
        "super_resolution": f"{predictor.faces.method} x{predictor.faces.scale}",
    }
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _difference(path: Path, whole: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest difference from torch's probabilities over batches of 1, 3 and 7 faces of noise."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    if isinstance(session.get_inputs()[0].shape[0], int):
        raise UserError(f"{path.stem}: torch exports this network for one number of faces alone; not exported")
    rng, found = np.random.default_rng(1), []
    for count in (1, 3, 7):
        faces = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        with torch.inference_mode():
            wanted = whole(torch.from_numpy(faces)).numpy()
        found.append(float(np.abs(session.run(None, {"faces": faces})[0] - wanted).max()))
    return float(np.max(found))  # nan if one is, unlike max
