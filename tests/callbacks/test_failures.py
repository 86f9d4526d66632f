"""What fails is said, once, and training goes on; what cannot work is refused before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callback_models import (
    Breaking,
    LitNet,
    expected_tags,
    hooks_on,
    loader,
    pictures,
    recorded,
    seeded,
    tiny_net,
    trainer,
)
from lightning.pytorch import strategies
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_deconv.callbacks import DeconvCallback, beside, capture, gallery, strongest
from lit_deconv.callbacks import pictures as drawing
from torch import Tensor, nn


def small(**options: Any) -> DeconvCallback:
    return DeconvCallback(**({"channels": 2, "probe": 2, "compare_images": 1} | options))


def fit(folder: Path, *callbacks: pl.Callback, model: Any = None, **kwargs: Any) -> Any:
    seeded()
    model = model or LitNet(tiny_net(p=0.5))
    run = trainer(folder, *callbacks, **kwargs)
    run.fit(model, loader(), loader())
    return model


def ours(warned: set[str]) -> list[str]:
    return [text for text in warned if "DeconvCallback" in text]


def broken(message: str) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(message)

    return fail


STAGES = {
    "hook": (capture.Capture, "_enter"),
    "activations": (drawing.Deconvnet, "activations"),
    "reconstruction": (drawing.Deconvnet, "reconstruct"),
    "captum": (beside, "captum_attribution"),
    "ranking": (strongest.Collector, "see"),
    "merge": (strongest.Collector, "compute"),
    "patches": (strongest, "reconstruct_top"),
    "strip": (gallery, "figure4"),
    "render": (gallery, "figure2"),
    "write": (gallery.Writer, "image"),
}


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of a run without the callback."""
    weights: dict[str, Tensor] = fit(tmp_path_factory.mktemp("without")).state_dict()
    return weights


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_warns_once_and_training_is_the_same(
    stage: str, tmp_path: Path, without: dict[str, Tensor]
) -> None:
    breaking = Breaking(*STAGES[stage], f"CUDA out of memory in {stage}")
    model, warned = recorded(lambda: fit(tmp_path, breaking, small()))
    (text,) = ours(warned)
    assert f"OutOfMemoryError: CUDA out of memory in {stage}" in text
    # What is drawn off the training thread may be reported for either layer first.
    assert "net.1" in text or "net.4" in text or stage in ("hook", "merge")
    assert "on_error='raise'" in text
    assert all(torch.equal(without[key], value) for key, value in model.state_dict().items())
    assert hooks_on(model) == 0
    # the epoch before the failure is there to be read
    found = pictures(tmp_path)
    assert found.keys() == expected_tags("net.1", "net.4")
    assert all(min(each) == 1 for each in found.values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_strict_get_the_error(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name = STAGES[stage]
    monkeypatch.setattr(where, name, broken("no memory"))
    model = LitNet()
    with pytest.raises(RuntimeError, match="OutOfMemoryError: no memory") as error:
        fit(tmp_path, small(on_error="raise"), model=model)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert hooks_on(model) == 0


def test_one_layer_that_fails_does_not_keep_the_others_from_being_drawn(tmp_path: Path) -> None:
    layers = ["net.1", "net.8", "net.4"]
    model, warned = recorded(lambda: fit(tmp_path, small(layers=layers)))
    (text,) = ours(warned)
    assert "net.8: LayerError: layer 'net.8' gives [3] for one image" in text
    assert pictures(tmp_path).keys() == expected_tags("net.1", "net.4")
    assert hooks_on(model) == 0


def test_a_channel_that_is_not_there(tmp_path: Path) -> None:
    _, warned = recorded(lambda: fit(tmp_path, small(layers=["net.1", "net.4"], channels=[4])))
    (text,) = ours(warned)
    assert "net.1: ValueError: channel 4 was asked for and it has 4; choose among 0 to 3" in text
    assert pictures(tmp_path).keys() == expected_tags("net.4")


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    model = LitNet()
    with torch.no_grad():
        model.net[3].weight.fill_(float("nan"))
    _, warned = recorded(lambda: fit(tmp_path, small(), model=model, max_epochs=1))
    (text,) = ours(warned)
    assert "not finite (NaN or infinity) on 2 of 2 probe images" in text


def test_a_model_that_takes_no_image(tmp_path: Path) -> None:
    run = trainer(tmp_path, small())
    _, warned = recorded(lambda: run.fit(BoringModel()))
    (text,) = ours(warned)
    assert "no module was given a batch of images [N, C, H, W]" in text
    assert "BoringModel(float32 [1, 32])" in text
    with pytest.raises(RuntimeError, match="module="):
        trainer(tmp_path, small(on_error="raise")).fit(BoringModel())


def test_a_model_without_feature_maps(tmp_path: Path) -> None:
    model = LitNet(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    _, warned = recorded(lambda: fit(tmp_path, small(), model=model))
    (text,) = ours(warned)
    assert "no layer could be chosen" in text


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_an_empty_loader(verb: str, tmp_path: Path) -> None:
    empty = loader(batch=16, drop_last=True)
    run = trainer(tmp_path, small())

    def go() -> None:
        if verb == "fit":
            run.fit(LitNet(), loader(), empty)
        else:
            getattr(run, verb)(LitNet(), empty)

    _, warned = recorded(go)
    (text,) = ours(warned)
    assert "loader gave no batch" in text


def test_hooks_are_gone_after_an_exception_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    class Raising(LitNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.trainer.sanity_checking or hooks_on(self) > 0
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking:
                raise KeyError("from the user")

    model = Raising()
    with pytest.raises(KeyError, match="from the user"):
        fit(tmp_path, small(), model=model)
    assert hooks_on(model) == 0


def test_what_was_drawn_before_a_crash_is_in_the_log(tmp_path: Path) -> None:
    class Crash(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 1:
                raise SystemError("crash")

    with pytest.raises(SystemError, match="crash"):
        fit(tmp_path, small(), Crash())
    assert pictures(tmp_path).keys() == expected_tags("net.1", "net.4")


# ---- refused before the first step -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "net.11"}, r"no layer 'net.11' in Stepping; nearest: net\.1"),
        ({"layers": "features.*"}, "no layer matches 'features"),
        ({"layers": nn.ReLU()}, "no module of this Stepping"),
        ({"module": "encoder"}, "no layer 'encoder'"),
        ({"module": "net.*"}, "name of one module"),
    ],
)
def test_names_that_the_model_does_not_have_end_the_run_in_setup(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    class Stepping(LitNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("a step was taken")

        validation_step: Any = training_step

    with pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path, small(**options), model=Stepping())


@pytest.mark.parametrize(
    "options",
    [
        {"layers": []},
        {"layers": [3]},
        {"layers": ""},
        {"channels": 0},
        {"channels": []},
        {"channels": [1, 1]},
        {"channels": [-1]},
        {"channels": "every"},
        {"top_k": 0},
        {"every_n_train_steps": 0},
        {"every_n_train_steps": 5, "every_n_epochs": 2},
        {"log": []},
        {"log": ["figure2"]},
        {"max_bytes": 0},
        {"unhooked_images": 0},
        {"channels": True},
        {"probe": 0},
        {"probe": torch.zeros(3, 8, 8)},
        {"probe": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)},
        {"probe": torch.zeros(0, 3, 8, 8)},
        {"probe": "no/such/file.pt"},
        {"every_n_epochs": 0},
        {"every_n_epochs": 1.5},
        {"compare": ["Deconvolutions"]},
        {"compare": ["LayerActivation"]},
        {"compare_images": 0},
        {"mean": 0.5},
        {"std": [1.0, 1.0, 1.0]},
        {"mean": [0.0, 0.0, 0.0], "std": [1.0, 0.0, 1.0]},
        {"mean": [0.0, 0.0], "std": [1.0, 1.0, 1.0]},
        {"mean": "half", "std": 1.0},
        {"show_channels": [0, 1]},
        {"show_channels": -1},
        {"tag": "/"},
        {"compare": None},
        {"compare": [3]},
        {"compare": ["Deconvolution", "Deconvolution"]},
        {"log": None},
        {"module": 3},
        {"input_key": 1.5},
        {"on_error": "ignore"},
    ],
)
def test_values_that_cannot_work_are_refused_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="DeconvCallback"):
        DeconvCallback(**options)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_that_shard_the_weights_are_refused(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    # as it stands when setup runs; to make one takes GPUs or another package
    run._accelerator_connector.strategy = object.__new__(getattr(strategies, name))
    with pytest.raises(MisconfigurationException, match=f"{name}, which shards the weights"):
        small().setup(run, LitNet(), "fit")


# ---- YAML ------------------------------------------------------------------------------------------------


def test_it_can_be_written_in_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[pl.Callback])
    text = """
callbacks:
  - class_path: lit_deconv.callbacks.DeconvCallback
    init_args:
      layers: [net.1, "features.*"]
      channels: [0, 3]
      probe: 4
      compare: [NeuronDeconvolution]
      mean: [0.5, 0.5, 0.5]
      std: 0.25
      input_key: image
      show_channels: null
      top_k: 4
      every_n_train_steps: 100
      log: [grid, evolution, numbers]
      max_bytes: 1000000
      unhooked_images: 32
      on_error: raise
"""
    (callback,) = parser.instantiate_classes(parser.parse_string(text)).callbacks
    assert isinstance(callback, DeconvCallback)
    assert callback.layers == ["net.1", "features.*"]
    assert callback.channels == [0, 3]
    assert callback.compare == ("NeuronDeconvolution",)
    assert callback.figures == {"grid", "evolution", "numbers"}
    assert (callback.top_k, callback.every_n_train_steps, callback.max_bytes) == (4, 100, 1_000_000)
    every = text.replace("[0, 3]", "all")
    (callback,) = parser.instantiate_classes(parser.parse_string(every)).callbacks
    assert callback.channels == "all"
    bare = "callbacks: [{class_path: lit_deconv.callbacks.DeconvCallback}]"
    (default,) = parser.instantiate_classes(parser.parse_string(bare)).callbacks
    assert default.layers is None
    assert (default.probe, default.channels, default.top_k) == (8, 16, 9)
