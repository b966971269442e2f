"""How a run is asked to stop: by SIGTERM, or by a file in its folder. It saves its state in mid-epoch."""

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

AGREE_SECONDS = 1.0  # between two agreements of several ranks on whether to stop
TRAINING, ASKED = "training", "stop"  # the file's name before and after a request to stop


class Request(IntEnum):
    """What a run is asked to do; of several ranks' requests the largest counts."""

    NONE = 0
    STOP = 1  # by the user
    LEAVE = 2  # give up this process or machine, to be resumed on another


class Stopped(UserError):
    """The run saved its state and ended on request; `terminated`: to be resumed elsewhere (Request.LEAVE)."""

    def __init__(self, message: str, terminated: bool = False):
        super().__init__(message)
        self.terminated = terminated


class Sigterm:
    """A SIGTERM handler: asks the runs of this process to leave; if none is training, the previous handler takes over.

    It must be installed in the main thread; runs in other threads register with it.
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
        """Restore the previous handler."""
        signal.signal(signal.SIGTERM, self.before)


class StopSignal:
    """Within the block, `request` returns whether the run should stop: on SIGTERM, or once its file is renamed.

    Outside the main thread it learns of SIGTERM only if a `Sigterm` is installed. `leads`: whether this rank manages
    the file. `leaves`: returns whether the machine is about to be reclaimed.
    """

    def __init__(self, folder: Path, leads: bool = True, leaves: Callable[[], bool] | None = None):
        self.folder, self.leads, self.leaves = folder, leads, leaves
        self.asked, self.terminated, self.looked = False, False, 0.0

    def __enter__(self) -> "StopSignal":
        if self.leads:
            (self.folder / ASKED).unlink(missing_ok=True)  # left by an earlier process
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
            for name in (TRAINING, ASKED):  # tells whoever waits that the run has ended
                (self.folder / name).unlink(missing_ok=True)

    def request(self) -> Request:
        """The strongest request so far. Checks the folder at most once a second."""
        now = time.monotonic()
        if self.leads and now - self.looked >= 1:
            self.looked = now
            self.asked = self.asked or (self.folder / ASKED).exists()
        leaves = self.leaves is not None and self.leaves()  # always called: other ranks wait for it
        if self.terminated or leaves:
            return Request.LEAVE
        return Request.STOP if self.asked else Request.NONE


class Agreement:
    """The strongest request of all ranks, exchanged about once a second and before the same step on every rank."""

    def __init__(self, group: Any, stop: StopSignal):
        self.group, self.stop, self.every, self.since = group, stop, 0, time.monotonic()
        self.steps = -1  # since the last exchange; how long they take is unknown before the first

    def __call__(self) -> Request:
        """To be called before each step, on every rank."""
        self.steps += 1
        if self.steps < self.every:
            return Request.NONE
        found = torch.tensor([float(self.stop.request()), time.monotonic() - self.since])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)  # the time of the slowest rank
        request, seconds = found.tolist()
        self.every = max(1, int(self.steps * min(AGREE_SECONDS / max(seconds, 1e-9), 10)))  # steps per second
        self.steps, self.since = 0, time.monotonic()
        return Request(int(request))


def ask_to_stop(folders: list[Path], seconds: float, is_alive: Callable[[Path], bool] = lambda folder: True) -> None:
    """Ask the runs that are training in these folders to stop, and wait up to `seconds` for them to save.

    A run that `is_alive` no longer sees at work in its folder is not waited for.
    """
    asked = []
    for folder in folders:
        with suppress(FileNotFoundError):
            (folder / TRAINING).rename(folder / ASKED)
            asked.append(folder / ASKED)
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(file.exists() and is_alive(file.parent) for file in asked):
        time.sleep(0.05)
