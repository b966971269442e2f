"""The numbers of a finished run agree with its predictions, leave leaked images out, and are made once."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, PEOPLE, doe, emotion_encoder, make_data, small_run

from fer import checkpoint
from fer.config import RunConfig
from fer.data.dataset import open_data
from fer.errors import UserError
from fer.evaluate import evaluate, finished, metrics, predict_split
from fer.feed import Feed
from fer.losses import build_loss
from fer.train import build_model, fit


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("bars") / "data", subjects=PEOPLE)


@pytest.fixture(scope="module")
def trained(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("x", small_run(epochs=4), bars, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / trained.name)


def table_of(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False)


def test_predictions_agree_with_the_numbers(folder: Path, bars: Path) -> None:
    summary = evaluate(folder, bars)
    for split in ("val", "test"):
        table, given = table_of(folder / f"predictions_{split}.csv"), table_of(bars / "splits" / f"{split}.csv")
        assert table.columns.tolist() == ["row", "name", "label", "prediction", "leaked", *CLASSES]
        assert table["row"].tolist() == given["row"].tolist()
        assert table["name"].tolist() == given["name"].tolist()
        assert table["label"].tolist() == [CLASSES[label] for label in given["label"]]
        assert table["prediction"].tolist() == table[CLASSES].idxmax(axis=1).tolist()
        np.testing.assert_allclose(table[CLASSES].sum(axis=1), 1, atol=5e-6)
        found = summary[split]
        right = table["label"] == table["prediction"]
        assert found["images"] == 40
        assert found["accuracy"] == pytest.approx(right.mean())
        assert found["recall"] == pytest.approx([right[table["label"] == name].mean() for name in CLASSES])
        assert found["balanced_accuracy"] == pytest.approx(np.mean(found["recall"]))
        counted = pd.crosstab(table["label"], table["prediction"]).reindex(index=CLASSES, columns=CLASSES, fill_value=0)
        assert found["confusion"] == counted.to_numpy().tolist()
    assert summary["val"]["accuracy"] > 0.2  # it has learned something: the tables are not all alike


def test_leaked_images_are_left_out(folder: Path, bars: Path) -> None:
    summary = evaluate(folder, bars)
    table = table_of(folder / "predictions_test.csv")
    assert table["row"][table["leaked"]].tolist() == [140, 150, 160, 170]
    kept = table[~table["leaked"]]
    found = summary["test_without_leaked"]
    assert found["images"] == 36
    assert found["accuracy"] == pytest.approx((kept["label"] == kept["prediction"]).mean())
    assert np.sum(found["confusion"]) == 36
    assert not table_of(folder / "predictions_val.csv")["leaked"].any()


def test_the_summary_tells_of_the_best_checkpoint(folder: Path, bars: Path) -> None:
    (folder / "last" / "model.safetensors").unlink()  # those weights are not wanted
    summary = evaluate(folder, bars)
    best, last = (checkpoint.load_meta(folder / part) for part in ("best", "last"))
    rows = last["history"]
    assert summary["best_epoch"] == best["epoch"]
    assert summary["epochs"] == 4
    assert summary["val"]["accuracy"] == max(row["val_accuracy"] for row in rows)
    for key in ("balanced_accuracy", "macro_f1", "ece"):
        assert summary["val"][key] == pytest.approx(rows[best["epoch"] - 1][f"val_{key}"], abs=1e-6)
    assert (summary["run_id"], summary["name"], summary["classes"]) == (folder.name, "x", CLASSES)
    assert summary["data_hash"] == open_data(bars).hash
    assert summary["data"]["dataset"] == "bars"
    assert summary["train_seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert summary["parameters"] == sum(p.numel() for p in build_model(small_run(), 8).parameters())
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_test_is_read_once(folder: Path, bars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = evaluate(folder, bars)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.*")}
    monkeypatch.setattr("fer.evaluate.open_data", None)
    monkeypatch.setattr("fer.evaluate.build_model", None)
    assert evaluate(folder, "no data there") == summary
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.*")} == before


def test_cut_while_evaluating_leaves_no_summary(folder: Path, bars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = predict_split
    calls = []

    def cut(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("fer.evaluate.predict_split", cut)
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder, bars)
    assert not (folder / "summary.json").exists()
    assert evaluate(folder, bars)["test"]["images"] == 40


def test_an_unfinished_run_is_refused(bars: Path, tmp_path: Path) -> None:
    def stop(row: dict) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit("x", small_run(), bars, tmp_path, stop)
    (folder,) = tmp_path.iterdir()
    for refuse in (lambda: evaluate(folder, bars), lambda: finished(folder)):
        with pytest.raises(UserError) as caught:
            refuse()
        assert str(caught.value) == f"{folder}: 2 of 3 epochs are done; go on with `fer train x`"
    assert not (folder / "predictions_test.csv").exists()
    fit("x", small_run(), bars, tmp_path)
    assert finished(folder)["epoch"] == 3


def test_a_run_that_never_began_is_refused(bars: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint there .*; train the run first"):
        evaluate(tmp_path, bars)


def test_other_data_are_refused(folder: Path, bars: Path, tmp_path: Path) -> None:
    other = make_data(tmp_path / "other", {"train": 96, "val": 40, "test": 41})
    with pytest.raises(UserError) as caught:
        evaluate(folder, other)
    ours, theirs = open_data(bars).hash, open_data(other).hash
    assert str(caught.value) == f"{folder}: was trained on data {ours}, {other} holds {theirs}; `dvc checkout` those"
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("batch", [1, 7, 40, 1000])
def test_the_size_of_evaluation_batches_changes_nothing(batch: int, folder: Path, bars: Path) -> None:
    run = small_run(eval_batch_size=batch)
    data = open_data(bars)
    model = build_model(run, 8)
    checkpoint.load_weights(folder / "best", model)
    loss = build_loss(run, data.prior(), torch.full((8,), 12))

    def predicted(run: RunConfig) -> Any:
        return predict_split(model, Feed(model, run, data.split("val"), CLASSES, torch.device("cpu")), loss)

    logits, counts = predicted(run)
    assert not model.training
    assert logits.shape == (40, 8)
    whole, wanted = predicted(small_run())
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-4)
    assert counts.result() == pytest.approx(wanted.result(), abs=1e-5)


def test_no_images_have_no_accuracy() -> None:
    assert metrics(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)) == {
        "images": 0,
        "recall": [None, None],
        "confusion": [[0, 0], [0, 0]],
    }


def test_a_class_without_images_has_no_recall() -> None:
    found = metrics(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), torch.tensor([0, 1]))
    assert found["recall"] == [1.0, 0.0, None]
    assert found["balanced_accuracy"] == 0.5
    assert found["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


# Networks with a frozen encoder

FROZEN: dict[str, dict[str, Any]] = {
    "random_neutral": doe(),
    "prototype, averaged": doe("prototype", augment={}, ema_decay=0.8),
    "same_subject": doe("same_subject"),
    "emotion_encoder": emotion_encoder(),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_evaluation_is_the_same_every_time(kind: str, bars: Path, tmp_path: Path) -> None:
    run = small_run(**FROZEN[kind], epochs=2)
    folder = fit("x", run, bars, tmp_path)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        summary = evaluate(folder, bars)
        found.append([(folder / f"predictions_{split}.csv").read_bytes() for split in ("val", "test")])
        (folder / "summary.json").unlink()
    assert found[0] == found[1]
    assert summary["val"]["accuracy"] == max(row["val_accuracy"] for row in finished(folder)["history"])
    # 128 features of each encoder, 16 hidden units, 8 classes
    head = (2 * 128 + 1) * 16 + (16 + 1) * 8
    if kind != "emotion_encoder":
        assert summary["trainable_parameters"] == head
    else:  # of two equal encoders one learns
        assert summary["parameters"] - head == 2 * (summary["trainable_parameters"] - head)
    assert summary["starts_from"] == ["random weights"] * (2 if kind == "emotion_encoder" else 1)


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("kind", FROZEN)
def test_the_size_of_evaluation_batches_changes_no_frozen_network(kind: str, batch: int, bars: Path) -> None:
    data = open_data(bars)
    model = build_model(small_run(**FROZEN[kind]), 8)

    def logits(size: int) -> torch.Tensor:
        run = small_run(**FROZEN[kind], eval_batch_size=size)
        return predict_split(model, Feed(model, run, data.split("test"), CLASSES, torch.device("cpu")))[0]

    torch.testing.assert_close(logits(batch), logits(40), atol=1e-5, rtol=1e-4)


def test_weights_of_another_model_are_named(folder: Path, bars: Path) -> None:
    path = folder / "best" / "checkpoint.json"
    text = path.read_text()
    assert re.search(r'"width": 0.0625', text)
    path.write_text(text.replace('"width": 0.0625', '"width": 0.125'))
    with pytest.raises(UserError, match=r"model\.safetensors: tensor .* has shape \["):
        evaluate(folder, bars)
