"""Experiments: which layer a value comes from, every mistake in one line, and files that are read as written."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, small_run

from fer.errors import UserError
from fer.losses import LOSSES
from fer.models import MODELS
from fer.optimizer import OPTIMIZERS
from fer.resources import Resources
from fer.run import Run
from pipelines import experiments, params
from pipelines.experiments import COMMAND_LINE, DEFAULT, MACHINE, Experiment, Recipe, head, load, values, write
from pipelines.params import yaml_of

SHIPPED = sorted(path.stem for path in ROOT.glob("experiments/*.yaml"))


pytestmark = pytest.mark.usefixtures("recipes")


def experiment(name: str, text: str = "", **tree: Any) -> str:
    """Write experiments/`name`.yaml of text or of a table of keys; its path."""
    path = Path("experiments") / f"{name}.yaml"
    path.write_text(text or yaml_of(tree))
    return str(path)


def one(*words: str, machine: dict[str, Any] | None = None) -> Experiment:
    """The last experiment that these words bring: the named one, where one is named."""
    return list(load(list(words), machine or {}).values())[-1]


def mistakes(*words: str, machine: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(list(words), machine or {})
    return str(caught.value).splitlines()


def at(found: Experiment, path: str) -> tuple[Any, str]:
    """A value and where it comes from."""
    (row,) = [row for row in values(found) if row[0] == path]
    return row[1], row[2]


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# Precedence

LAYERS = ["params.yaml", "experiments/lowest.yaml", "experiments/lower.yaml", "experiments/x.yaml", "command line"]


@pytest.mark.parametrize("key", ["resources.readers", "optimizer.weight_decay", "epochs"])
def test_the_last_layer_that_says_something_wins(key: str) -> None:
    for saying in itertools.product([False, True], repeat=5):
        keys = [experiments.tree_of(f"{key}={10 + place}") if says else {} for place, says in enumerate(saying)]
        machine = keys[0].get("resources", {})
        experiment("lowest", **{"model": "vgg13", "seed": 1} | keys[1])
        experiment("lower", **{"base": "lowest"} | keys[2])
        experiment("x", **{"base": "lower"} | keys[3])
        found = one("x", *([f"{key}={10 + 4}"] if saying[4] else []), machine=machine)
        default = dict(flat(Run(model=found.run.model).model_dump() | {"resources": Resources().model_dump()}))[key]
        # the machine says nothing of runs
        places = [place for place, says in enumerate(saying) if says and (place or machine)]
        assert at(found, key) == ((10 + places[-1], LAYERS[places[-1]]) if places else (default, DEFAULT))
        assert at(found, "seed") == (1, "experiments/lowest.yaml")


def test_layers_leave_each_others_keys_in_a_section_alone() -> None:
    experiment("lower", model="vgg13", optimizer={"lr": 0.1}, augment={"flip": 0.1, "scale": 0.2})
    experiment("x", base="lower", optimizer={"weight_decay": 0.3}, augment={"scale": 0.3}, resources={"readers": 5})
    found = one("x", "augment.erasing=0.4", "resources.restarts=6", machine={"device": "cpu", "readers": 1})
    assert found.run.optimizer.model_dump() == {"name": "adamw", "lr": 0.1, "weight_decay": 0.3}
    assert found.run.augment.model_dump(exclude_defaults=True) == {"flip": 0.1, "scale": 0.3, "erasing": 0.4}
    assert found.resources == Resources(device="cpu", readers=5, restarts=6)
    assert {path: source for path, source in found.origins.items() if source != "experiments/lower.yaml"} == {
        "resources.device": MACHINE,
        "resources.readers": "experiments/x.yaml",
        "optimizer.weight_decay": "experiments/x.yaml",
        "augment.scale": "experiments/x.yaml",
        "augment.erasing": COMMAND_LINE,
        "resources.restarts": COMMAND_LINE,
    }
    assert at(found, "optimizer.name") == ("adamw", DEFAULT)  # nobody named it
    assert at(found, "optimizer.lr") == (0.1, "experiments/lower.yaml")


def test_a_value_on_the_command_line_is_yaml_and_the_last_one_counts() -> None:
    experiment("x", model="vgg13")
    words = ["optimizer.lr=2", "optimizer.lr=1", "clip_grad_norm=", "input.mean=[0.4]", "augment={flip: 0.25}"]
    found = one("x", *words)
    for key, value in {"optimizer.lr": 1.0, "clip_grad_norm": None, "input.mean": [0.4], "augment.flip": 0.25}.items():
        assert at(found, key) == (value, COMMAND_LINE)


# Sections that are chosen by name
SGD = {"name": "sgd", "lr": 0.5, "momentum": 0.1}


def test_another_name_starts_a_section_anew_and_what_it_drops_is_told() -> None:
    experiment("lower", model="vgg13", optimizer=SGD, loss={"name": "focal", "gamma": 1.0})
    experiment("middle", base="lower", optimizer={"name": "adam", "weight_decay": 0.2})
    experiment("x", base="middle")
    found = one("x", "optimizer.weight_decay=0.3", "optimizer.name=sgd")
    assert found.run.optimizer == OPTIMIZERS["sgd"](weight_decay=0.3)  # what was dropped does not come back
    assert at(found, "optimizer.lr") == (OPTIMIZERS["sgd"]().lr, DEFAULT)
    assert found.dropped == [
        "optimizer.lr of experiments/lower.yaml: experiments/middle.yaml takes optimizer adam",
        "optimizer.momentum of experiments/lower.yaml: experiments/middle.yaml takes optimizer adam",
        "optimizer.weight_decay of experiments/middle.yaml: command line takes optimizer sgd",
    ]
    assert at(found, "loss.gamma") == (1.0, "experiments/lower.yaml")
    experiment("x", model="vgg13", optimizer={"lr": 0.1})  # of adamw, the default, which nobody named
    found = one("x", "optimizer=sgd")
    assert found.run.optimizer == OPTIMIZERS["sgd"]()
    assert found.dropped == ["optimizer.lr of experiments/x.yaml: command line takes optimizer sgd"]


@pytest.mark.parametrize("change", ["optimizer=sgd", "optimizer.name=sgd", "optimizer={name: sgd}", "optimizer={}"])
def test_the_same_name_keeps_the_keys(change: str) -> None:
    experiment("x", model="vgg13", optimizer=SGD)
    found = one("x", change)
    assert (found.run.optimizer, found.dropped) == (OPTIMIZERS["sgd"](lr=0.5, momentum=0.1), [])
    experiment("x", model="vgg13", optimizer={"lr": 0.5})  # of adamw, the default
    found = one("x", "optimizer=adamw")
    assert (found.run.optimizer, found.dropped) == (OPTIMIZERS["adamw"](lr=0.5), [])


def test_a_section_of_a_section_starts_anew() -> None:
    model = {"name": "classifier", "backbone": {"name": "efficientnet_lite0", "bn_momentum": 0.2}, "head": [8]}
    experiment("x", model=model | {"resizer": {"name": "neural", "size": 64, "blocks": 2}})
    found = one("x", "model.backbone=resnet50", "model.backbone.weights=", "model.resizer.size=32")
    own = {"backbone": {"name": "resnet50", "weights": None}, "resizer": {"name": "neural", "size": 32, "blocks": 2}}
    assert found.run.model == MODELS["classifier"].model_validate(model | own)
    assert found.dropped == ["model.backbone.bn_momentum of experiments/x.yaml: command line takes backbone resnet50"]
    found = one("x", "model=vgg13")
    assert found.run.model == MODELS["vgg13"]()
    assert [line.partition(" of ")[0] for line in found.dropped] == [
        "model.backbone.name", "model.backbone.bn_momentum", "model.head", "model.resizer.name", "model.resizer.size",
        "model.resizer.blocks",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["loss=focal", "loss.name=focal", "loss={name: focal}"])
def test_a_name_and_its_keys_on_the_command_line_stand_in_any_order(name: str) -> None:
    experiment("x", model="vgg13")
    for words in itertools.permutations([name, "loss.gamma=1", "x"]):
        found = one(*words)
        assert (found.run.loss, found.dropped) == (LOSSES["focal"](gamma=1.0), [])


# Users' mistakes

KNOWN = ", ".join(sorted(Recipe.model_fields))
SWIN = {"name": "swin_tiny_patch4_window7_224", "weights": None}
X: dict[str, Any] = SMALL  # a VGG13
Y: dict[str, Any] = {"model": {"name": "classifier", "backbone": SWIN}, "input": {"image_size": 224}}
WRONG: dict[str, list[str]] = {
    "x optimizer.lrr=3": ["optimizer.lrr: unknown key of 'adamw', did you mean 'lr'?"],
    "x optimizer.lr.x=3": ["optimizer.lr: should be a valid number"],
    "x models.x.epochs=3": ["models: unknown key, did you mean 'model'?"],
    "x loss=": ["loss: should be a table of keys, got None"],
    "x schedule=step": ["schedule.step_epochs: missing", "schedule.step_factors: missing"],
    "x resources.device=gpu": ["resources.device: should be 'auto', 'cpu' or 'cuda', got 'gpu'"],
    "x batch_size=16; resources.workers=3": ["batch_size: 16 does not divide by resources.workers 3"],
    "x sam_rho=0.05; precision=fp16": ["sam_rho: needs precision fp32 or bf16, as fp16 scales its gradients"],
    "y model.backbone.depths=[2, 0, 2]": ["model.backbone.depths.1: should be greater than 0, got 0"],
    "x base=y": ["base: only a file has one; write it into a file of experiments/"],
    "x epochs=0; optimizer=sdg; augment.flip=2; zzz=1": [
        f"zzz: unknown key; known: {KNOWN}",
        "augment.flip: should be less than or equal to 1, got 2",
        "epochs: should be greater than 0, got 0",
        "optimizer.name: unknown optimizer 'sdg', did you mean 'sgd'?",
    ],
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_one_line_behind_the_command_line_or_its_file(text: str) -> None:
    """On the command line, and in a file of which the named one is a change."""
    experiment("x", **X)
    experiment("y", **Y)
    name, changes = text.split(" ", 1)
    lines = WRONG[text]
    assert sorted(mistakes(name, *changes.split("; "))) == sorted(f"{COMMAND_LINE}: {line}" for line in lines)
    if changes.startswith("base="):
        return
    layers = experiments.Layers(Recipe)
    for change in ["base=" + name, *changes.split("; ")]:
        layers.lay(experiments.tree_of(change), "")
    path = experiment("wrong", **layers.tree)
    experiment("z", base="wrong")
    assert sorted(mistakes("z")) == sorted(f"{path}: {line}" for line in lines)


def test_a_fault_stands_where_its_key_was_set_last() -> None:
    """And in the experiment's own file where it is a default."""
    experiment("x", model="vgg13", batch_size=15, input={"image_size": 16})
    uneven = ["experiments/x.yaml: batch_size: 15 does not divide by resources.workers 2"]
    assert mistakes("x", "resources.workers=2") == mistakes("x", machine={"workers": 2}) == uneven
    assert mistakes("x", machine={"gpus_per_worker": 1.5}) == [
        "params.yaml: resources.gpus_per_worker: above 1 must be a whole number, got 1.5"
    ]
    assert mistakes("x", "epochs=1") == ["experiments/x.yaml: schedule.warmup_epochs: 1 leaves nothing of epochs 1"]
    experiment("lower", model="vgg13", schedule="step")
    experiment("x", base="lower", schedule={"warmup_epochs": 0})
    for words, place in ((["x"], "experiments/x.yaml"), (["x", "schedule=step"], "command line")):
        assert mistakes(*words) == [f"{place}: schedule.step_{key}: missing" for key in ("epochs", "factors")]


def test_faults_of_several_files_are_reported_at_once() -> None:
    experiment("lower", model="vgg13", epochs=0)
    experiment("x", base="lower", precision="fp8")
    experiment("y", model="vgg")
    assert mistakes("x", "y", "ema_decay=1") == [
        "experiments/lower.yaml: epochs: should be greater than 0, got 0",
        "command line: ema_decay: should be less than 1, got 1",
        "experiments/x.yaml: precision: should be 'fp32', 'bf16' or 'fp16', got 'fp8'",
        "experiments/y.yaml: model.name: unknown model 'vgg', did you mean 'vgg13'?",
    ]


def test_words_are_names_files_and_changes() -> None:
    words = ["a", "seed=3", "b/c.yaml", "optimizer.lr=1e-3", "b/lr=3.yml", "model=", "input.mean=[0.1, 0.2]"]
    names, changes = experiments.split(words)
    assert names == ["a", "b/c.yaml", "b/lr=3.yml"]
    assert changes == [word for word in words if word not in names]
    assert load(["seed=3"], {}) == {}
    for word in ("=3", "epochs =3", "batch-size=3", "1=2", "--seed=3"):
        assert mistakes("vgg13_small", word) == [f"{word}: write it as key=value, for example optimizer.lr=3e-4"]
    assert mistakes("vgg13_small", "optimizer.lr=[1") == ["optimizer.lr=[1: the value is not valid YAML"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# a comment alone\n", " holds no keys; write at least its model there"),
        ("seed: 3\n", " model: missing"),
        ("model: vgg13\nbase: 3\n", " base: should be the name of an experiment, got 3"),
        ("model:\n  width: 0.5\n", " model.name: missing"),
        ("base: vgg13_smal\n", " base: experiments/vgg13_smal.yaml: no such experiment, did you mean 'vgg13_small'?"),
    ],
)
def test_a_file_that_is_no_experiment(text: str, message: str) -> None:
    path = experiment("x", text)
    (found,) = mistakes("x")
    assert found.startswith(f"{path}:{message}")


def test_bases_in_a_circle() -> None:
    for name, base in ("ab", "bc", "cb"):
        experiment(name, base=base)
    assert mistakes("a") == ["experiments/b.yaml: base: a -> b -> c -> b is a circle"]


# Names and files


def test_an_unknown_name() -> None:
    assert mistakes("zzz") == [f"experiments/zzz.yaml: no such experiment; known: {', '.join(SHIPPED)}"]
    assert mistakes("doe", "elsewhere/doe.yml") == ["elsewhere/doe.yml: no such experiment, did you mean 'doe'?"]
    remedy = "an experiment's name is made of up to 100 letters, digits, _ and -; rename the file"
    for stem in ("a b", "a.b", "é", ""):  # which does not do for a folder
        Path(f"{stem}.yaml").write_text("base: doe\n")
        assert mistakes(f"./{stem}.yaml") == [f"{stem}.yaml: {remedy}"]


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\udcff"])
def test_what_cannot_be_the_name_of_a_file(name: str) -> None:
    for word in (name, f"{name}.yaml", f"/{name}/x.yml"):
        with pytest.raises(UserError, match="no such experiment"):
            load([word], {})


def test_a_file_anywhere(recipes: Path) -> None:
    """Its name is that of the file; its base and its start stand in experiments/, unless that is named, too."""
    Path("elsewhere").mkdir()
    for name in ("elsewhere/mine.yaml", "elsewhere/yours.yml", str(recipes / "third.yaml")):
        path = Path(name)
        path.write_text(yaml_of({"base": "disentangled_doe_tiny", "epochs": 3}))
        found = load([name, "batch_size=16"], {})
        assert list(found) == ["emotion_encoder_tiny", path.stem]
        assert (found[path.stem].name, found[path.stem].path) == (path.stem, path)
        assert at(found[path.stem], "epochs") == (3, name)
    Path("elsewhere/first.yaml").write_text(yaml_of({"base": "emotion_encoder_tiny", "epochs": 2}))
    experiment("second", base="disentangled_doe_tiny", init_from="first")
    (line,) = mistakes("second")
    assert line.startswith("second: init_from: experiments/first.yaml: no such experiment; known: ")
    found = load(["second", "elsewhere/first.yaml"], {})
    assert list(found) == ["first", "second"]
    assert found["first"].run.epochs == 2


def test_one_name_for_two_files_is_refused_and_one_file_may_be_named_twice(recipes: Path) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/doe.yaml").write_text("base: doe_tiny\n")
    assert mistakes("doe", "elsewhere/doe.yaml") == [
        "elsewhere/doe.yaml: experiments/doe.yaml has the same name; rename one of them"
    ]
    same = ["doe", "experiments/doe.yaml", "./experiments/doe.yaml", str(recipes / "experiments/doe.yaml")]
    assert list(load(same, {})) == ["doe"]


# Several experiments


def test_a_key_applies_to_each_and_must_fit_each() -> None:
    found = load(["vgg13_small", "vgg13_ferplus", "epochs=41", "resources.readers=3"], {})
    assert [(one.run.epochs, one.resources.readers) for one in found.values()] == [(41, 3), (41, 3)]
    assert [one.run.optimizer.name for one in found.values()] == ["adamw", "sgd"]  # else they stay what they are
    only_one = ["vgg13_small", "vgg13_ferplus", "optimizer.momentum=0.5"]
    assert mistakes(*only_one) == ["command line: optimizer.momentum: unknown key of 'adamw'; known: lr, weight_decay"]
    assert mistakes(*SHIPPED, "zzz=1") == [f"command line: zzz: unknown key; known: {KNOWN}"]  # told once


# A run that starts from another

CHAIN: dict[str, Any] = {"base": "vit_se_tiny", "init_from": "first", "epochs": 9, "seed": 5}


def chain() -> None:
    experiment("first", base="vit_se_tiny", seed=1)
    experiment("second", **CHAIN)


def test_the_run_that_another_starts_from_comes_first_and_gets_the_seed_alone_unless_named() -> None:
    chain()
    words = ["seed=7", "epochs=6", "resources.readers=3"]

    def loaded(*words: str) -> dict[str, tuple[int, int, int]]:
        found = load(list(words), {"readers": 4})
        return {name: (one.run.seed, one.run.epochs, one.resources.readers) for name, one in found.items()}

    assert loaded("second") == {"first": (1, 40, 4), "second": (5, 9, 4)}
    assert list(loaded("second")) == ["first", "second"]
    assert loaded("second", *words) == {"first": (7, 40, 4), "second": (7, 6, 3)}
    for names in (["first", "second"], ["second", "first"]):
        assert loaded(*names, *words) == {"first": (7, 6, 3), "second": (7, 6, 3)}
    experiment("third", **CHAIN | {"init_from": "second"})
    experiment("fourth", **CHAIN | {"init_from": "first"})
    assert list(load(["third", "fourth"], {})) == ["first", "second", "third", "fourth"]
    assert [seed for seed, _, _ in loaded("third", "seed=8").values()] == [8, 8, 8]


def test_a_start_that_cannot_be() -> None:
    chain()
    another = "init_from: first has another backbone (vit_base_patch16_224_in21k); give both the same name and settings"
    for word, line in {
        "init_from=frist": "second: init_from: experiments/frist.yaml: no such experiment, did you mean 'first'?",
        "init_from=a/b.yaml": "second: init_from: should be the name of an experiment, got 'a/b.yaml'",
        "init_from=second": "second: init_from: second -> second is a circle; set one of them to null",
        "init_from=vgg13_small": "command line: init_from: vgg13_small has no backbone; set it to null",
        "model.backbone.depth=3": f"experiments/second.yaml: {another}",
    }.items():
        assert mistakes("second", word) == [line]
    assert list(load(["second", "model.backbone.dropout=0.0"], {})) == ["first", "second"]  # a default, written out
    experiment("first", base="vit_se_tiny", epochs=0)
    wrong = "experiments/first.yaml: epochs: should be greater than 0, got 0"
    assert mistakes("second") == [f"second: init_from: {wrong}"]
    assert mistakes("first", "second") == mistakes("second", "first") == [wrong]
    experiment("first", **CHAIN | {"init_from": "second"})
    assert mistakes("first") == ["first: init_from: first -> second -> first is a circle; set one of them to null"]
    assert len(mistakes("first", "second")) == 1


# What is shown


def test_the_comment_at_the_top() -> None:
    experiment("x", "# One.\n#  Two.\n#Three.\n#\n\n# no more\nmodel: vgg13  # nor this\n")
    assert head(Path("experiments/x.yaml")) == one("x").head == "One.\n Two.\nThree.\n"
    experiment("x", "model: vgg13\n# late\n")
    assert head(Path("experiments/x.yaml")) == ""


def test_every_setting_is_shown_once_with_its_value_and_meaning() -> None:
    for name in SHIPPED:
        found = one(name)
        shown = list(values(found))
        expected = [*flat(found.run.model_dump()), *flat({"resources": found.resources.model_dump()})]
        assert [(path, value) for path, value, _, _ in shown] == expected
        for path, _, source, meaning in shown:
            assert meaning.endswith((".", ")")), path
            assert source == DEFAULT or (Path(source).exists() and path in found.origins)


# Written files


def test_a_written_file_says_what_differs_from_its_base() -> None:
    tree = one("vgg13_small").run.model_dump() | {"loss": {"name": "focal", "gamma": 2.0}, "clip_grad_norm": None}
    tree["optimizer"] = {"name": "adamw", "lr": 3e-5, "weight_decay": 0.01}
    tree["schedule"] = {"name": "step", "warmup_epochs": 1.0, "step_epochs": [3], "step_factors": [0.5]}
    path = write("found", "vgg13_small", tree, "sweep tiny, trial 7")
    assert path.read_text().splitlines() == [
        "# sweep tiny, trial 7",
        "# fer train found",
        "base: vgg13_small",
        "loss: {name: focal}",
        "optimizer: {lr: 3e-05}",
        "schedule: {name: step, step_epochs: [3], step_factors: [0.5]}",
        "clip_grad_norm:",
    ]
    assert one("found").run == Run.model_validate(tree)
    assert sorted(os.listdir("experiments")) == sorted(f"{name}.yaml" for name in [*SHIPPED, "found"])


@pytest.mark.parametrize(
    ("name", "base", "message"),
    [
        ("doe", "vgg13_small", "experiments/doe.yaml: exists already; choose another name with --as"),
        ("../x", "vgg13_small", "--as ../x: an experiment's name is made of up to 100 letters, digits, _ and -"),
        ("", "vgg13_small", "--as : an experiment's name is made of up to 100 letters, digits, _ and -"),
        ("x", "vgg13_smal", "experiments/vgg13_smal.yaml: no such experiment, did you mean 'vgg13_small'?"),
    ],
)
def test_an_experiment_that_cannot_be_written(name: str, base: str, message: str) -> None:
    tree, before = one("vgg13_small").run.model_dump(), sorted(os.listdir("experiments"))
    with pytest.raises(UserError) as caught:
        write(name, base, tree, "x")
    assert str(caught.value) == message
    assert sorted(os.listdir("experiments")) == before


def test_a_written_file_keeps_nothing_of_its_base_where_a_section_is_another() -> None:
    model = {"name": "classifier", "backbone": SWIN | {"mlp_ratio": 3}}
    experiment("lower", model=model, loss="focal", input=Y["input"])
    inner = one("lower", "model.backbone=resnet50", "model.backbone.weights=", "model.resizer=neural").run
    for number, run in enumerate([small_run(loss={"name": "pdls", "alpha": 0.5}), inner, one("lower").run]):
        path = write(f"found{number}", "lower", run.model_dump(), "x")
        assert one(f"found{number}").run == run
    assert path.read_text() == "# x\n# fer train found2\nbase: lower\n"


# The experiments of the project


def test_the_experiments_of_the_project() -> None:
    """They use every model, and their heads tell how they are trained."""
    found = load(SHIPPED, params.machine(params.load()))
    assert sorted(found) == SHIPPED == experiments.known()
    assert {one.run.model.name for one in found.values()} == set(MODELS)
    assert not any(one.dropped for one in found.values())
    for name, experiment in found.items():
        lines = experiment.head.splitlines()
        command = next(line for line in lines if line.startswith("fer train "))
        words = command.removeprefix("fer train ").split()
        assert words[0] == name == list(load(words, {}))[-1]
        assert lines[0] != command  # the list of experiments shows the first line
        assert "Own score: " in experiment.head
