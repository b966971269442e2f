"""The stages as commands: their exit status, what they print, and what they import."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from fer.errors import UserError
from pipelines.params import Params
from pipelines.stages import run

STAGES = """
import runpy, sys
for stage in ("download", "upscale", "split"):
    runpy.run_module(f"pipelines.stages.{stage}", run_name="__main__")
print({"torch", "transformers", "ray", "kagglehub", "matplotlib"} & set(sys.modules))
"""


def test_no_stage_loads_torch_where_no_network_upscales(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    for old, new in (("method: none", "method: bicubic"), ("scale: 1 ", "scale: 2 "), ("train: 2400", "train: 80")):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "params.yaml").write_text(text.replace("400", "40"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", STAGES]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")
    assert np.load(tmp_path / "data" / "upscaled" / "images.npy").shape == (160, 96, 96)
    assert (tmp_path / "data" / "splits" / "train.csv").is_file()


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (UserError("data.path: one", "data.path: two"), "error: data.path: one\nerror: data.path: two\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "data/raw"),
            "error: cannot write data/raw: permission denied: change the owner or mode, or choose another place and run"
            " the command again\n",
        ),
    ],
)
def test_a_users_mistake_is_printed_and_the_status_is_2(
    error: Exception, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())

    def stage(params: Params) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(stage)
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", printed)


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(params: Params) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.chdir(ROOT)
    with pytest.raises(OSError, match="Input/output error"):
        run(stage)
