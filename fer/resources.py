"""Where a run computes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fer.settings import Fault, Fraction, NonNegative, Positive, Section, Unfit


class Resources(Section):
    """Where a run computes. Not part of its identity: a run may move between machines and go on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    workers: Positive = 1
    """Processes that share the run (DDP)."""
    cpus_per_worker: Positive = 1
    """CPU cores of each of them."""
    gpus_per_worker: NonNegative = 1.0
    """GPUs of each of them, where the device is a GPU; below 1, runs share one."""
    accumulate: Positive = 1
    """Parts into which a worker cuts its share of a batch, where memory is short."""
    sync_batch_norm: bool = False
    """Batch norm over the images of all workers, on GPUs."""
    data_share: Fraction = 0.5
    """Share of the free GPU memory that a split's images may take; larger splits are read ahead."""
    readers: Annotated[int, Field(ge=0)] = 2
    """Processes that read ahead."""
    eval_batch_size: Positive = 256
    """Images that a worker evaluates at once."""
    restarts: Annotated[int, Field(ge=0)] = 2
    """How often a run is started again, from its last checkpoint, after one of its processes died."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> "Resources":
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise Unfit([Fault("gpus_per_worker", f"above 1 must be a whole number, got {self.gpus_per_worker:g}")])
        if self.workers > 1 and self.device != "cpu" and self.gpus_per_worker % 1:
            several = f"several workers need a whole GPU each, got {self.gpus_per_worker:g}; set workers to 1"
            raise Unfit([Fault("gpus_per_worker", several)])
        return self
