"""What runs on Ray, on this machine or on the cluster that RAY_ADDRESS names: a training run, or many small works."""

import fcntl
import logging
import os
import shutil
import socket
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.util import ActorPool
from torch.distributed import Backend

import fer
from fer.device import share_heaps
from fer.errors import UserError, disk_error
from fer.resources import Resources
from pipelines.controller import PeerLost, Trainer, died
from pipelines.experiments import Job

TRACEBACK = "error.txt"  # in a run's folder
running: set[Path] = set()  # folders of the runs that this process has given to Ray


def start_ray() -> None:
    """Connect to RAY_ADDRESS, or start Ray on this machine; token authentication is on, as Ray listens widely."""
    share_heaps()  # a flow's tasks are threads, in which MLflow and matplotlib work
    if ray.is_initialized():
        return
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        # a run computes in a thread: with a heap of its own it would give back what `fer.device.use_cpu` keeps
        "runtime_env": {"env_vars": {"MALLOC_ARENA_MAX": "1"}},
    }
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            ray.init(**options)
        except (OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"RAY_ADDRESS: no cluster answers at {address} ({reason}); start it, or unset the variable to run here"
            ) from None
    else:
        # "local": else Ray joins whatever cluster was last started on this machine, running or not
        ray.init(address="local", include_dashboard=False, object_store_memory=128 * 2**20, **options)


def _knock(address: str) -> None:
    """A quick look at host:port, since Ray itself tries for minutes; `auto` and the like are left to Ray."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def check_resources(jobs: Iterable[Job]) -> None:
    """Raises UserError, a line per run, where a run asks for more than the started Ray could ever give."""
    have = ray.cluster_resources()
    lines = []
    for job in jobs:
        asked, where = job.resources, f"{job.name}: resources"
        if asked.device == "cuda" and not have.get("GPU"):
            lines.append(f"{where}.device: cuda, but no GPU is there; set it to auto or cpu")
            continue
        short = [
            f"{where}: {asked.workers} worker(s) need {need:g} {kind}s, "
            f"there are {have.get(kind, 0):g}; lower workers or name a larger cluster in RAY_ADDRESS"
            for kind, need in _needs(asked).items()
            if need > have.get(kind, 0)
        ]
        lines += short
        if not short and (room := _room(asked)) < asked.workers:
            share = " and ".join(f"{count:g} {kind}s" for kind, count in _per_worker(asked).items())
            lines.append(
                f"{where}: a worker needs {share} of one machine; the machines that are there have "
                f"room for {room} of {asked.workers} worker(s); lower cpus_per_worker or gpus_per_worker"
            )
    if lines:
        raise UserError("\n".join(lines))


def _room(asked: Resources) -> int:
    """How many workers of this kind all machines hold when nothing else runs."""
    share = {kind: count for kind, count in _per_worker(asked).items() if count}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(machine.get(kind, 0) / count) for kind, count in share.items()) for machine in machines)


def all_fit(jobs: Iterable[Job]) -> bool:
    """Whether there is room for all of them at the same time; True where Ray was not started, as none trains."""
    if not ray.is_initialized():
        return True
    have = ray.cluster_resources()
    total: Counter[str] = Counter()
    for job in jobs:
        total.update(_needs(job.resources))
    return all(need <= have.get(kind, 0) for kind, need in total.items())


def narrowness(asked: Resources) -> tuple[float, float]:
    """Sorts runs that need many GPUs, then many CPUs, before the others."""
    needs = _needs(asked)
    return -needs.get("GPU", 0), -needs["CPU"]


def in_line() -> set[str]:
    """Ids of what the runs of this process have asked of Ray so far, given or not."""
    job = ray.get_runtime_context().get_job_id()
    return {group for group in ray.util.placement_group_table() if group.endswith(job)}


def launch(job: Job, data_dir: Path) -> None:
    """Train and evaluate a run into its folder; waits until Ray has resources for it.

    A worker that dies is restarted `resources.restarts` times, from the run's last checkpoint; one that gets SIGTERM
    saves first and is not counted. Raises UserError for what a user can mend, RuntimeError for the rest.
    """
    asked, storage = job.resources, job.folder / ".ray"
    trainer = Trainer(
        _work,  # type: ignore[arg-type]
        train_loop_config={
            "name": job.name,
            "run": job.run.model_dump(),
            "resources": asked.model_dump(),
            "start": job.start,
            "data_dir": str(data_dir.resolve()),
            "folder": str(job.folder.resolve()),
            "cwd": os.getcwd(),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=asked.workers,
            use_gpu=_uses_gpu(asked),
            resources_per_worker=_per_worker(asked),
        ),
        backend_config=_group(asked),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=uuid.uuid4().hex,  # a name used before would silently bring its old state back
            storage_path=str(storage.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=asked.restarts),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    (job.folder / TRACEBACK).unlink(missing_ok=True)  # of an earlier try
    running.add(job.folder)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _reason(job.name, error) from None
    finally:
        running.discard(job.folder)
        shutil.rmtree(storage, ignore_errors=True)


def spread(work: Callable[[Any], Any], items: list[Any], workers: int, device: str) -> Iterator[Any]:
    """The results of `work(item)`, as they come, from that many processes of Ray, each with a GPU where there is one.

    `work` is copied to each process once. One that dies is started again, with its item. Raises what `work` raises;
    UserError where Ray has no room for the processes, or where they die again and again.
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
        with suppress(FileNotFoundError):  # on another machine of a cluster
            os.chdir(cwd)
        self.work = work

    def run(self, item: Any) -> Any:
        return self.work(item)


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """One process at a time trains a run; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{name}: another process is training {folder.name}; wait for it or stop it") from None
        yield


def _work(config: dict[str, Any]) -> None:
    """On every worker."""
    from fer.evaluate import evaluate
    from fer.run import Run
    from fer.train import fit

    with suppress(FileNotFoundError):  # on another machine of a cluster
        os.chdir(config["cwd"])  # paths in settings are relative to the project, Ray starts workers elsewhere
    folder, resources = Path(config["folder"]), Resources.model_validate(config["resources"])
    try:
        run = Run.model_validate(config["run"])
        fit(config["name"], run, resources, config["data_dir"], folder.parent, start=config["start"])
        if ray.train.get_context().get_world_rank() == 0:
            evaluate(folder, config["data_dir"], resources)
    except UserError:
        raise
    except Exception as error:
        known = disk_error(error, folder) if isinstance(error, OSError) else None
        raise known or _final(error, folder) from error


def _final(error: Exception, folder: Path) -> RuntimeError:
    """An error of the program, with its last line in the project; the whole traceback is left in `folder`.

    PeerLost where it is another worker's end that this one met.
    """
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
        return PeerLost(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRACEBACK).write_text("".join(traceback.format_exception(error)))
    root = Path(fer.__file__).parents[1]
    packages = [root / "fer", root / "pipelines"]
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if any(map(Path(frame.filename).is_relative_to, packages))][-1]
    where = f"{Path(last.filename).relative_to(root)}:{last.lineno}, in {last.name}"
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, torch.OutOfMemoryError):
        reason += "; lower batch_size or resources.eval_batch_size, or raise resources.accumulate"
    return RuntimeError(f"{type(error).__name__}: {reason} ({where}; all of it: {folder / TRACEBACK})")


def _uses_gpu(asked: Resources) -> bool:
    return asked.device != "cpu" and ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0


def _group(asked: Resources) -> TorchConfig | None:
    """How the workers find each other: each takes what fits its machine, NCCL or Gloo; one alone needs nobody.

    Ray's own choice is NCCL also where torch has no GPU.
    """
    if asked.workers == 1:
        return None
    return TorchConfig(backend=Backend.UNDEFINED if _uses_gpu(asked) else "gloo")


def _per_worker(asked: Resources) -> dict[str, float]:
    share: dict[str, float] = {"CPU": asked.cpus_per_worker}
    if _uses_gpu(asked):
        share["GPU"] = asked.gpus_per_worker
    return share


def _needs(asked: Resources) -> dict[str, float]:
    return {kind: asked.workers * count for kind, count in _per_worker(asked).items()}


def _reason(name: str, error: ray.train.TrainingFailedError) -> Exception:
    """The first worker's own error, or one that a user can mend, without Ray's wrapping."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    for cause in failures:
        if isinstance(cause, UserError):
            return UserError(str(cause))
    own = [cause for cause in failures if not died(cause) and not isinstance(cause, PeerLost)]
    cause = (own or failures)[0]
    cause = getattr(cause, "health_check_failure", cause)
    if isinstance(cause, ray.exceptions.OutOfMemoryError):
        return RuntimeError(
            f"{name}: the machine ran out of memory and Ray ended a worker; "
            "lower batch_size, resources.eval_batch_size or resources.workers, or train fewer models at the same time"
        )
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    kind = "" if own else f"{type(cause).__name__}: "
    return RuntimeError(f"{name}: {kind}{lines[-1] if lines else error}")
