"""datasets/*.yaml: each is read as it stands, a mistake is told with its key, and runs find the one they want."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, refusal

from fer.data.datasets import DATASETS
from fer.errors import UserError
from pipelines.data_sets import SETS, folder_of, folder_of_run, load
from pipelines.params import Params, read_yaml, yaml_of
from pipelines.params import load as load_params


@pytest.fixture
def params(recipes: Path) -> Params:
    """Of a project with a data set for each file in datasets/, sample first."""
    names = sorted(path.stem for path in (recipes / "datasets").glob("*.yaml"))
    return load_params().model_copy(update={"data": {name: f"faces/{name}" for name in ("sample", *names)}})


def test_every_reader_has_a_file_and_each_file_is_read(params: Params) -> None:
    found = {name: load(params, name) for name in params.data}
    assert {"sample", *DATASETS} == {one.recipe.data.dataset for one in found.values()}
    mine = load(params, "folders")
    assert (mine.path, mine.folder, mine.machine) == (Path("faces/folders"), SETS / "folders", params.super_resolution)
    assert load(params) == found["sample"]
    for one in found.values():  # they differ in `data`, in their labels, or in the size of their faces
        larger = {"method": "bicubic", "scale": 2} if one.name == "ferplus_bicubic" else {}
        assert one.recipe.super_resolution == mine.recipe.super_resolution.model_copy(update=larger)
        modes = {"label_mode": "probability"} if one.name == "ferplus_votes" else {}
        assert one.recipe.split == mine.recipe.split.model_copy(update=modes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__dataset": "raf"}, "data.dataset: unknown data set 'raf', did you mean 'rafdb'?"),
        ({"data__classes": "fear"}, "data.classes: should be a valid list, got 'fear'"),
        ({"data__subject_pattern": r"S\d+_"}, "data.subject_pattern: needs a group in parentheses, got 'S\\\\d+_'"),
        ({"data__subject_pattern": "*"},
         "data.subject_pattern: is no regular expression (nothing to repeat at position 0), got '*'"),
        ({"data__votes_sha256": "abc"}, "data.votes_sha256: should match pattern '^[0-9a-f]{64}$', got 'abc'"),
        ({"data__sample": None}, "data.sample: is missing"),
        ({"data__dataset": "folders"}, "data.sample: is for the data set sample alone: delete it"),
        ({"data__faces": "haar"}, "data.faces: is not for the sample, which is drawn: delete it"),
        ({"data__classes": ["fear"]}, "data.classes: is not for the sample, which is drawn: delete it"),
        ({"data": {"dataset": "folders", "faces_margin": 1.2}},
         "data.faces_margin: has no effect without faces: delete it"),
        ({"data__sample__test": 10**7}, "data.sample.test: should be less than or equal to 1000000, got 10000000"),
        ({"data__sample__tran": 100}, "data.sample.tran: unknown key, did you mean 'train'?"),
        ({"split__label_mode": "probability", "split__label_noise": 0.1},
         "split.label_noise: is of whole labels: set label_mode to majority, not probability"),
        ({"split__val_share": 0}, "split.val_share: should be greater than 0, got 0"),
        ({"super_resolution__scale": 2}, "super_resolution.scale: must be 1, as method none keeps the size, got 2"),
        ({"super_resolution": {"method": "swin2sr", "scale": 3, "hub_id": None, "precision": "fp32"}},
         "super_resolution.scale: must be 2 or 4, as method swin2sr makes images larger by 2 or 4, got 3"),
        ({"split": ...}, "split: missing; copy it from another file in datasets"),
        ({"path": "x"}, "path: unknown key; known: data, split, super_resolution"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_once_where_it_stands(changes: dict[str, Any], message: str, recipes: Path) -> None:
    path = Path("datasets/sample.yaml")
    tree = read_yaml(path, "")
    for key, value in changes.items():
        *parents, last = key.split("__")
        table = tree
        for part in parents:
            table = table[part]
        table[last] = value
        if value is ...:
            del table[last]
    path.write_text(yaml_of(tree))
    assert refusal(load, load_params()) == f"{path}: {message}"


def test_a_data_set_that_is_not_there(params: Params) -> None:
    known = ", ".join(sorted(path.stem for path in (ROOT / "datasets").glob("*.yaml")))
    assert refusal(load, params, "rafd") == (
        "data: params.yaml has no data set 'rafd' under data, did you mean 'rafdb'?"
    )
    new = params.model_copy(update={"data": {"mine": "faces"}})
    assert refusal(load, new) == (
        f"datasets/mine.yaml: not found; copy one that is read in the same way to there, of {known}"
    )
    Path("datasets/mine.yaml").write_text("")
    assert refusal(load, new).startswith("datasets/mine.yaml: holds no keys; ")


def test_a_run_finds_the_data_set_it_was_trained_on(params: Params) -> None:
    """Runs of earlier versions know only its kind."""
    assert folder_of(params, None) == folder_of_run(params, {"dataset": "bars"}) == SETS / "sample"
    assert folder_of_run(params, {"dataset": "ferplus"}) == SETS / "ferplus"
    assert folder_of_run(params, {"dataset": "ferplus", "set": "ferplus_votes"}) == SETS / "ferplus_votes"
    with pytest.raises(UserError, match="^the run's data set: params.yaml has no data set 'gone' under data"):
        folder_of_run(params, {"dataset": "ferplus", "set": "gone"})
