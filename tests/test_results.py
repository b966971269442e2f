"""The numbers in docs/results are those of the predictions beside them."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import CLASSES, CPU, PEOPLE, change, make_data, small_run, swap

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


def test_all_classes_taken_for_equally_frequent(tmp_path: Path) -> None:
    data, folder = make_data(tmp_path / "data", {"train": 12, "val": 8, "test": 8}), tmp_path / "results"
    run = fit("x", small_run(epochs=1, batch_size=4), CPU, data, tmp_path / "runs")
    evaluate(run, data, CPU)
    table = pd.read_csv(run / "predictions_test.csv", keep_default_na=False)  # labels 4 to 7, then 0 to 3
    table[CLASSES] = 0.0
    table[CLASSES[0]], table[CLASSES[4]] = 0.6, 0.4  # two training images and one: .4 beats .6 / 2, not .6 / 1.41
    table.loc[4, CLASSES[4]] = 0.45  # beats both
    table.to_csv(run / "predictions_test.csv", index=False)
    results.add(run, "x", "scratch", "fer train x", folder)
    shown = ("0 | 12.50 | 12.50", "0.5 | 0.00 | 0.00", "1 | 12.50 | 12.50")  # the fifth image, none, the first
    assert results.evened("x", data, folder)[2:] == [f"| {run.name} | {cells} |" for cells in shown]
    with pytest.raises(SystemExit, match="index.csv: has no row y"):
        results.evened("y", data, folder)
    change(data, "splits/summary.json", swap('"neutral", "happiness"', '"happiness", "neutral"'))
    with pytest.raises(SystemExit, match=f"has other classes than {run.name}, or in another order"):
        results.evened("x", data, folder)


def written(folder: Path, leaked: str | list[str]) -> Path:
    """Two rows of two runs on four images, the first labelled b, the others a, and their index."""
    right = {"x: a": ("0011", "0111"), "x: b": ("0000", "0001")}
    entries = []
    folder.mkdir()
    for row, runs in right.items():
        for seed, hits in enumerate(runs):
            is_b = [(hit == "1") == (place == 0) for place, hit in enumerate(hits)]
            sure = [0.9, 0.6, 0.7, 0.8]
            b = [value if found else 1 - value for value, found in zip(sure, is_b)]
            table = {"name": list("wxyz"), "label": list("baaa"), "leaked": leaked, "a": [1 - value for value in b]}
            pd.DataFrame({**table, "b": b}).to_csv(folder / f"{row[-1]}{seed}.csv", index=False)
            known = {"row": row, "kind": "ablation", "seed": seed, "run": f"{row[-1]}{seed}", "command": "c"}
            entries.append(known | {"minutes": 1.0, "val": 50.0} | results.numbers(f"{row[-1]}{seed}", folder))
    pd.DataFrame(entries, columns=results.COLUMNS).round(2).to_csv(folder / results.INDEX, index=False)
    return folder


def compared(folder: Path) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in results.against("x: b", folder)[2:]]


@pytest.mark.filterwarnings("ignore:Precision loss")  # runs that score the same
def test_rows_against_one_of_them_and_what_all_runs_mistake(tmp_path: Path) -> None:
    """Of one row against another, Dunnett's interval is Student's: here t(.975, 2 degrees) = 4.3027, by hand."""
    folder = written(tmp_path / "clean", "")
    # test: 50 and 75 against 0 and 25; the standard error is 12.5 * sqrt(2), so half of the interval is 76.06
    rows = compared(folder)
    assert [row[:2] for row in rows] == [["x: a", part] for part in ("test", "unleaked", "UAR", "UAR, unleaked")]
    assert rows[0][2:5] == ["12.50", "62.50", "+50.00"]
    found = [float(word) for cell in rows[0][5:] for word in cell.split(" to ")]  # integrated by random numbers
    assert found == pytest.approx([-26.06, 126.06, 0.1056], rel=0.02)
    assert results.mistaken("x: b", folder)[2:] == [
        "| w | b | a | 0.90 |", "| y | a | b | 0.70 |", "| x | a | b | 0.60 |"
    ]  # fmt: skip
    assert results.mistaken("x: a", folder)[2:] == ["| w | b | a | 0.90 |"]
    # so is Welch's where both sides have two runs and the same variance
    assert results.minus(["x: a"], ["x: b"], folder)[2] == (
        "| test | 2 and 2 | 62.50 | 12.50 | +50.00 | -26.06 to +126.06 | 0.106 |"
    )
    asked = [(table, ("x: c",)) for table in (results.recalls, results.mistaken, results.against)]
    for table, rows_of in (*asked, (results.minus, (["x: a"], ["x: b", "x: c"]))):
        with pytest.raises(SystemExit, match="has no row x: c$"):
            table(*rows_of, folder)
    rows = compared(written(tmp_path / "leaky", ["", "", "near", "train"]))
    assert [row[1:4] for row in rows if "leaked alone" in row] == [["leaked alone", "25.00", "100.00"]]
    # without them a's runs have the second image or none, b's none; nobody has the first: UAR 0 and 50 against 0
    assert [row[2:5] for row in rows if row[1] == "UAR, unleaked"] == [["0.00", "25.00", "+25.00"]]


@pytest.mark.filterwarnings("ignore:Precision loss")  # runs that score the same
def test_rows_that_keep_other_training_images_are_compared_on_the_images_that_none_has_leaked(tmp_path: Path) -> None:
    """The last image, which both runs of a have right, is leaked for those of b alone, of which the second has it."""
    folder = written(tmp_path / "results", "")
    table = pd.read_csv(folder / results.INDEX)
    for run in ("b0", "b1"):
        path = folder / f"{run}.csv"
        pd.read_csv(path, keep_default_na=False).assign(leaked=["", "", "", "near"]).to_csv(path, index=False)
        for name, value in results.numbers(run, folder).items():
            table.loc[table["run"] == run, name] = round(value, 2)
    table.to_csv(folder / results.INDEX, index=False)
    assert [row[2:4] for row in compared(folder) if row[1] == "unleaked"] == [["0.00", "50.00"]]  # not 62.50
    assert results.minus(["x: a"], ["x: b"], folder)[3].startswith("| unleaked | 2 and 2 | 50.00 | 0.00 | ")


def test_single_runs_together_and_against_each_other(tmp_path: Path) -> None:
    """By hand, of the images w x y z: a0 has the last two right, a1 the last three, b0 none, b1 the last."""
    folder = written(tmp_path / "results", ["", "", "", "near"])
    # of w, labelled b, both give .1; of x .6 and .4 for b; of y .3; of z .2
    assert results.together(["a0", "a1", "a1"], folder)[2] == "| 75.00 | 66.67 | 50.00 |"
    assert results.together(["a0", "a0", "a1"], folder)[2] == "| 50.00 | 33.33 | 33.33 |"
    assert results.pair("a1", "b0", folder)[2] == "| 75.00 | 0.00 | 3 and 0 of 4 | 0.250 |"  # 2 / 2^3
    with pytest.raises(SystemExit, match="has no c0.csv"):
        results.pair("a1", "c0", folder)
    change(folder, "b0.csv", swap("w,b", "w,a"))
    with pytest.raises(SystemExit, match="b0.csv: has other test images than a1.csv"):
        results.together(["a1", "b0"], folder)
