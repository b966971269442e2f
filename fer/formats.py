"""Reads the settings of runs that earlier versions wrote. Such runs can be used, but not trained further.

Format 1 (until November 2026): flat keys, `options` for the model, machine settings among the others, no key `format`.
Its meaning has changed in four ways that the settings do not show: colour images became grey by the plain
mean (now luma), class tokens and position embeddings decayed, averaged weights (`ema_decay`) had no warm-up, and the
val loss of vote_sampling was drawn at random.
"""

from typing import Any

from fer.errors import UserError
from fer.run import FORMAT, Run
from fer.settings import check


def format_of(content: dict[str, Any]) -> int:
    """The format of a checkpoint.json, config.json or summary.json."""
    return content.get("format", 1)


def read_run(content: dict[str, Any], path: Any) -> Run:
    """The settings in a checkpoint.json or config.json. Raises UserError, naming `path`, if they cannot be read."""
    try:
        found = format_of(content)
        if type(found) is not int or not 1 <= found <= FORMAT:
            raise UserError(
                f"{path}: format {found} was written by a later version (this one reads up to {FORMAT}); "
                "update the project"
            )
        tree = content["config"]
        run, faults = check(Run, _from_format_1(tree) if found == 1 else tree)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: holds no settings of a run ({type(error).__name__}: {error})") from None
    if run is None:
        raise UserError(f"{path}: {faults[0].under('config')}; its settings cannot be read")
    return run


def _from_format_1(old: dict[str, Any]) -> dict[str, Any]:
    new = {key: old[key] for key in _SAME if key in old}
    new["input"] = {"image_size": old["image_size"], "channels": old["channels"]}
    new["input"] |= {key: _once(old[f"pixel_{key}"]) for key in ("mean", "std")}
    new["loss"] = {"name": old["loss"], **_of(old, _LOSS_KEYS.get(old["loss"], {}))}
    new["optimizer"] = {"name": old["optimizer"], "lr": old["lr"], "weight_decay": old["weight_decay"]}
    new["optimizer"] |= {"momentum": old["momentum"]} if old["optimizer"] == "sgd" else {}
    schedule_keys = {key: key for key in ("warmup_epochs", *_SCHEDULE_KEYS[old["schedule"]])}
    new["schedule"] = {"name": old["schedule"], **_of(old, schedule_keys)}
    new["model"] = _model(old["model"], dict(old["options"]))
    return new


_SAME = (
    "init_from", "seed", "epochs", "batch_size", "class_weights", "balanced_sampling", "clip_grad_norm", "ema_decay",
    "sam_rho", "precision", "augment",
)  # fmt: skip
_ALPHA, _GAMMA = {"alpha": "loss_alpha"}, {"gamma": "loss_gamma"}
_LOSS_KEYS = {
    "label_smoothing": _ALPHA,
    "focal": _GAMMA,
    "pdls": _ALPHA,
    "focal_pdls": _ALPHA | _GAMMA,
    "compensated_focal_pdls": _ALPHA,
}
_SCHEDULE_KEYS = {"cosine": ("min_lr_ratio",), "step": ("step_epochs", "step_factors"), "constant": ()}


def _of(old: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    return {new: old[key] for new, key in keys.items()}


def _once(values: list[float]) -> list[float]:
    return values if len(set(values)) > 1 else values[:1]


def _model(name: str, options: dict[str, Any]) -> dict[str, Any]:
    for key in ("backbone", "identity"):
        if key in options:
            backbone = options[key]
            options[key] = {"name": backbone["name"], "weights": backbone["weights"], **backbone["settings"]}
    if name == "classifier":
        sizes = {key: options.pop(f"resizer_{key}") for key in ("size", "blocks", "channels", "scale")}
        kept = {"none": (), "bilinear": ("size",), "neural": tuple(sizes)}[options["resizer"]]
        options["resizer"] = {"name": options["resizer"], **{key: sizes[key] for key in kept}}
        if not options["head"]:
            del options["head_dropout"]
    if name == "difference_of_embeddings":
        references = options.pop("references")
        own = {"references": references} if options["pairing"] == "random_neutral" else {}
        options["pairing"] = {"name": options["pairing"], **own}
    return {"name": name, **options}
