"""What a run notes of its code and machine: true in a repository, and no error where there is none."""

import importlib.util
import json
import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT

CPU = torch.device("cpu")


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def module_of(project: Path) -> ModuleType:
    """made_by of the package in that folder, as a new process has it."""
    spec = importlib.util.spec_from_file_location("made_by_of_a_copy", project / "fer" / "made_by.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noted(project: Path) -> tuple[Any, Any, str]:
    made = module_of(project).made_by(CPU)
    assert len(made["fer"]) == 12
    return made["commit"], made["changed"], made["fer"]


def test_the_commit_is_told_where_there_is_one_and_each_change_of_the_code_has_another_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a project of a few files of ours, wherever the working directory is."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    for name in ("__init__.py", "made_by.py", "errors.py", "data/__init__.py"):
        (copy / "fer" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "fer" / name, copy / "fer" / name)
    (copy / "README.md").write_text("A copy.\n")
    digest = noted(copy)[2]
    unknown = ("unknown", "unknown", digest)
    assert noted(copy) == unknown  # no repository
    git(copy, "init", "--quiet")
    assert noted(copy) == unknown  # no commit
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "A copy")
    commit = git(copy, "rev-parse", "HEAD")
    assert noted(copy) == (commit, False, digest)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert noted(copy) == unknown
    shutil.copytree(copy / "fer", copy / ".venv" / "fer")  # installed into another project
    assert noted(copy / ".venv") == unknown
    assert noted(copy) == (commit, False, digest)  # git does not track the new files
    (copy / "fer/model.py").touch()  # which a run may be made with
    assert noted(copy)[:2] == (commit, True)
    (copy / "fer/model.py").unlink()
    (copy / "README.md").write_text("Changed.\n")
    assert noted(copy) == (commit, False, digest)  # which no number depends on
    (copy / "fer/errors.py").write_text("#")
    assert noted(copy)[:2] == (commit, True)
    git(copy, "checkout", "--quiet", "fer")
    hashes = {digest}
    new = copy / "fer/new.py"
    for change in (lambda: (copy / "fer/data/__init__.py").write_text("#"), new.touch, lambda: new.rename(f"{new}.py")):
        change()
        hashes.add(noted(copy)[2])
    assert len(hashes) == 4


def test_the_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(platform, "processor", lambda: "x86")
    read = Path.read_text
    for text, name in (("model name\t: Fast 9000: x\n", "Fast 9000: x"), ("processor\t: 0\n", "x86")):

        def read_text(path: Path, *words: Any, text: str = text, **named: Any) -> str:
            return text if path == Path("/proc/cpuinfo") else read(path, *words, **named)

        monkeypatch.setattr(Path, "read_text", read_text)
        made = module_of(ROOT).made_by(torch.device("cuda", 1))
        assert (made["device"], made["threads"], made["cpu"]) == ("GPU 1", torch.get_num_threads(), name)
        assert (made["torch"], made["python"]) == (torch.__version__, platform.python_version())
        assert json.loads(json.dumps(made)) == made
