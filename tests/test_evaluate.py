"""The numbers of a finished run agree with its predictions, leave leaked images out, and follow changes of test."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, CPU, PEOPLE, ROOT, doe, leave_of_test, make_data, refusal, small_run

from fer import checkpoint
from fer.batches import Feed
from fer.data.dataset import open_data
from fer.evaluate import evaluate, evened, metrics, outdated, predict_split
from fer.files import write_json
from fer.models import build_model
from fer.resources import Resources
from fer.run import FORMAT
from fer.run_folder import read_rows, read_summary
from fer.train import fit

FORMAT_1 = sorted((ROOT / "tests" / "golden" / "format1" / "runs").iterdir())


@pytest.fixture(scope="module")
def trained(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("x", small_run(epochs=4, ema_decay=0.5), CPU, bars, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / trained.name)


@pytest.fixture
def own(bars: Path, tmp_path: Path) -> Path:
    """The data of `trained`, to be changed."""
    return shutil.copytree(bars, tmp_path / "own")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After it is called, nothing can be predicted."""
    return lambda: monkeypatch.setattr("fer.evaluate.build_model", None)


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


def test_predictions_of_the_best_checkpoint_agree_with_the_numbers(folder: Path, bars: Path) -> None:
    (folder / "last" / "model.safetensors").unlink()  # those weights are not wanted
    summary, data, rows = evaluate(folder, bars, CPU), open_data(bars), read_rows(folder)
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
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert best["val_accuracy"] > 0.2  # it has learned something: the tables are not all alike
    expected = {
        "format": FORMAT, "run_id": folder.name, "name": "x", "classes": CLASSES, "best_epoch": best["epoch"],
        "epochs": 4, "data_hash": data.hash, "test_hash": data.test_hash, "leak_hash": data.leak_hash,
        "starts_from": ["random weights"], "train_seconds": pytest.approx(sum(row["seconds"] for row in rows)),
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    scores = {key: best[f"val_{key}"] for key in ("accuracy", "balanced_accuracy", "macro_f1", "ece")}
    assert {key: summary["val"][key] for key in scores} == pytest.approx(scores, abs=1e-6)
    assert json.loads((folder / "summary.json").read_text()) == summary


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
    found = evaluate(folder, own, CPU)
    parts = ("test_unleaked", "test_unleaked_exact", "test_without_train")
    # without 140, 141 and 142; 143 too; and without 140
    assert [(found[part]["images"], found[part]["accuracy"]) for part in parts] == [
        (32, 6 / 32),
        (33, 7 / 33),
        (36, 0.25),
    ]
    table = table_of(folder / "predictions_test.csv")
    marked = {place: table["row"][table["leaked"] == place].tolist() for place in ("train", "val", "near")}
    assert marked == {"train": [140, 150, 160, 170], "val": [141, 142, 175], "near": [143]}
    assert table["prediction"].tolist() == [CLASSES[label] for label in sure.argmax(1)]


# Test is read once, and follows changes of the data


def test_a_run_keeps_its_numbers_on_other_data_and_those_of_format_1(
    folder: Path, bars: Path, tmp_path: Path, no_network: Callable[[], None]
) -> None:
    evaluate(folder, bars, CPU)
    no_network()
    other = make_data(tmp_path / "other", {"train": 95, "val": 40, "test": 41}, subjects=PEOPLE)
    for run in (folder, *FORMAT_1):
        stored = json.loads((run / "summary.json").read_text())
        if "test_without_leaked" in stored:
            stored["test_without_train"] = stored.pop("test_without_leaked")
            of_this_data = stored | {"data_hash": open_data(bars).hash}  # which knows no test_hash
            assert outdated(of_this_data, open_data(bars)) is None
        copied = shutil.copytree(run, tmp_path / "copied" / run.name)
        before = files_of(copied)
        for data in (bars, other):
            assert outdated(stored, open_data(data)) is None
            assert evaluate(copied, data, CPU) == stored == read_summary(copied)
        assert files_of(copied) == before
    (copied / "summary.json").unlink()
    message = f"{copied}: written in format 1, which can no longer be evaluated; train the run again"
    assert refusal(evaluate, copied, bars, CPU) == message


def test_a_summary_that_is_all_that_is_left_is_shown_without_what_even_classes_give(folder: Path, bars: Path) -> None:
    summary = evaluate(folder, bars, CPU)
    assert evened(folder, summary) is not None
    for lost in ("predictions_test.csv", "best"):
        kept = (folder / lost).rename(folder / "away")
        assert evened(folder, summary) is None
        kept.rename(folder / lost)


def test_other_leak_marks_need_no_network_but_the_predictions(
    folder: Path, own: Path, tmp_path: Path, no_network: Callable[[], None]
) -> None:
    fresh, path = shutil.copytree(folder, tmp_path / "fresh" / folder.name), folder / "predictions_test.csv"
    before = evaluate(folder, own, CPU)
    set_cells(own, "test", "duplicate_in", {140: "", 150: "val", 141: "train", 142: "val"})
    assert outdated(before, open_data(own)) == (
        "other test images count as leaked since: those columns are computed again, from its predictions"
    )
    wanted = evaluate(fresh, own, CPU)
    no_network()
    found = evaluate(folder, own, CPU)
    assert found == wanted | {"finished": found["finished"]} == read_summary(folder)
    assert path.read_bytes() == (fresh / "predictions_test.csv").read_bytes()
    assert (found["finished"] > before["finished"], outdated(found, open_data(own))) == (True, None)
    set_cells(own, "test", "duplicate_in", {143: "val"})
    for spoil in (path.unlink, lambda: path.write_text("row,name\n"), lambda: path.write_text("")):
        spoil()
        message = refusal(evaluate, folder, own, CPU)
        assert message.startswith(f"{path}: no predictions there (")
        assert message.endswith(f"); delete {folder}/summary.json and run `fer evaluate {folder.name}`")


def test_another_test_split_is_evaluated_from_the_best_checkpoint(folder: Path, own: Path, tmp_path: Path) -> None:
    fresh = shutil.copytree(folder, tmp_path / "fresh" / folder.name)
    before = evaluate(folder, own, CPU)
    for images in (40, 37):
        if images == 40:
            set_cells(own, "test", "label", {139: 7})
            set_cells(own, "test", "duplicate_in", {141: "val"})
        else:
            leave_of_test(own, np.arange(40) < images)
        changed = "the test split has changed since: evaluated again, from its best checkpoint"
        assert outdated(before, open_data(own)) == changed
        (folder / "predictions_test.csv").unlink()  # nothing is taken from there
        (fresh / "summary.json").unlink(missing_ok=True)
        found, wanted = evaluate(folder, own, CPU), evaluate(fresh, own, CPU)
        assert found == wanted | {"finished": found["finished"]}
        assert (folder / "predictions_test.csv").read_bytes() == (fresh / "predictions_test.csv").read_bytes()
        assert (found["test"]["images"], found["val"]) == (images, before["val"])


# What is refused, and what changes nothing


def test_cut_unfinished_or_on_other_data_it_leaves_no_summary(folder: Path, bars: Path, tmp_path: Path) -> None:
    calls = iter([predict_split])  # the second one is interrupted
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr("fer.evaluate.predict_split", lambda *arguments: next(calls)(*arguments))
        evaluate(folder, bars, CPU)
    other = make_data(tmp_path / "other", {"train": 96, "val": 41, "test": 40})
    message = f"was trained on data {open_data(bars).hash}, but {other} holds {open_data(other).hash}"
    assert refusal(evaluate, folder, other, CPU) == f"{folder}: {message}; `dvc checkout` the former"
    meta = checkpoint.load_meta(folder / "last")
    write_json(folder / "last" / "checkpoint.json", meta | {"epoch": 2, "history": meta["history"][:2]})
    message = f"{folder}: 2 of 4 epochs are done; finish it with `fer train x`"
    assert refusal(evaluate, folder, bars, CPU) == message
    assert not (folder / "summary.json").exists()


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
