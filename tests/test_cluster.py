"""Scheduling proven on Ray's logical resources: many runs on four GPUs that do not exist, and on two nodes."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from conftest import BIN, DATA, environment, epochs_done, experiment, recorded, small_run, start_fer, wait_for, workers
from ray.cluster_utils import Cluster

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.resources import Resources
from fer.run import run_id
from fer.train import NonFiniteLoss
from pipelines import launch
from pipelines.experiments import Job
from pipelines.launch import FREE_MEMORY, GRAVITY, Launcher, NotDone, end_of_group
from pipelines.work import Ended

pytestmark = pytest.mark.slow

GPUS = 4
# name -> workers, GPUs of each; seven GPUs in all
NEEDS = {"half": (1, 0.5), "other_half": (1, 0.5), "two": (1, 2), "wide": (2, 2)}
# an epoch of 24 steps takes seconds, and its state 18 MB
SLOW: dict[str, Any] = {"epochs": 1, "batch_size": 4, "input": {"image_size": 64}, "model": {"width": 0.5}}


def slow_job(project: Path, **resources: Any) -> Job:
    run = small_run(**SLOW)
    folder = project / "data/runs" / run_id("x", run, open_data(project / DATA).hash)
    return Job("x", run, Resources(restarts=0, **resources), project / DATA, folder)


def sigterm_in_mid_epoch(start: Callable[[Job], Any], made: Job, project: Path) -> tuple[Any, list[str]]:
    """Send the last worker of a run SIGTERM: what `start` returns, and the names of the processes it started."""
    before = {child["pid"] for child in children() if child["name"] != "ray::IDLE"}  # an idle worker may take the run
    with ThreadPoolExecutor(1) as beside:
        result = beside.submit(start, made)
        wait_for((made.folder / "progress.json").exists)  # its first step is done
        new = [child["name"] for child in children() if child["pid"] not in before]
        os.kill(max(workers(project)), signal.SIGTERM)
        wait_for(lambda: saved_in_mid_epoch(made.folder))
        return result.result(120), new


def children() -> list[dict[str, Any]]:
    """pid, name and num_fds of what this process started; those that end meanwhile are left out."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    found = [process.info for process in psutil.process_iter(["pid", "name", "num_fds"]) if process.pid in mine]
    return [child for child in found if child["num_fds"]]


def saved_in_mid_epoch(folder: Path) -> bool:
    try:
        return torch.load(folder / "last/training.pt", weights_only=True)["step"] > 0
    except FileNotFoundError:  # none yet, or a new one takes its place
        return False


# Two machines


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two raylets with a CPU each; the driver joins the first. Used before `four_gpus`: a process has one Ray."""
    for key, value in {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(key, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def as_the_nodes() -> dict[str, str]:
    """What a process shares with them; without the last, Ray looks for them elsewhere than at 127.0.0.1."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    return {name: os.environ[name] for name in names}


@pytest.fixture
def start(project: Path, two_nodes: Cluster, prefect_server: str) -> Callable[..., subprocess.Popen]:
    """start("x"): the command `fer train x` on the two nodes."""
    where = {"RAY_ADDRESS": two_nodes.address, **as_the_nodes()}
    return lambda *words: start_fer(project, "train", *words, **where, PREFECT_API_URL=prefect_server)


@pytest.mark.soak
def test_two_nodes_a_cancelled_flow_leaves_nothing_and_a_dead_node_costs_no_run(
    project: Path, two_nodes: Cluster, start: Callable
):
    """The second start finds the cluster free; the node dies while each node is in the middle of a run."""
    names, last = ["left", "right"], 240  # as many epochs as one run does while the other's process starts, and more
    for seed, name in enumerate(names):
        experiment(project, name, seed=seed, epochs=last)
    (second,) = two_nodes.worker_nodes
    raylet = second.all_processes["raylet"][0].process.pid

    def rows() -> list[int]:
        return [len(epochs_done(project).get(name, [])) for name in names]

    cancelled = start(*names)
    wait_for(lambda: min(rows()) >= 3)
    cancelled.send_signal(signal.SIGINT)
    cancelled.communicate(timeout=60)
    assert cancelled.returncode == 130
    wait_for(lambda: not workers(project))
    wait_for(lambda: [status for status, _ in recorded(project).values()] == ["KILLED", "KILLED"])
    running, cut = start(*names), max(rows())
    wait_for(lambda: min(rows()) >= cut + 3)
    above = [[up.pid for up in psutil.Process(pid).parents()] for pid in workers(project)]
    assert [raylet in pids for pids in above].count(True) == 1
    two_nodes.remove_node(second, allow_graceful=False)
    assert not list((project / "data/runs").glob("*/summary.json"))
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    assert recorded(project) == dict.fromkeys(names, ("FINISHED", list(range(1, last + 1))))


@pytest.mark.soak
def test_a_group_leaves_a_machine_that_is_drained_in_mid_epoch(project: Path, two_nodes: Cluster, start: Callable):
    """As before a machine is taken back; the run waits for another one that has the CPUs."""
    experiment(project, "x", {"workers": 2, "cpus_per_worker": 2}, **SLOW)
    leaves = two_nodes.add_node(num_cpus=4)
    running = start("x")
    (progress,) = wait_for(lambda: list((project / "data/runs").glob("*/progress.json")))  # its first step is done
    words = [BIN / "ray", "drain-node", "--address", two_nodes.address, "--node-id", leaves.node_id]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "x", "--deadline-remaining-seconds", "600"]
    subprocess.run([*words, *why], env=environment(**as_the_nodes()), check=True, capture_output=True)
    wait_for(lambda: saved_in_mid_epoch(progress.parent))
    wait_for(lambda: not workers(project))
    two_nodes.add_node(num_cpus=4)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    assert recorded(project) == {"x": ("FINISHED", [1])}


# Four GPUs


@pytest.fixture(scope="module")
def four_gpus(prefect_server: str) -> Iterator[None]:
    """A Ray of this process that believes in four GPUs."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 128 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_LOG_MONITOR_MAX_OPEN_FILES", "10")  # by default Ray keeps up to 200 logs open
        ray.init(address="local", num_cpus=8, num_gpus=GPUS, **quiet)
    yield
    ray.shutdown()


def test_four_runs_share_four_gpus_and_one_whose_worker_dies_is_started_again(project: Path, four_gpus: None):
    from pipelines import flow

    for seed, (name, (count, gpus)) in enumerate(NEEDS.items()):
        experiment(project, name, {"workers": count, "gpus_per_worker": float(gpus)}, seed=seed, epochs=10)
    before: list[dict] = []

    def kill_one() -> None:
        wait_for(lambda: any(len(done) >= 3 for done in epochs_done(project).values()))
        worker = wait_for(lambda: workers(project))[-1]
        before.append(epochs_done(project))
        os.kill(worker, signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    state = flow.train(list(NEEDS), return_state=True)
    assert (state.is_completed(), len(before)) == (True, 1), state.message
    assert recorded(project) == dict.fromkeys(NEEDS, ("FINISHED", list(range(1, 11))))
    after = epochs_done(project)
    for name, rows in before[0].items():
        assert after[name][: len(rows)] == rows  # times and all: none was trained again
    spans = {name: [(row["time"] - row["seconds"], row["time"]) for row in rows] for name, rows in after.items()}
    moments = [begin for epochs in spans.values() for begin, _ in epochs]
    busy = [
        [name for name, epochs in spans.items() if any(begin <= now < end for begin, end in epochs)] for now in moments
    ]
    assert max(sum(NEEDS[name][0] * NEEDS[name][1] for name in names) for names in busy) <= GPUS
    assert max(map(len, busy)) >= 2
    wait_for(lambda: ray.available_resources().get("GPU") == GPUS)


def test_a_worker_that_gets_sigterm_saves_in_mid_epoch_and_is_started_again(project: Path, four_gpus: None):
    """It is no failure, so none has to be allowed. And the worker is the only process that a run costs."""
    made = slow_job(project)
    _, new = sigterm_in_mid_epoch(Launcher().launch, made, project)
    assert (made.folder / "summary.json").exists()
    assert [name.split(".")[0][:10] for name in new if "IDLE" not in name] == ["ray::_task"]


def test_a_group_that_cannot_start_leaves_no_gpu_taken_and_one_that_gets_sigterm_saves_in_mid_epoch(
    project: Path, four_gpus: None, monkeypatch: pytest.MonkeyPatch
):
    """As when NCCL fails: Ray would keep what the workers had, and the next try would wait for ever."""
    made = slow_job(project, workers=2, gpus_per_worker=GPUS / 2)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "ON_GPUS", "nccl")
        with pytest.raises(RuntimeError, match="NCCL"):
            Launcher().launch(made)
    ended, _ = sigterm_in_mid_epoch(launch.start, made, project)
    assert ended.kind == "terminated"


def test_a_full_disk_ends_every_worker_at_once_and_is_the_users_to_mend(project: Path, four_gpus: None):
    """Only the first worker writes; the second would wait for it."""
    made = slow_job(project, device="cpu", workers=2)
    made.folder.mkdir(parents=True)
    full = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(made.folder)]
    mounted = subprocess.run(full, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UserError, match="the disk is full: free some space and run the command again"):
            Launcher().launch(made)
    finally:
        subprocess.run(["umount", made.folder], check=True)


@pytest.mark.timeout(900)  # it starts dozens of processes
@pytest.mark.soak
def test_twenty_runs_in_one_ray_session_leave_no_files_and_processes(project: Path, four_gpus: None):
    """Five flows of four runs; two flows are the warm-up. Ray's GCS and log monitor keep some files per run open."""
    from pipelines import flow

    before = {child["pid"] for child in children() if child["name"] != "ray::IDLE"}
    of_one_run, use = ("ray::_task", "ray::RayTrainW", "ray::Synchroniz", "ray::TrainContr"), []
    for turn in range(5):
        names = [f"run_{seed}" for seed in range(4 * turn, 4 * turn + 4)]
        for seed, name in enumerate(names, 4 * turn):
            experiment(project, name, seed=seed, epochs=1)
        assert flow.train(names, return_state=True).is_completed()
        wait_for(lambda: not any(c["name"].startswith(of_one_run) for c in children() if c["pid"] not in before))
        me, found = psutil.Process(), children()
        ours = sum(child["num_fds"] for child in found if child["pid"] in before)
        use.append([me.num_fds(), me.num_threads(), len(found), ours])
    assert all(last - first <= most for first, last, most in zip(use[1], use[-1], (4, 4, 4, 30))), use


# Without a cluster


def test_a_run_that_fits_no_machine_is_refused_though_all_together_would_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}}] * 2)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0})

    def jobs(*shares: tuple[int, float]) -> list[Job]:
        return [
            Job("x", small_run(), Resources(workers=w, gpus_per_worker=gpus), DATA, Path("x")) for w, gpus in shares
        ]

    launch.check_resources(jobs((4, 1.0), (2, 2.0), (1, 0.5)))
    with pytest.raises(UserError) as error:
        launch.check_resources(jobs((1, 4.0)))
    assert str(error.value) == (
        "x: resources: a worker needs 1 CPUs and 4 GPUs on one machine; there is room for 0 of 1 worker(s); "
        "lower cpus_per_worker or gpus_per_worker"
    )


@pytest.mark.parametrize(
    ("ends", "restarts", "raised"),
    [
        ("died died done", 2, None),
        ("died died died", 2, RuntimeError),
        ("terminated terminated terminated done", 0, None),
        ("terminated died terminated died", 1, RuntimeError),
        ("fault", 2, RuntimeError),
        ("died mistake", 2, UserError),
        ("diverged", 2, NonFiniteLoss),
        ("stopped", 2, UserError),
        ("leaving", 2, UserError),  # SIGTERM came to every process, the command among them
    ],
)
def test_only_what_died_or_left_is_started_again(ends: str, restarts: int, raised: Any, tmp_path: Path):
    starts: Iterator[Any] = iter(ends.split())

    def start(*_: object) -> Ended:
        if (kind := next(starts)) == "leaving":
            launcher.stop(0)
        return Ended("terminated" if kind == "leaving" else kind, "why")

    launcher = Launcher(start)
    with pytest.raises(raised, match="^why$") if raised else nullcontext():
        launcher.launch(Job("x", small_run(), Resources(restarts=restarts), DATA, tmp_path))
    assert (next(starts, None), launcher.running) == (None, set())


ENDED = {kind: NotDone(Ended(kind, kind)) for kind in GRAVITY}
KILLED = ray.exceptions.ActorDiedError()


@pytest.mark.parametrize(
    ("ranks", "kind", "message"),
    [
        ([ENDED["died"], ENDED["fault"]], "fault", "fault"),
        ([ENDED["mistake"], ENDED["died"]], "mistake", "mistake"),
        ([ENDED["stopped"], ENDED["terminated"]], "terminated", "terminated"),
        ([KILLED, ENDED["terminated"]], "terminated", "terminated"),
        ([KILLED, KILLED], "died", "ActorDiedError: The actor died unexpectedly before finishing this task."),
        ([ray.exceptions.OutOfMemoryError("a page")], "died", FREE_MEMORY),
        (RuntimeError("no NCCL"), "died", "RuntimeError: no NCCL"),
    ],
    ids=str,
)
def test_the_gravest_end_of_several_ranks_counts(ranks: Any, kind: Any, message: str):
    whole = ray.train.WorkerGroupError("...", dict(enumerate(ranks))) if isinstance(ranks, list) else None
    assert end_of_group(whole or ray.train.ControllerError(ranks)) == Ended(kind, message)
