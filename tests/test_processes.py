"""Which processes belong to which driver, and which have ended."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.processes import MARK, alive, ended, mark_children, other_drivers, process_id


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
        assert (other_drivers(name), other_drivers("no such program")) == ([driver.pid], [])
        driver.kill()
        driver.wait()
        assert other_drivers(name) == []
    finally:
        for process in (driver, *started):
            process.kill()
            process.wait()


def test_a_process_has_ended_only_if_that_is_certain() -> None:
    process = subprocess.Popen(["sleep", "600"])
    pid, started, boot, namespace, machine = process_id(process.pid).split(":")
    of_earlier_versions, other_start = f"{pid}:{started}", f"{pid}:1:{boot}:{namespace}:{machine}"
    elsewhere = {
        f"{pid}:1:{boot}:4026500000:{machine}": False,  # another container
        f"{pid}:1:other:{namespace}:other": False,  # another machine of this name
        f"{pid}:1:other:{namespace}:": False,  # a container of another machine, or of this one before it was rebooted
        f"{pid}:{started}:other:{namespace}:{machine or 'known'}": machine != "",  # this machine, since rebooted
    }
    try:
        running = {process_id(process.pid): False, of_earlier_versions: False, other_start: True, "": True}
        assert {one: ended(one) for one in running | elsewhere} == running | elsewhere
    finally:
        process.kill()
        process.wait()
    gone = {":".join([pid, started, boot, namespace, machine]): True, of_earlier_versions: True}
    assert {one: ended(one) for one in gone | elsewhere} == gone | elsewhere


def test_a_process_in_a_container_has_not_ended_because_it_is_not_seen() -> None:
    code = "import os, time; from pipelines.processes import process_id as of; print(of(os.getpid()), flush=True)"
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not allow namespaces")
    command = [*unshare, sys.executable, "-c", f"{code}; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            inside = process.stdout.readline().strip()
            assert (inside.startswith("1:"), ended(inside), alive(inside)) == (True, False, False)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("known", "direct"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "mlflow.intern, .corp"}, "mlflow.intern,.corp,127.0.0.1,localhost"),
        ({"NO_PROXY": "a", "no_proxy": "b,a"}, "b,a,127.0.0.1,localhost"),
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_what_is_reached_directly_stays_so(known: dict[str, str], direct: str) -> None:
    """Programs read one of the two names or the other, and the small one first."""
    bare = {key: value for key, value in os.environ.items() if key.lower() != "no_proxy"}
    code = "import os, pipelines; print(os.environ['no_proxy'], os.environ['NO_PROXY'], sep='|')"
    done = subprocess.run([sys.executable, "-c", code], env=bare | known, capture_output=True, text=True, check=True)
    assert done.stdout == f"{direct}|{direct}\n"
