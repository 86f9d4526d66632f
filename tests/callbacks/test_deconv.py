"""What the callback logs, in each kind of run and for each kind of model."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callback_models import (
    EPOCHS,
    LitNet,
    equal,
    expected_tags,
    hooks_on,
    images_and_labels,
    loader,
    pictures,
    random_states,
    recorded,
    scalars,
    seeded,
    tiny_net,
    trainer,
)
from callback_models import compiled as compile_it
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lit_deconv.callbacks import DeconvCallback, gallery
from lit_deconv.callbacks import pictures as drawing
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from lit_deconv import Deconvnet
from lit_deconv.render import crop_boxes, shift_boxes, shift_patches

TAGS = expected_tags("net.1", "net.4")


def small(**options: Any) -> DeconvCallback:
    """As few pictures as there can be."""
    given: dict[str, Any] = {"channels": 2, "probe": 2, "compare_images": 1, "on_error": "raise"}
    return DeconvCallback(**(given | options))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[drawing.LayerPictures]:
    """What every figure was made from, in order."""
    seen: list[drawing.LayerPictures] = []
    from lit_deconv.callbacks import session

    original = session.draw

    def draw(*args: Any) -> Any:
        for layer in original(*args):
            seen.append(layer)
            yield layer

    monkeypatch.setattr(session, "draw", draw)
    return seen


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the title of every figure says besides layer and epoch."""
    seen: list[str] = []
    hang = gallery.Gallery.hang

    def noting(*args: Any) -> Any:
        seen.append(args[-1])
        return hang(*args)

    monkeypatch.setattr(gallery.Gallery, "hang", noting)
    return seen


# ---- what is logged ------------------------------------------------------------------------------


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


# ---- which runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_validate_and_test(verb: str, tmp_path: Path) -> None:
    model = LitNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random_states()
    run = trainer(tmp_path, small())
    (metrics,) = getattr(run, verb)(model, loader(), verbose=False)
    assert pictures(tmp_path).keys() == (
        expected_tags("net.1", "net.4", fitting=False)
        if verb == "validate"
        else expected_tags("net.1", "net.4", tag="deconv_test", fitting=False)
    )
    assert not any(name.startswith("deconv") for name in metrics)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert random_states()[:2] == states[:2]
    assert hooks_on(model) == 0


def test_without_a_validation_loop_the_training_batch_is_the_probe(
    tmp_path: Path, drawn: list
) -> None:
    def fit(folder: Path, *callbacks: pl.Callback) -> dict[str, Tensor]:
        seeded()
        model = LitNet(tiny_net(norm=True, p=0.5))
        trainer(folder, *callbacks).fit(model, loader())
        assert hooks_on(model) == 0
        return model.state_dict()

    without, seen = fit(tmp_path / "without"), fit(tmp_path / "with", small())
    assert all(torch.equal(without[name], value) for name, value in seen.items())
    found = pictures(tmp_path / "with")
    assert found.keys() == expected_tags("net.2", "net.5")
    assert all(len(each) == EPOCHS for each in found.values())
    assert torch.equal(drawn[0].rows[0].panels[0].image, images_and_labels()[0][0])


def test_a_loader_without_length(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from zip(*images_and_labels(), strict=True)

    callback = small(probe=6)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(LitNet(), loader(), DataLoader(Stream(), 4))
    assert pictures(tmp_path).keys() == TAGS
    assert callback.state_dict()["probe"] == {0: [0, 1, 2, 3], 1: [0, 2]}


def test_two_validation_loaders_give_one_probe(tmp_path: Path) -> None:
    class Two(LitNet):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch))

    trainer(tmp_path, small(), max_epochs=1).fit(Two(), loader(), [loader(), loader()])
    assert pictures(tmp_path).keys() == TAGS


def test_a_dry_run_leaves_no_file(tmp_path: Path) -> None:
    run = trainer(tmp_path, small(), fast_dev_run=True)
    run.fit(LitNet(), loader(), loader())
    assert not list(tmp_path.rglob("*"))


def test_without_a_logger_for_images_files_are_written_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, small(), logger=CSVLogger(tmp_path, name="csv"))
    run.fit(LitNet(), loader(), loader())
    assert len(list(tmp_path.rglob("*.png"))) == EPOCHS * len(TAGS)
    assert sum("PNG files" in record.getMessage() for record in caplog.records) == 1
    assert (tmp_path / "csv/version_0/metrics.csv").read_text().count("cosine_Deconv") == 2


@pytest.mark.parametrize("ours_first", [True, False])
def test_averaged_weights_are_those_that_were_validated(
    ours_first: bool, tmp_path: Path, drawn: list, notes: list[str]
) -> None:
    validated: list[Tensor] = []
    trained: list[Tensor] = []

    class Noting(LitNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            validated.append(self.net[0].weight.detach().clone())

        def on_train_batch_end(self, *args: Any) -> None:
            trained.append(self.net[0].weight.detach().clone())

    both: list[pl.Callback] = [small(layers="net.0"), EMAWeightAveraging(decay=0.5)]
    both = both if ours_first else both[::-1]
    model = Noting()
    with torch.no_grad():
        model.net[0].bias.zero_()
    model.net[0].bias.requires_grad_(False)
    trainer(tmp_path, *both).fit(model, loader(), loader())
    images = images_and_labels()[0]
    recomputed = functional.conv2d(images, validated[-1].cpu(), padding=1).amax((0, 2, 3))
    shown = {c.channel: c.activations[0] for c in drawn[-1].channels}
    assert not torch.equal(validated[-1], trained[-1])
    for channel, value in shown.items():
        assert value == pytest.approx(float(recomputed[channel]), rel=1e-5)
    assert "Weights: averaged." in notes[-1]


def test_weights_that_changed_before_the_picture_are_told(tmp_path: Path, notes: list[str]) -> None:
    class Swapping(pl.Callback):
        def on_validation_batch_end(
            self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *index: int
        ) -> None:
            if index[0] == 1 and self.active:
                with torch.no_grad():
                    pl_module.net[0].weight.mul_(3)

        active = False

    swapping = Swapping()
    for active in (False, True):
        notes.clear()
        swapping.active = active
        run = trainer(tmp_path / str(active), swapping, small(probe=8), max_epochs=1)
        run.fit(LitNet(), loader(), loader())
        assert notes
        assert all(("Not what validation saw" in note) == active for note in notes)


def test_it_can_be_copied_and_pickled_after_a_run(tmp_path: Path) -> None:
    callback = small()
    trainer(tmp_path, callback, max_epochs=1).fit(LitNet(), loader(), loader())
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert equal(other.state_dict(), callback.state_dict())
        assert other.state_key == callback.state_key


# ---- which models ----------------------------------------------------------------------------------


class Encoder(LitNet):
    """Calls `self.net(x)`, never itself, and reads its output with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.head(self.net(images)), labels)


class DictBatch(LitNet):
    """Takes the batch as it comes from the loader."""

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch["image"])

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self({"label": labels, "image": images}), labels)


class Augmenting(LitNet):
    """Changes the images on the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return images * 2 + 1, labels


def test_an_encoder_that_is_called_by_itself(tmp_path: Path, drawn: list) -> None:
    trainer(tmp_path, small(), max_epochs=1).fit(Encoder(), loader(), loader())
    assert pictures(tmp_path).keys() == TAGS
    assert drawn[0].rows[0].panels[4].note == (
        "no class comparison: the output is no logits, head reads it"
    )
    assert "deconv/net.1/cosine_Deconvolution" not in scalars(tmp_path)
    assert "deconv/net.1/cosine_NeuronDeconvolution" in scalars(tmp_path)


class Named(nn.Module):
    """Gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_net()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(images)}


class Squared(LitNet):
    """Takes any output for its loss."""

    def loss(self, batch: Any) -> Tensor:
        given = self(batch[0])
        return (given["logits"] if isinstance(given, dict) else given).square().mean()


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Named(), "the model gives a dict, no logits"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
            "the model gives [1, 4, 6, 6], no logits [N, classes]",
        ),
        (tiny_net(classes=1), "the model gives [1, 1], no logits [N, classes]"),
    ],
    ids=["dict", "maps", "one number"],
)
def test_an_output_that_is_no_logits(
    net: nn.Module, reason: str, tmp_path: Path, drawn: list
) -> None:
    trainer(tmp_path, small(), max_epochs=1).fit(Squared(net), loader(), loader())
    for layer in drawn:
        for row in (*layer.rows, *layer.strongest_rows):
            assert row.panels[-1].image is None
            assert row.panels[-1].note == f"no class comparison: {reason}"
            assert row.panels[-2].image is not None
            assert "predicted class" not in row.label
    assert not any("cosine_Deconvolution" in name for name in scalars(tmp_path))


@pytest.mark.parametrize("key", [None, "image"])
def test_a_dict_batch(key: str | None, tmp_path: Path, drawn: list) -> None:
    trainer(tmp_path, small(input_key=key), max_epochs=1).fit(DictBatch(), loader(), loader())
    assert pictures(tmp_path).keys() == TAGS
    assert torch.equal(drawn[0].rows[0].panels[0].image, images_and_labels()[0][0])


def test_augmentation_on_the_device_is_in_the_picture(tmp_path: Path, drawn: list) -> None:
    trainer(tmp_path, small(), max_epochs=1).fit(Augmenting(), loader(), loader())
    assert torch.equal(drawn[0].rows[0].panels[0].image, images_and_labels()[0][0] * 2 + 1)


@pytest.mark.parametrize(("channels", "shown"), [(1, None), (5, None), (5, 2), (5, [4, 1, 0])])
def test_images_of_other_than_three_channels(channels: int, shown: Any, tmp_path: Path) -> None:
    model = LitNet(tiny_net(channels))
    run = trainer(tmp_path, small(show_channels=shown), max_epochs=1)
    run.fit(model, loader(channels=channels), loader(channels=channels))
    assert pictures(tmp_path).keys() == TAGS


@pytest.mark.parametrize("compiled", [False, True])
def test_a_functional_rectifier_gets_a_reason_instead_of_a_number(
    compiled: bool, tmp_path: Path, drawn: list
) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.more = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.fc = nn.Linear(64, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.more(functional.relu(self.conv(images))).relu().flatten(1))

    net = compile_it(Functional()) if compiled else Functional()
    trainer(tmp_path, small(layers="net.more"), max_epochs=1).fit(LitNet(net), loader(), loader())
    panels = drawn[0].rows[0].panels
    assert [panel.name for panel in panels[3:]] == [
        "Captum NeuronDeconvolution x activation",
        "Captum Deconvolution",
    ]
    assert all("Captum is wrong here" in panel.note for panel in panels[3:])
    assert all("relu" in panel.note for panel in panels[3:])
    assert all(panel.image is not None for panel in panels[3:])
    assert not any("cosine" in name for name in scalars(tmp_path))


def test_images_of_the_users_own(tmp_path: Path, drawn: list) -> None:
    own = torch.randn(3, 3, 8, 8)
    path = tmp_path / "own.pt"
    torch.save(own, path)
    for probe in (own, str(path)):
        drawn.clear()
        folder = tmp_path / type(probe).__name__
        callback = small(probe=probe, compare_images=3)
        trainer(folder, callback, max_epochs=1).fit(LitNet(), loader(), loader())
        shown = torch.stack([row.panels[0].image for row in drawn[0].rows])
        assert torch.equal(shown, own)


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


def test_a_compiled_model_says_what_was_run(tmp_path: Path, drawn: list, notes: list[str]) -> None:
    net = compile_it(tiny_net())
    run = trainer(tmp_path, small(), max_epochs=1)
    run.fit(LitNet(net), loader(), loader())
    assert pictures(tmp_path).keys() == TAGS
    assert all("The compiled model's Python code was run" in note for note in notes)
    assert "deconv/net.1/never_fires_on_probe" in run.callback_metrics
    assert "deconv/net.1/never_fires" not in run.callback_metrics
    assert torch.equal(drawn[0].rows[0].panels[0].image, images_and_labels()[0][0])


@pytest.mark.parametrize("manual", [False, True])
def test_a_compiled_model_without_validation(manual: bool, tmp_path: Path) -> None:
    class Manual(LitNet):
        automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            if manual:
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    def fit(folder: Path, *callbacks: pl.Callback) -> dict[str, Tensor]:
        torch._dynamo.reset()
        seeded()
        model = Manual(compile_it(tiny_net()))
        trainer(folder, *callbacks, max_epochs=1).fit(model, loader())
        return model.state_dict()

    without = fit(tmp_path / "without")
    seen, warned = recorded(lambda: fit(tmp_path / "with", small(on_error="warn")))
    assert all(torch.equal(without[name], value) for name, value in seen.items())
    if manual:
        assert any("manual optimization" in text for text in warned)
    else:
        assert pictures(tmp_path / "with").keys() == TAGS


# ---- what is kept ------------------------------------------------------------------------------------


def test_a_run_that_is_continued_keeps_its_choices(tmp_path: Path, drawn: list) -> None:
    first = small(layers="net.1", every_n_epochs=2)
    run = trainer(tmp_path / "a", first, max_epochs=3)
    run.fit(LitNet(), loader(), loader())
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"][first.state_key]
    history = saved.pop("history")
    assert [each["epoch"] for each in history["net.1"]["moments"]] == [0, 2]
    assert saved == {
        "layers": ["net.1"],
        "module": "",
        "channels": 2,
        "probe": {0: [0], 1: [0]},
        "epoch": 2,
        "step": 6,
    }
    before = [layer.rows[0].panels[0].image for layer in drawn]
    drawn.clear()
    second = small(layers="net.1", every_n_epochs=2)
    more = trainer(tmp_path / "b", second, max_epochs=5)
    more.fit(LitNet(), loader(), loader(), ckpt_path=path)
    assert len(drawn) == 1
    assert torch.equal(drawn[0].rows[0].panels[0].image, before[0])
    assert [list(row.epochs) for row in drawn[0].evolution] == [[0, 2, 4]] * 2


def test_two_on_one_trainer_do_not_collide(tmp_path: Path) -> None:
    both = small(layers="net.1"), small(layers="net.4")
    assert both[0].state_key != both[1].state_key
    trainer(tmp_path, *both, max_epochs=1).fit(LitNet(), loader(), loader())
    assert pictures(tmp_path).keys() == {
        *expected_tags("net.1"),
        *expected_tags("net.4", tag="deconv_2"),
    }


def test_two_that_log_different_things_of_the_same_layers(tmp_path: Path, drawn: list) -> None:
    both = small(layers="net.1", log=["grid"]), small(layers="net.1", log=["evolution"])
    run = trainer(tmp_path, *both, max_epochs=1)
    run.fit(LitNet(), loader(), loader())
    assert pictures(tmp_path).keys() == {"deconv/net.1/grid", "deconv_2/net.1/evolution"}
    # the hooks of one do not take what the other runs for more images of the validation
    assert [layer.ranked for layer in drawn] == [8, 8]
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    assert {callback.state_key for callback in both} <= saved.keys()


def test_no_two_write_under_one_name(tmp_path: Path) -> None:
    tags = ["x", "x", "x_2", "x"]
    run = trainer(tmp_path, *(small(tag=tag, channels=n + 1) for n, tag in enumerate(tags)))
    given = [callback._tag_among(run) for callback in run.callbacks[:4]]  # type: ignore[attr-defined]
    assert given == ["x", "x_3", "x_2", "x_4"]


def test_a_checkpoint_is_kept_by_a_number_of_ours(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="deconv/net.1/never_fires", save_top_k=1)
    run = trainer(tmp_path / "run", small(every_n_epochs=2), best, enable_checkpointing=True)
    run.fit(LitNet(), loader(), loader())
    assert best.best_model_score == run.callback_metrics["deconv/net.1/never_fires"]
    assert Path(best.best_model_path).exists()


def test_trained_weights_beside_averaged_ones_are_told(tmp_path: Path, notes: list[str]) -> None:
    # without a validation nothing puts the averaged ones in their place
    both = small(layers="net.1"), EMAWeightAveraging(decay=0.5)
    trainer(tmp_path, *both, max_epochs=1).fit(LitNet(), loader())
    assert all("not averaged" in note for note in notes)
    assert notes


def test_fit_then_validate_then_another_model(tmp_path: Path) -> None:
    callback = small()
    run = trainer(tmp_path / "fit", callback, max_epochs=1)
    run.fit(LitNet(), loader(), loader())
    other = LitNet(tiny_net(1))
    again = trainer(tmp_path / "other", callback)
    again.validate(other, loader(channels=1), verbose=False)
    found = pictures(tmp_path / "other").keys()
    assert found == expected_tags("net.1", "net.4", fitting=False)


# ---- other ways in -------------------------------------------------------------------------------------


def test_the_trainer_of_the_other_package_name(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import pytorch_lightning, torch
from torch.nn import functional
from callback_models import loader, pictures, tiny_net
from lit_deconv.callbacks import DeconvCallback, gallery

class Lit(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = tiny_net()
    def forward(self, images):
        return self.net(images)
    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

trainer = pytorch_lightning.Trainer(
    max_epochs=1, accelerator="cpu", default_root_dir={str(tmp_path)!r}, devices=1,
    callbacks=[DeconvCallback(channels=2, probe=2, compare_images=1, on_error="raise")],
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
)
trainer.fit(Lit(), loader(), loader())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pictures(tmp_path).keys() == TAGS


def test_no_warning_where_nothing_fails(tmp_path: Path) -> None:
    _, given = recorded(
        lambda: trainer(tmp_path, small(on_error="warn")).fit(LitNet(), loader(), loader())
    )
    assert not [text for text in given if "Deconv" in text]
