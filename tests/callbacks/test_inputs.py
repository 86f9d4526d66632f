"""Images of every kind, validations of every rhythm: all pictures, or a warning that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_models import (
    LitNet,
    expected_tags,
    loader,
    pictures,
    recorded,
    scalars,
    tiny_net,
    trainer,
)
from lightning.pytorch.loggers import CSVLogger
from lit_deconv.callbacks import DeconvCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

TAGS = expected_tags("net.1", "net.4")


def any_size(last: nn.Module | None = None) -> nn.Module:
    """`tiny_net` for images of any size; its rectifiers have the same names."""
    return nn.Sequential(
        *list(tiny_net().children())[:5],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        last or nn.Linear(5, 3),
    )


class Images(IterableDataset):
    """Random images of given shapes, one after another."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self.shapes = shapes

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        generator = torch.Generator().manual_seed(0)
        for number, shape in enumerate(self.shapes):
            yield torch.randn(shape, generator=generator), number % 3


def fit(
    folder: Path, model: Any, train: Any, val: Any, probe: Any = 2, **options: Any
) -> list[str]:
    """What the callback warned of in one epoch, or in as many as asked for."""
    callback = DeconvCallback(channels=2, probe=probe, compare_images=1)
    run = trainer(folder, callback, **({"max_epochs": 1} | options))
    _, warned = recorded(lambda: run.fit(model, train, val))
    return [text for text in warned if "DeconvCallback" in text]


# ---- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_of_the_whole_model(precision: Any, tmp_path: Path) -> None:
    assert fit(tmp_path, LitNet(), loader(), loader(), precision=precision) == []
    assert pictures(tmp_path).keys() == TAGS
    cosine = next(iter(scalars(tmp_path)["deconv/net.4/cosine_NeuronDeconvolution"].values()))
    assert cosine == pytest.approx(1, abs=1e-6 if precision == "64-true" else 1e-2)


@pytest.mark.parametrize("shapes", [[(3, 8, 20)] * 6, [(3, 8, 8)]], ids=["oblong", "single"])
def test_oblong_images_and_a_single_one(shapes: Any, tmp_path: Path) -> None:
    model, val = LitNet(any_size()), DataLoader(Images(*shapes), 4)
    assert fit(tmp_path, model, loader(), val) == []
    assert pictures(tmp_path).keys() == TAGS


def test_images_of_many_sizes_are_drawn_in_the_first_and_told_in_one_sentence(
    tmp_path: Path,
) -> None:
    sizes = [(3, 8, 8), (3, 8, 8), *((3, 8 + n, 9) for n in range(9))]
    (text,) = fit(tmp_path, LitNet(any_size()), loader(), DataLoader(Images(*sizes), 1))
    assert text.startswith("DeconvCallback drew no picture of some images: ValueError: ")
    assert "images of [3, 8, 9] after some of [3, 8, 8]" in text
    assert "resize them to one" in text
    assert "and 6 causes more" in text
    assert pictures(tmp_path).keys() == TAGS


def test_volumes_are_no_images(tmp_path: Path) -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv3d(3, 4, 3), nn.Linear(288, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(x).relu().flatten(1))

    volumes = DataLoader(Images(*[(3, 4, 8, 8)] * 4), 2)
    (text,) = fit(tmp_path, LitNet(Volume()), volumes, volumes)
    assert "no module was given a batch of images [N, C, H, W]" in text
    assert "net.conv(float32 [2, 3, 4, 8, 8])" in text


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 12, 10)])
def test_own_images_that_the_model_does_not_take(shape: tuple[int, ...], tmp_path: Path) -> None:
    (text,) = fit(tmp_path, LitNet(), loader(), loader(), probe=torch.randn(shape), max_epochs=2)
    assert f"no picture of the images given as probe=: ValueError: they are {[*shape[1:]]}" in text
    assert "which is given [3, 8, 8] in validation" in text
    assert "give images of that size" in text
    # the validation's take their place
    assert pictures(tmp_path).keys() == TAGS


def test_own_images_of_another_size_that_the_model_takes(tmp_path: Path) -> None:
    own = torch.randn(2, 3, 12, 10)
    assert fit(tmp_path, LitNet(any_size()), loader(), loader(), probe=own) == []
    assert pictures(tmp_path).keys() == TAGS


def test_a_layer_that_runs_twice(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.relu, self.last = nn.ReLU(), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.relu(self.second(self.relu(self.first(x)))).flatten(1))

    callback = DeconvCallback("net.relu", channels=2, probe=2)
    run = trainer(tmp_path, callback, max_epochs=1)
    _, warned = recorded(lambda: run.fit(LitNet(Shared()), loader(), loader()))
    (text,) = [text for text in warned if "DeconvCallback" in text]
    assert "'net.relu' runs 2 times" in text
    assert "choose a layer that runs once, such as the module around it" in text


# ---- when, and where to ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"val_check_interval": 0.5}, 4),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 2),
        ({"check_val_every_n_epoch": 2}, 1),
        ({"limit_val_batches": 1}, 2),
    ],
    ids=str,
)
def test_each_validation_has_all_its_pictures(
    options: dict[str, Any], validations: int, tmp_path: Path
) -> None:
    train = loader(count=16)
    assert fit(tmp_path, LitNet(), train, loader(), max_epochs=2, **options) == []
    found, steps = pictures(tmp_path), scalars(tmp_path)["val_loss"].keys()
    assert found.keys() == TAGS
    assert len(steps) == validations
    assert all(each.keys() == steps for each in found.values())


def test_a_validation_that_is_switched_off_leaves_the_training_batch(tmp_path: Path) -> None:
    assert fit(tmp_path, LitNet(), loader(), loader(), limit_val_batches=0) == []
    assert pictures(tmp_path).keys() == TAGS


@pytest.mark.parametrize("logger", [CSVLogger, None])
def test_files_lie_by_their_names_in_the_log_folder(logger: Any, tmp_path: Path) -> None:
    given = logger(tmp_path, name="csv", version=0) if logger else False
    assert fit(tmp_path, LitNet(), loader(), loader(), logger=given) == []
    folder = tmp_path / "csv/version_0" if logger else tmp_path
    files = [path.relative_to(folder) for path in tmp_path.rglob("*.png")]
    assert {path.parent.as_posix() for path in files} == TAGS
