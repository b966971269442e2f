"""params.yaml: every mistake is one line with its dotted path, all at once; and no key is dead."""

import ast
import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from fer.config import Augment, Resources, RunConfig
from fer.errors import UserError
from fer.losses import LOSSES
from fer.models import MODELS
from fer.models.backbones import FAMILIES, BackboneOptions
from fer.models.classifier import ClassifierOptions
from pipelines.params import SECTIONS, Sample, Sweep, add_model, check, load, merge

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "params.yaml"
PARAMS = ROOT / "tests" / "golden" / "params.yaml"


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(PARAMS, overrides)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{PARAMS}: ") for line in lines)
    return [line.removeprefix(f"{PARAMS}: ") for line in lines]


def test_shipped_file_loads_and_models_override_train() -> None:
    train, models = _plain(SHIPPED)["train"], load(SHIPPED).models
    assert {run.model for run in models.values()} == set(MODELS)
    published = models["vgg13_ferplus"]
    assert (published.batch_size, published.optimizer, published.epochs) == (32, "sgd", 100)
    assert published.loss_gamma == train["loss_gamma"]  # not its own


def test_a_power_of_ten_is_a_number() -> None:
    assert "lr: 1e-3" in PARAMS.read_text()
    assert load(PARAMS).models["vit_tiny"].lr == 1e-3


TYPES_AND_RANGES = {
    "train.lr=fast": "train.lr: should be a valid number, got 'fast'",
    "train.lr=true": "train.lr: should be a valid number, got True",
    "train.lr=0": "train.lr: should be greater than 0, got 0",
    "train.lr=.nan": "train.lr: should be a finite number, got nan",
    "train.lr=.inf": "train.lr: should be a finite number, got inf",
    "train.epochs=true": "train.epochs: should be a valid integer, got True",
    "train.epochs=3.0": "train.epochs: should be a valid integer, got 3.0",
    "train.epochs='3'": "train.epochs: should be a valid integer, got '3'",
    "train.epochs=0": "train.epochs: should be greater than 0, got 0",
    "train.seed=-1": "train.seed: should be greater than or equal to 0, got -1",
    "train.loss=null": "train.loss: should be a valid string, got None",
    "train.clip_grad_norm=-1": "train.clip_grad_norm: should be greater than 0, got -1",
    "train.ema_decay=1": "train.ema_decay: should be less than 1, got 1",
    "train.precision=fp8": "train.precision: should be 'fp32', 'bf16' or 'fp16', got 'fp8'",
    "train.channels=2": "train.channels: should be 1 or 3, got 2",
    "train.pixel_std=[0.2, 0.0, 0.2]": "train.pixel_std.1: should be greater than 0, got 0.0",
    "train.step_factors=[1.5]": "train.step_factors.0: should be less than or equal to 1, got 1.5",
    "train.augment=none": "train.augment: should be a table of keys, got 'none'",
    "train.augment.flip=1.1": "train.augment.flip: should be less than or equal to 1, got 1.1",
    "train.augment.flip=": "train.augment.flip: should be a valid number, got None",
    "train.resources.device=gpu": "train.resources.device: should be 'auto', 'cpu' or 'cuda', got 'gpu'",
    "models.vgg13_small.augment.flip=2": "models.vgg13_small.augment.flip: should be less than or equal to 1, got 2",
    "models.vgg13_small.batch_size=0": "models.vgg13_small.batch_size: should be greater than 0, got 0",
    "models.vgg13_small.pixel_std=[0]": "models.vgg13_small.pixel_std.0: should be greater than 0, got 0",
    "models.vit_tiny=null": "models.vit_tiny: must be a table of keys",
    "models.vit_tiny.options=null": "models.vit_tiny.options: should be a table of keys, got None",
    "models.vit_tiny.options.stn=1": "models.vit_tiny.options.stn: should be a valid boolean, got 1",
    "models.vit_tiny.options.resizer=cubic": (
        "models.vit_tiny.options.resizer: should be 'none', 'bilinear' or 'neural', got 'cubic'"
    ),
    "models.vit_tiny.options.backbone=vit": "models.vit_tiny.options.backbone: should be a table of keys, got 'vit'",
    "models.vit_tiny.options.backbone.settings.depth=2.5": (
        "models.vit_tiny.options.backbone.settings.depth: should be a valid integer, got 2.5"
    ),
    "models.swin_tiny.options.backbone.settings.depths=[2, 0, 2]": (
        "models.swin_tiny.options.backbone.settings.depths.1: should be greater than 0, got 0"
    ),
    "train.class_weights=2": "train.class_weights: should be less than or equal to 1, got 2",
    "train.balanced_sampling=true": "train.balanced_sampling: should be a valid number, got True",
    "data.dataset=raf": "data.dataset: should be 'sample' or 'ferplus', got 'raf'",
    "data.path=3": "data.path: should be a valid string, got 3",
    "data.votes_sha256=abc": "data.votes_sha256: should match pattern '^[0-9a-f]{64}$', got 'abc'",
    "data.sample.train=79": "data.sample.train: should be greater than or equal to 80, got 79",
    "data.sample=3": "data.sample: should be a table of keys, got 3",
    "super_resolution.method=nearest": (
        "super_resolution.method: should be 'none', 'bicubic', 'lanczos', 'dic' or 'swin2sr', got 'nearest'"
    ),
    "super_resolution.scale=17": "super_resolution.scale: should be less than or equal to 16, got 17",
    "super_resolution.workers=0": "super_resolution.workers: should be greater than 0, got 0",
    "super_resolution.precision=fp8": "super_resolution.precision: should be 'fp32', 'bf16' or 'fp16', got 'fp8'",
    "super_resolution.device=gpu": "super_resolution.device: should be 'auto', 'cpu' or 'cuda', got 'gpu'",
    "super_resolution.weights=null": "super_resolution.weights: should be a valid string, got None",
    "super_resolution.grey_tolerance=-1": (
        "super_resolution.grey_tolerance: should be greater than or equal to 0, got -1"
    ),
    "super_resolution.grey_tolerance=256": (
        "super_resolution.grey_tolerance: should be less than or equal to 255, got 256"
    ),
    "split.drop_leaked_train=1": "split.drop_leaked_train: should be a valid boolean, got 1",
    "split.prior_min_votes=0": "split.prior_min_votes: should be greater than 0, got 0",
    "split.train_share=0": "split.train_share: should be greater than 0, got 0",
    "split.train_share=1.5": "split.train_share: should be less than or equal to 1, got 1.5",
    "split.train_share=half": "split.train_share: should be a valid number, got 'half'",
    "split.seed=-1": "split.seed: should be greater than or equal to 0, got -1",
    "experiment.retries=-1": "experiment.retries: should be greater than or equal to 0, got -1",
    "tracking.uri=null": "tracking.uri: should be a valid string, got None",
}
UNKNOWN = {
    "train.epoch=3": "train.epoch: unknown key, did you mean 'epochs'?",
    "train.augment.rotaton=3": "train.augment.rotaton: unknown key, did you mean 'rotation'?",
    "train.resources.zzz=1": (
        "train.resources.zzz: unknown key; known: accumulate, compile, cpus_per_worker, data_share, device, "
        "gpus_per_worker, readers, sync_batch_norm, workers"
    ),
    "train.loss=focl": "train.loss: unknown loss 'focl', did you mean 'focal'?",
    "models.vgg13_small.lrr=1": "models.vgg13_small.lrr: unknown key, did you mean 'lr'?",
    "models.vgg13_small.loss=zzz": (f"models.vgg13_small.loss: unknown loss 'zzz'; known: {', '.join(sorted(LOSSES))}"),
    "models.vit_tiny.model=vitt": "models.vit_tiny.model: unknown model 'vitt', did you mean 'vit_se'?",
    "models.vit_tiny.model=zzz": f"models.vit_tiny.model: unknown model 'zzz'; known: {', '.join(sorted(MODELS))}",
    "models.vit_tiny.options.backbon=8": "models.vit_tiny.options.backbon: unknown key, did you mean 'backbone'?",
    "models.vit_tiny.options.backbone.settings.patch=8": (
        "models.vit_tiny.options.backbone.settings.patch: unknown key, did you mean 'patch_size'?"
    ),
    "models.vit_tiny.options.backbone.name=vit_tiny": (
        "models.vit_tiny.options.backbone.name: unknown backbone 'vit_tiny', did you mean 'vit_tiny_patch16_224'?"
    ),
    "data.pth=x": "data.pth: unknown key, did you mean 'path'?",
    "data.sample.tran=100": "data.sample.tran: unknown key, did you mean 'train'?",
    "tracking.url=x": "tracking.url: unknown key, did you mean 'uri'?",
    "trian.lr=1": "trian: unknown key, did you mean 'train'?",
}
IMPOSSIBLE = {
    "models.vit_tiny.resources.workers=3": "models.vit_tiny: batch_size 64 does not divide by resources.workers 3",
    "models.vit_tiny.resources.gpus_per_worker=1.5": (
        "models.vit_tiny.resources: gpus_per_worker above 1 must be a whole number, got 1.5"
    ),
    "models.vit_tiny.resources.accumulate=3": (
        "models.vit_tiny: batch_size 64 does not divide by resources.workers 1 times resources.accumulate 3"
    ),
    "models.vgg13_small.channels=3": [
        "models.vgg13_small: pixel_mean has 1 numbers but channels is 3",
        "models.vgg13_small: pixel_std has 1 numbers but channels is 3",
    ],
    "train.warmup_epochs=8": "train: warmup_epochs 8 leaves nothing of epochs 8",
    "models.vgg13_small.epochs=1": "models.vgg13_small: warmup_epochs 1 leaves nothing of epochs 1",
    "train.step_epochs=[20, 10]": [
        "train: step_epochs [20, 10] must rise",
        "train: step_factors has 1 numbers, step_epochs 2",
    ],
    "models.vit_tiny.image_size=50": "models.vit_tiny.options.backbone: size 50 does not divide by patch_size 8",
    "models.vit_tiny.options={}": [f"models.vit_tiny.options.{key}: missing" for key in ClassifierOptions.model_fields],
    "models.vit_tiny={model: classifier, options: {backbone: {}}}": [
        f"models.vit_tiny.options.{key}: missing"
        for key in [
            "stn",
            "resizer",
            "resizer_size",
            "resizer_blocks",
            "resizer_channels",
            "resizer_scale",
            "backbone.name",
            "backbone.weights",
            "backbone.settings",
            "head",
            "head_dropout",
        ]
    ],
    "models.swin_tiny.image_size=40": (
        "models.swin_tiny.options.backbone: size 40 does not divide by 16 (patch_size 4, halved in 3 stages)"
    ),
    "models.vit_deeper.init_from=vit_tinny": (
        "models.vit_deeper.init_from: no model 'vit_tinny', did you mean 'vit_tiny'?"
    ),
    "models.vit_deeper.init_from=vit_deeper": (
        "models.vit_deeper.init_from: vit_deeper -> vit_deeper is a circle; set one of them to null"
    ),
    "models.vit_deeper.init_from=swin_tiny": (
        "models.vit_deeper.init_from: swin_tiny has another backbone (swin_tiny_patch4_window7_224); "
        "give both the same name and settings"
    ),
    "models.vit_deeper.init_from=vgg13_small": (
        "models.vit_deeper.init_from: vgg13_small has no backbone; set it to null"
    ),
    "models.vgg13_small.init_from=vit_tiny": (
        "models.vgg13_small.init_from: vgg13_small has no backbone; set it to null"
    ),
    "models.vgg13_small.image_size=15": (
        "models.vgg13_small.image_size 15 is too small: VGG13 halves it four times, so 16 at least"
    ),
    "models.vgg13_small.options.width=0.001": "models.vgg13_small.options.width 0.001 leaves no channel",
    "super_resolution.scale=2": "super_resolution: method none keeps the size, so scale must be 1, got 2",
    "models.a/b.model=vgg13": "models.a/b: a model's name is made of letters, digits, _ and -; rename it",
    "models={}": "train and models: must be two tables of keys, with one model at least",
    "train=null": "train and models: must be two tables of keys, with one model at least",
}


@pytest.mark.parametrize(("override", "message"), [*TYPES_AND_RANGES.items(), *UNKNOWN.items(), *IMPOSSIBLE.items()])
def test_mistake_is_reported_once_where_it_stands(override: str, message: str | list[str]) -> None:
    assert mistakes(override) == ([message] if isinstance(message, str) else message)


def test_mixed_images_come_in_pairs() -> None:
    odd = ["models.vit_tiny.resources.accumulate=64", "models.vit_tiny.augment.cutmix=1.0"]
    assert mistakes(*odd) == [
        "models.vit_tiny: augment.mixup and cutmix pair images: batch_size 64 / 1 workers / 64 parts is odd"
    ]
    assert load(PARAMS, [odd[1], "models.vit_tiny.resources.accumulate=32"])


def test_sharpness_aware_steps_need_gradients_as_they_are() -> None:
    keys = ["models.vit_tiny.sam_rho=0.05", "models.vit_tiny.precision=fp16"]
    assert mistakes(*keys) == ["models.vit_tiny: sam_rho needs precision fp32 or bf16, as fp16 scales its gradients"]
    assert load(PARAMS, keys[:1])


def test_a_fault_of_train_names_the_models_that_make_it_their_own() -> None:
    assert mistakes("train.resources.workers=3") == [
        "train: batch_size 64 does not divide by resources.workers 3",
        "models.vgg13_ferplus: batch_size 32 does not divide by resources.workers 3",
    ]


@pytest.mark.parametrize(("method", "able"), [("dic", [8]), ("swin2sr", [2, 4])])
def test_scales_of_super_resolution(method: str, able: list[int]) -> None:
    for scale in range(1, 17):
        chosen = [f"super_resolution.method={method}", f"super_resolution.scale={scale}"]
        if scale in able:
            assert load(PARAMS, chosen).super_resolution.scale == scale
        else:
            named = " or ".join(map(str, able))
            assert mistakes(*chosen) == [
                f"super_resolution: method {method} makes images larger by {named}, so scale must be that, got {scale}"
            ]
    assert load(PARAMS, ["super_resolution.method=bicubic", "super_resolution.scale=16"])


def test_missing_keys_are_named_at_both_levels() -> None:
    assert mistakes("super_resolution={method: bicubic}", "models.vit_tiny={}") == [
        "super_resolution.scale: missing",
        "super_resolution.weights: missing",
        "super_resolution.hub_id: missing",
        "super_resolution.precision: missing",
        "super_resolution.grey_tolerance: missing",
        "super_resolution.device: missing",
        "super_resolution.workers: missing",
        "models.vit_tiny.model: missing",
        "models.vit_tiny.options: missing",
    ]
    assert mistakes("tracking=null") == ["tracking.uri: missing", "tracking.experiment: missing"]
    tree = _plain()
    del tree["train"]["lr"]
    with pytest.raises(UserError) as caught:
        check(tree)
    # vgg13_small and vgg13_ferplus have their own
    assert str(caught.value) == "params.yaml: train.lr: missing"


def test_all_mistakes_are_reported_at_once() -> None:
    assert mistakes(
        "data.dataset=raf", "split.label_mode=x", "train.lr=0", "train.loss=focl", "models.vit_tiny.options.head=[0]"
    ) == [
        "data.dataset: should be 'sample' or 'ferplus', got 'raf'",
        "split.label_mode: should be 'majority', 'probability', 'cross_entropy' or 'multi_target', got 'x'",
        "train.lr: should be greater than 0, got 0",
        "train.loss: unknown loss 'focl', did you mean 'focal'?",
        "models.vit_tiny.options.head.0: should be greater than 0, got 0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": holds no keys; restore it with `git checkout {path}`"),
        ("- a\n- b\n", ": holds no keys; restore it with `git checkout {path}`"),
        ("a: 1\nb: [1, 2\n", ": line 3 is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\nb: 2\na: 3\n", ': line 3 is not valid YAML: found duplicate key "a" with value "3"'),
        ("a: !!python/object:os.system {}\n", ": line 1 is not valid YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_settings(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}{message.format(path=path)}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match="is not valid YAML: 'utf-8' codec"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path / "params.yaml")
    assert str(caught.value) == f"{tmp_path}/params.yaml: not found; run the command in the project's root folder"


def test_a_key_that_is_no_text_is_refused() -> None:
    tree = _plain() | {1: "x"}
    tree["models"][7] = tree["models"]["vit_tiny"]
    with pytest.raises(UserError) as caught:
        check(tree)
    assert str(caught.value).splitlines() == [
        f"params.yaml: 1: unknown key; known: {', '.join(sorted(['train', 'models', 'sweeps', *SECTIONS]))}",
        "params.yaml: models.7: a model's name is made of letters, digits, _ and -; rename it",
    ]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("lr=1e-4", 1e-4),
        ("lr=.5", 0.5),
        ("clip_grad_norm=null", None),
        ("clip_grad_norm=", None),
        ("step_epochs=[3, 5]", [3, 5]),
        ("weight_decay=1e-05", 1e-5),
        ("loss=focal", "focal"),
    ],
)
def test_set_reads_values_as_yaml(override: str, value: object) -> None:
    extra = ["train.step_factors=[0.5, 0.1]"] if "step" in override else []
    run = load(PARAMS, [f"train.{override}", *extra]).models["vit_tiny"]
    found = getattr(run, override.split("=")[0])
    assert found == value
    assert type(found) is type(value)


def test_set_makes_tables_that_are_not_there_and_the_last_one_wins() -> None:
    models = load(PARAMS, ["models.vit_tiny.augment.flip=0", "train.seed=1", " train.seed =2"]).models
    assert models["vit_tiny"].augment.flip == 0
    assert models["vit_tiny"].augment.rotation == 10
    assert models["swin_tiny"].augment.flip == 0.5
    assert models["swin_tiny"].seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "write it as key.path=value, for example --set train.lr=3e-4"),
        ("=3", "write it as key.path=value, for example --set train.lr=3e-4"),
        ("train.lr.x=3", "'lr' is a value, not a table of keys"),
        ("train.lr=[1", "the value is not valid YAML"),
    ],
)
def test_set_that_cannot_be_read(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(PARAMS, [override])
    assert str(caught.value) == f"--set {override}: {message}"


def test_merge_lays_tables_over_each_other_but_takes_options_whole() -> None:
    base = {"a": {"x": 1, "y": 2}, "options": {"x": 1, "y": 2}, "b": {"x": 1}}
    assert merge(base, {"a": {"x": 3}, "options": {"x": 3}, "b": 4, "c": {"z": 5}}) == {
        "a": {"x": 3, "y": 2},
        "options": {"x": 3},
        "b": 4,
        "c": {"z": 5},
    }
    assert base == {"a": {"x": 1, "y": 2}, "options": {"x": 1, "y": 2}, "b": {"x": 1}}


def test_check_leaves_the_tree_as_it_was() -> None:
    tree = _plain()
    check(tree)
    assert tree == _plain()


def _reads() -> set[str]:
    """Every attribute that code of fer and pipelines reads, but for the two files that only check the keys."""
    names = set()
    for path in [*ROOT.glob("fer/**/*.py"), *ROOT.glob("pipelines/**/*.py")]:
        if path.relative_to(ROOT).as_posix() not in ("fer/config.py", "pipelines/params.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return names


OPTIONS: dict[str, type[BaseModel]] = {f"options of {name}": row.options for name, row in MODELS.items()}
OPTIONS |= {f"settings of {name}": family.settings for name, family in FAMILIES.items()} | {"backbone": BackboneOptions}
KINDS: dict[str, type[BaseModel]] = {
    "train": RunConfig, "augment": Augment, "resources": Resources, "sample": Sample, "sweep": Sweep,
    **SECTIONS, **OPTIONS
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_key_is_read_by_some_code(name: str) -> None:
    assert set(KINDS[name].model_fields) - _reads() == set()


@pytest.mark.parametrize("name", ["train", *SECTIONS])
def test_every_key_stands_in_the_shipped_file(name: str) -> None:
    kind = RunConfig if name == "train" else SECTIONS[name]
    wanted = set(kind.model_fields) - ({"model", "options"} if name == "train" else set())
    assert set(_plain(SHIPPED)[name]) == wanted


def _plain(path: Path = PARAMS) -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(path.read_text())


def test_a_wrong_value_in_train_is_found_although_every_model_overrides_it() -> None:
    tree = _plain(PARAMS)
    for model in tree["models"].values():
        model |= {"lr": 1e-3, "loss": "cross_entropy"}
    tree["train"] |= {"lr": "fast", "loss": "fokal"}
    with pytest.raises(UserError) as caught:
        check(tree)
    assert "train.lr: should be a valid number, got 'fast'" in str(caught.value)
    assert "train.loss: unknown loss 'fokal', did you mean 'focal'?" in str(caught.value)


def test_runs_that_start_from_each_other_in_a_circle() -> None:
    chain = ["models.vit_tiny.init_from=vit_deeper", "models.vit_deeper.init_from=vit_tiny"]
    assert mistakes(*chain) == [
        "models.vit_tiny.init_from: vit_tiny -> vit_deeper -> vit_tiny is a circle; set one of them to null",
        "models.vit_deeper.init_from: vit_deeper -> vit_tiny -> vit_deeper is a circle; set one of them to null",
    ]


def test_a_run_has_one_start() -> None:
    start = ["models.vit_deeper.init_from=vit_tiny", "models.vit_deeper.options.backbone.weights=weights/vit"]
    assert mistakes(*start) == [
        "models.vit_deeper.options.backbone.weights: init_from gives them; set one to null",
    ]
    assert load(PARAMS, start[:1]).models["vit_deeper"].init_from == "vit_tiny"
    # another backbone, but the same numbers
    named = "models.vit_deeper.options.backbone.settings.dropout=0.0"
    assert load(PARAMS, [*start[:1], named]).models["vit_deeper"].init_from == "vit_tiny"


def test_what_yaml_anchors_share_is_set_in_one_place_alone() -> None:
    models = load(PARAMS, ["models.vit_tiny.options.backbone.settings.depth=2"]).models
    assert models["vit_tiny"].options["backbone"]["settings"]["depth"] == 2
    assert models["vit_deeper"].options["backbone"]["settings"]["depth"] == 6


def test_a_model_is_added_and_every_other_line_stays(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text())
    run = load(path, ["models.vgg13_small.lr=3e-4", "train.augment.flip=0.25", "train.batch_size=16"]).models[
        "vgg13_small"
    ]
    add_model(path, "found", run.model_dump(), "vgg13_small", "sweep x")
    assert load(path).models["found"] == run
    before, after = SHIPPED.read_text().splitlines(), path.read_text().splitlines()
    first = next(i for i, (one, other) in enumerate(zip(before, after)) if one != other)
    added = len(after) - len(before)
    assert after[:first] + after[first + added :] == before
    assert after[first : first + added] == [
        "  # sweep x",
        "  found:",
        "    model: vgg13",
        "    options: {width: 0.25, batch_norm: true, conv_dropout: 0.1, dense_dropout: 0.3}",
        "    epochs: 10",
        "    channels: 1",
        "    pixel_mean: [0.5]",
        "    pixel_std: [0.25]",
        "    weight_decay: 0.01",
        "    lr: 0.0003",
        "    batch_size: 16",
        "    augment: {flip: 0.25}",
        "",
    ]


def test_a_model_with_a_backbone_is_added_whole_at_the_files_end(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    sections = SHIPPED.read_text().split("\nmodels:\n")
    models, rest = sections[1].split("\nexperiment:")
    path.write_text(
        f"{sections[0]}\nexperiment:{rest.split(chr(10) + 'sweeps:')[0]}\nmodels:\n{models.rstrip()}"
    )  # no newline
    for name in ("swin_nr_fpdls", "swin_nr_fpdls_tiny"):
        add_model(path, f"{name}_2", load(path).models[name].model_dump(), name, "again")
    models = load(path).models
    assert models["swin_nr_fpdls_2"] == models["swin_nr_fpdls"]
    assert models["swin_nr_fpdls_tiny_2"] == models["swin_nr_fpdls_tiny"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit_tiny", ("", ""), "models.vit_tiny: is in {path} already; give another name with --as"),
        ("a b", ("", ""), "--as a b: a model's name is made of letters, digits, _ and -"),
        ("new", ("lr: 1e-3\n", "lr: 2e-3\n"), None),
        ("new", ("eval_batch_size: 256\n", "zzz: 1\n"), "{path}: train.zzz: unknown key"),
    ],
)
def test_a_model_that_cannot_be_added(tmp_path: Path, name: str, change: tuple[str, str], message: str | None) -> None:
    run = load(PARAMS).models["vit_tiny"].model_dump()
    path = tmp_path / "params.yaml"
    path.write_text(text := PARAMS.read_text().replace(*change))
    if message is None:  # the file's own train has changed: the model sets what differs now
        add_model(path, name, run, "vit_tiny", "c")
        assert load(path).models[name].lr == 1e-3
        return
    with pytest.raises(UserError) as caught:
        add_model(path, name, run, "vit_tiny", "c")
    assert message.format(path=path) in str(caught.value)
    assert path.read_text() == text


def test_a_file_whose_models_stand_in_one_line_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    tree = _plain(PARAMS)
    path.write_text(text := json.dumps(tree))
    with pytest.raises(UserError, match="`models:` is not written as a block of lines; write models.new by hand: "):
        add_model(path, "new", load(path).models["vit_tiny"].model_dump(), "vit_tiny", "c")
    assert path.read_text() == text
