"""The stages as commands: their exit status, what they print, and what they import."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, ROOT, copy_settings

from fer.errors import UserError
from pipelines.data_sets import Prepared
from pipelines.stages import run

STAGES = """
import runpy, sys
for stage in ("download", "upscale", "split"):
    runpy.run_module(f"pipelines.stages.{stage}", run_name="__main__")
print({"torch", "transformers", "ray", "kagglehub", "matplotlib"} & set(sys.modules))
"""


def test_no_stage_loads_torch_where_no_network_upscales(tmp_path: Path) -> None:
    copy_settings(tmp_path)
    path = tmp_path / "datasets" / "sample.yaml"
    text = path.read_text()
    for old, new in (("method: none", "method: bicubic"), ("scale: 1 ", "scale: 2 "), ("train: 2400", "train: 80")):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text.replace("400", "40"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", STAGES, "sample"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")
    assert np.load(tmp_path / DATA / "upscaled" / "images.npy").shape == (160, 96, 96)
    assert (tmp_path / DATA / "splits" / "train.csv").is_file()


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (UserError("data.size: one", "data.size: two"), "error: data.size: one\nerror: data.size: two\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "data/sets/sample/raw"),
            "error: cannot write data/sets/sample/raw: permission denied: change the owner or mode, or choose "
            "another place and run the command again\n",
        ),
    ],
)
def test_a_users_mistake_is_printed_and_the_status_is_2(
    error: Exception, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    copy_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stage", "sample"])

    def stage(one: Prepared) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(stage)
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", printed)


def test_a_stage_is_of_the_data_set_that_its_command_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(path.read_text().replace("  sample:", "  table: faces\n  sample:"))
    names: list[str] = []
    for words in (["stage"], ["stage", "sample"]):  # without a name: the first
        monkeypatch.setattr(sys, "argv", words)
        run(lambda one: names.append(one.name))
    assert names == ["table", "sample"]


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(one: Prepared) -> None:
        raise OSError(errno.EIO, "Input/output error")

    copy_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stage"])  # without a name: the first of the project
    with pytest.raises(OSError, match="Input/output error"):
        run(stage)
