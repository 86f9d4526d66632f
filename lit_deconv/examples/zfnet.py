"""The network of Zeiler & Fergus as a LightningModule, at its full size and at a small one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor] | list[Tensor]


class ZFNet(LightningModule):
    """An image classifier with overlapping 3x3/2 pools, after Zeiler & Fergus (2014), figure 3.

    Logs `train_loss`, `val_loss` and `val_acc`.

    Args:
        num_classes: number of classes; None takes `num_classes` from the data module.
        shape: "small" takes pictures of any size from 32 pixels, "paper" takes 224 x 224.
        width: channels of the first convolution in the small shape.
        first_kernel: side of the first filters in the small shape.
        first_stride: stride of the first convolution in the small shape.
        batch_norm: batch norm after each convolution.
        local_response_norm: contrast normalisation across channels after pool1 and pool2,
            as in the paper.
        max_filter_rms: filters whose RMS exceeds it are scaled back to it after each step
            (section 3 of the paper: 0.1); None leaves them.
        dropout: after each hidden linear layer.
        learning_rate: of SGD; its peak under the one-cycle schedule.
        momentum: of SGD.
        weight_decay: of SGD.
        one_cycle: raise the learning rate and anneal it to zero over the run, instead of
            keeping it constant.
    """

    features: nn.Sequential
    classifier: nn.Sequential
    val_acc: MulticlassAccuracy

    def __init__(
        self,
        num_classes: int | None = None,
        shape: Literal["small", "paper"] = "small",
        width: int = 32,
        first_kernel: int = 7,
        first_stride: int = 2,
        batch_norm: bool = True,
        local_response_norm: bool = False,
        max_filter_rms: float | None = None,
        dropout: float = 0.5,
        learning_rate: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        one_cycle: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if shape == "paper":
            self.features = zfnet_features(batch_norm, local_response_norm)
        else:
            self.features = small_features(
                width, first_kernel, first_stride, batch_norm, local_response_norm
            )
        if num_classes is not None:
            self._add_classifier(num_classes)

    def configure_model(self) -> None:
        """Add the classifier, once the data module can be asked for the number of classes."""
        if hasattr(self, "classifier"):
            return
        num_classes = getattr(self._datamodule(), "num_classes", None)
        if num_classes is None:
            raise ValueError(
                "ZFNet does not know its number of classes: num_classes is None and the trainer "
                "has no data module with a num_classes attribute; give ZFNet(num_classes=...)"
            )
        # Goes into the checkpoint, which can then be loaded without the data module.
        self.hparams["num_classes"] = num_classes
        self._add_classifier(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [N, classes] of images [N, 3, H, W]."""
        return self.classifier(self.features(images))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True, batch_size=len(images))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same as validation, on the test loader."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities [N, classes]."""
        return self(batch[0]).softmax(1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Renormalise the filters."""
        if self.hparams["max_filter_rms"] is not None:
            renormalise_filters(self, self.hparams["max_filter_rms"])

    def configure_optimizers(self) -> Any:
        """SGD with momentum, under a one-cycle schedule where the length of the run is known."""
        options = self.hparams
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=options["learning_rate"],
            momentum=options["momentum"],
            weight_decay=options["weight_decay"],
        )
        steps = self.trainer.estimated_stepping_batches if options["one_cycle"] else float("inf")
        if steps == float("inf"):
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, options["learning_rate"], total_steps=int(steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _add_classifier(self, num_classes: int) -> None:
        dropout = self.hparams["dropout"]
        if self.hparams["shape"] == "paper":
            self.classifier = zfnet_classifier(num_classes, dropout)
        else:
            self.classifier = small_classifier(_channels(self.features), num_classes, dropout)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")

    def _datamodule(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)


def zfnet(
    num_classes: int = 1000,
    batch_norm: bool = False,
    local_response_norm: bool = True,
    dropout: float = 0.5,
) -> nn.Sequential:
    """The network of the paper, for 224 x 224 images, without the training around it.

    The maps are 110 (conv1), 55 (pool1), 26 (conv2), 13 (pool2 to conv5) and 6 (pool5)
    pixels wide (figure 3).
    """
    return _named(
        ("features", zfnet_features(batch_norm, local_response_norm)),
        ("classifier", zfnet_classifier(num_classes, dropout)),
    )


def zfnet_features(batch_norm: bool = False, local_response_norm: bool = True) -> nn.Sequential:
    """The five convolutions of the paper (figure 3), weights drawn with deviation 0.01."""
    features = _named(
        *_block(1, nn.Conv2d(3, 96, 7, stride=2, padding=1), batch_norm, True, local_response_norm),
        *_block(2, nn.Conv2d(96, 256, 5, stride=2), batch_norm, True, local_response_norm),
        *_block(3, nn.Conv2d(256, 384, 3, padding=1), batch_norm),
        *_block(4, nn.Conv2d(384, 384, 3, padding=1), batch_norm),
        *_block(5, nn.Conv2d(384, 256, 3, padding=1), batch_norm, True),
    )
    return _initialised(features)


def zfnet_classifier(num_classes: int, dropout: float = 0.5) -> nn.Sequential:
    """Layers 6 to 8 of the paper: two fully connected layers of 4096, then the classes."""
    classifier = _named(
        ("flatten", nn.Flatten()),
        ("fc6", nn.Linear(256 * 6 * 6, 4096)),
        ("relu6", nn.ReLU()),
        ("drop6", nn.Dropout(dropout)),
        ("fc7", nn.Linear(4096, 4096)),
        ("relu7", nn.ReLU()),
        ("drop7", nn.Dropout(dropout)),
        ("fc8", nn.Linear(4096, num_classes)),
    )
    return _initialised(classifier)


def small_features(
    width: int = 32,
    first_kernel: int = 7,
    first_stride: int = 2,
    batch_norm: bool = True,
    local_response_norm: bool = False,
) -> nn.Sequential:
    """The same five convolutions for small pictures: 64 pixels become maps of 32, 16, 8 and 4."""
    second, deep = 2 * width, 3 * width
    first = nn.Conv2d(3, width, first_kernel, stride=first_stride, padding=first_kernel // 2)
    return _named(
        *_block(1, first, batch_norm, True, local_response_norm),
        *_block(2, nn.Conv2d(width, second, 5, padding=2), batch_norm, True, local_response_norm),
        *_block(3, nn.Conv2d(second, deep, 3, padding=1), batch_norm),
        *_block(4, nn.Conv2d(deep, deep, 3, padding=1), batch_norm),
        *_block(5, nn.Conv2d(deep, deep, 3, padding=1), batch_norm, True),
    )


def small_classifier(channels: int, num_classes: int, dropout: float = 0.5) -> nn.Sequential:
    """One hidden layer over the pooled map, whatever its size."""
    return _named(
        ("pool", nn.AdaptiveAvgPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc6", nn.Linear(4 * channels, 2 * channels)),
        ("relu6", nn.ReLU()),
        ("drop6", nn.Dropout(dropout)),
        ("fc7", nn.Linear(2 * channels, num_classes)),
    )


@torch.no_grad()
def renormalise_filters(model: nn.Module, radius: float = 0.1) -> None:
    """Scale filters whose RMS exceeds `radius` back to it (section 3 of the paper).

    Filters within the radius stay as they are, to the bit.

    Args:
        model: the filters of its convolutions are changed in place.
        radius: the largest RMS a filter may have.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            rms = module.weight.square().mean((1, 2, 3), keepdim=True).sqrt()
            module.weight.mul_(torch.where(rms > radius, radius / rms, 1.0))


def _block(
    number: int, conv: nn.Conv2d, batch_norm: bool, pool: bool = False, norm: bool = False
) -> list[tuple[str, nn.Module]]:
    """Convolution, rectifier, then overlapping pool and contrast normalisation where asked for."""
    layers: list[tuple[str, nn.Module]] = [(f"conv{number}", conv)]
    if batch_norm:
        layers.append((f"bn{number}", nn.BatchNorm2d(conv.out_channels)))
    layers.append((f"relu{number}", nn.ReLU()))
    if pool:
        layers.append((f"pool{number}", nn.MaxPool2d(3, stride=2, ceil_mode=True)))
    if norm:
        layers.append((f"norm{number}", nn.LocalResponseNorm(5, k=2.0)))
    return layers


def _named(*layers: tuple[str, nn.Module]) -> nn.Sequential:
    sequence = nn.Sequential()
    for name, layer in layers:
        sequence.add_module(name, layer)
    return sequence


def _initialised(sequence: nn.Sequential) -> nn.Sequential:
    for module in sequence.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return sequence


def _channels(features: nn.Sequential) -> int:
    return [m.out_channels for m in features if isinstance(m, nn.Conv2d)][-1]
