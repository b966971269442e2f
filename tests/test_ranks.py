"""Two ranks are one, and what one of them meets, both do."""

import json
import multiprocessing
import multiprocessing.connection
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, doe, free_port, small_run
from test_train import (
    SGD,
    STEPS,
    Cut,
    Looks,
    assert_equal_runs,
    bad_loss,
    evaluated,
    planted,
    rows_of,
    tensors_of,
    untimed,
)  # fmt: skip

from fer import checkpoint, signals
from fer.data.dataset import open_data
from fer.errors import UserError
from fer.resources import Resources
from fer.run import Run
from fer.train import fit


@dataclass
class Job:
    """A run on two ranks, and what happens to it."""

    run: Run
    runs: Path
    accumulate: int = 1
    stop: int | None = None  # rank 1 alone is asked to leave, after so many steps
    spoilt: int | None = None  # the loss of rank 1 is no number in this step
    exits: int | None = None  # rank 1 dies before this step
    sync: bool = False  # batch norm, which needs GPUs
    device: Literal["cpu", "cuda"] = "cpu"


def _rank(rank: int, port: int, data: Path, jobs: list[Job], told: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    signals.AGREE_SECONDS = 0.0  # ask before every step
    dist.init_process_group("gloo", rank=rank, world_size=2)
    about = []
    for job in jobs:
        patch, rows, error = pytest.MonkeyPatch(), list[dict[str, Any]](), ""
        looks = Looks(job.stop) if rank == 1 else Looks()
        if job.exits is not None and rank == 1:
            looks = Looks(job.exits, partial(os._exit, 1))
        if job.spoilt is not None and rank == 1:
            planted(patch, job.spoilt)
        resources = Resources(device=job.device, workers=2, accumulate=job.accumulate, sync_batch_norm=job.sync)
        try:
            fit("x", job.run, resources, data, job.runs, rows.append, leaves=looks)
        except UserError as caught:
            error = str(caught)
        patch.undo()
        about.append([untimed(rows), error])
    (told / f"{rank}.json").write_text(json.dumps(about))
    dist.destroy_process_group()


def on_two_ranks(data: Path, told: Path, *jobs: Job) -> list[tuple[Path, str]]:
    """The folder of each job's run and the error that it ended with, the same on both ranks; one after the other."""
    port = free_port()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.set_forkserver_preload([__name__])  # imported once, for all tests
    start = multiprocessing.get_context("forkserver")
    ranks = [start.Process(target=_rank, args=(rank, port, data, list(jobs), told)) for rank in range(2)]
    for process in ranks:
        process.start()
    while not any(process.exitcode for process in ranks) and any(process.is_alive() for process in ranks):
        multiprocessing.connection.wait([process.sentinel for process in ranks if process.is_alive()])
    for process in ranks:
        process.join(3)
        process.kill()  # what is left waits for the other rank
    if any(process.exitcode for process in ranks):
        raise Cut
    first, second = (json.loads((told / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return [(next(job.runs.iterdir()), error) for job, (_, error) in zip(jobs, first)]


@pytest.mark.slow
def test_two_ranks_are_one(bars: Path, tmp_path: Path) -> None:
    plain = {"model": {"batch_norm": False, "conv_dropout": 0, "dense_dropout": 0}, "optimizer": SGD, "epochs": 2}
    weighted = {"loss": {"name": "focal_pdls"}, "class_weights": 0.5, "balanced_sampling": 0.5}
    runs = {
        "plain": small_run(**plain, **weighted),
        "same subject": small_run(**doe("same_subject", augment={}, ema_decay=0.8, epochs=2)),
    }
    shared = on_two_ranks(bars, tmp_path, *(Job(run, tmp_path / "two" / kind) for kind, run in runs.items()))
    for run, (folder, error) in zip(runs.values(), shared):
        alone = fit("x", run, CPU, bars, tmp_path / "one")
        assert (folder.name, error) == (alone.name, "")
        for one, two in zip(untimed(rows_of(alone)), untimed(rows_of(folder)), strict=True):
            assert one == pytest.approx(two, abs=1e-5)
        ours, theirs = tensors_of(alone), tensors_of(folder)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_ranks_stopped_together_or_dead_resume_as_if_they_had_not_been(bars: Path, tmp_path: Path) -> None:
    """Bit for bit, with batch norm, whose statistics differ by rank."""
    run = small_run(loss={"name": "vote_sampling"}, ema_decay=0.5)
    cut, dead, plain = tmp_path / "cut", tmp_path / "dead", small_run(epochs=1)
    with pytest.raises(Cut):
        on_two_ranks(bars, tmp_path, Job(run, dead, 2, exits=STEPS + 3))
    found = on_two_ranks(
        bars, tmp_path,
        Job(run, tmp_path / "whole", 2),
        *(Job(run, cut, 2, stop=steps) for steps in (0, 3, STEPS + 2, None)),
        Job(run, dead, 2),
        Job(plain, tmp_path / "no ema"),
        Job(plain, tmp_path / "nan", spoilt=2),
        Job(plain, tmp_path / "sync", sync=True),
    )  # fmt: skip
    whole, (resumed, _), (revived, _), (other, _), (spoilt, spoilt_error), (_, sync_error) = found[0][0], *found[4:]
    assert sync_error == "resources.sync_batch_norm: works on GPUs only; set it to false"
    places = ["epoch 1 after 0", "epoch 1 after 3", "epoch 2 after 5"]
    for (_, error), place in zip(found[1:4], places):
        assert error.startswith(f"{whole.name}: stopped in {place} of 6 steps")
    assert_equal_runs(resumed, whole)
    assert_equal_runs(revived, whole)
    # what is saved are the weights that were evaluated
    for folder, asked in ((whole, run), (other, plain)):
        row = rows_of(folder)[checkpoint.load_meta(folder / "best")["epoch"] - 1]
        result = evaluated(asked, open_data(bars), folder / "best")
        assert result == pytest.approx({key: row[f"val_{key}"] for key in result}, abs=1e-6)
    # the losses are looked at after the epoch, and the step that went wrong is named
    assert spoilt_error == bad_loss(plain, spoilt, 1, 3)
    assert not (spoilt / "last").exists()
