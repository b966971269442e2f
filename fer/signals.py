"""How a run is asked to stop: by SIGTERM, or by a file in its folder. It saves what it has, in mid-epoch."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fer.errors import UserError

AGREE_SECONDS = 1.0  # after which several ranks agree again whether to stop
TRAINING, ASKED = "training", "stop"  # the names of the file, before and after


class Wish(IntEnum):
    """What a run is asked for; of several ranks' wishes the largest counts."""

    NONE = 0
    STOP = 1  # by the user, for good
    LEAVE = 2  # this process or machine, to go on in another one


class Stopped(UserError):
    """The run has saved its state and ended, as it was asked to; `terminated`: to go on elsewhere (Wish.LEAVE)."""

    def __init__(self, message: str, terminated: bool = False):
        super().__init__(message)
        self.terminated = terminated


class Sigterm:
    """A handler of SIGTERM: it asks the runs of this process to leave, or does what was done before where none trains.

    It has to be installed in the main thread; runs in other threads find it where it is installed.
    """

    def __init__(self) -> None:
        self.runs: list[StopSignal] = []
        self.before: Any = signal.signal(signal.SIGTERM, self)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        for run in self.runs:
            run.terminated = True
        if not self.runs:
            self.uninstall()
            signal.raise_signal(signal.SIGTERM)

    def uninstall(self) -> None:
        signal.signal(signal.SIGTERM, self.before)


class StopSignal:
    """Inside the block, `wish` tells whether the run should stop: SIGTERM came, or its file was renamed.

    In another thread than the main one SIGTERM is heard of where a `Sigterm` is installed. `leads`: whether this rank
    looks after the file. `leaves`: asked, too, whether the machine is about to be taken back.
    """

    def __init__(self, folder: Path, leads: bool = True, leaves: Callable[[], bool] | None = None):
        self.folder, self.leads, self.leaves = folder, leads, leaves
        self.asked, self.terminated, self.looked = False, False, 0.0

    def __enter__(self) -> "StopSignal":
        if self.leads:
            (self.folder / ASKED).unlink(missing_ok=True)  # of an earlier process
            (self.folder / TRAINING).touch()
        self.main = threading.current_thread() is threading.main_thread()
        handler = Sigterm() if self.main else signal.getsignal(signal.SIGTERM)
        self.handler = handler if isinstance(handler, Sigterm) else None
        if self.handler is not None:
            self.handler.runs.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self.handler is not None:
            self.handler.runs.remove(self)
            if self.main:
                self.handler.uninstall()
        if self.leads:
            for name in (TRAINING, ASKED):  # whoever waits sees them go
                (self.folder / name).unlink(missing_ok=True)

    def wish(self) -> Wish:
        """Looks at the folder once a second."""
        now = time.monotonic()
        if self.leads and now - self.looked >= 1:
            self.looked = now
            self.asked = self.asked or (self.folder / ASKED).exists()
        leaves = self.leaves is not None and self.leaves()  # always asked: other ranks wait for this one's question
        if self.terminated or leaves:
            return Wish.LEAVE
        return Wish.STOP if self.asked else Wish.NONE


class Agreement:
    """The strongest wish of several ranks: asked for about once a second, and before the same step on all of them."""

    def __init__(self, group: Any, stop: StopSignal):
        self.group, self.stop, self.every, self.since = group, stop, 0, time.monotonic()
        self.steps = -1  # since the last time; nothing is known of their length before the first one

    def __call__(self) -> Wish:
        """Called before each step."""
        self.steps += 1
        if self.steps < self.every:
            return Wish.NONE
        found = torch.tensor([float(self.stop.wish()), time.monotonic() - self.since])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)  # the slowest rank's time
        wish, seconds = found.tolist()
        self.every = max(1, int(self.steps * min(AGREE_SECONDS / max(seconds, 1e-9), 10)))  # steps in a second
        self.steps, self.since = 0, time.monotonic()
        return Wish(int(wish))


def ask_to_stop(folders: list[Path], seconds: float) -> None:
    """Ask the runs that are training in these folders to stop, and wait so long for them to save."""
    asked = []
    for folder in folders:
        with suppress(FileNotFoundError):
            (folder / TRAINING).rename(folder / ASKED)
            asked.append(folder / ASKED)
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(file.exists() for file in asked):
        time.sleep(0.05)
