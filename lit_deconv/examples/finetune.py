"""A torchvision classifier, fine-tuned on pictures of your own."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from torchvision import models

Batch = tuple[Tensor, Tensor] | list[Tensor]


class FineTuned(LightningModule):
    """A torchvision model with a new last layer, trained at a rate that keeps what it knows.

    Logs `train_loss`, `val_loss` and `val_acc`.

    Args:
        architecture: torchvision's name of the model, one whose last module is linear.
        weights: which weights to start from, such as DEFAULT; None starts from random ones.
        num_classes: number of classes; None takes `num_classes` from the data module.
        learning_rate: of the layers that come with weights.
        head_rate: of the new last layer.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    def __init__(
        self,
        architecture: str = "resnet18",
        weights: str | None = "DEFAULT",
        num_classes: int | None = None,
        learning_rate: float = 0.001,
        head_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # A checkpoint holds the weights: loading it again must download nothing.
        self.hparams["weights"] = None
        self.net = models.get_model(architecture, weights=weights)
        self._has_head = False
        if num_classes is not None:
            self._add_head(num_classes)

    def configure_model(self) -> None:
        """Replace the last layer, once the data module can be asked for the number of classes."""
        if self._has_head:
            return
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        num_classes = getattr(datamodule, "num_classes", None)
        if num_classes is None:
            raise ValueError(
                "FineTuned does not know its number of classes: num_classes is None and the trainer "
                "has no data module with a num_classes attribute; give FineTuned(num_classes=...)"
            )
        # Goes into the checkpoint, which can then be loaded without the data module.
        self.hparams["num_classes"] = num_classes
        self._add_head(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [N, classes] of images [N, 3, H, W]."""
        return self.net(images)

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

    def configure_optimizers(self) -> Any:
        """SGD, with a higher rate for the layer that starts from nothing."""
        options = self.hparams
        head = list(self.net.get_submodule(self._head_name()).parameters())
        new = {id(parameter) for parameter in head}
        rest = [parameter for parameter in self.net.parameters() if id(parameter) not in new]
        return torch.optim.SGD(
            [{"params": rest}, {"params": head, "lr": options["head_rate"]}],
            lr=options["learning_rate"],
            momentum=options["momentum"],
            weight_decay=options["weight_decay"],
        )

    def _add_head(self, num_classes: int) -> None:
        path, _, name = self._head_name().rpartition(".")
        parent = self.net.get_submodule(path)
        old = getattr(parent, name) if not name.isdigit() else parent[int(name)]
        setattr(parent, name, nn.Linear(old.in_features, num_classes))
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self._has_head = True

    def _head_name(self) -> str:
        linear = [
            name for name, module in self.net.named_modules() if isinstance(module, nn.Linear)
        ]
        if not linear:
            raise ValueError(
                f"{self.hparams['architecture']} has no linear layer to replace; choose a classifier "
                "such as resnet18"
            )
        return linear[-1]
