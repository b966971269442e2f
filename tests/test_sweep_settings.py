"""sweeps/*.yaml: every mistake in one line with its file, `changes` over the base, the command line over the file."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_sweep_folder import concluded

from fer.errors import UserError
from fer.losses import Pdls
from fer.schedule import Constant
from pipelines import cli, experiments
from pipelines.experiments import COMMAND_LINE
from pipelines.params import parse_value, read_yaml, yaml_of
from pipelines.sweeps import settings
from pipelines.sweeps.settings import load

SHIPPED = sorted(path.stem for path in ROOT.glob("sweeps/*.yaml"))
LR = {"optimizer.lr": {"log": [1e-4, 1e-2]}}
Here = Callable[..., subprocess.CompletedProcess]
pytestmark = pytest.mark.usefixtures("recipes")


def write(name: str, text: str = "", **tree: Any) -> str:
    """Write sweeps/`name`.yaml of text or of a table of keys; its path."""
    path = Path("sweeps") / f"{name}.yaml"
    path.write_text(text or yaml_of(tree))
    return str(path)


def mistakes(*words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(list(words), {})
    return str(caught.value).splitlines()


def test_every_shipped_sweep_loads_and_a_file_may_lie_elsewhere() -> None:
    assert SHIPPED == settings.known() == ["fpdls", "sample", "tiny"]
    for name in SHIPPED:
        found, sweep, base, space = load([name], {})
        assert (found, [*space]) == (name, [*sweep.space])
        assert base.run == experiments.load([sweep.base], {})[sweep.base].run
    Path("mine.yml").write_text(yaml_of({"base": "vgg13_small", "space": LR}))
    name, sweep, base, _ = load(["mine.yml"], {})
    assert (name, sweep.base, base.name) == ("mine", "vgg13_small", "vgg13_small")


# Mistakes


def test_a_sweep_cannot_have_the_name_of_a_command() -> None:
    assert {command.name for command in cli.sweeps.registered_commands} == set(settings.COMMANDS)
    for name in (*settings.COMMANDS, "two words"):
        (line,) = mistakes(path := write(name, base="vgg13_small", space=LR))
        assert line.startswith(f"{path}: a sweep's name is made of up to 100 letters, digits, _ and -, and is none of ")


MOST = ",".join(map(str, range(1, 101)))
MILLION = ", ".join(f"{key}: {{choice: [{MOST}]}}" for key in ("batch_size", "model.resizer.channels", "loss.gamma"))


@pytest.mark.parametrize(
    ("text", "words", "lines"),
    [
        ("", ["nope"], ["sweeps/nope.yaml: no such sweep; known: fpdls, sample, tiny"]),
        ("", ["elsewhere/tiny.yaml"], ["elsewhere/tiny.yaml: no such sweep, did you mean 'tiny'?"]),
        ("", ["tiny", "sample"], ["fer sweep: name one sweep, one of fpdls, sample, tiny"]),
        ("# nothing\n", ["mine"], ["sweeps/mine.yaml: holds no keys; write at least its base and space there"]),
        ("base: vgg13_small\n", ["mine"], ["sweeps/mine.yaml: space: missing"]),
        ("base: disentangled_doe_tiny\nspace: {batch_size: {int: [8, 64]}}\n", ["mine"],
         ["sweeps/mine.yaml: base: disentangled_doe_tiny starts from another run (init_from), which trials cannot; use "
          "another"]),
        ("", ["tiny", "changes.teacher=x", "space={teacher_share: {choice: [0.1, 0.9]}}"],
         ["sweeps/tiny.yaml: base: swin_nr_fpdls_tiny learns from another run (teacher), which trials cannot; use "
          "another",
          "command line: space.teacher_share: this key cannot be searched; set it in the base"]),
        ("base: wrong\nspace: {batch_size: {int: [16, 64]}}\n", ["mine"],
         ["sweeps/mine.yaml: base: experiments/wrong.yaml: epoch: unknown key, did you mean 'epochs'?"]),
        ("", ["tiny", "search=grid", f"space={{{MILLION}}}"],  # counted before it is made
         ["command line: search: grid has 1,000,000 points, 10,000 at most; use tpe or random"]),
        ("", ["tiny", "grace_epochs=99", "space={optimizer.lrr: {float: [0, 1]}, optimizer.lr: {int: [1, 2]}}"],
         ["command line: grace_epochs: 99, but the base has 20 epochs; lower it",
          "command line: space.optimizer.lrr: unknown key, did you mean 'lr'?",
          "command line: space.optimizer.lr: an int range, but the base has 0.0005; use float or log"]),
        ("", ["sample", "changes.optimizer.lr=3e-4"],  # the space must hold the base as it is changed
         ["sweeps/sample.yaml: space.optimizer.lr: does not contain the base's 0.0003, which is the first trial; add "
          "it to the choices"]),
    ],
)  # fmt: skip
def test_all_mistakes_are_told_with_their_file(text: str, words: list[str], lines: list[str]) -> None:
    Path("experiments/wrong.yaml").write_text("model: vgg13\nepoch: 3\n")
    if text:
        write("mine", text)
    assert mistakes(*words) == lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trails=3", "trails: unknown key, did you mean 'trials'?"),
        ("search=grid", "search: grid needs choices only, loss.alpha has a range; use tpe or random"),
        ("changes={base: doe}", "changes: base: only a file has one; write it into a file of experiments/"),
        ("base=vgg13_smll", "base: experiments/vgg13_smll.yaml: no such experiment, did you mean 'vgg13_small'?"),
        ("space={}", "space: holds no key to search; give at least one"),
        ("changes={epoch: 9}", "changes: epoch: unknown key, did you mean 'epochs'?"),
    ],
)
def test_the_same_mistake_on_the_command_line_and_in_the_file(change: str, message: str) -> None:
    assert mistakes("tiny", change) == [f"command line: {message}"]
    key, _, text = change.partition("=")
    tree = {**read_yaml(Path("sweeps/tiny.yaml"), ""), key: parse_value(text, change)}
    assert mistakes(write("mine", **tree)) == [f"sweeps/mine.yaml: {message}"]


def test_the_base_is_in_experiments_where_apply_finds_it() -> None:
    Path("elsewhere.yaml").write_text(Path("experiments/vgg13_small.yaml").read_text())
    told = "base: elsewhere.yaml: is not in experiments; move it there, and give its name alone"
    assert mistakes("tiny", "base=elsewhere.yaml") == [f"command line: {told}"]
    assert settings.load(["sample", "base=experiments/vgg13_small.yaml"], {})[2].name == "vgg13_small"


def test_a_key_on_the_command_line_is_told_there() -> None:
    assert mistakes("tiny", "changes.epoch=9") == mistakes("tiny", "changes={epoch: 9}")
    (line,) = mistakes("tiny", "space.optimizer.lrr={float: [0, 1]}")
    assert line == "command line: space.optimizer.lrr: unknown key, did you mean 'lr'?"


# Layers


def test_changes_are_laid_over_the_base_and_the_command_line_over_both() -> None:
    changes = {"loss": "pdls", "optimizer": {"lr": 1e-3}, "epochs": 9, "resources": {"workers": 2}}
    write("mine", base="swin_nr_fpdls_tiny", changes=changes, space=LR)
    base = load(["mine"], {"workers": 3, "cpus_per_worker": 3})[2]
    own = experiments.load(["swin_nr_fpdls_tiny"], {})["swin_nr_fpdls_tiny"].run
    optimizer = own.optimizer.model_copy(update={"lr": 1e-3})
    assert base.run == own.model_copy(update={"loss": Pdls(), "optimizer": optimizer, "epochs": 9})
    assert (base.resources.workers, base.resources.cpus_per_worker) == (2, 3)  # the machine is below everything
    words = ["mine", "changes.loss.alpha=.7", "changes.schedule={name: constant, warmup_epochs: 0}"]
    again = load(words, {})[2]
    assert again.run == base.run.model_copy(update={"schedule": Constant(warmup_epochs=0), "loss": Pdls(alpha=0.7)})
    assert [again.origins[key] for key in ("epochs", "batch_size", "schedule.name")] == [
        "sweeps/mine.yaml: changes", "experiments/swin_nr_fpdls_tiny.yaml", f"{COMMAND_LINE}: changes"
    ]  # fmt: skip
    # as a whole they take the place of those in the file
    found = load(["mine", "changes={epochs: 7}", "changes.seed=5"], {})[2].run
    assert found == own.model_copy(update={"epochs": 7, "seed": 5})


def test_the_command_line_is_laid_over_the_file() -> None:
    words = ["tiny", "trials=3", "hours=null", "space.loss.gamma={choice: [0.0, 2.0]}", "trials=5"]
    _, sweep, _, space = load(words, {})
    assert (sweep.trials, sweep.hours, sweep.grace_epochs) == (5, None, 4)
    assert list(space) == ["loss.alpha", "loss.gamma", "model.resizer.blocks", "model.resizer.channels"]
    assert (space["loss.gamma"], space["loss.alpha"]) == ({"choice": [0.0, 2.0]}, {"float": [0.5, 1.0]})
    whole = load(["tiny", "space={loss.alpha: {float: [0.5, 1.0]}}", "space.optimizer.lr={log: [1e-4, 1e-2]}"], {})[3]
    assert list(whole) == ["loss.alpha", "optimizer.lr"]


# What is kept of it


@pytest.mark.parametrize(
    ("words", "point"),
    [
        (["tiny", "changes.epochs=9", "changes.optimizer=sgd", "changes.data=other"],
         {"loss.gamma": 0.0, "model.resizer.blocks": 3}),
        (["fpdls"], {"loss": "label_smoothing", "loss.label_smoothing.alpha": 0.6, "augment": 0.5,
                     "model.resizer": '{"size": 256, "scale": null}', "model.stn": False}),
        (["sample", "space={model.batch_norm: {choice: [true, false]}, clip_grad_norm: {choice: [1.0, null]}}"],
         {"model.batch_norm": False, "clip_grad_norm": None}),
    ],
)  # fmt: skip
def test_apply_writes_an_experiment_that_is_the_best_run(words: list[str], point: dict[str, Any], here: Here) -> None:
    """Also if the base has changed since; but over no file."""
    plan, _ = concluded(words, point)
    run, best = plan.run({**plan.published, **point}), f"{words[0]}_best"
    assert "fer train better" in here("sweep", "apply", words[0], "--as", "better").stdout
    found = experiments.load(["better"], {})["better"]
    assert (found.run, found.data) == (run, plan.base.data)
    assert found.head == f"Trial 2 of sweep {plan.folder.name}. Own score: val 50.00 %, not confirmed\nfer train better"
    tree = read_yaml(found.path, "")
    named = {key.partition(".")[0] for key in point}
    assert set(tree) <= named | {"base", "data", "epochs", "optimizer"}  # the rest is there
    path = experiments.path_of(tree["base"])
    path.write_text(path.read_text().replace("\nepochs: ", "\nepochs: 1") + "ema_decay: 0.5\n")
    assert here("sweep", "apply", words[0]).returncode == 0
    assert experiments.load([best], {})[best].run == run
    again = here("sweep", "apply", words[0])
    message = f"error: experiments/{best}.yaml: exists already; choose another name with --as\n"
    assert (again.returncode, again.stderr) == (2, message)


def test_apply_reads_a_sweep_of_format_1(here: Here) -> None:
    """As the version before wrote it: a flat run, and no key `format`."""
    plan, _ = concluded(["sample"], {})
    flat = json.loads((ROOT / "tests/golden/format1/configs.json").read_text())["vgg13_small"] | {"lr": 4e-3}
    for path, new in ((plan.folder / "sweep.json", {"format", "epochs"}), (plan.folder / "result.json", {"format"})):
        content = json.loads(path.read_text()) | {"run": flat}
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in new}))
    shown = here("sweep", "status", "sample").stdout
    assert "2 trials (1 done, 1 pruned), 0.2 min of training, 11 of 20 epochs" in shown
    assert here("sweep", "apply", "sample", "--as", "old").returncode == 0
    found = experiments.load(["old"], {})["old"].run
    assert (found.optimizer.lr, found.epochs, found.model.name) == (4e-3, 10, "vgg13")
