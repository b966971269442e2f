"""What a network is fed: embeddings kept where nothing augments, neutral faces as they are, references chosen once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, NO_AUGMENT, PEOPLE, doe, emotion_encoder, make_data, small_run
from torch import Tensor, nn

from fer.batches import Feed, TrainBatches
from fer.data.dataset import Split, open_data
from fer.data.pairs import Pairs
from fer.errors import UserError
from fer.models import build_model
from fer.resources import Resources
from fer.run import Run

HERE = torch.device("cpu")
INDEX = np.array([0, 3, 8, 50])  # the first and third are neutral
AUGMENT = NO_AUGMENT | {"brightness": 0.2}


def darker(images: Tensor, rows: slice) -> Tensor:
    return images / 2


def fed(feed: Feed, index: np.ndarray, change: Any = None) -> dict[str, Tensor]:
    ((index, pixels),) = feed.batches([index])
    return feed(index, pixels, change)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("people") / "data", subjects=PEOPLE)


def network(run: Run) -> Any:
    """With batch-norm statistics that are not those of a new network, and references that are not zero."""
    torch.manual_seed(0)
    model = build_model(run.model, run.input, len(CLASSES))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "references")):
            nn.init.normal_(buffer, std=0.1)
    return model


def feed_of(model: Any, run: Run, split: Split, at_once: int = 256) -> Feed:
    resources = Resources(device="cpu", eval_batch_size=at_once)
    return Feed(model, run, resources, split, CLASSES, HERE)


@torch.no_grad()
def embedded(encoder: nn.Module, split: Split, positions: Any) -> Tensor:
    """Straight from the file: 16 pixels made 32, in [0, 1], minus .5, over .25."""
    images = np.load(split.images.filename)[split.rows[positions]]  # type: ignore[attr-defined]
    pixels = torch.from_numpy(images)[:, None].float() / 255
    large = nn.functional.interpolate(pixels, size=(32, 32), mode="bilinear", antialias=True).clamp(0, 1)
    return encoder.eval()((large - 0.5) / 0.25)


def calls(encoder: nn.Module) -> list[int]:
    """The number of images of each call of `encoder` from now on."""
    seen: list[int] = []
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return seen


# What is computed once


@pytest.mark.parametrize("pairing", ["random_neutral", "prototype", "same_subject"])
def test_without_augmentation_the_encoder_sees_each_image_once(pairing: str, data: Path) -> None:
    """In evaluation mode, and in batches that do not divide the split."""
    run = small_run(**doe(pairing))
    model = network(run)
    seen = calls(model.backbone)
    for name, batches in (("train", [36, 36, 24]), ("val", [36, 4])):
        split = open_data(data).split(name)
        for module in model.modules():
            module.training = True
        feed = feed_of(model, run, split, at_once=36)
        feed.begin()
        for epoch in range(3):
            feed.start_epoch(epoch)
            inputs = fed(feed, INDEX % 40, darker)
            model(**inputs)
        assert seen == batches
        assert "pixel_values" not in inputs
        assert not inputs["embedding"].requires_grad
        wanted = embedded(model.backbone, split, INDEX % 40)
        torch.testing.assert_close(inputs["embedding"], wanted, atol=1e-5, rtol=1e-4)
        assert wanted.std(0).max() > 1e-3
        seen.clear()


def test_with_augmentation_the_encoder_sees_every_batch(data: Path) -> None:
    run = small_run(**doe(augment=AUGMENT))
    model = network(run)
    seen = calls(model.backbone)
    feed = feed_of(model, run, open_data(data).split("train"))
    for epoch in range(3):
        feed.start_epoch(epoch)
        inputs = fed(feed, INDEX, darker)
        assert "embedding" not in inputs
        model(**inputs)
    assert seen == [12, 4, 4, 4]  # the neutral faces, and each batch
    seen.clear()
    feed = feed_of(model, run, open_data(data).split("val"))  # which nothing augments
    model(**fed(feed, INDEX % 40))
    assert seen == [40]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("random_neutral", "bf16"), ("random_neutral", "fp32"), ("same_subject", "fp32"), ("emotion_encoder", "fp32")],
)
def test_kept_embeddings_give_the_logits_of_pixels(kind: str, precision: str, data: Path) -> None:
    keys = emotion_encoder(augment=NO_AUGMENT) if kind == "emotion_encoder" else doe(kind)
    run, split = small_run(**keys, precision=precision), open_data(data).split("train")
    augmenting = run.model_copy(update={"augment": small_run(augment=AUGMENT).augment})
    model = network(run)
    kept, fresh = feed_of(model, run, split), feed_of(model, augmenting, split)
    for feed in (kept, fresh):
        feed.begin()
        feed.start_epoch(0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with_kept, with_pixels = fed(kept, INDEX), fed(fresh, INDEX)
        found, wanted = model(**with_kept), model(**with_pixels)
    assert with_kept["embedding"].dtype == torch.float32  # so that differences are not rounded to bf16
    assert "embedding" not in with_pixels
    # bf16 has 8 bits; a batch of another size may round otherwise
    torch.testing.assert_close(found, wanted, atol=1e-5 if precision == "fp32" else 1e-2, rtol=1e-4)


def test_the_emotion_encoder_gets_pixels_and_embedding(data: Path) -> None:
    run, split = small_run(**emotion_encoder(augment=NO_AUGMENT)), open_data(data).split("train")
    model = network(run)
    seen = calls(model.identity), calls(model.backbone)
    inputs = fed(feed_of(model, run, split), INDEX)
    model(**inputs)
    assert inputs.keys() == {"pixel_values", "embedding"}
    assert seen == ([96], [4])  # only the embeddings of identity are kept
    wanted = embedded(model.identity, split, INDEX)
    torch.testing.assert_close(inputs["embedding"], wanted, atol=1e-5, rtol=1e-4)
    given = model.identity.eval()(inputs["pixel_values"])
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


# Neutral faces


@pytest.mark.parametrize("augment", [NO_AUGMENT, AUGMENT])
@pytest.mark.parametrize("pairing", ["random_neutral", "same_subject"])
def test_neutral_faces_of_training_are_drawn_and_never_augmented(
    pairing: str, augment: dict[str, Any], data: Path
) -> None:
    run, split = small_run(**doe(pairing, augment=augment), seed=7), open_data(data).split("train")
    model = network(run)
    feed = feed_of(model, run, split)
    faces = embedded(model.backbone, split, np.arange(96))
    pairs = Pairs(split, CLASSES, pairing == "same_subject")
    for epoch in range(3):
        feed.start_epoch(epoch)
        inputs = fed(feed, INDEX, darker)
        partners = pairs.drawn(7, epoch)[INDEX]
        torch.testing.assert_close(inputs["neutral"], faces[partners], atol=1e-5, rtol=1e-4)
        if "pixel_values" in inputs:  # but the target is
            images = embedded(nn.Identity(), split, INDEX)
            torch.testing.assert_close(inputs["pixel_values"], ((images * 0.25 + 0.5) / 2 - 0.5) / 0.25)
        assert ("pixel_values" in inputs) == (augment is AUGMENT)
    assert not torch.equal(faces[pairs.drawn(7, 0)], faces[pairs.drawn(7, 1)])


@pytest.mark.parametrize("pairing", ["random_neutral", "prototype"])
def test_evaluation_compares_with_the_references(pairing: str, data: Path) -> None:
    run = small_run(**doe(pairing))
    model = network(run)
    before = model.references.clone()
    feed = feed_of(model, run, open_data(data).split("val"))
    feed.start_epoch(0)
    feed.begin()  # only training does
    assert fed(feed, INDEX % 40).keys() == {"embedding"}
    assert torch.equal(model.references, before)


def test_evaluation_compares_with_the_first_neutral_face_of_the_person(data: Path) -> None:
    run = small_run(**doe("same_subject"))
    model, split = network(run), open_data(data).split("test")
    partners = [
        next(o for o, row in enumerate(split.rows) if row % 8 == 0 and PEOPLE[row] == PEOPLE[mine] and o != image)
        for image, mine in enumerate(split.rows)
    ]
    wanted = embedded(model.backbone, split, partners)
    found = fed(feed_of(model, run, split), np.arange(40))["neutral"]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert len(set(partners)) == 4  # two of each person, one of them for the other


def test_a_prototype_is_the_mean_of_the_neutral_training_faces(data: Path) -> None:
    run = small_run(**doe("prototype", augment=AUGMENT))
    model, split = network(run), open_data(data).split("train")
    feed = feed_of(model, run, split)
    feed.begin()
    wanted = embedded(model.backbone, split, np.arange(0, 96, 8)).mean(0, keepdim=True)
    torch.testing.assert_close(model.references, wanted, atol=1e-5, rtol=1e-4)
    feed.start_epoch(0)
    assert fed(feed, INDEX, darker).keys() == {"pixel_values"}  # training compares with it too


@pytest.mark.parametrize("augment", [NO_AUGMENT, AUGMENT])
def test_references_are_the_embeddings_of_chosen_neutral_faces(augment: dict[str, Any], data: Path) -> None:
    split = open_data(data).split("train")
    chosen = []
    for seed in (1, 1, 2):
        run = small_run(**doe(augment=augment), seed=seed)
        model = network(run)
        feed_of(model, run, split).begin()
        faces = embedded(model.backbone, split, np.arange(96))
        found = (model.references[:, None] - faces).abs().amax(2).argmin(1)
        torch.testing.assert_close(model.references, faces[found], atol=1e-5, rtol=1e-4)
        chosen.append(found.tolist())
    assert chosen[0] == chosen[1] != chosen[2]
    assert all(len(set(positions)) == 3 for positions in chosen)
    assert {position % 8 for positions in chosen for position in positions} == {0}


# What the data do not hold


def test_too_few_neutral_faces_for_the_references(data: Path) -> None:
    model = doe()["model"] | {"pairing": {"name": "random_neutral", "references": 13}}
    run = small_run(**doe(model=model))
    feed = feed_of(network(run), run, open_data(data).split("train"))
    with pytest.raises(UserError, match=r"^model\.pairing\.references: 13 asked for, the training split has 12"):
        feed.begin()


def test_subjects_are_needed_where_they_are_compared(tmp_path: Path) -> None:
    run = small_run(**doe("same_subject"))
    for name in ("train", "val"):
        with pytest.raises(UserError, match=r"^model\.pairing: same_subject needs data that name subjects; "):
            feed_of(network(run), run, open_data(make_data(tmp_path / name)).split(name))


def test_the_last_epochs_are_not_mixed(data: Path) -> None:
    run = small_run(augment={"mixup": 0.4}, unmixed_epochs=1, epochs=3)
    batches = TrainBatches(feed_of(network(run), run, open_data(data).split("train")), run, 1, 0, 1)
    mixed = [{mixture is not None for _, mixture in batches.epoch(epoch)} for epoch in range(3)]
    assert mixed == [{True}, {True}, {False}]


def test_each_epoch_of_training_has_its_own_partners(data: Path) -> None:
    run = small_run(**doe())
    feed = feed_of(network(run), run, open_data(data).split("train"))
    batches, faces = TrainBatches(feed, run, 1, 0, 1), []
    for epoch in (0, 1, 0):
        next(batches.epoch(epoch))
        faces.append(fed(feed, INDEX)["neutral"])
    assert torch.equal(faces[0], faces[2])
    assert not torch.equal(faces[0], faces[1])
