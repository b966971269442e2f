"""Which neutral face each image is paired with, for networks that compare two faces."""

import numpy as np

from fer.data.dataset import Split
from fer.errors import UserError

NEUTRAL = "neutral"


class Pairs:
    """Neutral partners within one split. An image is never paired with itself, which would reveal its label.

    With `same_subject` the partner shows the same person. Raises UserError if the data have no neutral class, fewer
    than two neutral faces, no subjects, or a subject without a neutral face besides the image itself.
    """

    def __init__(self, split: Split, classes: list[str], same_subject: bool):
        if NEUTRAL not in classes:
            raise UserError(f"model.pairing: the data have no class '{NEUTRAL}', which this model compares with")
        self.neutral = np.flatnonzero(split.labels.numpy() == classes.index(NEUTRAL))  # positions in the split
        if len(self.neutral) < 2:
            raise UserError(
                f"model.pairing: {split.name} has {len(self.neutral)} neutral faces, at least two are needed"
            )
        groups = np.array(split.subjects) if same_subject else np.full(len(split), "")
        if same_subject and "" in split.subjects:
            raise UserError(
                "model.pairing: same_subject needs data that name subjects; choose random_neutral or prototype"
            )
        found, self.group = np.unique(groups, return_inverse=True)  # by subject, or all images as one group
        order = np.argsort(self.group[self.neutral], kind="stable")
        self.neutral = self.neutral[order]  # by subject
        held = self.group[self.neutral]
        self.count = np.bincount(held, minlength=len(found))  # neutral faces of each group ...
        self.first = np.searchsorted(held, np.arange(len(found)))  # ... and where they begin in `neutral`
        self.place = np.full(len(split), -1)  # position of a neutral image within its group
        self.place[self.neutral] = np.arange(len(self.neutral)) - self.first[held]
        self.choices = self.count[self.group] - (self.place >= 0)
        if (self.choices < 1).any():
            alone = found[self.group[np.argmin(self.choices)]]
            raise UserError(
                f"model.pairing: subject {alone} has no neutral face besides the image itself; "
                "leave the subject out or choose random_neutral or prototype"
            )

    def drawn(self, seed: int, epoch: int) -> np.ndarray:
        """int64 [n]: for each image the position of its neutral partner, drawn anew in every epoch."""
        return self._partner(np.random.default_rng([seed, epoch, 1]).integers(0, self.choices))

    def fixed(self) -> np.ndarray:
        """int64 [n]: for each image the position of the first possible partner."""
        return self._partner(np.zeros(len(self.group), np.int64))

    def references(self, count: int, seed: int) -> np.ndarray:
        """int64 [count]: positions of `count` different neutral images. Raises UserError if there are fewer."""
        if count > len(self.neutral):
            raise UserError(
                f"model.pairing.references: {count} asked for, the training split has {len(self.neutral)} neutral faces"
            )
        return np.sort(np.random.default_rng([seed, 0, 2]).choice(self.neutral, count, replace=False))

    def _partner(self, drawn: np.ndarray) -> np.ndarray:
        skipped = (self.place >= 0) & (drawn >= self.place)  # the image itself
        return self.neutral[self.first[self.group] + drawn + skipped]
