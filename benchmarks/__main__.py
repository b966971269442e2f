"""`make bench`: how fast the parts are, each beside a plain reference in the same process, and the ratio."""

import argparse
import platform
import time
from collections.abc import Callable

import torch

from benchmarks import upscale

SECONDS = 2.0  # at least, per figure


def rate(work: Callable[[], int]) -> float:
    """Images per second of `work`, which gives how many it did; after one call to warm up."""
    work()
    done, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < SECONDS:
        done += work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return done / passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}\n")  # noqa: T201
    print("| what | images/s | reference | images/s | ratio |\n|---|---|---|---|---|")  # noqa: T201
    for what, work, reference, plain in upscale.cases(device):
        fast, slow = rate(work), rate(plain)
        print(f"| {what} | {fast:,.3g} | {reference} | {slow:,.3g} | {fast / slow:.2f} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
