"""The data modules, on pictures made on the spot, and the packaged configs that name them."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torchvision import datasets

from lit_deconv.examples.composites import CLASS_NAMES, CompositePictures
from lit_deconv.examples.datamodules import CIFAR10, Composites, ImageFolder
from lit_deconv.examples.zfnet import ZFNet

COLOURS = {"blue": (20, 20, 230), "green": (20, 220, 30), "red": (230, 30, 20)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """JPEG pictures of one colour each, of different sizes, one of them grey."""
    for split, count in (("train", 10), ("val", 4)):
        for name, colour in COLOURS.items():
            home = tmp_path / "pictures" / split / name
            home.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 50), colour).save(home / f"{i}.jpg", quality=95)
    Image.new("L", (30, 30), 128).save(tmp_path / "pictures/train/red/grey.jpg")
    return tmp_path / "pictures"


def _undo(images: torch.Tensor, datamodule: Any) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (datamodule.mean, datamodule.std))
    return images * std + mean


def test_composites_loads_normalised_pictures(tmp_path: Path) -> None:
    datamodule = Composites(40, 20, cache=str(tmp_path), batch_size=10)
    datamodule.prepare_data()
    datamodule.setup("fit")
    images, labels = next(iter(datamodule.val_dataloader()))
    expected = CompositePictures("val", 20, cache=tmp_path)
    torch.testing.assert_close(
        _undo(images, datamodule), torch.stack([expected[i][0] for i in range(10)])
    )
    assert labels.tolist() == list(range(10))
    assert datamodule.class_names == list(CLASS_NAMES)
    assert len(datamodule.train_dataloader()) == 4


def test_training_is_shuffled_and_validation_is_not(tmp_path: Path) -> None:
    datamodule = Composites(40, 20, cache=str(tmp_path), batch_size=20)
    datamodule.setup("fit")
    train = [next(iter(datamodule.train_dataloader()))[1].tolist() for _ in range(2)]
    assert train[0] != train[1]
    val = [next(iter(datamodule.val_dataloader()))[1].tolist() for _ in range(2)]
    assert val[0] == val[1]


def test_loaders_before_setup_say_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="call prepare_data\\(\\) and setup\\(\\) first"):
        Composites().train_dataloader()


@pytest.mark.parametrize("augmentation", [True, False])
def test_image_folder_reads_pictures_of_any_size(folder: Path, augmentation: bool) -> None:
    datamodule = ImageFolder(
        str(folder), image_size=32, batch_size=4, num_workers=0, augmentation=augmentation
    )
    assert datamodule.class_names == ["blue", "green", "red"]
    assert datamodule.num_classes == 3
    datamodule.setup("fit")
    for images, labels in datamodule.val_dataloader():
        assert images.shape[1:] == (3, 32, 32)
        for image, label in zip(_undo(images, datamodule), labels.tolist(), strict=True):
            colour = torch.tensor(list(COLOURS.values())[label]) / 255
            assert float((image.mean((1, 2)) - colour).abs().max()) < 0.02
    batches = list(datamodule.train_dataloader())
    assert sum(len(labels) for _, labels in batches) == 28  # 31, less an incomplete batch
    assert all(images.shape[1:] == (3, 32, 32) for images, _ in batches)


def test_augmentation_varies_training_alone(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    for split in ("train", "val"):
        for name in ("a", "b"):
            home = tmp_path / split / name
            home.mkdir(parents=True)
            Image.fromarray(ramp).save(home / "ramp.png")
    varied = ImageFolder(str(tmp_path), 32, num_workers=0)
    plain = ImageFolder(str(tmp_path), 32, num_workers=0, augmentation=False)
    for datamodule in (varied, plain):
        datamodule.setup("fit")
    torch.manual_seed(0)
    assert not torch.equal(varied.train_set[0][0], varied.train_set[0][0])
    assert torch.equal(varied.val_set[0][0], varied.val_set[0][0])
    assert torch.equal(plain.train_set[0][0], plain.train_set[0][0])


def test_image_folder_says_how_pictures_are_expected(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"CLASS/picture\.jpg, in both train and val"):
        ImageFolder(str(folder / "nowhere")).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no class folders in .*nowhere"):
        _ = ImageFolder(str(folder / "nowhere")).num_classes
    (folder / "val" / "violet").mkdir()
    with pytest.raises(ValueError, match="only one of them has violet"):
        ImageFolder(str(folder)).setup("fit")


def test_cifar10_downloads_and_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchvision's data set replaced: there is no network in tests."""
    calls = []

    class Fake:
        def __init__(
            self, root: str, train: bool, transform: Any = None, download: bool = False
        ) -> None:
            calls.append((root, train, download))
            self.transform = transform
            self.side = Image.new("RGB", (32, 32), (255, 0, 0))

        def __len__(self) -> int:
            return 256 if self.transform else 0

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return self.transform(self.side), index % 10

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    datamodule = CIFAR10(str(tmp_path), num_workers=0)
    datamodule.prepare_data()
    assert calls == [(str(tmp_path), True, True)]
    datamodule.setup("fit")
    images, _ = next(iter(datamodule.val_dataloader()))
    assert images.shape == (128, 3, 32, 32)
    red = _undo(images, datamodule)[0, :, 5, 5]
    torch.testing.assert_close(red, torch.tensor([1.0, 0, 0]), atol=1e-6, rtol=0)
    assert next(iter(datamodule.train_dataloader()))[0].shape == (128, 3, 32, 32)
    assert datamodule.num_classes == 10


def test_the_classes_of_the_network_follow_from_the_folder(folder: Path, tmp_path: Path) -> None:
    datamodule = ImageFolder(str(folder), image_size=32, batch_size=8, num_workers=0)
    net = ZFNet(width=8)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, datamodule=datamodule)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    loaded = ZFNet.load_from_checkpoint(tmp_path / "net.ckpt", weights_only=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert loaded(images).shape == (2, 3)
    assert torch.equal(loaded(images), net.eval()(images))


class _StandIn(Callback):
    """In the place of the callback that the configs name."""


def _configs() -> list[str]:
    return sorted(e.name for e in files("lit_deconv.configs").iterdir() if e.name.endswith("yaml"))


def test_the_configs_are_there() -> None:
    assert {"demo.yaml", "imagefolder.yaml", "cifar10.yaml"} <= set(_configs())


@pytest.mark.parametrize("name", ["demo.yaml", "imagefolder.yaml", "cifar10.yaml"])
def test_configs_build_what_they_name(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load((files("lit_deconv.configs") / name).read_text())
    (callback,) = config["trainer"]["callbacks"]
    assert callback == {"class_path": "lit_deconv.callbacks.DeconvCallback"}
    callback["class_path"] = f"{__name__}._StandIn"
    config["trainer"].update(logger=False, accelerator="cpu", default_root_dir=str(tmp_path))
    path = tmp_path / name
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    root = ["--data.root", str(folder)] if name == "imagefolder.yaml" else []
    cli = LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=["--config", str(path), *root, "--model.width", "16"],
    )
    assert isinstance(cli.model, ZFNet)
    assert cli.model.hparams["width"] == 16
    assert type(cli.datamodule).__name__ == config["data"]["class_path"].rpartition(".")[2]
    assert any(isinstance(c, _StandIn) for c in cli.trainer.callbacks)  # type: ignore[attr-defined]
    if root:
        assert cli.datamodule.class_names == ["blue", "green", "red"]
