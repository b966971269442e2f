"""The machine resources of a run."""

from typing import Literal

from pydantic import model_validator

from fer.settings import Fault, Fraction, Natural, NonNegative, Positive, Section, Unfit


class Resources(Section):
    """The machine resources of a run. They are not part of its id: a run can be resumed on another machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    workers: Positive = 1
    """Processes that train the run together (DDP)."""
    cpus_per_worker: Positive = 1
    """CPU cores per worker."""
    gpus_per_worker: NonNegative = 1.0
    """GPUs per worker, if the device is a GPU; below 1, several runs share one."""
    accumulate: Positive = 1
    """Gradient accumulation: parts into which a worker splits its share of a batch, to save memory."""
    cuda_graphs: bool = True
    """Record a step's passes through the network once and replay them, on a GPU, if a step is one forward pass."""
    sync_batch_norm: bool = False
    """Batch-norm statistics over the images of all workers; GPUs only."""
    data_share: Fraction = 0.5
    """Share of the free GPU memory that a split's images may occupy; larger splits are streamed from disk."""
    readers: Natural = 2
    """Processes that prefetch the images of a streamed split, or on a CPU threads that decode encoded ones."""
    eval_batch_size: Positive = 256
    """Images per evaluation batch of a worker."""
    restarts: Natural = 2
    """How often a run is restarted from its last checkpoint after one of its processes died."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> "Resources":
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise Unfit([Fault("gpus_per_worker", f"above 1 must be a whole number, got {self.gpus_per_worker:g}")])
        if self.workers > 1 and self.device != "cpu" and self.gpus_per_worker % 1:
            several = f"several workers need a whole GPU each, got {self.gpus_per_worker:g}; set workers to 1"
            raise Unfit([Fault("gpus_per_worker", several)])
        return self
