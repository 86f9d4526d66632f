"""Where the pictures come from: drawn on the spot, from a folder of your own, or CIFAR-10."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from lit_deconv.examples.composites import CLASS_NAMES, CompositePictures

Channels = tuple[float, float, float]

_CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class _Pictures(LightningDataModule):
    """Loaders over a training and a validation set.

    `mean` and `std` say how pictures are normalised, so that callbacks can undo it.
    """

    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.25, 0.25, 0.25)

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_set: Any = None
        self.val_set: Any = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training pictures, shuffled; a last batch of one picture would break batch norm."""
        return self._loader(self.train_set, train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation pictures, always in the same order."""
        return self._loader(self.val_set, train=False)

    def _loader(self, pictures: Any, train: bool) -> DataLoader[Any]:
        if pictures is None:
            raise RuntimeError(
                f"{type(self).__name__} has no pictures yet: call prepare_data() and setup() first"
            )
        return DataLoader(
            pictures,
            self.batch_size,
            shuffle=train,
            drop_last=train and len(pictures) > self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class Composites(_Pictures):
    """Generated pictures of objects built from shared parts; nothing is downloaded.

    Args:
        train_count: number of training pictures.
        val_count: number of validation pictures.
        image_size: height and width.
        seed: another seed gives other pictures.
        cache: folder for the drawn pictures; None for the user's cache folder.
        batch_size: pictures per batch.
        num_workers: processes that load; the pictures are in memory, none are needed.
    """

    def __init__(
        self,
        train_count: int = 5000,
        val_count: int = 1000,
        image_size: int = 64,
        seed: int = 0,
        cache: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.save_hyperparameters()

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return list(CLASS_NAMES)

    def prepare_data(self) -> None:
        """Draw the pictures, in one process alone, unless the cache has them."""
        self._pictures()

    def setup(self, stage: str) -> None:
        """Read the pictures from the cache."""
        if self.train_set is None:
            self.train_set, self.val_set = self._pictures()

    def _pictures(self) -> tuple[CompositePictures, CompositePictures]:
        options = self.hparams
        common = (options["image_size"], options["seed"], options["cache"])
        normalise = v2.Normalize(self.mean, self.std)
        return (
            CompositePictures("train", options["train_count"], *common, normalise),
            CompositePictures("val", options["val_count"], *common, normalise),
        )


class ImageFolder(_Pictures):
    """Pictures of your own: `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg`.

    Args:
        root: folder that holds `train` and `val`, each with one folder per class.
        image_size: height and width pictures are brought to.
        batch_size: pictures per batch.
        num_workers: processes that read and decode.
        augmentation: random crops and flips in training.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str,
        image_size: int = 64,
        batch_size: int = 64,
        num_workers: int = 2,
        augmentation: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.save_hyperparameters()
        self.root = Path(root)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label: the folders in `root/train`.

        Raises:
            FileNotFoundError: `root` is not laid out as it should be.
        """
        return _class_folders(self.root / "train")

    def setup(self, stage: str) -> None:
        """Find the pictures.

        Raises:
            FileNotFoundError: `root` is not laid out as it should be.
            ValueError: `train` and `val` hold different classes.
        """
        if self.train_set is not None:
            return
        val_names = _class_folders(self.root / "val")
        if val_names != self.class_names:
            differing = sorted(set(val_names) ^ set(self.class_names))
            raise ValueError(
                f"{self.root}: train and val must hold the same class folders, but only one of "
                f"them has {', '.join(differing)}"
            )
        size, normalise = self.hparams["image_size"], v2.Normalize(self.mean, self.std)
        whole = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
        varied = [
            v2.RandomResizedCrop(size, scale=(0.6, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
        numbers = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise]
        train_crop = varied if self.hparams["augmentation"] else whole
        self.train_set = datasets.ImageFolder(
            str(self.root / "train"), v2.Compose([*train_crop, *numbers])
        )
        self.val_set = datasets.ImageFolder(str(self.root / "val"), v2.Compose([*whole, *numbers]))


class CIFAR10(_Pictures):
    """CIFAR-10 through torchvision, downloaded the first time; validates on the test images.

    Args:
        root: folder to download to.
        batch_size: pictures per batch.
        num_workers: processes that load.
        augmentation: random shifts by up to 4 pixels and flips in training.
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 2,
        augmentation: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.save_hyperparameters()

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return list(_CIFAR10_CLASSES)

    def prepare_data(self) -> None:
        """Download, unless it is there."""
        datasets.CIFAR10(self.hparams["root"], train=True, download=True)

    def setup(self, stage: str) -> None:
        """Read the pictures."""
        if self.train_set is not None:
            return
        numbers = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(self.mean, self.std),
        ]
        varied = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        train_steps = [*varied, *numbers] if self.hparams["augmentation"] else numbers
        root = self.hparams["root"]
        self.train_set = datasets.CIFAR10(root, train=True, transform=v2.Compose(train_steps))
        self.val_set = datasets.CIFAR10(root, train=False, transform=v2.Compose(numbers))


def _class_folders(folder: Path) -> list[str]:
    names = sorted(f.name for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(
            f"no class folders in {folder}: pictures are expected as "
            f"{folder}/CLASS/picture.jpg, in both train and val"
        )
    return names
