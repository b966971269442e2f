"""Faces followed through a video, and their probabilities averaged over time."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from scipy.optimize import linear_sum_assignment

from fer.faces.detect import Face
from fer.faces.predict import Found

OVERLAP = 0.3  # of the boxes of a face in two frames, at least: intersection over union
GONE = 1.0  # seconds after which a face that was not found counts as a new one
WHOLE = Face(0, 0, 1, 1, 1)  # the box of a picture that is a face


@dataclass
class _Track:
    number: int
    box: Face
    seconds: float
    total: np.ndarray  # [C]
    weight: float


def smooth(found: Iterable[Found], seconds: float) -> Iterator[Found]:
    """`found` with `track` and `smoothed`: the mean of a face's probabilities so far, weighted by exp(-age / seconds).

    Ages are in seconds, so the weights hold for any frame rate, and the future does not count, so rows can be written
    as they come. Which face is that of an earlier frame follows from the boxes (`matched`). Pictures that are no video
    keep their probabilities.
    """
    followed = _Followed(seconds)
    last = ("", 0)
    for here, group in groupby(found, lambda one: (one.frame.file, one.frame.number)):
        if here[0] != last[0] or here[1] < last[1]:  # another file, or the same once more
            followed = _Followed(seconds)
        last, faces = here, list(group)
        known = [one for one in faces if one.probabilities is not None]
        if faces[0].frame.seconds is None:
            yield from (replace(one, smoothed=one.probabilities) for one in faces)
            continue
        tracks = iter(followed.add(known, faces[0].frame.seconds))
        for one in faces:
            if one.probabilities is None:
                yield one
            else:
                track = next(tracks)
                yield replace(one, track=track.number, smoothed=(track.total / track.weight).astype(np.float32))


class _Followed:
    """The faces of a video up to now."""

    def __init__(self, seconds: float):
        self.seconds, self.count, self.last = seconds, 0, 0.0
        self.tracks: list[_Track] = []

    def add(self, faces: list[Found], now: float) -> list[_Track]:
        """The tracks of the faces of the next frame, which they now include."""
        self.tracks = [one for one in self.tracks if now - one.seconds <= GONE or one.seconds == self.last]
        self.last = now
        pairs = matched([one.face or WHOLE for one in faces], [track.box for track in self.tracks])
        return [self._track(one, self.tracks[pairs[place]] if place in pairs else None, now)
                for place, one in enumerate(faces)]  # fmt: skip

    def _track(self, one: Found, track: _Track | None, now: float) -> _Track:
        assert one.probabilities is not None
        if track is None:
            track = _Track(self.count, WHOLE, now, np.zeros(len(one.probabilities)), 0.0)
            self.tracks.append(track)
            self.count += 1
        decay = math.exp(-(now - track.seconds) / self.seconds)
        track.total, track.weight = track.total * decay + one.probabilities, track.weight * decay + 1
        track.box, track.seconds = one.face or WHOLE, now
        return track


def matched(faces: list[Face], others: list[Face]) -> dict[int, int]:
    """Place of a face -> place of the other that it overlaps, one to one.

    Of all ways to pair them, the one with the largest sum of intersections over unions (Hungarian method), in which
    those below OVERLAP do not count.
    """
    if not faces or not others:
        return {}
    shares = np.array([[overlap(face, other) for other in others] for face in faces])
    shares[shares < OVERLAP] = 0
    rows, columns = linear_sum_assignment(shares, maximize=True)
    return {int(row): int(column) for row, column in zip(rows, columns) if shares[row, column]}


def overlap(face: Face, other: Face) -> float:
    """Intersection over union of two boxes."""
    wide = min(face.left + face.width, other.left + other.width) - max(face.left, other.left)
    high = min(face.top + face.height, other.top + other.height) - max(face.top, other.top)
    both = max(0.0, wide) * max(0.0, high)
    return both / (face.width * face.height + other.width * other.height - both)
