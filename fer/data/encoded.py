"""Images kept as the pictures that they came as, and decoded when they are asked for: for sets too large as an array.

`images.npy` is then an index with a row of ROW for each image: where its bytes lie in the shards raw/images-00000.bin
and so on, and what is made of them. Shards are filled in the order of the rows, so that pictures that are added at the
end change no other than the last one.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fer.data.decode import UNREADABLE, Box, decoded
from fer.errors import UserError
from fer.super_resolution.interpolation import KERNELS, resize_one

SHARD = 2**30  # bytes of a shard at most, if it holds more than one picture
ROW = np.dtype([
    ("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("sha256", "u1", (32,)),  # the bytes
    ("box", "<i4", (4,)),  # left, top, right, bottom; zeros: none
    ("shape", "<u2", (3,)),  # height, width, and 3 in colour or 0 in grey, to which the part is decoded
    ("method", "S8"), ("scale", "u1"),  # by which it is then enlarged: none, or one of KERNELS
])  # fmt: skip
AGAIN = "run `dvc checkout` or, to make it again, `dvc repro --force --single-item download`"


class Encoded:
    """Images of an index, which read like an array: uint8 [N, H, W] or [N, H, W, 3].

    Safe to use in several threads, and after a fork.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, index: np.ndarray, remedy: str):
        """Raises UserError, with `remedy`, for an index of no images of one size, and for shards that do not fit it."""
        self.filename, self.index = str(path), index.view(np.ndarray)  # as a memory map each access takes longer
        made = index[["shape", "method", "scale"]]
        known = (b"none", *(name.encode() for name in KERNELS))
        if not len(index) or (made != made[0]).any() or made["method"][0] not in known:
            raise UserError(f"{path}: not an index of images of one size; {remedy}")
        height, width, channels = made["shape"][0].tolist()
        self.method, self.scale = made["method"][0].decode(), int(made["scale"][0])
        self.decoded = (height, width, 3) if channels else (height, width)
        self.shape = (len(index), height * self.scale, width * self.scale, *self.decoded[2:])
        if channels not in (0, 3) or 0 in self.shape:
            raise UserError(f"{path}: not an index of images of one size; {remedy}")
        self.shards = _shards(path, index)

    @property
    def ndim(self) -> int:
        """3, or 4 in colour."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The images of one row, a slice, or any rows, as of an array. Raises UserError for damaged ones."""
        chosen = np.arange(len(self))[rows]
        return self.read(chosen, os.cpu_count()) if chosen.ndim else self.read(chosen[None], 1)[0]

    def read(self, rows: np.ndarray, threads: int | None = 1) -> np.ndarray:
        """The images of these rows, decoded in several threads. Raises UserError for damaged ones."""
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)

        def fill(place: int) -> None:
            images[place] = self._image(int(rows[place]))

        if threads == 1 or len(rows) < 2:
            for place in range(len(rows)):
                fill(place)
        else:
            with ThreadPoolExecutor(threads) as pool:  # Pillow releases the interpreter lock while it decodes
                list(pool.map(fill, range(len(rows))))
        return images

    def content(self, row: int) -> bytes:
        """The picture of a row, as it was delivered. Raises UserError if it has changed."""
        one = self.index[row]
        shard = self.shards[int(one["shard"])]
        with open(shard, "rb", 0) as file:
            content = os.pread(file.fileno(), int(one["length"]), int(one["offset"]))
        if hashlib.sha256(content).digest() != one["sha256"].tobytes():
            raise UserError(f"{shard}: the picture of row {row} is damaged; {AGAIN}")
        return content

    def enlarged(self, method: str, scale: int) -> np.ndarray:
        """The index of the same images, enlarged when they are read."""
        index = np.array(self.index)
        index["method"], index["scale"] = method.encode(), scale
        return index

    def _image(self, row: int) -> np.ndarray:
        left, top, right, bottom = self.index["box"][row].tolist()
        try:
            image = decoded(self.content(row), (left, top, right, bottom) if right else None, self.decoded)
        except UNREADABLE as error:
            shard, remedy = self.shards[int(self.index["shard"][row])], "install the Pillow of constraints.txt"
            raise UserError(f"{shard}: the picture of row {row} cannot be decoded ({error}): {remedy}") from None
        if self.method == "none":
            return image
        return resize_one(image, self.shape[1], self.shape[2], KERNELS[self.method])


class Shards:
    """The shards and the index of a data set, which a `with` block fills; the index is written when it ends.

    `shape`: that of the array of all images; `boxes`: of the face in each picture, if it has one.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], boxes: Sequence[Box | None]):
        height, width, *colour = shape[1:]
        self.folder, self.files = folder, ExitStack()
        self.index = np.zeros(len(boxes), ROW)
        self.index["shape"] = height, width, *(colour or [0])
        self.index["method"], self.index["scale"] = b"none", 1
        self.index["box"] = [box or (0, 0, 0, 0) for box in boxes]
        self.row, self.shard, self.offset = 0, -1, 0

    def add(self, content: bytes) -> None:
        """Take the file of the next picture."""
        if self.shard < 0 or self.offset + len(content) > SHARD:
            self.files.close()
            self.shard, self.offset = self.shard + 1, 0
            self.file = self.files.enter_context(open(self.folder / _name(self.shard), "wb"))  # noqa: SIM115
        self.file.write(content)
        one = self.index[self.row]
        one["shard"], one["offset"], one["length"] = self.shard, self.offset, len(content)
        one["sha256"] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
        self.row, self.offset = self.row + 1, self.offset + len(content)

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.files.close()
        if kind is None:
            np.save(self.folder / "images.npy", self.index)


def _name(shard: int) -> str:
    return f"images-{shard:05}.bin"


def _shards(path: Path, index: np.ndarray) -> dict[int, Path]:
    """The shards, in raw/ of the data set. Raises UserError for one that is missing or of another length."""
    numbers, ends = index["shard"], index["offset"] + index["length"]
    found = {}
    for shard in np.unique(numbers).tolist():
        found[shard] = file = path.parent.parent / "raw" / _name(shard)
        wanted = int(ends[numbers == shard].max())
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise UserError(
                f"{file}: not found; run `dvc repro download` to make it or `dvc pull` to fetch it"
            ) from None
        if size != wanted:
            raise UserError(f"{file}: has {size:,} bytes, not {wanted:,} as {path} says; {AGAIN}")
    return found
