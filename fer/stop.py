"""How a run is asked to stop: by SIGTERM, or by a file in its folder. It saves what it has, in mid-epoch."""

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fer.errors import UserError

RUNNING, ASKED = "training", "stop"  # the names of the file, before and after


class Stopped(UserError):
    """The run has saved its state and ended, as it was asked to; `terminated` where this process got a SIGTERM."""

    def __init__(self, message: str, terminated: bool = False):
        super().__init__(message)
        self.terminated = terminated


class StopSignal:
    """Inside the block SIGTERM is a wish that `asked` tells, as is the renaming of the file that lies in the folder.

    In another thread than the main one it is where `heed_sigterm` was called.
    """

    def __init__(self, folder: Path, leads: bool):
        self.folder, self.leads, self.wished, self.looked = folder, leads, False, 0.0
        self.terminated = False

    def __enter__(self) -> "StopSignal":
        if self.leads:
            (self.folder / ASKED).unlink(missing_ok=True)  # of an earlier process
            (self.folder / RUNNING).touch()
        _open.append(self)
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = heed_sigterm()
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)
        _open.remove(self)
        if self.leads:
            for name in (RUNNING, ASKED):  # whoever waits sees them go
                (self.folder / name).unlink(missing_ok=True)

    def asked(self) -> bool:
        """Looks at the folder once a second."""
        now = time.monotonic()
        if self.leads and now - self.looked >= 1:
            self.looked = now
            self.wished = self.wished or (self.folder / ASKED).exists()
        return self.wished or self.terminated


_open: list[StopSignal] = []  # those of this process


def heed_sigterm() -> Any:
    """From now on SIGTERM asks this process's runs to stop, and does what it did before where none is in training.

    Returns what it did before. For the main thread.
    """
    before: Any = signal.getsignal(signal.SIGTERM)

    def terminate(signum: int, frame: FrameType | None) -> None:
        for run in _open:
            run.terminated = True
        if not _open:
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    return before


def ask_to_stop(folders: list[Path], seconds: float) -> None:
    """Ask the runs that are training in these folders to stop, and wait so long for them to save."""
    asked = []
    for folder in folders:
        with suppress(FileNotFoundError):
            (folder / RUNNING).rename(folder / ASKED)
            asked.append(folder / ASKED)
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(file.exists() for file in asked):
        time.sleep(0.05)
