"""One run in the process that calls: how it ended is a value, what it wrote is in its log, and it is alone."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, DATA, NO_AUGMENT, experiment, refusal, small_run, wait_for
from safetensors.torch import save_file

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.models.small_resnet import SmallResnetBackbone
from fer.run import run_id
from fer.signals import Stopped, ask_to_stop
from fer.train import NonFiniteLoss
from pipelines import experiments
from pipelines import work as works
from pipelines.experiments import Job
from pipelines.flow import check_same_weights, prepare, prepare_sweep
from pipelines.folds import jobs_of
from pipelines.sweeps import folder as sweeps
from pipelines.work import LOG, Ended, logged, work


def job(data: Path, **changes: Any) -> Job:
    run = small_run(**changes)
    return Job("small", run, CPU, data, data / "runs" / run_id("small", run, open_data(data).hash))


def test_a_run_is_trained_evaluated_and_logged(data: Path) -> None:
    made, rows = job(data), []
    assert work(made, evaluated=False, on_epoch=rows.append) == Ended("done")  # as a trial of a sweep
    assert not [path for name in ("summary.json", "predictions*") for path in made.folder.glob(name)]
    assert work(made, on_epoch=rows.append) == Ended("done")  # nothing is trained again
    assert (made.folder / "summary.json").exists()
    lines = (made.folder / LOG).read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (epoch \d): .*", r"\1", line) for line in lines] == [
        "epoch 1", "epoch 2", "epoch 3"
    ]  # fmt: skip
    assert f"val_accuracy {rows[-1]['val_accuracy']:.4g}" in lines[-1]
    assert len(rows) == 3


FULL = OSError(errno.ENOSPC, "No space left on device", "x")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("no weights"), "mistake", "no weights"),
        (FULL, "mistake", "cannot write x: the disk is full: free some space and run the command again"),
        (NonFiniteLoss("loss is nan"), "diverged", "loss is nan"),
        (Stopped("saved"), "stopped", "saved"),
        (Stopped("saved", terminated=True), "terminated", "saved"),
        (KeyError("x"), "fault", r"KeyError: 'x' \(pipelines/work.py:\d+, in work; full log: .*/log.txt\)"),
        (ValueError("one line\nand a page of words"), "fault", r"ValueError: one line \(pipelines/work.py.*"),
        (torch.OutOfMemoryError("no room"), "fault", r"OutOfMemoryError: no room; lower batch_size or .*"),
        (RuntimeError("Gloo connectFullMesh failed with [../gloo] no error"), "died", "another worker of the run .*"),
        (torch.distributed.DistNetworkError("The client socket has failed to connect"), "died", "another worker .*"),
        (ValueError("gloo"), "fault", "ValueError: gloo .*"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_how_it_ended_is_a_value(
    error: Exception, kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(works, "fit", fit)
    made = Job("x", small_run(), CPU, tmp_path, tmp_path / "runs/x")
    ended = work(made)
    assert ended.kind == kind
    assert re.fullmatch(message, ended.message) or ended.message == message
    log = (made.folder / LOG).read_text()
    assert ("Traceback" in log) == (kind in ("fault", "died") or error is FULL)


@pytest.mark.parametrize("workers", [0, 1])  # threads; 0: it runs in the main one, which has the signals
def test_a_run_that_is_asked_to_stop_says_so(data: Path, workers: int) -> None:
    made = job(data, epochs=400)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(lambda: wait_for((made.folder / "training").exists) and ask_to_stop([made.folder], 60))
        ended = pool.submit(work, made).result() if workers else work(made)
    assert ended.kind == "stopped"
    assert "stopped in epoch" in ended.message
    assert ended.message in (made.folder / LOG).read_text()


def test_what_is_written_below_python_and_by_children_is_logged_with_the_time(tmp_path: Path, capfd: Any) -> None:
    with logged(tmp_path / LOG):
        sys.stdout.write("from Python\n")
        os.write(2, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
    sys.stdout.write("after\n")
    lines = (tmp_path / LOG).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    text = [line[20:] for line in lines]
    assert set(text) == {"from Python", "from C", "from a child"}
    assert "from C" not in capfd.readouterr().err
    with logged(tmp_path / LOG):  # a second start adds to it
        os.write(1, b"again\n")
    assert (tmp_path / LOG).read_text().splitlines()[: len(lines)] == lines
    for full in (Path("/dev/full"), tmp_path):  # no room, or no file: a run goes on without
        with logged(full):
            for _ in range(3):
                sys.stdout.write(9999 * "x" + "\n")


def test_batch_norm_of_one_image_is_the_users_to_mend(data: Path) -> None:
    model = {"name": "classifier", "backbone": {"name": "mobilenet_v3_large", "weights": None, "width": 0.25}}
    model["head"] = [8]
    made = job(data, model=model, input={"image_size": 32}, batch_size=1, augment=NO_AUGMENT)
    ended = work(made)
    told = "batch_size: batch norm needs two images in a part of a batch: raise it ("
    assert (ended.kind, ended.message[: len(told)]) == ("mistake", told)


def test_a_limit_on_the_size_of_files_is_the_users_to_raise(data: Path, tmp_path: Path) -> None:
    """`ulimit -f`; afterwards the run goes on, and ends as one that was never cut."""
    made = job(data)
    assert work(made).kind == "done"
    whole = made.folder.rename(tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("last/training.pt", "predictions_test.csv"):
        resource.setrlimit(resource.RLIMIT_FSIZE, ((whole / name).stat().st_size - 1, before[1]))
        try:
            ended = work(made)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        told = r".*the file would exceed the size limit: raise it \(ulimit -f\) and run the command again"
        assert (ended.kind, bool(re.fullmatch(told, ended.message))) == ("mistake", True), ended
        assert not (made.folder / name).exists()
    assert work(made).kind == "done"
    assert {path.name for path in made.folder.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (made.folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_weights_file_that_has_changed_is_not_taken_for_the_old_one(project: Path) -> None:
    """The id of a run has the name of its weights: other bytes under it would be answered with the old numbers.

    The same for a fold, and for a trial of a sweep.
    """
    network = SmallResnetBackbone(width=8, blocks=[1]).build(16, 1)
    weights = project / "w.safetensors"
    save_file(network.state_dict(), weights)
    backbone = {"name": "small_resnet", "width": 8, "blocks": [1], "weights": str(weights)}
    parts = {"name": "classifier", "stn": False, "resizer": {"name": "none"}, "backbone": backbone}
    run, data = experiment(project, "small", model=parts), open_data(DATA)
    runs, found = project / "data/runs", experiments.load(["small"], {})
    (fold, *_) = jobs_of(found, {"small": data}, "2", runs).values()
    made = Job("small", run, CPU, DATA, runs / run_id("small", run, data.hash))
    check_same_weights(made.name, made.run, made.folder)  # not trained yet
    assert [work(one) for one in (made, fold)] == [Ended("done"), Ended("done")]
    check_same_weights(made.name, made.run, made.folder)
    asked = ["sample", "base=small", "grace_epochs=1", "space={batch_size: {choice: [8, 16]}}"]
    swept = sweeps.plan(asked, {}, lambda base: data)
    trial = shutil.copytree(made.folder, swept.folder / "runs" / "trial")
    save_file({name: tensor + 1 for name, tensor in network.state_dict().items()}, weights)
    assert work(made) == Ended("done")  # trains nothing, and notes no other bytes
    told = f"{weights} has changed since"
    assert refusal(prepare, ["small"]).startswith(
        f"small: {told} {made.folder.relative_to(project)} was trained with it: "
    )
    assert refusal(prepare, ["small"], "2").startswith(f"small.fold1of2: {told} ")
    assert refusal(prepare_sweep, asked, False).startswith(f"sample: {told} {trial} was ")
    weights.unlink()
    check_same_weights(made.name, made.run, made.folder)
