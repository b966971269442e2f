"""Finished runs as rows of text, what a person is told of one, and its picture."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU, ROOT, make_data, small_run

from fer.evaluate import evaluate
from fer.run_folder import read_summary
from fer.train import fit
from pipelines import report
from pipelines.report import COLUMNS, LEGEND, note, other_code, row, summaries

FORMAT_1 = ROOT / "tests" / "golden" / "format1" / "runs"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an epoch, evaluated: 4 of 40 test images also stand in train."""
    data, runs = make_data(tmp_path_factory.mktemp("bars") / "data"), tmp_path_factory.mktemp("runs")
    folder = fit("x", small_run(epochs=1), CPU, data, runs)
    evaluate(folder, data, CPU)
    return folder


@pytest.fixture
def summary(trained: Path) -> dict[str, Any]:
    found = read_summary(trained)
    assert found is not None
    return found


def test_a_row_is_a_run_in_numbers(summary: dict[str, Any]) -> None:
    summary |= {"run_id": "x-s1-abcdef01", "parameters": 1_234_567, "best_epoch": 3, "epochs": 12, "train_seconds": 90}
    summary["val"]["accuracy"] = 0.61234
    summary["test"] |= {"accuracy": 0.75, "balanced_accuracy": 0.5, "macro_f1": 0.25, "ece": 0.04567}
    for key, accuracy in (("unleaked", 0.7), ("unleaked_exact", 0.71), ("without_train", 0.72)):
        summary[f"test_{key}"]["accuracy"] = accuracy
    assert row(summary) == {
        "run": "x-s1-abcdef01", "val": "61.23", "test": "75.00", "unleaked": "70.00", "exact": "71.00",
        "unseen": "72.00",
        "UAR": "50.00", "F1": "25.00", "ECE": "0.046", "params": "1.23M", "epoch": "3/12", "min": "1.5",
    }  # fmt: skip
    for column in set(COLUMNS) - {"run", "params"}:
        assert column in LEGEND


def test_the_note_counts_the_images_that_are_not_leaked(summary: dict[str, Any]) -> None:
    """Of 40 test images, 4 are marked as copies of training images; then all."""
    for many in (36, 0):
        assert f"**{row(summary)['test']} %** of 40 test images" in note(summary)
        unleaked = f"**{row(summary)['unleaked']} %** of the {many} of which neither train nor val holds"
        assert f"{unleaked} a copy or a near duplicate;" in note(summary)
        summary["test_unleaked"] = {"images": 0, "recall": [], "confusion": []}
    assert row(summary)["unleaked"] == "-"


def test_a_run_of_other_code_is_marked(summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def mark(**changes: Any) -> str:
        return row({**summary, **changes})["run"].removeprefix(summary["run_id"])

    assert mark() == ""  # trained and evaluated by the code as it is
    for key in ("trained_by", "made_by"):
        made = summary[key]
        assert mark(**{key: {**made, "commit": "x", "torch": "x", "device": "x"}}) == ""  # the code in fer/ alone
        assert mark(**{key: {**made, "fer": "0" * len(made["fer"])}}) == mark(**{key: {}}) == "*"
    assert mark(trained_by={**summary["trained_by"], "before": ["0" * 12]}) == "*"  # in part
    monkeypatch.setattr(report, "source_hash", lambda: "another")
    assert mark() == "*"


def test_a_run_of_other_code_is_told_before_it_is_shown_or_goes_on(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    assert (other_code(folder), other_code(tmp_path / "none")) == ("", "")
    path = folder / "last/checkpoint.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"made_by": meta["made_by"] | {"fer": "another"}}))
    assert other_code(folder) == ""  # it is finished: the summary counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "source_hash", lambda: "new")
        changed = f"by other code in fer/ than there is now; delete {folder} to train it anew"
        assert other_code(folder) == f"was trained, at least in part, {changed}"
    (folder / "summary.json").unlink()
    assert other_code(folder) == f"goes on from a checkpoint, at least in part, {changed}"
    path.write_text(json.dumps(meta | {"made_by": meta["made_by"] | {"before": ["another"]}}))
    assert other_code(folder) == f"goes on from a checkpoint, at least in part, {changed}"
    path.write_text("half")
    assert other_code(folder) == ""  # the run itself tells


def test_runs_of_format_1_stand_in_the_table(trained: Path, summary: dict[str, Any]) -> None:
    """Numbers by hand from their summary.json; they knew of copies in train alone, and not what made them."""
    runs = [trained, *FORMAT_1.iterdir(), FORMAT_1 / "nowhere"]
    rows = {found["run_id"]: row(found) for found in summaries(runs)}
    assert rows.pop(summary["run_id"]) == row(summary)
    assert [" ".join(cells.values()) for cells in rows.values()] == [
        "bars_doe-s1111-b0d2ed13* 20.00 22.50 - - 22.22 22.50 12.26 0.083 0.04M 1/1 0.0",
        "bars-s1111-28b44a7d* 12.50 12.50 - - 13.89 12.50 2.78 0.007 0.02M 1/2 0.0",
    ]


def test_the_best_on_val_comes_first(trained: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(4)]
    for folder, accuracy in zip(folders, (0.3, 0.9, 0.1)):
        folder.mkdir()
        found = json.loads((trained / "summary.json").read_text())
        found["val"]["accuracy"], found["test"]["accuracy"] = accuracy, 1 - accuracy  # test orders nothing
        (folder / "summary.json").write_text(json.dumps(found))
    folders[3].mkdir()  # unfinished
    assert [summary["val"]["accuracy"] for summary in summaries(folders)] == [0.9, 0.3, 0.1]
