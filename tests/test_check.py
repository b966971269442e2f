"""`fer data check` finds what was put there, counts it by hand, and shows it on a page without faces or scripts."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA, prepared
from PIL import Image

from fer.data.check import check
from pipelines import check_page
from pipelines.stages.download import download
from pipelines.stages.split import split
from pipelines.stages.upscale import upscale

RNG = np.random.default_rng(2)
PHOTOS = [
    np.asarray(Image.fromarray(RNG.integers(0, 200, (6, 6), np.uint8)).resize((48, 48), Image.Resampling.BICUBIC))
    for _ in range(7)
]
FAINT = np.add.outer(np.arange(48) // 12, np.zeros(48, int)).astype(np.uint8) + 90
TABLE = {  # name -> picture, split, subject, votes for happy, sad, unknown
    "a": (PHOTOS[0], "train", "P1", (10, 0, 0)),
    "b": (PHOTOS[1], "train", "P1", (9, 1, 0)),
    "c": (PHOTOS[2], "train", "P2", (0, 10, 0)),
    "d": (PHOTOS[0], "train", "P1", (3, 7, 0)),  # a again, with another label
    "e": (PHOTOS[2][:, ::-1], "train", "P2", (2, 8, 0)),  # c in the mirror
    "f": (np.full((48, 48), 9, np.uint8), "train", "", (10, 0, 0)),
    "g": (np.full((48, 48), 0, np.uint8), "train", "P3", (4, 4, 2)),  # no label
    "h": (PHOTOS[4], "val", "P4", (6, 0, 4)),
    "i": (PHOTOS[4] + 20, "val", "P4", (0, 6, 4)),  # h, brighter
    "j": (FAINT, "val", "P5", (10, 0, 0)),
    "o": (PHOTOS[4] + 40, "val", "P4", (10, 0, 0)),  # like h and like i
    "k": (PHOTOS[1], "test", "P2", (8, 2, 0)),  # b again, called after somebody of train
    "l": (PHOTOS[2] + 20, "test", "P6", (10, 0, 0)),  # c, brighter, with another label
    "m": (PHOTOS[5], "test", "P6", (0, 10, 0)),
    "n": (PHOTOS[6], "test", "P6", (6, 3, 1)),
}


def made(root: Path, **changes: Any) -> Path:
    """TABLE as the stages make it from pictures and a csv; `changes` of the settings of the split."""
    (root / "faces").mkdir()
    lines = ["path,split,subject,happy,sad,unknown"]
    for name, (picture, usage, subject, votes) in TABLE.items():
        Image.fromarray(picture).save(root / "faces" / f"{name}.png")
        lines.append(",".join(map(str, (f"{name}.png", usage, subject, *votes))))
    (root / "faces" / "list.csv").write_text("\n".join(lines))
    (root / "faces" / "notes.pdf").write_text("not a picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in (download, upscale, split):
            stage(prepared("table", split=changes))
    return root / "data/sets/table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return check(folder)


def counts(part: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {kind: (some["images"], some["same_label"]) for kind, some in part.items()}


def test_copies_by_hand(found: dict[str, Any]) -> None:
    across, inside = found["copies"]["across"], found["copies"]["inside"]
    assert counts(across["test_in_train"]) == {"exact": (1, 1), "near": (1, 0), "mirrored": (0, 0)}
    assert across["test_in_train"]["near"]["pairs"] == [["l.png", "c.png", "happy", "sad"]]
    assert counts(inside["train"]) == {"exact": (1, 0), "near": (0, 0), "mirrored": (1, 1)}
    assert inside["train"]["exact"]["pairs"] == [["d.png", "a.png", "sad", "happy"]]
    assert inside["train"]["mirrored"]["pairs"] == [["e.png", "c.png", "sad", "sad"]]
    assert inside["val"]["near"]["pairs"] == [["i.png", "h.png", "sad", "happy"], ["o.png", "h.png", "happy", "happy"]]
    others = [across["test_in_val"], across["val_in_train"], inside["test"]]
    assert {number for part in others for pair in counts(part).values() for number in pair} == {0}


def test_counts_pixels_and_subjects_by_hand(found: dict[str, Any]) -> None:
    assert (found["images"], found["published"]) == ({"train": 7, "val": 4, "test": 4}, {})
    assert found["labelled"] == {"train": 6, "val": 4, "test": 4}
    assert found["balance"]["test"] == {"happy": 3, "sad": 1}
    assert [part["count"] for part in found["left_out"].values()] == [1]
    pixels = found["pixels"]
    assert (pixels["blank"]["names"], pixels["faint"]["names"]) == (["f.png"], ["j.png"])
    assert (pixels["blank"]["images"], pixels["faint"]["images"]) == (2, 1)
    val = [float(TABLE[name][0].mean()) for name in "hijo"]
    assert pixels["brightness"]["val"]["mean"] == pytest.approx(np.mean(val))
    assert pixels["brightness"]["val"]["median"] == pytest.approx(np.median(val))
    assert sum(pixels["contrast"]["train"]["histogram"]) == 6
    subjects = found["subjects"]
    assert (subjects["subjects"], subjects["images_without"]["train"]) == ({"train": 2, "val": 2, "test": 2}, 1)
    assert {where: part["names"] for where, part in subjects["shared"].items() if part["names"]} == {
        "train_and_test": ["P2"]
    }


def test_votes_by_hand(found: dict[str, Any]) -> None:
    """Test: 8 and 2, 10, 10, and 6, 3 and 1."""
    test = found["votes"]["test"]
    entropies = [sum(-p * np.log2(p) for p in shares) for shares in ((0.8, 0.2), (1,), (1,), (0.6, 0.3, 0.1))]
    assert test["entropy"] == pytest.approx(np.mean(entropies))
    assert (test["minority"], test["unanimous"]) == (pytest.approx(0.6 / 4), 0.5)
    assert test["histogram"] == [2, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    first = test["doubtful"][0]
    assert (first["name"], first["label"], first["votes"]) == ("n.png", "happy", {"happy": 6, "sad": 3, "unknown": 1})


def test_what_is_said(found: dict[str, Any]) -> None:
    said = {line.topic: (line.mark, line.text) for line in check_page.findings(found)}
    text = "50.0 % of test (2 of 4) are also in train or val: 1 exact, 1 near; the column unleaked leaves them out."
    assert said["copies in test"] == ("look", text)
    assert said["labels of copies"] == ("look", "50.0 % of the copies (3) have another label than their original.")
    assert said["subjects"] == ("look", "On two sides: 1 in train and test (as P2).")
    assert said["blank images"] == ("look", "2 blank, 1 of them in a split: f.png.")
    assert said["splits"][1].startswith("6 train, 4 val, 4 test. 1 of 15 images are in no split, by")
    assert said["images"] == ("note", "7 train, 4 val, 4 test; no published numbers are known.")
    tiny = {"count": 4, "first": ["a.png", "b.png"]}
    said = {line.topic: line.text for line in check_page.findings(found | {"tiny": tiny})}
    assert "tiny images" not in {line.topic for line in check_page.findings(found)}
    assert said["tiny images"] == "4 have less than half the side that all are resized to, such as a.png, b.png."
    assert {"absent classes", "classes"}.isdisjoint(said)
    twice = {line.topic: line.text for line in check_page.findings(found | {"classes": ["happy", "Happiness", "sad"]})}
    assert twice["classes"] == "happy and Happiness look like one: give their images one label if they are."
    lacking = found["balance"] | {"val": {"happy": 4, "sad": 0}}
    said = {line.topic: line.text for line in check_page.findings(found | {"balance": lacking})}
    assert said["absent classes"] == "val holds no image of sad, so its numbers say nothing of that."
    said = {line.topic: line.text for line in check_page.findings(found | {"wrong_labels": 3})}
    assert said["wrong labels"] == "50.0 % of train (3) have a wrong label, by split.label_noise."
    known = found | {"published": {"train": 7, "val": 4, "test": 5}}
    assert check_page.findings(known)[0].text == "7 train, 4 val, 4 test; published: 7 train, 4 val, 5 test."


def test_near_copies_are_not_counted_where_they_are_not_looked_for(tmp_path: Path) -> None:
    found = check(made(tmp_path, near_duplicates=None))
    assert counts(found["copies"]["across"]["test_in_train"])["near"] == (0, 0)
    assert counts(found["copies"]["inside"]["train"]) == {"exact": (1, 0), "near": (0, 0), "mirrored": (0, 0)}
    assert "near copies" in {line.topic for line in check_page.findings(found)}


def test_images_without_a_face_are_named_where_they_are_looked_for(folder: Path, found: dict[str, Any]) -> None:
    """Here a picture with any contrast is a face; it is seen whole, enlarged, with its edge around it."""
    seen = []

    def faces(picture: np.ndarray) -> list[int]:
        seen.append(picture)
        return [1] if picture.std() > 10 else []

    assert "faceless" not in found
    found = check(folder, faces)
    names = {split: part["names"] for split, part in found["faceless"].items()}
    assert names == {"train": ["f.png"], "val": ["j.png"], "test": []}
    assert {picture.shape for picture in seen} == {(160, 160)}
    original = TABLE["a"][0]
    assert seen[0][:32, :32] == pytest.approx(np.full((32, 32), original[0, 0]), abs=9)  # bicubic at its border
    assert np.abs(seen[0][33:-31:2, 33:-31:2].astype(int) - original).mean() < 5
    said = {line.topic: line for line in check_page.findings(found)}["images without a face"]
    assert (said.mark, said.text) == (
        "look", "The detector finds no face in 14.3 % of the images (2): f.png, j.png.",
    )  # fmt: skip


def test_people_who_are_not_named_may_be_on_two_sides(found: dict[str, Any]) -> None:
    alone = {where: {"subjects": 0, "names": []} for where in found["subjects"]["shared"]}
    known = found | {"subjects": found["subjects"] | {"shared": alone}}
    said = {line.topic: (line.mark, line.text) for line in check_page.findings(known)}
    unknown = sum(found["subjects"]["images_without"].values())
    text = f"2 train, 2 val, 2 test; {unknown} images name none, so people may be on two sides."
    assert unknown
    assert said["subjects"] == ("look", text)
    known["subjects"] |= {"images_without": dict.fromkeys(("train", "val", "test"), 0)}
    said = {line.topic: (line.mark, line.text) for line in check_page.findings(known)}
    assert said["subjects"] == ("ok", "2 train, 2 val, 2 test; nobody is on two sides.")


def test_hard_labels_and_no_subjects(folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    source = data / "raw" / "source.json"
    source.write_text(json.dumps(json.loads(source.read_text()) | {"labels": "hard"}))
    for name in ("train", "val", "test"):
        path = data / "splits" / f"{name}.csv"
        path.write_text(re.sub(r"P\d", "", path.read_text()))
    found = check(data)
    assert (found["votes"], found["subjects"]["subjects"]) == ({}, {"train": 0, "val": 0, "test": 0})
    said = {line.topic: line.text for line in check_page.findings(found)}
    assert said["subjects"] == (
        "Unknown; data.subject_pattern takes them from file names that tell them, and a table from its column subject."
    )
    assert "label noise" not in said
    assert said["doubted labels"].startswith("Not looked for; `fer train EXPERIMENT data=NAME --folds 10`")
    assert "Doubtful" not in check_page.write(found, tmp_path)[1].read_text()


# The page and the command


def test_the_page_holds_no_script_nothing_from_elsewhere_and_names_as_text(
    found: dict[str, Any], tmp_path: Path
) -> None:
    image = {"row": 1, "name": "n.png", "label": "sad", "predicted": "happy", "probability": 0.0625}
    classes = {"sad": {"images": 8, "doubted": 1}}
    doubted = {"by": "x.folds3", "images": 8, "doubted": 1, "right": 0.75, "classes": classes, "first": [image]}
    strange = json.loads(json.dumps(found | {"doubted": doubted}).replace("n.png", "<script>x</script>"))
    numbers, page = check_page.write(strange, tmp_path)
    text = page.read_text()
    assert json.loads(numbers.read_text()) == strange
    assert text.count("&lt;script&gt;x") > 1
    assert (text.count("12.5 %"), text.count(">0.062<")) == (2, 1)
    told = "12.5 % of them (1 of 8) are doubted by x.folds3, which agrees with 75.0 %; the weaker a model, the more "
    assert (check_page.findings(strange)[-1].mark, check_page.findings(strange)[-1].text) == (
        "look",
        f"{told}it doubts.",
    )
    assert not re.search(r"<script|<img|https?:|src=|@import|url\(", text)


def test_the_command_shows_drawn_faces_and_no_others(folder: Path, recipes: Path, here: Callable) -> None:
    shutil.copytree(folder, recipes / DATA)
    done = here("data", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "look  subjects" in done.stdout
    assert f"{DATA}/check.html" in done.stdout
    source, page = recipes / DATA / "raw/source.json", recipes / DATA / "check.html"
    assert "<img" not in page.read_text()
    source.write_text(source.read_text().replace('"dataset": "table"', '"dataset": "sample"'))
    assert here("data", "check").returncode == 0
    assert page.read_text().count('<img src="data:image/png;base64,') > 8


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("splits", shutil.rmtree, f"{DATA}/splits/summary.json: not found; make the data with `dvc repro`"),
        ("raw/source.json", Path.unlink, f"{DATA}/raw/source.json: not found; run `dvc repro --force --sin"),
        ("raw/labels.csv", cut, f"{DATA}/raw/labels.csv: "),
        ("raw/images.npy", lambda path: np.save(path, np.load(path)[1:]), f"{DATA}/raw: 14 images, but the splits h"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(
    name: str, spoil: Callable, message: str, folder: Path, recipes: Path, here: Callable
) -> None:
    data = shutil.copytree(folder, recipes / DATA, ignore=shutil.ignore_patterns("check.*"))
    spoil(data / name)
    done = here("data", "check")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert not list(data.glob("check.*"))
