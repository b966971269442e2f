"""The picture of a finished run; its rows are tested where commands print them."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from conftest import small_run
from PIL import Image

from fer.evaluate import evaluate
from fer.train import fit
from pipelines.report import confusion_picture


def test_runs_that_end_at_the_same_time_draw_one_after_another(data: Path, tmp_path: Path) -> None:
    """matplotlib opens its fonts in every thread that draws, and keeps them open."""
    folder = fit("x", small_run(epochs=1), data, tmp_path)
    evaluate(folder, data)
    summary = json.loads((folder / "summary.json").read_text())
    together, before = Barrier(4), len(fonts())

    def draw(number: int) -> Path:
        together.wait()
        return confusion_picture(summary, tmp_path / f"{number}.png")

    with ThreadPoolExecutor(4) as threads:
        pictures = [Image.open(path).tobytes() for path in threads.map(draw, range(4))]
    assert len(set(pictures)) == 1
    assert len(fonts()) - before <= 2


def fonts() -> list[str]:
    """Font files that this process has open."""
    files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return [file for file in files if file.endswith(".ttf")]
