"""Reads tensors from third-party files: safetensors, torch and dlib files, pickled arrays. Never runs their code."""

import io
import math
import pickle
import pickletools
import re
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fer.errors import UserError

# what the readers raise on truncated or damaged files
DAMAGE = (
    SafetensorError, pickle.UnpicklingError, struct.error, EOFError, OverflowError, AssertionError, AttributeError,
    LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
# what transformers' from_pretrained raises if it cannot load a hub id or folder
HUB_ERRORS = (OSError, ValueError, SafetensorError, StrictDataclassError)
LOOKALIKES = {b"<": "looks like an html page", b"version https://git-lfs": "is a Git LFS pointer"}
ALONE = "give a file of named tensors alone, such as a saved state_dict"


def read_tensors(path: str | Path, key: str) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors`, a `.pkl` (numpy arrays), a `.dat` (dlib) or, else, a `torch.save` file.

    From a torch file the value of `state_dict`, `model` or `netG` is taken, if there is one, and a prefix `module.` is
    removed if all names have it. Raises UserError, beginning with the setting's `key`, for a file that is missing or
    damaged, holds anything but tensors, or references code, which is named and never run.
    """
    path, where = Path(path), f"{key}: {path}"
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except FileNotFoundError:
        raise UserError(f"{where}: not found; put the file there or name another") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); name one that can be") from None
    if not head:
        raise UserError(f"{where}: the file is empty; fetch it again")
    try:
        content = READERS.get(path.suffix.lower(), _from_torch)(path)
    except _Refused as refused:
        raise UserError(f"{where}: {refused}; {ALONE}") from None
    except DAMAGE:
        for start, what in LOOKALIKES.items():
            if head.lstrip().startswith(start):
                raise UserError(f"{where}: {what}, not a weights file; fetch the file itself") from None
        raise UserError(f"{where}: not a whole weights file of its kind; fetch it again or name another") from None
    return _named_tensors(content, where)


def _named_tensors(content: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where}: holds no named tensors; {ALONE}")
    for name, value in content.items():
        if not isinstance(name, str) or not name.isprintable():
            raise UserError(f"{where}: {name!r} is not the name of a tensor; {ALONE}")
        if not isinstance(value, Tensor):
            raise UserError(f"{where}: {name} is of type {type(value).__name__}, not a tensor; {ALONE}")
    return dict(content)


class _Refused(Exception):
    """An intact file with content that is not allowed."""


def _code(name: str) -> _Refused:
    name = re.sub(r"[^\w.]", "?", name)  # text from the file: kept to one line
    return _Refused(f"asks for {name}, which is code and never run")


def _from_torch(path: Path) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise _code(asked[1]) from None
        raise
    if not isinstance(content, dict):
        return content
    for key in ("state_dict", "model", "netG"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    if all(isinstance(name, str) and name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _from_pickle(path: Path) -> Any:
    data = path.read_bytes()
    # unpickling reserves whatever memory a file claims, even 20 GB; this walk fails where the content is missing
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise ValueError(f"place {argument} in a file of {len(data)} bytes")
    content = _Unpickler(io.BytesIO(data), encoding="latin1").load()  # maps the bytes of Python 2 to one character each
    if not isinstance(content, dict):
        return content
    return {name: value.tensor(repr(name)) if isinstance(value, _Array) else value for name, value in content.items()}


def _from_dlib(path: Path) -> dict[str, Tensor]:
    """The layers of a network that dlib wrote, counted in their order: con0.weight [O, I, h, w], con0.bias, fc0.weight.

    Integers have a byte that holds their length, and tensors are a version, four sides and as many floats
    (dlib/serialize.h, dlib/dnn/layers.h and dlib/cuda/tensor.h).
    """
    data, counts = path.read_bytes(), Counter[str]()
    found: dict[str, np.ndarray] = {}
    for mark in re.finditer(rb"\x01[\x04-\x07](con|affine|fc)_\d?", data):
        file, kind = io.BytesIO(data), mark[1].decode()
        file.seek(mark.end())
        name = f"{kind}{counts[kind]}"
        counts[kind] += 1
        outputs = _dlib_integers(file, 2)[0] if kind == "fc" else 0
        flat = _dlib_tensor(file)
        if kind == "con":
            outputs, height, width = _dlib_integers(file, 3)
            found[f"{name}.weight"] = flat[:-outputs].reshape(outputs, -1, height, width)
            found[f"{name}.bias"] = flat[-outputs:]
        elif kind == "affine":
            found[f"{name}.weight"], found[f"{name}.bias"] = flat.reshape(2, -1)
        else:
            found[f"{name}.weight"] = flat.reshape(-1, outputs).T
    if not found:
        raise ValueError("no layer with weights")
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in found.items()}


def _dlib_integers(file: io.BytesIO, count: int) -> list[int]:
    return [int.from_bytes(file.read(file.read(1)[0] & 15), "little") for _ in range(count)]


def _dlib_tensor(file: io.BytesIO) -> np.ndarray:
    _, *sides = _dlib_integers(file, 5)
    size = math.prod(sides)
    return np.frombuffer(file.read(4 * size), "<f4", size)


READERS: dict[str, Callable[[Path], Any]] = {".safetensors": load_file, ".pkl": _from_pickle, ".dat": _from_dlib}


class _Dtype:
    """Replaces numpy.dtype."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


class _Array:
    """Replaces numpy.ndarray, whose `__setstate__` reads arbitrary memory if the dtype is crafted."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def tensor(self, name: str) -> Tensor:
        """Raises _Refused for anything but numbers, and ValueError if the bytes do not fill the shape."""
        kind = self.dtype.order + self.dtype.code
        if not re.fullmatch(r"[<>|=]([fiu][1248]|b1)", kind):
            raise _Refused(f"array {name} does not hold numbers")
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        flat = np.frombuffer(data, np.dtype(kind))
        array = flat.reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _encode(text: str, encoding: str) -> bytes:
    """Replaces _codecs.encode, with which Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise ValueError(f"encoding {encoding}")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # numpy 2
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _code(f"{module}.{name}")
        return ALLOWED[module, name]


def misfit(report: dict[str, Any]) -> str | None:
    """The first misfit in a report of from_pretrained, which would keep random weights there; None if all fits."""
    shapes = {
        name: f"{list(found)}, the network needs {list(wanted)}" for name, found, wanted in report["mismatched_keys"]
    }
    bad = sorted({*report["missing_keys"], *shapes})
    if not bad:
        return None
    what = f"has shape {shapes[bad[0]]}" if bad[0] in shapes else "is missing"
    return f"tensor {bad[0]} {what} ({len(bad)} tensors in all)"


def check_fit(
    wanted: dict[str, Tensor], found: dict[str, Tensor], source: str, remedy: str = "name a file of this very model"
) -> None:
    """Raises UserError, `source` first and `remedy` last, for a tensor that is missing, unknown or of another shape."""
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{source}: tensor {name} is missing; {remedy}")
        if name not in wanted:
            raise UserError(f"{source}: tensor {name} is not in this model; {remedy}")
        if wanted[name].shape != found[name].shape:
            shapes = f"{list(found[name].shape)}, the model needs {list(wanted[name].shape)}"
            raise UserError(f"{source}: tensor {name} has shape {shapes}; {remedy}")
        if wanted[name].is_floating_point() and not found[name].is_floating_point():  # such as quantised ones
            kinds = f"{found[name].dtype}, the model needs {wanted[name].dtype}".replace("torch.", "")
            raise UserError(f"{source}: tensor {name} is {kinds}; {remedy}")


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], source: str, optional: tuple[str, ...] = ()) -> None:
    """Load `tensors` into `model`, all or nothing. Raises UserError as `check_fit` does.

    Tensors whose names begin with one of `optional`, such as "fc.", are ignored. Batch norm's counters may be missing,
    as in files from other frameworks; the model then keeps its own.
    """
    wanted = model.state_dict()
    counters = {name: tensor for name, tensor in wanted.items() if name.endswith("num_batches_tracked")}
    found = counters | {name: tensor for name, tensor in tensors.items() if not name.startswith(optional)}
    check_fit(wanted, found, source)
    model.load_state_dict(found)
