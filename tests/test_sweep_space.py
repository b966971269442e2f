"""The space of a sweep: every mistake in it is one line before anything starts, and a point gives the run it says."""

import json
from datetime import date
from typing import Any

import optuna
import pytest
from conftest import ROOT

from fer.losses import LOSSES as OF_LOSSES
from fer.optimizer import Sgd
from fer.run import Run
from pipelines import experiments
from pipelines.sweeps import settings
from pipelines.sweeps import space as spaces
from pipelines.sweeps.space import Known


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def base(name: str = "swin_nr_fpdls_tiny", *changes: str) -> Run:
    return experiments.load([name, *changes], {})[name].run


def read(given: dict[str, Any], run: Run | None = None) -> tuple[spaces.Space, list[str]]:
    found: list[str] = []
    return spaces.read(given, run or base(), dict.fromkeys(given, "space"), found), found


def changed(given: dict[str, Any], point: spaces.Point, run: Run | None = None) -> Run:
    dimensions, mistakes = read(given, run)
    found, faults = spaces.changed(run or base(), dimensions, Known(point))
    assert (mistakes, faults) == ([], [])
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        # the key
        ("model.resizer.blcks", {"int": [1, 2]}, "unknown key, did you mean 'blocks'?"),
        ("optimizer.lr.x", {"float": [0, 1]}, "unknown key; a value has no keys below it"),
        ("epochs", {"int": [3, 30]}, "this key cannot be searched; set it in the base"),
        ("optimizer.lr", {"int": [0, 1]}, "an int range, but the base has 0.0005; use float or log"),
        ("model.stn", {"int": [0, 1]}, "an int range, but the base has True; use choice"),
        ("model.resizer", {"factor": [0, 1]}, "a factor needs a fraction or a table of them, the base has "),
        # the range
        ("optimizer.lr", {"uniform": [0, 1]}, "unknown kind of range 'uniform'; give one of {int: [low, high]}, "),
        ("optimizer.lr", {"float": [0, "x"]}, "float needs two numbers, [low, high], got [0, 'x']"),
        ("optimizer.lr", {"log": [1e-2, 1e-5]}, "the range [0.01, 1e-05] is empty; low must be below high"),
        ("optimizer.lr", {"log": [0, 1]}, "a log range must start above 0, got 0"),
        ("batch_size", {"int": [1.5, 64]}, "int needs whole numbers, got [1.5, 64]"),
        ("batch_size", {"choice": [*range(1, 20_001)]}, "choice has 20,000 values, 100 at most; use a range"),
        ("loss", {"choice": ["pdls", {"name": "focal_pdls", "alpha": {"factor": [0, 1]}}]}, "a factor cannot be"),
        ("optimizer.lr", {"choice": [{"factor": [0.5, 2.0]}, 5e-4]}, "a factor cannot be inside a choice"),
        ("augment", {"choice": [{"factor": [0.0, 1.5]}, {"rotation": 5.0}]}, "a factor cannot be inside a choice"),
        ("optimizer.lr", {"choice": [{"float": [0.5]}, 5e-4]}, "float needs two numbers, [low, high], got [0.5]"),
        ("optimizer.weight_decay", {"choice": [{"log": [0.0, 0.1]}, 0.05]}, "a log range must start above 0, got 0.0"),
        ("input", {"choice": [{"image_size": {"int": [64, 32]}}, {}]}, "the range [64, 32] is empty"),
        # its values
        ("loss.alpha", {"float": [0.5, 2]}, "2 cannot work: loss.alpha: should be less than or equal to 1, got 2"),
        ("loss", {"choice": ["focal_pdls", "fokal"]}, "'fokal' cannot work: loss.name: unknown loss 'fokal', did you"),
        ("loss", {"choice": ["focal_pdls", {"name": "pdls", "alpha": {"float": [0.5, 2]}}]},
         "'pdls' cannot work: loss.alpha: should be less than or equal to 1, got 2"),
        ("model.resizer.size", {"choice": [24, 25]}, "25 cannot work: model.backbone.patch_size: the image's side "),
        ("loss", {"choice": ["focal_pdls", {"name": "focal_pdls"}]}, "'focal_pdls' is twice in the choices"),
        # the base must be a point of it
        ("loss.alpha", {"float": [0.9, 1]}, "does not contain the base's 0.8, which is the first trial; widen"),
        ("loss", {"choice": [{"name": "focal_pdls", "alpha": 0.7}, "pdls"]},
         "does not contain the base's {'name': 'focal_pdls', 'alpha': 0.8, 'gamma': 2.0}, which is the first trial; "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_key(key: str, given: object, message: str) -> None:
    (line,) = read({key: given})[1]
    assert line.startswith(f"space.{key}: {message}"), line


def test_a_point_changes_what_it_names_and_nothing_else() -> None:
    given = {
        "loss.alpha": {"float": [0.5, 1.0]}, "model.resizer.blocks": {"int": [1, 3]},
        "model.backbone.drop_path_rate": {"float": [0.0, 0.3]}, "augment": {"factor": [0.0, 2.0]},
        "optimizer.lr": {"log": [1.23444e-5, 1e-2]}, "model.head": {"choice": [[64], [128, 64]]},
    }  # fmt: skip
    point = {
        "loss.alpha": 0.6, "model.resizer.blocks": 3, "model.backbone.drop_path_rate": 0.2, "augment": 1.5,
        "optimizer.lr": 0.00123456, "model.head": "[128, 64]",
    }  # fmt: skip
    tree = base().model_dump()
    tree["loss"]["alpha"], tree["optimizer"]["lr"] = 0.6, 0.001235  # four digits
    tree["model"] |= {"head": [128, 64], "resizer": tree["model"]["resizer"] | {"blocks": 3}}
    tree["model"]["backbone"]["drop_path_rate"] = 0.2
    factors = {"rotation": 15.0, "scale": 0.15, "translation": 0.09, "brightness": 0.3, "contrast": 0.3}
    tree["augment"] |= factors  # flip stays at .5, what was 0 stays 0
    assert changed(given, point) == Run.model_validate(tree)
    # 1.234e-5 is below the range
    assert changed(given, point | {"optimizer.lr": 1.23444e-5}).optimizer.lr == 1.23444e-5


def test_the_point_of_the_base_gives_the_base_back_and_a_grid_has_every_point_once() -> None:
    for name in settings.known():
        _, sweep, experiment, dimensions = settings.load([name], {})
        point = spaces.params_of(experiment.run, dimensions)
        assert [key for key in point if key in sweep.space] == list(sweep.space), name
        assert spaces.changed(experiment.run, dimensions, Known(point)) == (experiment.run, [])
    points = list(spaces.grid(settings.load(["sample"], {})[3]))
    assert len({tuple(point.values()) for point in points}) == len(points) == 4 * 2 * 2


def test_a_grid_has_the_points_of_a_choice_inside_a_choice() -> None:
    focal = {"name": "focal", "gamma": {"choice": [0.0, 2.0, 4.0]}}
    space, mistakes = read({"loss": {"choice": ["focal_pdls", focal]}, "batch_size": {"choice": [32, 64]}})
    points = list(spaces.grid(space))
    gammas = [{"loss": "focal", "loss.focal.gamma": gamma} for gamma in (0.0, 2.0, 4.0)]
    losses = [{"loss": "focal_pdls"}, *gammas]
    expected = [{**loss, "batch_size": size} for loss in losses for size in (32, 64)]
    assert (mistakes, points, spaces.size(space)) == ([], expected, 8)
    runs = [spaces.changed(base(), space, Known(point))[0] for point in points]
    assert [run.loss.gamma for run in runs if run and run.loss.name == "focal"] == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("kind", ["float", "log"])
def test_the_bases_own_value_is_not_rounded(kind: str) -> None:
    run = base("swin_nr_fpdls_tiny", "optimizer.lr=0.00015625")
    given = {"optimizer.lr": {kind: [1e-5, 1e-2]}}
    assert changed(given, spaces.params_of(run, read(given, run)[0]), run) == run
    assert changed(given, {"optimizer.lr": 0.000156251}, run).optimizer.lr == 0.0001563


# Sections that are chosen by name, with ranges of their own

ALPHA, GAMMA = {"float": [0.5, 1.0]}, {"float": [0.0, 4.0]}
FOCAL = {"name": "focal_pdls", "alpha": ALPHA, "gamma": GAMMA}
LOSSES = {"loss": {"choice": [FOCAL, {"name": "pdls", "alpha": ALPHA}, "label_smoothing"]}}


@pytest.mark.parametrize("loss", [{"name": "focal_pdls", "alpha": 0.6, "gamma": 3.0}, {"name": "pdls", "alpha": 0.6},
                                  {"name": "label_smoothing"}], ids=lambda loss: loss["name"])  # fmt: skip
def test_a_choice_draws_what_it_has_and_nothing_else(loss: dict[str, Any]) -> None:
    (_, name), *own = loss.items()
    params = {"loss": name, **{f"loss.{name}.{key}": value for key, value in own}}
    study = optuna.create_study()
    study.enqueue_trial(params)
    wanted = base().model_copy(update={"loss": OF_LOSSES[name](**dict(own))})
    assert spaces.changed(base(), read(LOSSES)[0], drawn := study.ask()) == (wanted, [])
    assert drawn.params == params
    of_base = {"loss": "focal_pdls", "loss.focal_pdls.alpha": 0.8, "loss.focal_pdls.gamma": 2.0}
    assert spaces.params_of(base(), read(LOSSES)[0]) == of_base


def test_ranges_in_a_table_without_a_name_go_by_its_number() -> None:
    """The table is laid over the base; so is one beside a key of its section."""
    choices = [{"size": 48, "channels": {"int": [8, 16]}}, {"size": base().model.resizer.size}]
    given = {"model.resizer": {"choice": choices}, "model.resizer.blocks": {"int": [1, 3]}}
    first, second = map(json.dumps, choices)
    assert spaces.params_of(base(), read(given)[0]) == {"model.resizer": second, "model.resizer.blocks": 1}
    point = {"model.resizer": first, "model.resizer.1.channels": 12, "model.resizer.blocks": 2}
    resizer = base().model.resizer.model_copy(update={"size": 48, "channels": 12, "blocks": 2})
    assert changed(given, point).model == base().model.model_copy(update={"resizer": resizer})
    dated = read({"model.resizer": {"choice": [{"size": date(2001, 1, 1)}, {"size": 5}]}})  # as YAML reads 2001-01-01
    assert any("model.resizer" in str(fault) for fault in dated[1])


def test_a_section_of_another_name_starts_anew_and_one_of_the_same_name_keeps_the_bases_keys() -> None:
    run = base("vgg13_small", "optimizer.weight_decay=0.03")
    given = {"optimizer": {"choice": ["adamw", {"name": "sgd", "lr": 0.1}]}}
    assert [point["optimizer"] for point in spaces.grid(read(given, run)[0])] == ["adamw", "sgd"]
    assert changed(given, {"optimizer": "adamw"}, run) == run
    assert changed(given, {"optimizer": "sgd"}, run).optimizer == Sgd(lr=0.1)


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        ({"loss": {"choice": [{"name": "focal_pdls", "alpha": 0.8}, "pdls"]}}, {"loss.alpha": {"float": [0, 1]}},
         "loss.alpha"),
        ({"augment": {"factor": [0, 1]}}, {"augment.rotation": {"float": [0, 20]}}, "augment.rotation"),
        ({"model.resizer": {"choice": [{"blocks": 1}, {"blocks": 2}]}}, {"model.resizer.blocks": {"int": [1, 3]}},
         "model.resizer.blocks"),
    ],
)  # fmt: skip
def test_dimensions_that_set_the_same_value(one: dict, other: dict, path: str) -> None:
    (first,), (second,) = one, other
    assert read({**one, **other})[1] == [f"space.{second}: {path} is set by {first} too; leave one of them out"]
    assert read({**other, **one})[1] == [f"space.{first}: {path} is set by {second} too; leave one of them out"]
