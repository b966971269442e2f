"""Runs compared from their stored predictions: who is better, is that more than chance, what cannot be compared."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import refusal

from pipelines.comparison import Side, pairs, side, verdicts

CLASSES = ["calm", "glad", "sad"]
LABELS = np.random.default_rng(0).integers(0, 3, 400)


def write_run(runs: Path, name: str, seed: int, right: np.ndarray, lr: float = 0.1, labels: np.ndarray = LABELS) -> str:
    """A finished run whose predictions are right where `right` says."""
    folder = runs / f"{name}-s{seed}-{abs(hash((lr, seed))) % 16**8:08x}"
    folder.mkdir(parents=True)
    predicted = np.where(right, labels, (labels + 1) % 3)
    table = pd.DataFrame({"row": range(len(labels)), "name": "x", "label": [CLASSES[i] for i in labels]})
    table[CLASSES] = 0.1 + 0.7 * np.eye(3)[predicted]
    for split in ("val", "test"):
        table.to_csv(folder / f"predictions_{split}.csv", index=False)
    recall = [right[labels == label].mean() if label in labels else None for label in range(3)]
    known = [value for value in recall if value is not None]
    test = {"accuracy": right.mean(), "balanced_accuracy": float(np.mean(known)), "macro_f1": 0.5, "ece": 0.1}
    test |= {"images": len(labels), "recall": recall, "confusion": [[0] * 3] * 3}
    splits = dict.fromkeys(("val", "test", "test_unleaked", "test_without_train"), test)
    summary = {
        "format": 2, "run_id": folder.name, "name": name, "classes": CLASSES, "test_hash": "t", "parameters": 9,
        "data": {"dataset": "bars", "image_shape": [16, 16]}, "data_hash": "d", "epochs": 1, "best_epoch": 1,
        "train_seconds": 1.0, "finished": 0.0, **splits,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {"model": {"name": "vgg13"}, "seed": seed, "optimizer": {"name": "adamw", "lr": lr}}
    (folder / "config.json").write_text(
        json.dumps({"format": 2, "config": config, "data": summary["data"], "data_hash": "d"})
    )
    return folder.name


def right(share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(400) < share


def test_one_run_against_another(tmp_path: Path) -> None:
    good, bad = write_run(tmp_path, "good", 1, right(0.9, 1)), write_run(tmp_path, "bad", 1, right(0.7, 2))
    alike = write_run(tmp_path, "alike", 1, right(0.9, 1) ^ (np.arange(400) < 4))
    clear, close, other = pairs([side(word, tmp_path) for word in (good, bad, alike)], None)
    assert verdicts([clear]) == [clear.verdict()]
    unclear = replace(clear, p=0.07)
    assert unclear.verdict().startswith(f"not told apart by McNemar's test: {100 * clear.accuracy.value:.2f} points")
    assert verdicts([clear, other])[1] == f"{bad} and {alike}: {other.verdict()}"
    gap = right(0.9, 1).mean() - right(0.7, 2).mean()
    assert clear.accuracy.value == pytest.approx(gap)
    assert gap in clear.accuracy
    assert 0 not in clear.accuracy
    assert (clear.test, clear.p < 1e-6, clear.balanced_p) == ("McNemar", True, None)
    assert clear.verdict() == f"{good} is better than {bad} by {100 * gap:.2f} points"
    assert close.differing == pytest.approx(0.01)
    assert close.verdict() == "not told apart: they differ on 1.0 % of 400 images, where 1.0 points would stand out"
    assert side(good, tmp_path).recalls()[0].value == pytest.approx(right(0.9, 1)[LABELS == 0].mean())


def right_of(found: Side) -> np.ndarray:
    """bool [runs, n]."""
    return found.probabilities.argmax(2) == found.labels


def test_seeds_of_a_recipe_are_one_side(tmp_path: Path) -> None:
    """Images may tell two sides apart that seeds do not: the best of lucky seeds is no better recipe."""
    for seed, ours, theirs in ((1, 0.95, 0.7), (2, 0.72, 0.71), (3, 0.74, 0.69)):
        write_run(tmp_path, "ours", seed, right(ours, seed))
        write_run(tmp_path, "theirs", seed, right(theirs, 10 + seed))
    newer = next(tmp_path.glob("ours-s1-*")) / "config.json"  # that of the others is from before there were teachers
    content = json.loads(newer.read_text())
    content["config"] |= {"teacher": None, "teacher_share": 0.5}
    newer.write_text(json.dumps(content))
    ours, theirs = side("ours", tmp_path), side("theirs-", tmp_path)
    assert (ours.name, len(ours.folders)) == ("ours (3 seeds)", 3)
    (pair,) = pairs([ours, theirs], None)
    assert pair.accuracy.value == pytest.approx(np.mean(ours.accuracies) - np.mean(theirs.accuracies))
    assert pair.accuracy.low > 0
    assert pair.test == "Welch"
    found = scipy.stats.ttest_ind(*([np.mean(one["test"]["recall"]) for one in s.summaries] for s in (ours, theirs)),
                                  equal_var=False)  # fmt: skip
    assert pair.balanced_p == pytest.approx(found.pvalue)
    assert pair.verdict().startswith("not told apart over seeds: ")
    assert pair.detectable == pytest.approx((pair.accuracy.high - pair.accuracy.low) / 2, rel=0.1)
    runs = [(one, other) for one in right_of(ours) for other in right_of(theirs)]
    assert pair.differing == pytest.approx(np.mean([(one != other).mean() for one, other in runs]))
    (mixed,) = pairs([ours, side(theirs.folders[0].name, tmp_path)], None)
    assert (mixed.p, mixed.balanced_p) == (None, None)


def test_a_recall_over_seeds_is_the_mean_of_theirs(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], 5)
    for seed, hits in ((1, 2), (2, 3)):
        write_run(tmp_path, "x", seed, np.arange(15) < hits, labels=labels)
    recall = side("x", tmp_path).recalls()[0]
    assert recall.value == 0.5
    assert recall.low < 0.4 < 0.6 < recall.high


def test_seeds_that_are_all_alike_prove_nothing(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path, "ours", seed, np.arange(400) < 360)
        write_run(tmp_path, "theirs", seed, np.arange(400) < 320)
    (pair,) = pairs([side("ours", tmp_path), side("theirs", tmp_path)], None)
    assert (pair.p, pair.accuracy.low > 0) == (None, True)
    assert "not told apart over seeds: 10.00 points, but each side is the same with every seed; " in pair.verdict()


def test_a_single_test_image_proves_nothing(tmp_path: Path) -> None:
    one, label = np.ones(1, bool), np.zeros(1, int)
    first = write_run(tmp_path, "hit", 1, one, labels=label)
    for seed in (1, 2):
        write_run(tmp_path, "mis", seed, ~one, labels=label)
    (pair,) = pairs([side(first, tmp_path), side("mis", tmp_path)], None)
    assert (pair.accuracy.low, pair.accuracy.high) == (-1, 1)
    assert pair.verdict().startswith("not told apart: ")


def test_runs_of_the_first_format_and_of_renamed_pictures_compare(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name, 1, right(0.8, number)) for number, name in enumerate(("old", "new"))]
    for run in runs:
        path = tmp_path / run / "summary.json"
        path.write_text(path.read_text().replace('"test_hash": "t", ', ""))
    renamed = tmp_path / runs[1] / "predictions_test.csv"
    pd.read_csv(renamed).assign(name="y").to_csv(renamed, index=False)
    assert len(pairs([side(run, tmp_path) for run in runs], None)) == 1


def test_seeds_are_named_one_by_one_where_a_start_names_too_many(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path, "one", seed, right(0.9, seed))
        write_run(tmp_path, "one", seed, right(0.8, seed), lr=0.2)
    assert "several recipes" in refusal(side, "one-", tmp_path)
    ids = [side(path.name, tmp_path) for path in sorted(tmp_path.glob("one-*"))]
    for rate in (0.1, 0.2):
        chosen = [one.name for one in ids if f'"lr": {rate}' in (one.folders[0] / "config.json").read_text()]
        both = side(",".join(chosen), tmp_path)
        assert ([path.name for path in both.folders], both.name) == (chosen, "one (2 seeds)")
        assert side(",".join([*chosen, chosen[0]]), tmp_path) == both  # named twice, counted once
        assert refusal(side, f"{chosen[0]},nothing", tmp_path).startswith("nothing: no finished run in ")


def test_what_is_not_to_be_compared_is_named(tmp_path: Path) -> None:
    first = write_run(tmp_path, "one", 1, right(0.9, 1))
    second = write_run(tmp_path, "one", 2, right(0.9, 1), lr=0.2)
    several = "one: names runs of several recipes, give more of the id, or several with commas: "
    assert refusal(side, "one", tmp_path) == f"{several}{first} (optimizer.lr=0.1); {second} (optimizer.lr=0.2)"
    for name, hashed in (("again", ["t", "t"]), ("moved", ["t", "u"])):
        for seed, test_hash in enumerate(hashed):
            summary = tmp_path / write_run(tmp_path, name, seed, right(0.9, 1)) / "summary.json"
            summary.write_text(summary.read_text().replace('"test_hash": "t"', f'"test_hash": "{test_hash}"'))
    once, twice = sorted(path.name for path in tmp_path.glob("again-*"))
    config = tmp_path / twice / "config.json"
    config.write_text(config.read_text().replace('"seed": 1', '"seed": 0'))
    message = f"again: names several runs of one seed, give more of the id: {once}, {twice}"
    assert refusal(side, "again", tmp_path) == message
    once, twice = sorted(path.name for path in tmp_path.glob("moved-*"))
    message = f"moved: {once} and {twice} were not evaluated on the same test images; run `fer evaluate` on each"
    assert refusal(side, "moved", tmp_path) == message
    other = write_run(tmp_path, "other", 1, right(0.9, 1), labels=LABELS[::-1])
    message = refusal(pairs, [side(first, tmp_path), side(other, tmp_path)], None)
    assert message.startswith(f"{other} and {first}: not evaluated on the same test images")
    path = tmp_path / first / "predictions_test.csv"
    path.write_text(path.read_text()[:-40])  # cut off
    message = refusal(side(first, tmp_path).scores)
    assert re.match(f"{path}: no predictions there .*; delete {path.parent}/summary.json and run", message)
    (tmp_path / "open").mkdir()
    for word in ("open", "nothing", "*", "../" + tmp_path.name + "/one", ""):
        assert re.search("no finished run in|names runs of several recipes", refusal(side, word, tmp_path))
