"""Networks as upscalers: whole batches, grey and colour, memory that runs out, and where their weights come from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from test_upscale import (  # noqa: F401
    INTERPOLATE,
    OUT,
    WEIGHTS,
    Tint,
    beside,
    facts,
    files,
    interrupt,
    params,
    pretend,
    random_images,
    raw,
    shards,
    tinted,
    write_settings,
)

from fer.errors import UserError
from fer.super_resolution import networks
from fer.super_resolution.methods import METHODS
from fer.super_resolution.swin2sr import PUBLISHED, load_swin2sr
from pipelines.data_sets import SuperResolution
from pipelines.stages import run
from pipelines.stages import upscale as stage
from pipelines.stages.upscale import upscale


def test_the_tables_know_the_same_methods_and_scales() -> None:
    assert set(get_args(SuperResolution.model_fields["method"].annotation)) == set(METHODS)
    assert set(networks.LOADERS) == set(METHODS) - set(INTERPOLATE)
    assert METHODS["swin2sr"].scales == tuple(PUBLISHED)


# Batches


def test_every_batch_is_whole_and_computed_in_one_thread_and_every_image_in_its_place(
    raw: Path, pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a network's bytes depend on neither shards nor threads."""
    torch.set_num_threads(3)
    for shard, batches, channels in ((16, [16, 16], ()), (5, [16] * 5, ()), (256, [16, 16], (3,))):
        images = random_images(23, 12, 10, *channels)
        np.save(raw, images)
        monkeypatch.setattr(stage, "SHARD", shard)
        network = pretend(4, 40)
        upscale(params("swin2sr", 4))
        np.testing.assert_array_equal(np.load(OUT), tinted(images, 4, 40))
        assert network.seen == [*[1] * (0 if channels else 4), *batches]  # grey images are probed, one by one
        assert (network.threads, torch.get_num_threads()) == ({1}, 3)
    torch.set_num_threads(1)


def test_the_stages_bytes_are_the_networks_numbers_rounded_once(raw: Path) -> None:
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 16, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 8}
    Swin2SRForImageSuperResolution(Swin2SRConfig(**sizes, upscale=2, initializer_range=0.05)).save_pretrained(WEIGHTS)
    for images in (random_images(1, 9, 13), random_images(2, 5, 8, 3)):
        np.save(raw, images)
        upscale(params("swin2sr", 2))
        colour = torch.from_numpy(images if images.ndim == 4 else np.stack([images] * 3, -1)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            exact = load_swin2sr(str(WEIGHTS), 2, "")(colour / 255) * 255
        assert np.abs(np.load(OUT) - exact.permute(0, 2, 3, 1).numpy()).max() < 0.51
        assert exact.std() > 20


@pytest.mark.parametrize(
    ("tint", "grey"),
    [
        ({"shift": 4}, True),  # in all pixels, by no more than the tolerance
        ({"shift": 5}, False),
        ({"shift": 60, "tinted": 4}, True),  # in 4 of 480 pixels, less than one in a hundred
        ({"shift": 60, "tinted": 6}, False),
        ({"shift": 60, "above": 0.9}, False),  # in the last image alone
    ],
)
def test_a_network_keeps_grey_images_grey_within_the_tolerance(
    raw: Path, tint: dict[str, Any], grey: bool, pretend: Callable[..., Tint]
) -> None:
    images = random_images(23, 12, 10) // 5  # up to 51, so that no sum is clipped
    images[-1, 0, 0] = 255
    np.save(raw, images)
    pretend(2, **tint)
    upscale(params("swin2sr", 2))
    assert np.load(OUT).ndim == (3 if grey else 4)
    if tint == {"shift": 4}:  # .299 v + .587 (v + 4) + .114 v
        larger = images.repeat(2, 1).repeat(2, 2)
        np.testing.assert_array_equal(np.load(OUT)[:-1], larger[:-1] + round(0.587 * 4))


def test_colour_stays_colour(raw: Path, pretend: Callable[..., Tint]) -> None:
    np.save(raw, np.repeat(random_images(23, 12, 10, 1), 3, -1))
    pretend(2)
    for method in ("swin2sr", "bicubic"):
        upscale(params(method, 2))
        assert np.load(OUT).shape == (23, 24, 20, 3)


def test_the_batch_is_halved_for_the_whole_output_when_memory_runs_out(
    raw: Path, shards: list[int], pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third shard, then in the first again: nothing that larger batches made is left. Then in two processes."""
    network = pretend(2, 40, room=[*[16] * 6, 5])
    upscale(params("swin2sr", 2))
    assert network.seen == [*[1] * 4, 16, 16, 16, 8, 4, 4, 4, 4, 4, 4]
    assert shards == [0, 8, 0, 8, 16]
    np.testing.assert_array_equal(np.load(OUT), tinted(np.load(raw), shift=40))
    assert facts()["batch"] == 4
    shards.clear()
    pretend(2, 40, room=[4])
    interrupt(params("swin2sr", 2), monkeypatch)
    network = pretend(2, 40)
    upscale(params("swin2sr", 2))
    assert (network.seen, shards) == ([1, 1, 1, 1, 4, 4], [0, 8, 16])


@pytest.mark.parametrize("room", [[0], [*[100] * 6, 0]])
def test_one_image_that_does_not_fit_is_one_line(
    raw: Path, room: list[int], shards: list[int], pretend: Callable[..., Tint]
) -> None:
    """At once, or after two shards; when there is room again, it begins with full batches."""
    pretend(2, 40, room=room)
    with pytest.raises(UserError) as caught:
        upscale(params("swin2sr", 2))
    message = "super_resolution: one image does not fit into the GPU's memory; free it or set device: cpu"
    assert str(caught.value) == message
    assert beside() == (["raw"] if room == [0] else ["raw", "upscaled.partial"])
    shards.clear()
    network = pretend(2, 40)
    upscale(params("swin2sr", 2))
    assert shards == [0, 8, 16]
    assert set(network.seen[4:]) == {16}


def test_nan_and_infinity_are_not_stored_as_black(raw: Path, pretend: Callable[..., Tint]) -> None:
    for bad in (float("nan"), -float("inf")):
        pretend(2, bad, 1)
        with pytest.raises(UserError) as caught:
            upscale(params("swin2sr", 2, precision="bf16"))
        assert str(caught.value) == (
            "super_resolution: the network returns NaN or infinity with precision bf16; "
            "set precision to fp32 or use other weights"
        )
        assert beside() == ["raw"]


# Weights and devices


@pytest.mark.parametrize(
    ("method", "scale", "folder", "message"),
    [
        ("swin2sr", 2, False, "weights not found; name a folder; if it is empty, the hub's network is used"),
        ("swin2sr", 2, True, "cannot load 'weights': "),
        ("dic", 8, False, "weights not found; download it from the link at "),
        ("dic", 8, True, "weights/DIC_HELEN.pth: looks like an html page, not a weights file; "),
    ],
)
def test_weights_that_cannot_be_used_are_one_line_and_status_2(
    raw: Path, method: str, scale: int, folder: bool, message: str, capsys: pytest.CaptureFixture
) -> None:
    upscale(params("none", 1))
    before = files()
    if folder:
        WEIGHTS.mkdir()
        (WEIGHTS / "config.json").write_text("{")
        (WEIGHTS / "DIC_HELEN.pth").write_text("<!DOCTYPE html><html>not found</html>")
    write_settings(method=method, scale=scale)
    with pytest.raises(SystemExit) as ended:
        run(upscale)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: super_resolution.weights: {message}")
    assert files() == before
    assert beside() == ["raw", "upscaled"]


def test_where_swin2sr_comes_from(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub by its id, even without a folder; from a folder; published, where the folder is empty."""
    asked: list[tuple[str, int, str]] = []
    monkeypatch.setattr(networks, "load_swin2sr", lambda *args: asked.append(args) or Tint(args[1]))
    upscale(params("swin2sr", 2, hub_id="some/network"))
    WEIGHTS.mkdir()
    told = "super_resolution.hub_id: weights is a folder; name it in super_resolution.weights"
    with pytest.raises(UserError, match=told):
        networks.LOADERS["swin2sr"](Path("other"), 2, "weights")
    upscale(params("swin2sr", 4))
    assert facts()["weights"] is None
    (WEIGHTS / "config.json").write_text("{}")
    upscale(params("swin2sr", 2))
    assert facts()["weights"] is not None
    key = "super_resolution.weights"
    assert asked == [("some/network", 2, "super_resolution.hub_id"), (PUBLISHED[4], 4, key), ("weights", 2, key)]


def test_a_gpu_that_is_not_there_is_missed_by_networks_alone(
    raw: Path, pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    upscale(params("bicubic", 2, device="cuda"))
    pretend(2)
    with pytest.raises(UserError, match=r"^super_resolution.device: cuda, but this machine has no usable GPU; set it"):
        upscale(params("swin2sr", 2, device="cuda"))
