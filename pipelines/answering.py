"""Which model answers for the faces of `fer serve`, and how those of several requests share a pass through it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fer.errors import UserError, one_line
from fer.faces.detect import Detector
from fer.faces.predict import AT_ONCE, margin_of
from fer.predict import Predictor

PATIENCE = 0.005  # seconds that faces wait for those of other requests
EVERY = 5.0  # seconds between two looks at who is champion


class Model:
    """A checkpoint that is ready to answer; `version`: its number in the registry, if it comes from there.

    `even`: as of `Predictor`. Raises UserError if it cannot be loaded, or needs more than a face.
    """

    def __init__(self, folder: Path, version: str | None, detector: Detector, device: str, even: float = 0.0):
        self.folder, self.version = folder, version
        self.predictor = Predictor(folder, device, even)
        self.margin = margin_of(self.predictor, detector)
        self.predictor.probabilities(np.zeros((1, *self.predictor.faces.prepared), np.uint8))

    @property
    def names(self) -> dict[str, str | None]:
        """As they stand in every answer."""
        return {"run": self.predictor.run_id, "version": self.version}


class Models:
    """The model that answers, `now`, and why the champion is another one, `problem`.

    `find` returns the folder and version of the champion, or raises UserError, as does the first look. `even`: as of
    `Predictor`.
    """

    def __init__(
        self, find: Callable[[], tuple[Path, str | None]], detector: Detector, device: str = "auto", even: float = 0.0
    ):
        self.find, self.detector, self.device, self.even, self.problem = find, detector, device, even, ""
        self.now = Model(*find(), detector, device, even)

    def look(self) -> str:
        """Load the champion if it has moved; returns a line if there is news. If it fails, the old one goes on."""
        before, problem = self.now, self.problem
        try:
            with one_line("the champion", "the one before goes on"):
                found = self.find()
                if found != (self.now.folder, self.now.version):
                    self.now = Model(*found, self.detector, self.device, self.even)
            self.problem = ""
        except UserError as error:
            self.problem = str(error).replace("\n", "; ")
        if self.now is before and self.problem == problem:
            return ""
        return self.problem or f"{self.now.names['run']} answers"

    def follow(self, say: Callable[[str], None]) -> Callable[[], None]:
        """Look every few seconds in a thread; returns what ends that. It may hang in a store that does not answer."""
        over = threading.Event()

        def looks() -> None:
            while not over.wait(EVERY):
                if news := self.look():
                    say(news)

        threading.Thread(target=looks, daemon=True).start()
        return over.set


@dataclass(frozen=True, eq=False)
class Waiting:
    """Faces of a request, prepared for `model`: uint8 [B, H, W] or [B, H, W, 3]."""

    model: Model
    faces: np.ndarray
    answer: "asyncio.Future[np.ndarray]"  # float32 [B, C]


class Batches:
    """Passes through the network, in one thread; if `together`, each takes the faces of all requests that wait.

    `on_pass` is told how many faces each has.
    """

    def __init__(self, together: bool, on_pass: Callable[[int], None]):
        self.together, self.on_pass, self.under_way = together, on_pass, 0
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Inside the block a request is under way, so its faces may be waited for."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    async def answer(self, model: Model, faces: np.ndarray) -> np.ndarray:
        """Probabilities, float32 [B, C]."""
        if not len(faces):
            return np.empty((0, len(model.predictor.classes)), np.float32)
        waiting = Waiting(model, faces, asyncio.get_running_loop().create_future())
        self.queue.put_nowait(waiting)
        return await waiting.answer

    async def work(self) -> None:
        """Answer until cancelled."""
        with ThreadPoolExecutor(1, "torch") as torch:
            following = None
            while True:
                batch, following = await self._gather(following or await self.queue.get())
                faces = np.concatenate([one.faces for one in batch])
                self.on_pass(len(faces))
                model = batch[0].model
                done = asyncio.get_running_loop().run_in_executor(torch, model.predictor.probabilities, faces)
                await asyncio.wait([done])
                error, first = done.exception(), 0
                for one in batch:
                    if not one.answer.done():  # else nobody waits any more
                        if error is None:
                            one.answer.set_result(done.result()[first : first + len(one.faces)])
                        else:
                            one.answer.set_exception(error)
                    first += len(one.faces)

    async def _gather(self, first: Waiting) -> tuple[list[Waiting], Waiting | None]:
        """What goes through the network together, and, for another model, what has to follow it."""
        batch, until = [first], asyncio.get_running_loop().time() + PATIENCE
        while self.together and sum(len(one.faces) for one in batch) < AT_ONCE and len(batch) < self.under_way:
            try:
                async with asyncio.timeout_at(until):
                    following = await self.queue.get()
            except TimeoutError:
                break
            if following.model is not first.model:
                return batch, following
            batch.append(following)
        return batch, None
