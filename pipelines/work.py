"""One run, carried out in the calling process: locked, logged, trained, evaluated; how it ended is a return value."""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

import fer
from fer.errors import UserError, disk_error, first_line
from fer.evaluate import evaluate
from fer.files import held
from fer.run_folder import LOG
from fer.signals import Stopped
from fer.train import NonFiniteLoss, fit
from pipelines.experiments import Job

ROOT = Path(fer.__file__).parents[1]
PATIENCE = 20.0  # seconds; the process of the previous attempt may still be ending
ONE_VALUE = "Expected more than 1 value per channel when training"  # what torch's batch norm says
# what torch says where a tensor does not fit into the memory of a machine
NO_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed")
Kind = Literal["done", "stopped", "terminated", "mistake", "diverged", "fault", "died"]


def enter(root: str | Path) -> None:
    """Go to the project's folder, to which paths in settings are relative: Ray starts its processes elsewhere."""
    with suppress(FileNotFoundError):  # on another machine of a cluster
        os.chdir(root)


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    done; stopped: by the user, with its state saved; terminated: likewise, by SIGTERM or because its machine is taken
    away; mistake: a user can fix it; diverged: the loss is infinite or not a number; fault: an error in the code;
    died: a process or a machine is gone. `message` is one line, empty if done.
    """

    kind: Kind
    message: str = ""


def work(
    job: Job,
    evaluated: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    leaves: Callable[[], bool] | None = None,
    patience: float = PATIENCE,
) -> Ended:
    """Train or resume a run, and evaluate it if `evaluated`.

    In a torch.distributed group every rank calls this; the first one holds the lock and evaluates. `on_epoch` and
    `leaves` are passed to `fer.train.fit`; `patience`: seconds to wait for another process that works on the run.
    Never raises an Exception: errors are returned.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0

    def each_epoch(row: dict[str, Any]) -> None:
        _print_epoch(row)
        on_epoch(row)

    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        log = job.folder / (LOG if rank == 0 else f"log-{rank}.txt")
        lock = held(job.folder, patience) if rank == 0 else nullcontext()
        with lock, logged(log):
            try:
                about = each_epoch, job.start, leaves, job.fold
                fit(job.name, job.run, job.resources, job.data, job.folder.parent, *about)
                if evaluated and rank == 0:
                    evaluate(job.folder, job.data, job.resources)
            except UserError as error:
                sys.stderr.write(f"{error}\n")
                raise
            except Exception:
                traceback.print_exc()
                raise
    except Exception as error:  # noqa: BLE001  returned to whoever waits for the run; the traceback is in its log
        return _of_error(error, job.folder)
    return Ended("done")


def _print_epoch(row: dict[str, Any]) -> None:
    """One line of the log per epoch."""
    shown = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    sys.stdout.write(f"epoch {row['epoch']}: " + ", ".join(f"{key} {row[key]:.4g}" for key in shown) + "\n")


def _of_error(error: Exception, folder: Path) -> Ended:
    if isinstance(error, Stopped):
        return Ended("terminated" if error.terminated else "stopped", str(error))
    if isinstance(error, UserError):
        return Ended("diverged" if isinstance(error, NonFiniteLoss) else "mistake", str(error))
    known = disk_error(error, folder) if isinstance(error, OSError) else None
    if known is not None:
        return Ended("mistake", str(known))
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
        return Ended("died", f"another worker of the run is gone ({first_line(error)})")
    reason = first_line(error)
    if any(sign in reason for sign in NO_MEMORY):
        return Ended("mistake", f"{reason}; lower batch_size, input.image_size or the sizes of the model")
    if reason.startswith(ONE_VALUE):
        return Ended("mistake", f"batch_size: batch norm needs two images in a part of a batch: raise it ({reason})")
    if isinstance(error, torch.OutOfMemoryError):
        reason += "; lower batch_size or resources.eval_batch_size, or raise resources.accumulate"
    kind = type(error).__name__
    what = kind if reason == kind else f"{kind}: {reason}"  # of an error without a message
    return Ended("fault", f"{what} ({_where(error)}; full log: {folder / LOG})")


def _where(error: BaseException) -> str:
    """The last frame of an error inside the project: `fer/train.py:123, in fit`."""
    last = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)][-1]
    return f"{Path(last.filename).relative_to(ROOT)}:{last.lineno}, in {last.name}"


def _is_ours(filename: str) -> bool:
    return any(Path(filename).is_relative_to(ROOT / package) for package in ("fer", "pipelines"))


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Inside the block, append what this process and its children write to stdout and stderr to `path`.

    Each line begins with the time. The file descriptors are redirected, to catch what native libraries write as well.
    """
    read, write = os.pipe()
    before = [os.dup(1), os.dup(2)]
    copying = threading.Thread(target=_copy, args=(read, path), daemon=True)
    copying.start()
    try:
        os.dup2(write, 1), os.dup2(write, 2)
        with open(write, "w", buffering=1) as out, redirect_stdout(out), redirect_stderr(out):
            yield
    finally:
        for number, old in zip((1, 2), before):
            os.dup2(old, number)
            os.close(old)
        copying.join(5)  # a child that outlives the block may keep the pipe open


def _copy(read: int, path: Path) -> None:
    """A run must not fail over its log: where `path` cannot be written, keep emptying the pipe."""
    with open(read, errors="replace") as lines:
        with suppress(OSError), open(path, "a", buffering=1) as log:
            for line in lines:
                with suppress(OSError):  # a full disk may have room again for the next one
                    log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}")
        for _ in lines:
            pass
