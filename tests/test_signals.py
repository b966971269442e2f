"""A run stops on SIGTERM, on a file in its folder, and on all ranks at once; then it can be resumed."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import CPU, small_run
from test_train import Looks
from torch import Tensor

from fer import signals
from fer.signals import Agreement, Request, Sigterm, Stopped, ask_to_stop
from fer.train import fit


def test_a_file_stops_the_run_and_an_old_one_does_not(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stopped):
        fit("x", small_run(), CPU, bars, tmp_path, leaves=Looks(0))
    (folder,) = tmp_path.iterdir()
    (folder / "stop").touch()
    clock = itertools.count(100)  # a second later at each look
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep))
    ask_to_stop([folder, tmp_path / "none"], 0)  # nobody trains there
    asking = threading.Thread(target=ask_to_stop, args=([folder, tmp_path / "none"], 10**6))

    def on_epoch(row: dict[str, Any]) -> None:
        asking.start()
        while not (folder / "stop").exists():
            time.sleep(0.001)

    with pytest.raises(Stopped, match="stopped in epoch 2 after 0 of 6 steps") as caught:
        fit("x", small_run(), CPU, bars, tmp_path, on_epoch)
    assert not caught.value.terminated
    asking.join()
    assert not {"stop", "training"} & {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("main", [True, False], ids=["main thread", "another thread"])
def test_sigterm_stops_a_run_while_it_trains(main: bool, bars: Path, tmp_path: Path) -> None:
    """What SIGTERM did before, it does again afterwards."""
    heard: list[int] = []
    ended: list[Stopped] = []
    ours = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    handler = None if main else Sigterm()

    def terminated() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        while handler is not None and not handler.runs[0].terminated:
            time.sleep(0.001)  # the main thread's turn
        return False

    def train_it() -> None:
        try:
            fit("x", small_run(), CPU, bars, tmp_path, leaves=Looks(9, terminated))
        except Stopped as stopped:
            ended.append(stopped)

    try:
        if main:
            train_it()
        else:
            thread = threading.Thread(target=train_it)
            thread.start()
            thread.join()
        assert (heard, [stopped.terminated for stopped in ended]) == ([], [True])
        assert "stopped in epoch 2 after 3 of 6 steps" in str(ended[0])
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, ours)


@pytest.mark.parametrize(("own", "slowest", "every"), [(5.0, 5.0, 1), (0.01, 0.6, 1), (0.001, 0.005, 200)])
def test_ranks_agree_about_once_a_second(
    own: float, slowest: float, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one rank sees, with seconds per step of its own and of the slowest, which is asked to stop."""
    asked, stops, step, stop = [0], [], 0, 8 * every

    def all_reduce(found: Tensor, operation: Any, group: Any) -> None:
        assert (operation, group) == (dist.ReduceOp.MAX, "group")
        theirs = [float(step >= stop), (step - asked[-1]) * slowest]
        found.copy_(torch.maximum(found, torch.tensor(theirs)))
        asked.append(step)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: own * step))
    quiet: Any = SimpleNamespace(request=lambda: Request.NONE)
    agree = Agreement("group", quiet)
    for step in range(12 * every + 200):
        if agree():
            stops.append(step)
    assert stops == [step for step in asked if step >= stop]
    gaps = np.diff(asked)[1:]
    assert gaps.max() <= every * 1.05 + 1
    np.testing.assert_allclose(gaps[4:], every, rtol=0.05, atol=1)  # after some steps to get there
