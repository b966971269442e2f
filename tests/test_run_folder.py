"""What is read from a run's folder is what was written, and nothing before it was."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from fer.files import write_json
from fer.run_folder import SUMMARY, Progress, all_runs, named, read_progress, read_rows, read_summary, write_rows

ROW = dict.fromkeys(("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds", "time"), 1 / 3)
ROWS = [{"epoch": 1, **ROW}, {"epoch": 2, **ROW, "val_accuracy": 0.5, "beside": 1.0}]
SCORES = {
    **dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "ece"), 0.5),
    "images": 2,
    "recall": [1.0, None],
    "confusion": [[1, 1], [0, 0]],
}
FINISHED = {
    "format": 2, "run_id": "x-s1", "name": "x", "data": {"dataset": "bars", "image_shape": [16, 16]}, "data_hash": "0",
    "classes": ["a", "b"], "parameters": 9, "epochs": 3, "best_epoch": 2, "train_seconds": 1.5, "finished": 1e9,
    **dict.fromkeys(("val", "test", "test_unleaked_exact", "test_without_train"), SCORES),
}  # fmt: skip


def test_rows_are_read_as_they_were_written_and_take_the_place_of_others(tmp_path: Path) -> None:
    assert (read_rows(tmp_path), read_progress(tmp_path), read_summary(tmp_path)) == ([], None, None)
    write_rows(tmp_path, [*ROWS, ROWS[0]])
    write_rows(tmp_path, ROWS)
    assert read_rows(tmp_path) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_runs_on_folds_are_meant_only_by_a_word_with_a_dot(tmp_path: Path) -> None:
    names = ["x-s1-0", "x.fold1of2-s1-0", "x.fold2of2-s1-0"]
    for name in names:
        (tmp_path / name).mkdir()
    for word, found in (("x", names[:1]), ("x.", names[1:]), ("x.fold2", names[2:]), (names[1], names[1:2])):
        assert [path.name for path in named(tmp_path, word)] == found


def test_no_word_means_no_run(tmp_path: Path) -> None:
    for name in ("x-s1", "x.fold1of2-s1"):
        (tmp_path / name).mkdir()
    assert [named(tmp_path, word) for word in ("", "/", f"{tmp_path}/")] == [[], [], []]
    assert [path.name for path in all_runs(tmp_path)] == ["x-s1"]


def test_progress_is_written_once_a_second_and_at_the_end_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("fer.run_folder.time.monotonic", lambda: now[0])
    progress, seen = Progress(tmp_path, 3), []
    for step in range(1, 11):
        now[0] += 0.3
        progress(1, step, 10)
        seen.append((read_progress(tmp_path) or {})["step"])
    assert seen == [1, 1, 1, 1, 5, 5, 5, 5, 9, 10]
    assert read_progress(tmp_path) == {"epoch": 1, "epochs": 3, "step": 10, "steps": 10}
    for damaged in ("{", '{"epoch": 1, "epochs": 3, "step": 1, "steps": 0}'):
        (tmp_path / "progress.json").write_text(damaged)
        assert read_progress(tmp_path) is None


def test_a_summary_of_format_1_has_the_names_of_today(tmp_path: Path) -> None:
    shared = {key: FINISHED[key] for key in FINISHED if not key.startswith("test_")}
    write_json(tmp_path / SUMMARY, {**shared, "format": 1, "test_without_leaked": SCORES})
    assert read_summary(tmp_path) == {**shared, "format": 1, "test_without_train": SCORES}
    write_json(tmp_path / SUMMARY, FINISHED)
    assert read_summary(tmp_path) == json.loads((tmp_path / "summary.json").read_text()) == FINISHED


def finished(**changes: Any) -> str:
    return json.dumps(FINISHED | changes)


DAMAGED = {
    "{": "not valid JSON",
    "[" * 100_000: "not valid JSON",
    "1" * 5000: "not valid JSON",
    "[]": "should be a table of keys, got []",
    '{"a": 1}': "run_id: missing",
    finished(finished=float("nan")): "not valid JSON",
    finished(best_epoch=99): "best_epoch: is 99 of 3",
    finished(classes=["a", "b", "c"]): "val: is not of 3 classes",
    finished(val=SCORES | {"accuracy": 2}): "val.accuracy: should be less than or equal to 1, got 2",
    finished(test_unleaked_exact=None): "test_unleaked: missing",
}


def test_a_damaged_summary_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for text, fault in DAMAGED.items():
        path.write_text(text)
        assert refusal(read_summary, tmp_path) == f"{path}: {fault}; delete it and run `fer evaluate {tmp_path.name}`"
    path.unlink()
    path.symlink_to("summary.json")
    assert "cannot be read (Too many levels of symbolic links); delete it" in refusal(read_summary, tmp_path)
    (tmp_path / "notes").touch()
    assert read_summary(tmp_path / "notes") is None  # a file beside the runs


@pytest.mark.parametrize("line", ['{"epoch": 1', "[]", json.dumps(ROWS[0] | {"val_accuracy": "x"}), '{"lr": NaN}'])
def test_a_damaged_row_is_named_and_comes_back_from_the_checkpoint(line: str, tmp_path: Path) -> None:
    write_rows(tmp_path, ROWS)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line)
    message = refusal(read_rows, tmp_path)
    assert message.startswith(f"{tmp_path}/metrics.jsonl: ")
    assert "; delete " in message
    assert "summary.json, if there is one, and run the com" in message
