"""Where a run computes, and in which precision."""

import ctypes
import platform
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from fer.errors import UserError

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def pick_device(wanted: str, key: str = "resources.device") -> torch.device:
    """`auto`, `cpu` or `cuda` -> device; under a launcher the worker's own GPU is the only one it sees."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}: cuda, but this machine has no usable GPU; set it to auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def use_cpu(threads: int) -> None:
    """For a process that trains on a CPU: so many threads, and freed memory is kept for the next tensor.

    Else the system maps and clears the memory of every large tensor anew (figures in benchmarks/RESULTS.md).
    """
    torch.set_num_threads(threads)
    _mallopt(_MMAP_MAX, 0)
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def share_heaps() -> None:
    """For a process of many threads: two heaps for all, since one of each thread's own keeps what it once held."""
    _mallopt(_ARENA_MAX, 2)


def _mallopt(parameter: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(parameter, value)


def index_on(device: torch.device, index: np.ndarray) -> Tensor:
    """An index, there; from pinned memory, since other copies wait for all that a GPU still computes."""
    tensor = torch.from_numpy(index)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Mixed precision of a forward pass: fp32, bf16 or fp16."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
