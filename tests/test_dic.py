"""DIC: sizes and names of the published file; every block and the whole against formulas; padding, batches, files."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fer.errors import UserError
from fer.super_resolution.dic import MEAN, PUBLISHED, Dic, load_dic, merge, pad

KEY = "super_resolution.weights"
GOLDEN = Path(__file__).parent / "golden" / "dic_state_dict.txt"
SMALL = {
    "num_features": 4, "num_steps": 2, "num_groups": 3, "hg_features": 8, "num_keypoints": 68, "num_fusion_blocks": 2
}  # fmt: skip
State = dict[str, Tensor]


def planned() -> Dic:
    """The published network without memory for its tensors."""
    with torch.device("meta"):
        return Dic(**PUBLISHED)


def small(seed: int = 0, **changes: int) -> Dic:
    """Weights are large enough that peaks of heatmaps lie on both sides of .05."""
    model = Dic(**SMALL | changes).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel() if parameter.shape[2] < 8 else 16 * parameter.shape[1]
            nn.init.normal_(parameter, std=fan**-0.5, generator=generator)
        elif parameter.numel() > 1:
            nn.init.normal_(parameter, std=0.1, generator=generator)
        else:
            nn.init.uniform_(parameter, 0.1, 0.4, generator=generator)
    return model


def faces(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


# Sizes


def test_names_and_shapes_are_those_of_the_published_file() -> None:
    lines = [f"{name}\t{tuple(tensor.shape)}" for name, tensor in planned().state_dict().items()]
    assert len(lines) == 296
    assert lines == GOLDEN.read_text().splitlines()


def test_parameters_of_each_block() -> None:
    counts = {name: sum(p.numel() for p in block.parameters()) for name, block in planned().named_children()}
    assert counts == {
        "conv_in": 5_377, "first_block": 4_090_776, "block": 5_559_720, "out": 147_505, "conv_out": 1_299,
        "HG": 11_999_172,
    }  # fmt: skip
    assert sum(counts.values()) == 21_803_849
    assert list(planned().buffers()) == []


def test_published_network_on_one_image() -> None:
    larger = Dic(**PUBLISHED).eval()(faces(1, 3, 8, 8))
    assert larger.shape == (1, 3, 64, 64)
    assert larger.min() >= 0
    assert larger.max() <= 1
    assert larger.std() > 0.01


def test_initial_slopes() -> None:
    slopes = [layer.weight for layer in Dic(**SMALL).modules() if isinstance(layer, nn.PReLU)]
    assert len(slopes) == 1 + 2 * (2 + 3 + 3 + 2 + 2) + 1
    assert all(torch.equal(slope, torch.tensor([0.2])) for slope in slopes)


# The formulas, on a state dict


def conv(x: Tensor, state: State, name: str, **options: Any) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def prelu(x: Tensor, state: State, name: str) -> Tensor:
    return torch.where(x > 0, x, x * state[f"{name}.weight"])


def up(x: Tensor, state: State, name: str, by: int) -> Tensor:
    x = F.conv_transpose2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], stride=by, padding=2)
    return prelu(x, state, f"{name}.1")


def down(x: Tensor, state: State, name: str) -> Tensor:
    return prelu(conv(x, state, f"{name}.0", stride=8, padding=2), state, f"{name}.1")


def point(x: Tensor, state: State, name: str) -> Tensor:
    return prelu(conv(x, state, f"{name}.0"), state, f"{name}.1")


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def feedback_groups(x: Tensor, state: State, name: str, groups: int) -> Tensor:
    small, large = [x], []
    for i in range(groups):
        wide = torch.cat(small, 1)
        if i > 0:
            wide = point(wide, state, f"{name}.uptranBlocks.{i - 1}")
        large.append(up(wide, state, f"{name}.upBlocks.{i}", 8))
        wide = torch.cat(large, 1)
        if i > 0:
            wide = point(wide, state, f"{name}.downtranBlocks.{i - 1}")
        small.append(down(wide, state, f"{name}.downBlocks.{i}"))
    return point(torch.cat(small[1:], 1), state, f"{name}.compress_out")


def fusion(x: Tensor, regions: Tensor, state: State, blocks: int) -> Tensor:
    """Region by region: a grouped convolution is one of its own for each fifth of the channels."""
    name = "block.fusion_block"
    x = leaky(conv(x, state, f"{name}.conv_in.0"))
    odds = regions.exp()
    out = torch.zeros(())
    width = x.shape[1] // 5
    for region in range(5):
        part = slice(region * width, (region + 1) * width)
        own = x[:, part]
        for i in range(blocks):
            res = f"{name}.resnet.{i}.res"
            inner = F.conv2d(own, state[f"{res}.0.weight"][part], state[f"{res}.0.bias"][part], padding=1)
            inner = F.conv2d(leaky(inner), state[f"{res}.2.weight"][part], state[f"{res}.2.bias"][part], padding=1)
            own = own + inner
        out = out + own * (odds[:, region] / odds.sum(1))[:, None]
    return out


def merged(heatmaps: Tensor) -> Tensor:
    out = heatmaps.new_zeros(len(heatmaps), 5, *heatmaps.shape[2:])
    for place, points in enumerate([range(36, 42), range(42, 48), range(27, 36), range(48, 68), range(27)]):
        for image in range(len(heatmaps)):
            for landmark in points:
                own = heatmaps[image, landmark]
                out[image, place] += own / max(float(own.max()), 0.05)
    return out


def bilinear(x: Tensor, by: int, corners: bool) -> Tensor:
    """By the matrix of both weights of each new row and column."""
    for axis in (2, 3):
        old = x.shape[axis]
        new = torch.arange(old * by, dtype=torch.float64)
        at = new * (old - 1) / (old * by - 1) if corners else ((new + 0.5) / by - 0.5).clamp(0, old - 1)
        weights = (1 - (at[:, None] - torch.arange(old)).abs()).clamp(min=0)
        x = torch.tensordot(x, weights, ([axis], [1])).movedim(-1, axis)
    return x


def residual(x: Tensor, state: State, name: str) -> Tensor:
    inner = conv(x, state, f"{name}.conv_block.0").clamp(min=0)
    inner = conv(conv(inner, state, f"{name}.conv_block.2", padding=1), state, f"{name}.conv_block.3")
    return inner + (conv(x, state, f"{name}.skip_layer") if f"{name}.skip_layer.weight" in state else x)


def pool(x: Tensor) -> Tensor:
    return torch.stack([x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]).amax(0)


def hourglass(x: Tensor, state: State, level: int = 4) -> Tensor:
    inner = residual(pool(x), state, f"HG.hg.res{level}_2")
    inner = hourglass(inner, state, level - 1) if level > 1 else residual(inner, state, "HG.hg.res_center")
    inner = residual(inner, state, f"HG.hg.res{level}_3")
    return residual(x, state, f"HG.hg.res{level}_1") + bilinear(inner, 2, True)


def landmarks(x: Tensor, hidden: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
    x = conv(x, state, "HG.pre_conv_block.0", stride=2, padding=3).clamp(min=0)
    x = pool(residual(x, state, "HG.pre_conv_block.2"))
    x = residual(residual(x, state, "HG.pre_conv_block.4"), state, "HG.pre_conv_block.5")
    both = hourglass(conv(torch.cat((x, x if hidden is None else hidden), 1), state, "HG.compress_in"), state)
    width = x.shape[1]
    seen = residual(both[:, :width], state, "HG.hg_conv_out.0")
    seen = conv(seen, state, "HG.hg_conv_out.1.conv_block.0").clamp(min=0)
    return conv(seen, state, "HG.hg_conv_out.2"), both[:, width:]


def shuffle(x: Tensor) -> Tensor:
    """Channel 4c + 2i + j goes to row i and column j of channel c."""
    batch, channels, height, width = x.shape
    out = x.new_empty(batch, channels // 4, 2 * height, 2 * width)
    for i in (0, 1):
        for j in (0, 1):
            out[:, :, i::2, j::2] = x[:, 2 * i + j :: 4]
    return out


def whole(
    images: Tensor, state: State, steps: int = 2, groups: int = 3, blocks: int = 2
) -> list[tuple[Tensor, Tensor]]:
    coarse = bilinear(images, 8, False)
    x = shuffle(prelu(conv(images, state, "conv_in.0", padding=1), state, "conv_in.1"))
    found: list[tuple[Tensor, Tensor]] = []
    f = feedback_groups(point(x, state, "first_block.compress_in"), state, "first_block", groups)
    hidden = None
    for step in range(steps):
        if step > 0:
            both = point(torch.cat((x, f), 1), state, "block.compress_in")
            f = feedback_groups(fusion(both, merged(found[-1][1]), state, blocks), state, "block", groups)
        sr = coarse + conv(up(f, state, "out", 4), state, "conv_out.0", padding=1)
        heatmaps, hidden = landmarks(sr, hidden, state)
        found.append((sr, heatmaps))
    return found


# Blocks against them, in float64

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-9}


def below(state: State, name: str) -> State:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


@pytest.fixture
def exact() -> Dic:
    return small().double()


def test_feedback_block(exact: Dic) -> None:
    maps = faces(2, 4, 6, 5, dtype=torch.float64) - 0.5
    state = exact.state_dict()
    expected = feedback_groups(point(maps, state, "first_block.compress_in"), state, "first_block", 3)
    assert expected.shape == maps.shape
    torch.testing.assert_close(exact.first_block(maps), expected, **CLOSE)


def test_attentive_feedback_block(exact: Dic) -> None:
    state = exact.state_dict()
    shallow, last = faces(2, 2, 4, 5, 6, dtype=torch.float64) - 0.5
    regions = 3 * faces(2, 5, 5, 6, dtype=torch.float64)
    maps = point(torch.cat((shallow, last), 1), state, "block.compress_in")
    expected = feedback_groups(fusion(maps, regions, state, 2), state, "block", 3)
    torch.testing.assert_close(exact.block(shallow, last, regions), expected, **CLOSE)
    assert not torch.allclose(exact.block(last, shallow, regions), expected)


def test_fusion(exact: Dic) -> None:
    maps, regions = faces(2, 4, 5, 6, dtype=torch.float64) - 0.5, 3 * faces(2, 5, 5, 6, dtype=torch.float64)
    expected = fusion(maps, regions, exact.state_dict(), 2)
    torch.testing.assert_close(exact.block.fusion_block(maps, regions), expected, **CLOSE)
    # all the weight on one region
    regions[:, 3] = 1000
    own = exact.block.fusion_block.resnet(exact.block.fusion_block.conv_in(maps))
    torch.testing.assert_close(exact.block.fusion_block(maps, regions), own[:, 12:16], **CLOSE)


def test_merge_of_heatmaps() -> None:
    heatmaps = 0.2 * (faces(2, 68, 4, 4, dtype=torch.float64) - 0.7)  # peaks on both sides of .05
    assert 0 < (heatmaps.amax((2, 3)) < 0.05).sum() < 2 * 68
    torch.testing.assert_close(merge(heatmaps), merged(heatmaps), **CLOSE)


def test_merge_by_hand() -> None:
    heatmaps = torch.zeros(1, 68, 2, 2)
    heatmaps[0, 36, 0, 0], heatmaps[0, 36, 0, 1] = 4, 1  # left eye, its first
    heatmaps[0, 47, 1, 1] = 0.04  # right eye, its last, too faint
    heatmaps[0, 26, 1, 0], heatmaps[0, 0, 1, 0] = 3, 2  # jaw and brows
    heatmaps[0, 67] = -1  # mouth
    assert merge(heatmaps).tolist() == [
        [[[1, 0.25], [0, 0]], [[0, 0], [0, pytest.approx(0.8)]], [[0, 0], [0, 0]], [[-20, -20], [-20, -20]],
         [[0, 0], [2, 0]]]
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["HG.pre_conv_block.2", "HG.pre_conv_block.4", "HG.hg.res_center"])
def test_residual_block(name: str, exact: Dic) -> None:
    block = exact.get_submodule(name)
    before = block.conv_block[0].in_channels
    maps = faces(2, before, 5, 4, dtype=torch.float64) - 0.5
    torch.testing.assert_close(block(maps), residual(maps, exact.state_dict(), name), **CLOSE)


@pytest.mark.parametrize("size", [(16, 16), (32, 48)])
def test_hourglass(size: tuple[int, int], exact: Dic) -> None:
    maps = faces(2, 16, *size, dtype=torch.float64) - 0.5
    torch.testing.assert_close(exact.HG.hg(maps), hourglass(maps, exact.state_dict()), **CLOSE)


def test_landmarks_with_and_without_a_hidden_state(exact: Dic) -> None:
    images = faces(2, 3, 64, 64, dtype=torch.float64) - 0.5
    hidden = None
    for _ in range(2):
        expected = landmarks(images, hidden, exact.state_dict())
        heatmaps, hidden = exact.HG(images, hidden)
        assert heatmaps.shape == (2, 68, 16, 16)
        torch.testing.assert_close((heatmaps, hidden), expected, **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps(steps: int) -> None:
    model = small(num_steps=steps).double()
    images = faces(2, 3, 8, 16, dtype=torch.float64) - 0.5
    found, expected = model.steps(images), whole(images, model.state_dict(), steps)
    assert len(found) == steps
    peaks = found[0][1].amax((2, 3))
    assert (peaks < 0.05).any()
    assert (peaks > 0.05).any()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_forward_is_the_last_step_with_the_mean(exact: Dic) -> None:
    images = faces(2, 3, 8, 8, dtype=torch.float64)
    exact.conv_out[0].weight.mul_(3)
    mean = torch.tensor([0.509, 0.424, 0.378], dtype=torch.float64).view(3, 1, 1)
    last = whole(images - mean, exact.state_dict())[-1][0] + mean
    expected = last.clamp(0, 1)
    assert 0.01 < (last < 0).double().mean() < 0.4
    assert 0.01 < (last > 1).double().mean() < 0.4
    torch.testing.assert_close(exact(images), expected, **CLOSE)


def test_other_numbers_of_groups_and_blocks() -> None:
    model = small(num_groups=1, num_fusion_blocks=1).double()
    images = faces(1, 3, 8, 8, dtype=torch.float64) - 0.5
    expected = whole(images, model.state_dict(), 2, 1, 1)
    torch.testing.assert_close(model.steps(images)[-1], expected[-1], **CLOSE)


# Padding


def test_padding_by_hand() -> None:
    image = torch.arange(1.0, 7).view(1, 1, 2, 3)
    assert pad(image, 1) is image
    assert pad(image, 3).tolist() == [[[[1, 2, 3], [4, 5, 6], [1, 2, 3]]]]
    # two rows cannot be reflected in two
    assert pad(image, 4).tolist() == [[[[1, 2, 3, 3], [4, 5, 6, 6], [4, 5, 6, 6], [4, 5, 6, 6]]]]
    assert pad(torch.arange(1.0, 4).view(1, 1, 1, 3), 2).tolist() == [[[[1, 2, 3, 3], [1, 2, 3, 3]]]]


@pytest.mark.parametrize(("size", "padded"), [((12, 20), (16, 24)), ((8, 9), (8, 16)), ((5, 16), (8, 16))])
def test_other_sizes_are_padded_and_cropped(size: tuple[int, int], padded: tuple[int, int], exact: Dic) -> None:
    height, width = size
    images = faces(2, 3, *size, dtype=torch.float64)
    rows, columns = ([*range(side), *range(side - 2, -1, -1)] for side in size)  # there and back
    larger = images[:, :, rows[: padded[0]]][:, :, :, columns[: padded[1]]]
    assert larger.shape[2:] == padded
    out = exact(images)
    assert out.shape == (2, 3, 8 * height, 8 * width)
    assert torch.equal(out, exact(larger)[:, :, : 8 * height, : 8 * width])


@pytest.mark.parametrize("size", [(4, 8), (1, 1), (3, 13)])
def test_images_too_small_to_reflect(size: tuple[int, int]) -> None:
    out = small()(faces(1, 3, *size))
    assert out.shape == (1, 3, 8 * size[0], 8 * size[1])
    assert torch.isfinite(out).all()


# Calls


def test_a_batch_is_its_images(exact: Dic) -> None:
    images = faces(3, 3, 8, 8, dtype=torch.float64)
    singles = torch.cat([exact(image[None]) for image in images])
    torch.testing.assert_close(exact(images), singles, **CLOSE)
    assert (singles[0] - singles[1]).abs().max() > 0.1


def test_calls_are_independent() -> None:
    model = small()
    images, others = faces(2, 3, 8, 8), 1 - faces(3, 3, 16, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given, first = images.clone(), model(images)
    model(others)
    assert torch.equal(model(images), first)

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    hook = model.block.compress_out.register_forward_hook(stop)
    with pytest.raises(Stop):
        model(others)
    hook.remove()
    assert torch.equal(model(images), first)
    assert torch.equal(images, given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_order_of_colours_matters() -> None:
    images = faces(1, 3, 8, 8)
    model = small()
    assert (model(images.flip(1)).flip(1) - model(images)).abs().max() > 0.1
    assert MEAN == (0.509, 0.424, 0.378)


def test_with_no_weights_at_all_it_is_bilinear() -> None:
    model = small()
    for parameter in model.parameters():
        parameter.zero_()
    images = faces(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model.double()(images), bilinear(images, 8, False), **CLOSE)


def test_bfloat16_is_close() -> None:
    model, images = small(), faces(2, 3, 8, 8)
    images = images.bfloat16().float()
    expected, seen = model.steps(images - 0.5), {}
    model.block.fusion_block.register_forward_hook(lambda _, given, out: seen.update(regions=given[1], out=out))
    with torch.autocast("cpu", torch.bfloat16):
        found = model.steps(images - 0.5)
        out = model(images)
    assert out.dtype == torch.float32
    assert seen["regions"].dtype == seen["out"].dtype == torch.float32
    assert found[0][1].dtype == torch.bfloat16  # so it was in use
    for (image, heatmaps), (other, others) in zip(found, expected, strict=True):
        assert (image - other).norm() < 0.02 * other.norm()
        assert (heatmaps - others).norm() < 0.04 * others.norm()
    assert (out - model(images)).abs().mean() < 0.01


def test_upsampling_is_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's autocast would leave it in bfloat16, unlike a CPU's."""
    interpolate, dtypes = F.interpolate, []

    def record(maps: Tensor, **options: Any) -> Tensor:
        dtypes.append(maps.dtype)
        return interpolate(maps, **options)

    monkeypatch.setattr(F, "interpolate", record)
    with torch.autocast("cpu", torch.bfloat16):
        small()(faces(1, 3, 8, 8))
    assert dtypes == [torch.float32] * (1 + 2 * 4)


def test_channels_last_is_close() -> None:
    model, images = small(), faces(2, 3, 8, 8)
    expected = model(images)
    out = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


def test_every_parameter_gets_a_gradient() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        model = small()
        sum(part.sum() for step in model.steps(faces(1, 3, 8, 8) - 0.5) for part in step).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# Files


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    monkeypatch.setattr("fer.super_resolution.dic.PUBLISHED", SMALL)
    return SMALL


@pytest.mark.parametrize("wrapper", [None, "state_dict", "netG"])
def test_a_file_is_loaded(wrapper: str | None, sizes: dict[str, int], tmp_path: Path) -> None:
    model = small(seed=3)
    state = model.state_dict()
    torch.save({"epoch": 1, wrapper: state} if wrapper else state, tmp_path / "dic.pth")
    loaded = load_dic(str(tmp_path / "dic.pth"), KEY)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(faces(1, 3, 8, 8)), model(faces(1, 3, 8, 8)))
    assert not torch.equal(small()(faces(1, 3, 8, 8)), model(faces(1, 3, 8, 8)))


def test_the_published_sizes_are_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "dic.pth"
    torch.save({}, path)
    assert refused(path) == "holds no named tensors; give a file of named tensors alone, such as a saved state_dict"
    torch.save(small().state_dict(), path)
    assert refused(path) == "tensor HG.compress_in.bias has shape [16], the model needs [512]"


def refused(path: Path) -> str:
    """The message about a file, less the key and path that each begins with."""
    with pytest.raises(UserError) as caught:
        load_dic(path, KEY)
    message = str(caught.value)
    assert message.startswith(f"{KEY}: {path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{KEY}: {path}: ")


def test_tensors_that_do_not_fit(sizes: dict[str, int], tmp_path: Path) -> None:
    path, state = tmp_path / "dic.pth", small().state_dict()
    torch.save({name: value for name, value in state.items() if name != "out.1.weight"}, path)
    assert refused(path) == "tensor out.1.weight is missing; the file belongs to another model"
    torch.save(state | {"sub_mean.weight": torch.ones(3)}, path)
    assert refused(path) == "tensor sub_mean.weight is not in this model; the file belongs to another one"
    torch.save(state | {"conv_in.0.weight": torch.ones(16, 1, 3, 3)}, path)
    assert refused(path) == "tensor conv_in.0.weight has shape [16, 1, 3, 3], the model needs [16, 3, 3, 3]"


@pytest.mark.parametrize("damage", ["missing", "html", "cut", "code"])
def test_files_that_hold_no_weights(damage: str, tmp_path: Path) -> None:
    path, ran = tmp_path / "dic.pth", tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(ran),)

    torch.save(small().state_dict() | ({"x": Code()} if damage == "code" else {}), path)
    if damage == "missing":
        path.unlink()
    elif damage == "html":
        path.write_text("<!DOCTYPE html><html>Google Drive - Virus scan warning</html>")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    assert (
        refused(path)
        == {
            "missing": "not found; put the file there or name another",
            "html": "looks like an html page, not a weights file; fetch the file itself",
            "cut": "not a whole weights file of its kind; fetch it again or name another",
            "code": "asks for posix.mkdir, which is code and never run; "
            "give a file of named tensors alone, such as a saved state_dict",
        }[damage]
    )
    assert not ran.exists()
