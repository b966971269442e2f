"""A run is checked as a whole, and its id follows from what decides its numbers and from nothing else."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import RESNET, ROOT, SMALL, doe, make_data, small_run

from fer.data.augment import Augment
from fer.data.dataset import open_data
from fer.losses import LOSSES
from fer.models.embedding_difference import PAIRINGS
from fer.resources import Resources
from fer.run import FORMAT, Run, chain_pixels, data_doubts, resource_faults, run_id
from fer.settings import Section, check, differing, section_at, table_of
from pipelines import experiments
from pipelines.commands.training import warn_of_weights

DEFAULTS = ROOT / "tests" / "golden" / f"defaults-{FORMAT}.json"


def model(**keys: Any) -> dict[str, Any]:
    """Keys of a run with a classifier of 32 px that has these keys."""
    return {"model": {"name": "classifier", "backbone": RESNET, **keys}, "input": {"image_size": 32}}


# Everything that a run may be told


def places(kind: type[Section], place: str, found: dict[type[Section], str]) -> dict[type[Section], str]:
    """Every section that a run can hold, with the key at which it first stands and its name."""
    found.setdefault(kind, place)
    for key in kind.model_fields:
        for name, inner in (table_of(kind, key) or {"": section_at(kind, key, None)}).items():
            if inner is not None and inner not in found:
                places(inner, f"{key}.{name}".strip("."), found)
    return found


ALL = {place: kind for kind, place in places(Run, "run", {}).items()}


def test_every_key_has_a_meaning() -> None:
    for place, kind in (ALL | {"resources": Resources}).items():
        assert (kind.__doc__ or "").strip(), place
        for key, about in kind.model_fields.items():
            assert key == "name" or about.description, f"{place}.{key}: write a line under it"


# Defaults are part of what an id means


def of(about: Any) -> Any:
    """{"default": plain value}, or "required"."""
    if about.is_required():
        return "required"
    value = about.get_default(call_default_factory=True)
    if isinstance(value, Section):
        value = ({"name": value.name} if hasattr(value, "name") else {}) | differing(value)
    return {"default": value}


def test_no_default_has_changed_since_the_format_was_made() -> None:
    keys = {place: kind.model_fields.items() for place, kind in ALL.items()}
    defaults = {place: {key: of(about) for key, about in each if key != "name"} for place, each in keys.items()}
    found, stored = json.loads(json.dumps(defaults)), json.loads(DEFAULTS.read_text())
    kept = {place: {key: found.get(place, {}).get(key) for key in keys} for place, keys in stored.items()}
    assert kept == stored, "a default that has changed or gone is a new format: see CONTRIBUTING.md, A new setting"
    new = {place: {key: keys[key] for key in keys if key not in stored.get(place, {})} for place, keys in found.items()}
    new = {place: keys for place, keys in new.items() if keys or place not in stored}
    assert not any("required" in keys.values() for place, keys in new.items() if place in stored), f"default for {new}"
    assert new == {}, f"add to {DEFAULTS}: {json.dumps(new)}"


# The id


def test_run_id_is_stable_over_releases() -> None:
    """If this fails, finished runs are trained again: only with a new format."""
    own = {
        "clip_grad_norm": None, "input": {"channels": 1},
        "model": {"batch_norm": True, "name": "vgg13", "width": 0.25}, "optimizer": {"momentum": 0.5, "name": "sgd"},
        "schedule": {"name": "cosine", "warmup_epochs": 0.0}, "seed": 7,
    }  # fmt: skip
    defaults = {"input": {"channels": 1, "mean": [0.5], "image_size": 48}, "loss": {"name": "cross_entropy"}}
    content = [2, own, "0123456789abcdef", "first-s1-01234567"]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()  # its keys are in order
    found = run_id("small", Run.model_validate(own | defaults), "0123456789abcdef", "first-s1-01234567")
    assert found == f"small-s7-{digest[:8]}" == "small-s7-a81c602b"


# Other values of every key, each possible on its own in the small run
OTHER: dict[str, Any] = {
    "seed": 7, "epochs": 4, "patience": 2, "batch_size": 32, "loss": {"name": "focal", "gamma": 3.0},
    "class_weights": 0.5, "balanced_sampling": 0.5, "logit_adjustment": 0.5, "clip_grad_norm": None, "ema_decay": 0.9,
    "sam_rho": 0.05, "precision": "bf16", "unmixed_epochs": 2, "teacher": "y-s1-01234567",
    "model": {"width": 0.125}, "input": {"image_size": 32}, "optimizer": {"name": "adam", "lr": 0.01},
    "schedule": {"name": "constant"}, "augment": {"flip": 0.25},
}  # fmt: skip
INNER: dict[str, list[dict[str, Any]]] = {
    "input": [
        {"channels": 3}, {"mean": [0.4]}, {"std": [0.3]}, {"equalize": True}, {"flatten": True},
        {"mean": [0.0], "std": [1.0]}, {"mean": [0.0], "std": [1.0], "standardize": True},
    ],
    "model": [{"batch_norm": False}, {"conv_dropout": 0.0}, {"dense_dropout": 0.0}],
    "optimizer": [
        {"lr": 0.02}, {"weight_decay": 0.02}, {"name": "sgd"}, {"name": "sgd", "momentum": 0.8},
        {"name": "sgd", "nesterov": True},
    ],
    "schedule": [
        {"warmup_epochs": 1}, {"min_lr_ratio": 0.5}, {"name": "linear"}, {"name": "linear", "min_lr_ratio": 0.5},
        {"name": "step", "step_epochs": [2], "step_factors": [0.75]},
        {"name": "step", "step_epochs": [1], "step_factors": [0.75]},
        {"name": "step", "step_epochs": [2], "step_factors": [0.5]},
    ],
    "loss": [
        *({"name": name} for name in LOSSES if name != "cross_entropy"),
        {"name": "focal_pdls", "alpha": 0.7}, {"name": "focal_pdls", "gamma": 1.0},
    ],
    "augment": [{key: 0.125} for key in Augment.model_fields],
}  # fmt: skip
PARTS: list[dict[str, Any]] = [
    {}, {"stn": True}, {"head": [8]}, {"head": [8], "head_dropout": 0.25}, {"resizer": {"name": "neural", "size": 32}},
    {"resizer": {"name": "bilinear", "size": 32}}, {"resizer": {"name": "bilinear", "size": 40}},
    {"backbone": {**RESNET, "max_pool": False}}, {"backbone": {**RESNET, "layers": [1, 1, 1, 2]}},
    *({"backbone": {"name": "vit_tiny_patch16_224", "weights": None, **eps}} for eps in ({}, {"layer_norm_eps": 1e-6})),
    {"backbone": {**RESNET, "weights": "a.pth"}}, {"backbone": {"name": "mobilenet_v3_large", "weights": None}},
]  # fmt: skip


def test_run_id_changes_with_all_that_decides_the_numbers() -> None:
    assert {*OTHER, "init_from", "teacher_share"} == set(Run.model_fields)
    runs = [small_run(), *(small_run(**{key: value}) for key, value in OTHER.items())]
    runs += [small_run(**{key: value}) for key, values in INNER.items() for value in values]
    runs += [small_run(**model(**keys)) for keys in PARTS]
    runs.append(small_run(**model(), init_from="other"))
    runs.append(small_run(teacher=OTHER["teacher"], teacher_share=0.3))
    runs += [small_run(**doe(pairing)) for pairing in PAIRINGS]
    ids = [run_id("x", run, "d") for run in runs]
    ids += [run_id("x", runs[0], data, start) for data, start in (("e", None), ("d", "y-s1-0"), ("d", "y-s1-1"))]
    twice = [run.model_dump(exclude_defaults=True) for run, id_ in zip(runs, ids) if ids.count(id_) > 1]
    assert twice == [], "these have one id, or are written twice"
    assert len(set(ids)) == len(runs) + 3
    assert all(id_.startswith(f"x-s{run.seed}-") for id_, run in zip(ids, runs))
    assert run_id("y", runs[0], "d") == "y" + ids[0][1:]


def test_descriptions_that_mean_the_same_have_one_id(recipes: Path) -> None:
    plain = experiments.load(["vgg13_small"], {})["vgg13_small"].run
    tree = plain.model_dump()
    Path("experiments/whole.yaml").write_text(json.dumps(tree))
    Path("experiments/way.yaml").write_text("base: doe\nseed: 4\noptimizer: {name: sgd, momentum: 0.5}\n")
    back = [f"{key}={json.dumps(value)}" for key, value in tree.items()]
    for words in (["whole"], ["way", *back, "resources.workers=2"]):
        run = experiments.load(words, {"device": "cpu"})[words[0]].run
        assert run_id("x", run, "d") == run_id("x", plain, "d")


# Mistakes

MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"model": {"name": "classifier"}}, ["model.backbone: missing"]),
    ({"input": {"mean": [0.1, 0.2]}}, ["input.mean: has 2 numbers but channels is 3; give one for all"]),
    ({"input": {"std": [0.2, 0.2, 0.2]}}, ["input.std: is the same for all channels; write it once: [0.2]"]),
    ({"schedule": {"name": "constant", "warmup_epochs": 3}}, []),  # rises to the end
    ({"schedule": {"name": "cosine", "warmup_epochs": 2.5}, "sam_rho": 0.05, "precision": "bf16"}, []),
    ({"schedule": {"name": "cosine", "warmup_epochs": 3}, "sam_rho": 0.05, "precision": "fp16", "init_from": "a"},
     ["sam_rho: needs precision fp32 or bf16, as fp16 scales its gradients",
      "schedule.warmup_epochs: 3 leaves nothing of epochs 3; set it lower, such as to 0",
      "init_from: model vgg13 has no backbone; set it to null"]),
    ({**model(), "init_from": "a"}, []),
    ({**model(backbone={"name": "resnet50"}), "init_from": "a"},
     ["model.backbone.weights: init_from gives them; set one of the two to null"]),
    ({"teacher": "x", "input": {"equalize": True}},
     ["teacher: needs the brightness that input.equalize takes away; set that to false"]),
    ({"teacher_share": 0.7}, ["teacher_share: counts for nothing without a teacher; name one, or leave it out"]),
    ({"teacher": "x", "teacher_share": 0.7}, []),
    ({"input": {"image_size": 15}}, ["input.image_size: 15 is too small: VGG13 halves it four times, so 16 at least"]),
    ({"model": {"name": "vgg13", "width": 0.001}}, ["model.width: 0.001 leaves no channel"]),
    ({**model(stn=True, resizer={"name": "bilinear", "size": 32}), "input": {"image_size": 17}},
     ["input.image_size: 17 is too small for model.stn: at least 18"]),
    (model(head_dropout=0.2), ["model.head_dropout: has no effect without hidden layers; leave it out"]),
    (model(resizer={"name": "neural", "size": 40, "scale": 1.5}),
     ["model.resizer.scale: 1.5 of input.image_size 32 is 48, not model.resizer.size 40"]),
    ({"model": {"name": "emotion_encoder", "backbone": RESNET, "identity": {**RESNET, "caffe": True}},
      "input": {"image_size": 32, "channels": 1}},
     ["model.identity.caffe: this network expects colour; set input.channels to 3"]),
    ({"model": {"name": "emotion_encoder", "backbone": {**RESNET, "caffe": True},
                "identity": {**RESNET, "weights": "pretrained", "caffe": True}},
      "input": {"image_size": 32, "mean": [0.0], "std": [1.0], "standardize": True}},
     ["model.backbone.caffe: only model.identity gets images in Caffe's range; set it to false",
      "model.identity.caffe: torchvision's weights are not Caffe's; name a file in weights",
      "model.identity.caffe: this network expects plain pixels; set input.equalize, flatten and standardize to false"]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "messages"), MISTAKES)
def test_what_does_not_fit_together(keys: dict[str, Any], messages: list[str]) -> None:
    """What a section refuses on its own is in test_settings.py."""
    assert [str(fault) for fault in check(Run, {**SMALL, **keys})[1]] == messages


def test_a_run_that_continues_one_of_other_pixels_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Another size is no matter: convolutions take it, and what cannot is refused."""
    others = ({}, {"image_size": 48}, {"std": [0.5], "equalize": True})
    first = small_run(**model(backbone={**RESNET, "weights": "a.pth"}))
    later = [small_run(**model() | {"input": model()["input"] | other}, init_from="first") for other in others]
    assert [chain_pixels(run, first) for run in later[:2]] == [None, None]
    warn_of_weights({"first": first, **{f"run{number}": run for number, run in enumerate(later)}})
    told = "first was trained with input.equalize False, input.std [0.25], not with True, [0.5]"
    assert capsys.readouterr().out.replace("\n", " ").split() == ["run2:", *told.split()]


def test_what_a_run_asks_of_its_data_in_vain(data: Path) -> None:
    votes = "loss vote_cross_entropy learns from votes, and these data have a single label an image"
    whole = open_data(data)
    assert data_doubts(small_run(batch_size=96), whole) == []
    ours = small_run(batch_size=97, loss={"name": "vote_cross_entropy"})
    many = "batch_size 97 is more than the 96 training images"
    assert data_doubts(ours, whole) == [many]  # of the majority's labels the targets are votes all the same
    whole.summary["labels"] = "hard"
    assert data_doubts(ours, whole) == [votes, many]
    whole.summary.update(labels="votes", label_noise=0.1)  # which are no targets then
    assert data_doubts(ours, whole) == [votes, many]
    whole.summary["label_noise"] = 0.0
    whole.summary["counts"]["test"] |= {"contempt": 0, "fear": 0}
    assert data_doubts(ours, whole) == [
        many, "test holds no image of fear, contempt, so its numbers say nothing of that"
    ]  # fmt: skip


def test_test_images_that_the_run_it_starts_from_has_learned_are_counted(tmp_path: Path) -> None:
    """The same images divided the other way round: 40 test images, of which four have the mark of a leak."""
    ours, theirs = (open_data(make_data(tmp_path / name)) for name in ("ours", "theirs"))
    run = small_run().model_copy(update={"init_from": "first"})
    assert data_doubts(run, ours, theirs) == []  # without raw/labels.csv there is nothing to compare
    for one, sign in ((ours, ""), (theirs, "other ")):
        (one.folder / "raw").mkdir()
        hashes = pd.DataFrame({"row": range(176), "sha1": [f"{sign}{row}" for row in range(176)]})
        hashes.to_csv(one.folder / "raw" / "labels.csv", index=False)
    assert data_doubts(run, ours, theirs) == []
    hashes["sha1"] = [str(175 - row) for row in range(176)]
    hashes.to_csv(theirs.folder / "raw" / "labels.csv", index=False)
    assert data_doubts(run, ours, theirs) == [
        "first, from which it starts, is trained on theirs, whose train and val hold 36 of the test images that count "
        "as unleaked here; divide both data sets alike"
    ]
    assert data_doubts(run, ours) == []


def test_patience_ends_a_run_that_gets_no_better() -> None:
    for patience, values, epochs in (
        (None, [0.5, 0.4, 0.4, 0.4, 0.4], 5),
        (2, [0.5, 0.4, 0.6, 0.6, 0.5], 5),  # equal is not better
        (1, [0.1, 0.2, 0.3, 0.2], 4),
    ):
        run, rows = small_run(epochs=5, patience=patience), [{"val_accuracy": value} for value in values]
        assert [run.is_over(rows[:count]) for count in range(len(rows) + 1)] == [False] * epochs + [True]


# Where a run computes

UNEVEN = "batch_size: 16 does not divide by resources.workers {}"
ODD = "batch_size: augment.mixup and augment.cutmix pair images, but 16 / 4 workers / 4 parts is odd"
GPUS = "gpus_per_worker: several workers need a whole GPU each, got 0.5; set workers to 1"
MIXUP: dict[str, Any] = {"augment": {"mixup": 0.2}}
RESOURCES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"workers": 4, "accumulate": 4, "gpus_per_worker": 2}, {}, []),
    ({"workers": 3, "gpus_per_worker": 0}, {}, [UNEVEN.format("3")]),
    ({"workers": 2, "accumulate": 3}, {}, [UNEVEN.format("2 times resources.accumulate 3")]),
    ({"workers": 4, "accumulate": 2}, MIXUP, []),
    ({"workers": 4, "accumulate": 4}, MIXUP, [ODD]),
    ({"workers": 1, "gpus_per_worker": 0.5}, {}, []),
    ({"workers": 2, "gpus_per_worker": 0.5}, {}, [GPUS]),
    ({"workers": 2, "gpus_per_worker": 0.5, "device": "cpu"}, {}, []),
]


@pytest.mark.parametrize(("tree", "keys", "messages"), RESOURCES)
def test_a_batch_is_shared_in_equal_parts_and_a_gpu_by_nobody(
    tree: dict[str, Any], keys: dict[str, Any], messages: list[str]
) -> None:
    resources, faults = check(Resources, tree)
    faults += [] if resources is None else resource_faults(small_run(**keys), resources)
    assert [str(fault) for fault in faults] == messages
