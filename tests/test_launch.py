"""Ray as a command starts it: nobody else can use it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, refusal

from fer.errors import UserError

STARTED = """
import psutil
from pipelines import launch
launch.start_ray()
# of the process's start: glibc does not look again
asked = launch.ray.remote(lambda: psutil.Process().environ()["MALLOC_ARENA_MAX"])
assert launch.ray.get(asked.remote()) == "1"
me = psutil.Process()
found = [c for p in (me, *me.children(recursive=True)) for c in p.net_connections()]
listening = [c.laddr.ip for c in found if c.status == "LISTEN"]
addresses = sorted({ip.removeprefix("::ffff:") for ip in listening})
print(launch.ray.get_runtime_context().gcs_address, len(listening), *addresses, flush=True)
input()
"""


@pytest.mark.slow
def test_a_ray_of_ones_own_listens_on_the_loopback_interface_and_nobody_else_gets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its secret is nowhere. Who has another one is told so, whether the address is given or found by Ray."""
    from pipelines import launch

    with subprocess.Popen(
        [sys.executable, "-c", STARTED], cwd=tmp_path, env=environment(HOME=str(tmp_path), PYTHONPATH=str(ROOT)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as owner:  # fmt: skip
        assert owner.stdout
        where, many, *addresses = owner.stdout.readline().split()
        assert int(many) > 5
        assert addresses == ["127.0.0.1"]
        assert not (tmp_path / ".ray/auth_token").exists()
        monkeypatch.setattr(launch.ray, "is_initialized", lambda: False)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
        for address in (where, "auto"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            told = f"RAY_ADDRESS: the cluster at {address} was started with another"
            assert refusal(launch.start_ray).startswith(told)
        owner.communicate("\n")


@pytest.mark.soak
def test_what_ends_the_work_of_several_processes() -> None:
    from pipelines.launch import spread

    def work(item: int) -> int:
        if item == 3:
            raise UserError("super_resolution: a line")
        if item == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    for items, workers, message in (
        ([0], 1000, r"super_resolution.workers: 1000 need a CPU each, there are \d+; lower it"),
        ([0, 1, 2, 3], 1, "super_resolution: a line"),
        (
            [0, 1, 2, 4],
            1,
            "super_resolution.workers: a process died four times, as for want of memory; lower it and .*",
        ),
    ):
        with pytest.raises(UserError, match=f"^{message}$") as caught:
            list(spread(work, items, workers, "cpu"))
        assert type(caught.value) is UserError
