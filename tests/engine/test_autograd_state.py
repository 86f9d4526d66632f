"""The autograd walk: grad modes, what is left behind, and what cannot be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_deconv.attr import Deconvnet
from lit_deconv.engine.autograd import record_autograd
from lit_deconv.engine.errors import UnsupportedOp

from .explicit import Body, Net, agree, images, ours, rect, reference

# ---- what the model does with grad mode -----------------------------------------------------------


def _without_gradients(context: Callable[[], Any]) -> Body:
    def body(x: Tensor) -> Tensor:
        with context():
            y = torch.relu(x) * 2
        return y + torch.tanh(x)

    return body


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)]
)
def test_a_frozen_part_of_the_model_is_seen_through(context: Callable[[], Any]) -> None:
    agree(_without_gradients(context), lambda x: 2 * rect(x) + torch.tanh(x))


def test_detach_stops_the_signal() -> None:
    agree(lambda x: torch.relu(x.detach()) + x, lambda x: torch.relu(x).detach() + x)
    agree(lambda x: torch.relu(x.data) + x, lambda x: torch.relu(x).detach() + x)


@pytest.mark.parametrize("alias", [lambda x: x.data, lambda x: x.detach(), lambda x: x.data[:, :2]])
def test_a_write_behind_autograds_back_is_refused(alias: Body) -> None:
    def body(x: Tensor) -> Tensor:
        alias(x).clamp_(min=0)
        return x

    with pytest.raises(UnsupportedOp, match="write to the activation itself"):
        ours(body)


def test_a_detached_copy_may_be_written() -> None:
    def body(x: Tensor) -> Tensor:
        return x + x.detach().clone().clamp_(min=0)

    agree(body, body)


def test_inference_mode_and_its_tensors() -> None:
    net = Net(torch.relu)
    expected = reference(rect)
    with torch.inference_mode():
        x = images() + 0
        assert x.is_inference()
        recording = record_autograd(net, (x,), {"last": net.last})
        given = recording.walk("last", recording.outputs["last"] + 0)[0]
    torch.testing.assert_close(given, expected)


def test_a_constant_that_is_an_inference_tensor() -> None:
    with torch.inference_mode():
        constant = torch.linspace(-1, 1, 8, dtype=torch.float64).view(8, 1, 1) * 1
    agree(lambda x: x * constant, lambda x: x * constant.clone())


# ---- nothing is left behind -----------------------------------------------------------------------


class Counting(nn.Module):
    """Writes to its own buffers and parameters, as running averages and memories do."""

    calls: Tensor
    memory: Tensor
    rebound: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("memory", torch.zeros(2, 4, 4, 4))
        self.register_buffer("rebound", torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.failing = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.rebound = self.rebound + 1
        with torch.no_grad():
            self.scale.mul_(0.5)
        y = self.norm(self.conv(x)) * self.scale
        self.memory[:] = y
        if self.failing:
            raise KeyError("from the model")
        return torch.relu(y) + self.memory


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_on_model_inputs_and_modes(failing: bool, training: bool) -> None:
    model, x = Counting().train(training), images().float().requires_grad_()
    model.failing = failing
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    rebound = model.rebound
    modes = torch.overrides._get_current_function_mode_stack()
    if failing:
        with pytest.raises(KeyError, match="from the model"):
            record_autograd(model, (x,), {"top": model}, model=model)
    else:
        recording = record_autograd(model, (x,), {"top": model}, model=model)
        recording.walk("top", recording.outputs["top"])
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert model.rebound is rebound
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert x.grad is None
    assert x.requires_grad
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert torch.overrides._get_current_function_mode_stack() == modes
    assert torch.is_grad_enabled()
    y = model.conv(x)  # no saved-tensor hook is left either: plain autograd checks versions again
    z = y.sigmoid()
    z.mul_(2)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        z.sum().backward()


# ---- what cannot be seen is refused ------------------------------------------------------------


def relu_and_more(x: Tensor) -> Tensor:
    return torch.relu(x) + 1.0


def clamp_and_more(x: Tensor) -> Tensor:
    return torch.clamp(x, min=0.0) + 1.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "body",
    [
        lambda x: torch.jit.script(relu_and_more)(x),
        lambda x: torch.jit.script(clamp_and_more)(x),
        lambda x: checkpoint(torch.relu, x, use_reentrant=True),
        lambda x: nn.RNN(6, 6, nonlinearity="relu").double()(x.flatten(1, 2))[0].view(2, 8, 6, 6),
    ],
)
def test_a_rectifier_that_runs_unseen_is_refused(body: Body) -> None:
    with pytest.raises(UnsupportedOp):
        ours(body)


def test_an_activation_that_is_written_to_a_weight_is_refused() -> None:
    weight = nn.Parameter(torch.ones(8, 1, 1, dtype=torch.float64))

    def body(x: Tensor) -> Tensor:
        with torch.no_grad():
            weight.copy_(x.mean((0, 2, 3)).view(8, 1, 1))
        return x * weight

    with pytest.raises(UnsupportedOp, match="Net writes in place where autograd cannot"):
        ours(body)


def test_an_out_that_would_have_to_grow_is_refused() -> None:
    with pytest.raises(UnsupportedOp, match="out= of another shape"):
        ours(lambda x: torch.clamp(x, min=0, out=x.new_empty(0)))


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * signal[0]


def exponential(x: Tensor) -> Tensor:
    return x.exp()


def test_what_a_checkpoint_would_recompute_is_refused() -> None:
    """What scripted code saves is left to the checkpoint, which runs the forward again."""

    def half(x: Tensor) -> Tensor:
        return torch.jit.script(exponential)(torch.relu(x)[:, :4])

    def body(x: Tensor) -> Tensor:
        return checkpoint(half, x, use_reentrant=False).repeat(1, 2, 1, 1)

    with pytest.raises(UnsupportedOp, match="switch checkpointing off"):
        ours(body)


@pytest.mark.parametrize("channels", [4, 8])
def test_a_users_own_function_in_a_checkpoint_is_not_run_again(channels: int) -> None:
    def part(x: Tensor, rectify: Body) -> Tensor:
        return Squared.apply(rectify(x)[:, :channels] - 1)

    def body(x: Tensor) -> Tensor:
        y = checkpoint(part, x, torch.relu, use_reentrant=False)
        return y.repeat(1, 8 // channels, 1, 1)

    agree(body, lambda x: part(x, rect).repeat(1, 8 // channels, 1, 1))


def test_checkpoints_are_seen_through() -> None:
    def body(x: Tensor) -> Tensor:
        return checkpoint(lambda y: torch.relu(y).sigmoid(), x, use_reentrant=False)

    agree(body, lambda x: rect(x).sigmoid())


@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.no_grad, torch.inference_mode, torch.inference_mode()]
)
def test_a_users_own_function_states_its_derivative(context: Any) -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, *signal: Tensor) -> Tensor:
            return 3 * signal[0]

    def body(x: Tensor) -> Tensor:
        with context() if isinstance(context, type) else context:
            y: Tensor = Straight.apply(x)
        return y + x

    agree(body, lambda x: 4 * x + (x.round() - 3 * x).detach())


def test_inference_mode_is_the_users_again_afterwards() -> None:
    block, before = torch.inference_mode(), torch.inference_mode.__enter__
    agree(_without_gradients(lambda: block), lambda x: 2 * rect(x) + torch.tanh(x))
    assert torch.inference_mode.__enter__ is before
    with block:
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()


def test_units_of_a_model_that_mixes_its_images_are_walked_one_at_a_time() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y - 3 * y.mean(0, keepdim=True))

    torch.manual_seed(0)
    net = Deconvnet(Mixing().double(), "last")
    images = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    units = torch.tensor([[0, 0, 1, 1], [1, 1, 2, 0]])
    together = net.reconstruct(images, units)
    alone = torch.cat([net.reconstruct(images, unit[None]) for unit in units])
    torch.testing.assert_close(together, alone)


def _next_image(y: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(y[:1]), y[:-1]])


@pytest.mark.parametrize(
    "mixing",
    [
        lambda y: F.relu(y) + _next_image(y),  # the first image's units see no other image
        lambda y: F.relu(y) + _next_image(_next_image(y)),
        lambda y: (
            y - F.relu(y.mean(0, keepdim=True))
        ),  # what a seed of ones sends is rectified away
        lambda y: y + torch.cat([y[:2], F.relu(y[3:]), F.relu(y[2:3])]),
    ],
    ids=["next", "next but one", "rectified", "last two swapped"],
)
def test_units_of_images_that_see_one_another_in_any_way_are_apart(mixing: Body) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(mixing(self.first(x)))

    torch.manual_seed(0)
    net = Deconvnet(Mixing().double(), "last")
    images = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    units = torch.tensor([[i, c, 1 + c, i] for c in (0, 1) for i in range(4)])
    together = net.reconstruct(images, units)
    alone = torch.cat([net.reconstruct(images, unit[None]) for unit in units])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("moved", "refused"),
    [
        (lambda y: y.flip(0), [0, 2]),
        (lambda y: y.roll(1, 0), [0, 1, 2]),
        (lambda y: y[1:2], [0]),
        (lambda y: y.repeat(2, 1, 1, 1), [3, 4, 5]),
        (lambda y: y.repeat_interleave(2, 0), [1, 2, 3, 4, 5]),
    ],
    ids=["flipped", "rolled", "one of them", "repeated", "interleaved"],
)
def test_a_unit_of_a_sample_that_is_another_image_is_refused(
    moved: Body, refused: list[int]
) -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(moved(self.first(x)))

    torch.manual_seed(0)
    net = Deconvnet(Moving(), "last")
    images = torch.randn(3, 3, 5, 5)
    for sample in range(len(net.activations(images))):
        unit = torch.tensor([[sample, 1, 1, 1]])
        if sample in refused:
            with pytest.raises(UnsupportedOp, match=f"sample {sample}"):
                net.reconstruct(images, unit)
        else:
            assert net.reconstruct(images, unit).any()


class Hooked(nn.Module):
    """With every kind of backward hook, each of which would change the signal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.requires_grad:
            y.register_hook(self._reversed)
        return self.last(F.relu(y))

    def _reversed(self, gradient: Tensor) -> Tensor:
        self.seen.append(gradient)
        return -gradient


def _negative(signals: Any) -> Any:
    return tuple(-signal for signal in signals)


def test_backward_hooks_of_the_users_see_no_signal() -> None:
    torch.manual_seed(0)
    model, images = Hooked(), torch.randn(2, 3, 5, 5)
    plain = Deconvnet(model, "last", path="rules").attribute(images)
    model.first.register_full_backward_hook(lambda module, given, got: _negative(given))
    model.last.register_full_backward_pre_hook(lambda module, got: _negative(got))
    hooks = model.first._backward_hooks, model.last._backward_pre_hooks
    for path in ("rules", "autograd"):
        found = Deconvnet(model, "last", path=path).attribute(images)
        torch.testing.assert_close(found, plain)
    assert not model.seen
    assert model.first._backward_hooks is hooks[0]
    assert model.last._backward_pre_hooks is hooks[1]
