"""Ray as a command starts it: nobody else can use it."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from fer.errors import UserError

STARTED = """
import psutil
from pipelines import launch
launch.start_ray()
assert launch.ray.get(launch.ray.remote(lambda: 1).remote()) == 1
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
            with pytest.raises(UserError, match=f"^RAY_ADDRESS: the cluster at {address} was started with another"):
                launch.start_ray()
        owner.communicate("\n")
