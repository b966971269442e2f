"""The model card of a finished run: what it is, how good, for what, and where its limits are."""

import html
from pathlib import Path
from typing import Any

from fer.data.datasets import DATASETS
from fer.faces.detect import Haar, YuNet
from fer.made_by import UNKNOWN
from fer.run_folder import data_name
from fer.statistics import Interval, share

TEMPLATE = Path(__file__).with_name("card.md")
SPLITS = {"val": "val", "test": "test", "test_unleaked": "test, unleaked"}


def card(summary: dict[str, Any], meta: dict[str, Any]) -> str:
    """Markdown with the metadata that model hubs read, from a run's summary.json and checkpoint.json."""
    from huggingface_hub import ModelCard  # cards alone need yaml and jinja2

    data = meta["data"]
    row = DATASETS.get(data["dataset"])
    made = data.get("super_resolution", {})
    method, raw = made.get("method", "none"), made.get("raw_shape", data["image_shape"])
    enlarged = f", then enlarged {made['scale']} times with {method}" if method != "none" else ""
    targets, faces = data.get("label_mode"), data.get("faces") or {}
    margins = {kind.name: kind.margin for kind in (Haar, YuNet)} | {faces.get("detector"): faces.get("margin")}
    found = ModelCard.from_template(
        _metadata(summary, data_name(data)),
        str(TEMPLATE),
        run_id=summary["run_id"],
        classes=list(map(_plain, summary["classes"])),
        dataset=data_name(data),
        targets=f" (label rule: {targets})" if targets else "",
        train=_train(data),
        starts_from=summary.get("starts_from", ["not stated"]),
        members=summary.get("members"),
        teacher=meta["config"].get("teacher"),
        parameters=f"{summary['parameters']:,}",
        splits=[_scores(title, summary[name]) for name, title in SPLITS.items() if summary.get(name, {}).get("images")],
        recalls=_recalls(summary),
        temperature=f"{meta.get('temperature', 1.0):g}",
        shape=f"{raw[1]}x{raw[0]} pixels, {'grey' if len(raw) == 2 else 'colour'}",
        super_resolution=enlarged,
        haar=f"{margins[Haar.name]:g}",
        yunet=f"{margins[YuNet.name]:g}",
        licence=(row.licence if row else "") or "its licence is not stated here",
        commit=commit_of(meta.get("made_by", {})),
    )
    return str(found)


def _train(data: dict[str, Any]) -> str:
    """How many images it was trained on, and what was done to them on purpose; empty if that is not known."""
    share, wrong, dropped = (data.get(key) for key in ("train_share", "wrong_labels", "dropped_leaked_train"))
    made = [
        f"{share:g} of each class" if share not in (None, 1) else "",
        f"{wrong:,} of them with a wrong label, on purpose" if wrong else "",
        f"without {dropped:,} that val or test hold as well" if dropped else "",
    ]
    images, told = data.get("totals", {}).get("train"), "; ".join(filter(None, made))
    return f", {images:,} images{f' ({told})' if told else ''}" if images else ""


def commit_of(made: dict[str, Any]) -> str:
    """The commit of the code in `made_by`, and whether that code is all in it."""
    changes = ", and changes that are in no commit: pass on the folder fer/ as well"
    return str(made.get("commit", UNKNOWN)) + (changes if made.get("changed") is True else "")


def _metadata(summary: dict[str, Any], dataset: str) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    names = {"accuracy": "accuracy", "balanced_accuracy": "UAR"}
    results = [
        EvalResult("image-classification", dataset, dataset, key, summary["test"][key], "Facial expressions",
                   dataset_split="test", metric_name=name)
        for key, name in names.items()
    ]  # fmt: skip
    return ModelCardData(
        license="other", license_name="see-data-and-licences", pipeline_tag="image-classification",
        tags=["facial-expression-recognition"], model_name=summary["run_id"], eval_results=results,
    )  # fmt: skip


def _scores(title: str, scores: dict[str, Any]) -> list[str]:
    right = sum(line[label] for label, line in enumerate(scores["confusion"]))
    others = [f"{100 * scores[key]:.2f}" for key in ("balanced_accuracy", "macro_f1", "ece")]
    return [title, str(scores["images"]), _percent(share(right, scores["images"])), *others]


def _recalls(summary: dict[str, Any]) -> list[list[str]]:
    confusion = summary["test"]["confusion"]
    rows = [(name, line[label], sum(line)) for label, (name, line) in enumerate(zip(summary["classes"], confusion))]
    return [[_plain(name), str(images), _percent(share(right, images))] for name, right, images in rows if images]


def _plain(name: str) -> str:
    """A name as text in a table of Markdown."""
    return html.escape(" ".join(name.split()), quote=False).replace("|", "\\|")


def _percent(found: Interval) -> str:
    return f"{100 * found.value:.2f} ({100 * found.low:.2f} to {100 * found.high:.2f})"
