"""Max-pooling as the recorder runs it is PyTorch's, to the bit, whatever is pooled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv.engine.recorder import record
from lit_deconv.engine.rules import layout, pooling
from lit_deconv.engine.rules.pooling import (
    Switches,
    pooled,
    pooled_channels_last,
    switch_codes,
    unpool,
)
from lit_deconv.engine.rules.resampling import per_dim

_POOL = torch.ops.aten.max_pool2d_with_indices.default
_GRIDS = {
    "2x2": ([2, 2], [2, 2], [0, 0], [1, 1], False),
    "overlapping, padded": ([3, 3], [2, 2], [1, 1], [1, 1], False),
    "ceil_mode": ([3, 3], [2, 2], [1, 1], [1, 1], True),
    "oblong, dilated": ([2, 3], [1, 2], [1, 0], [2, 1], False),
    "one number": ([2], [], [0], [1], False),
}


def _maps(name: str) -> Tensor:
    random = torch.randn(3, 5, 17, 12, generator=torch.Generator().manual_seed(0))
    return {
        "random": random,
        "float64": random.double(),
        "ties": random.round().clamp(0, 1),
        "signed zeros": random.sign() * 0.0,
        "not finite": torch.where(random > 1, torch.nan, random.where(random > -1, -torch.inf)),
        "several parts": torch.randn(2, 40, 96, 96, generator=torch.Generator().manual_seed(1)),
        # Narrower than the kernel, so that one index may be of several places in it.
        "narrow": torch.randn(2, 40, 31, 2, generator=torch.Generator().manual_seed(2)),
        "strided": random.transpose(2, 3),
        "channels_last": random.contiguous(memory_format=torch.channels_last),
        "no images": random[:0],
        "one map": random[0],
    }[name]


@pytest.mark.parametrize("grid", _GRIDS)
@pytest.mark.parametrize(
    "name",
    ["random", "float64", "ties", "signed zeros", "not finite", "several parts", "strided",
     "channels_last", "no images", "one map"],
)  # fmt: skip
@pytest.mark.parametrize("run", [pooled, pooled_channels_last])
def test_the_same_to_the_bit(
    run: Any, name: str, grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if run is pooled_channels_last:
        monkeypatch.setattr(pooling, "_SIDE_BY_SIDE", 1)
        monkeypatch.setattr(layout, "_FAST_IN_CHANNELS_LAST", (torch.float32, torch.float64))
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    arguments: dict[str, Any] = {
        "self": _maps(name), **dict(zip(names, _GRIDS[grid], strict=True))
    }  # fmt: skip
    values, indices = run(_POOL, arguments)
    expected, at = _POOL(**arguments)
    assert values.dtype == expected.dtype
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[values.dtype]
    # As numbers, NaN is no NaN and 0 is -0.
    assert torch.equal(values.contiguous().view(bits), expected.contiguous().view(bits))
    assert torch.equal(indices, at)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("grid", "name"),
    [*((grid, "several parts") for grid in _GRIDS), ("overlapping, padded", "narrow")],
)
def test_the_same_codes_however_the_indices_lie(grid: str, name: str) -> None:
    *steps, ceil_mode = _GRIDS[grid]
    kernel, stride, padding, dilation = (
        list(per_dim(step, 2)) if step else [2, 2] for step in steps
    )
    maps = _maps(name)
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    arguments: dict[str, Any] = {
        "self": maps, **dict(zip(names, (*steps, ceil_mode), strict=True))
    }  # fmt: skip
    given = []
    for run in (pooled, pooled_channels_last):
        values, indices = run(_POOL, arguments)
        given.append(switch_codes(indices, maps.shape[2:], kernel, stride, padding, dilation))
    assert not values.is_contiguous()  # the latter is of use
    assert torch.equal(*given)
    assert given[1].is_contiguous()


def test_the_model_gets_what_it_asked_for_while_it_is_recorded() -> None:
    class Unpools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[Tensor, Tensor]] = []

        def forward(self, x: Tensor) -> Tensor:
            values, indices = F.max_pool2d(x, 2, return_indices=True)
            self.seen.append((values.clone(), indices.clone()))
            return F.relu(values)

    model, images = Unpools(), torch.randn(2, 20, 64, 64)
    model(images)
    record(model, [images], {"": model}, model=model)
    (plain, plain_at), (recorded, recorded_at) = model.seen
    assert torch.equal(plain, recorded)
    assert torch.equal(plain_at, recorded_at)
    assert recorded.is_contiguous()
    assert recorded_at.is_contiguous()


GEOMETRIES: dict[str, Any] = {
    "plain": ((6, 7), 2, 2, 0, 1, False),
    "overlapping, padded": ((7, 9), 3, 2, 1, 1, False),
    "past the end": ((6, 8), 3, 2, 1, 1, True),
    "past the end in one dimension": ((7, 8), 3, 2, 0, 1, True),
    "dilated": ((9, 8), 3, 2, 1, 2, True),
    "gaps between": ((9, 8), 2, 3, 1, 1, True),
    "one row": ((1, 6), (1, 2), 2, (0, 1), 1, True),
    "many places": ((30, 30), 17, 2, 8, 1, False),
    # A window may have no place in the map: PyTorch's index then lies elsewhere.
    "steps over the map": ((5, 2), (1, 2), 1, (0, 1), (1, 3), False),
    "steps over it, past the end": ((3, 2), 2, (3, 2), 1, (2, 4), True),
    "steps over it downwards": ((3, 40), (2, 1), 1, (1, 0), (4, 1), False),
}


def _pooled_maps(case: str, rows: int) -> tuple[Tensor, Tensor, Switches, tuple[int, int]]:
    """What a pool returns for random maps, its switches, and the size of the maps."""
    size, *settings, ceil_mode = GEOMETRIES[case]
    kernel, stride, padding, dilation = (
        [setting] * 2 if isinstance(setting, int) else list(setting) for setting in settings
    )
    maps = torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(0)).double()
    largest, indices = torch.ops.aten.max_pool2d_with_indices(
        maps, kernel, stride, padding, dilation, ceil_mode
    )
    codes = switch_codes(indices, size, kernel, stride, padding, dilation)
    return largest, indices, Switches(codes, kernel, stride, padding, dilation), size


@pytest.mark.parametrize("case", GEOMETRIES)
@pytest.mark.parametrize("rows_of_codes", [1, 3])
def test_whole_maps_are_unpooled_to_the_switches(case: str, rows_of_codes: int) -> None:
    """Against adding each value at PyTorch's own index, where the window has a place in the map."""
    largest, indices, switches, size = _pooled_maps(case, rows_of_codes)
    values = torch.rand(3, *largest.shape[1:], dtype=torch.float64) + 1
    has_place = (largest > -torch.inf).expand(values.shape)
    places = torch.where(has_place, indices.expand(values.shape), 0)
    expected = values.new_zeros(3, 4, size[0] * size[1])
    expected.scatter_add_(2, places.flatten(2), torch.where(has_place, values, 0).flatten(2))
    found = unpool(values, switches.codes, switches, size)
    assert torch.allclose(found, expected.view(found.shape), rtol=1e-12, atol=0)


def test_some_windows_have_no_place_in_the_map() -> None:
    """So that the last cases above are what they say."""
    for case in GEOMETRIES:
        largest, *_ = _pooled_maps(case, 1)
        assert bool(largest.isinf().any()) == ("steps over" in case)
