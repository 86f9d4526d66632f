"""Max-pooling as the recorder runs it is PyTorch's, to the bit, whatever is pooled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv.engine.recorder import record
from lit_deconv.engine.rules.pooling import pooled

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
def test_the_same_to_the_bit(name: str, grid: str) -> None:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    arguments: dict[str, Any] = {
        "self": _maps(name), **dict(zip(names, _GRIDS[grid], strict=True))
    }  # fmt: skip
    values, indices = pooled(_POOL, arguments)
    expected, at = _POOL(**arguments)
    assert values.dtype == expected.dtype
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[values.dtype]
    # As numbers, NaN is no NaN and 0 is -0.
    assert torch.equal(values.contiguous().view(bits), expected.contiguous().view(bits))
    assert torch.equal(indices, at)


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
