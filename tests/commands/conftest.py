"""An empty folder with a few pictures made on the spot and a small model in a module of the user's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor
from lightning.pytorch import LightningDataModule, LightningModule


def build(width=6, channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, width, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )


def functional():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)

        def forward(self, x):
            return torch.relu(self.second(torch.relu(self.first(x))))

    return Functional()


def number():
    return 3


class Net(LightningModule):
    def __init__(self, width=6):
        super().__init__()
        self.save_hyperparameters()
        self.net = build(width)

    def forward(self, x):
        return self.net(x)


class Numbers(Dataset):
    # images that say when they are read

    def __init__(self, count):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(count, 3, 20, 16, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        with open("read", "a") as read:
            print(number, file=read)
        return {"image": self.images[number], "label": number % 4}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(4, 3, 20, 16))


class Data(LightningDataModule):
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)

    def __init__(self, count=23):
        super().__init__()
        self.count = count

    def setup(self, stage):
        assert stage == "validate"
        self.val = Numbers(self.count)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=3, shuffle=self.count > 0)


class Streamed(LightningDataModule):
    def val_dataloader(self):
        return DataLoader(Stream(), batch_size=2)


class Folder(LightningDataModule):
    def val_dataloader(self):
        return DataLoader(ImageFolder("classes", ToTensor()), batch_size=2)


class Pictures:
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: pictures/{0..4}.png of 48 x 40 pixels, and my_nets.py."""
    monkeypatch.chdir(tmp_path)
    # the commands import from the current folder; each test has its own
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    (tmp_path / "my_nets.py").write_text(MODULE)
    (tmp_path / "pictures").mkdir()
    noise = np.random.default_rng(0)
    for number in range(5):
        coarse = noise.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((40, 48), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path
