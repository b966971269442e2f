"""The device of a run, its threads and memory, and the precision of its forward pass."""

import ctypes
import platform
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from fer.errors import UserError

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def pick_device(wanted: str, key: str = "resources.device") -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; a launched worker sees only its own GPU. Raises UserError at `key`."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}: cuda, but this machine has no usable GPU; set it to auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def use_cpu(threads: int) -> None:
    """Set up a process that trains on a CPU: its number of threads, and an allocator that keeps freed memory.

    By default the system would map and clear the memory of every large tensor again (benchmarks/RESULTS.md).
    """
    torch.set_num_threads(threads)
    _mallopt(_MMAP_MAX, 0)
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def use_gpu() -> None:
    """Set up a process that trains on a GPU: convolutions that give the same bits each time."""
    torch.backends.cudnn.deterministic = True


def share_heaps() -> None:
    """Let all threads of a process share two heaps, since a heap per thread never returns what it once held."""
    _mallopt(_ARENA_MAX, 2)


def _mallopt(parameter: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(parameter, value)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed torch's random numbers on the CPU and on `device`: those of torch.manual_seed at a hundredth of its cost."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def index_on(device: torch.device, index: np.ndarray) -> Tensor:
    """`index` as a tensor on `device`, through pinned memory: other copies would wait for all pending GPU work."""
    tensor = torch.from_numpy(index)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Context of a forward pass in `precision`: fp32, bf16 or fp16.

    On a CPU or GPU without instructions for bf16 that is fp32: torch would emulate it, several times slower on a CPU.
    """
    if precision == "fp32" or (precision == "bf16" and not computes_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def computes_bf16(device: torch.device) -> bool:
    """Whether a processor has instructions for bf16, so that it is no slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("bf16"))  # of x86 and of ARM
