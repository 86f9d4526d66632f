"""What only a CUDA device can show: exact arithmetic, repeatable pictures, no waiting in the walk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lit_deconv import Deconvnet, NeuronDeconvolution
from lit_deconv.engine.recording import OnTape
from lit_deconv.engine.undisturbed import undisturbed
from lit_deconv.engine.walk import Part, union
from lit_deconv.examples.zfnet import zfnet

# Most machines, CI's too, have no GPU, and none is required. What is tested here cannot be shown
# without one: TF32, kernels that add in any order, and waiting for the device exist on CUDA alone.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

MODELS = {
    "alexnet": (lambda: torchvision.models.alexnet(weights=None), "features.11", 96),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), "layer3.1", 64),
    "mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(weights=None),
        "features.6",
        64,
    ),
    "zfnet": (zfnet, "features.relu4", 96),
}
by_model = pytest.mark.parametrize("name", MODELS)
PATHS = ("rules", "autograd")


def built(name: str) -> tuple[nn.Module, str, Tensor]:
    make, layer, size = MODELS[name]
    torch.manual_seed(0)
    return make().eval().cuda(), layer, torch.randn(4, 3, size, size).cuda()


def chosen(net: Deconvnet, images: Tensor, count: int = 40) -> Tensor:
    """Random units of a layer, on the CPU."""
    shape = net.activations(images).shape
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in shape], 1)


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (on, on)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def pictures(net: Deconvnet, images: Tensor, units: Tensor) -> list[Tensor]:
    """Every way to ask."""
    patches, boxes = net.reconstruct(images, units, crop=True)
    return [
        net.attribute(images),
        net.reconstruct(images, units),
        net.maps(images, [0, 3]),
        patches,
        boxes,
    ]


@by_model
@pytest.mark.parametrize("path", PATHS)
def test_two_runs_are_the_same_bit_for_bit_whatever_tf32_is(name: str, path: Any) -> None:
    model, layer, images = built(name)
    net = Deconvnet(model, layer, path=path)
    units = chosen(net, images)
    runs = []
    for on in (False, False, True, True):
        with tf32(on):
            runs.append(pictures(net, images, units))
    first, *others = runs
    for other in others:
        assert all(map(torch.equal, first, other))


def without_pools() -> tuple[nn.Sequential, Tensor]:
    """No switch that rounding could decide anew."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers).eval(), torch.randn(2, 3, 24, 24)


@pytest.mark.parametrize("path", PATHS)
def test_a_picture_does_not_round_to_tf32(path: Any) -> None:
    model, images = without_pools()
    expected = Deconvnet(copy.deepcopy(model).double(), "5").attribute(images.double())
    model, images = model.cuda(), images.cuda()

    def error(found: Tensor) -> float:
        return float((found.cpu() - expected.cpu()).abs().max() / expected.abs().max())

    with tf32(True), torch.no_grad():
        assert error(Deconvnet(model, "5", path=path).attribute(images)) < 2e-6
        # The flags were on: without lit-deconv the same convolutions do round.
        maps, weight = model[:2](images), model.get_parameter("2.weight")
        exact = torch.nn.functional.conv2d(maps.double(), weight.double(), padding=1)
        rounded = torch.nn.functional.conv2d(maps, weight, padding=1)
        if torch.cuda.get_device_capability() >= (8, 0):
            assert (rounded - exact).abs().max() / exact.abs().max() > 2e-5


@by_model
def test_units_are_the_cpus(name: str) -> None:
    """In float64, where no rounding decides a switch.

    PyTorch's hardswish on a CPU divides by 6 in float32 even there.
    """
    model, layer, images = built(name)
    model, images = model.double(), images.double()
    net = Deconvnet(model, layer)
    units = chosen(net, images)
    found = pictures(net, images, units)
    assert all(tensor.is_cuda for tensor in found)
    there = Deconvnet(copy.deepcopy(model).cpu(), layer)
    for here, expected in zip(found, pictures(there, images.cpu(), units), strict=True):
        assert relative(here.cpu(), expected) < (1e-6 if "mobilenet" in name else 1e-10)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.cpu(), expected.cpu()
    return float((found - expected).abs().max() / expected.abs().max())


@by_model
def test_the_walk_does_not_wait_for_the_device(name: str) -> None:
    model, layer, images = built(name)
    net = Deconvnet(model, layer)
    units = chosen(net, images).cuda()
    with undisturbed(model), torch.no_grad():
        recording = net._forward.recorded((images,), ())
        assert isinstance(recording, OnTape)
        parts = [Part(30), Part(10)]
        list(recording.walk_units(layer, units, parts))  # what is loaded at first
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = list(recording.walk_units(layer, units, parts))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum(count for count, _ in found) == 40
    assert union(part.span for part in parts) is None  # no bounds known: all of it was clipped


def test_sync_debug_mode_notices() -> None:
    number = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            number.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_model
def test_nothing_stays_on_the_device(name: str) -> None:
    model, layer, images = built(name)
    net = Deconvnet(model, layer)
    units = chosen(net, images)
    pictures(net, images, units)
    before = torch.cuda.memory_allocated()
    pictures(net, images, units)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_weights(dtype: torch.dtype) -> None:
    """Exact weights under the caller's autocast are recorded exactly; half weights walk in half."""
    model, images = without_pools()
    model, images = model.cuda(), images.cuda()
    net = Deconvnet(model, "5")
    expected = net.attribute(images)
    with torch.autocast("cuda", dtype):
        assert torch.equal(net.attribute(images), expected)
        low = Deconvnet(model, "5", autocast=True).attribute(images)
        assert torch.is_autocast_enabled("cuda")
    assert not torch.equal(low, expected)
    scale = float(expected.abs().max())
    assert torch.allclose(low, expected, rtol=0, atol=0.05 * scale)
    half = Deconvnet(model.to(dtype), "5").attribute(images.to(dtype))
    assert half.dtype == dtype
    assert torch.allclose(half.float(), expected, rtol=0, atol=0.05 * scale)


def test_compiled_parallel_and_channels_last_on_cuda() -> None:
    model, layer, images = built("resnet18")
    expected = Deconvnet(model, layer).attribute(images)
    last = images.contiguous(memory_format=torch.channels_last)
    scale = float(expected.abs().max())
    last_too = model.to(memory_format=torch.channels_last)
    forms: list[Any] = [torch.compile(model), nn.DataParallel(model), last_too]
    for form in forms:
        found = Deconvnet(form, layer).attribute(last)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("path", PATHS)
def test_a_padded_average_of_channels_last_maps(path: Any) -> None:
    """Whose backward on CUDA PyTorch had wrong (#188344)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(3, 2, 1)).double().eval()
    images = torch.randn(2, 3, 11, 13).double()
    expected = Deconvnet(copy.deepcopy(model), "2").attribute(images)
    model = model.cuda().to(memory_format=torch.channels_last)
    images = images.cuda().contiguous(memory_format=torch.channels_last)
    assert relative(Deconvnet(model, "2", path=path).attribute(images).cpu(), expected) < 1e-12
    drop_in = NeuronDeconvolution(model, model[2])
    given = drop_in.attribute(images, lambda layer: 0.5 * layer.square().flatten(1).sum(1))
    assert relative(given.cpu(), expected) < 1e-12


def test_random_numbers_of_the_device_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5)).cuda().train()
    images = torch.randn(2, 3, 8, 8).cuda()
    torch.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.manual_seed(3)
    Deconvnet(model, "2").attribute(images)
    assert torch.equal(torch.rand(4, device="cuda"), expected)
