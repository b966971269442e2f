"""What a network is fed: batches drawn from seed and epoch, embeddings kept where nothing augments, neutral faces."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, NO_AUGMENT, PEOPLE, doe, emotion_encoder, make_data, refusal, small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fer.batches import Feed, TrainBatches, batches, trained_images
from fer.data.dataset import Split, open_data
from fer.data.pairs import Pairs
from fer.models import build_model
from fer.resources import Resources
from fer.run import Run

HERE = torch.device("cpu")
INDEX = np.array([0, 3, 8, 50])  # the first and third are neutral
AUGMENT = NO_AUGMENT | {"brightness": 0.2}


# Batches


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(4, 70),
    share=st.integers(1, 8),
    world=st.sampled_from([1, 2, 4]),
    power=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_ranks_share_the_batches_of_one(images: int, share: int, world: int, power: float) -> None:
    run, labels = small_run(batch_size=share * world, balanced_sampling=power), torch.arange(images) % 8
    whole = images >= run.batch_size
    trained = images // run.batch_size * run.batch_size if whole else images // world * world
    assert trained == trained_images(run.batch_size, images, world)
    size = run.batch_size if whole else trained
    seen: list[int] = []
    for step in zip(*(batches(run, labels, 3, rank, world) for rank in range(world))):
        places = [slice(rank * size // world, (rank + 1) * size // world) for rank in range(world)]
        assert [(place, len(index)) for index, place in step] == [(place, size // world) for place in places]
        seen += np.concatenate([index for index, _ in step]).tolist()
    assert len(seen) == trained
    assert seen == order_of(run, labels, 3)[:trained]
    assert {*seen} <= {*range(images)}
    if not power:
        assert len(set(seen)) == trained  # each image at most once


def order_of(run: Run, labels: Tensor, epoch: int) -> list[int]:
    return np.concatenate([index for index, _ in batches(run, labels, epoch, 0, 1)]).tolist()


def test_the_order_follows_from_seed_and_epoch() -> None:
    for power in (0.0, 1.0):
        orders = {
            tuple(order_of(small_run(seed=seed, balanced_sampling=power), torch.arange(64) % 8, epoch))
            for seed, epoch in [*itertools.product((1, 2), (1, 2)), (1, 1)]
        }
        assert (len(orders), tuple(range(64)) in orders) == (4, False)


def test_balanced_sampling_draws_the_classes_with_their_shares_and_their_images_alike() -> None:
    """Three classes of 900, 90 and 10 images; and one of none."""
    labels = torch.tensor(np.random.default_rng(0).permutation([0] * 900 + [1] * 90 + [3] * 10))
    drawn = np.array([order_of(small_run(balanced_sampling=0.5, batch_size=10), labels, epoch) for epoch in range(20)])
    shares = np.array([0.7034, 0.2224, 0, 0.0741])  # as the roots 30, 9.487 and 3.162
    images = np.bincount(drawn.ravel(), minlength=1000) / drawn.size
    for found, share in (
        (np.bincount(labels, images, 4), shares),
        (images[labels == 3], np.full(10, shares[3] / 10)),
    ):
        np.testing.assert_array_less(abs(found - share), 4 * np.sqrt(share / drawn.size) + 1e-4)


def network(run: Run) -> Any:
    """With batch-norm statistics that are not those of a new network, and references that are not zero."""
    torch.manual_seed(0)
    model = build_model(run.model, run.input, len(CLASSES))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "references")):
            nn.init.normal_(buffer, std=0.1)
    return model


def feed_of(model: Any, run: Run, split: Split, at_once: int = 256) -> Feed:
    return Feed(model, run, Resources(device="cpu", eval_batch_size=at_once), split, CLASSES, HERE)


def test_the_last_epochs_are_not_mixed_and_a_large_batch_is_one_step(bars: Path) -> None:
    split = open_data(bars).split("train")
    run = small_run(augment={"mixup": 0.4}, unmixed_epochs=1, epochs=3, batch_size=512)
    made = TrainBatches(feed_of(network(run), run, split), run, 1, 0, 1)
    mixed = [[mixture is not None for _, mixture in made.epoch(epoch)] for epoch in range(3)]
    assert mixed == [[True], [True], [False]]
    assert (made.steps, made.images) == (1, 96)


# What is computed once


def darker(images: Tensor, rows: slice) -> Tensor:
    return images / 2


def fed(feed: Feed, index: np.ndarray, change: Any = None) -> dict[str, Tensor]:
    ((index, pixels),) = feed.batches([index])
    return feed(index, pixels, change)


@torch.no_grad()
def embedded(encoder: nn.Module, split: Split, positions: Any) -> Tensor:
    """Straight from the file: 16 pixels made 32, in [0, 1], minus .5, over .25."""
    images = np.load(split.images.filename)[split.rows[positions]]  # type: ignore[attr-defined]
    pixels = torch.from_numpy(images)[:, None].float() / 255
    large = nn.functional.interpolate(pixels, size=(32, 32), mode="bilinear", antialias=True).clamp(0, 1)
    return encoder.eval()((large - 0.5) / 0.25)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_without_augmentation_the_encoder_sees_each_image_once(bars: Path) -> None:
    """In evaluation mode, and in batches that do not divide the split."""
    run, seen = small_run(**doe()), list[int]()
    model = network(run)
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    for name, counts in (("train", [36, 36, 24]), ("val", [36, 4])):
        split = open_data(bars).split(name)
        model.train(), model.backbone.train()
        feed = feed_of(model, run, split, at_once=36)
        feed.begin()
        for epoch in range(3):
            feed.start_epoch(epoch)
            inputs = fed(feed, INDEX % 40, darker)
            model(**inputs)
        assert (seen, "pixel_values" in inputs) == (counts, False)
        close(inputs["embedding"], embedded(model.backbone, split, INDEX % 40))
        seen.clear()


@pytest.mark.parametrize(
    ("kind", "precision"), [("random_neutral", "bf16"), ("same_subject", "fp32"), ("emotion_encoder", "fp32")]
)
def test_kept_embeddings_give_the_logits_of_pixels(kind: str, precision: str, bars: Path) -> None:
    keys = emotion_encoder(augment=NO_AUGMENT) if kind == "emotion_encoder" else doe(kind)
    run, split = small_run(**keys, precision=precision), open_data(bars).split("train")
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


# Neutral faces


@pytest.mark.parametrize("augment", [NO_AUGMENT, AUGMENT])
@pytest.mark.parametrize("pairing", ["random_neutral", "same_subject"])
def test_neutral_faces_of_training_are_drawn_and_never_augmented(
    pairing: str, augment: dict[str, Any], bars: Path
) -> None:
    run, split = small_run(**doe(pairing, augment=augment), seed=7), open_data(bars).split("train")
    model = network(run)
    feed = feed_of(model, run, split)
    made = TrainBatches(feed, run, 1, 0, 1)
    faces = embedded(model.backbone, split, np.arange(96))
    pairs = Pairs(split, CLASSES, pairing == "same_subject")
    for epoch in range(3):
        next(made.epoch(epoch))
        inputs = fed(feed, INDEX, darker)
        close(inputs["neutral"], faces[pairs.drawn(7, epoch)[INDEX]])
        if "pixel_values" in inputs:  # but the target is
            images = embedded(nn.Identity(), split, INDEX)
            torch.testing.assert_close(inputs["pixel_values"], ((images * 0.25 + 0.5) / 2 - 0.5) / 0.25)
        assert ("pixel_values" in inputs) == (augment is AUGMENT)
    assert not torch.equal(faces[pairs.drawn(7, 0)], faces[pairs.drawn(7, 1)])


def test_evaluation_compares_with_the_first_neutral_face_of_the_person_or_their_mean_in_training(bars: Path) -> None:
    run, split = small_run(**doe("same_subject")), open_data(bars).split("test")
    model = network(run)
    partners = [
        next(o for o, row in enumerate(split.rows) if row % 8 == 0 and PEOPLE[row] == PEOPLE[mine] and o != image)
        for image, mine in enumerate(split.rows)
    ]
    assert len(set(partners)) == 4  # two of each person, one of them for the other
    close(fed(feed_of(model, run, split), np.arange(40))["neutral"], embedded(model.backbone, split, partners))
    run, split = small_run(**doe("prototype", augment=AUGMENT)), open_data(bars).split("train")
    model = network(run)
    feed = feed_of(model, run, split)
    feed.begin()
    close(model.references, embedded(model.backbone, split, np.arange(0, 96, 8)).mean(0, keepdim=True))
    feed.start_epoch(0)
    assert fed(feed, INDEX, darker).keys() == {"pixel_values"}  # training compares with it too


@pytest.mark.parametrize("augment", [NO_AUGMENT, AUGMENT])
def test_references_are_the_embeddings_of_chosen_neutral_faces(augment: dict[str, Any], bars: Path) -> None:
    split, val = (open_data(bars).split(name) for name in ("train", "val"))
    chosen: list[list[int]] = []
    for seed in (1, 1, 2):
        run = small_run(**doe(augment=augment), seed=seed)
        model = network(run)
        feed_of(model, run, split).begin()
        faces = embedded(model.backbone, split, np.arange(96))
        found = (model.references[:, None] - faces).abs().amax(2).argmin(1)
        close(model.references, faces[found])
        chosen.append(found.tolist())
    assert chosen[0] == chosen[1] != chosen[2]
    assert all(len(set(positions)) == 3 and not np.any(np.array(positions) % 8) for positions in chosen)
    assert fed(feed_of(model, run, val), INDEX % 40).keys() == {"embedding"}  # evaluation compares with them


def test_data_that_lack_what_is_compared_with(bars: Path, tmp_path: Path) -> None:
    run = small_run(**doe(model=doe()["model"] | {"pairing": {"name": "random_neutral", "references": 13}}))
    message = refusal(feed_of(network(run), run, open_data(bars).split("train")).begin)
    assert message.startswith("model.pairing.references: 13 asked for, the training split has 12")
    run, nameless = small_run(**doe("same_subject")), open_data(make_data(tmp_path / "data"))
    for name in ("train", "val"):
        message = refusal(feed_of, network(run), run, nameless.split(name))
        assert message.startswith("model.pairing: same_subject needs data that name subjects; ")


def test_a_probe_sees_the_embedding_alone(bars: Path) -> None:
    run, split = small_run(**doe("none")), open_data(bars).split("train")
    split = replace(split, labels=split.labels.clamp(min=1))  # without a neutral face
    model = network(run)
    feed = feed_of(model, run, split)
    feed.begin()
    feed.start_epoch(0)
    inputs = fed(feed, INDEX)
    close(inputs["embedding"], embedded(model.backbone, split, INDEX))
    torch.testing.assert_close(model(**inputs), model.head(inputs["embedding"]))
