"""A run's id follows from what decides its numbers, and from nothing else."""

import copy
import json
from typing import Any

import pytest
from conftest import small_run
from pydantic import ValidationError

from fer.config import RunConfig, nearest, run_id

# Fields that change no number, or that other values would make impossible on their own
OTHER = {
    "model": "vit_se", "options": {"width": 0.125}, "init_from": "other",
    "seed": 7, "epochs": 4, "batch_size": 32, "image_size": 32,
    "pixel_mean": [0.4], "pixel_std": [0.3], "loss": "focal", "loss_alpha": 0.9, "loss_gamma": 1.0,
    "optimizer": "sgd", "lr": 0.02, "momentum": 0.8, "weight_decay": 0.1, "schedule": "step", "warmup_epochs": 1,
    "min_lr_ratio": 0.5, "step_epochs": [2], "step_factors": [0.75], "clip_grad_norm": None, "ema_decay": 0.9,
    "precision": "bf16", "class_weights": 0.5, "balanced_sampling": 0.5, "sam_rho": 0.05,
}  # fmt: skip
AUGMENT = dict.fromkeys(
    (
        "flip", "rotation", "scale", "translation", "brightness", "contrast", "saturation", "erasing", "mixup", "cutmix"
    ),
    0.125,
)  # fmt: skip
FIXED = {
    "model": "vgg13", "options": {"width": 0.25, "batch_norm": True, "conv_dropout": 0.1, "dense_dropout": 0.3},
    "init_from": None,
    "seed": 1111, "epochs": 8, "batch_size": 64, "eval_batch_size": 256, "image_size": 48, "channels": 1,
    "pixel_mean": [0.5], "pixel_std": [0.25], "loss": "cross_entropy", "loss_alpha": 0.8, "loss_gamma": 2.0,
    "optimizer": "adamw", "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.05, "schedule": "cosine", "warmup_epochs": 1,
    "min_lr_ratio": 0.01, "step_epochs": [15], "step_factors": [0.25], "clip_grad_norm": 1.0, "ema_decay": None,
    "precision": "fp32", "class_weights": 0.0, "balanced_sampling": 0.0, "sam_rho": None,
    "augment": {
        "flip": 0.5, "rotation": 10, "scale": 0.1, "translation": 0.06, "brightness": 0.2, "contrast": 0.2,
        "saturation": 0.0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0,
    },
    "resources": {
        "device": "auto", "workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 1, "accumulate": 1,
        "sync_batch_norm": False, "compile": False, "data_share": 0.5, "readers": 2,
    },
}  # fmt: skip
NOT_DECIDING = {"eval_batch_size", "resources"}


def test_run_id_is_stable_over_releases() -> None:
    # a changed value here means that finished runs are trained again: only with a changed meaning of the settings
    assert run_id("small", RunConfig.model_validate(FIXED), "0123456789abcdef") == "small-s1111-c8139414"


def test_every_field_is_covered_below() -> None:
    assert {*OTHER, "channels", "augment", *NOT_DECIDING} == set(RunConfig.model_fields)
    assert set(AUGMENT) == set(small_run().augment.model_dump())


@pytest.mark.parametrize("field", OTHER)
def test_run_id_changes_with_what_decides_the_numbers(field: str) -> None:
    assert run_id("x", small_run(**{field: OTHER[field]}), "d") != run_id("x", small_run(), "d")


@pytest.mark.parametrize("field", AUGMENT)
def test_run_id_changes_with_augmentation(field: str) -> None:
    assert run_id("x", small_run(augment={field: AUGMENT[field]}), "d") != run_id("x", small_run(), "d")


def test_run_id_changes_with_channels_data_and_name() -> None:
    colour = small_run(channels=3, pixel_mean=[0.5] * 3, pixel_std=[0.25] * 3)
    ids = {run_id("x", colour, "d"), run_id("x", small_run(), "d"), run_id("x", small_run(), "e")}
    assert len(ids) == 3
    assert run_id("y", small_run(), "d") == "y" + run_id("x", small_run(), "d")[1:]


def test_run_id_changes_with_the_run_it_starts_from() -> None:
    assert len({run_id("x", small_run(), "d", start) for start in (None, "y-s1-01234567", "y-s1-01234568")}) == 3


def test_run_id_is_the_same_on_other_machines() -> None:
    moved = small_run(
        eval_batch_size=7,
        resources={
            "device": "auto",
            "workers": 4,
            "cpus_per_worker": 3,
            "gpus_per_worker": 0.5,
            "accumulate": 2,
            "sync_batch_norm": True,
            "compile": True,
            "data_share": 0.1,
            "readers": 0,
        },
    )
    assert run_id("x", moved, "d") == run_id("x", small_run(), "d")


def test_run_id_does_not_depend_on_how_a_number_is_written() -> None:
    as_int = json.loads(json.dumps(small_run().model_dump()))
    as_int["augment"]["erasing"], as_int["warmup_epochs"] = 0, 0
    assert run_id("x", RunConfig.model_validate(as_int), "d") == run_id("x", small_run(), "d")


def test_a_run_survives_json() -> None:
    run = small_run(loss_gamma=1.1, lr=1e-5)
    assert RunConfig.model_validate(json.loads(json.dumps(run.model_dump()))) == run


def test_a_run_is_frozen() -> None:
    run = small_run()
    for section, key in ((run, "lr"), (run.augment, "flip"), (run.resources, "workers")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_no_key_has_a_default() -> None:
    whole = small_run().model_dump()
    for path in [(key,) for key in whole] + [(part, key) for part in ("augment", "resources") for key in whole[part]]:
        lacking: dict[str, Any] = copy.deepcopy(whole)
        table = lacking if len(path) == 1 else lacking[path[0]]
        del table[path[-1]]
        with pytest.raises(ValidationError) as caught:
            RunConfig.model_validate(lacking)
        assert [(fault["loc"], fault["type"]) for fault in caught.value.errors()] == [(path, "missing")]


def test_nearest_name_or_all_of_them() -> None:
    assert nearest("focl", ["pdls", "focal"]) == ", did you mean 'focal'?"
    assert nearest("foc", ["focused", "foca", "focal"]) == ", did you mean 'focused'?"  # what begins so
    assert nearest("zzz", ["pdls", "focal"]) == "; known: focal, pdls"
