"""Ops that move values about: their own Jacobian, a matrix of zeros and ones, is the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .definition import Case

WAVE, VOLUME = (2, 4, 11), (2, 2, 4, 5, 4)


def _overwritten(x: Tensor) -> Tensor:
    x = x * 2
    x.copy_(x.flip(2))
    return x


def _copied_broadcast(x: Tensor) -> Tensor:
    made = x * 1
    made.copy_(x[:, :1])
    return made


def _filled(x: Tensor) -> Tensor:
    y = x * 2
    y.fill_(3.0)
    return x + y


def _zeroed(x: Tensor) -> Tensor:
    y = x * 2
    y.zero_()
    return x - y


def _shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


CASES = [
    Case("cat", lambda: lambda x: torch.cat([x, x.flip(2), x], 1)),
    Case("cat-constant", lambda: lambda x: torch.cat([torch.ones_like(x), x], 1)),
    Case("cat-empty", lambda: lambda x: torch.cat([x.new_empty(0), x], 1)),
    Case("cat-rows", lambda: lambda x: torch.cat([x, x * 2], -2)),
    Case("concat-vectors", lambda: lambda x: torch.concat((x, x), -1), (2, 5)),
    Case("stack", lambda: lambda x: torch.stack([x, x * 2, torch.zeros_like(x)], 1)),
    Case("stack-last", lambda: lambda x: torch.stack([x, x * 2], -1)),
    Case("hstack", lambda: lambda x: torch.hstack([x, x * 2])),
    Case("split", lambda: lambda x: torch.cat(x.split(3, 1)[::-1], 1)),
    Case("split-some", lambda: lambda x: x.split([1, 2, 1], 1)[1]),
    Case("split-rows", lambda: lambda x: x.split(4, -1)[1]),
    Case("chunk", lambda: lambda x: x.chunk(2, 1)[1] - x.chunk(2, 1)[0]),
    Case("chunk-uneven", lambda: lambda x: x.chunk(3, 2)[2]),
    Case("tensor_split", lambda: lambda x: torch.tensor_split(x, 3, 2)[1]),
    Case("unbind", lambda: lambda x: x.unbind(1)[2] + x.unbind(1)[0]),
    Case("unbind-last", lambda: lambda x: x.unbind(-1)[1]),
    Case("slice", lambda: lambda x: x[:, 1:3]),
    Case("slice-step", lambda: lambda x: x[:, ::2, 1::3, ::2]),
    Case("slice-negative", lambda: lambda x: x[:, -3:-1, :-1, -2:]),
    Case("slice-past-end", lambda: lambda x: x[:, 2:99]),
    Case("slice-images", lambda: lambda x: x[:]),
    Case("narrow", lambda: lambda x: x.narrow(2, 1, 3)),
    Case("focus", lambda: lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2]], 1), (2, 4, 6, 6)),
    Case("select", lambda: lambda x: x[:, 2]),
    Case("select-negative", lambda: lambda x: x.select(-1, -2)),
    Case("ellipsis", lambda: lambda x: x[..., 1, None]),
    Case("expand", lambda: lambda x: x[:, :1].expand(-1, 3, -1, -1)),
    Case("expand-map", lambda: lambda x: x.expand(-1, 4, 3, 5), (2, 4, 1, 1)),
    Case("repeat", lambda: lambda x: x.repeat(1, 2, 1, 3)),
    Case("permute", lambda: lambda x: x.permute(0, 2, 3, 1)),
    Case("permute-negative", lambda: lambda x: x.permute(0, -1, 1, 2)),
    Case("transpose", lambda: lambda x: x.transpose(1, -1)),
    Case("movedim", lambda: lambda x: x.movedim(1, 3)),
    Case("mT", lambda: lambda x: x.mT),
    Case("view", lambda: lambda x: x.view(-1, 2, 2, 30)),
    Case("flatten", nn.Flatten),
    Case("flatten-map", lambda: lambda x: x.flatten(2)),
    Case("unflatten", lambda: nn.Unflatten(1, (2, 2))),
    Case("reshape-copies", lambda: lambda x: x.transpose(1, 2).reshape(-1, 8, 15)),
    Case("squeeze", lambda: lambda x: x.mean(1, keepdim=True).squeeze(1)),
    Case("squeeze-all", lambda: lambda x: x.squeeze(), (2, 4, 1, 1)),
    Case("squeeze-some", lambda: lambda x: x.squeeze((2, 3)), (2, 4, 1, 1)),
    Case("unsqueeze", lambda: lambda x: x.unsqueeze(2)),
    Case("unsqueeze-in-place", lambda: lambda x: (x * 2).unsqueeze_(2)),
    Case("flip", lambda: lambda x: x.flip(-1, 1)),
    Case("fliplr", lambda: lambda x: torch.flip(x, [3])),
    Case("rot90", lambda: lambda x: torch.rot90(x, 1, (2, 3))),
    Case("roll", lambda: lambda x: x.roll((1, -2), (2, 3))),
    Case("roll-one", lambda: lambda x: torch.roll(x, 1, 1)),
    Case("pixel_shuffle", lambda: nn.PixelShuffle(2)),
    Case("pixel_unshuffle", lambda: nn.PixelUnshuffle(2), (2, 2, 6, 4)),
    Case("channel_shuffle", lambda: nn.ChannelShuffle(2)),
    Case("channel_shuffle-3", lambda: nn.ChannelShuffle(3), (2, 6, 3, 2)),
    Case("channel_shuffle-views", lambda: _shuffled),
    Case("index_select", lambda: lambda x: x.index_select(1, torch.tensor([2, 0, 2]))),
    Case("index_select-rows", lambda: lambda x: x.index_select(-2, torch.tensor([5, 5, 1]))),
    Case("index-list", lambda: lambda x: x[:, [2, 0, 2]]),
    Case("gather", lambda: lambda x: x.gather(1, torch.zeros(len(x), 2, 6, 5, dtype=torch.int64))),
    Case("pad", lambda: nn.ZeroPad2d((1, 2, 0, 3))),
    Case("pad-constant", lambda: nn.ConstantPad2d(1, 2.5)),
    Case("pad-negative", lambda: lambda x: F.pad(x, (-1, 1, 2, -2))),
    Case("pad-channels", lambda: lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))),
    Case("pad-channels-crop", lambda: lambda x: F.pad(x, (1, 0, 0, 0, -1, 2))),
    Case("pad-1d", lambda: nn.ConstantPad1d((2, 1), 0.0), WAVE),
    Case("pad-3d", lambda: nn.ConstantPad3d((2, 1, 0, 1, 1, 0), 0.0), VOLUME),
    Case("pad-reflect", lambda: nn.ReflectionPad2d((1, 2, 3, 0))),
    Case("pad-reflect-1d", lambda: nn.ReflectionPad1d((3, 4)), WAVE),
    Case("pad-reflect-3d", lambda: nn.ReflectionPad3d((1, 2, 0, 1, 1, 2)), VOLUME),
    Case("pad-replicate", lambda: nn.ReplicationPad2d((1, 7, 3, 0))),
    Case("pad-replicate-1d", lambda: nn.ReplicationPad1d((3, 4)), WAVE),
    Case("pad-replicate-3d", lambda: nn.ReplicationPad3d((1, 2, 0, 1, 1, 2)), VOLUME),
    Case("pad-circular", lambda: nn.CircularPad2d((1, 2, 3, 0))),
    Case("pad-circular-1d", lambda: nn.CircularPad1d((3, 4)), WAVE),
    Case("pad-circular-functional", lambda: lambda x: F.pad(x, (1, 1, 2, 0), mode="circular")),
    Case("contiguous", lambda: lambda x: x.transpose(2, 3).contiguous()),
    Case("clone", lambda: lambda x: x.clone()),
    Case("channels_last", lambda: lambda x: x.contiguous(memory_format=torch.channels_last)),
    Case("to-float32-and-back", lambda: lambda x: x.float().double(),
         frozen=lambda f, x: lambda y: y * 1, tolerance=1e-6),
    Case("dropout", lambda: nn.Dropout(0.5)),
    Case("dropout2d", lambda: nn.Dropout2d(0.5)),
    Case("alpha_dropout", lambda: nn.AlphaDropout(0.5)),
    Case("dropout-in-place", lambda: nn.Dropout(0.5, inplace=True)),
    Case("dropout-functional", lambda: lambda x: F.dropout(x, 0.5, training=False)),
    Case("detach", lambda: lambda x: x * 2 + x.detach(), frozen=lambda f, x: lambda y: y * 2),
    Case("copy_", lambda: _overwritten),
    Case("copy_-broadcast", lambda: _copied_broadcast),
    Case("fill_", lambda: _filled),
    Case("zero_", lambda: _zeroed),
    Case("unfold", lambda: lambda x: F.unfold(x, 2, padding=1)),
]  # fmt: skip
