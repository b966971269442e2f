"""Which processes belong to which driver."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.processes import MARK, mark_children, other_drivers, process_id


def test_other_drivers_are_those_that_live_and_started_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"let{os.getpid()}"  # that no other test starts
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / name)
    monkeypatch.setenv(MARK, "")
    mark_children()
    driver = subprocess.Popen(["sleep", "600"])
    marks = (process_id(driver.pid), os.environ[MARK], "", "999999999:1")  # another's, ours, none, one that is gone
    started = [subprocess.Popen([program, "600"], env={**os.environ, MARK: mark}) for mark in marks]
    try:
        assert other_drivers(name) == [driver.pid]
        assert other_drivers("no such program") == []
        driver.kill()
        driver.wait()
        assert other_drivers(name) == []
    finally:
        for process in (driver, *started):
            process.kill()
            process.wait()
