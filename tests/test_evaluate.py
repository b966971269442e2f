"""The numbers of a finished run agree with its predictions, leave leaked images out, and follow changes of test."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, CPU, PEOPLE, ROOT, doe, make_data, refusal, small_run

from fer import checkpoint
from fer.batches import Feed
from fer.data.dataset import open_data
from fer.evaluate import evaluate, metrics, outdated, predict_split
from fer.models import build_model
from fer.resources import Resources
from fer.run import FORMAT
from fer.run_folder import read_summary
from fer.train import fit

FORMAT_1 = sorted((ROOT / "tests" / "golden" / "format1" / "runs").iterdir())


@pytest.fixture(scope="module")
def trained(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("x", small_run(epochs=4), CPU, bars, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / trained.name)


@pytest.fixture
def own(bars: Path, tmp_path: Path) -> Path:
    """The data of `trained`, to be changed."""
    return shutil.copytree(bars, tmp_path / "own")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is predicted while this holds."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr("fer.evaluate.build_model", refuse)


def table_of(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False)


def set_cells(data: Path, split: str, column: str, values: dict[int, Any]) -> None:
    """Other values of a column, by row of the image."""
    path = data / "splits" / f"{split}.csv"
    table = table_of(path).set_index("row", drop=False)
    for row, value in values.items():
        assert table.loc[row, column] != value
        table.loc[row, column] = value
    table.to_csv(path, index=False)


def files_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.*")}


def test_predictions_agree_with_the_numbers(folder: Path, bars: Path) -> None:
    summary = evaluate(folder, bars, CPU)
    for split in ("val", "test"):
        table, given = table_of(folder / f"predictions_{split}.csv"), table_of(bars / "splits" / f"{split}.csv")
        assert table.columns.tolist() == ["row", "name", "label", "prediction", "leaked", *CLASSES]
        assert table[["row", "name"]].equals(given[["row", "name"]])
        assert table["label"].tolist() == [CLASSES[label] for label in given["label"]]
        assert table["prediction"].tolist() == table[CLASSES].idxmax(axis=1).tolist()
        np.testing.assert_allclose(table[CLASSES].sum(axis=1), 1, atol=5e-6)
        found, right = summary[split], table["label"] == table["prediction"]
        assert (found["images"], found["accuracy"]) == (40, pytest.approx(right.mean()))
        counted = pd.crosstab(table["label"], table["prediction"]).reindex(index=CLASSES, columns=CLASSES, fill_value=0)
        assert found["confusion"] == counted.to_numpy().tolist()
    assert summary["val"]["accuracy"] > 0.2  # it has learned something: the tables are not all alike


def test_twins_in_train_and_in_val_by_hand(folder: Path, own: Path) -> None:
    """Of test's 40 images the first ten are right; 140, 150, 160, 170 are in train, 141, 142, 175 in val, 143 near."""
    evaluate(folder, own, CPU)
    table = table_of(folder / "predictions_test.csv")
    sure = np.eye(8)[[(row + (row >= 146)) % 8 for row in table["row"]]]
    table[CLASSES] = sure
    table.to_csv(folder / "predictions_test.csv", index=False)
    set_cells(own, "test", "duplicate_in", {141: "val", 142: "val", 175: "val", 143: "train"})
    set_cells(own, "test", "duplicate_kind", {143: "near"})
    set_cells(own, "val", "duplicate_in", {100: "train"})  # of val nothing is left out
    summary = evaluate(folder, own, CPU)
    unleaked, without_train = summary["test_unleaked_exact"], summary["test_without_train"]
    assert (unleaked["images"], without_train["images"]) == (33, 36)
    assert (summary["test_unleaked"]["images"], summary["test_unleaked"]["accuracy"]) == (32, 6 / 32)
    assert unleaked["accuracy"] == 7 / 33  # without 140, 141 and 142
    assert without_train["accuracy"] == 9 / 36  # without 140
    table = table_of(folder / "predictions_test.csv")
    found = {place: table["row"][table["leaked"] == place].tolist() for place in ("train", "val", "near")}
    assert found == {"train": [140, 150, 160, 170], "val": [141, 142, 175], "near": [143]}
    assert table["prediction"].tolist() == [CLASSES[label] for label in sure.argmax(1)]


def test_the_summary_tells_of_the_best_checkpoint(folder: Path, bars: Path) -> None:
    (folder / "last" / "model.safetensors").unlink()  # those weights are not wanted
    summary, data = evaluate(folder, bars, CPU), open_data(bars)
    best, rows = checkpoint.load_meta(folder / "best")["epoch"], checkpoint.load_meta(folder / "last")["history"]
    expected = {
        "format": FORMAT, "run_id": folder.name, "name": "x", "classes": CLASSES, "best_epoch": best, "epochs": 4,
        "data_hash": data.hash, "test_hash": data.test_hash, "leak_hash": data.leak_hash,
        "starts_from": ["random weights"], "train_seconds": pytest.approx(sum(row["seconds"] for row in rows)),
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "ece"):
        assert summary["val"][key] == pytest.approx(rows[best - 1][f"val_{key}"], abs=1e-6)
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_test_is_read_once_and_a_run_on_other_data_keeps_its_numbers(
    folder: Path, bars: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """They are those of the data that it was trained on, whatever test is today."""
    summary = evaluate(folder, bars, CPU)
    before = files_of(folder)
    request.getfixturevalue("no_network")
    other = make_data(tmp_path / "other", {"train": 95, "val": 40, "test": 41}, subjects=PEOPLE)
    for data in (bars, other):
        assert outdated(summary, open_data(data)) is None
        assert evaluate(folder, data, CPU) == summary == read_summary(folder)
    assert files_of(folder) == before


# The data change after the evaluation


def test_other_leak_marks_need_no_network_but_the_predictions(
    folder: Path, own: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fresh = shutil.copytree(folder, tmp_path / "fresh" / folder.name)
    before = evaluate(folder, own, CPU)
    set_cells(own, "test", "duplicate_in", {140: "", 150: "val", 141: "train", 142: "val"})
    assert outdated(before, open_data(own)) == (
        "other test images count as leaked since: those columns are computed again, from its predictions"
    )
    wanted = evaluate(fresh, own, CPU)
    request.getfixturevalue("no_network")
    found = evaluate(folder, own, CPU)
    assert found == wanted | {"finished": found["finished"]}
    assert (folder / "predictions_test.csv").read_bytes() == (fresh / "predictions_test.csv").read_bytes()
    assert (found["test_unleaked"]["images"], found["test_without_train"]["images"]) == (35, 37)
    assert found["finished"] > before["finished"]
    assert (read_summary(folder), outdated(found, open_data(own))) == (found, None)
    path = folder / "predictions_test.csv"
    set_cells(own, "test", "duplicate_in", {143: "val"})
    for spoil in (path.unlink, lambda: path.write_text("row,name\n"), lambda: path.write_text("")):
        spoil()
        again = rf"delete {folder}/summary\.json and run `fer evaluate {folder.name}`"
        assert re.fullmatch(rf"{path}: no predictions there \([^\n]+\); {again}", refusal(evaluate, folder, own, CPU))


@pytest.mark.parametrize("change", ["label and marks", "subject", "fewer"])
def test_another_test_split_is_evaluated_from_the_best_checkpoint(
    change: str, folder: Path, own: Path, tmp_path: Path
) -> None:
    fresh = shutil.copytree(folder, tmp_path / "fresh" / folder.name)
    before = evaluate(folder, own, CPU)
    path = own / "splits" / "test.csv"
    if change == "fewer":
        table_of(path)[:-3].to_csv(path, index=False)
        summary = own / "splits" / "summary.json"
        totals = {"train": 96, "val": 40, "test": 37}
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"totals": totals}))
    elif change == "subject":
        set_cells(own, "test", "subject", {139: "c"})
    else:
        set_cells(own, "test", "label", {139: 7})
        set_cells(own, "test", "duplicate_in", {141: "val"})
    assert outdated(before, open_data(own)) == (
        "the test split has changed since: evaluated again, from its best checkpoint"
    )
    (folder / "predictions_test.csv").unlink()  # nothing is taken from there
    found, wanted = evaluate(folder, own, CPU), evaluate(fresh, own, CPU)
    assert found == wanted | {"finished": found["finished"]}
    assert (folder / "predictions_test.csv").read_bytes() == (fresh / "predictions_test.csv").read_bytes()
    assert (found["test"]["images"], found["val"]) == (37 if change == "fewer" else 40, before["val"])


def test_a_summary_of_format_1_is_read_and_never_made_again(own: Path, tmp_path: Path, no_network: None) -> None:
    set_cells(own, "test", "duplicate_in", {141: "val"})
    for run in FORMAT_1:
        stored = json.loads((run / "summary.json").read_text())
        summary = read_summary(run)
        assert summary is not None
        assert summary == {"test_without_train": stored.pop("test_without_leaked"), **stored}
        folder = shutil.copytree(run, tmp_path / run.name)
        before = files_of(folder)
        assert outdated(summary, open_data(own)) is None
        assert evaluate(folder, own, CPU) == summary
        assert files_of(folder) == before
    (folder / "summary.json").unlink()
    message = f"{folder}: written in format 1, which can no longer be evaluated; train the run again"
    assert refusal(evaluate, folder, own, CPU) == message


# What is refused, and what changes nothing


def test_cut_while_evaluating_leaves_no_summary(folder: Path, bars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([predict_split])  # the second one is interrupted
    with monkeypatch.context() as patch:
        patch.setattr("fer.evaluate.predict_split", lambda *arguments: next(calls)(*arguments))
        with pytest.raises(StopIteration):
            evaluate(folder, bars, CPU)
    assert not (folder / "summary.json").exists()
    assert evaluate(folder, bars, CPU)["test"]["images"] == 40


def test_other_data_and_unfinished_runs_are_refused(folder: Path, bars: Path, tmp_path: Path) -> None:
    other = make_data(tmp_path / "other", {"train": 96, "val": 41, "test": 40})
    ours, theirs = open_data(bars).hash, open_data(other).hash
    message = f"was trained on data {ours}, but {other} holds {theirs}; `dvc checkout` the former"
    assert refusal(evaluate, folder, other, CPU) == f"{folder}: {message}"
    path = folder / "last" / "checkpoint.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"epoch": 2, "history": meta["history"][:2]}))
    message = f"{folder}: 2 of 4 epochs are done; finish it with `fer train x`"
    assert refusal(evaluate, folder, bars, CPU) == message
    assert not (folder / "predictions_test.csv").exists()


def test_no_images_have_no_accuracy() -> None:
    found = metrics(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert found == {"images": 0, "recall": [None, None], "confusion": [[0, 0], [0, 0]]}


def test_the_size_of_evaluation_batches_changes_nothing(bars: Path) -> None:
    run, data = small_run(**doe("same_subject")), open_data(bars)
    model = build_model(run.model, run.input, 8)

    def logits(size: int) -> torch.Tensor:
        resources = Resources(device="cpu", eval_batch_size=size)
        return predict_split(model, Feed(model, run, resources, data.split("test"), CLASSES, torch.device("cpu")))[0]

    whole = logits(40)
    assert whole.shape == (40, 8)
    for batch in (1, 7, 1000):
        torch.testing.assert_close(logits(batch), whole, atol=1e-5, rtol=1e-4)


def test_a_run_on_hard_labels_which_give_no_class_prior_is_evaluated(data: Path, tmp_path: Path) -> None:
    path = data / "splits/summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_prior": None}))
    assert evaluate(fit("x", small_run(epochs=1), CPU, data, tmp_path / "runs"), data, CPU)["test"]["images"] == 40
