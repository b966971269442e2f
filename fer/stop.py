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
    """The run has saved its state and ended, as it was asked to."""


class StopSignal:
    """Inside the block SIGTERM is a wish that `asked` tells, as is the renaming of the file that lies in the folder."""

    def __init__(self, folder: Path, leads: bool):
        self.folder, self.leads, self.wished, self.looked = folder, leads, False, 0.0

    def __enter__(self) -> "StopSignal":
        if self.leads:
            (self.folder / ASKED).unlink(missing_ok=True)  # of an earlier process
            (self.folder / RUNNING).touch()
        self.handled = threading.current_thread() is threading.main_thread()
        if self.handled:
            self.before: Any = signal.signal(signal.SIGTERM, self._wish)
        return self

    def __exit__(self, *_: object) -> None:
        if self.handled:
            signal.signal(signal.SIGTERM, self.before)
        if self.leads:
            for name in (RUNNING, ASKED):  # whoever waits sees them go
                (self.folder / name).unlink(missing_ok=True)

    def _wish(self, signum: int, frame: FrameType | None) -> None:
        self.wished = True

    def asked(self) -> bool:
        """Looks at the folder once a second."""
        now = time.monotonic()
        if self.leads and now - self.looked >= 1:
            self.looked = now
            self.wished = self.wished or (self.folder / ASKED).exists()
        return self.wished


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
