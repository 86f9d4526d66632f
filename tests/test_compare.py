"""Agreement numbers, and Captum run without a trace."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator

import captum.attr  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional import cosine_similarity, spearman_corrcoef

from lit_deconv.compare import (
    Agreement,
    agreement,
    agreements,
    attribution_class,
    attribution_names,
    captum_attribution,
    captum_deconvolution,
    captum_neuron,
    unit_selector,
    unnoticed,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 6),
    )


@pytest.fixture
def model() -> nn.Sequential:
    net = network().train()
    net[1].eval()  # a frozen batch norm, as in fine-tuning
    return net


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestAgreement:
    def test_same_up_to_a_positive_factor(self) -> None:
        image = torch.randn(3, 6, 6)
        assert agreement(image, 3 * image).cosine == pytest.approx(1)
        assert agreement(image, 3 * image).rank == pytest.approx(1)

    def test_opposite_sign_is_opposite_in_cosine_only(self) -> None:
        image = torch.randn(3, 6, 6)
        opposite = agreement(image, -image)
        assert opposite.cosine == pytest.approx(-1)
        assert opposite.rank == pytest.approx(1)

    def test_against_torchmetrics(self) -> None:
        first, second = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(2)).double()
        first[:, :4] = 0  # ties
        found = agreement(first, second)
        pixels = [each.abs().sum(0).flatten() for each in (first, second)]
        assert found.rank == pytest.approx(spearman_corrcoef(*pixels).item(), abs=1e-5)
        rows = first.flatten()[None], second.flatten()[None]
        assert found.cosine == pytest.approx(cosine_similarity(*rows).item(), abs=1e-5)

    def test_many_ties_do_not_overflow(self) -> None:
        # 512 x 512 pixels, nearly all zero: ranks add up past int32
        first = torch.zeros(1, 512, 512)
        first[0, :4, :4] = torch.arange(1.0, 17.0).view(4, 4)
        assert agreement(first, first).rank == pytest.approx(1)
        assert agreement(first, first.flip(1)).rank < 0.01

    def test_scale_does_not_matter(self) -> None:
        first, second = torch.randn(2, 3, 5, 5).double()
        plain = agreement(first, second)
        extreme = agreement(first * 1e200, second * 1e-200)
        assert extreme.cosine == pytest.approx(plain.cosine)
        assert extreme.rank == pytest.approx(plain.rank)

    @pytest.mark.parametrize(
        ("first", "second", "why"),
        [
            (torch.zeros(3, 4, 4), torch.ones(3, 4, 4), "one is zero everywhere"),
            (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), "both are zero"),
            (torch.full((3, 4, 4), math.nan), torch.ones(3, 4, 4), "not finite"),
            (torch.ones(3, 4, 4), torch.full((3, 4, 4), math.inf), "not finite"),
        ],
    )
    def test_undefined_is_nan_with_a_reason(self, first: Tensor, second: Tensor, why: str) -> None:
        found = agreement(first, second)
        assert math.isnan(found.cosine)
        assert math.isnan(found.rank)
        assert why in found.why
        assert why in str(found)

    def test_flat_and_single_pixels_have_no_rank(self) -> None:
        flat = agreement(torch.ones(3, 4, 4), torch.rand(3, 4, 4))
        assert 0 < flat.cosine <= 1
        assert math.isnan(flat.rank)
        single = agreement(torch.rand(3, 1, 1), torch.rand(3, 1, 1))
        assert "alike" in single.why
        assert "cosine" in str(single)

    def test_refuses_other_shapes(self) -> None:
        with pytest.raises(ValueError, match="one shape"):
            agreement(torch.ones(3, 4, 4), torch.ones(3, 4, 5))

    def test_line_below_a_picture(self) -> None:
        assert str(Agreement(0.987, 0.5)) == "cosine 0.99, rank 0.50"

    def test_batch(self) -> None:
        first, second = torch.randn(2, 4, 3, 5, 5)
        assert agreements(first, second)[2] == agreement(first[2], second[2])


class TestCaptum:
    def test_is_what_captum_gives(self, model: nn.Sequential, images: Tensor) -> None:
        ours = captum_deconvolution(model, images, torch.tensor([1, 4]))
        unit = captum_neuron(model, "4", images, (2, 3, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval()
            theirs = captum.attr.Deconvolution(model).attribute(images, torch.tensor([1, 4]))
            neuron = captum.attr.NeuronDeconvolution(model, model[4]).attribute(images, (2, 3, 1))
        assert torch.equal(ours, theirs)
        assert torch.equal(unit, neuron)
        assert ours.any()
        assert unit.any()

    def test_one_unit_in_each_image(self, model: nn.Sequential, images: Tensor) -> None:
        positions = torch.tensor([[2, 3, 1], [4, 0, 7]])
        both = captum_neuron(model, "4", images, unit_selector(positions))
        for n, position in enumerate(positions.tolist()):
            alone = captum_neuron(model, model[4], images[n : n + 1], tuple(position))
            assert torch.allclose(both[n], alone[0], atol=1e-7)

    @pytest.mark.parametrize(
        "name", ["Saliency", "IntegratedGradients", "GuidedBackprop", "DeepLift"]
    )
    def test_of_the_output(self, name: str, model: nn.Sequential, images: Tensor) -> None:
        assert captum_attribution(name, model, images, target=2).shape == images.shape

    @pytest.mark.parametrize("name", ["NeuronGradient", "NeuronGuidedBackprop"])
    def test_of_a_unit(self, name: str, model: nn.Sequential, images: Tensor) -> None:
        found = captum_attribution(name, model, images, layer="4", selector=(1, 2, 2))
        assert found.shape == images.shape

    def test_with_layer_target_and_options(self, model: nn.Sequential, images: Tensor) -> None:
        found = captum_attribution("GuidedGradCam", model, images, target=1, layer="4")
        assert found.shape == images.shape
        conductance = captum_attribution(
            "NeuronConductance", model, images, target=1, layer="4", selector=(1, 2, 2), n_steps=3
        )
        assert conductance.shape == images.shape
        raw = captum_attribution("DeepLift", model, images, target=1, multiply_by_inputs=False)
        times = captum_attribution("DeepLift", model, images, target=1)
        assert torch.allclose(raw * images, times, atol=1e-6)

    def test_unknown_name_gives_the_nearest(self, model: nn.Sequential, images: Tensor) -> None:
        with pytest.raises(ValueError, match="did you mean Saliency"):
            captum_attribution("Saliancy", model, images, target=1)
        with pytest.raises(ValueError, match="choose among"):
            attribution_class("zzzzzz")
        with pytest.raises(ValueError, match="LayerGradCam"):
            attribution_class("LayerGradCam")

    def test_names_are_those_that_attribute_to_the_input(self) -> None:
        names = attribution_names()
        assert {"Deconvolution", "NeuronDeconvolution", "Saliency", "Occlusion"} <= set(names)
        assert not {"LayerGradCam", "Attribution", "NoiseTunnel", "LLMAttribution"} & set(names)

    def test_missing_and_unknown_arguments(self, model: nn.Sequential, images: Tensor) -> None:
        with pytest.raises(ValueError, match="needs layer="):
            captum_attribution("NeuronGradient", model, images, selector=(1, 2, 2))
        with pytest.raises(ValueError, match="needs selector="):
            captum_attribution("NeuronGradient", model, images, layer="4")
        with pytest.raises(ValueError, match=r"no option 'steps'; it knows .*n_steps"):
            captum_attribution("IntegratedGradients", model, images, target=1, steps=3)


def state(model: nn.Module) -> list[object]:
    """All that running foreign code could change, in a form that compares with ==."""
    tables = [name for name in vars(nn.Module()) if name.endswith(("hooks", "kwargs", "called"))]
    return [
        [module.training for module in model.modules()],
        [[list(getattr(m, name)) for name in tables if hasattr(m, name)] for m in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        [module._is_full_backward_hook for module in model.modules()],
        [tensor.tolist() for tensor in model.state_dict().values()],
        [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    ]


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


class TestUnnoticed:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("Deconvolution", {"target": 1}),
            ("NeuronDeconvolution", {"layer": "4", "selector": (1, 2, 2)}),
            ("DeepLift", {"target": 1}),
            ("GradientShap", {"target": 1, "baselines": torch.zeros(2, 3, 8, 8)}),
            ("FeaturePermutation", {"target": 1}),
        ],
    )
    @pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
    def test_leaves_no_trace(
        self, name: str, options: dict, mode: str, model: nn.Sequential, images: Tensor
    ) -> None:
        model(images).sum().backward()
        model[4].weight.requires_grad_(False)
        model[0].register_forward_hook(lambda *_: None)
        contexts = {
            "grad": torch.enable_grad(),
            "no_grad": torch.no_grad(),
            "inference": torch.inference_mode(),
        }
        with contexts[mode]:
            inputs = images * 1
            before, inputs_before = state(model), inputs.clone()
            found = captum_attribution(name, model, inputs, **options)
            assert state(model) == before
        assert found.shape == images.shape
        assert torch.equal(inputs, inputs_before)
        assert not inputs.requires_grad
        assert inputs.grad is None
        assert not found.requires_grad

    @pytest.mark.parametrize("name", ["Deconvolution", "DeepLift", "LRP", "IntegratedGradients"])
    def test_nor_after_an_exception(self, name: str, images: Tensor) -> None:
        model = nn.Sequential(network()[:6], Breaks()).train()
        images.requires_grad_(True)
        before = state(model)
        with pytest.raises((RuntimeError, TypeError)):
            captum_attribution(name, model, images, target=1)
        assert state(model) == before
        assert images.requires_grad
        assert images.grad is None

    def test_gradients_are_kept_even_from_a_backward_pass(self, model: nn.Sequential) -> None:
        model(torch.rand(2, 3, 8, 8)).sum().backward()
        before = state(model)
        with unnoticed(model):
            model(torch.rand(2, 3, 8, 8)).sum().backward()
            torch.rand(3)
            random.random()
            np.random.rand()
            model.train()
        assert state(model) == before

    def test_compiled_model_is_run_eagerly_and_not_compiled_again(self, images: Tensor) -> None:
        plain = network().eval()
        expected = captum_neuron(plain, "4", images, (1, 2, 2))
        compilations = []

        def backend(graph: nn.Module, inputs: list[Tensor]) -> nn.Module:
            compilations.append(graph)
            return graph

        compiled = torch.compile(plain, backend=backend)
        assert isinstance(compiled, nn.Module)
        with torch.no_grad():
            compiled(images)
        done = len(compilations)
        assert done > 0
        found = captum_neuron(compiled, plain[4], images, (1, 2, 2))
        assert torch.equal(found, expected)
        with torch.no_grad():
            compiled(images)
        assert len(compilations) == done

    def test_bfloat16_autocast_outside_does_not_reach_in(
        self, model: nn.Sequential, images: Tensor
    ) -> None:
        expected = captum_deconvolution(model, images, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(captum_deconvolution(model, images, 1), expected)

    def test_import_and_run_are_light(self) -> None:
        code = (
            "import sys, torch, lit_deconv.compare as c;"
            "image, model = torch.rand(1, 3, 2, 2), torch.nn.Flatten();"
            "c.captum_attribution('Saliency', model, image, target=0);"
            "print(sorted({m.split('.')[0] for m in sys.modules} & {'lightning', 'tensorboard'}))"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.stdout.strip() == "[]", ran.stderr
