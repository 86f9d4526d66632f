"""The callback on several real loggers at once, each read back."""

from __future__ import annotations

import importlib.util
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from callback_models import LitNet, loader, pictures, recorded, trainer
from lightning.pytorch.loggers import CometLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lit_deconv.callbacks import DeconvCallback
from PIL import Image, ImageChops

REQUIRED = os.environ.get("REQUIRE_LOGGERS", "").split(",")
"""Packages that must be there, so that a run meant to test them cannot skip them."""


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        assert package not in REQUIRED, f"{package} is not installed"
        pytest.skip(f"{package} is not installed")


def fit(folder: Path, logger: Any) -> dict[str, Image.Image]:
    """Pictures that TensorBoard was given beside another logger, by tag."""
    beside = TensorBoardLogger(folder / "tensorboard", name="log", version=0)
    callback = DeconvCallback(layers="net.1", channels=2, compare=[], on_error="raise")
    run = trainer(folder, callback, logger=[beside, logger], max_epochs=1)
    _, warned = recorded(lambda: run.fit(LitNet(), loader(), loader()))
    assert not [text for text in warned if "DeconvCallback" in text]
    found = pictures(folder / "tensorboard")
    assert found.keys() == {f"deconv/net.1/{kind}" for kind in ("grid", "evolution")} | {
        "deconv/net.0/filters"
    }
    return {tag: picture for tag, each in found.items() for picture in each.values()}


def same(one: Image.Image, other: Image.Image) -> bool:
    both = one.convert("RGB"), other.convert("RGB")
    return one.size == other.size and ImageChops.difference(*both).getbbox() is None


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    expected = fit(tmp_path, WandbLogger(save_dir=str(tmp_path), offline=True))
    wandb.finish()
    for tag, picture in expected.items():
        (saved,) = tmp_path.rglob(f"media/images/{tag}_*.png")
        assert same(Image.open(saved), picture)


def test_mlflow_local(tmp_path: Path) -> None:
    needs("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    logger = MLFlowLogger(tracking_uri=store, artifact_location=str(tmp_path / "artifacts"))
    expected = fit(tmp_path, logger)
    saved = [Image.open(file) for file in (tmp_path / "artifacts").rglob("*.png")]
    assert len(saved) == len(expected)
    for picture in expected.values():
        assert any(same(each, picture) for each in saved)


def test_comet_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("comet_ml")
    import comet_ml

    # what `start` makes of online=False is switched off where there is no account
    experiment = comet_ml.OfflineExperiment(
        api_key="none", offline_directory=str(tmp_path), disabled=False
    )
    monkeypatch.setattr(comet_ml, "start", lambda **options: experiment)
    logger = CometLogger(online=False)
    expected = fit(tmp_path, logger)
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as held:
        files = [held.read(name) for name in held.namelist()]
    # stored under names of its own
    saved = [Image.open(io.BytesIO(file)) for file in files if file.startswith(b"\x89PNG")]
    for picture in expected.values():
        assert any(same(each, picture) for each in saved)
