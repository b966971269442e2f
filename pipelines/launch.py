"""Run training runs on Ray: on this machine, or on the cluster that RAY_ADDRESS names."""

import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util import ActorPool, get_current_placement_group, remove_placement_group

from fer.device import share_heaps
from fer.errors import UserError, first_line, one_line
from fer.files import is_held
from fer.resources import Resources
from fer.signals import Sigterm, Stopped, ask_to_stop
from fer.train import NonFiniteLoss
from pipelines.experiments import Job
from pipelines.processes import other_drivers
from pipelines.work import Ended, enter, work

FREE_MEMORY = (
    "the machine ran out of memory and Ray ended a worker; lower batch_size, resources.eval_batch_size or "
    "resources.workers, or train fewer models at the same time"
)
OBJECT_STORE = 128 * 2**20  # bytes of the file in which Ray keeps objects; a run has none to speak of
GRAVITY = ("fault", "mistake", "diverged", "terminated", "stopped", "died")  # of several ranks' ends the first counts
LEAST = 16  # runs
ON_GPUS = "undefined"  # NCCL if torch sees a GPU, else Gloo; Ray's default is NCCL even if torch sees none
logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # failures reach the caller as exceptions


def start_ray() -> None:
    """Connect to the cluster at RAY_ADDRESS, or start Ray on this machine; does nothing if Ray is running.

    Raises UserError if no cluster answers there, or Ray cannot start here.
    """
    share_heaps()  # a flow's tasks are threads, in which MLflow and matplotlib allocate memory
    if ray.is_initialized():
        return
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        # a run computes in a thread: with a heap of its own it would return the memory that `fer.device.use_cpu` keeps
        "runtime_env": {"env_vars": {"MALLOC_ARENA_MAX": "1"}},
    }
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address, options)
        return
    if shutil.which("bash") is None:  # Ray would try again for ever
        raise UserError("PATH: Ray starts its workers by bash, which is not there; install it, or add its folder")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < OBJECT_STORE:
        raise UserError(
            f"ulimit -f: a file may have {limit >> 20} MB, and Ray needs one of {OBJECT_STORE >> 20}; raise the limit"
        )
    remedy = (
        "run the command again, with fewer processes beside it, and without limits (ulimit -a) or RAY_ variables that "
        "it cannot work with"
    )
    with one_line("Ray does not start on this machine", remedy):  # it raises a bare Exception for a start too slow
        try:
            # without "local", Ray joins the cluster last started on this machine, whether it still runs or not
            ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **options)
        except OSError as error:
            raise UserError(
                f"RAY_TMPDIR: Ray cannot keep its files in {os.environ.get('RAY_TMPDIR') or tempfile.gettempdir()} "
                f"({first_line(error)}); set it to a folder of your own with a short path"
            ) from None
    _refuse_shared_gpus()


def _join(address: str, options: dict[str, Any]) -> None:
    """Connect to a cluster. Raises UserError if it does not answer, or does not let this process in."""
    try:
        _knock(address)
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"RAY_ADDRESS: no cluster answers at {address} ({first_line(error)}); "
            "start it, or unset the variable to run here"
        ) from None
    if _knows_another_token(address):
        raise UserError(
            f"RAY_ADDRESS: the cluster at {address} was started with another token, as by another user; set "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token to that token, or unset RAY_ADDRESS to run here"
        )
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"RAY_ADDRESS: cannot join the cluster at {address} ({first_line(error)}); is it running, and are "
            "RAY_AUTH_MODE and the token (RAY_AUTH_TOKEN, ~/.ray/auth_token) those that it was started with?"
        ) from None


def _knock(address: str) -> None:
    """Try host:port once, since Ray itself retries for minutes; `auto` and the like are left to Ray."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def _knows_another_token(address: str) -> bool:
    """Ask by Ray's own command, which answers in 3 s; `ray.init` would try for 20 s, and not tell the reason."""
    command = [str(Path(sys.executable).parent / "ray"), "status", "--address", address]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:  # a busy machine: `ray.init` finds out
        return False
    return done.returncode != 0 and b"InvalidAuthToken" in done.stderr


def _refuse_shared_gpus() -> None:
    """Raises UserError if another driver's Ray holds the GPUs of this machine: each believes that all are its own."""
    if not ray.cluster_resources().get("GPU"):
        return
    others = other_drivers("raylet")
    if others:
        ray.shutdown()
        raise UserError(
            f"process {others[0]} already trains on the GPUs of this machine; wait for it, or let both share one Ray: "
            "start it as docs/clusters.md says, and set RAY_ADDRESS=auto for each"
        )


def check_resources(jobs: Iterable[Job]) -> None:
    """Raises UserError, one line per run, if a run asks for more than the cluster has in total."""
    have = ray.cluster_resources()
    lines = []
    for job in jobs:
        asked, where = job.resources, f"{job.name}: resources"
        if asked.device == "cuda" and not have.get("GPU"):
            lines.append(f"{where}.device: cuda, but there is no GPU; set it to auto or cpu")
            continue
        share = _per_worker(asked)
        short = [
            f"{where}: {asked.workers} worker(s) need {asked.workers * count:g} {kind}s, "
            f"there are {have.get(kind, 0):g}; lower workers or set RAY_ADDRESS to a larger cluster"
            for kind, count in share.items()
            if asked.workers * count > have.get(kind, 0)
        ]
        lines += short
        if not short and (room := _room(asked)) < asked.workers:
            needs = " and ".join(f"{count:g} {kind}s" for kind, count in share.items())
            lines.append(
                f"{where}: a worker needs {needs} on one machine; there is room for {room} of {asked.workers} "
                "worker(s); lower cpus_per_worker or gpus_per_worker"
            )
    if lines:
        raise UserError(*lines)


def _room(asked: Resources) -> int:
    """How many such workers fit on all machines together when nothing else runs."""
    share = {kind: count for kind, count in _per_worker(asked).items() if count}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(machine.get(kind, 0) / count) for kind, count in share.items()) for machine in machines)


def at_once(asked: Iterable[Resources]) -> int:
    """How many runs to begin at the same time: as many as fit, but at least LEAST, as a cluster may grow."""
    fit = [_room(one) // one.workers for one in asked] if ray.is_initialized() else []  # else nothing is left to train
    return max([LEAST, *fit])


def start(job: Job) -> Ended:
    """One attempt at a run on Ray, from its last checkpoint if there is one; returns how it ended."""
    return _as_task(job) if job.resources.workers == 1 else _as_group(job)


class Launcher:
    """Runs training runs on Ray and restarts those whose worker died. Its methods are thread-safe."""

    def __init__(self, start: Callable[[Job], Ended] = start) -> None:
        """`start`: makes one attempt at a run and returns how it ended."""
        self.start = start
        self.running: set[Path] = set()  # folders
        self.stopping = False

    def stop(self, seconds: float, beside: Iterable[Path] = ()) -> None:
        """Ask all runs, and those in the folders `beside`, to save and stop; wait at most `seconds`. None restarts."""
        self.stopping = True
        local = not os.environ.get("RAY_ADDRESS")  # locks of another machine may not be seen here
        ask_to_stop([*self.running, *beside], seconds, is_held if local else lambda folder: True)

    def launch(self, job: Job) -> None:
        """Train and evaluate a run into its folder, as soon as Ray has the resources for it.

        A run whose process or machine dies is restarted up to `resources.restarts` times, from its last checkpoint. A
        run that saved its state after SIGTERM is restarted as well, and that does not count. Raises UserError for what
        a user can fix, such as NonFiniteLoss, and RuntimeError for everything else.
        """
        deaths = 0
        self.running.add(job.folder)
        try:
            while True:
                ended = self.start(job)
                if ended.kind == "done":
                    return
                if ended.kind == "stopped" or (ended.kind == "terminated" and self.stopping):
                    raise Stopped(ended.message)
                if ended.kind in ("mistake", "diverged"):
                    kind = NonFiniteLoss if ended.kind == "diverged" else UserError
                    raise kind(*ended.message.splitlines())
                deaths += ended.kind == "died"
                if ended.kind == "fault" or deaths > job.resources.restarts:
                    raise RuntimeError(ended.message)
        finally:
            self.running.discard(job.folder)


def _as_task(job: Job) -> Ended:
    """In one Ray task, which runs in the main thread of its process and so handles signals itself."""
    share = _per_worker(job.resources)
    remote = ray.remote(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0), max_retries=0, max_calls=1)(_task)
    try:
        return ray.get(remote.remote(job, os.getcwd()))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # not from `work`, which raises nothing: the project there is missing or another
    except ray.exceptions.RayError as error:
        return _death(error)


def _task(job: Job, root: str) -> Ended:
    enter(root)
    return work(job)


def _as_group(job: Job) -> Ended:
    """In several processes, with Ray Train; its own retries are off, as `Launcher.launch` decides about them."""
    storage = job.folder.resolve() / ".ray"
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"job": job, "root": os.getcwd()},
        torch_config=_Group(backend=ON_GPUS if _uses_gpu(job.resources) else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.resources.workers,
            use_gpu=_uses_gpu(job.resources),
            resources_per_worker=_per_worker(job.resources),
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=uuid.uuid4().hex,  # under a name used before, Ray Train would silently restore the old state
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        return end_of_group(error)
    except ray.exceptions.RayError as error:  # of Ray Train's own processes
        return _death(error)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return Ended("done")


class NotDone(Exception):
    """Raised by a rank whose run did not finish, so that Ray Train stops the others."""

    def __init__(self, ended: Ended):
        super().__init__(ended)
        self.ended = ended


def _rank(config: dict[str, Any]) -> None:
    """What every worker of a group runs."""
    enter(config["root"])
    ended = work(config["job"], leaves=_leaves)
    if ended.kind != "done":
        raise NotDone(ended)


def _leaves() -> bool:
    """Whether a machine of this group is about to be taken away; all ranks ask at the same step."""
    return ray.train.get_preemption_info() is not None


class _Group(TorchConfig):
    """Ray's way of connecting torch's ranks, with a SIGTERM handler in each of them."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _GroupBackend

    def torch(self) -> Backend:
        return super().backend_cls()


class _GroupBackend(Backend):
    """Installs the handler in each process before training starts: a rank trains in a thread, which cannot do it."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        place = worker_group.execute_single(0, get_current_placement_group)
        try:
            worker_group.execute(_handle_sigterm)
            backend_config.torch().on_start(worker_group, backend_config)
        except Exception:
            remove_placement_group(place)  # Ray Train keeps it, and the next attempt would wait for it forever
            raise

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        backend_config.torch().on_training_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        backend_config.torch().on_shutdown(worker_group, backend_config)


def _handle_sigterm() -> None:
    Sigterm()


def end_of_group(error: ray.train.TrainingFailedError) -> Ended:
    """How a run on several ranks ended: the gravest of their ends by GRAVITY, "died" if no rank reported one."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    reported = [cause.ended for cause in failures if isinstance(cause, NotDone)]
    if reported:
        return min(reported, key=lambda ended: GRAVITY.index(ended.kind))
    return _death(getattr(failures[0], "health_check_failure", failures[0]))


def _death(error: BaseException) -> Ended:
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return Ended("died", FREE_MEMORY)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # the last line of a worker's traceback says what happened, but the first line of Ray's own errors
    reason = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0] if lines else "no message"
    return Ended("died", f"{type(error).__name__}: {reason}")


def spread(work: Callable[[Any], Any], items: list[Any], workers: int, device: str) -> Iterator[Any]:
    """Yield the results of `work(item)` in the order of completion, computed by `workers` processes of Ray.

    Each process gets a copy of `work` once, and a GPU if there are any and `device` is not cpu. One that dies is
    restarted, and its item tried again. Raises what `work` raises; UserError if there are too few CPUs or GPUs, or if a
    process keeps dying.
    """
    start_ray()
    have = ray.cluster_resources()
    gpus = 1 if device != "cpu" and have.get("GPU", 0) else 0
    kind = "GPU" if gpus else "CPU"
    if workers > have.get(kind, 0):
        raise UserError(
            f"super_resolution.workers: {workers} need a {kind} each, there are {have.get(kind, 0):g}; lower it"
        )
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=3, max_task_retries=3)(_Worker)
    pool = ActorPool([actor.remote(work, os.getcwd()) for _ in range(workers)])
    try:
        yield from pool.map_unordered(lambda worker, item: worker.run.remote(item), items)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
        raise UserError(
            "super_resolution.workers: a process died four times, as for want of memory; "
            "lower it and run the command again"
        ) from None
    finally:
        ray.shutdown()


class _Worker:
    """A process of `spread`."""

    def __init__(self, work: Callable[[Any], Any], cwd: str):
        enter(cwd)
        self.work = work

    def run(self, item: Any) -> Any:
        return self.work(item)


def _uses_gpu(asked: Resources) -> bool:
    return asked.device != "cpu" and ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0


def _per_worker(asked: Resources) -> dict[str, float]:
    share: dict[str, float] = {"CPU": asked.cpus_per_worker}
    if _uses_gpu(asked):
        share["GPU"] = asked.gpus_per_worker
    return share
