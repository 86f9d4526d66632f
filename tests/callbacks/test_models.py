"""For which models, batches and images the callback works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callback_models import (
    LitNet,
    expected_tags,
    images_and_labels,
    loader,
    pictures,
    recorded,
    scalars,
    seeded,
    small,
    tiny_net,
    trainer,
)
from callback_models import compiled as compile_it
from torch import Tensor, nn
from torch.nn import functional

TAGS = expected_tags("net.1", "net.4")


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
