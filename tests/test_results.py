"""The numbers in docs/results are those of the predictions beside them."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import CPU, PEOPLE, make_data, small_run

from benchmarks import results
from fer.evaluate import evaluate
from fer.train import fit


def test_every_published_number_follows_from_the_predictions() -> None:
    table = results.index()
    assert list(table.columns) == results.COLUMNS
    assert set(table["kind"]) <= set(results.KINDS)
    assert {path.stem for path in results.FOLDER.glob("*.csv")} == {"index", *table["run"]}


def test_another_number_is_refused(tmp_path: Path) -> None:
    shutil.copytree(results.FOLDER, tmp_path / "results")
    table = pd.read_csv(tmp_path / "results" / results.INDEX)
    table.loc[1, "uar"] += 0.01
    table.to_csv(tmp_path / "results" / results.INDEX, index=False)
    with pytest.raises(ValueError, match=f"uar of {table.loc[1, 'run']} is {table.loc[1, 'uar']}, not "):
        results.index(tmp_path / "results")


def test_a_run_is_added_with_the_numbers_of_its_summary(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", subjects=PEOPLE)
    for seed in (1, 2):
        folder = fit("x", small_run(seed=seed, epochs=1), CPU, data, tmp_path / "runs")
        summary = evaluate(folder, data, CPU)
        results.add(folder, "x", "scratch", "fer train x", tmp_path / "results")
        results.add(folder, "x", "scratch", "fer train x", tmp_path / "results")  # again: still one row
    row = results.index(tmp_path / "results").iloc[-1]
    assert (row["run"], row["seed"]) == (folder.name, 2)
    for name, key in (("test", "test"), ("test_exact_unleaked", "test_unleaked_exact"), ("val", "val")):
        assert row[name] == pytest.approx(100 * summary[key]["accuracy"], abs=0.006)
    assert row["uar"] == pytest.approx(100 * summary["test"]["balanced_accuracy"], abs=0.006)
    assert results.lines(tmp_path / "results")[2].startswith("| x | 2 | ")
    assert len(results.recalls("x", tmp_path / "results")) == 2 + 8
