"""The space of a sweep: every mistake in it is one line before anything starts, and a point gives the run it says."""

from pathlib import Path

import pytest

from fer.config import RunConfig
from fer.errors import UserError
from pipelines import space as spaces
from pipelines.params import load, run_faults, space_of

SHIPPED = Path(__file__).resolve().parents[1] / "params.yaml"


def base(name: str = "swin_nr_fpdls_tiny", *overrides: str) -> RunConfig:
    return load(SHIPPED, overrides).models[name]


def space(given: dict, run: RunConfig | None = None) -> spaces.Space:
    found: list[str] = []
    dimensions = spaces.read(given, run or base(), "space", run_faults, found)
    assert found == []
    return dimensions


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("lrr", {"float": [0, 1]}, "unknown key, did you mean 'lr'?"),
        ("options.resizr_blocks", {"int": [1, 2]}, "unknown key, did you mean 'resizer_blocks'?"),
        ("lr.x", {"float": [0, 1]}, "unknown key; a value has no keys below it"),
        ("epochs", {"int": [3, 30]}, "this key cannot be searched; set it in the base"),
        ("resources.workers", {"int": [1, 4]}, "this key cannot be searched; set it in the base"),
        ("lr", {"int": [0, 1]}, "an int range, but the base has 0.0005; use float or log"),
        ("batch_size", {"float": [16, 64]}, "a float range, but the base has 32; use int"),
        ("batch_size", {"log": [16, 64]}, "a log range, but the base has 32; use int"),
        ("loss", {"float": [0, 1]}, "a float range, but the base has 'focal_pdls'; use choice"),
        ("options.stn", {"int": [0, 1]}, "an int range, but the base has True; use choice"),
        ("ema_decay", {"float": [0.9, 0.99]}, "a float range, but the base has None; use choice"),
        ("options", {"factor": [0, 1]}, "a factor needs a fraction or a table of them, the base has "),
        ("lr", {"float": [1, 1]}, "the range [1, 1] is empty; low must be below high"),
        ("lr", {"log": [1e-2, 1e-5]}, "the range [0.01, 1e-05] is empty; low must be below high"),
        ("lr", {"log": [0, 1]}, "a log range must begin above 0, got 0"),
        ("augment", {"factor": [-1, 1]}, "a factor must not be negative, got -1"),
        ("batch_size", {"int": [1.5, 64]}, "int needs whole numbers, got [1.5, 64]"),
        ("lr", {"float": [0, "x"]}, "float needs two numbers, [low, high], got [0, 'x']"),
        ("lr", {"float": [0, True]}, "float needs two numbers, [low, high], got [0, True]"),
        ("lr", {"float": 3}, "float needs a list, got 3"),
        ("loss", {"choice": ["focal"]}, "choice needs two values at least, got ['focal']"),
        ("lr", {"uniform": [0, 1]}, "no kind of range 'uniform'; give one of {int: [low, high]}, "),
        ("lr", [0, 1], "give one of {int: [low, high]}, {float: "),
        ("lr", {"float": [0, 1], "log": [0, 1]}, "give one of {int: [low, high]}, {float: "),
        ("loss_alpha", {"float": [0.5, 2]}, "2 cannot work: loss_alpha: should be less than or equal to 1, got 2"),
        ("lr", {"float": [0, 1]}, "0 cannot work: lr: should be greater than 0, got 0"),
        ("loss", {"choice": ["focal_pdls", "fokal"]}, "'fokal' cannot work: loss: unknown loss 'fokal', did you"),
        ("options.stn", {"choice": [True, "no"]}, "'no' cannot work: options.stn: should be a valid boolean, got 'no'"),
        ("options.stn", {"choice": [True, 1]}, "1 stands in the choices twice"),
        ("options.resizer_size", {"choice": [24, 25]}, "25 cannot work: options.backbone: size 25 does not divide by "),
        ("augment", {"factor": [0, 20]}, "20 cannot work: augment.rotation: should be less than or equal to 180"),
        ("loss_alpha", {"float": [0.9, 1]}, "does not hold the base's 0.8, which is the first trial; widen"),
        ("augment", {"factor": [0, 0.5]}, "does not hold the base's 1, which is the first trial; widen"),
        ("loss", {"choice": ["focal", "pdls"]}, "does not hold the base's 'focal_pdls', which is the first trial; add"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_key(key: str, given: object, message: str) -> None:
    found: list[str] = []
    spaces.read({key: given}, base(), "sweeps.x.space", run_faults, found)
    (line,) = found
    assert line.startswith(f"sweeps.x.space.{key}: {message}"), line


def test_mistakes_are_found_all_at_once() -> None:
    params = load(
        SHIPPED, ["sweeps.tiny.space={lrr: {float: [0, 1]}, lr: {int: [1, 2]}}", "sweeps.tiny.grace_epochs=99"]
    )
    with pytest.raises(UserError) as caught:
        space_of(params, "tiny")
    assert str(caught.value).splitlines() == [
        "sweeps.tiny.grace_epochs: 99, but the base has 20 epochs; lower it",
        "sweeps.tiny.space.lrr: unknown key, did you mean 'lr'?",
        "sweeps.tiny.space.lr: an int range, but the base has 0.0005; use float or log",
    ]


def test_a_space_that_does_not_fit_an_override_leaves_other_commands_alone() -> None:
    """`fer train vgg13_small --set models.vgg13_small.lr=3e-4` has nothing to do with a sweep over lr."""
    params = load(SHIPPED, ["models.vgg13_small.lr=3e-4"])
    assert params.models["vgg13_small"].lr == 3e-4
    with pytest.raises(UserError, match="sweeps.sample.space.lr: does not hold the base's 0.0003, which is the first"):
        space_of(params, "sample")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base=vgg13_smll", "base: no model 'vgg13_smll' in params.yaml, did you mean 'vgg13_small'?"),
        ("trials=0", "trials: should be greater than 0, got 0"),
        ("hours=0", "hours: should be greater than 0, got 0"),
        ("gpus_per_trial=2", "gpus_per_trial: should be less than or equal to 1, got 2"),
        ("grace_epochs=21", "grace_epochs: 21, but the base has 20 epochs; lower it"),
        ("grace_epochs=11",
         "grace_epochs: 11, but no trial is stopped in the second half of the base's 20 epochs; lower it or set "
         "scheduler to none"),
        ("reduction=1", "reduction: should be greater than or equal to 2, got 1"),
        ("search=bayes", "search: should be 'tpe', 'random' or 'grid', got 'bayes'"),
        ("search=grid", "search: grid needs choices alone, loss_alpha has a range; use tpe or random"),
        ("scheduler=pbt", "search: pbt draws its first trials at random; set it to random"),
        ("space={}", "space: holds no key to search; name one at least"),
        ("space=3", "space: should be a table of keys, got 3"),
        ("trails=3", "trails: unknown key, did you mean 'trials'?"),
        ("space.options={choice: [{resizer_blocks: 1}, {resizer_blocks: 2}]}",
         "space.options: options.resizer_blocks is set by options.resizer_blocks too; leave one of them out"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_work(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        space_of(load(SHIPPED, [f"sweeps.tiny.{override}"]), "tiny")
    assert str(caught.value).splitlines()[0].removeprefix(f"{SHIPPED}: ") == f"sweeps.tiny.{message}"


def test_names_that_a_sweep_cannot_have_and_a_base_that_starts_from_another_run() -> None:
    with pytest.raises(UserError, match="sweeps.status: a sweep's name .* none of run, status, apply; rename it"):
        load(SHIPPED, ["sweeps.status=3"])
    chained = ["sweeps.tiny.base=disentangled_doe_tiny", "sweeps.tiny.space={lr: {log: [1e-4, 1e-2]}}"]
    with pytest.raises(UserError, match=r"sweeps.tiny.base: disentangled_doe_tiny starts from another run"):
        space_of(load(SHIPPED, chained), "tiny")


def test_pbt_refuses_what_a_running_run_cannot_change() -> None:
    pbt = ["sweeps.tiny.scheduler=pbt", "sweeps.tiny.search=random"]
    with pytest.raises(UserError) as caught:
        space_of(load(SHIPPED, pbt), "tiny")
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        "sweeps.tiny.space.options.resizer_blocks", "sweeps.tiny.space.options.resizer_channels"
    ]  # fmt: skip


def test_a_point_changes_what_it_names_and_nothing_else() -> None:
    given = {
        "loss_alpha": {"float": [0.5, 1.0]},
        "options.resizer_blocks": {"int": [1, 3]},
        "options.backbone.settings.drop_path_rate": {"float": [0.0, 0.3]},
        "augment": {"factor": [0.0, 2.0]},
        "loss": {"choice": ["focal_pdls", "pdls"]},
    }
    dimensions = space(given)
    point = {
        "loss_alpha": 0.6, "options.resizer_blocks": 3, "options.backbone.settings.drop_path_rate": 0.2, "augment": 1.5,
        "loss": "pdls",
    }  # fmt: skip
    found, tree = spaces.changed(base(), dimensions, point), base().model_dump()
    tree |= {"loss_alpha": 0.6, "loss": "pdls"}
    tree["options"]["resizer_blocks"] = 3
    tree["options"]["backbone"]["settings"]["drop_path_rate"] = 0.2
    factors = {"rotation": 15.0, "scale": 0.15, "translation": 0.09, "brightness": 0.3, "contrast": 0.3}
    tree["augment"] |= factors  # flip stays at .5, what was 0 stays 0
    assert found == RunConfig.model_validate(tree)


def test_the_point_of_the_base_gives_the_base_back() -> None:
    params = load(SHIPPED)
    for name, sweep in params.sweeps.items():
        run, dimensions = params.models[sweep.base], space_of(params, name)
        point = spaces.published(run, dimensions)
        assert list(point) == list(sweep.space), name
        assert spaces.changed(run, dimensions, point) == run


def test_a_table_among_the_choices_is_laid_over_the_base() -> None:
    run = base("swin_nr_fpdls")
    given = [{"resizer_size": 224, "resizer_scale": 0.584}, {"resizer_size": 256, "resizer_scale": None}]
    dimensions = space({"options": {"choice": given}}, run)
    assert spaces.published(run, dimensions) == {"options": '{"resizer_size": 224, "resizer_scale": 0.584}'}
    found = spaces.changed(run, dimensions, {"options": '{"resizer_size": 256, "resizer_scale": null}'})
    assert found.options == run.options | {"resizer_size": 256, "resizer_scale": None}


def test_a_grid_has_every_point_once() -> None:
    given = load(SHIPPED).sweeps["sample"].space
    points = list(spaces.grid(space(given, base("vgg13_small"))))
    assert len(points) == 4 * 2 * 2
    assert len({tuple(point.values()) for point in points}) == 16


def test_values_are_rounded_to_four_digits_within_the_range() -> None:
    dimensions = space({"lr": {"log": [1.23444e-5, 1e-2]}, "batch_size": {"int": [16, 64]}})
    assert dimensions["lr"].round(0.00123456) == 0.001235
    assert dimensions["lr"].round(1.23444e-5) == 1.23444e-5  # 1.234e-5 is below the range
    assert dimensions["batch_size"].round(17) == 17
