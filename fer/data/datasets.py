"""The data sets that `data.dataset` names: how each is read, and what its publishers say of it."""

from collections.abc import Callable
from dataclasses import dataclass

from fer.data.found import Found
from fer.data.readers import affectnet, ckplus, fer2013, ferplus, folders, rafdb, table
from fer.data.source import Source, Wanted


@dataclass(frozen=True)
class Row:
    """A data set. Classes and the kind of its labels are those of the Source that `read` returns."""

    read: Callable[[Found, Wanted], Source]
    counts: tuple[dict[str, int], ...] = ()  # images of each split as published, for each published number of classes
    protocol: str = ""  # of the published numbers
    published: tuple[tuple[str, float, str], ...] = ()  # method, test accuracy in %, what its weights start from
    licence: str = ""
    download: tuple[str, ...] = ()  # what an empty folder is filled with: images, votes


DATASETS = {
    "ferplus": Row(
        ferplus.read,
        counts=(
            {"train": 28558, "val": 3579, "test": 3573},  # label.csv; the next two: fer2013new.csv
            {"train": 28561, "val": 3579, "test": 3574},  # by name, four of them twice
            {"train": 28709, "val": 3589, "test": 3589},  # by row
        ),
        protocol="8 classes, majority of the votes in label.csv, PrivateTest",
        published=(
            ("QCS 2025", 91.85, "IR50, MS-Celeb-1M"),
            ("POSTER 2023", 91.62, "IR50 + landmarks"),
            ("DCS 2025", 91.41, "IR50, MS-Celeb-1M"),
            ("DDAMFN 2023", 90.74, "face pre-training"),
            ("Neural Resizer, Swin-B 2022", 89.50, "ImageNet"),
            ("VTFF 2021", 88.81, "face pre-training"),
            ("VGG13 (Barsoum) 2016", 84.99, "from scratch"),
        ),
        licence="votes: MIT; images: for research, by the rules of the Kaggle competition",
        download=("images", "votes"),
    ),
    "fer2013": Row(
        fer2013.read,
        counts=({"train": 28709, "val": 3589, "test": 3589}, {"train": 28709, "test": 7178}),
        protocol="7 classes, PrivateTest",
        licence="for research, by the rules of the Kaggle competition",
        download=("images",),
    ),
    "rafdb": Row(
        rafdb.read,
        counts=({"train": 12271, "test": 3068},),
        protocol="7 classes, the publisher's test list",
        published=(
            ("QCS 2025", 93.02, "IR50, MS-Celeb-1M"),
            ("DCS 2025", 92.57, "IR50, MS-Celeb-1M"),
            ("POSTER 2023", 92.05, "IR50 + landmarks"),
            ("DDAMFN 2023", 91.35, "face pre-training"),
            ("VTFF 2021", 88.14, "face pre-training"),
            ("ViT_SE 2021", 87.22, "ImageNet-21k"),
        ),
        licence="for non-commercial research, on request to the publisher",
    ),
    "affectnet": Row(
        affectnet.read,
        counts=({"train": 287651, "test": 4000}, {"train": 283901, "test": 3500}),
        protocol="8 classes, the publisher's validation set",
        published=(
            ("DCS 2025", 64.40, "IR50, MS-Celeb-1M"),
            ("QCS 2025", 64.30, "IR50, MS-Celeb-1M"),
            ("DDAMFN 2023", 64.25, "face pre-training"),
            ("POSTER 2023", 63.34, "IR50 + landmarks"),
        ),
        licence="for non-commercial research, on request to the publisher",
    ),
    "ckplus": Row(
        ckplus.read,
        counts=({"": 981},),
        protocol="7 classes, folds by subject",
        licence="for non-commercial research, on request to the publisher of CK+",
    ),
    "folders": Row(folders.read),
    "table": Row(table.read),
}


def published(name: str, images: dict[str, int]) -> dict[str, int]:
    """The published numbers of images in each split that are nearest to `images`; empty where none are known."""

    def distance(counts: dict[str, int]) -> tuple[bool, int]:
        return set(counts) != set(images), abs(sum(counts.values()) - sum(images.values()))

    return min(DATASETS[name].counts, key=distance, default={}) if name in DATASETS else {}


def counted(name: str, images: dict[str, int]) -> str:
    """What to say of the numbers of `images` beside the nearest published ones; empty if they are the same."""
    nearest = published(name, images)
    if not nearest or images in DATASETS[name].counts:
        return ""
    return " (published: " + ", ".join(f"{count:,} {usage or 'images'}" for usage, count in nearest.items()) + ")"
