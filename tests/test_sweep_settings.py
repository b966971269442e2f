"""sweeps/*.yaml: every mistake in one line with its file, `changes` over the base, the command line over the file."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from fer.errors import UserError
from fer.files import write_json
from fer.losses import Pdls
from fer.run import Run
from fer.schedule import Constant
from pipelines import cli, experiments
from pipelines.experiments import COMMAND_LINE, Experiment
from pipelines.params import parse_value, read_yaml, yaml_of
from pipelines.sweeps import folder as sweeps
from pipelines.sweeps import settings
from pipelines.sweeps.folder import DONE, PRUNED, Trial
from pipelines.sweeps.settings import Sweep
from pipelines.sweeps.space import Space

SHIPPED = sorted(path.stem for path in ROOT.glob("sweeps/*.yaml"))
LR = {"optimizer.lr": {"log": [1e-4, 1e-2]}}
Here = Callable[..., subprocess.CompletedProcess]


pytestmark = pytest.mark.usefixtures("recipes")


def write(name: str, text: str = "", **tree: Any) -> str:
    """Write sweeps/`name`.yaml of text or of a table of keys; its path."""
    path = Path("sweeps") / f"{name}.yaml"
    path.write_text(text or yaml_of(tree))
    return str(path)


def load(*words: str, machine: dict[str, Any] | None = None) -> tuple[str, Sweep, Experiment, Space]:
    return settings.load(list(words), machine or {})


def mistakes(*words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(*words)
    return str(caught.value).splitlines()


def test_every_shipped_sweep_loads_and_a_file_may_lie_elsewhere() -> None:
    assert SHIPPED == settings.known() == ["fpdls", "sample", "tiny"]
    for name in SHIPPED:
        found, sweep, base, space = load(name)
        assert found == name
        assert base.run == experiments.load([sweep.base], {})[sweep.base].run
        assert list(space) == list(sweep.space)
    Path("mine.yml").write_text(yaml_of({"base": "vgg13_small", "space": LR}))
    name, sweep, base, _ = load("mine.yml")
    assert (name, sweep.base, base.name) == ("mine", "vgg13_small", "vgg13_small")


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "sweeps/nope.yaml: no such sweep; known: fpdls, sample, tiny"),
        (["elsewhere/tiny.yaml"], "elsewhere/tiny.yaml: no such sweep, did you mean 'tiny'?"),
        (["tiny", "sample"], "fer sweep: name one sweep, one of fpdls, sample, tiny"),
    ],
)
def test_one_sweep_is_named(words: list[str], message: str) -> None:
    assert mistakes(*words) == [message]


def test_a_sweep_cannot_have_the_name_of_a_command() -> None:
    assert {command.name for command in cli.sweeps.registered_commands} == set(settings.COMMANDS)
    for name in (*settings.COMMANDS, "two words"):
        path = write(name, base="vgg13_small", space=LR)
        assert mistakes(path) == [
            f"{path}: a sweep's name is made of up to 100 letters, digits, _ and -, and is none of run, status, apply; "
            "rename the file"
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", "holds no keys; write at least its base and space there"),
        ("base: vgg13_small\n", "space: missing"),
        ("base: disentangled_doe_tiny\nspace: {batch_size: {int: [8, 64]}}\n",
         "base: disentangled_doe_tiny starts from another run (init_from), which trials cannot; use another"),
        ("base: wrong\nspace: {batch_size: {int: [16, 64]}}\n",
         "base: experiments/wrong.yaml: epoch: unknown key, did you mean 'epochs'?"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_sweep(text: str, message: str) -> None:
    Path("experiments/wrong.yaml").write_text("model: vgg13\nepoch: 3\n")
    write("mine", text)
    assert mistakes("mine") == [f"sweeps/mine.yaml: {message}"]


def test_a_grid_is_counted_before_it_is_made() -> None:
    most = ",".join(map(str, range(1, 101)))
    keys = ("batch_size", "model.resizer.channels", "model.resizer.blocks")
    space = ", ".join(f"{key}: {{choice: [{most}]}}" for key in keys)
    found = mistakes("tiny", "search=grid", f"space={{{space}}}")
    assert found == ["command line: search: grid has 1,000,000 points, 10,000 at most; use tpe or random"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trails=3", "trails: unknown key, did you mean 'trials'?"),
        ("grace_epochs=21", "grace_epochs: 21, but the base has 20 epochs; lower it"),
        ("search=grid", "search: grid needs choices only, loss.alpha has a range; use tpe or random"),
        ("changes={base: doe}", "changes: base: only a file has one; write it into a file of experiments/"),
        ("base=vgg13_smll", "base: experiments/vgg13_smll.yaml: no such experiment, did you mean 'vgg13_small'?"),
        ("space={}", "space: holds no key to search; give at least one"),
        ("changes.epoch=9", "epoch: unknown key, did you mean 'epochs'?"),
    ],
)
def test_a_change_that_cannot_work(change: str, message: str) -> None:
    """The same mistake in the file is told with the file's name."""
    assert mistakes("tiny", change) == [f"command line: {message}"]
    key, _, text = change.partition("=")
    if "." not in key:
        tree = {**read_yaml(Path("sweeps/tiny.yaml"), ""), key: parse_value(text, change)}
        assert mistakes(write("mine", **tree)) == [f"sweeps/mine.yaml: {message}"]


def test_mistakes_are_found_all_at_once() -> None:
    words = ["tiny", "grace_epochs=99", "space={optimizer.lrr: {float: [0, 1]}, optimizer.lr: {int: [1, 2]}}"]
    assert mistakes(*words) == [
        "command line: grace_epochs: 99, but the base has 20 epochs; lower it",
        "sweeps/tiny.yaml: space.optimizer.lrr: unknown key, did you mean 'lr'?",
        "sweeps/tiny.yaml: space.optimizer.lr: an int range, but the base has 0.0005; use float or log",
    ]
    (line,) = mistakes("sample", "changes.optimizer.lr=3e-4")  # the space must hold the base as it is changed
    assert line.startswith("sweeps/sample.yaml: space.optimizer.lr: does not contain the base's 0.0003, ")


# Layers


def test_changes_are_laid_over_the_base_and_the_command_line_over_both() -> None:
    changes = {"loss": "pdls", "optimizer": {"lr": 1e-3}, "epochs": 9, "resources": {"workers": 2}}
    write("mine", base="swin_nr_fpdls_tiny", changes=changes, space=LR)
    base = load("mine", machine={"workers": 3, "cpus_per_worker": 3})[2]
    own = experiments.load(["swin_nr_fpdls_tiny"], {})["swin_nr_fpdls_tiny"].run
    optimizer = own.optimizer.model_copy(update={"lr": 1e-3})
    assert base.run == own.model_copy(update={"loss": Pdls(), "optimizer": optimizer, "epochs": 9})
    assert (base.resources.workers, base.resources.cpus_per_worker) == (2, 3)  # the machine is below everything
    assert base.origins["epochs"] == "sweeps/mine.yaml: changes"
    assert base.origins["batch_size"] == "experiments/swin_nr_fpdls_tiny.yaml"
    words = ["changes.loss.alpha=.7", "changes.schedule={name: constant, warmup_epochs: 0}"]
    again = load("mine", *words)[2]
    assert again.run == base.run.model_copy(update={"schedule": Constant(warmup_epochs=0), "loss": Pdls(alpha=0.7)})
    assert again.origins["schedule.name"] == COMMAND_LINE
    assert again.origins["optimizer.lr"] == "sweeps/mine.yaml: changes"
    # as a whole they take the place of those in the file
    found = load("mine", "changes={epochs: 7}", "changes.seed=5")[2].run
    assert found == own.model_copy(update={"epochs": 7, "seed": 5})


def test_the_command_line_is_laid_over_the_file() -> None:
    _, sweep, _, space = load("tiny", "trials=3", "hours=null", "space.loss.gamma={choice: [0.0, 2.0]}", "trials=5")
    assert (sweep.trials, sweep.hours, sweep.grace_epochs) == (5, None, 4)
    assert list(space) == ["loss.alpha", "loss.gamma", "model.resizer.blocks", "model.resizer.channels"]
    assert (space["loss.gamma"], space["loss.alpha"]) == ({"choice": [0.0, 2.0]}, {"float": [0.5, 1.0]})
    whole = load("tiny", "space={loss.alpha: {float: [0.5, 1.0]}}", "space.optimizer.lr={log: [1e-4, 1e-2]}")[3]
    assert list(whole) == ["loss.alpha", "optimizer.lr"]


# What is kept of it


def finished(words: list[str], point: dict[str, Any]) -> tuple[Run, Path]:
    """The run of a point, and the folder of a sweep of which it is the result."""
    plan = sweeps.plan(words, {}, "d" * 16)
    sweeps.begin(plan)
    rows = tuple({"epoch": i + 1, "val_accuracy": 0.5, "seconds": 1.0} for i in range(plan.base.run.epochs))
    best = Trial(2, {**plan.published, **point}, DONE, None, Path(), rows)
    result = sweeps.conclude(plan, [Trial(1, plan.published, PRUNED, None, Path(), rows[:1]), best], [])
    write_json(plan.folder / "result.json", result)
    return plan.run(best.point), plan.folder


@pytest.mark.parametrize(
    ("words", "point"),
    [
        (["tiny", "changes.epochs=9", "changes.optimizer=sgd"], {"loss.gamma": 0.0, "model.resizer.blocks": 3}),
        (["fpdls"], {"loss": "label_smoothing", "loss.label_smoothing.alpha": 0.6, "augment": 0.5,
                     "model.resizer": '{"size": 256, "scale": null}', "model.stn": False}),
        (["sample", "space={model.batch_norm: {choice: [true, false]}, clip_grad_norm: {choice: [1.0, null]}}"],
         {"model.batch_norm": False, "clip_grad_norm": None}),
    ],
)  # fmt: skip
def test_apply_writes_an_experiment_that_is_the_best_run(words: list[str], point: dict[str, Any], here: Here) -> None:
    """Also if the base has changed since; but over no file."""
    run, folder = finished(words, point)
    assert "fer train better" in here("sweep", "apply", words[0], "--as", "better").stdout
    found = experiments.load(["better"], {})["better"]
    assert found.run == run
    assert found.head == f"sweep {folder.name}, trial 2: val 50.00 %, not confirmed\nfer train better"
    tree = read_yaml(found.path, "")
    assert set(tree) <= {key.partition(".")[0] for key in point} | {"base", "epochs", "optimizer"}  # the rest is there
    path = experiments.path_of(tree["base"])
    path.write_text(path.read_text().replace("\nepochs: ", "\nepochs: 1") + "ema_decay: 0.5\n")
    assert here("sweep", "apply", words[0]).returncode == 0
    assert experiments.load([f"{words[0]}_best"], {})[f"{words[0]}_best"].run == run
    again = here("sweep", "apply", words[0])
    message = f"error: experiments/{words[0]}_best.yaml: exists already; choose another name with --as\n"
    assert (again.returncode, again.stderr) == (2, message)


def test_apply_reads_a_sweep_of_format_1(here: Here) -> None:
    """As the version before wrote it: a flat run, and no key `format`."""
    _, folder = finished(["sample"], {})
    flat = json.loads((ROOT / "tests/golden/format1/configs.json").read_text())["vgg13_small"] | {"lr": 4e-3}
    for name in ("sweep.json", "result.json"):
        content = json.loads((folder / name).read_text()) | {"run": flat}
        new = ("format", "epochs") if name == "sweep.json" else ("format",)
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if key not in new}))
    shown = here("sweep", "status", "sample").stdout
    assert "2 trials (1 done, 1 pruned), 0.2 min of training, 11 of 20 epochs" in shown
    assert here("sweep", "apply", "sample", "--as", "old").returncode == 0
    found = experiments.load(["old"], {})["old"].run
    assert (found.optimizer.lr, found.epochs, found.model.name) == (4e-3, 10, "vgg13")
