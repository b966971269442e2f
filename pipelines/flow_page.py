"""What a flow run shows on its page in Prefect, and how flow runs are closed whose process is gone."""

import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed, State

from fer.errors import UserError, first_line, without_password
from pipelines.processes import ended, process_id

FLOWS = ["train", "sweep"]
HOST, PROCESS = "fer.host", "fer.process"  # labels of a flow run: who carries it out
OPEN = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]


def check_server() -> None:
    """Raises UserError where PREFECT_API_URL names a server that does not answer, or refuses the credentials."""
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        return
    try:
        answer = httpx.get(f"{address.rstrip('/')}/health", timeout=10)
        if answer.status_code == 404 or (answer.status_code == 200 and answer.text.strip() != "true"):
            raise ValueError("what answers is something else; the address ends in /api")
        with get_client(sync_client=True) as client:
            client.hello()
    except httpx.HTTPStatusError as error:  # of `hello`, which not every server has
        if error.response.status_code in (401, 403):
            raise UserError(
                f"PREFECT_API_URL: the Prefect server at {without_password(address)} refuses the credentials; set "
                "PREFECT_API_AUTH_STRING (user:password), or PREFECT_API_KEY of Prefect Cloud"
            ) from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UserError(
            f"PREFECT_API_URL: no Prefect server answers at {without_password(address)} ({first_line(error)}); "
            "start it (`fer ui`, `prefect server start`), or unset the variable"
        ) from None


def introduce(tags: Iterable[str] = ()) -> None:
    """Tag the flow run under way, and note which process carries it out."""
    with get_client(sync_client=True) as client:
        known = client.read_flow_run(UUID(flow_run.id)).tags
        client.update_flow_run(UUID(flow_run.id), tags=sorted({*known, *tags}))
        client.update_flow_run_labels(UUID(flow_run.id), {HOST: socket.gethostname(), PROCESS: process_id(os.getpid())})


def close_abandoned() -> None:
    """Set flow runs of this host, and their tasks, CRASHED whose process was killed."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=FLOWS)),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=OPEN))),
        )
        for run in found:
            if run.labels.get(HOST) == socket.gethostname() and ended(str(run.labels.get(PROCESS, ""))):
                _close(client, run.id, Crashed(message="the process was killed; run the same command to resume"))


def cancel(run_id: str, reason: str) -> None:
    """Set a flow run and its tasks CANCELLED."""
    with get_client(sync_client=True) as client:
        _close(client, UUID(run_id), Cancelled(message=reason))


def _close(client: Any, run_id: UUID, state: State) -> None:
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=OPEN))),
    )
    for task in tasks:
        client.set_task_run_state(task.id, state, force=True)
    client.set_flow_run_state(run_id, state, force=True)


@contextmanager
def server_needed() -> Iterator[None]:
    """Raises UserError if Prefect's server is gone when a flow in the block ends."""
    try:
        yield
    except httpx.TransportError as error:
        raise UserError(
            f"Prefect's server no longer answers ({first_line(error)}); the runs are safe on disk: run the same "
            "command again"
        ) from None


class Progress:
    """A run on the page: a link to MLflow, a bar, and a line of the log for each epoch."""

    def __init__(self, run_id: str, epochs: int, link: str):
        self.run_id, self.epochs = run_id, epochs
        self.context = copy_context()  # rows come in another thread, which knows nothing of Prefect's server
        self.logger = get_run_logger()
        key = re.sub("[^a-z0-9]+", "-", run_id.lower())
        self.bar: Any = None
        with self._shown():
            create_link_artifact(link, link_text=f"{run_id} in MLflow", key=f"mlflow-{key}")
            self.bar = create_progress_artifact(0.0, key=f"progress-{key}", description=run_id)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> None:
        """Show new rows of metrics.jsonl."""
        self.context.run(self._show, rows)

    def _show(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self.logger.info(
                "%s: epoch %d of %d: train loss %.4f, val loss %.4f, val accuracy %.2f %%",
                self.run_id, row["epoch"], self.epochs, row["train_loss"], row["val_loss"], 100 * row["val_accuracy"],
            )  # fmt: skip
        if self.bar is not None:
            with self._shown():
                update_progress_artifact(self.bar, 100 * rows[-1]["epoch"] / self.epochs)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """The page is not worth a run."""
        try:
            yield
        except (httpx.HTTPError, PrefectException) as error:
            self.logger.warning("%s: no progress bar: %s", self.run_id, error)
