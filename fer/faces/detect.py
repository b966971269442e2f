"""Face detectors of OpenCV, and square crops around what they find.

Haar cascades come with OpenCV. YuNet (Wu et al. 2023, doi 10.1007/s11633-023-1423-y) finds more, and takes a file.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fer.data.decode import around, cut
from fer.errors import UserError, first_line

LONGEST = 640  # pixels: larger pictures are shrunk first, as detectors miss faces that fill them
SMALLEST = 24  # pixels: side of the smallest faces that the cascade knows, after that
YUNET = "face_detection_yunet_2023mar.onnx"
HUB, REPOSITORY = "hub", "opencv/face_detection_yunet"  # the word in place of its file, and where that is then from
YUNET_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"


@dataclass(frozen=True)
class Face:
    """A box in pixels of the picture, and the detector's confidence (on its own scale)."""

    left: float
    top: float
    width: float
    height: float
    score: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom."""
        return self.left, self.top, self.left + self.width, self.top + self.height


class Detector(Protocol):
    """Finds the faces of a picture."""

    name: str
    margin: float
    """Side of the crop as a multiple of the box's, so that a face fills it as it does the images of FER2013."""

    def __call__(self, picture: np.ndarray) -> list[Face]:
        """uint8 [H, W] or [H, W, 3] (RGB) -> its faces, the largest first."""


def build_detector(weights: Path | None = None, min_face: float = 0) -> Detector:
    """YuNet with its file `weights`, fetched once if that is `hub`; or the Haar cascade if it is None.

    `min_face`: side in pixels of the picture of the smallest box that is of interest.

    Raises UserError if OpenCV is missing, the file cannot be had, or is not the published one.
    """
    try:
        import cv2
    except ImportError:
        raise UserError(
            "OpenCV is not installed: pip install -c constraints.txt -e '.[faces]', or crop the faces yourself"
        ) from None
    if weights is not None:
        return YuNet(cv2, _fetched() if weights == Path(HUB) else weights, min_face)
    if not hasattr(cv2, "CascadeClassifier"):  # OpenCV 5
        raise UserError(f"OpenCV {cv2.__version__} has no Haar cascades: pip install 'opencv-python-headless<5'")
    return Haar(cv2, min_face)


def _fetched() -> Path:
    """YuNet's file in the Hugging Face hub's cache. Raises UserError if it is not there and cannot be downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(REPOSITORY, YUNET, local_files_only=True))  # asks nobody
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(REPOSITORY, YUNET))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{YUNET}: cannot be fetched from {REPOSITORY} ({reason}); name a file of it") from None


class Haar:
    """The cascade `frontalface_alt2` (Lienhart & Maydt 2002); upright frontal faces of 24 pixels and more.

    Its time goes into small faces: with a larger `min_face` it takes far less.
    """

    name = "haar"
    # boxes on 400 training images of FER+ within larger pictures: median .96 of the image, centred
    margin = 1.04

    def __init__(self, cv2: Any, min_face: float = 0):
        self.cv2, self.min_face = cv2, min_face
        self.cascade = cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_frontalface_alt2.xml")

    def __call__(self, picture: np.ndarray) -> list[Face]:
        grey = picture if picture.ndim == 2 else self.cv2.cvtColor(picture, self.cv2.COLOR_RGB2GRAY)
        small, zoom = _shrunk(self.cv2, grey)
        least = max(SMALLEST, math.ceil(self.min_face / zoom))
        boxes, _, weights = self.cascade.detectMultiScale3(
            small, scaleFactor=1.1, minNeighbors=3, minSize=(least, least), outputRejectLevels=True
        )
        found = zip(np.reshape(boxes, (-1, 4)) * zoom, np.reshape(weights, -1))
        return _largest_first([_face(box, score) for box, score in found])


class YuNet:
    """A small convolutional network; its file is `face_detection_yunet_2023mar.onnx` of OpenCV's model zoo (MIT)."""

    name = "yunet"
    margin = 1.2  # an estimate: its boxes reach from ear to ear and from forehead to chin

    def __init__(self, cv2: Any, weights: Path, min_face: float = 0):
        try:
            content = weights.read_bytes()
        except OSError as error:
            raise UserError(f"{weights}: {error.strerror}: give the file {YUNET}") from None
        if hashlib.sha256(content).hexdigest() != YUNET_SHA256:
            raise UserError(f"{weights}: is not {YUNET} (its SHA-256 differs): fetch it again from opencv_zoo")
        self.cv2, self.min_face = cv2, min_face
        self.network = cv2.FaceDetectorYN.create(str(weights), "", (LONGEST, LONGEST), score_threshold=0.5)

    def __call__(self, picture: np.ndarray) -> list[Face]:
        code = self.cv2.COLOR_GRAY2BGR if picture.ndim == 2 else self.cv2.COLOR_RGB2BGR
        small, zoom = _shrunk(self.cv2, self.cv2.cvtColor(picture, code))
        self.network.setInputSize((small.shape[1], small.shape[0]))
        _, found = self.network.detect(small)
        rows = np.empty((0, 15)) if found is None else found
        faces = _largest_first([_face(row[:4] * zoom, row[14]) for row in rows])
        return [face for face in faces if max(face.width, face.height) >= self.min_face]


def _shrunk(cv2: Any, picture: np.ndarray) -> tuple[np.ndarray, float]:
    """The picture with its longer side at most LONGEST, and the factor back."""
    zoom = max(1.0, max(picture.shape[:2]) / LONGEST)
    if zoom == 1:
        return np.ascontiguousarray(picture), 1.0
    size = (max(1, round(picture.shape[1] / zoom)), max(1, round(picture.shape[0] / zoom)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA), zoom


def _face(box: np.ndarray, score: float) -> Face:
    left, top, width, height = map(float, box)
    return Face(left, top, width, height, float(score))


def _largest_first(faces: list[Face]) -> list[Face]:
    return sorted(faces, key=lambda face: -face.width * face.height)


def crop(picture: np.ndarray, face: Face, margin: float) -> np.ndarray:
    """The square around a face, `margin` times the longer side of its box: uint8 [S, S] or [S, S, 3].

    What lies outside the picture repeats its edge.
    """
    return cut(picture, around(face.box, margin))
