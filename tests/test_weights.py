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
REMEDY = "name a file of this very model"
CODE = "which is code and never run"


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
    save_file(STATE, path)
    return path


def write_torch(path: Path, content: Any = STATE, new: bool = True) -> Path:
    torch.save(content, path := path.with_suffix(".pth"), _use_new_zipfile_serialization=new)
    return path


def write_pickle(path: Path, content: Any = ARRAYS, protocol: int = 2) -> Path:
    path = path.with_suffix(".pkl")
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "a.safetensors": write_safetensors,
    "a.pth": write_torch,
    "old.pth": lambda path: write_torch(path, new=False),
    "python2.pkl": lambda path: write_pickle(path, python2_pickle(ARRAYS)),
    "a.pkl": write_pickle,
    "4.pkl": lambda path: write_pickle(path, protocol=4),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_file_comes_back_exactly_and_a_damaged_one_not_at_all(name: str, tmp_path: Path) -> None:
    """Cut it is refused; with one to three other bytes it is read, or refused in one line."""
    path, rng, messages = WRITERS[name](tmp_path / name), random.Random(name), list[str]()
    assert equal(read_tensors(str(path), KEY), STATE)
    whole = path.read_bytes()
    if name == "python2.pkl":
        assert pickle.loads(whole, encoding="latin1").keys() == STATE.keys()  # it is one
    for length in (20, int(0.9 * len(whole)), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert refused(path) == NOT_WHOLE
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            read_tensors(path, KEY)
        except UserError as error:
            messages.append(str(error))
    assert all(message.startswith(f"{KEY}: {path}: ") and message.isprintable() for message in messages)


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


@pytest.mark.parametrize("write", [write_pickle, write_torch, lambda path, content: write_torch(path, content, False)])
def test_code_is_named_and_not_run(write: Callable, tmp_path: Path) -> None:
    trace, path = tmp_path / "was run", tmp_path / "weights"
    for content, name in (
        ({"weight": Evil(os.mkdir, str(trace))}, "posix.mkdir"),
        ({"model": network()}, "torch.nn.modules.container.Sequential"),
    ):
        assert refused(write(path, content)) == f"asks for {name}, {CODE}; {ALONE}"
        assert not trace.exists()


def test_only_what_arrays_need_may_be_asked_for(tmp_path: Path) -> None:
    for parts in (("numpy.core.multiarray", "scalar"), ("numpy.core", "multiarray._reconstruct")):
        by_line = "c{}\n{}\n.".format(*parts).encode()
        by_stack = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in parts) + b"\x93."
        for content in (by_line, by_stack):
            assert (
                refused(write_pickle(tmp_path / "weights", content)) == f"asks for {'.'.join(parts)}, {CODE}; {ALONE}"
            )


def test_a_crafted_dtype_reads_no_memory(tmp_path: Path) -> None:
    """Numpy's own unpickling takes these eight bytes for the address of an object, and crashes."""
    fields = b"}X\x01\x00\x00\x00acnumpy\ndtype\n(X\x01\x00\x00\x00OK\x00K\x01tRK\x00\x86s"
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8K\x00K\x01tR(K\x04X\x01\x00\x00\x00|N(X\x01\x00\x00\x00at" + fields
    dtype += b"K\x08K\x01K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tX\x01\x00\x00\x00btR(K\x01(K\x01t"
    content = b"\x80\x02}(X\x01\x00\x00\x00w" + array + dtype + b"\x89X\x08\x00\x00\x00AAAAAAAAtbu."
    assert refused(write_pickle(tmp_path / "weights", content)) == f"array 'w' does not hold numbers; {ALONE}"


def test_a_file_does_not_get_the_memory_that_it_claims(tmp_path: Path) -> None:
    """An object's place is said to be the 67 millionth, for which a gigabyte would be reserved."""
    tracemalloc.start()
    try:
        for claim in (b"r\xff\xff\xff\x03", b"p67108863\n"):
            assert refused(write_pickle(tmp_path / "weights", b"\x80\x05}" + claim + b".")) == NOT_WHOLE
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def test_layers_of_a_file_of_dlib_by_hand(tmp_path: Path) -> None:
    """Cut anywhere within a layer it is damaged."""
    numbers = np.arange(13, dtype="<f4")
    con = b"\1\5con_4" + b"\1\2\1\x0a\1\1\1\1\1\1" + numbers[:10].tobytes()  # version 2, 10 x 1 x 1 x 1
    con += b"\1\2" + b"\2\2\0\1\1"  # two filters of 2 x 1: what is left of 8 weights are two channels
    affine = b"\1\7affine_" + b"\1\2\1\4\1\1\1\1\1\1" + numbers[:4].tobytes()
    fc = b"\1\4fc_2" + b"\1\2\1\3" + b"\1\2\1\3\1\2\1\1\1\1" + numbers[:6].tobytes()  # from 3 to 2
    path = tmp_path / "net.dat"
    path.write_bytes(b"anything" + con + b"between" + affine + fc)
    found = {name: tensor.tolist() for name, tensor in read_tensors(path, KEY).items()}
    assert found == {
        "con0.weight": [[[[0], [1]], [[2], [3]]], [[[4], [5]], [[6], [7]]]], "con0.bias": [8, 9],
        "affine0.weight": [0, 1], "affine0.bias": [2, 3], "fc0.weight": [[0, 2, 4], [1, 3, 5]],
    }  # fmt: skip
    for length in range(len(con)):
        path.write_bytes(con[:length])
        assert not length or refused(path) == NOT_WHOLE, length


# Mistakes


HTML = "looks like an html page, not a weights file; fetch the file itself"
LFS = "is a Git LFS pointer, not a weights file; fetch the file itself"


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    assert refused(tmp_path / "weights.pth") == "not found; put the file there or name another"
    assert refused(tmp_path) == "cannot be read (Is a directory); name one that can be"
    for content, expected in {
        b"": "the file is empty; fetch it again", b"\n <html>not found</html>": HTML,
        b"version https://git-lfs.github.com/spec/v1\n": LFS, b"\0" * 64: NOT_WHOLE, b"epoch,loss\n1,0.5\n": NOT_WHOLE,
        b"\x80\x02\x95" + b"\xff" * 8 + b"N.": NOT_WHOLE,
    }.items():  # fmt: skip
        for suffix in (".pth", ".pkl", ".safetensors", ".dat"):
            path = tmp_path / f"weights{suffix}"
            path.write_bytes(content)
            assert refused(path) == expected


def test_values_that_are_no_named_tensors(tmp_path: Path) -> None:
    ones, path = np.ones((2, 3)), tmp_path / "weights"
    kinds = np.array([None, 1]), np.array(["a"]), np.array([b"a"]), np.array([1j]), np.zeros(1, "f4,i4")
    pickles: list[tuple[Any, str]] = [
        (ones, "holds no named tensors"), ({}, "holds no named tensors"),
        ({"weight": [1.0]}, "weight is of type list, not a tensor"),
        ({"a\nb": ones}, "'a\\nb' is not the name of a tensor"),
        *(({"w": array}, "array 'w' does not hold numbers") for array in kinds),
    ]  # fmt: skip
    for content, expected in pickles:
        assert refused(write_pickle(path, content)) == f"{expected}; {ALONE}"
    mixed = write_torch(path, {"epoch": 3, "weight": torch.ones(2)})
    assert refused(mixed) == f"epoch is of type int, not a tensor; {ALONE}"
    content = python2_pickle({"w": np.ones((2, 3), "f4")})  # whose bytes do not fill another shape:
    for side in (b"J\x04\x00\x00\x00", b"\x8a\x09\0\0\0\0\0\0\0\0\x01", b"N"):  # 4, 2 ** 64, None
        assert refused(write_pickle(path, content.replace(b"J\x03\x00\x00\x00", side))) == NOT_WHOLE


# Into a model


def misfit(tensors: dict[str, Tensor], model: nn.Module | None = None, optional: tuple[str, ...] = ()) -> str:
    model = model or network(seed=1)
    before = copy.deepcopy(model.state_dict())
    message = refusal(load_strictly, model, tensors, "weights.pth", optional)
    assert equal(before, model.state_dict())  # not half-loaded
    return message


def test_tensors_are_taken_if_all_of_them_fit() -> None:
    """The first that does not is named."""
    model = network(seed=1)
    model(torch.ones(2, 1, 3, 3))
    load_strictly(model, {name: tensor for name, tensor in STATE.items() if "num_batches" not in name}, "weights.pkl")
    assert equal(model.state_dict(), STATE | {"1.num_batches_tracked": torch.tensor(1)})  # a counter may be missing
    load_strictly(model, {name: tensor.double() for name, tensor in STATE.items()}, "weights.pth")
    assert equal(model.state_dict(), STATE)  # in the model's own types
    missing = {name: tensor for name, tensor in STATE.items() if name not in ("3.weight", "1.running_mean")}
    assert misfit(missing) == f"weights.pth: tensor 1.running_mean is missing; {REMEDY}"
    extra = STATE | {"4.weight": torch.ones(1), "2.weight": torch.ones(1)}
    assert misfit(extra) == f"weights.pth: tensor 2.weight is not in this model; {REMEDY}"
    for other in (STATE["3.weight"].T, STATE["3.weight"].reshape(1, 2, 3)):
        message = f"weights.pth: tensor 3.weight has shape {list(other.shape)}, the model needs [2, 3]; {REMEDY}"
        assert misfit(STATE | {"3.weight": other}) == message
    message = f"weights.pth: tensor 3.weight is int8, the model needs float32; {REMEDY}"
    assert misfit(STATE | {"3.weight": STATE["3.weight"].to(torch.int8)}) == message
    body = network(seed=1)[:3]  # a classifier that is not wanted is left out
    load_strictly(body, STATE, "weights.pth", ("3.", "aux."))
    assert equal(body.state_dict(), {name: tensor for name, tensor in STATE.items() if not name.startswith("3.")})
    assert "tensor 30.weight is not in this model" in misfit(STATE | {"30.weight": torch.ones(1)}, body, ("3.",))
