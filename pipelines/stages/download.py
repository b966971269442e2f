"""Stage download: a publisher's files -> data/sets/NAME/raw, the images, as array or pictures, and a table of votes."""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fer.data.aliases import doubles
from fer.data.boxes import read_boxes
from fer.data.datasets import DATASETS, counted
from fer.data.encoded import Shards
from fer.data.found import Found, look
from fer.data.images import allocate_images, check_room, write_rows
from fer.data.picture_files import Pictures
from fer.data.readers import ferplus
from fer.data.rows import rows
from fer.data.sample import write_sample
from fer.data.source import TEXT_COLUMNS, Source, Wanted, cropped
from fer.errors import UserError
from fer.files import new_folder
from pipelines.data_sets import Prepared, Sample
from pipelines.stages import fetch, run

NAMED = 3  # of what was left out or is tiny, in source.json


def download(one: Prepared) -> None:
    """Write images.npy, labels.csv and source.json to raw/; the same bytes for the same input.

    Raises UserError if the data set is missing, damaged or inconsistent; raw/ then stays as it was.
    """
    data, path, target = one.recipe.data, one.path, one.folder / "raw"
    if data.sample is not None:
        _sample(data.sample, target)
        return
    fetch.ensure(path, data)
    with look(path) as found:
        source = DATASETS[data.dataset].read(found, data.wanted())
        if data.faces is not None:
            boxes, faces = read_boxes(one.folder / "faces")
            source = cropped(source, boxes)
            source = replace(source, facts={**source.facts, "faces": faces})
        confusion = None if data.confusion is None else _confusion(found, data.confusion, source)
        if data.confusion is not None:
            unused = {reason: [n for n in names if n != data.confusion] for reason, names in source.left_out.items()}
            left_out = {reason: names for reason, names in unused.items() if names}
            source = replace(source, read=[*source.read, data.confusion], left_out=left_out)
        _write(target, source, data.dataset, confusion, data.store == "encoded")
    _report(path, data.dataset, source)


def _sample(size: Sample, target: Path) -> None:
    """The drawn faces, read from the same files as FER+."""
    with tempfile.TemporaryDirectory() as name:
        write_sample(Path(name), size.train, size.val, size.test, size.seed)
        with look(Path(name)) as found:
            _write(target, ferplus.read(found, Wanted()), "sample", None)


def _write(
    target: Path, source: Source, dataset: str, confusion: list[list[float]] | None, encoded: bool = False
) -> None:
    """The files of raw/, chunk by chunk, so that large data sets need no memory for all of their images."""
    facts = source.facts | {
        "dataset": dataset,
        "form": source.form,
        "labels": source.labels,
        "label_source": source.facts.get("label_source", source.form),
        "classes": list(source.classes),
        "vote_columns": list(source.vote_columns),
        "images": _counts(source),
        "read": source.read,
        "left_out": {
            reason: {"count": len(names), "first": names[:NAMED]} for reason, names in source.left_out.items()
        },
        "confusion": confusion,
    }
    if tiny := getattr(source.images, "tiny", None):
        facts |= {"tiny": {"count": len(tiny), "first": tiny[:NAMED]}}
    with new_folder(target) as folder:
        digests = list((_encoded if encoded else _array)(folder, source))
        table = source.table.assign(row=range(len(source.table)), sha1=digests)
        columns = ["row", *TEXT_COLUMNS, *source.vote_columns, "sha1"]
        table.to_csv(folder / "labels.csv", columns=columns, index=False, lineterminator="\n")
        (folder / "source.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _array(folder: Path, source: Source) -> Iterator[str]:
    """Write images.npy; the sha1 of the pixels of each image."""
    allocate_images(folder / "images.npy", source.images.shape)
    first = 0
    for chunk in tqdm(source.chunks(), desc="images", unit=" chunks", disable=None):
        with (folder / "images.npy").open("r+b") as file:
            write_rows(file, first, chunk)
        first += len(chunk)
        yield from (hashlib.sha1(image.tobytes()).hexdigest() for image in chunk)


def _encoded(folder: Path, source: Source) -> Iterator[str]:
    """Write the pictures as they are, and an index of them as images.npy; the sha1 of the pixels of each image.

    Raises UserError for a data set that is read as an array.
    """
    pictures = source.images
    if not isinstance(pictures, Pictures):
        raise UserError(f"data.store: the {source.form} of this data set are kept as an array only: set it to array")
    check_room(folder / "images.npy", sum(entry.size for entry in pictures.entries))
    with Shards(folder, pictures.shape, pictures.boxes) as shards:
        for chunk in tqdm(pictures.chunks(shards.add), desc="images", unit=" chunks", disable=None):
            yield from (hashlib.sha1(image.tobytes()).hexdigest() for image in chunk)


def _counts(source: Source) -> dict[str, int]:
    """Images of each split that there is; under an empty name for a data set without splits."""
    usages = source.table["usage"]
    return {usage: int(count) for usage in ("train", "val", "test", "") if (count := (usages == usage).sum())}


def _confusion(found: Found, name: str, source: Source) -> list[list[float]]:
    """The rows of the file that `data.confusion` names, in the order of the classes, each divided by its sum."""
    if source.labels != "hard":
        raise UserError("data.confusion: is for data sets with one label an image; this one has votes: remove it")
    classes = source.classes
    entry = next((entry for entry in found.entries if entry.name == name), None)
    if entry is None:
        raise UserError(f"data.confusion: {found.root / name} not found: give its path within the data set's folder")
    with entry.opened() as stream:
        lines = [fields for _, fields in rows(entry, stream)]
    header = lines[0][1:] if lines else []
    table = {line[0]: line[1:] for line in lines[1:]}
    if sorted(header) != sorted(classes) or sorted(table) != sorted(classes):
        raise UserError(f"data.confusion: {entry} must have a row and a column for each of {', '.join(classes)}")
    try:
        shares = np.array([[float(table[label][header.index(other)]) for other in classes] for label in classes])
    except (ValueError, IndexError):
        raise UserError(f"data.confusion: {entry} must hold a number in every cell") from None
    if not np.isfinite(shares).all() or (shares < 0).any() or not (shares.sum(axis=1) > 0).all():
        raise UserError(f"data.confusion: {entry} must hold numbers from 0 up, and some above 0 in every row")
    return (shares / shares.sum(axis=1, keepdims=True)).tolist()


def _report(path: Path, dataset: str, source: Source) -> None:
    """A line of what was read, and one of what was left out."""
    counts = _counts(source)
    images = ", ".join(f"{count:,} {usage or 'images'}" for usage, count in counts.items())
    agrees = (
        f"; emotion fits the votes of {source.facts['emotion_agrees']:.1%}" if "emotion_agrees" in source.facts else ""
    )
    place = f"{', '.join(source.read)} in {path}" if source.read != ["."] else path
    lines = [f"{dataset}: {images}{counted(dataset, counts)}; read {place}{agrees}"]
    lines.append(f"classes: {', '.join(source.classes)}")
    for one, other in doubles(source.classes):
        lines.append(f"{one} and {other} look like one class: give their images one label if they are")
    if resized := getattr(source.images, "resized", 0):
        side = f"{source.images.shape[2]}x{source.images.shape[1]}"
        lines.append(f"resized to {side} pixels: {resized:,} of {len(source.images):,} images (data.size)")
    if source.left_out:
        parts = (
            f"{reason}: {len(names):,} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for reason, names in source.left_out.items()
        )
        lines.append(f"left out: {'; '.join(parts)}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    run(download)
