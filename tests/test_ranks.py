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
    planted,
    rows_of,
    tensors_of,
    untimed,
)  # fmt: skip

from fer import checkpoint, signals
from fer.errors import UserError
from fer.evaluate import evaluate
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
    alive = ranks
    while alive and not any(process.exitcode for process in ranks):
        multiprocessing.connection.wait([process.sentinel for process in alive])  # of none, it never returns
        alive = [process for process in alive if process.is_alive()]
    for process in ranks:
        process.join(3)
        process.kill()  # what is left waits for the other rank
    if any(process.exitcode for process in ranks):
        raise Cut
    first, second = (json.loads((told / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return [(next(job.runs.iterdir()), error) for job, (_, error) in zip(jobs, first)]


@pytest.mark.slow
def test_two_ranks_are_one_and_stop_together(bars: Path, tmp_path: Path) -> None:
    """To the last bit where they are resumed, with batch norm, whose statistics differ by rank."""
    still = {"model": {"batch_norm": False, "conv_dropout": 0, "dense_dropout": 0}, "optimizer": SGD, "epochs": 2}
    alike = [
        small_run(**still, loss={"name": "focal_pdls"}, class_weights=0.5, balanced_sampling=0.5, logit_adjustment=0.5),
        small_run(**doe("same_subject", augment={}, ema_decay=0.8, epochs=2)),
    ]
    run, plain = small_run(loss={"name": "vote_sampling"}, ema_decay=0.5), small_run(epochs=1)
    cut, dead = tmp_path / "cut", tmp_path / "dead"
    with pytest.raises(Cut):
        on_two_ranks(bars, tmp_path, Job(run, dead, 2, exits=STEPS + 3))
    found = on_two_ranks(
        bars, tmp_path,
        *(Job(one, tmp_path / str(number)) for number, one in enumerate(alike)),
        Job(run, tmp_path / "whole", 2),
        *(Job(run, cut, 2, stop=steps) for steps in (3, STEPS + 2, None)),
        Job(run, dead, 2),
        Job(plain, tmp_path / "no ema"),
        Job(plain, tmp_path / "nan", spoilt=2),
        Job(plain, tmp_path / "sync", sync=True),
    )  # fmt: skip
    for one, (folder, _) in zip(alike, found):
        alone = fit("x", one, CPU, bars, tmp_path / "one")
        for ours, theirs in zip(untimed(rows_of(alone)), untimed(rows_of(folder)), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        torch.testing.assert_close(tensors_of(alone), tensors_of(folder), atol=1e-5, rtol=1e-4)
    (whole, resumed, revived, other, spoilt), errors = (found[place][0] for place in (2, 5, 6, 7, 8)), dict(found[7:])
    assert [error.partition(":")[2].partition(" steps")[0] for _, error in found[:8]] == [
        "", "", "", " stopped in epoch 1 after 3 of 6", " stopped in epoch 2 after 5 of 6", "", "", "",
    ]  # fmt: skip
    assert_equal_runs(resumed, whole)
    assert_equal_runs(revived, whole)
    for folder in (whole, other):  # what is saved are the weights that were evaluated
        row = rows_of(folder)[checkpoint.load_meta(folder / "best")["epoch"] - 1]
        result = evaluate(folder, bars, CPU)["val"]
        assert {key: result[key] for key in ("accuracy", "ece")} == pytest.approx(
            {key: row[f"val_{key}"] for key in ("accuracy", "ece")}, abs=1e-6
        )
    # the losses are looked at after the epoch, and the step that went wrong is named
    assert errors[spoilt] == bad_loss(plain, spoilt, 1, 3)
    assert not (spoilt / "last").exists()
    assert found[9][1] == "resources.sync_batch_norm: works on GPUs only; set it to false"
