"""What the callback logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callback_models import (
    EPOCHS,
    LitNet,
    expected_tags,
    images_and_labels,
    loader,
    pictures,
    scalars,
    seeded,
    small,
    trainer,
)
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from lit_deconv import Deconvnet
from lit_deconv.render import crop_boxes, shift_boxes, shift_patches

TAGS = expected_tags("net.1", "net.4")


def test_pictures_and_numbers_at_lightnings_own_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, small())
    run.fit(LitNet(), loader(), loader())
    found, numbers = pictures(tmp_path), scalars(tmp_path)
    steps = numbers["val_loss"].keys()
    assert found.keys() == TAGS
    assert len(steps) == EPOCHS
    assert all(each.keys() == steps for each in found.values())
    for layer in ("net.1", "net.4"):
        for name in ("NeuronDeconvolution", "Deconvolution"):
            assert numbers[f"deconv/{layer}/cosine_{name}"].keys() == steps
            assert numbers[f"deconv/{layer}/rank_{name}"].keys() == steps
        cosines = list(numbers[f"deconv/{layer}/cosine_NeuronDeconvolution"].values())
        assert cosines == pytest.approx([1] * EPOCHS)
        assert numbers[f"deconv/{layer}/never_fires"].keys() == steps
        assert f"deconv/{layer}/never_fires" in run.callback_metrics
    assert numbers["deconv/seconds"].keys() == steps
    assert all(min(p.size) >= 96 for each in found.values() for p in each.values())


def test_what_is_drawn_is_what_the_engine_gives(tmp_path: Path, drawn: list) -> None:
    seeded()
    model = LitNet()
    trainer(tmp_path, small(probe=8), max_epochs=1).fit(model, loader(), loader())
    images, _ = images_and_labels()
    moved = 0
    for layer in drawn:
        net = Deconvnet(model, layer.layer)
        activations = net.activations(images)
        best = activations.amax((2, 3))
        total = len(best[0])
        assert [c.channel for c in layer.channels] == [0, total // 2]
        for shown in layer.channels:
            values, order = best[:, shown.channel].sort(descending=True)
            assert shown.activations == pytest.approx(values.tolist(), rel=1e-4)
            assert shown.fires == float((values > 0).float().mean())
            place = activations[order[0], shown.channel].flatten().argmax()
            wide = activations.shape[-1]
            unit = torch.tensor([[order[0], shown.channel, place // wide, place % wide]])
            (back,), ((top, left, bottom, right),) = net.reconstruct(images, unit, crop=True)
            box = torch.tensor([[top, left, bottom, right]])
            window = shift_boxes(box, 8, 8)
            moved += int(not torch.equal(window, box))
            moved_back = shift_patches(back[None], box, window)[0]
            assert torch.allclose(shown.reconstructions[0], moved_back, atol=1e-5)
            assert torch.equal(shown.patches[:1], crop_boxes(images[order[:1]], window))
        assert torch.equal(layer.health.dead, (best <= 0).all(0))
        whole = Deconvnet(model, layer.layer).attribute(images[:1])
        (row,) = layer.rows
        assert [p.name for p in row.panels][:3] == ["input", "whole layer", "single unit"]
        assert torch.equal(row.panels[0].image, images[0])
        assert torch.allclose(row.panels[1].image, whole[0], atol=1e-6)
    assert moved


class Frozen(LitNet):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0)


def test_the_share_that_never_fires_is_of_all_validation_images(tmp_path: Path) -> None:
    model = Frozen()
    with torch.no_grad():
        model.net[0].weight[:3], model.net[0].bias[:3] = 0, -1
    run = trainer(tmp_path, small(layers="net.1"), max_epochs=1, limit_train_batches=1)
    run.fit(model, loader(), loader())
    assert float(run.callback_metrics["deconv/net.1/never_fires"]) == 0.75


def test_the_same_probe_all_run_long(tmp_path: Path, drawn: list) -> None:
    run = trainer(tmp_path, small(layers="net.1"), max_epochs=3)
    run.fit(LitNet(), loader(shuffle=True), loader(shuffle=True))
    inputs = [layer.rows[0].panels[0].image for layer in drawn]
    assert len(inputs) == 3
    assert all(torch.equal(inputs[0], image) for image in inputs)


def test_every_nth_epoch(tmp_path: Path) -> None:
    callback = small(layers="net.1", every_n_epochs=2)
    trainer(tmp_path, callback, max_epochs=5).fit(LitNet(), loader(), loader())
    steps = sorted(scalars(tmp_path)["val_loss"])
    assert sorted(pictures(tmp_path)["deconv/net.1/grid"]) == steps[::2]


def test_every_nth_epoch_with_rare_validations(tmp_path: Path) -> None:
    callback = small(layers="net.1", every_n_epochs=2)
    run = trainer(tmp_path, callback, max_epochs=4, check_val_every_n_epoch=2)
    run.fit(LitNet(), loader(), loader())
    assert len(pictures(tmp_path)["deconv/net.1/grid"]) == 2


def test_early_stopping_can_monitor_a_number(tmp_path: Path) -> None:
    stop = EarlyStopping("deconv/net.1/cosine_NeuronDeconvolution", mode="max", patience=1)
    run = trainer(tmp_path, stop, small(), max_epochs=9)
    run.fit(LitNet(), loader(), loader())
    assert run.current_epoch < 9


def test_chosen_channels_and_globs(tmp_path: Path, drawn: list) -> None:
    callback = small(layers=["net.[14]"], channels=[3, 0])
    trainer(tmp_path, callback, max_epochs=1).fit(LitNet(), loader(), loader())
    assert [layer.layer for layer in drawn] == ["net.1", "net.4"]
    assert [[c.channel for c in layer.channels] for layer in drawn] == [[3, 0]] * 2


def test_normalisation_from_the_data_module(tmp_path: Path) -> None:
    class Module(pl.LightningDataModule):
        mean, std = (0.1, 0.2, 0.3), (1.0, 1.0, 2.0)

        def train_dataloader(self) -> DataLoader:
            return loader()

        val_dataloader = train_dataloader

    callback = small()
    run = trainer(tmp_path, callback, max_epochs=1)
    assert callback._look.warning
    run.fit(LitNet(), Module())
    assert (callback._look.mean, callback._look.std) == ([0.1, 0.2, 0.3], [1.0, 1.0, 2.0])
    assert not callback._look.warning


# ---- beside Captum ----------------------------------------------------------------------------------


def test_any_of_captums_attributions_beside(tmp_path: Path, drawn: list) -> None:
    callback = small(compare=["Saliency", "NeuronGradient", "GuidedGradCam"])
    trainer(tmp_path, callback, max_epochs=1).fit(LitNet(), loader(), loader())
    assert [panel.name for panel in drawn[0].rows[0].panels[3:]] == [
        "Captum Saliency",
        "Captum NeuronGradient x activation",
        "Captum GuidedGradCam",
    ]
    assert all(panel.image is not None for panel in drawn[0].rows[0].panels)


def test_the_strongest_unit_of_a_few_channels_beside_captum(tmp_path: Path, drawn: list) -> None:
    callback = small(channels="all", compare_images=3)
    trainer(tmp_path, callback, max_epochs=1).fit(LitNet(), loader(), loader())
    for layer in drawn:
        total = len(layer.channels)
        wanted = [index * total // 3 for index in range(3)]
        assert len(layer.strongest_rows) == 3
        for channel, row in zip(wanted, layer.strongest_rows, strict=True):
            shown, (image, patch, unit, neuron, of_class) = layer.channels[channel], row.panels
            assert row.label.startswith(f"strongest of channel {channel} at row ")
            assert f"activation {shown.activations[0]:.3g}" in row.label
            # all cut to the window that figure 2 shows
            assert torch.equal(patch.image, shown.patches[0])
            assert torch.allclose(unit.image, shown.reconstructions[0], atol=1e-6)
            assert neuron.image.shape == of_class.image.shape == unit.image.shape
            assert any(torch.equal(image.image, each) for each in images_and_labels()[0])
            if shown.fires:
                assert "with the single unit: cosine 1.00, rank " in neuron.note
                assert torch.allclose(neuron.image, unit.image, atol=1e-5)
            assert "with the single unit: " in of_class.note


def test_units_that_are_no_longer_what_they_were_are_not_compared(
    tmp_path: Path, drawn: list
) -> None:
    class Swapping(pl.Callback):
        def on_validation_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *index: int
        ) -> None:
            if index[0] == 1:
                with torch.no_grad():
                    pl_module.net[0].weight.mul_(3)

    run = trainer(tmp_path, Swapping(), small(layers="net.0"), max_epochs=1)
    run.fit(LitNet(), loader(), loader())
    assert drawn[0].strongest_rows == []
    assert drawn[0].doubtful


def test_without_comparison(tmp_path: Path) -> None:
    trainer(tmp_path, small(compare=[]), max_epochs=1).fit(LitNet(), loader(), loader())
    assert pictures(tmp_path).keys() == {tag for tag in TAGS if "captum" not in tag}


@pytest.mark.parametrize(
    "figure", ["grid", "evolution", "filters", "strongest_beside_captum", "beside_captum"]
)
def test_one_figure_alone(figure: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, small(log=[figure]), max_epochs=1)
    run.fit(LitNet(), loader(), loader())
    assert pictures(tmp_path).keys() == {tag for tag in TAGS if tag.endswith(f"/{figure}")}
    assert not any("never_fires" in name for name in run.callback_metrics)
