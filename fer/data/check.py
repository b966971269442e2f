"""What is right and wrong with a data set after `dvc repro`: counts, copies, subjects, pixels, doubtful labels."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

from fer.data.dataset import DataSet, open_data
from fer.data.datasets import published
from fer.data.images import Images, open_images
from fer.data.near import SAME, pairs, parts, thumbnails
from fer.data.split import SPLITS, called, count_classes, read_labels
from fer.errors import UserError
from fer.stored import Count, Stored, read

NAMED = 20  # images of a kind that are named
FAINT = 10.0  # standard deviation of the pixels, of 255, below which an image shows next to nothing
SHOWN = 144  # pixels: smaller faces are enlarged for a detector
BARS = 16  # of a histogram
PLACES = (("test", "train"), ("test", "val"), ("val", "train"))  # of copies: which of two splits is looked in
KINDS = ("exact", "near", "mirrored")


class Some(Stored):
    """Files of a data set of one kind: how many, and the first by name."""

    count: Count
    first: list[str]


class Facts(Stored):
    """raw/source.json."""

    dataset: str
    form: str
    classes: list[str]
    vote_columns: Annotated[list[str], Field(min_length=1)]
    labels: Literal["votes", "hard"]
    images: dict[str, Count]
    left_out: dict[str, Some]  # reason -> files that were not read
    tiny: Some | None = None  # pictures of less than half the side to which all are resized


def check(folder: str | Path, faces: Callable[[np.ndarray], Sequence[Any]] | None = None) -> dict[str, Any]:
    """Numbers on `folder`/raw and `folder`/splits, ready for JSON; the first NAMED images of each kind by name.

    `faces` finds the faces of a picture (`fer.faces.detect.Detector`); without it nobody looks for images without one.
    Raises UserError if they are missing, damaged, or do not belong together.
    """
    folder = Path(folder)
    data, again = open_data(folder), "run `dvc repro --force --single-item download` to make it again"
    images = open_images(folder / "raw" / "images.npy", "download")
    if len(images) != data.summary["images"]:
        raise UserError(f"{folder / 'raw'}: {len(images)} images, but the splits have others; run `dvc repro`")
    try:
        facts = read(Facts, folder / "raw" / "source.json", again)
    except FileNotFoundError:
        raise UserError(f"{folder / 'raw' / 'source.json'}: not found; {again}") from None
    rows = read_labels(folder / "raw" / "labels.csv", len(images), facts["vote_columns"])
    tables = {split: _table(data, split, rows) for split in SPLITS}
    votes = facts["vote_columns"] if facts["labels"] == "votes" else []
    return {
        "dataset": facts["dataset"],
        "form": facts["form"],
        "labels": facts["labels"],
        "classes": data.classes,
        "images": facts["images"],
        "published": published(facts["dataset"], facts["images"]),
        "left_out": facts["left_out"],
        "tiny": facts.get("tiny"),
        "labelled": {split: len(table) for split, table in tables.items()},
        "before_labels": data.summary.get("raw_rows", {}),
        "held_out": data.summary.get("held_out", {}),
        "wrong_labels": data.summary.get("wrong_labels", 0),
        "balance": {split: count_classes(table, data.classes) for split, table in tables.items()},
        "pixels": _pixels(images, rows, tables),
        **({} if faces is None else {"faceless": _faceless(images, tables, faces)}),
        "copies": _copies(images, tables, data.classes, data.summary.get("near_duplicates", SAME)),
        "subjects": _subjects(tables),
        "votes": {split: _votes(table, votes, data.classes) for split, table in tables.items()} if votes else {},
    }


def _table(data: DataSet, split: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The table of a split, once it is known to be sound, with the sha1 and the votes of each image."""
    data.split(split)
    path = data.folder / "splits" / f"{split}.csv"
    text = ["name", "subject", "duplicate_of", "duplicate_in", "duplicate_kind"]
    table = pd.read_csv(path, usecols=["row", "label", *text], dtype=dict.fromkeys(text, str), keep_default_na=False)
    table["called"] = called(table)
    beside = rows.drop(columns=["name", "usage", "subject"]).set_index("row").add_prefix("raw ")
    return table.join(beside, on="row")


def _pixels(images: Images, rows: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Brightness and contrast (mean and standard deviation of an image's pixels, 0 to 255), and what shows nothing."""
    mean, spread = (np.concatenate(part) for part in zip(*_looks(images)))
    names = called(rows).to_numpy()
    labelled = np.zeros(len(images), bool)
    labelled[np.concatenate([table["row"] for table in tables.values()])] = True

    def some(found: np.ndarray) -> dict[str, Any]:
        return {
            "images": int(found.sum()),
            "labelled": int((found & labelled).sum()),
            "names": names[found & labelled][:NAMED].tolist(),
            "rows": np.flatnonzero(found & labelled)[:NAMED].tolist(),
        }

    def spreads(values: np.ndarray) -> dict[str, Any]:
        low, middle, high = np.percentile(values, [5, 50, 95])
        return {
            "mean": float(values.mean(dtype=np.float64)),
            "p5": float(low),
            "median": float(middle),
            "p95": float(high),
            "histogram": np.histogram(values, BARS, (0, 256))[0].tolist(),
        }

    taken = {split: table["row"].to_numpy() for split, table in tables.items()}
    return {
        "blank": some(spread == 0),
        "faint": {"below": FAINT, **some((spread > 0) & (spread < FAINT))},
        "brightness": {split: spreads(mean[rows]) for split, rows in taken.items()},
        "contrast": {split: spreads(spread[rows]) for split, rows in taken.items()},
    }


def _faceless(
    images: Images, tables: dict[str, pd.DataFrame], faces: Callable[[np.ndarray], Sequence[Any]]
) -> dict[str, Any]:
    """By split, the images in which `faces` finds none. With a margin around, as detectors miss faces that fill all."""
    found = {}
    for split, table in tables.items():
        where = [not len(faces(_with_margin(images[row]))) for row in table["row"]]
        missed = table[where]
        rows, names = missed["row"].tolist(), missed["called"].tolist()
        found[split] = {"images": len(missed), "names": names[:NAMED], "rows": rows[:NAMED]}
    return found


def _with_margin(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3], its edge repeated by a third on each side, SHOWN pixels or larger."""
    rows, columns = (np.arange(-side // 3, side + side // 3).clip(0, side - 1) for side in image.shape[:2])
    wide = image[rows[:, None], columns]
    zoom = max(1, -(-SHOWN // min(wide.shape[:2])))
    return np.asarray(
        Image.fromarray(wide).resize((zoom * wide.shape[1], zoom * wide.shape[0]), Image.Resampling.BICUBIC)
    )


def _looks(images: Images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of the pixels of each image, over all channels."""
    axes = tuple(range(1, images.ndim))
    for rows in parts(images, np.arange(len(images))):
        part = images[rows]
        yield part.mean(axes, dtype=np.float64), part.std(axes, dtype=np.float64)


def _copies(
    images: Images, tables: dict[str, pd.DataFrame], classes: list[str], threshold: float | None
) -> dict[str, Any]:
    """Copies across splits, as the stage split has marked them, and inside each split.

    Inside: images that repeat an earlier one of their split; an exact copy counts as that alone. A `threshold` of None:
    near and mirrored ones were not looked for.
    """
    named = [*classes, "?"]
    across = {}
    for split, place in PLACES:
        here = tables[split][tables[split]["duplicate_in"] == place]
        originals = tables[place].drop_duplicates("called").set_index("called")["label"]
        theirs = here["duplicate_of"].map(originals).fillna(-1).astype(int)
        found = here[["called", "duplicate_of"]].assign(label=here["label"], theirs=theirs)
        across[f"{split}_in_{place}"] = _kinds(found, here["duplicate_kind"].to_numpy(), named)
    inside = {split: _inside(images, table, named, threshold) for split, table in tables.items()}
    return {"threshold": threshold, "across": across, "inside": inside}


def _inside(images: Images, table: pd.DataFrame, named: list[str], threshold: float | None) -> dict[str, Any]:
    """By kind, the images of a split that repeat an earlier one."""
    kind = np.full(len(table), "", dtype=object)
    first = table.reset_index().groupby("raw sha1")["index"].transform("min").to_numpy().copy()
    kind[first < np.arange(len(table))] = "exact"
    if threshold is not None:
        seen = np.concatenate([thumbnails(images[part]) for part in parts(images, table["row"].to_numpy())])
        for name in ("near", "mirrored"):
            earlier, later = pairs(seen, threshold, name == "mirrored")[:, ::-1]  # backwards: the first one is kept
            new = kind[later] == ""
            first[later[new]] = earlier[new]
            kind[later[new]] = name
    original = table.iloc[first]
    found = table[["called"]].assign(duplicate_of=original["called"].to_numpy(), label=table["label"])
    return _kinds(found.assign(theirs=original["label"].to_numpy()), kind, named)


def _kinds(found: pd.DataFrame, kind: np.ndarray, named: list[str]) -> dict[str, Any]:
    """By kind: number, those with the label of the original, and the first pairs, those with another label first.

    `found`: called, duplicate_of, and the two labels. A pair: two names, two labels.
    """
    result = {}
    for name in KINDS:
        part = found[kind == name]
        same = part["label"] == part["theirs"]
        first = part.loc[same.sort_values(kind="stable").index[:NAMED]]
        rows = zip(first["called"], first["duplicate_of"], first["label"], first["theirs"])
        shown = [[image, other, named[label], named[theirs]] for image, other, label, theirs in rows]
        result[name] = {"images": len(part), "same_label": int(same.sum()), "pairs": shown}
    return result


def _subjects(tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """How many subjects each split has, and who is in two of them."""
    known = {split: set(table["subject"]) - {""} for split, table in tables.items()}
    both = {f"{one}_and_{other}": sorted(known[one] & known[other]) for one, other in combinations(SPLITS, 2)}
    return {
        "subjects": {split: len(names) for split, names in known.items()},
        "images_without": {split: int((table["subject"] == "").sum()) for split, table in tables.items()},
        "shared": {where: {"subjects": len(names), "names": names[:NAMED]} for where, names in both.items()},
    }


def _votes(table: pd.DataFrame, columns: list[str], classes: list[str]) -> dict[str, Any]:
    """How much the voters agree on the labelled images of a split, and the images on which they agree least.

    entropy: of the votes over all columns, in bits; minority: share of the votes that did not go to the winner.
    """
    votes = table[[f"raw {name}" for name in columns]].to_numpy(np.float64)
    shares = votes / np.maximum(votes.sum(1, keepdims=True), 1)
    entropy = (shares * np.log2(1 / np.where(shares > 0, shares, 1))).sum(1)
    minority = 1 - shares.max(1, initial=0)
    order = np.lexsort([table["row"], -minority, -entropy])[:NAMED]
    return {
        "entropy": float(entropy.mean()),
        "minority": float(minority.mean()),
        "unanimous": float((minority == 0).mean()),
        "histogram": np.bincount((10 * minority + 1e-9).astype(int), minlength=10).tolist(),  # by tenths
        "doubtful": [
            {
                "row": int(table["row"].iloc[i]),
                "name": table["called"].iloc[i],
                "label": classes[table["label"].iloc[i]],
                "entropy": float(entropy[i]),
                "minority": float(minority[i]),
                "votes": {name: int(count) for name, count in zip(columns, votes[i]) if count},
            }
            for i in order
        ],
    }
