"""The page of `fer compare --report`: complete in itself, with the numbers of the stored predictions."""

import json
import re
import socket
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_comparison import CLASSES, LABELS, right, write_run

from pipelines.comparison import pairs, side
from pipelines.page import _reliability, compared

ONE, OTHER = right(0.9, 1), right(0.8, 2)


class Page(HTMLParser):
    """Elements, attributes and texts of a page; every element must be closed."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = list[str](), set[str](), list[str](), list[str]()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open += [] if tag == "meta" else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts += [" ".join(data.split())] if data.strip() else []


@pytest.fixture
def runs(recipes: Path) -> Path:
    """Three runs of two recipes in the project, with curves, and a picture with an odd name."""
    runs = recipes / "data/runs"
    for name, seed, hits in (("one", 1, ONE), ("one", 2, right(0.9, 3)), ("other", 1, OTHER)):
        folder = runs / write_run(runs, name, seed, hits)
        keys = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds", "time")
        rows = [{"epoch": epoch, **dict.fromkeys(keys, 1 / epoch)} for epoch in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for path in folder.glob("predictions_*.csv"):
            pd.read_csv(path).assign(name="<script>x.png").to_csv(path, index=False)
    return runs


def test_a_page_needs_nothing_beside_it_and_tells_what_the_predictions_tell(runs: Path) -> None:
    sides = [side(word, runs) for word in ("one-s1", "other")]
    html = compared(sides, pairs(sides, None))
    page = Page(html)
    assert {"script", "img", "link", "iframe"}.isdisjoint(page.tags)
    assert {"src", "href", "onload"}.isdisjoint(page.attributes)
    assert "url(" not in html
    assert "0" in page.texts
    assert "-0" not in page.texts  # of an axis from less than 0
    assert "<script>x.png" in page.texts  # as a text, not as an element
    alone = [(ONE & ~OTHER).sum(), (OTHER & ~ONE).sum()]
    both = f"Both are right on {(ONE & OTHER).sum()} images and both wrong on {(~ONE & ~OTHER).sum()}."
    assert both in page.texts
    for each, many in zip(sides, alone):
        assert any(text.startswith(f"{each.name} alone is right on {many}") for text in page.texts)
    for hits in (ONE, OTHER):
        for label, name in enumerate(CLASSES):
            rows = label == LABELS
            assert f"{name} as {name}: {(hits & rows).sum()} of {rows.sum()}" in page.texts
    gap = 100 * (ONE.mean() - OTHER.mean())
    assert f"accuracy {gap:+.2f}" in page.texts
    share = 100 * np.array([ONE.mean(), OTHER.mean()])  # all predictions have probability .8
    found = [re.search(r"^400 predictions, confidence 80.0 %, right ([\d.]+) %$", text) for text in page.texts]
    assert [float(match[1]) for match in found if match] == pytest.approx(share, abs=0.05)


def test_bins_of_confidence_are_those_of_the_calibration_error() -> None:
    """.8 is the upper end of the bin that begins at .733."""
    one: Any = SimpleNamespace(probabilities=np.float32([[[0.8, 0.2], [0.75, 0.25]]]), labels=np.array([0, 0]))
    assert _reliability(one, "red").count("<circle") == 1


def test_seeds_are_one_side_with_a_line_for_each(runs: Path) -> None:
    sides = [side(word, runs) for word in ("one", "other")]
    page = Page(compared(sides, pairs(sides, None)))
    assert "one (2 seeds): sums over 2 runs" in "".join(page.texts)
    assert page.tags.count("polyline") == 2 * 3 + 2 * 3 + 2  # accuracies, losses, reliability
    assert "Published on this data set" not in page.texts


def test_one_side_alone_without_curves_and_with_published_numbers_beside(runs: Path) -> None:
    for path in runs.glob("*/summary.json"):
        path.with_name("metrics.jsonl").unlink()
        summary = json.loads(path.read_text())
        path.write_text(json.dumps(summary | {"data": summary["data"] | {"dataset": "ferplus"}}))
    texts = Page(compared([side("other", runs)], [])).texts
    assert texts.count("No curves are stored.") == 2
    assert not any("disagree" in text for text in texts)
    place = texts.index("Neural Resizer, Swin-B 2022")
    assert texts[place : place + 3] == ["Neural Resizer, Swin-B 2022", "89.50", "ImageNet"]


def test_a_class_without_test_images_has_no_recall(runs: Path) -> None:
    before = compared([side("other", runs)], [])
    for path in runs.glob("other-*/predictions_test.csv"):
        table = pd.read_csv(path)
        table.assign(label=table["label"].replace(CLASSES[1], CLASSES[0])).to_csv(path, index=False)
    after = compared([side("other", runs)], [])
    assert after.count("<circle") == before.count("<circle") - 1
    assert "nan" not in after


def test_without_a_tracking_server_the_page_is_there_all_the_same(
    runs: Path, here: Callable[..., subprocess.CompletedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    done = here("compare", "one", "other", "--report", "page.html")
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    assert "Not logged to the runs in MLflow: " in said
    assert f"no server answers at http://127.0.0.1:{port} (" in said
    Page(Path("page.html").read_text())


def test_the_command(runs: Path, here: Callable[..., subprocess.CompletedProcess]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")  # MLflow keeps one connection a name
    experiment = client.create_experiment("fer", (Path.cwd() / "mlruns").as_uri())
    known = client.create_run(experiment, tags={"fer.run_id": next(runs.glob("other-*")).name}).info.run_id
    done = here("compare", "one", "other", "--report", "page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "page.html of 1 of 3 runs" in done.stdout
    assert "one (2 seeds) - other" in done.stdout
    assert [file.path for file in client.list_artifacts(known, "compare")] == ["compare/page.html"]
    Page(Path("page.html").read_text())
    assert list(Path().glob("*.partial")) == []
    for words, told in (
        (("one", "--report", "no/page.html"), "no/page.html: name a file in a folder that exists"),
        (
            (*"abcdefg", "--report", "p.html"),
            "p.html: a page shows 6 sides at most, each in a colour of its own; name fewer than 7",
        ),
        (("--report", "p.html"), "p.html: name the runs to compare, `fer compare RUN RUN --report p.html`"),
    ):
        failed = here("compare", *words)
        assert (failed.returncode, failed.stderr) == (2, f"error: --report {told}\n")
