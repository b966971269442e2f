"""What made a run's numbers: the code, the versions and the machine, so that an old run can be explained."""

import hashlib
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

UNKNOWN = "unknown"
_PACKAGE = Path(__file__).resolve().parent


def made_by(device: torch.device, threads: int) -> dict[str, Any]:
    """Code, versions and machine of a run on `device`, ready for JSON; never raises for what it cannot find out."""
    commit, changed = repository()
    return {
        "commit": commit,
        "changed": changed,
        "fer": source_hash(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads,
        "cpu": _cpu(),
    }


@cache
def repository() -> tuple[str, bool | str]:
    """The commit that this package is from, and whether tracked files differ from it; "unknown" without git.

    A package that git does not track, installed in a folder of another project say, is not from that commit.
    """
    commit = _git("rev-parse", "HEAD")
    if not commit or not _git("ls-files", "--error-unmatch", "__init__.py"):
        return UNKNOWN, UNKNOWN
    differing = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return commit, UNKNOWN if differing is None else bool(differing)


@cache
def source_hash() -> str:
    """12 hex digits over the paths and bytes of the package's *.py files: needs no git, sees every change."""
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(_PACKAGE).as_posix() for path in _PACKAGE.rglob("*.py")):
        digest.update(f"{name}\n".encode() + hashlib.sha256((_PACKAGE / name).read_bytes()).digest())
    return digest.hexdigest()[:12]


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or UNKNOWN


def _git(*words: str) -> str | None:
    """What git says in the package's folder; None where there is no git or it finds fault."""
    try:
        done = subprocess.run(["git", "-C", str(_PACKAGE), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
