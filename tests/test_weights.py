"""Weights of others: every kind of file comes back exactly, no code in one is run, mistakes get one line."""

import copy
import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refusal
from safetensors.torch import save_file
from torch import Tensor, nn

from fer.errors import UserError
from fer.weights import load_strictly, read_tensors

KEY = "model.backbone.weights"
ALONE = "give a file of named tensors alone, such as a saved state_dict"
NOT_WHOLE = "not a whole weights file of its kind; fetch it again or name another"
CODE = "which is code and never run"
LFS_POINTER = "is a Git LFS pointer, not a weights file; fetch the file itself"


def network(width: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))


STATE = network().state_dict()
ARRAYS = {name: tensor.numpy() for name, tensor in STATE.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def refused(path: Path) -> str:
    """The message about a file, less the key and path that each begins with; one line."""
    start, message = f"{KEY}: {path}: ", refusal(read_tensors, path, KEY)
    assert message.startswith(start)
    assert message.isprintable()
    return message.removeprefix(start)


# Files as others write them


def python2_pickle(arrays: dict[str, np.ndarray]) -> bytes:
    """What cPickle of Python 2 writes with protocol 2: strings are bytes, numpy's module has its old name."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def array(value: np.ndarray) -> bytes:
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
        dtype = b"cnumpy\ndtype\n(" + text(value.dtype.str[1:].encode()) + b"K\x00K\x01tR"
        dtype += b"(K\x03" + text(value.dtype.str[:1].encode()) + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
        shape = b"(" + b"".join(map(number, value.shape)) + b"t"
        return empty + b"(K\x01" + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(text(name.encode()) + array(arrays[name]) for name in arrays) + b"u."


def write_safetensors(path: Path) -> Path:
    save_file(STATE, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_torch(path: Path, content: Any = STATE, **options: Any) -> Path:
    torch.save(content, path.with_suffix(".pth"), **options)
    return path.with_suffix(".pth")


def write_pickle(path: Path, content: Any = ARRAYS, protocol: int = 2) -> Path:
    path = path.with_suffix(".pkl")
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": write_safetensors,
    "torch": write_torch,
    "old torch": lambda path: write_torch(path, _use_new_zipfile_serialization=False),
    "python 2 pickle": lambda path: write_pickle(path, python2_pickle(ARRAYS)),
    "pickle 2": write_pickle,
    "pickle 4": lambda path: write_pickle(path, protocol=4),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_comes_back_exactly_and_a_cut_one_not_at_all(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path / "weights")
    assert equal(read_tensors(str(path), KEY), STATE)
    whole = path.read_bytes()
    if kind == "python 2 pickle":
        assert pickle.loads(whole, encoding="latin1").keys() == STATE.keys()  # it is one
    for length in (20, int(0.9 * len(whole)), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert refused(path) == NOT_WHOLE


def test_tensors_under_a_key_and_a_prefix_are_found(tmp_path: Path) -> None:
    parallel = {f"module.{name}": tensor for name, tensor in STATE.items()}
    for content in ({"epoch": 3, "state_dict": STATE}, {"model": parallel, "optimizer": {"lr": [0.1]}}, parallel):
        assert equal(read_tensors(write_torch(tmp_path / "weights", content), KEY), STATE)


NUMBERS = {
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "big-endian": np.arange(6, dtype=">f4").reshape(3, 2),
    "half": np.arange(6, dtype="f2"), "bytes": np.arange(-3, 3, dtype="i1"), "short": np.array(300, dtype="u2"),
    "long": np.array([2**40, -1]), "truth": np.array([True, False]), "scalar": np.array(1.5),
}  # fmt: skip


def test_layouts_and_numbers_of_pickled_arrays(tmp_path: Path) -> None:
    tensors = read_tensors(write_pickle(tmp_path / "weights", NUMBERS), KEY)
    for name, array in NUMBERS.items():
        expected = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        assert tensors[name].dtype == expected.dtype, name
        assert tensors[name].tolist() == expected.tolist(), name


# Code


class Evil:
    """Pickled, it calls where it is loaded without care."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
def test_code_is_named_and_not_run(kind: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "was run", tmp_path / "weights"
    for content, name in (
        ({"weight": Evil(os.mkdir, str(trace))}, "posix.mkdir"),
        ({"model": network()}, "torch.nn.modules.container.Sequential"),
    ):
        if kind == "pickle":
            path = write_pickle(path, content)
        else:
            path = write_torch(path, content, _use_new_zipfile_serialization=kind == "torch")
        assert refused(path) == f"asks for {name}, {CODE}; {ALONE}"
        assert not trace.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("numpy.core.multiarray", "scalar"), ("numpy.core", "multiarray._reconstruct")],
)
def test_only_what_arrays_need_may_be_asked_for(module: str, name: str, tmp_path: Path) -> None:
    by_line = f"c{module}\n{name}\n.".encode()
    parts = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    for content in (by_line, b"\x80\x04" + parts + b"\x93."):
        assert refused(write_pickle(tmp_path / "weights", content)) == f"asks for {module}.{name}, {CODE}; {ALONE}"


def test_a_crafted_dtype_reads_no_memory(tmp_path: Path) -> None:
    """Numpy's own unpickling takes these eight bytes for the address of an object, and crashes."""
    fields = b"}X\x01\x00\x00\x00acnumpy\ndtype\n(X\x01\x00\x00\x00OK\x00K\x01tRK\x00\x86s"
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8K\x00K\x01tR(K\x04X\x01\x00\x00\x00|N(X\x01\x00\x00\x00at" + fields
    dtype += b"K\x08K\x01K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tX\x01\x00\x00\x00btR(K\x01(K\x01t"
    content = b"\x80\x02}(X\x01\x00\x00\x00w" + array + dtype + b"\x89X\x08\x00\x00\x00AAAAAAAAtbu."
    assert refused(write_pickle(tmp_path / "weights", content)) == f"array 'w' does not hold numbers; {ALONE}"


@pytest.mark.parametrize("claim", [b"r\xff\xff\xff\x03", b"p67108863\n"])
def test_a_file_does_not_get_the_memory_that_it_claims(claim: bytes, tmp_path: Path) -> None:
    """An object's place is said to be the 67 millionth, for which a gigabyte would be reserved."""
    path = write_pickle(tmp_path / "weights", b"\x80\x05}" + claim + b".")
    tracemalloc.start()
    try:
        assert refused(path) == NOT_WHOLE
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


# Mistakes


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "weights.pth") == "not found; put the file there or name another"
    assert refused(tmp_path) == "cannot be read (Is a directory); name one that can be"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty; fetch it again"),
        (b"\n <html>not found</html>", "looks like an html page, not a weights file; fetch the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, not a weights file; fetch the file itself",
        ),
        (b"\0" * 64, NOT_WHOLE),
        (b"\x80\x02\x95" + b"\xff" * 8 + b"N.", NOT_WHOLE),
        (b"epoch,loss\n1,0.5\n", NOT_WHOLE),
    ],
)
def test_files_that_hold_no_weights(content: bytes, expected: str, tmp_path: Path) -> None:
    for suffix in (".pth", ".pkl", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        assert refused(path) == expected


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_is_the_files_fault_or_none(kind: str, tmp_path: Path) -> None:
    """One to three bytes are changed: the file is read, or refused in one line; nothing else is raised."""
    path, rng = WRITERS[kind](tmp_path / "weights"), random.Random(kind)
    whole, messages = path.read_bytes(), set[str]()
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            read_tensors(path, KEY)
        except UserError as error:
            messages.add(str(error))
    assert all(message.startswith(f"{KEY}: {path}: ") and message.isprintable() for message in messages)


def test_values_that_are_no_named_tensors(tmp_path: Path) -> None:
    ones = np.ones((2, 3))
    kinds = np.array([None, 1]), np.array(["a"]), np.array([b"a"]), np.array([1j]), np.zeros(1, "f4,i4")
    pickles: list[tuple[Any, str]] = [
        (ones, "holds no named tensors"),
        ({}, "holds no named tensors"),
        ({"weight": [1.0]}, "weight is of type list, not a tensor"),
        ({"a\nb": ones}, "'a\\nb' is not the name of a tensor"),
        *(({"w": array}, "array 'w' does not hold numbers") for array in kinds),
    ]
    for content, expected in pickles:
        assert refused(write_pickle(tmp_path / "weights", content)) == f"{expected}; {ALONE}"
    path = write_torch(tmp_path / "weights", {"epoch": 3, "weight": torch.ones(2)})
    assert refused(path) == f"epoch is of type int, not a tensor; {ALONE}"


def test_arrays_whose_bytes_do_not_fill_their_shape(tmp_path: Path) -> None:
    content = python2_pickle({"w": np.ones((2, 3), "f4")})
    three = b"J\x03\x00\x00\x00"
    assert content.count(three) == 1
    for side in (b"J\x04\x00\x00\x00", b"\x8a\x09\0\0\0\0\0\0\0\0\x01", b"N"):  # 4, 2 ** 64, None
        assert refused(write_pickle(tmp_path / "weights", content.replace(three, side))) == NOT_WHOLE


# Into a model


def misfit(tensors: dict[str, Tensor], model: nn.Module | None = None, optional: tuple[str, ...] = ()) -> str:
    model = model or network(seed=1)
    before = copy.deepcopy(model.state_dict())
    message = refusal(load_strictly, model, tensors, "weights.pth", optional)
    assert equal(before, model.state_dict())  # not half-loaded
    return message


def test_the_first_tensor_that_does_not_fit_is_named() -> None:
    missing = {name: tensor for name, tensor in STATE.items() if name not in ("3.weight", "1.running_mean")}
    assert misfit(missing) == "weights.pth: tensor 1.running_mean is missing; the file belongs to another model"
    extra = STATE | {"4.weight": torch.ones(1), "2.weight": torch.ones(1)}
    assert misfit(extra) == "weights.pth: tensor 2.weight is not in this model; the file belongs to another one"
    for other in (STATE["3.weight"].T, STATE["3.weight"].reshape(1, 2, 3)):
        assert misfit(STATE | {"3.weight": other}) == (
            f"weights.pth: tensor 3.weight has shape {list(other.shape)}, the model needs [2, 3]"
        )


def test_counters_that_the_file_lacks_stay() -> None:
    model = network(seed=1)
    model(torch.ones(2, 1, 3, 3))
    load_strictly(model, {name: tensor for name, tensor in STATE.items() if "num_batches" not in name}, "weights.pkl")
    assert equal(model.state_dict(), STATE | {"1.num_batches_tracked": torch.tensor(1)})
    load_strictly(model, {name: tensor.double() for name, tensor in STATE.items()}, "weights.pth")
    assert equal(model.state_dict(), STATE)  # in the model's own types


def test_a_classifier_that_is_not_wanted_is_left_out() -> None:
    body = network(seed=1)[:3]
    load_strictly(body, STATE, "weights.pth", ("3.", "aux."))
    assert equal(body.state_dict(), {name: tensor for name, tensor in STATE.items() if not name.startswith("3.")})
    assert "tensor 30.weight is not in this model" in misfit(STATE | {"30.weight": torch.ones(1)}, body, ("3.",))
