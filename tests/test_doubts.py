import numpy as np
import pandas as pd
import pytest

from fer.data.doubts import confusion, doubted

CLASSES = ["neutral", "happiness", "surprise", "sadness"]


def predictions(labels: np.ndarray, shares: np.ndarray) -> pd.DataFrame:
    rows = np.arange(len(labels))
    table = pd.DataFrame({"row": rows + 7, "name": [f"{row}.png" for row in rows], "label": np.take(CLASSES, labels)})
    table[CLASSES] = shares
    return table


def test_labels_that_were_exchanged_are_found_the_least_probable_first() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, 2000)
    shares = rng.dirichlet(np.full(4, 0.3), 2000) + 3 * np.eye(4)[truth]
    shares /= shares.sum(1, keepdims=True)
    labels, wrong = truth.copy(), rng.choice(2000, 100, replace=False)
    labels[wrong] = (truth[wrong] + 1) % 4
    found = doubted(predictions(labels, shares), CLASSES, 80)
    first = [image["row"] - 7 for image in found["first"]]
    assert (found["images"], len(first)) == (2000, 80)
    assert found["right"] == (shares.argmax(1) == labels).mean()
    assert 85 <= found["doubted"] <= 105
    assert np.isin(first, wrong).mean() > 0.95
    own = shares[first, labels[first]]
    assert [image["probability"] for image in found["first"]] == own.tolist() == sorted(own)
    assert [image["predicted"] for image in found["first"]] == np.take(CLASSES, shares[first].argmax(1)).tolist()
    counts = {name: part["images"] for name, part in found["classes"].items()}
    assert counts == dict(zip(CLASSES, np.bincount(labels)))
    assert sum(part["doubted"] for part in found["classes"].values()) == found["doubted"]


def test_the_confusion_is_the_mean_prediction_of_each_label() -> None:
    labels = np.array([1, 0, 1, 3, 2])
    shares = np.array([[0.2, 0.8, 0, 0], [1, 0, 0, 0], [0, 0.4, 0.6, 0], [0, 0, 0, 1], [0.5, 0, 0.5, 0]])
    table = confusion(predictions(labels, shares), CLASSES)
    assert (table.index.tolist(), table.columns.tolist()) == (CLASSES, CLASSES)
    assert table.to_numpy() == pytest.approx(np.array([shares[1], (shares[0] + shares[2]) / 2, shares[4], shares[3]]))
