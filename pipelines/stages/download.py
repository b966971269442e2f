"""Stage download: the data set that params.yaml names -> data/raw, an array of images and a table of votes."""

import hashlib
import json
import tempfile
from pathlib import Path

from fer.data.images import write_images
from fer.data.labels import VOTE_COLUMNS
from fer.data.sample import write_sample
from fer.data.sources import Source, read_ferplus
from fer.files import new_folder
from pipelines.params import Data, Params
from pipelines.stages import fetch, run

TARGET = Path("data/raw")


def download(params: Params) -> None:
    """Write images.npy, labels.csv and source.json to data/raw; the same bytes for the same input.

    Raises UserError if the data set is missing, damaged or inconsistent; data/raw then stays as it was.
    """
    source = _sample(params.data) if params.data.dataset == "sample" else _ferplus(params.data)
    table = source.table.assign(row=range(len(source.table)))
    table["sha1"] = [hashlib.sha1(image.tobytes()).hexdigest() for image in source.images]
    facts = source.facts | {
        "images": {usage: int((table["usage"] == usage).sum()) for usage in ("train", "val", "test")},
        "vote_columns": list(VOTE_COLUMNS),
    }
    with new_folder(TARGET) as folder:
        write_images(folder / "images.npy", source.images)
        columns = ["row", "name", "usage", "subject", *VOTE_COLUMNS, "sha1"]
        table.to_csv(folder / "labels.csv", columns=columns, index=False, lineterminator="\n")
        (folder / "source.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _sample(data: Data) -> Source:
    """The drawn faces, read from the same files as FER+."""
    with tempfile.TemporaryDirectory() as name:
        write_sample(Path(name), data.sample.train, data.sample.val, data.sample.test, data.sample.seed)
        source = read_ferplus(Path(name), "auto")
    return Source(source.images, source.table, source.facts | {"dataset": "sample"})


def _ferplus(data: Data) -> Source:
    path = Path(data.path)
    fetch.fill(path, data.kaggle_competition, data.votes_url, data.votes_sha256)
    return read_ferplus(path, data.label_source)


if __name__ == "__main__":
    run(download)
