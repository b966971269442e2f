"""Scheduling proven on Ray's logical resources: many runs on four GPUs that do not exist, and on two nodes."""

import gc
import json
import os
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from conftest import small_run
from ray.cluster_utils import Cluster
from test_flow import BIN, _workers, env, experiment, server, wait_for  # noqa: F401

from fer.data.dataset import open_data
from fer.device import share_heaps
from fer.errors import UserError
from fer.resources import Resources
from fer.run import Run, run_id
from fer.signals import ask_to_stop
from fer.train import fit
from pipelines import launch
from pipelines.experiments import Job
from pipelines.launch import FREE_MEMORY, GRAVITY, Launcher, NotDone
from pipelines.work import Ended

pytestmark = pytest.mark.slow

GPUS = 4
# name -> workers, GPUs of each; seven GPUs in all
NEEDS = {"half": (1, 0.5), "other_half": (1, 0.5), "two": (1, 2), "wide": (2, 2)}


# an epoch of 24 steps takes seconds
SLOW: dict[str, Any] = {"epochs": 1, "batch_size": 4, "input": {"image_size": 64}, "model": {"width": 1.0}}


def job(project: Path, run: Run, **resources: Any) -> Job:
    """A run that asks for the GPUs that Ray declares, unless `resources` say otherwise."""
    folder = project / "data/runs" / run_id("x", run, open_data(project / "data").hash)
    return Job("x", run, Resources(**resources), folder)


@pytest.fixture(scope="module")
def prefect(server: str) -> Iterator[str]:
    """The address of a Prefect server, which the flows of this process use, too."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: server}):
        yield server


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two raylets with a CPU each; the driver joins the first. Used before `four_gpus`: a process has one Ray."""
    for key, value in {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(key, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def start(project: Path, cluster: Cluster, prefect: str, *words: str) -> subprocess.Popen:
    addresses = env(RAY_ADDRESS=cluster.address, PREFECT_API_URL=prefect)
    return subprocess.Popen(
        [str(BIN / "fer"), "train", *words], cwd=project, env=addresses, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def worker_on(project: Path, raylet: int) -> list[int]:
    return [pid for pid in _workers(project) if raylet in {parent.pid for parent in psutil.Process(pid).parents()}]


@pytest.mark.soak
def test_two_nodes_a_cancelled_flow_leaves_nothing_and_a_dead_node_costs_no_run(
    project: Path, tmp_path: Path, two_nodes: Cluster, prefect: str
):
    """The second start finds the cluster free; the node dies while each node is in the middle of a run.

    As many epochs as one run does while the other's process still starts, and more.
    """
    names, last = ["left", "right"], 240
    runs = {name: experiment(project, name, seed=seed, epochs=last) for seed, name in enumerate(names)}
    (second,) = two_nodes.worker_nodes
    raylet = second.all_processes["raylet"][0].process.pid

    cancelled = start(project, two_nodes, prefect, *names)
    wait_for(lambda: len(epochs(project)) == 2 and all(len(rows) >= 3 for rows in epochs(project).values()))
    cancelled.send_signal(signal.SIGINT)
    _, errors = cancelled.communicate(timeout=60)
    assert cancelled.returncode == 130, errors
    wait_for(lambda: not _workers(project))
    wait_for(lambda: [status for status, _ in recorded(project).values()] == ["FAILED", "FAILED"])
    cut = {name: len(rows) for name, rows in epochs(project).items()}
    assert all(count < last for count in cut.values()), cut

    running = start(project, two_nodes, prefect, *names)
    wait_for(lambda: all(len(rows) >= cut[name] + 3 for name, rows in epochs(project).items()))
    assert len(worker_on(project, raylet)) == 1
    two_nodes.remove_node(second, allow_graceful=False)
    assert not list((project / "data/runs").glob("*/summary.json"))
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors

    assert recorded(project) == {name: ("FINISHED", list(range(1, last + 1))) for name in names}
    for name, run in runs.items():
        (folder,) = (project / "data/runs").glob(f"{name}-*")
        uncut = fit(name, run, Resources(), project / "data", tmp_path / "uncut")
        for file in ("best/model.safetensors", "last/model.safetensors"):
            assert (folder / file).read_bytes() == (uncut / file).read_bytes()


@pytest.mark.soak
def test_a_group_leaves_a_machine_that_is_drained_in_mid_epoch(project: Path, two_nodes: Cluster, prefect: str):
    """As before a machine is taken back; the run waits for another one that has the CPUs."""
    experiment(project, "x", resources={"workers": 2, "cpus_per_worker": 2}, **SLOW)
    leaves = two_nodes.add_node(num_cpus=4)
    running = start(project, two_nodes, prefect, "x")
    wait_for(lambda: list((project / "data/runs").glob("*/progress.json")))  # its first step is done
    drain(two_nodes, leaves.node_id)
    (folder,) = (project / "data/runs").iterdir()
    wait_for(lambda: saved_in_mid_epoch(folder))
    wait_for(lambda: not _workers(project))
    two_nodes.add_node(num_cpus=4)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    assert recorded(project) == {"x": ("FINISHED", [1])}


@pytest.mark.soak
def test_a_run_of_one_worker_goes_on_when_its_machine_was_drained(project: Path, two_nodes: Cluster, prefect: str):
    """Ray tells it nothing before the machine is gone."""
    experiment(project, "x", resources={"cpus_per_worker": 2}, epochs=40)
    leaves = two_nodes.add_node(num_cpus=2)
    running = start(project, two_nodes, prefect, "x")
    wait_for(lambda: any(len(rows) >= 3 for rows in epochs(project).values()))
    drain(two_nodes, leaves.node_id)
    two_nodes.remove_node(leaves, allow_graceful=False)
    two_nodes.add_node(num_cpus=2)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    assert recorded(project) == {"x": ("FINISHED", list(range(1, 41)))}


def drain(cluster: Cluster, node: str) -> None:
    words = [BIN / "ray", "drain-node", "--address", cluster.address, "--node-id", node]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "x", "--deadline-remaining-seconds", "600"]
    subprocess.run([*words, *why], env=env(RAY_AUTH_MODE="token"), check=True, capture_output=True)


def saved_in_mid_epoch(folder: Path) -> bool:
    try:
        return torch.load(folder / "last/training.pt", weights_only=True)["step"] > 0
    except FileNotFoundError:  # none yet, or a new one takes its place
        return False


@pytest.fixture(scope="module")
def four_gpus(prefect: str) -> Iterator[None]:
    """A Ray of this process that believes in four GPUs."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 128 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_LOG_MONITOR_MAX_OPEN_FILES", "10")  # by default Ray keeps up to 200 logs open
        share_heaps()  # as `launch.start_ray` does before
        ray.init(address="local", num_cpus=8, num_gpus=GPUS, **quiet)
    yield
    ray.shutdown()


def epochs(project: Path) -> dict[str, list[tuple[float, float]]]:
    """name -> when each epoch began and ended, as the workers wrote it."""
    found = {}
    for path in (project / "data/runs").glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1)), path
        found[path.parent.name.split("-")[0]] = [(row["time"] - row["seconds"], row["time"]) for row in rows]
    return found


def recorded(project: Path) -> dict[str, tuple[str, list[int]]]:
    """name -> status and steps of its MLflow run, of which there is one; read from the store itself."""
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        runs = store.execute("select run_uuid, name, status from runs").fetchall()
        steps = "select step from metrics where run_uuid = ? and key = 'val_accuracy' order by timestamp"
        found = {name.split("-")[0]: (status, [s for (s,) in store.execute(steps, [i])]) for i, name, status in runs}
    assert len(found) == len(runs)
    return found


def test_four_runs_share_four_gpus_and_one_whose_worker_dies_is_started_again(project: Path, four_gpus: None):
    from pipelines import flow

    for seed, (name, (workers, gpus)) in enumerate(NEEDS.items()):
        needs = {"workers": workers, "gpus_per_worker": float(gpus)}
        experiment(project, name, resources=needs, seed=seed, epochs=20)
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: any(len(rows) >= 3 for rows in epochs(project).values()))
        killed.append(_workers(project)[-1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    state = flow.train(list(NEEDS), return_state=True)
    killer.join(5)
    assert state.is_completed(), state.message
    assert len(killed) == 1

    done = epochs(project)
    assert {name: len(rows) for name, rows in done.items()} == dict.fromkeys(NEEDS, 20)
    moments = [begin for rows in done.values() for begin, _ in rows]
    used = [sum(workers * gpus for name, (workers, gpus) in NEEDS.items()
                for begin, end in done[name] if begin <= now < end) for now in moments]  # fmt: skip
    assert max(used) <= GPUS
    beside = [sum(begin <= now < end for rows in done.values() for begin, end in rows) for now in moments]
    assert max(beside) >= 2
    assert recorded(project) == {name: ("FINISHED", list(range(1, 21))) for name in NEEDS}
    wait_for(lambda: ray.available_resources().get("GPU") == GPUS)


def test_a_group_that_cannot_start_leaves_no_gpu_taken(project: Path, four_gpus: None, monkeypatch):
    """As when NCCL fails: Ray would keep what the workers had, and the next try would wait for ever."""
    made = job(project, small_run(epochs=1), workers=2, gpus_per_worker=GPUS / 2, restarts=0)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "ON_GPUS", "nccl")
        with pytest.raises(RuntimeError, match="NCCL"):
            Launcher().launch(made, project / "data")
    Launcher().launch(made, project / "data")
    assert (made.folder / "summary.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_gets_sigterm_saves_in_mid_epoch_and_is_started_again(
    project: Path, four_gpus: None, workers: int
):
    """It is no failure, so none has to be allowed."""
    made = job(project, small_run(**SLOW), device="cpu", workers=workers, restarts=0)
    thread = threading.Thread(target=Launcher().launch, args=(made, project / "data"))
    thread.start()
    wait_for(lambda: (made.folder / "progress.json").exists())  # its first step is done
    os.kill(max(_workers(project)), signal.SIGTERM)
    wait_for(lambda: saved_in_mid_epoch(made.folder))
    thread.join(120)
    assert not thread.is_alive()
    assert (made.folder / "summary.json").exists()


def test_a_full_disk_ends_every_worker_at_once_and_is_the_users_to_mend(project: Path, four_gpus: None, monkeypatch):
    """Only the first worker writes; the second would wait for it."""
    starts, real = [], launch._start
    monkeypatch.setattr(launch, "_start", lambda *given: (starts.append(given), real(*given))[1])
    made = job(project, small_run(**SLOW), device="cpu", workers=2, restarts=3)
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
    assert len(starts) == 1


def test_a_run_is_its_worker_and_no_other_process(project: Path, four_gpus: None):
    """Whatever else a run started would cost it seconds at its start, and the machine memory while it waits."""
    made = job(project, small_run(epochs=200))
    before = {child["pid"] for child in _children() if child["name"] != "ray::IDLE"}  # an idle worker may take the run
    thread = threading.Thread(target=_launch_until_asked, args=(made, project))
    thread.start()
    wait_for(lambda: epochs(project))
    started = [child["name"] for child in _children() if child["pid"] not in before and child["name"] != "ray::IDLE"]
    ask_to_stop([made.folder], 20)
    thread.join(20)
    assert not thread.is_alive()
    assert [name.split(".")[0][:10] for name in started] == ["ray::_task"]


def _launch_until_asked(made: Job, project: Path) -> None:
    with pytest.raises(UserError, match="stopped in epoch"):
        Launcher().launch(made, project / "data")


@pytest.mark.timeout(900)  # it starts dozens of processes
@pytest.mark.soak
def test_twenty_runs_in_one_ray_session_keep_memory_and_open_files(project: Path, four_gpus: None):
    """Five flows of four runs at a time; the first two flows are the warm-up, the other twelve runs are measured.

    Ray's GCS keeps a connection per run open, and its log monitor up to ten logs.
    """
    from pipelines import flow

    before = {child["pid"] for child in _children() if child["name"] != "ray::IDLE"}
    use = []
    for turn in range(5):
        seeds = range(4 * turn, 4 * turn + 4)
        for seed in seeds:
            experiment(project, f"run_{seed}", seed=seed, epochs=1)
        state = flow.train([f"run_{seed}" for seed in seeds], return_state=True)
        assert state.is_completed(), state.message
        use.append(_use(before))
    assert len(list((project / "data/runs").glob("*/summary.json"))) == 20
    first, last = use[1], use[-1]
    assert {key: last[key] - first[key] for key, limit in LIMITS.items() if last[key] - first[key] > limit} == {}, use


LIMITS = {"driver files": 4, "ray files": 30, "driver threads": 4, "processes": 4, "driver MB": 48, "ray MB": 48}
OF_ONE_RUN = ("ray::_task", "ray::RayTrainW", "ray::Synchroniz", "ray::TrainContr")


def _use(before: set[int]) -> dict[str, float]:
    """Memory and open files of this process and of Ray's own, `before` any run, once those of ended runs are gone."""
    me = psutil.Process()
    gc.collect()
    wait_for(lambda: not any(c["name"].startswith(OF_ONE_RUN) for c in _children() if c["pid"] not in before))
    children = _children()
    rays = [child for child in children if child["pid"] in before]
    return {
        "driver MB": me.memory_info().rss / 2**20,
        "driver files": me.num_fds(),
        "driver threads": me.num_threads(),
        "processes": len(children),
        "ray MB": sum(child["memory_info"].rss for child in rays) / 2**20,
        "ray files": sum(child["num_fds"] for child in rays),
    }


def _children() -> list[dict[str, Any]]:
    """pid, name, num_fds and memory_info of what this process started; those that end meanwhile are left out."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    return [process.info for process in psutil.process_iter(["pid", "name", "num_fds", "memory_info"])
            if process.pid in mine and process.info["memory_info"]]  # fmt: skip


def test_a_run_that_fits_no_machine_is_refused_though_all_together_would_do(monkeypatch: pytest.MonkeyPatch):
    machine = {"CPU": 4.0, "GPU": 2.0}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": machine}] * 2)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0})
    fits = (
        {"workers": 4, "gpus_per_worker": 1.0},
        {"workers": 2, "gpus_per_worker": 2.0},
        {"workers": 1, "gpus_per_worker": 0.5},
    )
    for resources in fits:
        launch.check_resources([Job("x", small_run(), Resources(**resources), Path("x"))])
    with pytest.raises(UserError) as error:
        launch.check_resources([Job("x", small_run(), Resources(workers=1, gpus_per_worker=4.0), Path("x"))])
    assert str(error.value) == (
        "x: resources: a worker needs 1 CPUs and 4 GPUs of one machine; the machines that are there have room "
        "for 0 of 1 worker(s); lower cpus_per_worker or gpus_per_worker"
    )


@pytest.mark.parametrize(
    ("ends", "restarts", "raised"),
    [
        (["done"], 0, None),
        (["died", "died", "done"], 2, None),
        (["died", "died", "died"], 2, RuntimeError),
        (["died"], 0, RuntimeError),
        (["terminated", "terminated", "terminated", "done"], 0, None),
        (["terminated", "died", "terminated", "died"], 1, RuntimeError),
        (["fault"], 2, RuntimeError),
        (["mistake"], 2, UserError),
        (["diverged"], 2, UserError),
        (["stopped"], 2, UserError),
        (["died", "mistake"], 2, UserError),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_only_what_died_or_left_is_started_again(ends: list, restarts: int, raised: Any, monkeypatch, tmp_path: Path):
    starts = iter(ends)
    monkeypatch.setattr(launch, "_start", lambda *_: Ended(next(starts), "why"))
    made = Job("x", small_run(), Resources(restarts=restarts), tmp_path)
    launcher = Launcher()
    if raised is None:
        launcher.launch(made, tmp_path)
    else:
        with pytest.raises(raised, match="^why$"):
            launcher.launch(made, tmp_path)
    assert next(starts, None) is None
    assert launcher.running == set()


def test_a_run_that_leaves_while_the_command_ends_is_not_started_again(monkeypatch, tmp_path: Path):
    """As where SIGTERM came to every process."""
    launcher = Launcher()
    monkeypatch.setattr(launch, "_start", lambda *_: (launcher.stop(0), Ended("terminated", "saved"))[1])
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
def test_the_gravest_end_of_several_ranks_counts(error: Any, kind: str, message: str):
    assert launch._of_group(error) == Ended(kind, message)  # type: ignore[arg-type]
