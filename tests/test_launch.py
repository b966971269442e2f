"""Ray as a command starts it: nobody else can use it."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

PORTS = """
import psutil
from pipelines import launch
launch.start_ray()
assert launch.ray.get(launch.ray.remote(lambda: 1).remote()) == 1
me = psutil.Process()
found = [c for p in (me, *me.children(recursive=True)) for c in p.net_connections()]
listening = [c.laddr.ip for c in found if c.status == "LISTEN"]
print(len(listening), *sorted({ip.removeprefix("::ffff:") for ip in listening}))
"""


@pytest.mark.slow
def test_a_ray_of_ones_own_listens_on_the_loopback_interface_and_leaves_its_secret_nowhere(tmp_path: Path) -> None:
    known = environment(HOME=str(tmp_path), PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", PORTS], cwd=tmp_path, env=known, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    many, *addresses = done.stdout.split()
    assert int(many) > 5
    assert addresses == ["127.0.0.1"]
    assert not (tmp_path / ".ray/auth_token").exists()
