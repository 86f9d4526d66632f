"""Convolutions by Winograd's tiles, against PyTorch's own, in float64 and as the library computes them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.engine import record, walk
from lit_deconv.engine.rules import convolution, tiles
from lit_deconv.engine.rules.layout import by_map
from lit_deconv.engine.rules.shared_work import _shared, shared_work
from lit_deconv.engine.rules.tiles import by_tiles, tiles_pay
from lit_deconv.engine.signal import Signal

Here = Sequence[tuple[int, int]]

# [U, C, h, w], D, and the pixels wanted of those covered.
SHAPES: dict[str, tuple[tuple[int, ...], int, Here]] = {
    "all": ((3, 4, 5, 6), 2, [(0, 7), (0, 8)]),
    "same": ((2, 5, 7, 7), 3, [(1, 8), (1, 8)]),
    "odd part": ((4, 3, 6, 5), 4, [(2, 7), (0, 3)]),
    "one pixel": ((2, 3, 5, 5), 2, [(6, 7), (0, 1)]),
    "far behind the last": ((2, 3, 4, 4), 2, [(9, 12), (8, 14)]),
    "behind the last": ((2, 3, 4, 4), 2, [(1, 9), (4, 8)]),
    "one value a map": ((5, 6, 1, 1), 4, [(0, 3), (0, 3)]),
    "one seed": ((1, 6, 9, 4), 4, [(1, 10), (1, 5)]),
    "one channel": ((3, 1, 4, 4), 1, [(0, 6), (0, 6)]),
    "several blocks of rows": ((3, 4, 70, 66), 2, [(1, 70), (1, 67)]),
    "several blocks of seeds": ((99, 3, 6, 8), 2, [(1, 7), (1, 9)]),
}


def _made(name: str) -> tuple[Tensor, Tensor, Here, Tensor]:
    """Values, filters, the part wanted, and that part of PyTorch's own."""
    shape, found, here = SHAPES[name]
    torch.manual_seed(0)
    values = torch.randn(*shape, dtype=torch.float64)
    weight = torch.randn(shape[1], found, 3, 3, dtype=torch.float64)
    whole = F.conv_transpose2d(values, weight)
    (top, bottom), (left, right) = here
    behind = [0, right, 0, bottom]
    return values, weight, here, F.pad(whole, behind)[:, :, top:bottom, left:right]


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", ["by map", "channels_last", "part of a larger one"])
@pytest.mark.parametrize("forward", [False, True])
def test_the_same_as_pytorchs_own(name: str, layout: str, forward: bool) -> None:
    values, weight, here, expected = _made(name)
    if forward:
        weight = weight.flip(2, 3).transpose(0, 1).contiguous()
    laid = {
        "by map": values,
        "channels_last": _channels_last(values),
        "part of a larger one": _channels_last(F.pad(values, (0, 1, 0, 2)))[:, :, :-2, :-1],
    }[layout]
    given = by_tiles(laid, weight, here, forward)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)
    assert given.is_contiguous(memory_format=torch.channels_last)
    turned = by_map(given)
    assert turned.is_contiguous()
    assert torch.equal(turned, given)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("shape", "found", "here"),
    [((5, 32, 9, 8), 48, [(1, 10), (1, 9)]), ((99, 16, 6, 8), 16, [(0, 8), (2, 7)]),
     ((2, 64, 60, 70), 16, [(1, 61), (1, 71)]), ((1, 16, 1, 1), 32, [(0, 3), (0, 3)])],
)  # fmt: skip
@pytest.mark.parametrize("wide", [False, True])
def test_the_librarys_products(
    shape: tuple[int, ...], found: int, here: Here, one_thread: bool, wide: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tiles, "_WIDE", 0 if wide else math.inf)
    torch.manual_seed(0)
    values, weight = torch.randn(shape), torch.randn(shape[1], found, 3, 3)
    (top, bottom), (left, right) = here
    exact = F.conv_transpose2d(values.double(), weight.double())[:, :, top:bottom, left:right]
    with (
        mock.patch.object(torch, "mkldnn_convolution", wraps=torch.mkldnn_convolution) as grouped,
        mock.patch.object(tiles, "_linear", wraps=tiles._linear) as one_by_one,
    ):
        given = by_tiles(values, weight, here)
    assert (grouped.called, one_by_one.called) == (not wide, wide)
    assert (given - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.fixture(params=[True, False], ids=["one thread", "all threads"])
def one_thread(request: pytest.FixtureRequest) -> Iterator[bool]:
    threads = torch.get_num_threads()
    if request.param:
        torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)


@pytest.mark.cpu
def test_errors_of_tiles_are_those_of_rounding() -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 256, 14, 14).clamp(min=0)
    weight = torch.randn(256, 256, 3, 3) / 48
    here = [(1, 15), (1, 15)]
    exact = F.conv_transpose2d(values.double(), weight.double(), padding=1)
    error = (by_tiles(values, weight, here) - exact).abs().max() / exact.abs().max()
    assert 1e-8 < error < 1e-6


def test_what_meets_zeros_alone_is_zero_and_what_is_not_finite_stays_in_place() -> None:
    torch.manual_seed(0)
    values = torch.randn(8, 4, 12, 12) * (torch.rand(8, 1, 12, 12) > 0.97)
    weight, here = torch.randn(4, 3, 3, 3), [(0, 14), (0, 14)]
    met = F.conv_transpose2d((values != 0).float(), torch.ones_like(weight)) > 0
    assert 0.1 < met.float().mean() < 0.9
    assert not by_tiles(values, weight, here)[~met].any()
    for wrong in (torch.nan, torch.inf):
        values[2, 1, 5, 6] = wrong
        usual = F.conv_transpose2d(values, weight).isfinite()
        assert not usual.all()
        assert torch.equal(by_tiles(values, weight, here).isfinite(), usual)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(32, 48, 3), nn.Conv2d(48, 48, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return h + self.conv(F.relu(h))


@pytest.mark.parametrize("inner", [
    lambda: nn.Sequential(nn.Conv2d(32, 48, 3), nn.ReLU()),
    lambda: nn.Sequential(nn.Conv2d(32, 48, 3), nn.BatchNorm2d(48).eval(), nn.ReLU()),
    Residual,
], ids=["chain", "norm", "residual"])  # fmt: skip
def test_autograd_is_left_to_pytorch(inner: Callable[[], nn.Module]) -> None:
    """The walk by itself, as it is offered, may be followed."""
    torch.manual_seed(0)
    model = nn.Sequential(inner(), nn.Conv2d(48, 48, 3))
    images = torch.randn(2, 32, 9, 9)
    with mock.patch.multiple(tiles, _SMALL=0, _count=lambda *_: 0):
        tape = record(model, (images,), {"1": model[1]}, model=model)
        target = tape.layers["1"]
        (found,) = walk(tape, target, Signal(torch.randn(2, 48, 5, 5)))
        assert found is not None
        found.values.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "weight" in name)


@pytest.mark.parametrize("together", [1, 40, 1 << 20])
def test_blocks_cover_all_tiles(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_TOGETHER", together)
    for name in SHAPES:
        values, weight, here, expected = _made(name)
        with mock.patch.object(tiles, "_products", wraps=tiles._products) as products:
            given = by_tiles(values, weight, here)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)
        made = [call.args[0].shape[:3] for call in products.call_args_list]
        blocks = tiles._blocks(len(values), here, *weight.shape[:2])
        assert len(made) == blocks.all
        assert sum(map(math.prod, made)) == blocks.seeds * blocks.rows * blocks.columns
        assert all(math.prod(block) <= max(together, blocks.columns) for block in made)


@pytest.mark.parametrize("name", SHAPES)
def test_what_lies_in_the_shared_place_is_not_read(name: str) -> None:
    values, weight, here, expected = _made(name)
    with shared_work():
        first = by_tiles(values, weight, here)
        shared = _shared.get()
        assert shared is not None
        assert len(shared.room) > 0
        shared.room.fill_(math.nan)
        torch.testing.assert_close(by_tiles(values, weight, here), expected, rtol=0, atol=1e-12)
        place = shared.room.data_ptr()
        by_tiles(values[:2], weight, here)
        assert shared.room.data_ptr() == place
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    assert _shared.get() is None


def test_filters_are_those_of_the_weight_as_it_is() -> None:
    values, weight, here, expected = _made("same")
    with (
        shared_work(),
        torch.no_grad(),
        mock.patch.object(tiles, "_transformed", wraps=tiles._transformed) as transformed,
    ):
        for _ in range(3):
            by_tiles(values, weight, here)
        assert transformed.call_count == 1
        weight *= 2
        torch.testing.assert_close(by_tiles(values, weight, here), 2 * expected, rtol=0, atol=1e-12)
        assert transformed.call_count == 2
        by_tiles(values[:, :3], weight, here, forward=True)
        by_tiles(values, weight, here)
        assert transformed.call_count == 3
        shared = _shared.get()
        assert shared is not None
        assert len(shared.filters) == 1
        transformed.reset_mock()  # it holds what it was called with
        del weight
        gc.collect()
        assert len(shared.filters) == 0


@pytest.mark.cpu
def test_where_tiles_are_taken() -> None:
    def taken(
        seeds: int, channels: int, found: int, extent: int, full: bool = False, kernel: int = 3,
        dtype: torch.dtype = torch.float32,
    ) -> bool:  # fmt: skip
        values = torch.empty(1, dtype=dtype).expand(seeds, channels, extent, extent)
        weight = torch.empty(1, dtype=dtype).expand(channels, found, kernel, kernel)
        side = 0 if full else kernel // 2
        with shared_work():
            return tiles_pay(values, weight, [(side, extent + kernel - 1 - side)] * 2)

    with mock.patch.object(tiles, "has_vectors", return_value=False):
        assert not taken(8, 512, 512, 14)
    assert taken(8, 512, 512, 14)
    assert taken(6, 256, 256, 14)
    assert taken(8, 512, 256, 14)
    assert taken(6, 512, 512, 10)
    with mock.patch.object(tiles, "_wide", return_value=False):
        assert not taken(6, 512, 512, 10)
    assert taken(6, 128, 128, 28)
    assert not taken(8, 64, 64, 56)
    assert not taken(6, 512, 512, 7)
    assert not taken(64, 256, 384, 3, full=True)
    assert not taken(1, 64, 64, 8)
    assert not taken(0, 512, 512, 14)
    assert not taken(8, 512, 510, 14)
    assert not taken(8, 512, 3, 14)
    assert not taken(8, 512, 512, 14, kernel=5)
    assert not taken(8, 512, 512, 14, dtype=torch.bfloat16)
    assert not taken(8, 512, 512, 14, dtype=torch.float64)


def by_tiles_wherever_it_can(values: Tensor, weight: Tensor, here: Here) -> bool:
    return weight.shape[2:] == (3, 3)


def test_a_residual_net_by_tiles() -> None:
    """Through rectifiers, scales, sums, a pool and a strided convolution, which find ``channels_last``."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.convs = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.convs(x))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Block(6), Block(6),
        nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), Block(8),
    ).double()  # fmt: skip
    images = torch.randn(4, 3, 24, 22, dtype=torch.float64)
    net = Deconvnet(model, "7", path="rules")
    units = torch.tensor([[0, 1, 0, 0], [3, 2, 2, 3], [1, 7, 4, 4]])
    usual = net.attribute(images), net.maps(images, [0, 3]), net.reconstruct(images, units)
    with (
        mock.patch.object(convolution, "tiles_pay", by_tiles_wherever_it_can),
        mock.patch.object(convolution, "by_tiles", wraps=by_tiles) as taken,
    ):
        given = net.attribute(images), net.maps(images, [0, 3]), net.reconstruct(images, units)
    assert taken.call_count > 15
    for one, another in zip(given, usual, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=1e-12 * float(another.abs().max()))
        assert one.any()


def test_a_picture_is_laid_as_its_image() -> None:
    """Also where its first convolution is by tiles, of one image and of several."""
    model = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3))
    images = torch.randn(8, 64, 18, 18)
    with mock.patch.object(convolution, "tiles_pay", by_tiles_wherever_it_can):
        for some, selector in ((images, None), (images, (3, 4, 5)), (images[:1], None)):
            assert Deconvnet(model, "2").attribute(some, neuron_selector=selector).is_contiguous()
