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


def test_rows_against_one_of_them_and_what_all_runs_mistake(tmp_path: Path) -> None:
    """Of one row against another, Dunnett's interval is Student's: here t(.975, 2 degrees) = 4.3027, by hand."""
    right = {"x: a": ("0011", "0111"), "x: b": ("0000", "0001")}  # of four images, the first labelled b, the others a
    entries = []
    for row, runs in right.items():
        for seed, hits in enumerate(runs):
            is_b = [(hit == "1") == (place == 0) for place, hit in enumerate(hits)]
            sure = [0.9, 0.6, 0.7, 0.8]
            b = [value if found else 1 - value for value, found in zip(sure, is_b)]
            table = {"name": list("wxyz"), "label": list("baaa"), "leaked": "", "a": [1 - value for value in b], "b": b}
            pd.DataFrame(table).to_csv(tmp_path / f"{row[-1]}{seed}.csv", index=False)
            known = {"row": row, "kind": "ablation", "seed": seed, "run": f"{row[-1]}{seed}", "command": "c"}
            entries.append(known | {"minutes": 1.0, "val": 50.0} | results.numbers(f"{row[-1]}{seed}", tmp_path))
    pd.DataFrame(entries, columns=results.COLUMNS).round(2).to_csv(tmp_path / results.INDEX, index=False)

    # test: 50 and 75 against 0 and 25; the standard error is 12.5 * sqrt(2), so half of the interval is 76.06
    row, *cells = results.against("x: b", tmp_path)[2].strip("| ").split(" | ")
    assert (row, cells[0]) == ("x: a", "+50.00")
    found = [float(word) for cell in cells[1:3] for word in cell.split(" to ")]  # integrated by random numbers
    assert found == pytest.approx([-26.06, 126.06, 0.1056], rel=0.02)
    assert results.mistaken("x: b", tmp_path)[2:] == [
        "| w | b | a | 0.90 |", "| y | a | b | 0.70 |", "| x | a | b | 0.60 |"
    ]  # fmt: skip
    assert results.mistaken("x: a", tmp_path)[2:] == ["| w | b | a | 0.90 |"]
