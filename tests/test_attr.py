"""Deconvnet: selectors, arguments, results, and errors."""

# Modules and options are chosen by name here, which types cannot follow.
# mypy: disable-error-code="arg-type, assignment, operator"

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.engine import DeconvError, InputError, LayerError, SelectorError, UnsupportedOp
from lit_deconv.layers import UnknownLayerError


class Net(nn.Module):
    """Two convolutions, so that a linear pass and a rectified one are both at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.pool(self.relu1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, 10, 8, dtype=torch.float64)


def close(given: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    assert given.shape == expected.shape
    return bool((given - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-30))


# ---- selectors ----------------------------------------------------------------------------


def adjoint(net: Net, seed: Tensor) -> Tensor:
    return F.conv_transpose2d(seed, net.conv1.weight.detach(), padding=1)


def named(value: Any) -> str:
    """A test's name, the same in each process: a function's own would hold its address."""
    return getattr(value, "__name__", None) or str(value)


@pytest.mark.parametrize("path", ["rules", "autograd"])
@pytest.mark.parametrize(
    "selector",
    [
        None, 2, -1, (2,), (2, 5), (2, 5, 7), (-1, -10, -8), (slice(None),), slice(1, 3),
        (slice(0, 4, 2), 3), (slice(None), slice(2, 5), slice(-3, None)), (2, slice(3, 4)), (),
        (slice(4, 9),),
    ],
    ids=named,
)  # fmt: skip
def test_selected_units_keep_their_activation(
    net: Net, x: Tensor, selector: Any, path: Any
) -> None:
    deconvnet = Deconvnet(net, "conv1", path=path)
    y = deconvnet.activations(x)
    seed = torch.zeros_like(y)
    index = selector if isinstance(selector, tuple) else (selector,)
    kept = ... if selector is None else (slice(None), *index)
    seed[kept] = y[kept]
    given = deconvnet.attribute(x, selector)
    assert given.dtype == x.dtype
    assert close(given, adjoint(net, seed))


def test_a_module_and_its_name_are_the_same_layer(net: Net, x: Tensor) -> None:
    by_name = Deconvnet(net, "conv2").attribute(x)
    assert torch.equal(Deconvnet(net, net.conv2).attribute(x), by_name)


@pytest.mark.parametrize("path", ["rules", "autograd"])
def test_a_callable_seeds_its_value_times_its_gradient(net: Net, x: Tensor, path: Any) -> None:
    deconvnet = Deconvnet(net, "conv1", path=path)
    y = deconvnet.activations(x)
    given = deconvnet.attribute(x, lambda o: o[:, 1].flatten(1).amax(1))
    seed = torch.zeros_like(y)
    for image, values in enumerate(y[:, 1].flatten(1)):
        seed[image, 1].view(-1)[values.argmax()] = values.max()
    assert close(given, adjoint(net, seed))
    half = deconvnet.attribute(x, lambda o: 0.5 * (o[:, 2] ** 2).flatten(1).sum(1))
    value = 0.5 * (y[:, 2] ** 2).flatten(1).sum(1)
    seed = torch.zeros_like(y)
    seed[:, 2] = y[:, 2] * value[:, None, None]
    assert close(half, adjoint(net, seed))
    for constant in (lambda o: torch.ones(3), lambda o: o.detach().flatten(1).sum(1)):
        with pytest.raises(SelectorError, match="does not depend on the output of layer 'conv1'"):
            deconvnet.attribute(x, constant)


def test_negative_activations_keep_their_sign(net: Net, x: Tensor) -> None:
    """As documented: the seed is the raw activation, whatever its sign."""
    deconvnet = Deconvnet(net, "conv1")
    y = deconvnet.activations(x)
    unit = torch.tensor([[0, *torch.unravel_index(y[0].argmin(), y[0].shape)]])
    value = y[tuple(unit[0])]
    assert value < 0
    seed = torch.zeros_like(y[:1])
    place = (0, *unit[0, 1:].tolist())
    seed[place] = value
    assert close(deconvnet.reconstruct(x, unit), adjoint(net, seed))
    # Behind a rectifier R(-v) is not -R(v).
    deep = Deconvnet(net, "conv2")
    up = deep.attribute(x, lambda o: _constant_seed(o, 1.0))
    down = deep.attribute(x, lambda o: _constant_seed(o, -1.0))
    assert not close(down, -up, 1e-3)


def _constant_seed(output: Tensor, value: float) -> Tensor:
    return 1 + ((output - output.detach()) * value).flatten(1).sum(1)


# ---- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        (4, r"\[4, 10, 8\]"), (-5, "outside layer 'conv1'"), ((0, 10), "outside"),
        ((0, 0, -9), "outside"), ((0, 0, 0, 0), "4 entries.*3 dimensions"), ("a", "a str"),
        ((0, 1.5), "a float"), (True, "a bool"), (lambda o: o.sum(), "expected one scalar"),
        (lambda o: o[:, 0], r"returned \[3, 10, 8\]"), (lambda o: 3.0, "returned float"),
    ],
    ids=named,
)  # fmt: skip
def test_selectors_that_do_not_fit(net: Net, x: Tensor, selector: Any, says: str) -> None:
    with pytest.raises(SelectorError, match=says):
        Deconvnet(net, "conv1").attribute(x, selector)


@pytest.mark.parametrize("via", ["auto", "images", "patches"])
@pytest.mark.parametrize(
    ("units", "says"),
    [
        (torch.tensor([[0, 0, 0, 0], [3, 0, 0, 0]]), r"\[3, 0, 0, 0\] lies outside layer 'conv1'"),
        (torch.tensor([[0, 4, 0, 0]]), "outside"), (torch.tensor([[0, 0, 10, 0]]), "outside"),
        (torch.tensor([[0, 0, 0, -1]]), "outside"), (torch.tensor([[0, 0, 0]]), r"\[U, 4\]"),
        (torch.tensor([0, 0, 0, 0]), r"\[U, 4\]"), ([[0, 0, 0, 0]], "list"),
        (torch.tensor([[0.0, 0, 0, 0]]), "whole numbers"),
    ],
    ids=named,
)  # fmt: skip
def test_units_that_do_not_fit(net: Net, x: Tensor, units: Any, says: str, via: str) -> None:
    with pytest.raises(SelectorError, match=says) as raised:
        Deconvnet(net, "conv1").reconstruct(x, units, via=via)
    assert isinstance(raised.value, IndexError)


@pytest.mark.parametrize(
    ("channels", "says"),
    [([4], "among the 4"), ([-5], "among the 4"), ([1.5], "float"), ([True], "bool")],
)
def test_maps_that_a_layer_does_not_have(net: Net, x: Tensor, channels: Any, says: str) -> None:
    with pytest.raises(SelectorError, match=says):
        Deconvnet(net, "conv1").maps(x, channels)


def test_units_may_be_int32(net: Net, x: Tensor) -> None:
    units = torch.tensor([[2, 1, 3, 4]])
    deconvnet = Deconvnet(net, "conv1")
    given = deconvnet.reconstruct(x, units.to(torch.int32))
    assert torch.equal(given, deconvnet.reconstruct(x, units))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"torch.uint8.*images.float\(\) / 255"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "expected floating point"),
        (torch.zeros(1, 3, 8, 8).to_sparse(), "sparse"), (torch.zeros(1, 3, 8, 8, device="meta"), "meta"),
        (torch.zeros(0, 3, 8, 8), "at least one image"), (torch.zeros(3), r"\[N, C, H, W\]"),
        (torch.zeros(()), r"\[N, C, H, W\]"), ((), "empty tuple"), (None, "NoneType"),
        ([torch.zeros(1, 3, 8, 8)], "list"), ((torch.zeros(1, 3, 8, 8), "a"), "str"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_inputs_that_no_picture_can_be_made_of(net: Net, inputs: Any, says: str) -> None:
    deconvnet = Deconvnet(net.float(), "conv1")
    for call in (
        deconvnet.attribute, deconvnet.activations, deconvnet.explain,
        lambda images: deconvnet.reconstruct(images, torch.zeros(1, 4, dtype=torch.int64)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            call(inputs)


def test_the_models_own_exception_passes_unchanged(
    net: Net, x: Tensor, untouched: Callable[..., Any]
) -> None:
    wrong = x[..., :1, :1]  # smaller than the first kernel
    with pytest.raises(RuntimeError) as own:
        net(wrong)
    for path in ("auto", "rules", "autograd"):
        with untouched(net, wrong), pytest.raises(RuntimeError) as raised:
            Deconvnet(net, "conv2", path=path).attribute(wrong)
        assert str(raised.value) == str(own.value)
        assert type(raised.value) is type(own.value)


@pytest.mark.parametrize("path", ["auto", "autograd"])
def test_state_is_put_back_when_the_model_fails_half_way(
    untouched: Callable[..., Any], path: Any
) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 2, 3), nn.ReLU()
            self.register_buffer("count", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.count += 1
            torch.rand(3)
            raise KeyError("own")

    model = Failing().train()
    model.conv.eval()
    image = torch.randn(1, 3, 6, 6)
    with untouched(model, image), pytest.raises(KeyError, match="own"):
        Deconvnet(model, "relu", path=path).attribute(image)


def test_a_head_that_does_not_fit_is_no_hindrance(net: Net, x: Tensor) -> None:
    net.fc = nn.Linear(999, 2)
    for path in ("auto", "autograd"):
        assert Deconvnet(net, "conv2", path=path).attribute(x).abs().sum() > 0


def test_unknown_layers_and_options(net: Net) -> None:
    with pytest.raises(UnknownLayerError, match="conv1"):
        Deconvnet(net, "conv3")
    with pytest.raises(UnknownLayerError):
        Deconvnet(net, nn.Conv2d(3, 4, 3))
    for option in ({"path": "rule"}, {"gates": "none"}, {"overlap": "sum"}):
        (name,) = option
        with pytest.raises(ValueError, match=f"{name}=.*expected one of"):
            Deconvnet(net, "conv1", **option)
    with pytest.raises(ValueError, match="call=-2: expected 0 for the first"):
        Deconvnet(net, "conv1", call=-2)
    with pytest.raises(ValueError, match="via='both'"):
        Deconvnet(net, "conv1").reconstruct(
            torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, dtype=torch.int64), via="both"
        )


def test_every_error_is_of_one_family() -> None:
    for error, builtin in (
        (InputError, ValueError), (LayerError, ValueError), (SelectorError, IndexError),
        (UnsupportedOp, NotImplementedError),
    ):  # fmt: skip
        assert issubclass(error, DeconvError)
        assert issubclass(error, builtin)


# ---- several inputs, layers, outputs ------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 5)
        self.relu = nn.ReLU()

    def forward(
        self, a: Tensor, b: Tensor, scale: float = 1.0, bias: Tensor | None = None
    ) -> Tensor:
        out = self.left(a) * scale + self.right(b)
        return self.relu(out if bias is None else out + bias)


@pytest.mark.parametrize("path", ["rules", "autograd"])
def test_tuple_inputs_and_further_arguments(path: Any) -> None:
    torch.manual_seed(0)
    model = TwoInputs().double()
    a, b = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 1, 10, 10).double()
    bias = torch.randn(2, 4, 6, 6).double()
    deconvnet = Deconvnet(model, "relu", path=path)
    y = deconvnet.activations((a, b), (-2.0, bias))
    assert close(y, model(a, b, -2.0, bias).detach())
    found = deconvnet.attribute((a, b), 1, (-2.0, bias))
    assert isinstance(found, tuple)
    seed = torch.zeros_like(y)
    seed[:, 1] = y[:, 1]
    weights = model.left.weight.detach(), model.right.weight.detach()
    assert close(found[0], -2 * F.conv_transpose2d(seed, weights[0]))
    assert close(found[1], F.conv_transpose2d(seed, weights[1]))
    units = torch.tensor([[1, 2, 3, 3], [0, 1, 0, 5]])
    for part, image in zip(
        deconvnet.reconstruct((a, b), units, False, (-2.0, bias)), (a, b), strict=True
    ):
        assert part.shape == image.shape
    (patch_a, box_a), (patch_b, box_b) = deconvnet.reconstruct((a, b), units, True, (-2.0, bias))
    assert patch_a.shape[:2] == (2, 3)
    assert patch_b.shape[:2] == (2, 1)
    assert len(box_a) == len(box_b) == 2
    assert isinstance(deconvnet.attribute((a, b), additional_forward_args=-2.0), tuple)


def test_an_input_with_one_sample_for_all_images() -> None:
    """Such as an embedding that is added to every image: it gets what each unit gives it."""
    torch.manual_seed(0)
    model = TwoInputs().double()
    a, b = torch.randn(3, 3, 8, 8).double(), torch.randn(1, 1, 10, 10).double()
    units = torch.tensor([[2, 1, 3, 3], [0, 1, 0, 5], [2, 3, 1, 1]])
    positive = (1.0, torch.full((1, 4, 1, 1), 5.0).double())
    found = Deconvnet(model, "relu").reconstruct((a, b), units, False, positive)
    for unit, *parts in zip(units, *found, strict=True):
        sample = int(unit[0])
        unit[0] = 0
        image = a[sample : sample + 1]
        alone = Deconvnet(model, "relu").reconstruct((image, b), unit[None], False, positive)
        for part, expected in zip(parts, alone, strict=True):
            assert expected.any()
            assert close(part[None], expected)
    with pytest.raises(UnsupportedOp, match="one for each image, or one for all"):
        Deconvnet(Mean().double(), "relu").reconstruct(
            (a, torch.randn(2, 1, 10, 10).double()), units
        )


class Mean(TwoInputs):
    def forward(self, a: Tensor, b: Tensor, *_: Any) -> Tensor:
        return super().forward(a, b.mean(0, keepdim=True))


def test_one_input_in_a_tuple_gives_a_tuple(net: Net, x: Tensor) -> None:
    (found,) = Deconvnet(net, "conv1").attribute((x,))
    assert torch.equal(found, Deconvnet(net, "conv1").attribute(x))


class Counter(Net):
    """Counts how often its first and last layers run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.counts.append("start")
        result = super().forward(x)
        self.counts.append("end")
        return result


@pytest.mark.parametrize("path", ["rules", "autograd"])
def test_several_layers_share_one_forward_which_stops_early(x: Tensor, path: Any) -> None:
    torch.manual_seed(0)
    model = Counter().double()
    layers = ["relu1", "conv2", "relu2"]
    together = Deconvnet(model, layers, path=path)
    found = together.attribute(x)
    assert list(found) == layers
    assert model.counts.count("start") == 1
    assert set(together.activations(x)) == set(layers)
    assert model.counts[2:] == ["start"]  # known to run once: the second forward stops early
    for name in layers:
        assert close(found[name], Deconvnet(model, name, path=path).attribute(x))
    units = torch.tensor([[0, 1, 2, 2], [2, 0, 4, 3]])
    apart = {"relu1": units, "conv2": units[:1], "relu2": units[:0]}
    shared, chosen = together.reconstruct(x, units), together.reconstruct(x, apart)
    assert {name: len(part) for name, part in chosen.items()} == {
        "relu1": 2, "conv2": 1, "relu2": 0
    }  # fmt: skip
    assert close(chosen["relu1"], shared["relu1"])
    assert close(chosen["conv2"], shared["conv2"][:1])
    with pytest.raises(SelectorError, match="expected one tensor for each"):
        together.reconstruct(x, {"relu1": units})


def test_a_list_of_one_and_a_glob_give_dicts(net: Net, x: Tensor) -> None:
    assert list(Deconvnet(net, ["conv1"]).attribute(x)) == ["conv1"]
    assert list(Deconvnet(net, "conv*").attribute(x)) == ["conv1", "conv2"]
    assert list(Deconvnet(net, ["pool"]).explain(x)) == ["pool"]
    assert list(Deconvnet(net, ["pool"]).receptive_field(x)) == ["pool"]


@dataclasses.dataclass
class Features:
    low: Tensor
    high: Tensor
    note: str = ""


class Backbone(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.first, self.second = form, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Any:
        low = self.first(x)
        high = self.second(low.relu())
        return {
            "tuple": (low, high), "list": [low, high], "dict": {"low": low, "high": high},
            "dataclass": Features(low, high), "nested": {"low": low, "high": (high,)},
        }[self.form]  # fmt: skip


class Wrapped(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.backbone = Backbone(form)

    def forward(self, x: Tensor) -> Any:
        return self.backbone(x)


@pytest.mark.parametrize("path", ["rules", "autograd"])
@pytest.mark.parametrize(
    ("form", "output"),
    [("tuple", 1), ("list", -1), ("dict", "high"), ("dataclass", "high"), ("nested", "high")],
)
def test_layers_that_return_several_tensors(form: str, output: Any, path: Any) -> None:
    torch.manual_seed(0)
    model, image = Wrapped(form), torch.randn(2, 3, 9, 9)
    with pytest.raises(LayerError, match=r"2 tensors.*output="):
        Deconvnet(model, "backbone", path=path).attribute(image)
    with pytest.raises(LayerError, match="without an item 'absent'"):
        Deconvnet(model, "backbone", output="absent", path=path).attribute(image)
    given = Deconvnet(model, "backbone", output=output, path=path).attribute(image)
    assert close(given, Deconvnet(model, "backbone.second", path=path).attribute(image), 1e-6)


@pytest.mark.parametrize("form", ["tuple", "dict", "dataclass"])
def test_models_that_return_anything(form: str) -> None:
    torch.manual_seed(0)
    model, image = Wrapped(form), torch.randn(1, 3, 9, 9)
    for path in ("rules", "autograd"):
        assert Deconvnet(model, "backbone.first", path=path).attribute(image).any()


# ---- crops --------------------------------------------------------------------------------


@pytest.mark.parametrize("via", ["images", "patches"])
def test_patches_and_boxes(net: Net, x: Tensor, via: str) -> None:
    """Field of conv2: 3 + 2 * (2 - 1) ... = 8 rows and columns: 8 of 10 rows, all 8 columns."""
    deconvnet = Deconvnet(net, "conv2")
    units = torch.tensor([[0, 0, 2, 2], [1, 4, 0, 0], [2, 3, 4, 3], [0, 0, 2, 2]])
    patches, boxes = deconvnet.reconstruct(x, units, crop=True, via=via)
    assert boxes.dtype == torch.int64
    assert boxes.tolist() == [[1, 1, 9, 9], [-3, -3, 5, 5], [5, 3, 13, 11], [1, 1, 9, 9]]
    assert patches.shape == (4, 3, 8, 8)
    whole = deconvnet.reconstruct(x, units, via=via)
    for image, patch, (top, left, bottom, right) in zip(
        whole, patches, boxes.tolist(), strict=True
    ):
        rows, columns = torch.arange(top, bottom), torch.arange(left, right)
        inside = ((rows >= 0) & (rows < 10))[:, None] & ((columns >= 0) & (columns < 8))
        assert not patch[:, ~inside].any()
        under = image[:, rows.clamp(0, 9)][:, :, columns.clamp(0, 7)]
        assert close(patch, under * inside)
        assert close(patch.abs().sum(), image.abs().sum())


def test_a_field_that_exceeds_the_image_is_the_whole_dimension(net: Net) -> None:
    image = torch.randn(1, 3, 20, 6, dtype=torch.float64)
    units = torch.tensor([[0, 1, 0, 0], [0, 1, 9, 2]])
    patches, boxes = Deconvnet(net, "conv2").reconstruct(image, units, crop=True)
    assert boxes.tolist() == [[-3, 0, 5, 6], [15, 0, 23, 6]]
    assert patches.shape == (2, 3, 8, 6)


def test_1d_and_3d_crops() -> None:
    torch.manual_seed(0)
    wave = nn.Sequential(nn.Conv1d(2, 3, 5, 2), nn.ReLU(), nn.MaxPool1d(3, 2))
    patches, boxes = Deconvnet(wave, "2").reconstruct(
        torch.randn(2, 2, 40), torch.tensor([[1, 0, 3]]), crop=True
    )
    assert patches.shape == (1, 2, 9)
    assert boxes.tolist() == [[12, 21]]
    video = nn.Sequential(nn.Conv3d(1, 2, (1, 3, 3)), nn.ReLU())
    patches, boxes = Deconvnet(video, "1").reconstruct(
        torch.randn(1, 1, 4, 8, 8), torch.tensor([[0, 1, 2, 3, 4]]), crop=True
    )
    assert patches.shape == (1, 1, 1, 3, 3)
    assert boxes.tolist() == [[2, 3, 4, 3, 6, 7]]


# ---- numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["rules", "autograd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_passed_on_and_reported(
    net: Net, x: Tensor, bad: float, path: Any
) -> None:
    x[1, 0, 4, 4] = bad
    deconvnet = Deconvnet(net, "conv1", path=path)
    with pytest.warns(UserWarning, match="'conv1'.*not finite") as told:
        found = deconvnet.attribute(x)
    assert len(told) == 1
    assert not found[1].isfinite().all()
    assert found[[0, 2]].isfinite().all()
    units = torch.tensor([[1, 0, 4, 4], [0, 0, 4, 4]])
    for via in ("images", "patches") if path == "rules" else ("images",):
        with pytest.warns(UserWarning, match="'conv1'.*not finite") as told:
            found = deconvnet.reconstruct(x, units, via=via)
        assert len(told) == 1
        assert not found[0].isfinite().all()
        assert found[1].isfinite().all()


def test_finite_numbers_are_not_remarked_on(net: Net, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in ("rules", "autograd"):
            deconvnet = Deconvnet(net, ["conv1", "relu2"], path=path)
            deconvnet.attribute(x)
            deconvnet.reconstruct(x, torch.tensor([[0, 1, 2, 2]]), crop=True)


def test_maps_without_a_place() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.cut = nn.Conv2d(3, 2, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.cut(self.conv(x)[:, :, :0] * 1)

    image = torch.randn(2, 3, 6, 6)
    for path in ("rules", "autograd"):
        deconvnet = Deconvnet(Cut(), "cut", path=path)
        assert deconvnet.activations(image).shape == (2, 2, 0, 4)
        assert torch.equal(deconvnet.attribute(image), torch.zeros_like(image))
        assert deconvnet.reconstruct(image, torch.zeros(0, 4, dtype=torch.int64)).shape == (
            0,
            3,
            6,
            6,
        )


def test_ties_go_to_the_switch_of_the_forward() -> None:
    model = nn.Sequential(nn.MaxPool2d(2))
    given = Deconvnet(model, "0").attribute(torch.ones(1, 1, 4, 4))
    assert given.sum() == 4
    leaf = torch.ones(1, 1, 4, 4, requires_grad=True)
    model(leaf).sum().backward()
    assert torch.equal(given, leaf.grad)
