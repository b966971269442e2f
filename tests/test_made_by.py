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


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A project of a few files of ours, in no repository."""
    for name in ("__init__.py", "made_by.py", "errors.py", "data/__init__.py"):
        (tmp_path / "copy" / "fer" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "fer" / name, tmp_path / "copy" / "fer" / name)
    (tmp_path / "copy" / "README.md").write_text("A copy.\n")
    return tmp_path / "copy"


@pytest.fixture
def cloned(copy: Path) -> Path:
    """The same, committed."""
    git(copy, "init", "--quiet")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "A copy")
    return copy


def test_a_clean_clone_names_its_commit_from_any_working_directory(
    cloned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    module = module_of(cloned)
    made = module.made_by(torch.device("cuda", 1), 3)
    assert (made["commit"], made["changed"]) == (git(cloned, "rev-parse", "HEAD"), False)
    assert (made["torch"], made["python"]) == (torch.__version__, platform.python_version())
    assert (made["device"], made["threads"]) == ("GPU 1", 3)
    assert json.loads(json.dumps(made)) == made


def test_the_hash_sees_changed_new_and_renamed_modules_and_git_what_it_tracks(cloned: Path) -> None:
    seen = []
    for name, change in (
        ("README.md", None), ("notes.txt", "new"), ("README.md", "# changed"), ("fer/data/__init__.py", "# changed"),
        ("fer/new.py", ""), ("fer/newer.py", ""),
    ):  # fmt: skip
        if name == "fer/newer.py":
            (cloned / "fer/new.py").rename(cloned / name)
        elif change is not None:
            (cloned / name).write_text(change)
        made = module_of(cloned).made_by(CPU, 1)
        seen.append((made["commit"], made["changed"], made["fer"]))
    assert {commit for commit, _, _ in seen} == {git(cloned, "rev-parse", "HEAD")}
    assert [changed for _, changed, _ in seen] == [False, False, True, True, True, True]
    hashes = [digest for _, _, digest in seen]
    assert hashes[0] == hashes[1] == hashes[2]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("where", ["no repository", "no commit", "no git", "another project"])
def test_what_cannot_be_known(where: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if where != "no repository":
        git(copy, "init", "--quiet")
    if where == "another project":
        git(copy, "add", "--all")
        git(copy, "commit", "--quiet", "--message", "A copy")
    if where == "no git":
        monkeypatch.setenv("PATH", "")
    if where == "another project":  # into which it was installed
        shutil.copytree(copy / "fer", copy / ".venv" / "fer")
        copy = copy / ".venv"
    made = module_of(copy).made_by(CPU, 1)
    assert (made["commit"], made["changed"], len(made["fer"])) == ("unknown", "unknown", 12)


def test_the_name_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text
    monkeypatch.setattr(platform, "processor", lambda: "x86")
    for text, name in (("model name\t: Fast 9000: x\n", "Fast 9000: x"), ("processor\t: 0\n", "x86")):

        def read_text(path: Path, *words: Any, text: str = text, **named: Any) -> str:
            return text if path == Path("/proc/cpuinfo") else read(path, *words, **named)

        monkeypatch.setattr(Path, "read_text", read_text)
        assert module_of(ROOT).made_by(CPU, 1)["cpu"] == name
