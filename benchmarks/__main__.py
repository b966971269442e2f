"""`make bench`: the speed of each part, of a plain reference in the same process, and their ratio."""

import argparse
from collections.abc import Callable, Iterator

import torch

from benchmarks import encoded, pipeline, training, upscale
from benchmarks.measure import HEAD, Effort, Row, beside, machine
from fer.device import use_cpu


def _upscale(device: torch.device, effort: Effort) -> Iterator[Row]:
    for what, work, reference, plain in upscale.cases(device):
        fast, slow = beside(effort, work, plain)
        yield Row(what, fast, reference, slow)


CASES: dict[str, Callable[[torch.device, Effort], Iterator[Row]]] = {
    **training.CASES,
    **pipeline.CASES,
    "encoded": encoded.cases,
    "upscale": _upscale,
}


def main() -> None:
    """Print the table of all benchmarks, or of one group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=list(CASES), help="one group of rows")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable GPU; leave it out or give cpu")
    if asked.only in ("published", "recorded") and asked.device == "cpu":
        parser.error(f"--only {asked.only}: is measured on a GPU only")
    if asked.only == "depthwise" and asked.device == "cuda":
        parser.error("--only depthwise: is measured on a CPU only; give --device cpu")
    device = torch.device(asked.device)
    if device.type == "cpu":
        use_cpu(torch.get_num_threads())  # as in a run; the reference benefits too
    print(f"{machine(device)}\n\n{HEAD}", flush=True)  # noqa: T201
    for name, rows in CASES.items():
        if asked.only in (None, name):
            for row in rows(device, Effort()):
                print(row, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
