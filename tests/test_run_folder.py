"""What is read from a run's folder is what was written, and nothing before it was."""

import json
from pathlib import Path

import pytest

from fer.errors import UserError
from fer.run_folder import Progress, read_progress, read_rows, read_summary, write_rows, write_summary

ROWS = [{"epoch": 1, "val_accuracy": 0.5}, {"epoch": 2, "val_accuracy": 1 / 3}]


def test_nothing_is_there_at_first(tmp_path: Path) -> None:
    assert (read_rows(tmp_path), read_progress(tmp_path), read_summary(tmp_path)) == ([], None, None)


def test_rows_are_read_as_they_were_written_and_take_the_place_of_others(tmp_path: Path) -> None:
    write_rows(tmp_path, [*ROWS, ROWS[0]])
    write_rows(tmp_path, ROWS)
    assert read_rows(tmp_path) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


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


def test_a_summary_of_format_1_has_the_names_of_today(tmp_path: Path) -> None:
    write_summary(tmp_path, {"test_without_leaked": {"accuracy": 0.5}})
    assert read_summary(tmp_path) == {"test_without_train": {"accuracy": 0.5}}
    write_summary(tmp_path, {"run_id": "x"})
    assert read_summary(tmp_path) == json.loads((tmp_path / "summary.json").read_text()) == {"run_id": "x"}


def test_a_summary_that_is_no_json_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json: not valid JSON; delete it and run `fer evaluate "):
        read_summary(tmp_path)
