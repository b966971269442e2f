"""Ray Train with its controller in the driver, so that a run is its workers and no other process.

Ray 2.60 starts five actors for a run, most of them one after another before the first worker: the controller, one that
asks an autoscaler for machines, one that cleans up after a dead controller, one for Ray's data sets and one for
`ray.train.report`. Here a pending placement group asks, it goes with the driver's job, and the last, which starts
beside the workers, ends once they are there.
"""

import asyncio
import logging
import os
import signal
from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from fer.errors import UserError
from fer.stop import Stopped, heed_sigterm

UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)
logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what fails reaches the caller as an exception


class Trainer(DataParallelTrainer):
    """A trainer whose `fit` steers the workers from the calling thread, which must not run an event loop."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        rays = [callback for callback in parts["callbacks"] if not isinstance(callback, UNUSED)]
        parts["callbacks"] = [_GiveBack(), _HeedSigterm(), _Drain(), *rays]
        parts["scaling_policy"] = _AsAsked(parts["scaling_policy"].scaling_config)
        parts["failure_policy"] = _Retries(parts["failure_policy"].failure_config)
        controller = _Controller(**parts)
        asyncio.run(controller.run())
        return controller.get_result()


class _AsAsked(FixedScalingPolicy):  # type: ignore[misc]
    """The configured number of workers, asked of Ray by their placement group alone."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class PeerLost(RuntimeError):
    """Raised by a worker that was waiting for another one when that died."""


def died(error: BaseException) -> bool:
    """Whether a worker's failure is the death of its process or machine, and not an error of the program."""
    return isinstance(error, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError | ray.exceptions.RayError)


class _Retries(DefaultFailurePolicy):  # type: ignore[misc]
    """For dead processes and machines alone; and a run that was told to leave its machine has not failed."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        found = getattr(training_failed_error, "worker_failures", {}).values()
        if any(isinstance(error, Stopped) and error.terminated for error in found):
            return FailureDecision.RETRY
        if any(isinstance(error, UserError) for error in found):
            return FailureDecision.RAISE
        if found and not any(map(died, found)) and not all(isinstance(error, PeerLost) for error in found):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, args: dict[str, list[Any]]) -> None:
        """Without the handles of a controller and of what gathers reports: no run calls `ray.train.report`."""
        ray.kill(sync_actor)
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=None,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{key: values[rank] for key, values in args.items()},
                )
                for rank, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _WorkerGroup


class _GiveBack(ControllerCallback, WorkerGroupCallback):
    """Frees what workers hold that die while they start; Ray 2.60 keeps it, and the next try would wait for ever.

    It has to come before Ray Train's other callbacks.
    """

    starting: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.starting = worker_group.get_worker_group_state()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        self.starting = None  # it has started: now Ray frees it

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        if self.starting is not None:
            self.starting.shutdown()
            self.starting = None


class _HeedSigterm(WorkerCallback):
    """A worker that gets SIGTERM saves its run; training runs in a thread, which cannot see to signals itself."""

    def after_init_train_context(self) -> None:
        heed_sigterm()


class _Drain(WorkerGroupCallback):
    """Workers on a machine that Ray drains, since it will be taken back, get SIGTERM; Ray goes on on another one."""

    workers: list[Any]  # those not told yet

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.workers = list(worker_group.get_workers())

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        draining = ray._private.state.state.get_draining_nodes()
        for worker in [worker for worker in self.workers if worker.metadata.node_id in draining]:
            worker.actor.execute.remote(_terminate)
            self.workers.remove(worker)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
