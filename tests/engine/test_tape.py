"""What the tape cannot follow is seen and goes to the autograd walk, or to an error that says so.

Each model is written as users write it, and beside it the function that the deconvnet is of it, with
rectifiers as explicit autograd Functions; that reference imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lit_deconv import Deconvnet
from lit_deconv.engine import DeconvError, LayerError, UnsupportedOp
from lit_deconv.engine.calls import is_zero

from .definition import assert_close, quietly


class _Rectify(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> Tensor:
        return signal[0].clamp(min=0)


def rectify(x: Tensor) -> Tensor:
    return _Rectify.apply(x)


class Tripled(Function):
    """A user's own Function: its backward is not what its ops would give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> Tensor:
        return signal[0] * 3


class Body(nn.Module):
    """conv, what the case does, conv: the case is met on the way back by any signal."""

    def __init__(self, middle: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(channels, 2, 3)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


# ---- cases: as written, and the reference --------------------------------------------------


def _view_in_place(y: Tensor) -> Tensor:
    y[:, :2].relu_()
    return y


def _view_of_view(y: Tensor) -> Tensor:
    y.view(-1, 2, 2, *y.shape[2:])[:, 0].mul_(-2)
    return y


def _item_assigned(y: Tensor) -> Tensor:
    y[:, 1] = y[:, 0] * 2
    return y


def _item_assigned_reference(y: Tensor) -> Tensor:
    return torch.cat([y[:, :1], y[:, :1] * 2, y[:, 2:]], 1)


def _augmented(y: Tensor) -> Tensor:
    y[:, :, 1:] += y[:, :, :-1].clone()
    return y


def _base_in_place(y: Tensor) -> Tensor:
    """The view was taken before its base was overwritten, and sees what was written."""
    part = y[:, :2]
    y.relu_()
    return torch.cat([part, part], 1)


def _into_buffer(y: Tensor) -> Tensor:
    made = torch.zeros_like(y)
    made[:, 1:3] = y[:, :2]
    return F.relu(made)


def _into_buffer_reference(y: Tensor) -> Tensor:
    return rectify(torch.cat([y[:, :1] * 0, y[:, :2], y[:, :1] * 0], 1))


def _buffer_handed_on(y: Tensor) -> Tensor:
    made = torch.zeros_like(y)
    made[:, 1:3] = y[:, :2]
    return made


def _buffer_reference(y: Tensor) -> Tensor:
    return torch.cat([y[:, :1] * 0, y[:, :2], y[:, :1] * 0], 1)


def _branching(y: Tensor) -> Tensor:
    return F.relu(y) if y.mean().item() > -1e9 else y


def _truth(y: Tensor) -> Tensor:
    return F.relu(y) if (y > -1e9).all() else y


def _scaled_by_item(y: Tensor) -> Tensor:
    return F.relu(y) / float(y.abs().max())


def _scaled_reference(y: Tensor) -> Tensor:
    return rectify(y) / y.detach().abs().max()


def _own_function(y: Tensor) -> Tensor:
    return F.relu(Tripled.apply(y))


def _folded(y: Tensor) -> Tensor:
    """The images side by side in the channels, as grouped convolutions over a batch do."""
    n, c, h, w = y.shape
    return F.relu(y.reshape(1, n * c, h, w)).reshape(n, c, h, w)


def _swapped_images(y: Tensor) -> Tensor:
    return F.relu(y.transpose(0, 1)).transpose(0, 1)


def _joined_images(y: Tensor) -> Tensor:
    twice = F.relu(torch.cat([y, 2 * y]))
    return twice[: len(y)] + twice[len(y) :]


def _of_the_spectrum(y: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.fft2(F.relu(y)))[..., 0]


def _times_a_vector(y: Tensor) -> Tensor:
    return y + (y @ torch.linspace(-1, 1, 6, dtype=y.dtype))[..., None]


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "in-place-on-view": (
        _view_in_place,
        lambda y: torch.cat([rectify(y[:, :2]), y[:, 2:]], 1),
    ),
    "in-place-on-view-of-view": (
        _view_of_view,
        lambda y: torch.cat([y[:, :2] * -2, y[:, 2:]], 1),
    ),
    "setitem": (_item_assigned, _item_assigned_reference),
    "augmented-slice": (
        _augmented,
        lambda y: torch.cat([y[:, :, :1], y[:, :, 1:] + y[:, :, :-1]], 2),
    ),
    "view-of-overwritten": (
        _base_in_place,
        lambda y: rectify(y)[:, [0, 1, 0, 1]],
    ),
    "written-into-buffer": (_into_buffer, _into_buffer_reference),
    "buffer-handed-on": (_buffer_handed_on, _buffer_reference),
    "item": (_branching, rectify),
    "truth": (_truth, rectify),
    "scaled-by-item": (_scaled_by_item, _scaled_reference),
    "own-function": (_own_function, lambda y: rectify(Tripled.apply(y))),
    "images-folded-into-channels": (_folded, rectify),
    "images-and-channels-swapped": (_swapped_images, rectify),
    "complex": (_of_the_spectrum, lambda y: torch.fft.fft2(rectify(y)).real),
    "complex-magnitude": (lambda y: torch.complex(y, 2 * y).abs(), lambda y: 5**0.5 * y.abs()),
    "complex-product": (lambda y: (y * (1 + 2j)).abs(), lambda y: 5**0.5 * y.abs()),
    "rule-refuses-on-the-way-back": (_times_a_vector, _times_a_vector),
    "images-joined": (_joined_images, lambda y: rectify(y) + rectify(2 * y)),
}


def built(middle: Callable[[Tensor], Tensor]) -> tuple[Body, Tensor]:
    torch.manual_seed(4)
    return Body(middle).double().eval(), torch.randn(2, 3, 7, 6, dtype=torch.float64)


def referenced(middle: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The activation of the last layer and its reconstruction, by explicit rectifiers."""
    model, _ = built(middle)
    leaf = x.clone().requires_grad_()
    activation = model(leaf * 1)
    (image,) = torch.autograd.grad(activation, leaf, activation.detach())
    return activation.detach(), image


@pytest.mark.parametrize("name", CASES)
def test_goes_to_autograd_and_is_right(name: str) -> None:
    written, reference = CASES[name]
    model, x = built(written)
    activation, expected = referenced(reference, x)
    net = Deconvnet(model, "last")
    found = net.explain(x)
    assert found.path == "autograd"
    assert found.reasons
    assert_close(net.activations(x), activation)
    assert_close(net.attribute(x), expected)
    with pytest.raises(UnsupportedOp):
        Deconvnet(model, "last", path="rules").attribute(x)


@pytest.mark.parametrize("name", CASES)
def test_units_are_right_too(name: str) -> None:
    """Two units of two images in one call: neither meets the other."""
    written, reference = CASES[name]
    model, x = built(written)
    units = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 3], [0, 0, 4, 3]])
    reference_model, _ = built(reference)
    leaf = x.clone().requires_grad_()
    activation = reference_model(leaf * 1)
    expected = []
    for unit in units.tolist():
        value = activation[tuple(unit)]
        (image,) = torch.autograd.grad(value, leaf, value.detach(), retain_graph=True)
        expected.append(image[unit[0]])
    assert_close(Deconvnet(model, "last").reconstruct(x, units), torch.stack(expected))


@pytest.mark.parametrize("name", ["written-into-buffer", "buffer-handed-on", "in-place-on-view"])
def test_the_layer_itself_is_such_memory(name: str) -> None:
    written, reference = CASES[name]

    class Middle(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return written(y)

    model, x = built(Middle())
    leaf = x.clone().requires_grad_()
    activation = reference(model.first(leaf))
    (expected,) = torch.autograd.grad(activation, leaf, activation.detach())
    net = Deconvnet(model, "middle")
    assert net.explain(x).path == "autograd"
    assert_close(net.attribute(x), expected)


def test_what_only_a_view_of_the_layer_overwrites_later_does_not_matter() -> None:
    """The layer's output is what the layer returned: what is done to it later is not on the way."""

    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, :2].zero_()
            return y.relu_()

    torch.manual_seed(0)
    model, x = Overwritten().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        y = model.conv(x)
        expected = F.conv_transpose2d(y, model.conv.weight)
    for path in ("auto", "rules", "autograd"):
        assert_close(Deconvnet(model, "conv", path=path).attribute(x), expected)


@pytest.mark.parametrize("form", ["data", "detach"])
def test_aliases_made_behind_autograd(form: str) -> None:
    """y.data.relu_() rectifies y where autograd does not look: right, or an error, never wrong."""

    def aliased(y: Tensor) -> Tensor:
        (y.data if form == "data" else y.detach()).relu_()
        return y

    model, x = built(aliased)
    _, expected = referenced(rectify, x)
    try:
        given = quietly(lambda: Deconvnet(model, "last").attribute(x))
    except DeconvError:
        return
    assert_close(given, expected)


def test_reading_through_data_stops_or_refuses() -> None:
    """y.data is y without a gradient: the signal stops there, as with detach, or is refused."""
    model, x = built(lambda y: y * 2 + y.data)
    _, expected = referenced(lambda y: y * 2 + y.detach(), x)
    for path in ("auto", "autograd"):
        try:
            assert_close(Deconvnet(model, "last", path=path).attribute(x), expected)
        except DeconvError:
            continue


# ---- layers that have no one place on the tape ---------------------------------------------


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.unused, self.aside = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.by_function = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(torch.ones_like(x))
        x = F.conv2d(x, self.by_function.weight)
        return self.relu(self.conv(self.relu(self.conv(x))))


@pytest.fixture
def reused() -> tuple[Reused, Tensor]:
    torch.manual_seed(6)
    return Reused().double(), torch.randn(2, 3, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize("path", ["auto", "rules", "autograd"])
def test_a_layer_called_more_than_once(reused: tuple[Reused, Tensor], path: Any) -> None:
    model, x = reused
    with pytest.raises(LayerError, match=r"'conv' runs 2 times.*call=0"):
        Deconvnet(model, "conv", path=path).attribute(x)
    leaf = x.clone().requires_grad_()
    first = model.conv(F.conv2d(leaf, model.by_function.weight))
    second = model.conv(rectify(first))
    for call, activation in ((0, first), (1, second), (-1, second)):
        (expected,) = torch.autograd.grad(activation, leaf, activation.detach(), retain_graph=True)
        net = Deconvnet(model, "conv", path=path, call=call)
        assert_close(net.activations(x), activation.detach())
        assert_close(net.attribute(x), expected)
    with pytest.raises(LayerError, match="call=2"):
        Deconvnet(model, "conv", path=path, call=2).attribute(x)


@pytest.mark.parametrize("path", ["auto", "rules", "autograd"])
@pytest.mark.parametrize("cut", [Tensor.detach, lambda y: y.long().double()])
def test_a_layer_behind_what_passes_nothing_back(
    cut: Callable[[Tensor], Tensor], path: Any
) -> None:
    model, x = built(cut)
    with pytest.raises(LayerError, match=r"'last'.*does not depend"):
        Deconvnet(model, "last", path=path).attribute(x)


@pytest.mark.parametrize("path", ["auto", "rules", "autograd"])
@pytest.mark.parametrize(
    ("layer", "says"),
    [("unused", "did not run"), ("by_function", "did not run"), ("aside", "does not depend")],
)
def test_a_layer_that_is_not_on_the_way(
    reused: tuple[Reused, Tensor], layer: str, says: str, path: Any
) -> None:
    model, x = reused
    with pytest.raises(LayerError, match=f"'{layer}'.*{says}"):
        Deconvnet(model, layer, path=path).attribute(x)


@pytest.mark.parametrize("form", ["script", "trace", "inside"])
def test_scripted_and_traced_models_are_refused(form: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    if form == "trace":
        model = quietly(lambda: torch.jit.trace(plain, torch.randn(1, 3, 5, 5)))
    else:
        model = quietly(lambda: torch.jit.script(plain))
    if form == "inside":
        model = nn.Sequential(model)
    with pytest.raises(LayerError, match="scripted or traced"):
        Deconvnet(model, "0")


# ---- what has no way back at all ------------------------------------------------------------


def test_an_op_without_a_rule_is_named_with_its_module_and_the_way_out() -> None:
    model, x = built(lambda y: torch.cummax(y, 1)[0])
    with pytest.raises(UnsupportedOp, match=r"cummax.*the model's own forward.*path='autograd'"):
        Deconvnet(model, "last", path="rules").attribute(x)
    found = Deconvnet(model, "last").explain(x)
    assert found.path == "autograd"
    assert any("cummax" in reason for reason in found.reasons)
    assert "cummax" in [row.op for row in found.rows]


def test_constants_that_are_overwritten_after_they_were_used() -> None:
    """A mask that is used, changed in place, and used again."""

    def masked(y: Tensor) -> Tensor:
        mask = torch.full((4, 1, 1), 2.0, dtype=y.dtype)
        y = F.relu(y * mask)
        mask.fill_(-3.0)
        return y * mask

    model, x = built(masked)
    _, expected = referenced(lambda y: rectify(y * 2) * -3, x)
    for path in ("rules", "autograd"):
        assert_close(Deconvnet(model, "last", path=path).attribute(x), expected)


def test_an_op_without_a_rule_off_the_way_is_no_hindrance() -> None:
    def aside(y: Tensor) -> Tensor:
        torch.cummax(y, 1)
        return F.relu(y)

    model, x = built(aside)
    _, expected = referenced(rectify, x)
    net = Deconvnet(model, "last")
    assert net.explain(x).path == "rules"
    assert_close(net.attribute(x), expected)


def test_an_op_that_hands_its_argument_on_is_not_on_the_way() -> None:
    """A dropout of nothing draws no mask, though it is told to train: it returns what it was given."""
    model, x = built(lambda y: F.relu(F.dropout(y, 0.0, training=True)))
    _, expected = referenced(rectify, x)
    assert_close(Deconvnet(model, "last", path="rules").attribute(x), expected)


def test_an_input_of_one_sample_for_all_images() -> None:
    """Broadcast over the images, it gets the sum of their signals, which rules keep apart."""

    class Template(Body):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def forward(self, x: Tensor, template: Tensor) -> Tensor:  # type: ignore[override]
            return self.last(F.relu(self.first(x) + self.first(template)))

    torch.manual_seed(4)
    model = Template().double()
    x, template = torch.randn(3, 3, 7, 6).double(), torch.randn(1, 3, 7, 6).double()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, template)]
    activation = model.last(rectify(model.first(leaves[0]) + model.first(leaves[1])))
    expected = torch.autograd.grad(activation, leaves, activation.detach())
    net = Deconvnet(model, "last")
    assert net.explain((x, template)).path == "autograd"
    for given, image in zip(net.attribute((x, template)), expected, strict=True):
        assert_close(given, image)


def test_a_product_of_two_activations_is_refused_by_rules() -> None:
    model, x = built(lambda y: y @ y.transpose(2, 3).softmax(-1) @ y)
    with pytest.raises(UnsupportedOp, match="multiplies two activations"):
        Deconvnet(model, "last", path="rules").attribute(x)
    assert Deconvnet(model, "last").explain(x).path == "autograd"


def test_dropout_that_draws_in_eval_mode_is_refused_by_rules() -> None:
    model, x = built(lambda y: F.dropout(y, 0.5, training=True))
    with pytest.raises(UnsupportedOp, match="draws a random mask even in eval mode"):
        Deconvnet(model, "last", path="rules").attribute(x)


@pytest.mark.parametrize("path", ["rules", "autograd"])
def test_a_mask_that_is_overwritten_after_it_was_used(path: Any) -> None:
    def body(y: Tensor) -> Tensor:
        mask = (y.detach() > 0.1).to(y)
        z = y * mask
        mask.zero_()
        return z + y

    def explicitly(y: Tensor) -> Tensor:
        return y * (y.detach() > 0.1).to(y) + y

    model, x = built(body)
    _, expected = referenced(explicitly, x)
    assert_close(Deconvnet(model, "last", path=path).attribute(x), expected)


def test_a_tensor_of_nothing_is_no_zero() -> None:
    assert is_zero(torch.zeros(2))
    assert not is_zero(torch.tensor([0.0, 1.0]))
    assert not is_zero(torch.empty(0))
