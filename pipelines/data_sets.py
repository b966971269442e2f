"""datasets/*.yaml: how the data sets of a project are read, enlarged and split; where they are is in params.yaml."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fer.errors import UserError
from fer.settings import Fault, Positive, Section, Seed, Unfit, check, differing, nearest
from pipelines.params import Params, Upscaling, read_yaml

if TYPE_CHECKING:
    from fer.data.source import Wanted

FOLDER = Path("datasets")
SETS = Path("data/sets")  # what the stages make: a folder for each
Share = Annotated[float, Field(gt=0, lt=0.5)]


class Sample(Section):
    """Size of the generated sample data."""

    train: Annotated[int, Field(ge=80, le=10**6)]
    val: Annotated[int, Field(ge=40, le=10**6)]
    test: Annotated[int, Field(ge=40, le=10**6)]
    seed: Seed


class Data(Section):
    """Which data set, and how it is read."""

    dataset: str
    label_source: Literal["auto", "label_csv", "fer2013new"] = "auto"
    """FER+: which votes; auto: label_csv where it is there."""
    sample: Sample | None = None
    """How many faces to draw."""
    classes: list[str] | None = None
    """The classes to keep, in their order, of a data set with one label an image, or a table's columns of votes."""
    size: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Side in pixels of the stored images; without, the size that all pictures have, or 112 if their sizes differ."""
    store: Literal["array", "encoded"] = "array"
    """array: pixels; encoded: pictures as they came, decoded whenever they are read, for sets too large as an array."""
    subject_pattern: str | None = None
    """Regular expression whose first group is the subject in a file name (in the whole path if it has a slash)."""
    faces: str | None = None
    """How to find faces in photographs: haar, YuNet's file, or hub to fetch it; without it each picture is a face."""
    faces_margin: Annotated[float, Field(gt=0, le=10)] | None = None
    """Side of the crop in sides of the face's box; without, that at which a face fills it as in FER2013."""
    confusion: str | None = None
    """A csv among its files, a row and a column a class: how often voters confuse them; the prior of hard labels."""
    kaggle_competition: str = "challenges-in-representation-learning-facial-expression-recognition-challenge"
    """From which an empty folder is filled."""
    votes_url: str = "https://raw.githubusercontent.com/microsoft/FERPlus/master/fer2013new.csv"
    """Where the votes are fetched from if they are not among the files."""
    votes_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = (
        "9206e20d62f56475939f516847d61753e4860caeac9718b560129541b776fc2c"
    )
    """What the fetched votes must hash to."""

    @field_validator("dataset")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name != "sample":
            from fer.data.datasets import DATASETS  # with pandas, which takes a moment

            if name not in DATASETS:
                known = nearest(name, ["sample", *DATASETS])
                raise Unfit([Fault("", f"unknown data set '{name}'{known}")])
        return name

    @model_validator(mode="after")
    def _fits(self) -> "Data":
        found = []
        if (self.dataset == "sample") != (self.sample is not None):
            rule = "is missing" if self.sample is None else "is for the data set sample alone: delete it"
            found.append(Fault("sample", rule))
        if self.dataset == "sample":
            own = {"dataset", "sample"}
            given = [key for key in differing(self) if key not in own]
            found += [Fault(key, "is not for the sample, which is drawn: delete it") for key in given]
        elif self.faces_margin is not None and self.faces is None:
            found.append(Fault("faces_margin", "has no effect without faces: delete it"))
        if found:
            raise Unfit(found)
        return self

    def wanted(self) -> "Wanted":
        """What its reader is asked for."""
        from fer.data.source import Wanted  # with pandas, which takes a moment

        classes = None if self.classes is None else tuple(self.classes)
        return Wanted(self.label_source, self.subject_pattern, self.size, classes)

    @field_validator("subject_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise Unfit([Fault("", f"is no regular expression ({error}), got {pattern!r}")]) from None
        if not groups:
            raise Unfit([Fault("", f"needs a group in parentheses, got {pattern!r}")])
        return pattern


class SuperResolution(Section):
    """How images are enlarged before the split."""

    method: Literal["none", "bicubic", "lanczos", "dic", "swin2sr"]
    scale: Annotated[int, Field(ge=1, le=16)]
    hub_id: str | None
    precision: Literal["fp32", "bf16", "fp16"]

    @model_validator(mode="after")
    def _scale_fits(self) -> "SuperResolution":
        from fer.super_resolution.methods import METHODS

        scales = METHODS[self.method].scales
        if scales is not None and self.scale not in scales:
            able = " or ".join(map(str, scales))
            does = "keeps the size" if self.method == "none" else f"makes images larger by {able}"
            raise Unfit([Fault("scale", f"must be {able}, as method {self.method} {does}, got {self.scale}")])
        return self


class Splitting(Section):
    """How labels are made, and which images are trained on."""

    label_mode: Literal["majority", "probability", "cross_entropy", "multi_target"]
    drop_leaked_train: Literal["none", "exact", "near"]
    prior_min_votes: Positive
    train_share: Annotated[float, Field(gt=0, le=1)]
    seed: Seed
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training images of each class that get another label at random, to see what training makes of it."""
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = 0.94
    """Cosine of two thumbnails from which images count as the same photograph; null: only exact copies do."""
    val_share: Share = 0.1
    """Share of train, or of all images, that becomes val where the data set has none."""
    test_share: Share = 0.2
    """Share of all images that becomes test where the data set has no splits."""

    @model_validator(mode="after")
    def _noise_is_of_whole_labels(self) -> "Splitting":
        if self.label_noise and self.label_mode != "majority":
            raise Unfit(
                [Fault("label_noise", f"is of whole labels: set label_mode to majority, not {self.label_mode}")]
            )
        return self


class Recipe(Section):
    """The content of datasets/NAME.yaml."""

    data: Data
    super_resolution: SuperResolution
    split: Splitting


@dataclass(frozen=True)
class Prepared:
    """A data set of the project: where its files are, what is made of them, and where that lies."""

    name: str
    path: Path  # the publisher's files
    recipe: Recipe
    machine: Upscaling

    @property
    def folder(self) -> Path:
        """Holds raw/, upscaled/ and splits/."""
        return SETS / self.name


def folder_of(params: Params, name: str | None, asks: str = "data") -> Path:
    """The folder of the data set of that name, or of the first of the project, as a run opens it.

    Raises UserError, which begins with `asks`, for an unknown name.
    """
    return SETS / params.chosen(name, asks)


def folder_of_run(params: Params, about: dict[str, Any]) -> Path:
    """The folder of the data set that a run was trained on; `about`: what its files say of its data.

    Raises UserError if the project does not name it any more. Runs of earlier versions do not know the name.
    """
    if about.get("set") is None:
        return folder_of(params, about["dataset"] if about["dataset"] in params.data else None)
    return folder_of(params, about["set"], "the run's data set")


def load(params: Params, name: str | None = None) -> Prepared:
    """The data set of that name, or the first of the project.

    Raises UserError with one line per mistake in datasets/NAME.yaml, each with its dotted path.
    """
    name = params.chosen(name)
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(one.stem for one in FOLDER.glob("*.yaml")))
        raise UserError(f"{path}: not found; copy one that is read in the same way to there, of {known}")
    recipe, faults = check(Recipe, read_yaml(path, f"restore it with `git checkout {path}`"))
    if recipe is None:
        remedy = {"missing": f"; copy it from another file in {FOLDER}"}
        raise UserError(*(f"{path}: {fault}{remedy.get(fault.message, '')}" for fault in faults))
    return Prepared(name, Path(params.data[name]), recipe, params.super_resolution)
