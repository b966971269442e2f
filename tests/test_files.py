"""Files are whole or absent, whatever happens while they are written; one process at a time works on a folder."""

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
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
    assert content(tmp_path) == {"deep/out/a.txt": "two"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_keeps_the_old_content_and_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    for expected in ({}, {"out/a.txt": "one"}):
        with pytest.raises(error), new_folder(tmp_path / "out") as folder:
            (folder / "a.txt").write_text("half")
            raise error
        assert (content(tmp_path), [path.name for path in tmp_path.iterdir()]) == (expected, ["out"] * len(expected))
        write(tmp_path / "out", "one")


@pytest.mark.parametrize("renames", [0, 1])
def test_a_process_killed_between_the_renames_loses_nothing(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real, done = tmp_path / "out", Path.replace, list[Path]()
    write(target, "one")

    def killed(self: Path, other: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(other)
        return real(self, other)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        write(target, "two")
    assert recover(target)
    assert content(tmp_path) == {"out/a.txt": "one"}
    write(target, "three")
    assert content(tmp_path) == {"out/a.txt": "three"}


def test_recover_prefers_the_new_content(tmp_path: Path) -> None:
    assert not recover(tmp_path / "out")
    write(tmp_path / "out", "new")
    write(tmp_path / "out.old", "old")
    assert recover(tmp_path / "out")
    assert content(tmp_path) == {"out/a.txt": "new"}


def test_a_resumable_folder_goes_on_until_its_block_ends(tmp_path: Path) -> None:
    """An empty one vanishes, as does one whose next block is not resumable."""

    def cut(target: Path, *names: str) -> None:
        with pytest.raises(KeyboardInterrupt), new_folder(target, resumable=True) as folder:
            for name in names:
                (folder / name).write_text(name)
            raise KeyboardInterrupt

    target = tmp_path / "deep" / "out"
    write(target, "old")
    for name in ("one", "two"):
        cut(target, name)
        assert content(target) == {"a.txt": "old"}
    with new_folder(target, resumable=True) as folder:
        assert content(folder) == {"one": "one", "two": "two"}
        (folder / "one").unlink()
    assert content(tmp_path) == {"deep/out/two": "two"}
    cut(tmp_path / "other")
    cut(tmp_path / "third", "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "third.partial"]
    write(tmp_path / "third", "whole")
    assert content(tmp_path) == {"deep/out/two": "two", "third/a.txt": "whole"}


def test_json_replaces_the_old_file_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "x.json", Path.write_bytes
    write_json(path, {"a": [1, 2.5, None]})
    write_json(path, {"b": "ä"})
    for bad in (math.nan, {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"a": bad})
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "a.json", {})
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.json", "x.json"]

    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "the disk is full")):

        def cut(self: Path, content: bytes, error: BaseException = error) -> int:
            real(self, content[:3])
            raise error

        monkeypatch.setattr(Path, "write_bytes", cut)
        with pytest.raises(type(error)):
            write_json(path, {"a": 1})
        assert json.loads(path.read_text()) == {"b": "ä"}
        assert sorted(item.name for item in tmp_path.iterdir()) == ["a.json", "x.json"]


def test_one_process_at_a_time_works_on_a_folder_and_lookers_do_not_hold_it(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with held(tmp_path / "x"):
        assert is_held(tmp_path / "x")
        message = refusal(held(tmp_path / "x").__enter__)
        assert message.startswith(f"{tmp_path}/x: another process ({os.getpid()} on ")
        assert message.endswith("is working on it; wait for it or stop it")
    with open(tmp_path / "x/.lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as is_held does for a moment
        assert not is_held(tmp_path / "x")


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


def test_a_copy_that_does_not_fit_names_the_file_that_is_written(tmp_path: Path) -> None:
    """And not the one that is read, which is as it should be."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * 10_000)
    code = (
        "import resource, shutil, sys; from fer.errors import disk_error\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: shutil.copyfile(*sys.argv[1:])\n"
        "except OSError as error: print(disk_error(error, 'data'))"
    )
    done = subprocess.run([sys.executable, "-c", code, source, target], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {target}: the file would exceed the size limit: ")
