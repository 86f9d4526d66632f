"""Reconstructions held against object masks, beside the same counted slowly on whole images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_deconv import Deconvnet
from lit_deconv.examples.composites import CompositePictures
from lit_deconv.examples.masks import crop, main, mask_shares, strongest_units
from lit_deconv.examples.zfnet import ZFNet

LAYERS = ["features.relu1", "features.relu3"]


@pytest.fixture
def pictures(tmp_path: Path) -> CompositePictures:
    return CompositePictures("val", 20, cache=tmp_path)


@pytest.fixture
def model() -> ZFNet:
    torch.manual_seed(0)
    return ZFNet(10, width=4).eval()


def _stacked(pictures: CompositePictures) -> tuple[torch.Tensor, torch.Tensor]:
    indices = range(len(pictures))
    return (
        torch.stack([pictures[i][0] for i in indices]),
        torch.stack([pictures.object_mask(i) for i in indices]),
    )


@pytest.mark.parametrize("batch_size", [3, 20])
def test_strongest_units_are_the_largest_of_their_channel(
    pictures: CompositePictures, model: ZFNet, batch_size: int
) -> None:
    images, _ = _stacked(pictures)
    units = strongest_units(model, LAYERS, images, batch_size)
    for layer in LAYERS:
        maps = Deconvnet(model, layer).activations(images)
        peaks = maps.amax((0, 2, 3))
        assert units[layer][:, 1].tolist() == (peaks > 0).nonzero().flatten().tolist()
        for n, c, y, x in units[layer].tolist():
            assert float(maps[n, c, y, x]) == pytest.approx(float(peaks[c]), rel=1e-5)


def test_shares_agree_with_whole_reconstructions(pictures: CompositePictures, model: ZFNet) -> None:
    images, masks = _stacked(pictures)
    units = strongest_units(model, LAYERS, images)
    for share in mask_shares(model, LAYERS, images, masks):
        energies, areas = [], []
        for unit in units[share.layer]:
            whole = Deconvnet(model, share.layer).reconstruct(images, unit[None])[0]
            energy, mask = whole.square().sum(0), masks[unit[0]]
            energies.append(float(energy[mask].sum() / energy.sum()))
            areas.append(float(mask.float().mean()))
        assert share.channels == len(units[share.layer])
        assert share.energy == pytest.approx(sum(energies) / len(energies), rel=1e-4)
        assert share.area == pytest.approx(sum(areas) / len(areas), rel=1e-4)


def test_masks_of_everything_and_of_nothing(pictures: CompositePictures, model: ZFNet) -> None:
    images, masks = _stacked(pictures)
    (everything,) = mask_shares(model, LAYERS[:1], images, torch.ones_like(masks))
    (nothing,) = mask_shares(model, LAYERS[:1], images, torch.zeros_like(masks))
    assert everything[2:] == pytest.approx((1, 1, 1))
    assert nothing[2:] == (0, 0, 0)


def test_crop_reaches_past_the_map_with_zeros() -> None:
    maps = torch.arange(1.0, 17).reshape(1, 4, 4).repeat(2, 1, 1)
    boxes = torch.tensor([[-1, -1, 2, 2], [2, 3, 5, 6]])
    assert crop(maps, boxes).tolist() == [
        [[0, 0, 0], [0, 1, 2], [0, 5, 6]],
        [[12, 0, 0], [16, 0, 0], [0, 0, 0]],
    ]


def test_command_prints_a_row_for_each_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch import Trainer

    from lit_deconv.examples.demo import build_demo

    demo = build_demo(small=True, cache=str(tmp_path))
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(demo.module, datamodule=demo.datamodule)
    trainer.save_checkpoint(tmp_path / "demo.ckpt")
    main([str(tmp_path / "demo.ckpt")])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("50 validation pictures")
    assert [row.split()[0] for row in rows] == [f"features.relu{i}" for i in range(1, 6)]
