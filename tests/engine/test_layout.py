"""Turning maps round in memory, against PyTorch's own copies, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_deconv.engine.rules.layout import by_map, channels_last, transposed

# Large enough to be moved by vectors, with and without a rest, and some that are not.
SHAPES = (
    (256, 64),
    (300, 77),
    (3, 20000),
    (20000, 3),
    (1, 30000),
    (4, 70, 90),
    (5, 6),
    (0, 7),
    (2, 3, 5, 4),
)

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.int8,
    torch.bool, torch.complex64,
)  # fmt: skip


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(-100, 100, shape).to(dtype)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrices = _numbers(shape, dtype)
    for given in (matrices, matrices.mT.contiguous().mT):
        found = transposed(given)
        assert found.is_contiguous()
        assert found.dtype == dtype
        assert torch.equal(found, matrices.mT)


def test_bits_are_moved_as_they_are() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (130, 150), dtype=torch.int32)
    assert torch.isnan(bits.view(torch.float32)).any()
    assert _same_bits(transposed(bits.view(torch.float32)), bits.view(torch.float32).t())


def test_without_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.delattr(torch, "channel_shuffle")
    matrices = _numbers((300, 77), torch.float32)
    assert torch.equal(transposed(matrices), matrices.t())


def test_autograd_follows() -> None:
    matrices = _numbers((200, 100), torch.float32).requires_grad_()
    weights = torch.randn(100, 200)
    (transposed(matrices) * weights).sum().backward()
    assert matrices.grad is not None
    assert torch.equal(matrices.grad, weights.t())


@pytest.mark.parametrize("shape", [(5, 30, 17, 13), (1, 64, 40, 40), (3, 1, 90, 90), (2, 70, 1, 1)])
@pytest.mark.parametrize("part", [False, True])
def test_maps_in_other_layouts(shape: tuple[int, ...], part: bool) -> None:
    maps = torch.randn(shape)
    if part:
        maps = torch.nn.functional.pad(maps, (1, 2, 0, 1))[..., :-1, 1:-2]
    last = channels_last(maps)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, maps)


@pytest.mark.parametrize("shape", [(5, 30, 17, 13), (3, 1, 90, 90), (2, 70, 1, 1)])
def test_and_back(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape)
    last = channels_last(maps)
    for laid in (maps, last, last[:, :, 1:], maps.double()):
        back = by_map(laid)
        assert back.is_contiguous()
        assert torch.equal(back, laid)
