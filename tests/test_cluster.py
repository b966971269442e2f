"""Scheduling proven on Ray's logical resources: many runs on four GPUs that do not exist, and on two nodes."""

import gc
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from conftest import BIN, environment, epochs_done, experiment, recorded, small_run, start_fer, wait_for, workers
from ray.cluster_utils import Cluster

from fer.data.dataset import open_data
from fer.device import share_heaps
from fer.errors import UserError
from fer.resources import Resources
from fer.run import Run, run_id
from fer.train import fit
from pipelines import launch
from pipelines.experiments import Job
from pipelines.launch import FREE_MEMORY, GRAVITY, Launcher, NotDone, end_of_group
from pipelines.work import Ended

pytestmark = pytest.mark.slow

GPUS = 4
# name -> workers, GPUs of each; seven GPUs in all
NEEDS = {"half": (1, 0.5), "other_half": (1, 0.5), "two": (1, 2), "wide": (2, 2)}
# an epoch of 24 steps takes seconds
SLOW: dict[str, Any] = {"epochs": 1, "batch_size": 4, "input": {"image_size": 64}, "model": {"width": 1.0}}


def job(project: Path, run: Run, **resources: Any) -> Job:
    folder = project / "data/runs" / run_id("x", run, open_data(project / "data").hash)
    return Job("x", run, Resources(**resources), folder)


def sigterm_in_mid_epoch(made: Job, project: Path) -> list[str]:
    """Launch a run, send its last worker SIGTERM: it is finished nevertheless. The names of its processes."""
    before = {child["pid"] for child in children() if child["name"] != "ray::IDLE"}  # an idle worker may take the run
    thread = threading.Thread(target=Launcher().launch, args=(made, project / "data"))
    thread.start()
    wait_for(lambda: (made.folder / "progress.json").exists())  # its first step is done
    new = [child["name"] for child in children() if child["pid"] not in before]
    os.kill(max(workers(project)), signal.SIGTERM)
    wait_for(lambda: saved_in_mid_epoch(made.folder))
    thread.join(120)
    assert not thread.is_alive()
    assert (made.folder / "summary.json").exists()
    return new


def finished(epochs: int) -> tuple[str, list[int]]:
    return "FINISHED", list(range(1, epochs + 1))


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


@pytest.fixture
def start(project: Path, two_nodes: Cluster, prefect_server: str) -> Callable[..., subprocess.Popen]:
    """start("x"): the command `fer train x` on the two nodes."""
    token = {"RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    addresses = {"RAY_ADDRESS": two_nodes.address, "PREFECT_API_URL": prefect_server}
    return lambda *words: start_fer(project, "train", *words, **addresses, **token)


def rows(project: Path, *names: str) -> int:
    """The fewest epochs that one of these runs has done."""
    return min(len(epochs_done(project).get(name, [])) for name in names)


@pytest.mark.soak
def test_two_nodes_a_cancelled_flow_leaves_nothing_and_a_dead_node_costs_no_run(
    project: Path, tmp_path: Path, two_nodes: Cluster, start: Callable
):
    """The second start finds the cluster free; the node dies while each node is in the middle of a run.

    As many epochs as one run does while the other's process still starts, and more.
    """
    names, last = ["left", "right"], 240
    runs = {name: experiment(project, name, seed=seed, epochs=last) for seed, name in enumerate(names)}
    (second,) = two_nodes.worker_nodes
    raylet = second.all_processes["raylet"][0].process.pid

    cancelled = start(*names)
    wait_for(lambda: rows(project, *names) >= 3)
    cancelled.send_signal(signal.SIGINT)
    _, errors = cancelled.communicate(timeout=60)
    assert cancelled.returncode == 130, errors
    wait_for(lambda: not workers(project))
    wait_for(lambda: [status for status, _ in recorded(project).values()] == ["KILLED", "KILLED"])
    cut = max(len(done) for done in epochs_done(project).values())
    assert cut < last

    running = start(*names)
    wait_for(lambda: rows(project, *names) >= cut + 3)
    on_second = [pid for pid in workers(project) if raylet in {up.pid for up in psutil.Process(pid).parents()}]
    assert len(on_second) == 1
    two_nodes.remove_node(second, allow_graceful=False)
    assert not list((project / "data/runs").glob("*/summary.json"))
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors

    assert recorded(project) == dict.fromkeys(names, finished(last))
    for name, run in runs.items():
        (folder,) = (project / "data/runs").glob(f"{name}-*")
        uncut = fit(name, run, Resources(), project / "data", tmp_path / "uncut")
        for file in ("best/model.safetensors", "last/model.safetensors"):
            assert (folder / file).read_bytes() == (uncut / file).read_bytes()


@pytest.mark.soak
def test_a_group_leaves_a_machine_that_is_drained_in_mid_epoch(project: Path, two_nodes: Cluster, start: Callable):
    """As before a machine is taken back; the run waits for another one that has the CPUs."""
    experiment(project, "x", resources={"workers": 2, "cpus_per_worker": 2}, **SLOW)
    leaves = two_nodes.add_node(num_cpus=4)
    running = start("x")
    wait_for(lambda: list((project / "data/runs").glob("*/progress.json")))  # its first step is done
    drain(two_nodes, leaves.node_id)
    (folder,) = (project / "data/runs").iterdir()
    wait_for(lambda: saved_in_mid_epoch(folder))
    wait_for(lambda: not workers(project))
    two_nodes.add_node(num_cpus=4)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    assert recorded(project) == {"x": finished(1)}


def drain(cluster: Cluster, node: str) -> None:
    words = [BIN / "ray", "drain-node", "--address", cluster.address, "--node-id", node]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "x", "--deadline-remaining-seconds", "600"]
    known = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=os.environ["RAY_AUTH_TOKEN"])
    subprocess.run([*words, *why], env=known, check=True, capture_output=True)


# Four GPUs


@pytest.fixture(scope="module")
def four_gpus(prefect_server: str) -> Iterator[None]:
    """A Ray of this process that believes in four GPUs."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 128 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_LOG_MONITOR_MAX_OPEN_FILES", "10")  # by default Ray keeps up to 200 logs open
        share_heaps()  # as `launch.start_ray` does before
        ray.init(address="local", num_cpus=8, num_gpus=GPUS, **quiet)
    yield
    ray.shutdown()


def test_four_runs_share_four_gpus_and_one_whose_worker_dies_is_started_again(project: Path, four_gpus: None):
    from pipelines import flow

    for seed, (name, (count, gpus)) in enumerate(NEEDS.items()):
        needs = {"workers": count, "gpus_per_worker": float(gpus)}
        experiment(project, name, resources=needs, seed=seed, epochs=10)
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: any(len(done) >= 3 for done in epochs_done(project).values()))
        killed.append(wait_for(lambda: workers(project))[-1])
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    state = flow.train(list(NEEDS), return_state=True)
    assert state.is_completed(), state.message
    assert len(killed) == 1

    assert recorded(project) == dict.fromkeys(NEEDS, finished(10))
    done = {name: [(row["time"] - row["seconds"], row["time"]) for row in rows]
            for name, rows in epochs_done(project).items()}  # fmt: skip
    moments = [begin for epochs in done.values() for begin, _ in epochs]
    busy = [[name for name, epochs in done.items() if any(begin <= now < end for begin, end in epochs)]
            for now in moments]  # fmt: skip
    assert max(sum(NEEDS[name][0] * NEEDS[name][1] for name in names) for names in busy) <= GPUS
    assert max(map(len, busy)) >= 2
    wait_for(lambda: ray.available_resources().get("GPU") == GPUS)


def test_a_worker_that_gets_sigterm_saves_in_mid_epoch_and_is_started_again(project: Path, four_gpus: None):
    """It is no failure, so none has to be allowed. Nor is there any other process of the run than the worker.

    Whatever else a run started would cost it seconds at its start, and the machine memory while it waits.
    """
    new = sigterm_in_mid_epoch(job(project, small_run(**SLOW), restarts=0), project)
    assert [name.split(".")[0][:10] for name in new if "IDLE" not in name] == ["ray::_task"]


def test_a_group_that_cannot_start_leaves_no_gpu_taken_and_one_that_gets_sigterm_is_started_again(
    project: Path, four_gpus: None, monkeypatch: pytest.MonkeyPatch
):
    """As when NCCL fails: Ray would keep what the workers had, and the next try would wait for ever."""
    made = job(project, small_run(**SLOW), workers=2, gpus_per_worker=GPUS / 2, restarts=0)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "ON_GPUS", "nccl")
        with pytest.raises(RuntimeError, match="NCCL"):
            Launcher().launch(made, project / "data")
    sigterm_in_mid_epoch(made, project)


def test_a_full_disk_ends_every_worker_at_once_and_is_the_users_to_mend(project: Path, four_gpus: None):
    """Only the first worker writes; the second would wait for it."""
    made = job(project, small_run(**SLOW), device="cpu", workers=2, restarts=0)
    made.folder.mkdir(parents=True)
    full = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(made.folder)]
    mounted = subprocess.run(full, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UserError, match="the disk is full: free some space and run the command again"):
            Launcher().launch(made, project / "data")
    finally:
        subprocess.run(["umount", made.folder], check=True)


@pytest.mark.timeout(900)  # it starts dozens of processes
@pytest.mark.soak
def test_twenty_runs_in_one_ray_session_leave_no_files_and_processes(project: Path, four_gpus: None):
    """Five flows of four runs at a time; the first two flows are the warm-up, the other twelve runs are measured.

    Ray's GCS keeps a connection per run open, and its log monitor up to ten logs.
    """
    from pipelines import flow

    before = {child["pid"] for child in children() if child["name"] != "ray::IDLE"}
    use = []
    for turn in range(5):
        names = [f"run_{seed}" for seed in range(4 * turn, 4 * turn + 4)]
        for seed, name in enumerate(names, 4 * turn):
            experiment(project, name, seed=seed, epochs=1)
        state = flow.train(names, return_state=True)
        assert state.is_completed(), state.message
        use.append(used(before))
    assert len(list((project / "data/runs").glob("*/summary.json"))) == 20
    assert all(last - first <= 4 for first, last in zip(use[1][:3], use[-1])), use
    assert use[-1][3] - use[1][3] <= 30, use


OF_ONE_RUN = ("ray::_task", "ray::RayTrainW", "ray::Synchroniz", "ray::TrainContr")


def used(before: set[int]) -> list[int]:
    """Files and threads of this process, processes, and files of Ray's own, once those of ended runs are gone."""
    gc.collect()
    wait_for(lambda: not any(c["name"].startswith(OF_ONE_RUN) for c in children() if c["pid"] not in before))
    me, found = psutil.Process(), children()
    ours = sum(child["num_fds"] for child in found if child["pid"] in before)
    return [me.num_fds(), me.num_threads(), len(found), ours]


def children() -> list[dict[str, Any]]:
    """pid, name and num_fds of what this process started; those that end meanwhile are left out."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    return [process.info for process in psutil.process_iter(["pid", "name", "num_fds"])
            if process.pid in mine and process.info["num_fds"]]  # fmt: skip


# Without a cluster


def test_a_run_that_fits_no_machine_is_refused_though_all_together_would_do(monkeypatch: pytest.MonkeyPatch):
    machine = {"CPU": 4.0, "GPU": 2.0}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": machine}] * 2)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0})

    def jobs(*shares: tuple[int, float]) -> list[Job]:
        return [Job("x", small_run(), Resources(workers=w, gpus_per_worker=gpus), Path("x")) for w, gpus in shares]

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
        ("diverged", 2, UserError),
        ("stopped", 2, UserError),
    ],
)
def test_only_what_died_or_left_is_started_again(ends: str, restarts: int, raised: Any, tmp_path: Path):
    starts: Iterator[Any] = iter(ends.split())
    made = Job("x", small_run(), Resources(restarts=restarts), tmp_path)
    launcher = Launcher(lambda *_: Ended(next(starts), "why"))
    with pytest.raises(raised, match="^why$") if raised else nullcontext():
        launcher.launch(made, tmp_path)
    assert next(starts, None) is None
    assert launcher.running == set()


def test_a_run_that_leaves_while_the_command_ends_is_not_started_again(tmp_path: Path):
    """As where SIGTERM came to every process."""

    def start(*_: object) -> Ended:
        launcher.stop(0)
        return Ended("terminated", "saved")

    launcher = Launcher(start)
    with pytest.raises(UserError, match="^saved$"):
        launcher.launch(Job("x", small_run(), Resources(), tmp_path), tmp_path)


def failed(*ranks: Any) -> ray.train.TrainingFailedError:
    return ray.train.WorkerGroupError("...", dict(enumerate(ranks)))


ENDED = {kind: NotDone(Ended(kind, kind)) for kind in GRAVITY}
KILLED = ray.exceptions.ActorDiedError()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (failed(ENDED["died"], ENDED["fault"]), "fault", "fault"),
        (failed(ENDED["mistake"], ENDED["died"]), "mistake", "mistake"),
        (failed(ENDED["stopped"], ENDED["terminated"]), "terminated", "terminated"),
        (failed(KILLED, ENDED["terminated"]), "terminated", "terminated"),
        (failed(KILLED, ENDED["died"]), "died", "died"),
        (failed(KILLED, KILLED), "died", "ActorDiedError: The actor died unexpectedly before finishing this task."),
        (failed(ray.exceptions.OutOfMemoryError("a page")), "died", FREE_MEMORY),
        (ray.train.ControllerError(RuntimeError("no NCCL")), "died", "RuntimeError: no NCCL"),
    ],
    ids=str,
)
def test_the_gravest_end_of_several_ranks_counts(error: Any, kind: Any, message: str):
    assert end_of_group(error) == Ended(kind, message)
