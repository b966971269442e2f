"""Files are whole or absent, whatever happens while they are written; one process at a time works on a folder."""

import fcntl
import json
import math
import os
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import refusal

from fer.files import held, is_held, new_folder, recover, write_json


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(target: Path, text: str) -> None:
    with new_folder(target) as folder:
        (folder / "a.txt").write_text(text)


def test_new_folder_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    write(target, "one")
    (target / "left over.txt").write_text("x")
    with new_folder(target) as folder:
        (folder / "a.txt").write_text("two")
        assert content(target) == {"a.txt": "one", "left over.txt": "x"}
    assert content(target) == {"a.txt": "two"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_keeps_the_old_content_and_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    for expected in ({}, {"a.txt": "one"}):
        with pytest.raises(error), new_folder(target) as folder:
            (folder / "a.txt").write_text("half")
            raise error
        assert content(tmp_path / "out") == expected
        assert [path.name for path in tmp_path.iterdir()] == (["out"] if expected else [])
        write(target, "one")


@pytest.mark.parametrize("renames", [0, 1])
def test_a_process_killed_between_the_renames_loses_nothing(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    done: list[Path] = []
    write(target, "one")
    real = Path.replace

    def killed(self: Path, other: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(other)
        return real(self, other)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(target, "two")
    monkeypatch.undo()
    assert recover(target)
    assert content(tmp_path) == {"out/a.txt": "one"}
    write(target, "three")
    assert content(tmp_path) == {"out/a.txt": "three"}


def test_a_resumable_folder_goes_on_until_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    write(target, "old")
    for text in ("one", "two"):
        with pytest.raises(KeyboardInterrupt), new_folder(target, resumable=True) as folder:
            (folder / f"{text}.txt").write_text(text)
            raise KeyboardInterrupt
        assert content(target) == {"a.txt": "old"}
    with new_folder(target, resumable=True) as folder:
        assert content(folder) == {"one.txt": "one", "two.txt": "two"}
        (folder / "one.txt").unlink()
    assert content(tmp_path) == {"deep/out/two.txt": "two"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_resumable_folder_vanishes_when_it_is_empty_or_the_next_block_is_not_resumable(tmp_path: Path) -> None:
    for written, left in ({}, []), ({"half.txt": "x"}, ["out.partial"]):
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", resumable=True) as folder:
            for name, text in written.items():
                (folder / name).write_text(text)
            raise KeyboardInterrupt
        assert [path.name for path in tmp_path.iterdir()] == left
    write(tmp_path / "out", "one")
    assert content(tmp_path) == {"out/a.txt": "one"}


def test_json_that_cannot_take_its_place_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_recover_prefers_the_new_content(tmp_path: Path) -> None:
    assert not recover(tmp_path / "out")
    write(tmp_path / "out", "new")
    write(tmp_path / "out.old", "old")
    assert recover(tmp_path / "out")
    assert content(tmp_path) == {"out/a.txt": "new"}


def test_json_replaces_the_old_file_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "x.json", Path.write_bytes
    write_json(path, {"a": [1, 2.5, None]})
    write_json(path, {"b": "ä"})
    for bad in (math.nan, {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"a": bad})
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]

    def cut(self: Path, content: bytes) -> int:
        real(self, content[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"b": "ä"}


def test_one_process_at_a_time_works_on_a_folder(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with held(tmp_path / "x"):
        assert is_held(tmp_path / "x")
        message = refusal(held(tmp_path / "x").__enter__)
        assert f"x: another process ({os.getpid()} on " in message
        assert message.endswith("is working on it; wait for it or stop it")
    assert not is_held(tmp_path / "x")


def test_those_who_only_look_at_the_lock_are_not_taken_for_its_holder(tmp_path: Path) -> None:
    with held(tmp_path):
        pass
    with open(tmp_path / ".lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as is_held does for a moment
        assert not is_held(tmp_path)


def test_a_run_waits_for_the_process_of_an_earlier_try(tmp_path: Path) -> None:
    held_by_another = ["flock", tmp_path / ".lock", "-c", "echo mine; read line"]
    with subprocess.Popen(held_by_another, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        assert is_held(tmp_path)
        threading.Timer(0.2, other.stdin.close).start()
        with held(tmp_path, patience=250):
            assert other.wait() is not None
