"""Experiments: which layer a value comes from, every mistake in one line, and files that are read as written."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, refusal, small_run

from fer.errors import UserError
from fer.losses import LOSSES
from fer.models import MODELS
from fer.optimizer import OPTIMIZERS
from fer.resources import Resources
from fer.run import Run
from fer.schedule import SCHEDULES
from pipelines import experiments, params
from pipelines.experiments import COMMAND_LINE, DEFAULT, MACHINE, Experiment, Recipe, load, values, write
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
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


# Precedence

LAYERS = ["params.yaml", "experiments/lowest.yaml", "experiments/lower.yaml", "experiments/x.yaml", "command line"]


@pytest.mark.parametrize("key", ["resources.readers", "optimizer.weight_decay"])
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
    changes = ["augment.erasing=1", "augment.erasing=0.4", "resources.restarts=6", "clip_grad_norm="]
    found = one("x", *changes, machine={"device": "cpu", "readers": 1})
    assert {path: (value, source) for path, value, source, _ in values(found) if source != DEFAULT} == {
        "model.name": ("vgg13", "experiments/lower.yaml"),
        "optimizer.lr": (0.1, "experiments/lower.yaml"),
        "optimizer.weight_decay": (0.3, "experiments/x.yaml"),  # of adamw, which nobody named
        "augment.flip": (0.1, "experiments/lower.yaml"),
        "augment.scale": (0.3, "experiments/x.yaml"),
        "augment.erasing": (0.4, COMMAND_LINE),
        "clip_grad_norm": (None, COMMAND_LINE),
        "resources.device": ("cpu", MACHINE),
        "resources.readers": (5, "experiments/x.yaml"),
        "resources.restarts": (6, COMMAND_LINE),
    }


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
    # so does a section of a section
    model = {"name": "classifier", "backbone": {"name": "efficientnet_lite0", "bn_momentum": 0.2}, "head": [8]}
    experiment("y", model=model | {"resizer": {"name": "neural", "size": 64, "blocks": 2}})
    found = one("y", "model.backbone=resnet50", "model.backbone.weights=", "model.resizer.size=32")
    own = {"backbone": {"name": "resnet50", "weights": None}, "resizer": {"name": "neural", "size": 32, "blocks": 2}}
    assert found.run.model == MODELS["classifier"].model_validate(model | own)
    assert found.dropped == ["model.backbone.bn_momentum of experiments/y.yaml: command line takes backbone resnet50"]


@pytest.mark.parametrize("change", ["optimizer=NAME", "optimizer.name=NAME", "optimizer={name: NAME}", "optimizer={}"])
@pytest.mark.parametrize("given", [SGD, {"lr": 0.5}], ids=["named", "of the default, which nobody named"])
def test_the_same_name_keeps_the_keys(given: dict[str, Any], change: str) -> None:
    experiment("x", model="vgg13", optimizer=given)
    found = one("x", change.replace("NAME", given.get("name", "adamw")))
    wanted = OPTIMIZERS[given.get("name", "adamw")].model_validate(given)
    assert (found.run.optimizer, found.dropped) == (wanted, [])


def test_a_name_and_its_keys_on_the_command_line_stand_in_any_order() -> None:
    experiment("x", model="vgg13")
    for name, turn in itertools.product(["loss=focal", "loss.name=focal"], itertools.permutations(range(3))):
        words = [name, "loss.gamma=1", "x"]
        found = one(*(words[place] for place in turn))
        assert (found.run.loss, found.dropped) == (LOSSES["focal"](gamma=1.0), [])


# Users' mistakes

KNOWN = ", ".join(sorted(Recipe.model_fields))
WRONG: dict[str, list[str]] = {
    "optimizer.lr.x=3": ["optimizer.lr: should be a valid number"],
    "loss=": ["loss: should be a table of keys, got None"],
    "model=ensemble": [f"model.name: unknown model 'ensemble'; known: {', '.join(sorted(MODELS))}"],
    "batch_size=16; resources.workers=3": ["batch_size: 16 does not divide by resources.workers 3"],
    "epochs=0; optimizer=sdg; optimizer.lrr=3; zzz=1": [
        f"zzz: unknown key; known: {KNOWN}",
        "epochs: should be greater than 0, got 0",
        "optimizer.name: unknown optimizer 'sdg', did you mean 'sgd'?",
    ],
}


@pytest.mark.parametrize("changes", WRONG)
def test_a_mistake_is_one_line_behind_the_command_line_or_its_file(changes: str) -> None:
    """On the command line, and in a file of which the named one is a change."""
    experiment("x", **SMALL)
    lines = WRONG[changes]
    assert sorted(mistakes("x", *changes.split("; "))) == sorted(f"{COMMAND_LINE}: {line}" for line in lines)
    layers = experiments.Layers(Recipe)
    for change in ["base=x", *changes.split("; ")]:
        layers.lay(experiments.tree_of(change), "")
    path = experiment("wrong", **layers.tree)
    experiment("z", base="wrong")
    assert sorted(mistakes("z")) == sorted(f"{path}: {line}" for line in lines)


FILES = {
    "odd": "model: vgg13\nbatch_size: 15\ninput: {image_size: 16}\n",
    "lower": "model: vgg13\nepochs: 0\nschedule: step\n",
    "upper": "base: lower\nprecision: fp8\nschedule: {step_epochs: [1]}\n",
    "unknown": "model: vgg\n",
    "comment": "# a comment alone\n",
    "empty": "seed: 3\n",
    "number": "model: vgg13\nbase: 3\n",
    "typo": "base: vgg13_smal\n",
    "circle": "base: circle\n",
    "first": "base: vit_se_tiny\nseed: 1\n",
    "second": "base: vit_se_tiny\ninit_from: first\n",
    "third": "base: vit_se_tiny\ninit_from: fourth\n",
    "fourth": "base: vit_se_tiny\nepochs: 0\n",
}
HOW = "write it as key=value, for example optimizer.lr=3e-4"
ODD = "experiments/odd.yaml: batch_size: 15 does not divide by resources.workers 2"
WHERE: dict[str, list[str]] = {  # a default is blamed on the experiment's own file
    "odd resources.workers=2": [ODD],
    "odd epochs=1": [
        "experiments/odd.yaml: schedule.warmup_epochs: 1 leaves nothing of epochs 1; set it lower, such as to 0"
    ],
    "upper unknown ema_decay=1": [
        "experiments/lower.yaml: epochs: should be greater than 0, got 0",
        "experiments/upper.yaml: schedule.step_factors: missing",
        "command line: ema_decay: should be less than 1, got 1",
        "experiments/upper.yaml: precision: should be 'fp32', 'bf16' or 'fp16', got 'fp8'",
        "experiments/unknown.yaml: model.name: unknown model 'vgg', did you mean 'vgg13'?",
    ],
    **{f"odd {word}": [f"{word}: {HOW}"] for word in ("=3", "batch-size=3", "--seed=3")},
    "odd base=y": ["command line: base: only a file has one; write it into a file of experiments/"],
    "comment": ["experiments/comment.yaml: holds no keys; write at least its model there"],
    "empty": ["experiments/empty.yaml: model: missing"],
    "number": ["experiments/number.yaml: base: should be the name of an experiment, got 3"],
    "typo": ["experiments/typo.yaml: base: experiments/vgg13_smal.yaml: no such experiment, "
             "did you mean 'vgg13_small'?"],
    "circle": ["experiments/circle.yaml: base: circle -> circle is a circle"],
    "doe elsewhere/doe.yml": ["elsewhere/doe.yml: no such experiment, did you mean 'doe'?"],
    "second init_from=frist": ["second: init_from: experiments/frist.yaml: no such experiment, did you mean 'first'?"],
    "second init_from=a/b.yaml": ["second: init_from: should be the name of an experiment, got 'a/b.yaml'"],
    "second init_from=second": ["second: init_from: second -> second is a circle; set one of them to null"],
    "second init_from=vgg13_small": ["command line: init_from: vgg13_small has no backbone; set it to null"],
    "second model.backbone.depth=3": ["experiments/second.yaml: init_from: first has another backbone "
                                      "(vit_base_patch16_224_in21k); give both the same name and settings"],
    "third": ["third: init_from: experiments/fourth.yaml: epochs: should be greater than 0, got 0"],
    "fourth third": ["experiments/fourth.yaml: epochs: should be greater than 0, got 0"],
    "third fourth": ["experiments/fourth.yaml: epochs: should be greater than 0, got 0"],
}  # fmt: skip


def test_a_mistake_is_told_where_its_key_was_set_last() -> None:
    for name, text in FILES.items():
        experiment(name, text)
    assert {words: mistakes(*words.split()) for words in WHERE} == WHERE
    assert mistakes("odd", machine={"workers": 2}) == [ODD]
    alone = "params.yaml: resources.gpus_per_worker: above 1 must be a whole number, got 1.5"
    assert mistakes("odd", machine={"gpus_per_worker": 1.5}) == [alone]
    assert mistakes("odd", "epochs =3") == [f"epochs =3: {HOW}"]


# Names and files


def test_an_unknown_name() -> None:
    assert mistakes("zzz") == [f"experiments/zzz.yaml: no such experiment; known: {', '.join(SHIPPED)}"]
    for stem in ("a b", "é", ""):  # which does not do for a folder
        Path(f"{stem}.yaml").write_text("base: doe\n")
        (line,) = mistakes(f"./{stem}.yaml")
        assert line.startswith(f"{stem}.yaml: an experiment's name is made of up to 100 letters, digits, _ and -; ")
    for name in ("x" * 5000, "a\0b", "a\udcff"):
        assert "no such experiment" in mistakes(name)[0]  # none can be the name of a file


def test_a_file_anywhere(recipes: Path) -> None:
    """Its name is that of the file; its base and its start stand in experiments/, unless that is named, too."""
    Path("elsewhere").mkdir()
    for name in ("elsewhere/yours.yml", str(recipes / "third.yaml")):
        Path(name).write_text("base: disentangled_doe_tiny\nepochs: 3\n")
        found = load([name, "batch_size=16"], {})
        assert list(found) == ["emotion_encoder_tiny", Path(name).stem]
        assert (found[Path(name).stem].path, at(found[Path(name).stem], "epochs")) == (Path(name), (3, name))
    Path("elsewhere/first.yaml").write_text("base: emotion_encoder_tiny\nepochs: 2\n")
    experiment("second", base="disentangled_doe_tiny", init_from="first")
    (line,) = mistakes("second")
    assert line.startswith("second: init_from: experiments/first.yaml: no such experiment; known: ")
    found = load(["second", "elsewhere/first.yaml"], {})
    assert [(name, each.run.epochs) for name, each in found.items()] == [("first", 2), ("second", 30)]
    Path("elsewhere/doe.yaml").write_text("base: doe_tiny\n")
    same = "elsewhere/doe.yaml: experiments/doe.yaml has the same name; rename one of them"
    assert mistakes("doe", "elsewhere/doe.yaml") == [same]
    assert list(load(["doe", "./experiments/doe.yaml", str(recipes / "experiments/doe.yaml")], {})) == ["doe"]


# Several experiments, and a run that starts from another


def test_a_key_applies_to_each_and_must_fit_each() -> None:
    found = load(["vgg13_small", "vgg13_ferplus", "epochs=41", "resources.readers=3"], {})
    assert [(one.run.epochs, one.resources.readers) for one in found.values()] == [(41, 3), (41, 3)]
    assert [one.run.optimizer.name for one in found.values()] == ["adamw", "sgd"]  # else they stay what they are
    only_one = ["vgg13_small", "vgg13_ferplus", "optimizer.momentum=0.5"]
    assert mistakes(*only_one) == ["command line: optimizer.momentum: unknown key of 'adamw'; known: lr, weight_decay"]
    assert mistakes(*SHIPPED, "zzz=1") == [f"command line: zzz: unknown key; known: {KNOWN}"]  # told once


def test_the_run_that_another_starts_from_comes_first_and_gets_the_seed_alone_unless_named() -> None:
    def loaded(*words: str) -> dict[str, tuple[int, int, int]]:
        found = load(list(words), {"readers": 4})
        return {name: (one.run.seed, one.run.epochs, one.resources.readers) for name, one in found.items()}

    experiment("first", base="vit_se_tiny", seed=1)
    for name, start in (("second", "first"), ("third", "second"), ("fourth", "first")):
        experiment(name, base="vit_se_tiny", init_from=start, epochs=9, seed=5)
    words = ["seed=7", "epochs=6", "resources.readers=3"]
    assert loaded("second") == {"first": (1, 40, 4), "second": (5, 9, 4)}
    assert loaded("second", *words) == {"first": (7, 40, 4), "second": (7, 6, 3)}
    assert loaded("second", "first", *words) == {"first": (7, 6, 3), "second": (7, 6, 3)}
    assert list(loaded("third", "fourth")) == ["first", "second", "third", "fourth"]


def test_a_run_starts_from_one_on_the_same_data_unless_its_file_says_otherwise() -> None:
    for name, start in (("first", None), ("second", "first"), ("third", "first")):
        experiment(name, base="vit_se_tiny", init_from=start)
    assert {name: found.data for name, found in load(["second"], {}).items()} == {"first": None, "second": None}
    assert {name: found.data for name, found in load(["second", "data=x"], {}).items()} == {"first": "x", "second": "x"}
    experiment("third", base="vit_se_tiny", init_from="first", data="y")
    for words, late in (("second third", "third"), ("third second", "second"), ("first third", "third"),
                        ("third first", "third")):  # fmt: skip
        line = f"{late}: init_from: first is to be trained on other data as well; train them in turn"
        assert mistakes(*words.split()) == [line]
    experiment("first", base="vit_se_tiny", data="z")
    assert [found.data for found in load(["third", "second"], {}).values()] == ["z", "y", None]


# What is shown, and written


def test_every_setting_is_shown_once_with_its_value_and_meaning() -> None:
    for name in SHIPPED:
        found = one(name)
        shown = list(values(found))
        expected = [
            ("data", found.data),
            *flat(found.run.model_dump()),
            *flat({"resources": found.resources.model_dump()}),
        ]
        assert [(path, value) for path, value, _, _ in shown] == expected
        for path, _, source, meaning in shown:
            assert meaning.endswith((".", ")")), path
            assert source == DEFAULT or (Path(source).exists() and path in found.origins)
        others = {path: meaning.rpartition("Others: ")[2].rstrip(".").split(", ") for path, _, _, meaning in shown}
        for path, chosen, table in (
            ("model.name", found.run.model, MODELS),  # without the ensemble, which is not trained
            ("loss.name", found.run.loss, LOSSES),
            ("schedule.name", found.run.schedule, SCHEDULES),
        ):
            assert sorted([chosen.name, *others[path]]) == sorted(table)
    experiment("x", "# One.\n#  Two.\n#Three.\n#\n\n# no more\nmodel: vgg13  # nor this\n")
    assert one("x").head == "One.\n Two.\nThree.\n"


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
    swin = {"name": "swin_tiny_patch4_window7_224", "weights": None, "mlp_ratio": 3}
    experiment("lower", model={"name": "classifier", "backbone": swin}, loss="focal", input={"image_size": 224})
    inner = one("lower", "model.backbone=resnet50", "model.backbone.weights=", "model.resizer=neural").run
    for number, run in enumerate([small_run(loss={"name": "pdls", "alpha": 0.5}), inner, one("lower").run]):
        path = write(f"found{number}", "lower", run.model_dump(), "x")
        assert one(f"found{number}").run == run  # nothing of its base is kept where a section is another
    assert path.read_text() == "# x\n# fer train found2\nbase: lower\n"

    before = sorted(os.listdir("experiments"))
    assert before == sorted([*(f"{name}.yaml" for name in SHIPPED), "lower.yaml", "found.yaml", *(
        f"found{number}.yaml" for number in range(3)
    )])  # fmt: skip
    for name, base, message in (
        ("doe", "vgg13_small", "experiments/doe.yaml: exists already; choose another name with --as"),
        ("../x", "vgg13_small", "--as ../x: an experiment's name is made of up to 100 letters, digits, _ and -"),
        ("x", "vgg13_smal", "experiments/vgg13_smal.yaml: no such experiment, did you mean 'vgg13_small'?"),
    ):
        assert refusal(write, name, base, tree, "x") == message
    assert sorted(os.listdir("experiments")) == before


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


def test_a_teacher_is_one_finished_run_that_is_named_by_the_start_of_its_id(recipes: Path) -> None:
    runs = Path("data/runs")
    for name in ("a-s1-00000000", "a-s2-00000000", "b-s1-00000000", "unfinished-s1-00000000"):
        (runs / name).mkdir(parents=True)
        if name[0] != "u":
            (runs / name / "summary.json").write_text("{}")

    def asked(word: str) -> experiments.Experiment:
        return experiments.load(["vgg13_small", f"teacher={word}"], {})["vgg13_small"]

    for word, name in (("b", "b-s1-00000000"), ("a-s2", "a-s2-00000000"), ("a-s1-00000000", "a-s1-00000000")):
        assert experiments.taught(asked(word), runs).run == asked(name).run
    plain = experiments.load(["vgg13_small"], {})["vgg13_small"]
    assert experiments.taught(plain, runs) == plain
    for word, told in (
        ("a-", "names several runs, give more of the id: a-s1-00000000, a-s2-00000000"),
        ("unf", "no finished run in data/runs; finished: a-s1-00000000, a-s2-00000000, b-s1-00000000"),
    ):
        assert refusal(experiments.taught, asked(word), runs) == f"command line: teacher: {word}: {told}"
