"""The packaged configs: each is parsed and built, those that need no download train a batch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_deconv.cli import main
from lit_deconv.commands.lightning import packaged_configs

# Small enough for a test; everything else is as packaged.
SMALL = {
    "demo": ["--data.train_count", "40", "--data.val_count", "20", "--model.width", "4"],
    "imagefolder": ["--data.num_workers", "0", "--model.width", "4"],
    "resnet18_finetune": ["--model.weights", "null", "--data.image_size", "64"],
    "zfnet_imagenet": ["--data.batch_size", "4"],
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DIR/train and DIR/val of two classes, four pictures each, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "DIR" / part / name
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def words_for(name: str) -> list[str]:
    words = ["--config", f"lit_deconv:{name}", *SMALL.get(name, [])]
    config = (files("lit_deconv.configs") / f"{name}.yaml").read_text()
    if "ImageFolder" in config:
        words += ["--data.root", "DIR", "--data.num_workers", "0"]
    return words


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("name", packaged_configs())
def test_each_is_parsed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *words_for(name), "--print_config"])
    printed = capsys.readouterr().out
    assert "lit_deconv.callbacks.DeconvCallback" in printed
    assert "seed_everything: 0" in printed


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("name", [n for n in packaged_configs() if n != "cifar10"])
def test_each_without_a_download_trains_a_batch(name: str) -> None:
    quick = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    assert main(["fit", *words_for(name), *quick]) == 0


def test_fine_tuning_replaces_the_last_layer_and_trains_it_faster() -> None:
    from lit_deconv.examples.finetune import FineTuned

    for architecture in ("resnet18", "squeezenet1_0", "mobilenet_v3_small"):
        if architecture == "squeezenet1_0":
            with pytest.raises(ValueError, match="no linear layer"):
                FineTuned(architecture, None, 3)
            continue
        module = FineTuned(architecture, None, 3).eval()
        assert module(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
        slow, fast = module.configure_optimizers().param_groups
        assert (slow["lr"], fast["lr"]) == (0.001, 0.01)
        assert [list(p.shape) for p in fast["params"]] == [[3, fast["params"][0].shape[1]], [3]]
        count = len(slow["params"]) + len(fast["params"])
        assert count == len(list(module.net.parameters()))


def test_a_checkpoint_of_fine_tuning_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_deconv.examples import finetune

    asked: list[str | None] = []
    get_model = finetune.models.get_model

    def get(name: str, weights: str | None) -> torch.nn.Module:
        asked.append(weights)
        return get_model(name, weights=None)

    monkeypatch.setattr(finetune.models, "get_model", get)
    hyperparameters = finetune.FineTuned("resnet18", "DEFAULT", 3).hparams
    finetune.FineTuned(**hyperparameters)
    assert asked == ["DEFAULT", None]
