"""How a run is asked to stop: by SIGTERM, or by a file in its folder. It saves what it has, in mid-epoch."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from fer.errors import UserError

FILE = "stop"


class Stopped(UserError):
    """The run has saved its state and ended, as it was asked to."""


class StopSignal:
    """Inside the block SIGTERM is a wish that `asked` tells, as is the file `stop` in the run's folder."""

    def __init__(self, folder: Path):
        self.file, self.wished, self.looked = folder / FILE, False, 0.0

    def __enter__(self) -> "StopSignal":
        self.file.unlink(missing_ok=True)  # of an earlier process
        self.handled = threading.current_thread() is threading.main_thread()
        if self.handled:
            self.before: Any = signal.signal(signal.SIGTERM, self._wish)
        return self

    def __exit__(self, *_: object) -> None:
        if self.handled:
            signal.signal(signal.SIGTERM, self.before)

    def _wish(self, signum: int, frame: FrameType | None) -> None:
        self.wished = True

    def asked(self) -> bool:
        """Looks for the file once a second."""
        now = time.monotonic()
        if now - self.looked >= 1:
            self.looked = now
            self.wished = self.wished or self.file.exists()
        return self.wished

    def done(self) -> None:
        """The state is saved: whoever waits for it sees the file go."""
        self.file.unlink(missing_ok=True)


def ask_to_stop(folders: list[Path], seconds: float) -> None:
    """Ask the runs in these folders to stop, and wait so long for them to save."""
    files = [folder / FILE for folder in folders if folder.exists()]
    for file in files:
        file.touch()
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(file.exists() for file in files):
        time.sleep(0.05)
