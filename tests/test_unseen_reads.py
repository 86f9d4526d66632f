"""What the model does behind the tape's back must not become a picture of something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv import Deconvnet, NeuronDeconvolution
from lit_deconv.engine.errors import UnsupportedOp


class Branching(nn.Module):
    """Takes one of two ways, by a value that Python reads."""

    def __init__(self, read: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.read = read
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(F.relu(y) if self.read(y) > 0 else -2 * y)


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y.mean((1, 2, 3)).tolist()[0],
        lambda y: float(y.detach().cpu().numpy().mean()),
        lambda y: y[y > 1e9].numel() - 0.5,
        lambda y: y.masked_select(y > y.mean() + 1e9).numel() - 0.5,
    ],
    ids=["tolist", "numpy", "boolean index", "masked_select"],
)
def test_values_that_python_reads_send_the_model_to_autograd(
    read: Callable[[Tensor], float],
) -> None:
    torch.manual_seed(0)
    model = Branching(read)
    net = Deconvnet(model, "last")
    units = torch.tensor([[0, 1, 2, 2]])
    for images in (torch.rand(1, 3, 8, 8) + 1, -torch.rand(1, 3, 8, 8) - 1):
        found = net.reconstruct(images, units)
        wanted = Deconvnet(model, "last", path="autograd").reconstruct(images, units)
        torch.testing.assert_close(found, wanted)
        assert net.explain(images).path == "autograd"


@pytest.mark.parametrize("path", ["rules", "autograd"])
def test_a_hook_that_replaces_the_layers_output_is_part_of_the_layer(path: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    images = torch.randn(2, 3, 8, 8)
    plain = Deconvnet(model, "1", path=path).attribute(images)  # type: ignore[arg-type]
    before = len(model[1]._forward_hooks)
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    net = Deconvnet(model, "1", path=path)  # type: ignore[arg-type]
    torch.testing.assert_close(net.activations(images), model(images))
    # Twice the activation, sent back through a factor of two.
    torch.testing.assert_close(net.attribute(images), 4 * plain)
    assert len(model[1]._forward_hooks) == before + 1


def test_memory_exchanged_behind_a_tensor_is_no_silent_picture() -> None:
    class Exchanging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = y * 1
            z.data = F.relu(y)
            return self.last(z)

    net = Deconvnet(Exchanging(), "last", path="rules")
    with pytest.raises(UnsupportedOp, match="exchanges its memory"):
        net.attribute(torch.randn(1, 3, 8, 8))


class Leaving(nn.Module):
    """Adds to an activation what came of it outside PyTorch."""

    def __init__(self, unseen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.unseen = unseen

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y + self.unseen(y))


def _applied(y: Tensor) -> Tensor:
    z = (y * 1).cpu()
    z.apply_(lambda value: max(value, 0.0))
    return z.to(y)


def _mapped(y: Tensor) -> Tensor:
    z = (y * 1).cpu()
    z.map_(z * 1, lambda value, other: max(value, 0.0))
    return z.to(y)


@pytest.mark.parametrize("path", ["auto", "rules", "autograd", "drop-in"])
@pytest.mark.parametrize(
    "unseen",
    [
        _applied,
        _mapped,
        lambda y: F.relu(torch.from_dlpack(y)),
        lambda y: F.relu(torch.from_numpy(y.cpu().numpy()).to(y)),
        lambda y: F.relu(copy.deepcopy(y)),
    ],
    ids=["apply_", "map_", "from_dlpack", "numpy", "deepcopy"],
)
def test_what_leaves_pytorch_and_comes_back_is_refused(
    unseen: Callable[[Tensor], Tensor], path: Any
) -> None:
    model, images = Leaving(unseen), torch.randn(2, 3, 8, 8)
    net: Any = NeuronDeconvolution(model, model.last)
    if path != "drop-in":
        net = Deconvnet(model, "last", path=path)
    with pytest.raises(UnsupportedOp):
        net.attribute(images, (0, 1, 1))
