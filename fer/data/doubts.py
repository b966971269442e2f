"""Labels that predictions speak against: those of a cross-validation, which saw no image that they are about.

Confident learning (Northcutt et al. 2021, doi 10.1613/jair.1.12125), as `cleanlab` computes it.
"""

from typing import Any

import numpy as np
import pandas as pd

from fer.errors import UserError


def doubted(table: pd.DataFrame, classes: list[str], named: int) -> dict[str, Any]:
    """How many labels are probably wrong, by class, and the first `named` images, the least probable label first.

    `table`: row, name, label (a class's name) and a probability for each class, out of fold. Raises UserError if
    cleanlab is missing.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise UserError("cleanlab is not installed: pip install -c constraints.txt -e '.[pipeline]'") from None
    labels = table["label"].map({name: label for label, name in enumerate(classes)}).to_numpy(np.int64)
    shares = table[classes].to_numpy(np.float64)
    found = find_label_issues(labels, shares, return_indices_ranked_by="self_confidence", n_jobs=1)
    own, guess = shares[np.arange(len(labels)), labels], shares.argmax(1)
    each, wrong = (np.bincount(part, minlength=len(classes)).tolist() for part in (labels, labels[found]))
    return {
        "images": len(labels),
        "doubted": len(found),
        "right": float((guess == labels).mean()),
        "classes": {
            name: {"images": count, "doubted": doubts} for name, count, doubts in zip(classes, each, wrong, strict=True)
        },
        "first": [
            {
                "row": int(table["row"].iloc[i]),
                "name": str(table["name"].iloc[i]),
                "label": classes[labels[i]],
                "predicted": classes[guess[i]],
                "probability": float(own[i]),
            }
            for i in found[:named].tolist()
        ],
    }


def confusion(table: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """The mean prediction on the images of each label, a row and a column a class, as `data.confusion` takes it.

    Stands in for the class prior of the PDLS losses where no one has voted. `table` as for `doubted`.
    """
    return table.groupby("label")[classes].mean().reindex(classes)
