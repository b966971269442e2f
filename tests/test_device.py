"""What a process on a CPU is set to, and which device a run gets."""

import ctypes
import platform
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal

from fer.device import autocast, pick_device, share_heaps, use_cpu


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is set")
def test_a_process_has_the_threads_it_asks_for_and_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *words: asked.append(words)))
    use_cpu(2)
    try:
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert asked == [(-4, 0), (-1, 2**31 - 1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    share_heaps()
    assert asked[2:] == [(-8, 2)]  # M_ARENA_MAX


def test_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {pick_device(wanted).type for wanted in ("auto", "cpu")} == {"cpu"}
    message = "key: cuda, but this machine has no usable GPU; set it to auto or cpu"
    assert refusal(pick_device, "cuda", "key") == message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = [pick_device(wanted) for wanted in ("auto", "cuda", "cpu")]
    assert found == [torch.device("cuda", 1), torch.device("cuda", 1), torch.device("cpu")]


def test_bf16_is_for_devices_that_compute_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(2, 2)
    for known, wanted in (
        ({"avx512_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx2": True, "bf16": False}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        with autocast("bf16", torch.device("cpu")):
            assert ((ones @ ones).dtype == torch.bfloat16) == wanted
        with autocast("fp32", torch.device("cpu")):
            assert (ones @ ones).dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for computes in (True, False):  # a GPU's answer if torch would emulate bf16 for it is always yes
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, own=computes: own or including_emulation
        )
        assert isinstance(autocast("bf16", torch.device("cuda")), torch.autocast) == computes
