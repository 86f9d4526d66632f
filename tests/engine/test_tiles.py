"""Transposed convolutions as products of matrices, against PyTorch's own and against the definition."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.engine import record, walk
from lit_deconv.engine.rules import by_pixel
from lit_deconv.engine.rules.by_pixel import by_taps, by_tiles, cheapest
from lit_deconv.engine.rules.layout import by_map, lies_by_pixel
from lit_deconv.engine.rules.shared_work import _shared, shared_work
from lit_deconv.engine.signal import Signal

Here = Sequence[tuple[int, int]]

# [U, C, h, w], [D, kh, kw], and the pixels wanted of those covered.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Here]] = {
    "all": ((3, 4, 5, 6), (2, 3, 3), [(0, 7), (0, 8)]),
    "same": ((2, 5, 7, 7), (3, 3, 3), [(1, 8), (1, 8)]),
    "odd part": ((4, 3, 6, 5), (4, 3, 3), [(2, 7), (0, 3)]),
    "one pixel": ((2, 3, 5, 5), (2, 3, 3), [(6, 7), (0, 1)]),
    "far behind the last": ((2, 3, 4, 4), (2, 3, 3), [(9, 12), (8, 14)]),
    "behind the last": ((2, 3, 4, 4), (2, 3, 3), [(1, 9), (4, 8)]),
    "one value a map": ((5, 6, 1, 1), (4, 3, 3), [(0, 3), (0, 3)]),
    "one seed": ((1, 6, 9, 4), (4, 3, 3), [(1, 10), (1, 5)]),
    "one channel": ((3, 1, 4, 4), (1, 3, 3), [(0, 6), (0, 6)]),
    "5x5": ((3, 4, 4, 6), (2, 5, 5), [(2, 6), (1, 9)]),
    "2x4": ((3, 4, 4, 6), (2, 2, 4), [(0, 5), (2, 8)]),
    "1x1": ((3, 4, 4, 6), (2, 1, 1), [(0, 4), (1, 5)]),
    "several blocks": ((3, 4, 70, 66), (2, 3, 3), [(1, 70), (1, 67)]),
}


def _made(name: str) -> tuple[Tensor, Tensor, Here, Tensor]:
    """Values, filters, the part wanted, and that part of PyTorch's own."""
    shape, (found, *kernel), here = SHAPES[name]
    torch.manual_seed(0)
    values = torch.randn(*shape, dtype=torch.float64)
    weight = torch.randn(shape[1], found, *kernel, dtype=torch.float64)
    whole = F.conv_transpose2d(values, weight)
    (top, bottom), (left, right) = here
    behind = [0, right, 0, bottom]
    return values, weight, here, F.pad(whole, behind)[:, :, top:bottom, left:right]


def _laid_by_pixel(values: Tensor) -> Tensor:
    return values.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, by_taps) for name in SHAPES]
    + [(name, by_tiles) for name, (_, (_, *kernel), _) in SHAPES.items() if kernel == [3, 3]],
)
@pytest.mark.parametrize("layout", ["by map", "by pixel", "channels_last", "part of a larger one"])
def test_the_same_as_pytorchs_own(
    name: str, layout: str, form: Callable[[Tensor, Tensor, Here], Tensor]
) -> None:
    values, weight, here, expected = _made(name)
    laid = {
        "by map": values,
        "by pixel": _laid_by_pixel(values),
        "channels_last": values.contiguous(memory_format=torch.channels_last),
        "part of a larger one": _laid_by_pixel(F.pad(values, (0, 1, 0, 2)))[:, :, :-2, :-1],
    }[layout]
    given = form(laid, weight, here)
    assert given.shape == expected.shape
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)
    turned = by_map(given)
    assert torch.equal(turned, given)
    assert turned.is_contiguous() or not lies_by_pixel(given)


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
    with mock.patch.multiple(by_pixel, _SMALL=0, _FEW_ROWS=0, _SHARE_BY_TILES=math.inf):
        tape = record(model, (images,), {"1": model[1]}, model=model)
        target = tape.layers["1"]
        (found,) = walk(tape, target, Signal(torch.randn(2, 48, 5, 5)))
        assert found is not None
        found.values.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "weight" in name)


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [2, 4, 16])
@pytest.mark.parametrize("forward", [False, True])
def test_rows_of_tiles_are_shared_among_threads(
    threads: int, forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, weight, here, expected = _made("several blocks")
    if forward:
        weight = weight.flip(2, 3).transpose(0, 1).contiguous()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    blocks = []
    for grain in (1, 1000, 1 << 15):
        monkeypatch.setattr(by_pixel, "_GRAIN", grain)
        with mock.patch.object(torch, "bmm", wraps=torch.bmm) as products:
            given = by_tiles(values, weight, here, forward)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)
        blocks.append(products.call_count)
    assert blocks[0] > blocks[1] > blocks[2] == 1


@pytest.mark.parametrize(
    "name", [name for name, (_, (_, *kernel), _) in SHAPES.items() if kernel == [3, 3]]
)
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
        mock.patch.object(by_pixel, "_transformed", wraps=by_pixel._transformed) as transformed,
    ):
        for _ in range(3):
            by_tiles(values, weight, here)
        assert transformed.call_count == 1
        weight *= 2
        torch.testing.assert_close(by_tiles(values, weight, here), 2 * expected, rtol=0, atol=1e-12)
        assert transformed.call_count == 2
        shared = _shared.get()
        assert shared is not None
        assert len(shared.filters) == 1
        transformed.reset_mock()  # it holds what it was called with
        del weight
        gc.collect()
        assert len(shared.filters) == 0


@pytest.mark.cpu
def test_which_form_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def form(
        seeds: int, channels: int, found: int, extent: int, full: bool = False, kernel: int = 3
    ) -> str:
        values = torch.empty(1).expand(seeds, channels, extent, extent)
        weight = torch.empty(1).expand(channels, found, kernel, kernel)
        side = 0 if full else kernel // 2
        here = [(side, extent + kernel - 1 - side)] * 2
        chosen = cheapest(values, weight, here)
        return chosen.__name__ if chosen else "PyTorch's"

    assert form(8, 512, 512, 14) == "by_tiles"
    assert form(6, 256, 256, 14) == "by_tiles"
    assert form(64, 256, 384, 3, full=True) == "by_taps"
    assert form(64, 192, 64, 5, full=True, kernel=5) == "by_taps"
    assert form(64, 256, 128, 7, full=True) == "PyTorch's"
    assert form(8, 64, 64, 56) == "by_tiles"
    assert form(8, 48, 48, 56) == "PyTorch's"
    assert form(8, 512, 3, 14) == "PyTorch's"
    assert form(8, 192, 64, 27, kernel=5) == "PyTorch's"
    assert form(1, 64, 64, 8) == "PyTorch's"
    assert form(6, 128, 128, 28) == "by_tiles"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert form(8, 512, 512, 14) == "by_tiles"
    assert form(6, 128, 128, 28) == "by_tiles"
    assert form(8, 64, 64, 56) == "PyTorch's"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert form(8, 512, 512, 14) == "PyTorch's"
    half = torch.empty(1, dtype=torch.bfloat16).expand(8, 512, 14, 14)
    assert cheapest(half, half[0, 0, 0, 0].expand(512, 512, 3, 3), [(1, 15)] * 2) is None


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("name", "form"), [("_SHARE_BY_TAPS", "by_taps"), ("_SHARE_BY_TILES", "by_tiles")]
)
def test_a_residual_net_by_either_form(name: str, form: str) -> None:
    """Through rectifiers, scales, sums, a pool and a strided convolution, which find maps by pixel."""

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
    forced: dict[str, Any] = {
        "_SMALL": 0, "_FEW_ROWS": 0, "_NARROW": 0,
        "_SHARE_BY_TAPS": -math.inf, "_SHARE_BY_TILES": -math.inf, name: math.inf,
    }  # fmt: skip
    usual = net.attribute(images), net.maps(images, [0, 3]), net.reconstruct(images, units)
    with (
        mock.patch.multiple(by_pixel, **forced),
        mock.patch.object(by_pixel, form, wraps=getattr(by_pixel, form)) as taken,
    ):
        given = net.attribute(images), net.maps(images, [0, 3]), net.reconstruct(images, units)
    assert taken.call_count > 15
    for one, another in zip(given, usual, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=1e-12 * float(another.abs().max()))
        assert one.any()


def test_a_picture_is_laid_as_its_image() -> None:
    """Also where its first convolution is one of those by pixel, of one image and of several."""
    model = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3))
    images = torch.randn(8, 64, 18, 18)
    with mock.patch.object(by_pixel, "_SHARE_BY_TILES", math.inf):
        for some, selector in ((images, None), (images, (3, 4, 5)), (images[:1], None)):
            assert Deconvnet(model, "2").attribute(some, neuron_selector=selector).is_contiguous()
