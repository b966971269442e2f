"""Tensors from files made by others: safetensors, torch files, pickles of numpy arrays; no code in them is run."""

import io
import pickle
import pickletools
import re
import struct
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

# what the readers raise on bytes that are no whole file of their kind
DAMAGE = (
    SafetensorError, pickle.UnpicklingError, struct.error, EOFError, OverflowError, AssertionError, AttributeError,
    LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
# what transformers' from_pretrained raises for a hub id or folder that it cannot load
HUB_ERRORS = (OSError, ValueError, SafetensorError, StrictDataclassError)
LOOKALIKES = {b"<": "looks like an html page", b"version https://git-lfs": "is a Git LFS pointer"}
ALONE = "give a file of named tensors alone, such as a saved state_dict"


def read_tensors(path: str | Path, key: str) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors`, a `.pkl` (numpy arrays) or, by any other suffix, a `torch.save` file.

    Of a torch file what stands under `state_dict`, `model` or `netG` is taken; `module.` is cut off where all have it.
    Raises UserError, beginning with the configuration's `key`, for a file that is missing, damaged, holds something
    else than tensors, or asks for code: that is refused by name and never run.
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
    """A file that is whole, with what shall not be in it."""


def _code(name: str) -> _Refused:
    name = re.sub(r"[^\w.]", "?", name)  # the file's own words: kept to one line
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
    # unpickling reserves the memory that a file claims, be it 20 GB; this walk fails on texts that are not there
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise ValueError(f"place {argument} in a file of {len(data)} bytes")
    content = _Unpickler(io.BytesIO(data), encoding="latin1").load()  # latin1: bytes of Python 2, one character each
    if not isinstance(content, dict):
        return content
    return {name: value.tensor(repr(name)) if isinstance(value, _Array) else value for name, value in content.items()}


READERS: dict[str, Callable[[Path], Any]] = {".safetensors": load_file, ".pkl": _from_pickle}


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


class _Array:
    """Stands in for numpy.ndarray, whose own `__setstate__` reads any address that a crafted dtype bids it read."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def tensor(self, name: str) -> Tensor:
        """Raises _Refused for other things than numbers, ValueError for bytes that do not fill the shape."""
        kind = self.dtype.order + self.dtype.code
        if not re.fullmatch(r"[<>|=]([fiu][1248]|b1)", kind):
            raise _Refused(f"array {name} does not hold numbers")
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        flat = np.frombuffer(data, np.dtype(kind))
        array = flat.reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, by which Python 3 writes bytes for Python 2."""
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
    """The fault in a loading report of from_pretrained, which would go on with random numbers; None without any."""
    shapes = {
        name: f"{list(found)}, the network needs {list(wanted)}" for name, found, wanted in report["mismatched_keys"]
    }
    bad = sorted({*report["missing_keys"], *shapes})
    if not bad:
        return None
    what = f"has shape {shapes[bad[0]]}" if bad[0] in shapes else "is missing"
    return f"tensor {bad[0]} {what} ({len(bad)} tensors in all)"


def check_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], source: str) -> None:
    """Raises UserError, beginning with `source`, on the first tensor that is missing, unknown or of another shape."""
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{source}: tensor {name} is missing; the file belongs to another model")
        if name not in wanted:
            raise UserError(f"{source}: tensor {name} is not in this model; the file belongs to another one")
        if wanted[name].shape != found[name].shape:
            shapes = f"{list(found[name].shape)}, the model needs {list(wanted[name].shape)}"
            raise UserError(f"{source}: tensor {name} has shape {shapes}")


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], source: str, optional: tuple[str, ...] = ()) -> None:
    """Load `tensors` into `model`, all or nothing. Raises UserError as `check_fit` does.

    Names that begin with one of `optional` are left out: parts of the file, such as "fc.", that the model does not
    have. A file without batch norm's counters, born in another framework, leaves the model's own.
    """
    wanted = model.state_dict()
    counters = {name: tensor for name, tensor in wanted.items() if name.endswith("num_batches_tracked")}
    found = counters | {name: tensor for name, tensor in tensors.items() if not name.startswith(optional)}
    check_fit(wanted, found, source)
    model.load_state_dict(found)
