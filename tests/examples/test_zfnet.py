"""The network: the paper's shapes, its renormalisation, and its life in a Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_deconv.examples.demo import build_demo
from lit_deconv.examples.zfnet import ZFNet, renormalise_filters, zfnet, zfnet_features


def _map_sizes(features: nn.Sequential, image: Tensor) -> dict[str, tuple[int, int]]:
    """Channels and side of the map behind each layer."""
    sizes = {}
    for name, layer in features.named_children():
        image = layer(image)
        assert image.shape[2] == image.shape[3]
        sizes[name] = (image.shape[1], image.shape[3])
    return sizes


def test_paper_shape_has_the_maps_of_figure_3() -> None:
    sizes = _map_sizes(zfnet_features(), torch.zeros(1, 3, 224, 224))
    assert {name: sizes[name] for name in sizes if name[:4] in ("conv", "pool")} == {
        "conv1": (96, 110),
        "pool1": (96, 55),
        "conv2": (256, 26),
        "pool2": (256, 13),
        "conv3": (384, 13),
        "conv4": (384, 13),
        "conv5": (256, 13),
        "pool5": (256, 6),
    }


def test_paper_shape_has_the_receptive_fields_of_the_paper() -> None:
    fields, field, stride = {}, 1, 1
    for name, layer in zfnet_features().named_children():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            kernel, step = (
                v[0] if isinstance(v, tuple) else v for v in (layer.kernel_size, layer.stride)
            )
            field += (kernel - 1) * stride
            stride *= step
            fields[name] = (field, stride)
    assert fields == {
        "conv1": (7, 2),
        "pool1": (11, 4),
        "conv2": (27, 8),
        "pool2": (43, 16),
        "conv3": (75, 16),
        "conv4": (107, 16),
        "conv5": (139, 16),
        "pool5": (171, 32),
    }


def test_paper_shape_classifies() -> None:
    with torch.no_grad():
        logits = zfnet(num_classes=7).eval()(torch.randn(1, 3, 224, 224))
    assert logits.shape == (1, 7)
    names = dict(ZFNet(7, shape="paper", local_response_norm=True).features.named_children())
    assert isinstance(names["norm1"], nn.LocalResponseNorm)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("local_response_norm", [True, False])
@pytest.mark.parametrize("side", [32, 64, 75])
def test_small_shape_takes_pictures_of_any_size(
    batch_norm: bool, local_response_norm: bool, side: int
) -> None:
    net = ZFNet(4, width=8, batch_norm=batch_norm, local_response_norm=local_response_norm).eval()
    assert net(torch.randn(2, 3, side, side)).shape == (2, 4)
    kinds = {type(m) for m in net.modules()}
    assert (nn.BatchNorm2d in kinds) == batch_norm
    assert (nn.LocalResponseNorm in kinds) == local_response_norm


def test_small_shape_halves_the_map_at_each_overlapping_pool() -> None:
    net = ZFNet(4, width=8)
    sizes = _map_sizes(net.features, torch.zeros(2, 3, 64, 64))
    assert [sizes[n][1] for n in ("conv1", "pool1", "pool2", "pool5")] == [32, 16, 8, 4]
    pools = [m for m in net.features if isinstance(m, nn.MaxPool2d)]
    assert all((p.kernel_size, p.stride) == (3, 2) for p in pools)


def test_renormalisation_scales_back_large_filters_and_no_others() -> None:
    conv = nn.Conv2d(3, 3, 5)
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        for weight, rms in zip(conv.weight, (0.05, 0.1001, 7.0), strict=True):
            weight.copy_(torch.randn(3, 5, 5))
            weight.mul_(rms / weight.square().mean().sqrt())
        linear.weight.fill_(3.0)
    before, bias = conv.weight.clone(), conv.state_dict()["bias"].clone()
    renormalise_filters(nn.Sequential(conv, linear), 0.1)
    rms_after = [float(w.square().mean().sqrt()) for w in conv.weight.detach()]
    assert rms_after == pytest.approx([0.05, 0.1, 0.1], rel=1e-5)
    assert torch.equal(conv.weight[0], before[0])
    # Scaled back, not clipped: the direction stays.
    for i in (1, 2):
        cosine = nn.functional.cosine_similarity(
            conv.weight[i].flatten(), before[i].flatten(), dim=0
        )
        assert float(cosine) == pytest.approx(1, abs=1e-6)
    assert torch.equal(conv.state_dict()["bias"], bias)
    assert (linear.weight == 3.0).all()


def _loader(classes: int = 3) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(24) % classes), batch_size=8)


def _trainer(folder: Path, **options: object) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"max_epochs": 1, "logger": False, **options},  # type: ignore[arg-type]
    )


def test_filters_stay_within_the_radius_during_training(tmp_path: Path) -> None:
    net = ZFNet(3, width=8, max_filter_rms=0.02, learning_rate=0.1)
    with torch.no_grad():
        net.features.get_submodule("conv1").get_parameter("weight").mul_(100)
    _trainer(tmp_path).fit(net, _loader())
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            rms = module.weight.square().mean((1, 2, 3)).sqrt()
            assert float(rms.max()) <= 0.02 * (1 + 1e-5)


def test_training_logs_and_lowers_the_loss(tmp_path: Path) -> None:
    net = ZFNet(3, width=8, dropout=0.0, learning_rate=0.01)
    trainer = _trainer(tmp_path, max_epochs=15)
    trainer.fit(net, _loader(), _loader())
    assert {"train_loss", "val_loss", "val_acc"} <= trainer.callback_metrics.keys()
    assert float(trainer.callback_metrics["val_acc"]) > 0.6


def test_logged_accuracy_is_the_share_of_right_answers(tmp_path: Path) -> None:
    net = ZFNet(3, width=8)
    (metrics,) = _trainer(tmp_path).validate(net, _loader(), verbose=False)
    with torch.no_grad():
        right = [(net.eval()(x).argmax(1) == y).float() for x, y in _loader()]
    assert metrics["val_acc"] == pytest.approx(float(torch.cat(right).mean()))


def test_constant_learning_rate_on_request(tmp_path: Path) -> None:
    net = ZFNet(3, width=8, one_cycle=False, learning_rate=0.007)
    trainer = _trainer(tmp_path)
    trainer.fit(net, _loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.007
    assert not trainer.lr_scheduler_configs


def test_unknown_number_of_classes_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give ZFNet\\(num_classes="):
        _trainer(tmp_path).fit(ZFNet(), _loader())


def test_small_demo_runs_and_its_checkpoint_loads(tmp_path: Path) -> None:
    demo = build_demo(small=True, cache=str(tmp_path / "cache"))
    assert demo.module.hparams["num_classes"] == demo.datamodule.num_classes == 10
    trainer = _trainer(tmp_path, max_epochs=demo.trainer_kwargs["max_epochs"])
    trainer.fit(demo.module, datamodule=demo.datamodule)
    assert float(trainer.callback_metrics["val_acc"]) >= 0
    trainer.save_checkpoint(tmp_path / "demo.ckpt")
    loaded = ZFNet.load_from_checkpoint(tmp_path / "demo.ckpt", weights_only=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), demo.module.eval()(images))


def test_two_demos_train_to_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for _ in range(2):
        demo = build_demo(small=True, cache=str(tmp_path / "cache"))
        trainer = _trainer(tmp_path, limit_train_batches=3, limit_val_batches=0)
        trainer.fit(demo.module, datamodule=demo.datamodule)
        weights.append(torch.cat([p.detach().flatten() for p in demo.module.parameters()]))
    assert torch.equal(*weights)
