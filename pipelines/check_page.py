"""What `fer data check` found: a few sentences, check.json, and check.html, a page without scripts."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from PIL import Image

from fer.data.aliases import doubles
from fer.data.images import Images
from fer.data.split import SPLITS
from fer.files import write_bytes, write_json

FEW_NAMES = 20  # in a sentence
FEW = 50  # test images of a class below which its recall is a rough number
UNEVEN = 10  # times that the largest class is the smallest, from which that is said
BRIGHTER = 5.0  # grey levels between the medians of two splits, from which that is said


@dataclass(frozen=True)
class Finding:
    """A sentence on one topic; `look`: a person should look at it, `note`: good to know."""

    mark: Literal["ok", "note", "look"]
    topic: str
    text: str


def findings(found: dict[str, Any]) -> list[Finding]:
    """The result of `fer.data.check.check` in a sentence or two for each topic."""
    return [*_counts(found), *_pixels(found), *_copies(found), _subjects(found["subjects"]), *_labels(found)]


def _counts(found: dict[str, Any]) -> list[Finding]:
    read, known = found["images"], found["published"]
    if not known:
        lines = [Finding("note", "images", f"{_list(read)}; no published numbers are known.")]
    elif read == known:
        lines = [Finding("ok", "images", f"{_list(read)}, as published.")]
    else:
        lines = [Finding("look", "images", f"{_list(read)}; published: {_list(known)}.")]
    rows, kept = sum(found["before_labels"].values()), sum(found["labelled"].values())
    if rows > kept:
        text = f"{rows - kept:,} of {rows:,} images are in no split, by the vote rule or other settings of it."
        lines.append(Finding("note", "splits", f"{_list(found['labelled'])}. {text}"))
    held = [f"{split} was taken from {source}" for split, source in found["held_out"].items()]
    if held:
        lines.append(Finding("note", "held out", f"The data set lacks splits: {', '.join(held)}."))
    for reason, names in found["left_out"].items():
        more = ", ..." if names["count"] > len(names["first"]) else ""
        lines.append(Finding("note", "left out", f"{reason}: {names['count']:,} ({', '.join(names['first'])}{more})."))
    return lines


def _pixels(found: dict[str, Any]) -> list[Finding]:
    pixels, lines = found["pixels"], []
    faint = f"with a contrast below {pixels['faint']['below']:g} of 255"
    for key, what in (("blank", "blank"), ("faint", faint)):
        some = pixels[key]
        named = f": {', '.join(some['names'])}" if some["names"] else ""
        text = f"{some['images']:,} {what}, {some['labelled']:,} of them in a split{named}."
        text = text if some["images"] else "None."
        lines.append(Finding("look" if some["labelled"] else "ok", f"{key} images", text))
    if tiny := found["tiny"]:
        named = ", ".join(tiny["first"])
        text = f"{tiny['count']:,} have less than half the side that all are resized to, such as {named}."
        lines.append(Finding("look", "tiny images", text))
    return [*lines, *_faceless(found), _brightness(pixels)]


def _faceless(found: dict[str, Any]) -> list[Finding]:
    if (parts := found.get("faceless")) is None:
        return []
    images = sum(part["images"] for part in parts.values())
    names = [name for part in parts.values() for name in part["names"]]
    share = _share(images, sum(found["labelled"].values()))
    text = f"The detector finds no face in {share} of the images ({images:,}): {', '.join(names[:FEW_NAMES])}."
    return [Finding("look" if images else "ok", "images without a face", text if images else "None.")]


def _brightness(pixels: dict[str, Any]) -> Finding:
    medians = {split: part["median"] for split, part in pixels["brightness"].items()}
    apart = max(medians.values()) - min(medians.values())
    shown = ", ".join(f"{median:.0f} in {split}" for split, median in medians.items())
    text = f"The median image has {shown}, of 255."
    return Finding("look" if apart >= BRIGHTER else "ok", "brightness", text)


def _copies(found: dict[str, Any]) -> list[Finding]:
    copies, lines = found["copies"], []
    for split, places in (("test", ("train", "val")), ("val", ("train",))):
        parts = [copies["across"][f"{split}_in_{place}"] for place in places]
        kinds = {kind: sum(part[kind]["images"] for part in parts) for kind in parts[0]}
        total, images = sum(kinds.values()), found["labelled"][split]
        shown = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
        text = f"{_share(total, images)} of {split} ({total:,} of {images:,}) are also in {' or '.join(places)}"
        remedy = "; the column unleaked leaves them out" if split == "test" else ""
        sentence = f"{text}: {shown}{remedy}." if total else f"No image of {split} is also in {' or '.join(places)}."
        lines.append(Finding("look" if total else "ok", f"copies in {split}", sentence))
    repeats = {split: sum(kind["images"] for kind in part.values()) for split, part in copies["inside"].items()}
    text = f"{_list(repeats)} images repeat an earlier one of their split."
    lines.append(Finding("note" if any(repeats.values()) else "ok", "repeats", text))
    every = [
        kind for part in (copies["across"], copies["inside"]) for place in part.values() for kind in place.values()
    ]
    total, same = (sum(kind[key] for kind in every) for key in ("images", "same_label"))
    if total:
        text = f"{_share(total - same, total)} of the copies ({total - same:,}) have another label than their original."
        lines.append(Finding("look" if total > same else "ok", "labels of copies", text))
    if copies["threshold"] is None:
        lines.append(Finding("note", "near copies", "Not looked for, as split.near_duplicates is null."))
    return lines


def _subjects(subjects: dict[str, Any]) -> Finding:
    if not any(subjects["subjects"].values()):
        return Finding(
            "note", "subjects", "Unknown; data.subject_pattern takes them from file names that tell them, "
            "and a table from its column subject."
        )  # fmt: skip
    shared = {where: part for where, part in subjects["shared"].items() if part["subjects"]}
    unknown = sum(subjects["images_without"].values())
    if unknown and not shared:
        text = f"{unknown:,} images name none, so people may be on two sides"
        return Finding("look", "subjects", f"{_list(subjects['subjects'])}; {text}.")
    if not shared:
        return Finding("ok", "subjects", f"{_list(subjects['subjects'])}; nobody is on two sides.")
    shown = ", ".join(
        f"{part['subjects']} in {where.replace('_', ' ')} (as {part['names'][0]})" for where, part in shared.items()
    )
    return Finding("look", "subjects", f"On two sides: {shown}.")


def _labels(found: dict[str, Any]) -> list[Finding]:
    train, test = found["balance"]["train"], found["balance"]["test"]
    lines = [
        Finding("look", "classes", f"{one} and {other} look like one: give their images one label if they are.")
        for one, other in doubles(found["classes"])
    ]
    most, least = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
    ratio = train[most] / train[least]
    text = f"The largest class of train is {most} ({train[most]:,}), the smallest {least} ({train[least]:,})."
    lines.append(Finding("look" if ratio >= UNEVEN else "ok", "balance", text))
    for split in ("val", "test"):
        if absent := [name for name, count in found["balance"][split].items() if not count]:
            text = f"{split} holds no image of {', '.join(absent)}, so its numbers say nothing of that."
            lines.append(Finding("look", "absent classes", text))
    few = {name: count for name, count in test.items() if 0 < count < FEW}
    if few:
        named = ", ".join(f"{name} ({count})" for name, count in few.items())
        text = f"Few test images of {named}: their recalls are rough numbers."
        lines.append(Finding("look", "small classes", text))
    if wrong := found["wrong_labels"]:
        text = f"{_share(wrong, sum(train.values()))} of train ({wrong:,}) have a wrong label, by split.label_noise."
        lines.append(Finding("note", "wrong labels", text))
    if found["votes"]:
        parts = [f"{100 * part['minority']:.0f} % in {split}" for split, part in found["votes"].items()]
        unanimous = f"{100 * found['votes']['train']['unanimous']:.0f} %"
        text = f"Votes against the winner: {', '.join(parts)}. Voters are unanimous on {unanimous} of train."
        lines.append(Finding("note", "label noise", text))
    if doubts := found.get("doubted"):
        share = _share(doubts["doubted"], doubts["images"])
        text = f"{share} of them ({doubts['doubted']:,} of {doubts['images']:,}) are doubted by {doubts['by']}"
        text += f", which agrees with {100 * doubts['right']:.1f} %; the weaker a model, the more it doubts."
        lines.append(Finding("look" if doubts["doubted"] else "ok", "doubted labels", text))
    elif not found["votes"]:
        text = "Not looked for; `fer train EXPERIMENT data=NAME --folds 10` gives the predictions that can tell."
        lines.append(Finding("note", "doubted labels", text))
    return lines


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[name]:,} {name or 'images'}" for name in (*SPLITS, "") if name in counts)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def write(found: dict[str, Any], folder: Path, images: Images | None = None) -> tuple[Path, Path]:
    """Write `folder`/check.json and check.html; with `images`, [N, H, W(, 3)], the page shows the doubtful ones.

    To be given for drawn faces alone: a page with people's faces may not be passed on.
    """
    numbers, page = folder / "check.json", folder / "check.html"
    pictures = {}
    if images is not None:
        parts = [part["doubtful"] for part in found["votes"].values()] + [found.get("doubted", {}).get("first", [])]
        rows = {image["row"] for part in parts for image in part}
        pictures = {row: _data_uri(images[row]) for row in rows}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("check.html").render(
        found=found, findings=findings(found), pictures=pictures, total=sum(found["labelled"].values())
    )
    write_bytes(page, text.encode())
    write_json(numbers, found)
    return numbers, page


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
