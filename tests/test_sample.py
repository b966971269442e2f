"""The drawn faces: the same bytes every time, every class everywhere, voters like the published ones, learnable."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fer.data.found import look
from fer.data.labels import CLASSES, LABEL_MODES, VOTE_COLUMNS, class_prior, label_distribution
from fer.data.readers import ferplus
from fer.data.sample import CONFUSION, FREQUENCIES, draw_face, write_sample
from fer.data.source import Source, Wanted


def read(folder: Path, *counts_and_seed: int) -> Source:
    folder.mkdir(exist_ok=True)
    write_sample(folder, *counts_and_seed)
    with look(folder) as found:
        return ferplus.read(found, Wanted())


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read(tmp_path_factory.mktemp("sample"), 800, 200, 200, 1111)


def votes_of(source: Source) -> np.ndarray:
    return source.table[list(VOTE_COLUMNS)].to_numpy()


def test_equal_seeds_make_equal_bytes_and_every_class_is_in_every_split_of_the_smallest_sample(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        source = read(tmp_path / name, 80, 40, 40, seed)
        digests.append([hashlib.sha256(file.read_bytes()).digest() for file in sorted((tmp_path / name).iterdir())])
        votes = votes_of(source)
        for mode in LABEL_MODES:
            keep, label, _ = label_distribution(votes, mode, 8)
            for usage in ("train", "val", "test"):
                clear = keep & (source.table["usage"] == usage).to_numpy() & (votes.max(axis=1) >= 6)
                assert (np.bincount(label[clear], minlength=8) >= 2).all()
    assert len(digests[0]) == 2
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_classes_are_imbalanced_and_voters_disagree_like_ferplus(sample: Source) -> None:
    votes = votes_of(sample)
    assert sample.images.shape == (1200, 48, 48)
    assert sample.table["usage"].value_counts().to_dict() == {"train": 800, "val": 200, "test": 200}
    assert sample.table["name"].is_unique
    assert set(votes.sum(axis=1)) == {10}
    keep, label, _ = label_distribution(votes, "majority", 8)
    np.testing.assert_allclose(np.bincount(label[keep], minlength=8) / keep.sum(), FREQUENCIES, atol=0.04)
    assert 0.93 < keep.mean() < 1
    assert 0 < votes[:, 8:].sum() / votes.sum() < 0.05
    prior = class_prior(votes, sample.table["name"].to_numpy(), 5, CLASSES)
    np.testing.assert_allclose(prior[:5], CONFUSION[:5], atol=0.06)


def test_copies_across_and_inside_the_splits(sample: Source) -> None:
    usage = sample.table["usage"].to_numpy()
    digests = np.array([hashlib.sha1(image.tobytes()).hexdigest() for image in sample.images])
    training = digests[usage == "train"]
    assert np.isin(digests[usage == "val"], training).sum() == np.isin(digests[usage == "test"], training).sum() == 2
    assert 5 <= len(training) - len(set(training)) <= 8


def test_faces_of_one_expression_differ() -> None:
    rng = np.random.default_rng(0)
    for expression in CLASSES:
        faces = np.stack([draw_face(rng, expression) for _ in range(20)]).astype(float)
        assert faces.shape == (20, 48, 48)
        assert (faces.std(axis=(1, 2)) > 5).all()  # none is blank
        assert np.abs(faces[:10] - faces[10:]).mean(axis=(1, 2)).min() > 5


def test_a_small_network_learns_it_but_not_perfectly(sample: Source) -> None:
    """Four passes over 800 images: far above the largest class, below perfect."""
    torch.manual_seed(0)
    keep, label, _ = label_distribution(votes_of(sample), "majority", 8)
    usage = sample.table["usage"].to_numpy()
    pixels = torch.tensor(sample.images[:, None] / 128.0 - 1, dtype=torch.float32)
    labels = torch.tensor(label)
    train, val = (torch.tensor(np.flatnonzero(keep & (usage == split))) for split in ("train", "val"))
    layers = [
        layer
        for narrow, wide in ((1, 16), (16, 32), (32, 64))
        for layer in (torch.nn.Conv2d(narrow, wide, 3, 2, 1), torch.nn.BatchNorm2d(wide), torch.nn.ReLU())
    ]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(64 * 36, 8))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(4):
        for batch in train[torch.randperm(len(train))].split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(pixels[val]).argmax(1) == labels[val]).float().mean().item()
    assert np.bincount(label[keep & (usage == "val")]).max() / len(val) < 0.4
    assert 0.5 < accuracy < 0.97
