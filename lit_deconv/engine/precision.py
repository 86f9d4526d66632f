"""Arithmetic as exact as the dtype says, with deterministic convolutions, whatever the caller allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact() -> Iterator[None]:
    """Nothing is rounded to TF32 or bfloat16 on the way, and convolutions on CUDA are deterministic."""
    cudnn = torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    with _ieee() if hasattr(torch.backends, "fp32_precision") else _without_tf32():
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = deterministic, benchmark


@contextmanager
def _ieee() -> Iterator[None]:
    """By the switches of PyTorch 2.9 and later, of which each follows the one above unless it is set.

    So it is done from above, and a switch that follows is not touched: it could not be put back. The
    older switches would be, which is why they are left alone. PyTorch refuses to read them meanwhile.
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    switches: list[Any] = [torch.backends, cudnn, mkldnn, torch.backends.cuda.matmul]
    for library, kind in itertools.product((cudnn, mkldnn), ("conv", "rnn", "matmul")):
        switches += [getattr(library, kind)] if hasattr(library, kind) else []
    changed: list[tuple[Any, str]] = []
    try:
        for switch in switches:
            before = switch.fp32_precision
            if before != "ieee":
                switch.fp32_precision = "ieee"
                changed.append((switch, before))
        yield
    finally:
        for switch, before in reversed(changed):
            switch.fp32_precision = before


@contextmanager
def _without_tf32() -> Iterator[None]:
    """The same before PyTorch 2.9."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
