"""The drop-ins beside Captum's own classes: equal where those are right, right where they are not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import captum.attr  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import NoiseTunnel
from torch import Tensor, nn

from lit_deconv import Deconvolution, NeuronDeconvolution
from lit_deconv.engine.errors import UnsupportedOp
from lit_deconv.engine.precision import exact

pytestmark = pytest.mark.filterwarnings("ignore")


def error(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).norm() / expected.norm()).item()


def images(size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def zoo(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None, **options)
    return model.eval()


class Small(nn.Module):
    """Two inputs, an extra argument, batch norm and dropout; Captum is right on it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.relu, self.second = nn.ReLU(), nn.ReLU()
        self.drop, self.pool = nn.Dropout(0.3), nn.MaxPool2d(2)
        self.head = nn.Linear(16, 5)
        self.failing = False

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        z = self.relu(self.norm(self.conv(x + scale * y)))
        if self.failing:
            raise KeyError("from the model")
        z = self.drop(self.second(z - 0.2))
        return self.head(F.adaptive_max_pool2d(self.pool(z), 2).flatten(1))


# ---- equal where Captum is right ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "unit"),
    [("alexnet", "features.8", (7, 1, 2)), ("resnet18", "layer3.0.conv1", (5, 2, 1)),
     ("vgg11_bn", "features.15", (11, 3, 3))],
)  # fmt: skip
def test_equal_to_captum_where_captum_is_right(
    name: str, layer: str, unit: tuple[int, ...]
) -> None:
    model, x = zoo(name), images()
    module = model.get_submodule(layer)
    with exact():
        expected = captum.attr.Deconvolution(model).attribute(x.clone(), 3)
    assert error(Deconvolution(model).attribute(x, 3), expected) < 1e-6
    with exact():
        expected = captum.attr.NeuronDeconvolution(model, module).attribute(x.clone(), unit)
    assert expected.abs().max() > 0
    assert error(NeuronDeconvolution(model, module).attribute(x, unit), expected) < 1e-6


@pytest.mark.parametrize(
    "target", [3, [1, 4], torch.tensor([0, 2]), torch.tensor(1), [(1,), (2,)], (2,)]
)
@pytest.mark.parametrize("training", [False, True])
def test_every_form_of_target_and_of_inputs(target: Any, training: bool) -> None:
    model, pair = Small().train(training), (images(12), images(12) + 1)
    results = []
    for kind in (Deconvolution, captum.attr.Deconvolution):
        torch.manual_seed(3)
        with nullcontext() if kind is Deconvolution else exact():
            results.append(kind(model).attribute(tuple(x.clone() for x in pair), target, 0.5))
    for given, expected in zip(*results, strict=True):
        assert error(given, expected) < 1e-6


@pytest.mark.parametrize(
    "selector",
    [
        (1, 2, 3),
        (slice(0, 2), 2, slice(None)),
        lambda output: output[:, 1].flatten(1).sum(1),
        lambda output: (output[0] if isinstance(output, tuple) else output)[:, 0, 0, 0].tanh(),
    ],
)
@pytest.mark.parametrize("at_input", [False, True])
def test_every_form_of_neuron_selector(selector: Any, at_input: bool) -> None:
    model, pair = Small().eval(), (images(12), images(12) + 1)
    ours, theirs = (
        kind(model, model.second).attribute(
            tuple(x.clone() for x in pair), selector, 0.5, attribute_to_neuron_input=at_input
        )
        for kind in (NeuronDeconvolution, captum.attr.NeuronDeconvolution)
    )
    for given, expected in zip(ours, theirs, strict=True):
        assert error(given, expected) < 1e-6


def test_gates_and_contrast_normalisation_keep_their_gradient_as_in_captum() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
            self.norm = nn.LocalResponseNorm(3, alpha=1.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.relu(self.conv(x)))
            y = y * torch.sigmoid(y.mean((2, 3), keepdim=True)) * y
            return F.layer_norm(y, y.shape[1:]).flatten(1).softmax(1).amax(1, keepdim=True)

    model, x = Gated(), images(8)
    expected = captum.attr.Deconvolution(model).attribute(x.clone(), 0)
    assert error(Deconvolution(model).attribute(x, 0), expected) < 1e-5


# ---- right where Captum is not -------------------------------------------------------------------


class Rectify(torch.autograd.Function):
    """The definition: the value of the rectifier, the positive part of the signal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None]:
        return signal[0] * (signal[0] > 0), None


@pytest.fixture
def by_definition(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, Tensor], Tensor]:
    """The gradient of output 3 with every ReLU and ReLU6 of PyTorch replaced by its definition."""

    def reference(model: nn.Module, x: Tensor) -> Tensor:
        def relu(x: Tensor, inplace: bool = False) -> Tensor:
            return Rectify.apply(x, x.detach().clamp(min=0))

        def hardtanh(x: Tensor, low: float, high: float, inplace: bool = False) -> Tensor:
            assert (low, high) == (0.0, 6.0)
            return Rectify.apply(x, x.detach().clamp(0, 6))

        with monkeypatch.context() as patch:
            patch.setattr(F, "relu", relu)
            patch.setattr(F, "hardtanh", hardtanh)
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(model(leaf)[:, 3].sum(), leaf)[0]

    return reference


@pytest.mark.parametrize(
    ("name", "size", "captums_error"),
    [("googlenet", 48, 0.5), ("densenet121", 48, 0.1), ("mobilenet_v2", 48, 0.5)],
)
def test_the_zoo_side_by_side_with_captum_and_the_reference(
    name: str,
    size: int,
    captums_error: float,
    by_definition: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model, x = zoo(name, **options).double(), images(size, torch.float64)
    reference = by_definition(model, x)
    assert error(Deconvolution(model).attribute(x, 3), reference) < 1e-10
    assert (
        error(captum.attr.Deconvolution(model).attribute(x.clone(), 3), reference) > captums_error
    )
    layer = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    neuron = NeuronDeconvolution(model, layer).attribute(x, 3)
    assert error(neuron, reference) < 1e-10
    theirs = captum.attr.NeuronDeconvolution(model, layer).attribute(x.clone(), 3)
    assert error(theirs, reference) > captums_error


def test_a_checkpointed_densenet_is_the_same_densenet() -> None:
    x = images(48)
    results = [
        Deconvolution(zoo("densenet121", memory_efficient=efficient)).attribute(x, 3)
        for efficient in (False, True)
    ]
    assert error(*results) < 1e-6


# ---- behaves as Captum's ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Deconvolution, captum.attr.Deconvolution),
        (NeuronDeconvolution, captum.attr.NeuronDeconvolution),
    ],
)
def test_signatures_and_family(ours: Any, theirs: Any) -> None:
    assert issubclass(ours, theirs)
    for method in ("__init__", "attribute"):
        given, expected = (inspect.signature(getattr(kind, method)) for kind in (ours, theirs))
        defaults = [[(p.name, p.default, p.kind) for p in s.parameters.values()]
                    for s in (given, expected)]  # fmt: skip
        assert defaults[0] == defaults[1]
    assert hasattr(ours.attribute, "__wrapped__"), "log_usage is missing"


def test_multiplies_by_inputs_and_tuples() -> None:
    model, x = Small().eval(), images(12)
    assert not Deconvolution(model).multiplies_by_inputs
    assert not NeuronDeconvolution(model, model.conv).multiplies_by_inputs
    assert isinstance(Deconvolution(model).attribute((x, x), 1), tuple)
    assert isinstance(Deconvolution(model.conv).attribute(x, (0, 1, 2)), Tensor)


def test_errors_are_captums() -> None:
    model, pair = Small().eval(), (images(12), images(12))
    neuron = NeuronDeconvolution(model, model.conv)
    with pytest.raises(AssertionError):
        neuron.attribute(pair, (1, 2, 3, 4))
    with pytest.raises(IndexError):
        neuron.attribute(pair, (9, 2, 3))
    with pytest.raises(AssertionError, match="Target not provided"):
        Deconvolution(model).attribute(pair)
    with pytest.raises(IndexError):
        Deconvolution(model).attribute(pair, 99)
    with pytest.raises(AssertionError, match=r"nn\.Module"):
        Deconvolution(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        Deconvolution(model).attribute((pair[0], pair[1].long()), 1)


def test_a_noise_tunnel_goes_on_top() -> None:
    model, x = zoo("squeezenet1_1"), images(48)
    results = []
    for kind in (Deconvolution, captum.attr.Deconvolution):
        torch.manual_seed(0)
        tunnel = NoiseTunnel(kind(model))
        with nullcontext() if kind is Deconvolution else exact():
            found = tunnel.attribute(x.clone(), nt_samples=2, nt_type="smoothgrad", target=1)
        results.append(found)
    assert error(*results) < 1e-6


# ---- the caller's state ------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_everything_is_as_it_was(failing: bool, training: bool, wanted: bool) -> None:
    model = Small().train(training)
    model.norm.eval()
    model.failing = failing
    pair = (images(12).requires_grad_(wanted), images(12))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    modes = torch.overrides._get_current_function_mode_stack()

    def attribute() -> None:
        Deconvolution(model).attribute(pair, 1)
        NeuronDeconvolution(model, model.conv).attribute(pair, (1, 2, 3))

    if failing:
        with pytest.raises(KeyError, match="from the model"):
            attribute()
    else:
        attribute()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert (model.training, model.norm.training) == (training, False)
    assert [x.requires_grad for x in pair] == [wanted, False]
    assert all(x.grad is None for x in (*pair, *model.parameters()))
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()
    )
    assert torch.overrides._get_current_function_mode_stack() == modes


def test_batch_statistics_leave_no_trace_in_train_mode() -> None:
    model, pair = Small().train(), (images(12), images(12) + 1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    given = Deconvolution(model).attribute(pair, 1)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    torch.manual_seed(0)
    with exact():
        expected = captum.attr.Deconvolution(model).attribute(tuple(x.clone() for x in pair), 1)
    assert error(given[0], expected[0]) < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    model = Small().eval()
    expected = Deconvolution(model).attribute((images(12), images(12)), 1)
    with mode():
        pair = (images(12) + 0, images(12) + 0)
        given = Deconvolution(model).attribute(pair, 1, torch.ones(()) + 0)
        unit = NeuronDeconvolution(model, model.head).attribute(pair, 1)
    assert torch.equal(given[0], expected[0])
    assert torch.equal(unit[0], expected[0])


def test_an_input_written_in_place_by_the_model() -> None:
    linear, x = nn.Linear(192, 5), images(8)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), linear)
    before = x.clone()
    given = Deconvolution(model).attribute(x, 1)
    assert torch.equal(x, before)
    expected = linear.weight.detach()[1].relu().view(1, 3, 8, 8).expand(2, -1, -1, -1)
    torch.testing.assert_close(given, expected)


def test_compiled_and_run_before() -> None:
    model, x = zoo("squeezenet1_1"), images(48)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    layer, unit = model.get_submodule("features.6"), (3, 1, 1)
    assert torch.equal(
        Deconvolution(compiled).attribute(x, 1), Deconvolution(model).attribute(x, 1)
    )
    assert torch.equal(
        NeuronDeconvolution(compiled, layer).attribute(x, unit),
        NeuronDeconvolution(model, layer).attribute(x, unit),
    )
    torch._dynamo.reset()


def test_data_parallel_is_unwrapped() -> None:
    model, pair = Small().eval(), (images(12), images(12))
    parallel = nn.DataParallel(model)
    given = NeuronDeconvolution(parallel, model.conv, device_ids=[0]).attribute(pair, (1, 2, 3))
    expected = NeuronDeconvolution(model, model.conv).attribute(pair, (1, 2, 3))
    assert torch.equal(given[0], expected[0])


def test_what_cannot_be_seen_is_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval(), images(8)
    traced = torch.jit.trace(model, x)
    with pytest.raises(UnsupportedOp, match="scripted or traced"):
        Deconvolution(traced).attribute(x, 1)
    script = torch.jit.script(relu_and_more)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return script(self.conv(x)).flatten(1)

    with pytest.raises(UnsupportedOp, match="cannot be seen"):
        Deconvolution(Hidden()).attribute(x, 1)


def relu_and_more(x: Tensor) -> Tensor:
    return torch.relu(x) + 1.0
