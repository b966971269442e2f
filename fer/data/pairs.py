"""Which neutral face stands beside each image, for networks that compare two faces."""

import numpy as np

from fer.data.dataset import Split
from fer.errors import UserError

NEUTRAL = "neutral"


class Pairs:
    """Neutral partners within one split; never an image itself, which would tell its label.

    `same_subject`: of the same person. Raises UserError when the split has too few neutral faces, names no subjects,
    or a subject has no neutral face beside the image itself.
    """

    def __init__(self, split: Split, classes: list[str], same_subject: bool):
        if NEUTRAL not in classes:
            raise UserError(f"model.pairing: the data have no class '{NEUTRAL}', with which this model compares")
        self.neutral = np.flatnonzero(split.labels.numpy() == classes.index(NEUTRAL))  # positions in the split
        if len(self.neutral) < 2:
            raise UserError(f"model.pairing: {split.name} has {len(self.neutral)} neutral faces; two are needed")
        groups = np.array(split.subjects) if same_subject else np.full(len(split), "")
        if same_subject and "" in split.subjects:
            raise UserError(
                "model.pairing: same_subject needs data that name subjects; take random_neutral or prototype"
            )
        found, self.group = np.unique(groups, return_inverse=True)  # subjects, or all images as one
        order = np.argsort(self.group[self.neutral], kind="stable")
        self.neutral = self.neutral[order]  # by subject
        held = self.group[self.neutral]
        self.count = np.bincount(held, minlength=len(found))  # neutral faces of each subject, from ...
        self.first = np.searchsorted(held, np.arange(len(found)))  # ... this place in `neutral` on
        self.place = np.full(len(split), -1)  # of a neutral image among its subject's
        self.place[self.neutral] = np.arange(len(self.neutral)) - self.first[held]
        self.choices = self.count[self.group] - (self.place >= 0)
        if (self.choices < 1).any():
            alone = found[self.group[np.argmin(self.choices)]]
            raise UserError(
                f"model.pairing: subject {alone} has no neutral face beside the image itself; "
                "leave the subject out or take random_neutral or prototype"
            )

    def drawn(self, seed: int, epoch: int) -> np.ndarray:
        """int64 [n]: for each image the position of a neutral one, drawn anew in every epoch."""
        return self._partner(np.random.default_rng([seed, epoch, 1]).integers(0, self.choices))

    def fixed(self) -> np.ndarray:
        """int64 [n]: for each image the position of the first neutral one."""
        return self._partner(np.zeros(len(self.group), np.int64))

    def references(self, count: int, seed: int) -> np.ndarray:
        """int64 [count]: positions of different neutral images, chosen once.

        Raises UserError when there are fewer.
        """
        if count > len(self.neutral):
            raise UserError(
                f"model.pairing.references: {count} asked for, the training split has {len(self.neutral)} neutral faces"
            )
        return np.sort(np.random.default_rng([seed, 0, 2]).choice(self.neutral, count, replace=False))

    def _partner(self, drawn: np.ndarray) -> np.ndarray:
        skipped = (self.place >= 0) & (drawn >= self.place)  # the image itself
        return self.neutral[self.first[self.group] + drawn + skipped]
