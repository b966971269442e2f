"""What a command has started ends with it, however early it is killed; several may start at once."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, experiment, free_port, recorded, start_fer, wait_for

from pipelines.processes import MARK, process_id

pytestmark = pytest.mark.slow


def started_by(driver: str) -> list[psutil.Process]:
    """What the command with this process id has started, directly or not, but for its guard."""
    found = set()
    for process in psutil.process_iter():
        try:
            guard = "pipelines.guard" in process.cmdline()
            if process.environ().get(MARK) == driver and not guard:
                found |= {process, *process.children(recursive=True)}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return list(found)


def kill_when_it_has_started(command: subprocess.Popen, *names: str) -> None:
    """Kill the command once programs of these names run; then all that it has started must end."""
    driver = process_id(command.pid)

    def line(process: psutil.Process) -> str:
        with suppress(psutil.NoSuchProcess):  # it has ended
            return " ".join(process.cmdline())
        return ""

    def lines() -> str:
        return " ".join(map(line, started_by(driver)))

    try:
        wait_for(lambda: command.poll() is not None or all(name in lines() for name in names))
        assert command.poll() is None, command.communicate()
        left, inside = started_by(driver), psutil.Process(command.pid).children()
        (guard,) = (process for process in inside if "pipelines.guard" in line(process))
        command.kill()
        command.communicate()
        wait_for(lambda: not guard.is_running() or guard.status() == "zombie")
        # by themselves Ray's agents would last a minute longer
        wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in left), 20)
        assert started_by(driver) == []
    finally:
        command.kill()
        for process in started_by(driver):
            os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", [pytest.param("prefect", marks=pytest.mark.soak), "ray::DashboardAgent"])
def test_a_command_that_is_killed_while_it_starts_leaves_no_process(project: Path, name: str) -> None:
    experiment(project, "small", epochs=400)
    kill_when_it_has_started(start_fer(project, "train", "small"), name)


KILLED = """
import subprocess, time
from pipelines.guard import guarded
with guarded():
    left = subprocess.Popen(["bash", "-c", "env -i sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    print(left.pid, left.stdout.readline().strip(), flush=True)
    time.sleep(600)
"""


def test_the_guard_ends_also_what_has_lost_its_mark() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        left = driver.stdout.readline().split()
        assert len(left) == 2
        driver.kill()
    wait_for(lambda: [process_id(int(pid)) for pid in left] == left)


def test_fer_ui_that_is_killed_leaves_no_server(project: Path) -> None:
    ports = ["--mlflow-port", str(free_port()), "--prefect-port", str(free_port())]
    kill_when_it_has_started(start_fer(project, "ui", *ports), "mlflow", "prefect")


def test_ctrl_c_while_a_command_still_imports_its_modules_shows_no_traceback(project: Path) -> None:
    command = start_fer(project, "train", PYTHONPROFILEIMPORTTIME="1")  # a line for each module that is imported
    assert command.stderr
    for text in command.stderr:
        if text.rpartition("|")[2].strip() == "pipelines":
            break
    command.send_signal(signal.SIGINT)
    shown = [text for text in command.communicate()[1].splitlines() if not text.startswith("import time:")]
    assert (command.returncode, shown) == (-signal.SIGINT, [])


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_three_commands_at_once_in_a_new_project(project: Path) -> None:
    """None of the databases is there yet."""
    names = ("one", "two", "three")
    for seed, name in enumerate(names):
        experiment(project, name, epochs=2, seed=seed)
    commands = [start_fer(project, "train", name) for name in names]
    for command in commands:
        _, errors = command.communicate()
        assert command.returncode == 0, errors
    assert recorded(project) == dict.fromkeys(names, ("FINISHED", [1, 2]))
