"""Experiments: which layer a value comes from, every mistake in one line, and files that are read as written."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, copy_settings, small_run

from fer.errors import UserError
from fer.losses import LOSSES
from fer.models import MODELS
from fer.models.backbones import BACKBONES
from fer.models.classifier import RESIZERS
from fer.models.embedding_difference import PAIRINGS
from fer.optimizer import OPTIMIZERS
from fer.resources import Resources
from fer.run import Run
from fer.schedule import SCHEDULES
from fer.settings import Section, section_at, table_of
from pipelines import experiments, params
from pipelines.experiments import COMMAND_LINE, DEFAULT, MACHINE, Experiment, Recipe, head, load, values, write
from pipelines.params import yaml_of

SHIPPED = sorted(path.stem for path in ROOT.glob("experiments/*.yaml"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the project's settings."""
    copy_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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

        def keys(place: int) -> dict[str, Any]:
            return experiments.tree_of(f"{key}={10 + place}") if saying[place] else {}  # noqa: B023

        machine, said = keys(0).get("resources", {}), saying
        if not key.startswith("resources."):
            said = (False, *saying[1:])  # the machine says nothing of runs
        experiment("lowest", **{"model": "vgg13", "seed": 1} | keys(1))
        experiment("lower", **{"base": "lowest"} | keys(2))
        experiment("x", **{"base": "lower"} | keys(3))
        found = one("x", *([f"{key}={10 + 4}"] if saying[4] else []), machine=machine)
        default = dict(flat(Run(model=found.run.model).model_dump() | {"resources": Resources().model_dump()}))[key]
        last = max([place for place, says in enumerate(said) if says], default=None)
        assert at(found, key) == ((default, DEFAULT) if last is None else (10 + last, LAYERS[last]))
        assert at(found, "seed") == (1, "experiments/lowest.yaml")
        assert found.dropped == []


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


def test_the_last_of_two_values_on_the_command_line_wins() -> None:
    experiment("x", model="vgg13")
    assert one("x", "seed=1", "seed=2").run.seed == 2
    assert one("seed=1", "x", "optimizer=adam", "optimizer=sgd").run.optimizer == OPTIMIZERS["sgd"]()


def test_a_value_on_the_command_line_is_yaml() -> None:
    experiment("x", model="vgg13")
    found = one("x", "optimizer.lr=1", "clip_grad_norm=", "input.mean=[0.4]", "augment={flip: 0.25, scale: 0.0}")
    shown = {key: at(found, key) for key in ("optimizer.lr", "clip_grad_norm", "input.mean", "augment.flip")}
    assert [value for value, _ in shown.values()] == [1.0, None, [0.4], 0.25]
    assert {source for _, source in shown.values()} == {COMMAND_LINE}
    assert isinstance(found.run.optimizer.lr, float)


# Sections that are chosen by name

SGD = {"name": "sgd", "lr": 0.5, "momentum": 0.1}


def test_another_name_starts_a_section_anew_and_what_it_drops_is_told() -> None:
    experiment("lower", model="vgg13", optimizer=SGD, loss={"name": "focal", "gamma": 1.0})
    experiment("x", base="lower", optimizer={"weight_decay": 0.2})
    found = one("x", "optimizer.name=adam", "optimizer.weight_decay=0.3")
    assert found.run.optimizer == OPTIMIZERS["adam"](weight_decay=0.3)  # neither rate nor momentum of sgd
    assert at(found, "optimizer.lr") == (1e-3, DEFAULT)
    assert found.dropped == [
        "optimizer.lr of experiments/lower.yaml: command line takes optimizer adam",
        "optimizer.momentum of experiments/lower.yaml: command line takes optimizer adam",
        "optimizer.weight_decay of experiments/x.yaml: command line takes optimizer adam",
    ]
    assert at(found, "loss.gamma") == (1.0, "experiments/lower.yaml")

    experiment("middle", base="lower", optimizer={"name": "adam"})
    experiment("x", base="middle", optimizer="sgd")
    found = one("x")
    assert found.run.optimizer == OPTIMIZERS["sgd"]()  # what was dropped on the way does not come back
    assert [line.partition(": ")[2] for line in found.dropped] == ["experiments/middle.yaml takes optimizer adam"] * 2

    experiment("x", model="vgg13", optimizer={"lr": 0.1})  # of adamw, the default, which nobody named
    found = one("x", "optimizer=sgd")
    assert found.run.optimizer == OPTIMIZERS["sgd"]()
    assert found.dropped == ["optimizer.lr of experiments/x.yaml: command line takes optimizer sgd"]


def test_the_same_name_keeps_the_keys() -> None:
    experiment("x", model="vgg13", optimizer=SGD)
    for change in ("optimizer=sgd", "optimizer.name=sgd", "optimizer={name: sgd}", "optimizer={}"):
        found = one("x", change)
        assert found.run.optimizer == OPTIMIZERS["sgd"](lr=0.5, momentum=0.1)
        assert found.dropped == []
    experiment("x", model="vgg13", optimizer={"lr": 0.5})  # of adamw, the default
    found = one("x", "optimizer=adamw")
    assert found.run.optimizer == OPTIMIZERS["adamw"](lr=0.5)
    assert at(found, "optimizer.name") == ("adamw", COMMAND_LINE)
    assert found.dropped == []


def test_a_section_of_a_section_starts_anew() -> None:
    model = {"name": "classifier", "backbone": {"name": "efficientnet_lite0", "bn_momentum": 0.2}, "head": [8]}
    experiment("x", model=model | {"resizer": {"name": "neural", "size": 64, "blocks": 2}})
    found = one("x", "model.backbone=resnet50", "model.backbone.weights=", "model.resizer.size=32")
    backbone = BACKBONES["resnet50"].kind(name="resnet50", weights=None)
    assert found.run.model.model_dump() == {
        "name": "classifier",
        "stn": False,
        "resizer": {"name": "neural", "size": 32, "blocks": 2, "channels": 16, "scale": None},
        "backbone": backbone.model_dump(),
        "head": [8],
        "head_dropout": 0.5,
    }
    assert found.dropped == ["model.backbone.bn_momentum of experiments/x.yaml: command line takes backbone resnet50"]
    found = one("x", "model=vgg13")
    assert found.run.model == MODELS["vgg13"]()
    assert [line.partition(" of ")[0] for line in found.dropped] == [
        "model.backbone.name", "model.backbone.bn_momentum", "model.head", "model.resizer.name", "model.resizer.size",
        "model.resizer.blocks",
    ]  # fmt: skip


def test_a_name_and_its_keys_on_the_command_line_stand_in_any_order() -> None:
    experiment("x", model="vgg13")
    for name in ("loss=focal", "loss.name=focal", "loss={name: focal}"):
        for words in itertools.permutations([name, "loss.gamma=1", "x"]):
            found = one(*words)
            assert found.run.loss == LOSSES["focal"](gamma=1.0)
            assert found.dropped == []


SHORT: dict[str, Any] = {"model": MODELS, "loss": LOSSES, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}


@pytest.mark.parametrize(
    ("key", "name"),
    [(key, name) for key, table in SHORT.items() for name in table if (key, name) != ("schedule", "step")],
)
def test_a_name_alone_is_the_section_with_its_defaults(key: str, name: str) -> None:
    """And a backbone's name alone is the backbone, where a model needs one."""
    kind, vit = SHORT[key][name], "vit_base_patch16_224"
    backbones = [row for row in ("backbone", "identity") if row in kind.model_fields]
    section = {"name": name, **dict.fromkeys(backbones, vit)} if backbones else name
    experiment("x", **{"model": "vgg13", "input": {"image_size": 224}, key: section})
    assert getattr(one("x").run, key) == kind(**{row: BACKBONES[vit].kind() for row in backbones})


# Users' mistakes

KNOWN = ", ".join(sorted(Recipe.model_fields))
SWIN = {"name": "swin_tiny_patch4_window7_224", "weights": None}
X: dict[str, Any] = SMALL  # a VGG13
Y: dict[str, Any] = {"model": {"name": "classifier", "backbone": SWIN}, "input": {"image_size": 224}}
WRONG: dict[str, str | list[str]] = {
    # unknown keys and names
    "x eposch=3": "eposch: unknown key, did you mean 'epochs'?",
    "x optimizer.lrr=3": "optimizer.lrr: unknown key of 'adamw', did you mean 'lr'?",
    "x optimizer.momentum=0.5": "optimizer.momentum: unknown key of 'adamw'; known: lr, weight_decay",
    "x loss.gamma=1": "loss.gamma: unknown key: 'cross_entropy' has no keys",
    "x models.x.epochs=3": "models: unknown key, did you mean 'model'?",
    "x optimizer=sdg": "optimizer.name: unknown optimizer 'sdg', did you mean 'sgd'?",
    "x loss=zzz": f"loss.name: unknown loss 'zzz'; known: {', '.join(sorted(LOSSES))}",
    "x model.backbone=resnet50": (
        "model.backbone: unknown key of 'vgg13'; known: batch_norm, conv_dropout, dense_dropout, width"
    ),
    "y model.backbone.depth=[1]": (
        "model.backbone.depth: unknown key of 'swin_tiny_patch4_window7_224', did you mean 'depths'?"
    ),
    "y model.resizer=cubic": f"model.resizer.name: unknown resizer 'cubic'; known: {', '.join(sorted(RESIZERS))}",
    # types and ranges
    "x optimizer.lr=fast": "optimizer.lr: should be a valid number, got 'fast'",
    "x optimizer.lr.x=3": "optimizer.lr: should be a valid number",
    "x epochs=0": "epochs: should be greater than 0, got 0",
    "x loss=": "loss: should be a table of keys, got None",
    "x precision=fp8": "precision: should be 'fp32', 'bf16' or 'fp16', got 'fp8'",
    "x resources.device=gpu": "resources.device: should be 'auto', 'cpu' or 'cuda', got 'gpu'",
    "y model.backbone.depths=[2, 0, 2]": "model.backbone.depths.1: should be greater than 0, got 0",
    # what is missing
    "x schedule=step": ["schedule.step_epochs: missing", "schedule.step_factors: missing"],
    "x model=vit_se": "model.backbone: missing",
    # what does not fit together
    "x input.mean=[0.5, 0.4]": "input.mean: has 2 numbers but channels is 1; give one for all",
    "x schedule.warmup_epochs=3": "schedule.warmup_epochs: 3 leaves nothing of epochs 3",
    "x sam_rho=0.05; precision=fp16": "sam_rho: needs precision fp32 or bf16, as fp16 scales its gradients",
    "x batch_size=16; resources.workers=3": "batch_size: 16 does not divide by resources.workers 3",
    "x resources.gpus_per_worker=1.5": "resources.gpus_per_worker: above 1 must be a whole number, got 1.5",
    "x base=y": "base: only a file has one; write it into a file of experiments/",
    # several at once
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
    wanted = WRONG[text]
    lines = [wanted] if isinstance(wanted, str) else wanted
    assert sorted(mistakes(name, *changes.split("; "))) == sorted(f"{COMMAND_LINE}: {line}" for line in lines)
    if changes.startswith("base="):
        return
    layers = experiments.Layers(Recipe)
    for change in ["base=" + name, *changes.split("; ")]:
        layers.lay(experiments.tree_of(change), "")
    path = experiment("wrong", **layers.tree)
    experiment("z", base="wrong")
    assert sorted(mistakes("z")) == sorted(f"{path}: {line}" for line in lines)


def test_a_fault_between_keys_stands_where_its_key_was_set() -> None:
    """And in the experiment's own file where it is a default."""
    experiment("x", model="vgg13", batch_size=15, input={"image_size": 16})
    assert mistakes("x", "resources.workers=2") == [
        "experiments/x.yaml: batch_size: 15 does not divide by resources.workers 2"
    ]
    assert mistakes("x", machine={"workers": 2}) == mistakes("x", "resources.workers=2")
    assert mistakes("x", machine={"gpus_per_worker": 1.5}) == [
        "params.yaml: resources.gpus_per_worker: above 1 must be a whole number, got 1.5"
    ]
    assert mistakes("x", "epochs=1") == ["experiments/x.yaml: schedule.warmup_epochs: 1 leaves nothing of epochs 1"]


def test_what_a_section_lacks_stands_where_it_was_set_last() -> None:
    experiment("lower", model="vgg13", schedule="step")
    experiment("x", base="lower", schedule={"warmup_epochs": 0})
    missing = ["schedule.step_epochs: missing", "schedule.step_factors: missing"]
    assert mistakes("x") == [f"experiments/x.yaml: {line}" for line in missing]
    assert mistakes("x", "schedule=step") == [f"command line: {line}" for line in missing]


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
    assert changes == ["seed=3", "optimizer.lr=1e-3", "model=", "input.mean=[0.1, 0.2]"]
    assert load(["seed=3"], {}) == load([], {}) == {}
    for word in ("=3", "epochs =3", " epochs=3", "batch-size=3", "1=2", "--seed=3"):
        assert mistakes("vgg13_small", word) == [f"{word}: write it as key=value, for example optimizer.lr=3e-4"]
    assert mistakes("vgg13_small", "optimizer.lr=[1") == ["optimizer.lr=[1: the value is not valid YAML"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys; write at least its model there"),
        ("# a comment alone\n", "holds no keys; write at least its model there"),
        ("seed: 3\n", "model: missing"),
        ("model: vgg13\nseed: [1\n", "line 3 is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\nseed: 2\n", 'line 2 is not valid YAML: found duplicate key "seed" with value "2"'),
        ("model: vgg13\nbase: 3\n", "base: should be the name of an experiment, got 3"),
        ("model: vgg13\noptimizer.lr: 3\n", "optimizer.lr: unknown key, did you mean 'optimizer'?"),
        ("model:\n  width: 0.5\n", "model.name: missing"),
        ("base: vgg13_smal\n", "base: experiments/vgg13_smal.yaml: no such experiment, did you mean 'vgg13_small'?"),
        ("base: x\n", "base: x -> x is a circle"),
    ],
)
def test_a_file_that_is_no_experiment(text: str, message: str) -> None:
    Path("experiments/x.yaml").write_text(text)
    (found,) = mistakes("x")
    assert found.startswith("experiments/x.yaml:")
    told = found.removeprefix("experiments/x.yaml:").strip()
    assert told.removesuffix(' (original value: "1")') == message


def test_bases_in_a_circle_and_an_unknown_one_further_down() -> None:
    experiment("a", base="b")
    experiment("b", base="c")
    experiment("c", base="b")
    assert mistakes("a") == ["experiments/b.yaml: base: a -> b -> c -> b is a circle"]
    experiment("c", base="emotion_encoder_tin")
    assert mistakes("a") == [
        "experiments/c.yaml: base: experiments/emotion_encoder_tin.yaml: no such experiment, "
        "did you mean 'emotion_encoder_tiny'?"
    ]


# Names and files


def test_an_unknown_name() -> None:
    assert mistakes("vgg13_smal") == ["experiments/vgg13_smal.yaml: no such experiment, did you mean 'vgg13_small'?"]
    assert mistakes("zzz") == [f"experiments/zzz.yaml: no such experiment; known: {', '.join(SHIPPED)}"]
    assert mistakes("doe", "elsewhere/doe.yml") == ["elsewhere/doe.yml: no such experiment, did you mean 'doe'?"]
    remedy = "an experiment's name is made of letters, digits, _ and -; rename the file"
    for stem in ("a b", "a.b", "é", ""):  # which does not do for a folder
        Path(f"{stem}.yaml").write_text("base: doe\n")
        assert mistakes(f"./{stem}.yaml") == [f"{stem}.yaml: {remedy}"]


def test_a_file_anywhere(folder: Path) -> None:
    """Its name is that of the file; its base and its start stand in experiments/, unless that is named, too."""
    Path("elsewhere").mkdir()
    for number, name in enumerate(["elsewhere/mine.yaml", "elsewhere/yours.yml", str(folder / "third.yaml")]):
        path = Path(name)
        path.write_text(yaml_of({"base": "disentangled_doe_tiny", "epochs": 3 + number}))
        found = load([name, "batch_size=16"], {})
        assert list(found) == ["emotion_encoder_tiny", path.stem]
        assert (found[path.stem].name, found[path.stem].path) == (path.stem, path)
        assert at(found[path.stem], "epochs") == (3 + number, name)
        assert at(found[path.stem], "init_from") == ("emotion_encoder_tiny", "experiments/disentangled_doe_tiny.yaml")
    Path("elsewhere/first.yaml").write_text(yaml_of({"base": "emotion_encoder_tiny", "epochs": 2}))
    experiment("second", base="disentangled_doe_tiny", init_from="first")
    (line,) = mistakes("second")
    assert line.startswith("second: init_from: experiments/first.yaml: no such experiment; known: ")
    found = load(["second", "elsewhere/first.yaml"], {})
    assert list(found) == ["first", "second"]
    assert found["first"].run.epochs == 2


def test_one_name_for_two_files_is_refused_and_one_file_may_be_named_twice(folder: Path) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/doe.yaml").write_text("base: doe_tiny\n")
    assert mistakes("doe", "elsewhere/doe.yaml") == [
        "elsewhere/doe.yaml: experiments/doe.yaml has the same name; rename one of them"
    ]
    same = ["doe", "experiments/doe.yaml", "./experiments/doe.yaml", str(folder / "experiments/doe.yaml")]
    assert list(load(same, {})) == ["doe"]


# Several experiments


def test_a_key_applies_to_each_and_must_fit_each() -> None:
    found = load(["vgg13_small", "vgg13_ferplus", "epochs=41", "resources.readers=3"], {})
    assert [(one.run.epochs, one.resources.readers) for one in found.values()] == [(41, 3), (41, 3)]
    assert [at(one, "epochs")[1] for one in found.values()] == [COMMAND_LINE] * 2
    assert found["vgg13_small"].run.optimizer.name == "adamw"
    assert found["vgg13_ferplus"].run.optimizer.name == "sgd"  # else they stay what they are
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


def test_a_start_that_is_not_there_or_has_a_mistake_of_its_own() -> None:
    chain()
    assert mistakes("second", "init_from=frist") == [
        "second: init_from: experiments/frist.yaml: no such experiment, did you mean 'first'?"
    ]
    assert mistakes("second", "init_from=experiments/first.yaml") == [
        "second: init_from: should be the name of an experiment, got 'experiments/first.yaml'"
    ]
    experiment("first", base="vit_se_tiny", epochs=0)
    wrong = "experiments/first.yaml: epochs: should be greater than 0, got 0"
    assert mistakes("second") == [f"second: init_from: {wrong}"]
    for names in (["first", "second"], ["second", "first"]):
        assert mistakes(*names) == [wrong]


def test_runs_that_start_from_each_other_in_a_circle() -> None:
    chain()
    assert mistakes("second", "init_from=second") == [
        "second: init_from: second -> second is a circle; set one of them to null"
    ]
    experiment("first", **CHAIN | {"init_from": "second"})
    for name, other in (("first", "second"), ("second", "first")):
        assert mistakes(name) == [
            f"{name}: init_from: {name} -> {other} -> {name} is a circle; set one of them to null"
        ]
    assert len(mistakes("first", "second")) == 1


def test_a_start_with_another_backbone_or_none() -> None:
    chain()
    another = "has another backbone ({}); give both the same name and settings"
    for words, line in {
        "second init_from=swin_nr_fpdls_tiny": "command line: init_from: swin_nr_fpdls_tiny "
        + another.format("swin_tiny_patch4_window7_224"),
        "second model.backbone.depth=3": "experiments/second.yaml: init_from: first "
        + another.format("vit_base_patch16_224_in21k"),
        "second init_from=vgg13_small": "command line: init_from: vgg13_small has no backbone; set it to null",
        "vgg13_small init_from=first": "command line: init_from: model vgg13 has no backbone; set it to null",
        "second model.backbone.weights=weights/vit": "command line: model.backbone.weights: init_from gives them; "
        "set one of the two to null",
    }.items():
        assert mistakes(*words.split()) == [line]
    assert list(load(["second", "model.backbone.dropout=0.0"], {})) == ["first", "second"]  # a default, written out


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
        assert set(found.origins) <= {path for path, _, _, _ in shown}


def sections(kind: type[Section]) -> set[type[Section]]:
    """A section and all that can stand in it."""
    found = {kind}
    for key in kind.model_fields:
        inner = {*table_of(kind, key).values(), section_at(kind, key, {})} - {None}
        found |= {below for section in inner for below in sections(section)}
    return found


def test_every_key_of_every_section_has_a_meaning() -> None:
    found = sections(Recipe)
    for table in (*SHORT.values(), RESIZERS, PAIRINGS, {name: row.kind for name, row in BACKBONES.items()}):
        assert set(table.values()) <= found
    for section in found:
        for key, about in section.model_fields.items():
            # a name is explained by the first line of its section
            meaning = (section.__doc__ or "").splitlines()[0] if key == "name" else about.description
            assert meaning, f"{section.__name__}.{key}"
            assert "\n\n" not in meaning


# Written files


def test_a_written_file_says_what_differs_from_its_base() -> None:
    lower = one("vgg13_small").run
    tree = lower.model_dump() | {"loss": {"name": "focal", "gamma": 2.0}, "epochs": 12, "clip_grad_norm": None}
    tree["optimizer"] = {"name": "adamw", "lr": 3e-5, "weight_decay": 0.01}
    tree["schedule"] = {"name": "step", "warmup_epochs": 1.0, "step_epochs": [3], "step_factors": [0.5]}
    path = write("found", "vgg13_small", tree, "sweep tiny, trial 7")
    assert path == Path("experiments/found.yaml")
    assert path.read_text().splitlines() == [
        "# sweep tiny, trial 7",
        "# fer train found",
        "base: vgg13_small",
        "epochs: 12",
        "loss: {name: focal}",
        "optimizer: {lr: 3e-05}",
        "schedule: {name: step, step_epochs: [3], step_factors: [0.5]}",
        "clip_grad_norm:",
    ]
    found = one("found")
    assert found.run == Run.model_validate(tree)
    assert found.head == "sweep tiny, trial 7\nfer train found"
    assert sorted(os.listdir("experiments")) == sorted(f"{name}.yaml" for name in [*SHIPPED, "found"])


def test_an_experiment_that_cannot_be_written() -> None:
    tree, before = one("vgg13_small").run.model_dump(), sorted(os.listdir("experiments"))
    for name, message in {
        "doe": "experiments/doe.yaml: exists already; choose another name with --as",
        "a b": "--as a b: an experiment's name is made of letters, digits, _ and -",
        "../x": "--as ../x: an experiment's name is made of letters, digits, _ and -",
        "": "--as : an experiment's name is made of letters, digits, _ and -",
    }.items():
        with pytest.raises(UserError) as caught:
            write(name, "vgg13_small", tree, "x")
        assert str(caught.value) == message
    with pytest.raises(UserError, match="no such experiment"):
        write("new", "vgg13_smal", tree, "x")
    assert sorted(os.listdir("experiments")) == before


def test_a_written_file_keeps_nothing_of_its_base_where_a_section_is_another() -> None:
    model = {"name": "classifier", "backbone": SWIN | {"mlp_ratio": 3}}
    experiment("lower", model=model, loss="focal", input=Y["input"])
    tree = small_run(loss={"name": "pdls", "alpha": 0.5}).model_dump()
    write("found", "lower", tree, "x")
    assert one("found").run == Run.model_validate(tree)
    tree = one("lower", "model.backbone=resnet50", "model.backbone.weights=", "model.resizer=neural").run.model_dump()
    write("inner", "lower", tree, "x")
    assert one("inner").run == Run.model_validate(tree)
    write("same", "lower", one("lower").run.model_dump(), "x")
    assert Path("experiments/same.yaml").read_text() == "# x\n# fer train same\nbase: lower\n"


# The experiments of the project


def test_the_experiments_of_the_project() -> None:
    """They use every model, are short, and their heads tell how they are trained."""
    found = load(SHIPPED, params.machine(params.load()))
    assert sorted(found) == SHIPPED == experiments.known()
    assert {one.run.model.name for one in found.values()} == set(MODELS)
    published = found["vgg13_ferplus"].run
    assert (published.batch_size, published.optimizer.name, published.epochs) == (32, "sgd", 100)
    assert not any(one.dropped for one in found.values())
    assert max(len(one.path.read_text().splitlines()) for one in found.values()) <= 25
    for name, experiment in found.items():
        lines = experiment.head.splitlines()
        command = next(line for line in lines if line.startswith("fer train "))
        words = command.removeprefix("fer train ").split()
        assert words[0] == name == list(load(words, {}))[-1]
        assert lines[0] != command  # the list of experiments shows the first line
        assert "Own score: " in experiment.head
        assert "Cost: " in experiment.head
