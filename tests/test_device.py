"""What a process on a CPU is set to."""

import platform
import subprocess
import sys

import pytest
import torch

from fer.device import use_cpu

FAULTS = """
import resource

import torch

from fer.device import use_cpu

torch.set_num_threads(1)


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.full((2**24,), 1.0)  # 64 MiB: 16,384 pages, or 32 large ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


without = faults()
use_cpu(1)
faults()
print(without, faults())
"""


HEAPS = """
import sys
import threading

from fer.device import share_heaps

if sys.argv[1] == "shared":
    share_heaps()
kept, turns = [], [threading.Event() for _ in range(9)]


def work(number):
    turns[number].wait()
    blocks = [b"x" * 65000 for _ in range(500)]  # 31 MiB
    kept.append(blocks[-1])  # holds those before it in the heap
    del blocks
    turns[number + 1].set()


def pages():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
before = pages()
turns[0].set()
for thread in threads:
    thread.join()
print((pages() - before) >> 8)  # of 4 KiB, in MiB
"""


def test_a_run_has_the_threads_it_asks_for() -> None:
    use_cpu(2)
    try:
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is set")
def test_memory_that_is_freed_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    without, after = map(int, done.stdout.split())
    assert without >= 20 * 32
    assert after < 32


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is set")
def test_threads_that_share_heaps_use_what_others_have_freed() -> None:
    own, shared = (
        int(subprocess.run([sys.executable, "-c", HEAPS, kind], capture_output=True, text=True, check=True).stdout)
        for kind in ("own", "shared")
    )
    assert own > 6 * 31
    assert shared < 3 * 31
