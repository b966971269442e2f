"""Folds: each image is test once, nobody is on two sides, and what a run is does not depend on how it was asked for."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import (
    CPU,
    DATA,
    change,
    doe,
    epochs_done,
    experiment,
    last_flow_run,
    make_data,
    refusal,
    start_fer,
    wait_for,
    workers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from fer.data.dataset import DataSet, open_data
from fer.data.folds import SUBJECTS, copies_of, fold_of, folds_of, make_folds
from fer.errors import UserError
from fer.evaluate import evaluate
from fer.train import fit
from pipelines import experiments
from pipelines.folds import CONFUSION, jobs_of, predictions_for


def usages(labels: Sequence[int], subjects: Sequence[str], folds: str, seed: int = 0, copies: Any = None) -> np.ndarray:
    """Text [folds, N]."""
    names, places = [f"class {label}" for label in range(max(labels) + 1)], range(len(labels))
    copies = np.array([*places] if copies is None else copies)
    return np.stack(make_folds(np.array(labels), np.array(subjects, str), copies, folds, seed, names))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 40)), min_size=30, max_size=60),
    st.sampled_from(["2", "3", "5", SUBJECTS]),
    st.booleans(),
    st.integers(0, 99),
)
def test_nobody_and_no_copy_is_on_two_sides(
    images: list[tuple[int, int, int]], folds: str, some_unknown: bool, seed: int
) -> None:
    labels = [label for label, *_ in images]
    subjects = [f"s{subject}" if subject or not some_unknown else "" for _, subject, _ in images]
    copies = [copy if folds != SUBJECTS else place for place, (*_, copy) in enumerate(images)]
    message, found = "", None
    try:
        found = usages(labels, subjects, folds, seed, copies)
    except UserError as error:
        message = str(error)
    if found is None:
        assert message.startswith(f"folds {folds}: ")
        return
    assert ((found == "test").sum(0) == 1).all()
    assert len(found) == (len(set(subjects)) if folds == SUBJECTS else int(folds))
    for fold in found:
        assert set(fold) == {"train", "val", "test"}
        assert {label for label, usage in zip(labels, fold) if usage == "train"} == set(labels)
        for kind in (subjects, copies):
            assert len({(one, usage) for one, usage in zip(kind, fold) if one != ""}) == len({*kind} - {""})
    assert (usages(labels, subjects, folds, seed, copies) == found).all()


def spread(labels: np.ndarray, place: np.ndarray) -> float:
    """The largest distance of a class's share in a fold from the mean, over classes and folds."""
    shares = np.array([np.bincount(labels[place == fold], minlength=7) for fold in range(5)])
    return float(abs(shares / shares.sum(0) - 1 / 5).max())


@pytest.mark.parametrize("people", [118, 10, None])
def test_classes_are_divided_no_worse_than_by_scikit_learn(people: int | None) -> None:
    """Over ten drawn sets of 981 images with the classes of CK+; None: without subjects, where it is exact."""
    spreads = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.repeat(np.arange(7), [135, 54, 177, 75, 207, 84, 249]))
        group = rng.integers(0, people or 1, 981)
        found = usages(labels.tolist(), [f"S{person}" if people else "" for person in group], "5", seed)
        theirs = (StratifiedGroupKFold if people else StratifiedKFold)(5, shuffle=True, random_state=seed)
        place = np.zeros(981, int)
        for fold, (_, test) in enumerate(theirs.split(labels, labels, group if people else None)):
            place[test] = fold
        spreads.append((spread(labels, (found == "test").argmax(0)), spread(labels, place)))
    ours, others = np.mean(spreads, 0)
    assert ours <= others


# A data set


def pooled(folder: Path, subjects: Sequence[str], **changes: Any) -> DataSet:
    """A data set without published splits; test is held out."""
    make_data(folder, {"train": 96, "val": 32, "test": 32}, subjects=subjects)
    own = {"held_out": {"val": "all", "test": "all"}, "seed": 1, **changes}
    change(folder, "splits/summary.json", lambda text: json.dumps({**json.loads(text), **own}))
    return open_data(folder)


PERSONS = [f"p{row // 8 % 5}" for row in range(160)]  # each with four images of each class


def test_a_fold_is_the_data_set_with_other_rows(tmp_path: Path) -> None:
    data = pooled(tmp_path / "data", PERSONS)
    names = folds_of(data, "5")
    views = [fold_of(data, name) for name in names]
    assert names == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert sorted(np.concatenate([view.split("test").rows for view in views])) == list(range(160))
    assert len({view.hash for view in views} | {data.hash}) == 6
    for view in views:
        assert (view.images is data.images, fold_of(view, view.summary["fold"]) is view) == (True, True)
        assert view.summary["totals"] == {"train": 96, "val": 32, "test": 32}
        assert not view.split("test").leaked.any()
        np.testing.assert_allclose(view.prior().numpy(), 0.8 * np.eye(8) + 0.2 / 8, atol=1e-6)
    assert set(fold_of(data, f"3/{SUBJECTS}").split("test").subjects) == {"p2"}
    data = pooled(tmp_path / "published", [""] * 160, held_out={"val": "train"})  # its test split is not divided
    rows = [fold_of(data, name).split(part).rows for name in folds_of(data, "4") for part in ("train", "val", "test")]
    assert set(np.concatenate(rows)) == set(range(128))


def test_copies_are_found_where_subjects_are_unknown() -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 24, 24), dtype=np.uint8)
    images[1], images[2], images[3] = images[0], images[0] // 2 + 9, images[0, :, ::-1]
    for subjects, threshold, found in (
        ([""] * 6, 0.94, [0, 0, 0, 0, 1, 2]), ([""] * 6, None, [0, 0, 1, 2, 3, 4]),
        ([*"abcdef"], 0.94, [0, 0, 1, 2, 3, 4]),
    ):  # fmt: skip
        assert copies_of(images, np.arange(6), np.array(subjects, str), threshold).tolist() == found
    smooth = np.asarray(Image.fromarray(images[5, :6, :6]).resize((48, 48), Image.Resampling.BICUBIC))
    chain = np.stack([np.roll(smooth, step, axis=1) for step in range(4)])  # its ends are less alike than neighbours
    assert copies_of(chain, np.arange(4), np.full(4, ""), 0.94).tolist() == [0, 0, 0, 0]
    assert copies_of(chain[::3], np.arange(2), np.full(2, ""), 0.94).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("folds", "subjects", "changes", "message"),
    [
        *((word, PERSONS, {}, f"folds {word}: should be 2 or more, or `subjects`") for word in ("1", "-1", "x", "")),
        (SUBJECTS, ["", *PERSONS[1:]], {}, "folds subjects: 1 of 160 images name no subject; set data.subject_pattern"),
        (SUBJECTS, ["a", "b"] * 80, {}, "folds subjects: there are 2 subjects; train, val and test need one each"),
        ("10", PERSONS, {}, "folds 10: there are 5 subjects; choose 5 or fewer"),
        ("40", [""] * 160, {}, "folds 40: too few images of a class: neutral has 20, happiness has 20"),
        ("2", ["a", "b"] * 80, {}, "folds 2: fold 1 would train without "),
        ("2", ["ab"[row // 8 % 2] for row in range(160)], {}, "folds 2: fold 1 has too few subjects"),
        ("5", PERSONS, {"label_mode": "probability"}, "split.label_mode: is probability, but in folds"),
    ],
)
def test_what_cannot_be_divided(
    folds: str, subjects: list[str], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert refusal(folds_of, pooled(tmp_path / "data", subjects, **changes), folds).startswith(message)


def test_the_same_pixels_under_two_names_are_told_where_each_subject_is_left_out() -> None:
    line = refusal(usages, [0] * 6, list("aabbcc"), SUBJECTS, copies=[0, 1, 2, 0, 3, 4])
    assert line.startswith("folds subjects: subjects a and b share an image with the same pixels")


# The flow


def test_no_fold_starts_or_learns_from_another_run(recipes: Path) -> None:
    data = pooled(recipes / DATA, PERSONS)
    experiment(recipes, "first", **doe())
    experiment(recipes, "second", **doe(init_from="first"))
    line = refusal(jobs_of, experiments.load(["second"], {}), {"second": data}, "5", recipes / "data/runs")
    assert line.startswith("second: init_from: a fold cannot start from first, which was trained on its test images;")
    found = experiments.load(["first", "teacher=x-s1-01234567"], {})
    line = refusal(jobs_of, found, {"first": data}, "5", recipes / "data/runs")
    assert line.startswith("first: teacher: a fold cannot learn from x-s1-01234567, which was trained on its test ")
    data.summary["label_noise"] = 0.2
    line = refusal(jobs_of, experiments.load(["first"], {}), {"first": data}, "5", recipes / "data/runs")
    assert line == "first: --folds would test on wrong labels (split.label_noise: 0.2); take other data"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_the_last_fold_the_same_command_ends_it_as_if_never_cut(
    recipes: Path, tmp_path: Path, prefect_server: str, ray_here: None, here: Callable
) -> None:
    """kill -9 costs an epoch, and no process or run is left going.

    The sum of the folds is made once, recorded above the folds, and again where it is lost; no fold becomes a model.
    """
    data = pooled(recipes / DATA, PERSONS)
    run = experiment(recipes, "small", epochs=8, batch_size=4)
    words = "train", "small", "--folds", "3"
    killed = start_fer(recipes, *words, PREFECT_API_URL=prefect_server)
    wait_for(lambda: len(found := epochs_done(recipes)) == 3 and all(found.values()))
    killed.kill()
    killed.communicate()
    wait_for(lambda: not workers(recipes))
    with closing(sqlite3.connect(recipes / "mlflow.db")) as store:
        ends = "select distinct status from runs where status != 'FINISHED'"  # the first fold may be done
        wait_for(lambda: store.execute(ends).fetchall() == [("FAILED",)])
    wait_for(lambda: last_flow_run() == ("CRASHED", {"small"}))
    assert not list((recipes / "data").glob("folds/*"))
    done = here(*words)
    assert done.returncode == 0, done.stderr
    accuracies = []
    for fold in folds_of(data, "3"):
        folder = fit("small", run, CPU, recipes / DATA, tmp_path / "uncut", fold=fold)
        accuracies.append(evaluate(folder, recipes / DATA, CPU)["test"]["accuracy"])
        for name in ("best/model.safetensors", "predictions_test.csv"):
            assert (recipes / "data/runs" / folder.name / name).read_bytes() == (folder / name).read_bytes()
    (folder,) = (recipes / "data/folds").iterdir()
    result, table = json.loads((folder / "summary.json").read_text()), pd.read_csv(folder / "predictions.csv")
    right = table["label"] == table["prediction"]
    spread = result["over_folds"]["accuracy"]
    people = right.groupby(table["subject"]).mean()
    assert table["row"].tolist() == list(range(160))
    assert (result["test"]["accuracy"], spread["mean"], spread["sd"], result["over_subjects"]["sd"]) == pytest.approx(
        (right.mean(), np.mean(accuracies), np.std(accuracies, ddof=1), people.std())
    )
    train = table[table["row"].isin(data.split("train").rows)]
    prior = pd.read_csv(folder / "confusion.csv", index_col=0)
    assert prior.loc["fear", "anger"] == pytest.approx(train[train["label"] == "fear"]["anger"].mean())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with closing(sqlite3.connect(recipes / "mlflow.db")) as store:
        kinship = "select count(distinct run_uuid) from tags where key = 'mlflow.parentRunId'"
        models = "select count(*) from registered_models"
        assert [store.execute(query).fetchone() for query in (kinship, models)] == [(3,), (0,)]
    assert "Nothing to do" in here(*words).stdout
    shutil.rmtree(folder)
    assert here(*words).returncode == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with closing(sqlite3.connect(recipes / "mlflow.db")) as store:
        assert len(store.execute("select name from runs where lifecycle_stage = 'active'").fetchall()) == 4
    shown = here("compare").stdout
    assert (folder.name in shown, ".fold1of3" in shown) == (True, False)

    assert predictions_for(data)[0] == folder.name
    other_votes = table["label"].where(table["label"] != "fear", "anger")  # as of another vote rule
    table.assign(label=other_votes).to_csv(folder / "predictions.csv", index=False)
    assert predictions_for(data) is None
    for content, told in (("", "cannot be read (No columns"), ((folder / CONFUSION).read_text(), "cannot be read (")):
        (folder / "predictions.csv").write_text(content)
        assert refusal(lambda: predictions_for(data)).startswith(f"data/folds/{folder.name}/predictions.csv: {told}")
