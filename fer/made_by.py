"""What produced a run's results: code, versions and machine, so that an old run can be explained."""

import hashlib
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

UNKNOWN = "unknown"
_PACKAGE = Path(__file__).resolve().parent


def made_by(device: torch.device) -> dict[str, Any]:
    """Code, versions and machine of a run on `device`, ready for JSON; what cannot be found out is "unknown"."""
    commit, changed = repository()
    return {
        "commit": commit,
        "changed": changed,
        "fer": source_hash(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
    }


@cache
def repository() -> tuple[str, bool | str]:
    """The commit that this package is from, and whether the package has changed since; "unknown" without git.

    Changed means: a file of it that git tracks differs, or it has a new module.

    A package that git does not track, such as one installed inside another project, is not from that commit.
    """
    commit = _git("rev-parse", "HEAD")
    if not commit or not _git("ls-files", "--error-unmatch", "__init__.py"):
        return UNKNOWN, UNKNOWN
    differing = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no", "--", ".")
    new = _git("ls-files", "--others", "--exclude-standard", "--", "*.py")
    return commit, UNKNOWN if differing is None else bool(differing or new)


@cache
def source_hash() -> str:
    """12 hex digits over the paths and bytes of the package's *.py files: changes with the code, even without git."""
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
    """The output of git in the package's folder; None if it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(_PACKAGE), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
