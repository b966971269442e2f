"""The splits: all images are in one file, or encoded; a split holds row numbers, labels and targets.

`open_data` verifies that the images are those that the splits were made from. Three short hashes identify the data: of
what training reads, of test, and of the marks of leaked images.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator

from fer.data.images import Images, open_images
from fer.data.split import SPLITS
from fer.errors import UserError, first_line
from fer.files import sha256
from fer.settings import Fault, Fraction, Positive, Unfit
from fer.stored import Count, Stored, read

AGAIN = "make it again with `dvc repro --force --single-item split`"
VERIFIED = "images.verified.json"


class Made(Stored):
    """splits/summary.json: what the splits were made of."""

    classes: Annotated[list[str], Field(min_length=2)]
    class_prior: list[list[Fraction]] | None  # None: of hard labels
    images: Count
    image_shape: Annotated[list[Positive], Field(min_length=2, max_length=3)]
    images_sha256: str
    dataset: str
    label_mode: str
    totals: dict[str, Count]
    counts: dict[str, dict[str, Count]]
    duplicates: dict[str, Any]
    super_resolution: dict[str, Any] = {}
    held_out: dict[str, str] = {}
    seed: Count = 0
    near_duplicates: Fraction | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Made":
        names = set(self.classes)
        if len(names) < len(self.classes):
            raise Unfit([Fault("classes", "two have the same name")])
        prior = self.class_prior
        if prior is not None and {len(prior), *map(len, prior)} != {len(names)}:
            raise Unfit([Fault("class_prior", f"is not of {len(names)} x {len(names)} classes")])
        if set(SPLITS) - self.totals.keys() or set(SPLITS) - self.counts.keys():
            raise Unfit([Fault("totals", f"and counts should be those of {', '.join(SPLITS)}")])
        return self


@dataclass(frozen=True)
class Split:
    """The n images of one split, as rows of `images`, the array of the whole data set."""

    name: str
    images: Images  # uint8 [N, H, W] or [N, H, W, 3], memory-mapped or encoded
    rows: np.ndarray  # int64 [n], indexes `images`
    names: list[str]
    subjects: list[str]  # "" where the subject is unknown
    labels: torch.Tensor  # int64 [n]
    targets: torch.Tensor  # float32 [n, C], rows sum to 1
    in_train: torch.Tensor  # bool [n]: train holds an image with the same pixels; False for train itself
    in_val: torch.Tensor  # bool [n]: val does, and train does not; False for train and val
    near: torch.Tensor  # bool [n]: neither does, but one of them holds a near duplicate; False for train

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def leaked(self) -> torch.Tensor:
        """bool [n]: the same pixels or a near duplicate were seen in training or when the best epoch was selected."""
        return self.in_train | self.in_val | self.near

    def pixels(self, index: np.ndarray) -> torch.Tensor:
        """The images at positions `index` of this split: uint8 [B, H, W] or [B, H, W, 3]."""
        return torch.from_numpy(self.images[self.rows[index]])


@dataclass(frozen=True)
class DataSet:
    """The output of `dvc repro`, as training needs it. Each split is read once and cached."""

    folder: Path
    images: Images
    summary: dict[str, Any]  # of the split stage
    splits: dict[str, Split] = field(default_factory=dict, repr=False, compare=False)  # those that are made or read

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the labels."""
        return self.summary["classes"]

    @cached_property
    def hash(self) -> str:
        """16 hex digits of all that training reads: images, train, val, classes and class prior.

        File formats, names and leak marks of images do not count, nor does anything about test.
        """
        digest = hashlib.sha256()
        feed(digest, "images", [self.summary["images_sha256"]])
        for name in ("train", "val"):
            _feed_split(digest, self.split(name))
        feed(digest, "classes", self.classes)
        feed(digest, "class_prior", self.prior().numpy())
        return digest.hexdigest()[:16]

    @cached_property
    def test_hash(self) -> str:
        """16 hex digits of the rows, labels, targets and subjects of test."""
        digest = hashlib.sha256()
        _feed_split(digest, self.split("test"))
        return digest.hexdigest()[:16]

    @cached_property
    def leak_hash(self) -> str:
        """16 hex digits of which test images are also in train, in val, or have a near duplicate there."""
        digest, test = hashlib.sha256(), self.split("test")
        feed(digest, "in_train", test.in_train.numpy())
        feed(digest, "in_val", test.in_val.numpy())
        feed(digest, "near", test.near.numpy())
        return digest.hexdigest()[:16]

    def prior(self, needed: bool = False) -> torch.Tensor:
        """Class prior, float32 [C, C], row = label (see `labels.class_prior`); the identity if the data have none.

        Raises UserError in that case if it is `needed`.
        """
        if self.summary["class_prior"] is None:
            if needed:
                raise UserError(
                    "loss.name: this loss needs the class prior, which hard labels do not give: name a file with it in "
                    "data.confusion of the data set's file in datasets/ (`fer train EXPERIMENT data=NAME --folds 10` "
                    "makes one, data/folds/*/confusion.csv), or choose another loss"
                )
            return torch.eye(len(self.classes))
        return torch.tensor(self.summary["class_prior"], dtype=torch.float32)

    def split(self, name: str) -> Split:
        """Train, val or test. Raises UserError if its table is missing or does not fit the images and classes."""
        if name not in self.splits:
            self.splits[name] = self._read(name)
        return self.splits[name]

    def _read(self, name: str) -> Split:
        path = self.folder / "splits" / f"{name}.csv"
        text = {"name": str, "subject": str, "duplicate_in": str, "duplicate_kind": str}
        columns = ["row", "label", *self.classes, *text]
        try:
            table = pd.read_csv(path, usecols=columns, dtype=text, keep_default_na=False)
        except FileNotFoundError:
            raise _not_found(path) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {first_line(error)}; {AGAIN}") from None
        whole = self.summary["totals"][name]
        if len(table) != whole:  # as of a file that was cut off
            raise UserError(f"{path}: holds {len(table)} images, not {whole} as summary.json says; {AGAIN}")
        if table.empty:
            raise UserError(f"{path}: holds no image; {AGAIN}")
        fault = self._fault(table)
        if fault:
            raise UserError(f"{path}: {fault}; {AGAIN}")
        found_in = table["duplicate_in"].to_numpy(str) if name != "train" else np.full(len(table), "")
        near = (found_in != "") & table["duplicate_kind"].isin(["near", "mirrored"]).to_numpy()
        return Split(
            name=name,
            images=self.images,
            rows=table["row"].to_numpy(np.int64),
            names=table["name"].tolist(),
            subjects=table["subject"].tolist(),
            labels=torch.tensor(table["label"].to_numpy(np.int64)),
            targets=torch.tensor(table[self.classes].to_numpy(np.float32)),
            in_train=torch.tensor((found_in == "train") & ~near),
            in_val=torch.tensor((found_in == "val") & ~near),
            near=torch.tensor(near),
        )

    def _fault(self, table: pd.DataFrame) -> str:
        """Why this is no table of a split; "" if it is one."""
        ends = {"row": (len(self.images), "upscaled/images.npy"), "label": (len(self.classes), "classes")}
        for key, (end, what) in ends.items():
            if not pd.api.types.is_integer_dtype(table[key]):
                return f"column {key} holds something else than whole numbers"
            wrong = table[key][~table[key].between(0, end - 1)]
            if len(wrong):
                return f"{key} {wrong.iloc[0]} is not in {what}"
        for key, known in {"duplicate_in": ("", *SPLITS), "duplicate_kind": ("", "exact", "near", "mirrored")}.items():
            if not (other := table[key][~table[key].isin(known)]).empty:
                return f"{key} {other.iloc[0]!r} is none of {', '.join(known[1:])}"
        if not all(map(pd.api.types.is_numeric_dtype, table[self.classes].dtypes)):
            return "a probability is no number"
        shares = table[self.classes].to_numpy(np.float64)
        wrong = ~((shares >= 0).all(1) & (abs(shares.sum(1) - 1) < 1e-3))
        return f"the probabilities of row {table['row'][wrong].iloc[0]} do not sum to 1" if wrong.any() else ""


def open_data(folder: str | Path) -> DataSet:
    """Open `folder`/upscaled and `folder`/splits, and verify that they belong together.

    Number, shape and SHA-256 of the images must be those in summary.json. The SHA-256 is computed only when size or
    mtime of the file have changed, and cached in `folder`/images.verified.json. `set` in the summary is the folder's
    name. Raises UserError for anything missing, damaged or mismatched.
    """
    folder = Path(folder)
    summary = _read_summary(folder / "splits" / "summary.json")
    for name in SPLITS:
        path = folder / "splits" / f"{name}.csv"
        if not path.exists():
            raise _not_found(path)
    images = open_images(folder / "upscaled" / "images.npy", "upscale")
    _verify(folder, images.shape, summary)
    return DataSet(folder, images, {**summary, "set": folder.resolve().name})


def seen_before(data: DataSet, other: DataSet) -> int:
    """How many test images without a mark of a leak have the pixels of one in train or val of another data set.

    By the hashes in raw/labels.csv; 0 if either folder has none.
    """

    def hashes(one: DataSet, split: str) -> np.ndarray:
        table = pd.read_csv(one.folder / "raw" / "labels.csv", usecols=["sha1"], dtype=str, keep_default_na=False)
        return table["sha1"].to_numpy(str)[one.split(split).rows]

    try:
        unmarked = hashes(data, "test")[~data.split("test").leaked.numpy()]
        theirs = np.concatenate([hashes(other, "train"), hashes(other, "val")])
    except FileNotFoundError:
        return 0
    return int(np.isin(unmarked, theirs).sum())


def feed(digest: "hashlib._Hash", name: str, content: np.ndarray | Sequence[str]) -> None:
    """Add a named array of numbers or list of strings to `digest`; different sequences of calls add different bytes.

    The bytes are the name, then dtype, number of dimensions, shape and values in C order for an array, or "text", the
    number of strings and the strings. Counts are little-endian uint64, strings are UTF-8 preceded by their length in
    bytes, and values are little-endian on every machine.
    """

    def number(value: int) -> None:
        digest.update(value.to_bytes(8, "little"))

    def string(value: str) -> None:
        encoded = value.encode()
        number(len(encoded))
        digest.update(encoded)

    string(name)
    if isinstance(content, np.ndarray):
        content = content.astype(content.dtype.newbyteorder("<"), order="C", copy=False)
        string(content.dtype.str)
        number(content.ndim)
        for length in content.shape:
            number(length)
        digest.update(content.tobytes())
    else:
        string("text")
        number(len(content))
        for text in content:
            string(text)


def _feed_split(digest: "hashlib._Hash", split: Split) -> None:
    feed(digest, f"{split.name}.row", split.rows)
    feed(digest, f"{split.name}.label", split.labels.numpy())
    feed(digest, f"{split.name}.targets", split.targets.numpy())
    feed(digest, f"{split.name}.subject", split.subjects)


def _not_found(path: Path) -> UserError:
    return UserError(f"{path}: not found; make the data with `dvc repro`")


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return read(Made, path, AGAIN)
    except FileNotFoundError:
        raise _not_found(path) from None


def _verify(folder: Path, shape: tuple[int, ...], summary: dict[str, Any]) -> None:
    """Raise UserError unless upscaled/images.npy, an array of `shape`, is the file that `summary` describes."""
    path, source = folder / "upscaled" / "images.npy", folder / "splits" / "summary.json"
    found, expected = list(shape), [summary["images"], *summary["image_shape"]]
    if found != expected:
        raise UserError(
            f"{path}: its shape is {found}, but the splits were made of {expected} ({source}); run `dvc repro`"
        )
    digest = _sha256_once(path, folder / VERIFIED)
    if digest != summary["images_sha256"]:
        raise UserError(
            f"{path}: its SHA-256 is {digest[:12]}..., but the splits were made of {summary['images_sha256'][:12]}..."
            f" ({source}); run `dvc repro`"
        )


def _sha256_once(path: Path, memory: Path) -> str:
    """The SHA-256 of `path`, from the file `memory` if that has it for the same size and mtime.

    It is no error if `memory` cannot be read or written; the hash is then computed again next time.
    """
    state = path.stat()  # before reading, so that a change in the meantime is noticed next time
    entry: dict[str, Any] = {"size": state.st_size, "mtime_ns": state.st_mtime_ns}
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memory.read_text())
        if (known["size"], known["mtime_ns"]) == (state.st_size, state.st_mtime_ns):
            return str(known["sha256"])
    entry["sha256"] = sha256(path)
    partial = memory.with_name(f"{memory.name}.{uuid.uuid4().hex}.partial")  # unique: several processes may do this
    with suppress(OSError):
        partial.write_text(json.dumps(entry) + "\n")
        os.replace(partial, memory)
    with suppress(OSError):
        partial.unlink()
    return entry["sha256"]
