"""The zoo's small models through the same function as the command, and proof that it can fail."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from lit_deconv import Deconvnet
from lit_deconv.engine.registry import RULES, reverse_rule
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op


def _command() -> ModuleType:
    """The script, as if run: it finds its own folder."""
    file = Path(__file__).parents[1] / "benchmarks" / "zoo.py"
    spec = importlib.util.spec_from_file_location("zoo", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = _command()
models = importlib.import_module("benchmarks._zoo_models")
table = importlib.import_module("benchmarks._zoo_table")


class Audio(nn.Sequential):
    """A small network for waveforms."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv1d(1, 8, 9, stride=4, padding=4), nn.BatchNorm1d(8), nn.ReLU()),
            *(nn.MaxPool1d(3, 2), nn.Conv1d(8, 12, 5, padding=2, groups=4), nn.GELU()),
            *(nn.AvgPool1d(2), nn.Conv1d(12, 16, 3, dilation=2), nn.BatchNorm1d(16), nn.ELU()),
        )


def clip() -> tuple[nn.Module, Tensor]:
    with models.Uninitialised():
        model = torchvision.models.video.r3d_18(weights=None)
    return model, torch.randn(1, 3, 4, 24, 24)


def audio() -> tuple[nn.Module, Tensor]:
    return Audio(), torch.randn(3, 1, 256)


def vision_transformer() -> tuple[nn.Module, Tensor]:
    return VisionTransformer(32, 8, 2, 2, 16, 32), torch.randn(2, 3, 32, 32)


def swin() -> tuple[nn.Module, Tensor]:
    model = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4])
    return model, torch.randn(2, 3, 64, 64)


def ready(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    models.draw_weights(model)
    with models.calibrated(model), torch.no_grad():
        model.eval()(images)
    return model, images


CONVOLUTIONAL = (
    "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "convnext_tiny",
    "densenet121", "googlenet", "regnet_y_400mf", "lraspp_mobilenet_v3_large",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_models_go_by_rules(name: str) -> None:
    found = table.Zoo(zoo.check(name, *models.prepared(name)))
    assert found.failures() == []
    assert [row.path for row in found.rows] == ["rules"] * 3
    assert 0 <= found.largest(double=False) <= 1e-5


def test_three_dimensions_go_by_rules() -> None:
    found = table.Zoo(zoo.check("video", *ready(*clip())))
    assert found.failures() == []
    assert [row.path for row in found.rows] == ["rules"] * 3


def test_one_dimension_goes_by_rules_in_both_precisions() -> None:
    found = table.Zoo(zoo.check("audio", *ready(*audio()), double=True))
    assert found.failures() == []
    assert [row.path for row in found.rows] == ["rules"] * 3
    assert 0 < found.largest(double=True) <= 1e-10


@pytest.mark.parametrize("made", [vision_transformer, swin], ids=["vit", "swin"])
def test_transformers_go_by_autograd(made: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    rows = zoo.check("small", *ready(*made()))
    assert table.Zoo(rows).failures() == []
    # The convolution that makes the patches comes before any attention.
    assert [row.path for row in rows] == ["rules", "autograd", "autograd"]
    assert all(row.missing or row.refused for row in rows[1:])


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
def test_boxes_hold_the_whole_reconstruction(name: str) -> None:
    model, images = models.prepared(name)
    for layer in models.choose(model, images):
        net = Deconvnet(model, layer)
        units = zoo.strongest_units(net.activations(images), torch.Generator().manual_seed(1))
        full = net.reconstruct(images, units)
        patches, _ = net.reconstruct(images, units, crop=True)
        energy = full.abs().sum((1, 2, 3))
        assert (energy > 0).all()
        assert torch.allclose(patches.abs().sum((1, 2, 3)), energy, rtol=1e-4)


def test_a_wrong_rule_is_found() -> None:
    model, images = models.prepared("mobilenet_v3_small")
    right = RULES["hardswish"]
    try:

        @reverse_rule("hardswish", windows=True, kind="rectifier")
        def unrectified(op: Op, signal: Signal) -> Iterator[tuple[object, Signal]]:
            yield op["self"], signal

        found = table.Zoo(zoo.check("wrong", model, images))
    finally:
        RULES["hardswish"] = right
    assert any("error" in failure for failure in found.failures())


def test_a_fault_of_captum_that_is_not_told_is_found() -> None:
    row = table.Row("model", "layer", (1, 2, 3, 3), "rules", captum=0.5)
    assert row.contradiction
    assert table.Zoo([row]).failures()
    told = table.Row(
        "model", "layer", (1, 2, 3, 3), "rules", captum=0.5, faults=("plain gradient",)
    )
    assert not told.contradiction
    assert not table.Zoo([told]).failures()


def test_errors_that_are_no_numbers_fail() -> None:
    row = table.Row("model", "layer", (1, 2), "rules", layer_error=float("nan"))
    assert table.Zoo([row]).failures()
    nothing = torch.zeros(2, 3)
    assert zoo.relative_error(nothing, nothing) == 0
    assert zoo.relative_error(nothing + 1, nothing) == float("inf")
    assert zoo.relative_error(nothing + float("nan"), nothing) != 0


def test_the_command_writes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert zoo.main(["--models", "squeezenet1_1", "--markdown", "zoo.md"]) == 0
    page = (tmp_path / "zoo.md").read_text()
    printed = capsys.readouterr().out
    for text in (page, printed):
        assert "models 1: by rules 1, by autograd 0, refused 0" in text
        assert text.count("squeezenet1_1") >= 3
    assert f"torch {torch.__version__.split('+')[0]}" in page
    assert str(tmp_path) not in page


def test_every_model_of_torchvision_is_asked() -> None:
    names = models.names_of_models()
    assert set(torchvision.models.list_models(module=torchvision.models)) <= set(names)
    assert "fcn_resnet50" in names
