"""What a run notes of its code and machine: true in a repository, and no error where there is none."""

import importlib.util
import json
import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
KEYS = ["commit", "changed", "fer", "torch", "python", "device", "threads", "cpu"]


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
    made = module_of(cloned).made_by(CPU, 3)
    assert list(made) == KEYS
    assert (made["commit"], made["changed"]) == (git(cloned, "rev-parse", "HEAD"), False)
    assert (made["torch"], made["python"]) == (torch.__version__, platform.python_version())
    assert (made["device"], made["threads"]) == ("cpu", 3)
    assert made["cpu"]
    assert json.loads(json.dumps(made)) == made


def test_a_changed_file_gives_another_hash_and_is_told(cloned: Path) -> None:
    before = module_of(cloned).made_by(CPU, 1)
    with (cloned / "fer" / "data" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    after = module_of(cloned).made_by(CPU, 1)
    assert after["commit"] == before["commit"]
    assert after["changed"] is True
    assert after["fer"] != before["fer"]


def test_a_changed_file_outside_the_package_is_told_but_no_untracked_one(cloned: Path) -> None:
    before = module_of(cloned).source_hash()
    (cloned / "notes.txt").write_text("mine\n")
    assert module_of(cloned).repository()[1] is False
    (cloned / "README.md").write_text("Changed.\n")
    assert module_of(cloned).repository()[1] is True
    assert module_of(cloned).source_hash() == before


def test_the_hash_sees_new_and_renamed_modules_and_no_other_files(copy: Path) -> None:
    hashes = [module_of(copy).source_hash()]
    assert len(hashes[0]) == 12
    assert int(hashes[0], 16)
    (copy / "fer" / "__pycache__").mkdir(exist_ok=True)
    (copy / "fer" / "__pycache__" / "errors.cpython-312.pyc").write_bytes(b"1")
    (copy / "fer" / "notes.txt").write_text("mine\n")
    assert module_of(copy).source_hash() == hashes[0]
    (copy / "fer" / "new.py").touch()
    hashes.append(module_of(copy).source_hash())
    (copy / "fer" / "new.py").rename(copy / "fer" / "newer.py")
    hashes.append(module_of(copy).source_hash())
    assert len(set(hashes)) == 3


def unknown_but_hashed(project: Path) -> bool:
    made = module_of(project).made_by(CPU, 1)
    return (made["commit"], made["changed"]) == ("unknown", "unknown") and len(made["fer"]) == 12


def test_without_a_repository_it_is_unknown(copy: Path) -> None:
    assert unknown_but_hashed(copy)
    git(copy, "init", "--quiet")
    assert unknown_but_hashed(copy)  # no commit yet


def test_without_the_program_git_it_is_unknown(cloned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert unknown_but_hashed(cloned)


def test_in_the_repository_of_another_project_it_is_unknown(cloned: Path) -> None:
    installed = cloned / ".venv" / "site-packages"
    shutil.copytree(cloned / "fer", installed / "fer")
    assert unknown_but_hashed(installed)


def test_it_is_found_out_once_in_a_process(cloned: Path) -> None:
    module = module_of(cloned)
    before = module.made_by(CPU, 1)
    (cloned / "fer" / "errors.py").write_text("")
    assert module.made_by(CPU, 1) == before


def test_a_gpu_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert module_of(ROOT).made_by(torch.device("cuda", 1), 1)["device"] == "GPU 1"


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "name"),
    [
        ("processor\t: 0\nmodel name\t: Fast 9000: x\nmodel name\t: Other\n", "x86", "Fast 9000: x"),
        ("processor\t: 0\n", "x86", "x86"),
        (None, "x86", "x86"),
        (None, "", "unknown"),
    ],
)
def test_the_name_of_the_cpu(cpuinfo: str | None, processor: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, read = module_of(ROOT), Path.read_text

    def read_text(path: Path, *words: object, **named: object) -> str:
        if path != Path("/proc/cpuinfo"):
            return read(path, *words, **named)  # type: ignore[arg-type]
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    assert module.made_by(CPU, 1)["cpu"] == name
