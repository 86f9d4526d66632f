"""In which runs the callback works, what it keeps of one, and who else takes part."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callback_models import (
    EPOCHS,
    LitNet,
    equal,
    expected_tags,
    hooks_on,
    images_and_labels,
    loader,
    pictures,
    random_states,
    recorded,
    seeded,
    small,
    tiny_net,
    trainer,
)
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

TAGS = expected_tags("net.1", "net.4")


# ---- which runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_validate_and_test(verb: str, tmp_path: Path) -> None:
    model = LitNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random_states()
    run = trainer(tmp_path, small())
    (metrics,) = getattr(run, verb)(model, loader(), verbose=False)
    assert pictures(tmp_path).keys() == (
        expected_tags("net.1", "net.4", fitting=False)
        if verb == "validate"
        else expected_tags("net.1", "net.4", tag="deconv_test", fitting=False)
    )
    assert not any(name.startswith("deconv") for name in metrics)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert random_states()[:2] == states[:2]
    assert hooks_on(model) == 0


def test_without_a_validation_loop_the_training_batch_is_the_probe(
    tmp_path: Path, drawn: list
) -> None:
    def fit(folder: Path, *callbacks: pl.Callback) -> dict[str, Tensor]:
        seeded()
        model = LitNet(tiny_net(norm=True, p=0.5))
        trainer(folder, *callbacks).fit(model, loader())
        assert hooks_on(model) == 0
        return model.state_dict()

    without, seen = fit(tmp_path / "without"), fit(tmp_path / "with", small())
    assert all(torch.equal(without[name], value) for name, value in seen.items())
    found = pictures(tmp_path / "with")
    assert found.keys() == expected_tags("net.2", "net.5")
    assert all(len(each) == EPOCHS for each in found.values())
    assert torch.equal(drawn[0].rows[0].panels[0].image, images_and_labels()[0][0])


def test_a_loader_without_length(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from zip(*images_and_labels(), strict=True)

    callback = small(probe=6)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(LitNet(), loader(), DataLoader(Stream(), 4))
    assert pictures(tmp_path).keys() == TAGS
    assert callback.state_dict()["probe"] == {0: [0, 1, 2, 3], 1: [0, 2]}


def test_two_validation_loaders_give_one_probe(tmp_path: Path) -> None:
    class Two(LitNet):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch))

    trainer(tmp_path, small(), max_epochs=1).fit(Two(), loader(), [loader(), loader()])
    assert pictures(tmp_path).keys() == TAGS


def test_a_dry_run_leaves_no_file(tmp_path: Path) -> None:
    run = trainer(tmp_path, small(), fast_dev_run=True)
    run.fit(LitNet(), loader(), loader())
    assert not list(tmp_path.rglob("*"))


def test_without_a_logger_for_images_files_are_written_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, small(), logger=CSVLogger(tmp_path, name="csv"))
    run.fit(LitNet(), loader(), loader())
    assert len(list(tmp_path.rglob("*.png"))) == EPOCHS * len(TAGS)
    assert sum("PNG files" in record.getMessage() for record in caplog.records) == 1
    assert (tmp_path / "csv/version_0/metrics.csv").read_text().count("cosine_Deconv") == 2


@pytest.mark.parametrize("ours_first", [True, False])
def test_averaged_weights_are_those_that_were_validated(
    ours_first: bool, tmp_path: Path, drawn: list, notes: list[str]
) -> None:
    validated: list[Tensor] = []
    trained: list[Tensor] = []

    class Noting(LitNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            validated.append(self.net[0].weight.detach().clone())

        def on_train_batch_end(self, *args: Any) -> None:
            trained.append(self.net[0].weight.detach().clone())

    both: list[pl.Callback] = [small(layers="net.0"), EMAWeightAveraging(decay=0.5)]
    both = both if ours_first else both[::-1]
    model = Noting()
    with torch.no_grad():
        model.net[0].bias.zero_()
    model.net[0].bias.requires_grad_(False)
    trainer(tmp_path, *both).fit(model, loader(), loader())
    images = images_and_labels()[0]
    recomputed = functional.conv2d(images, validated[-1].cpu(), padding=1).amax((0, 2, 3))
    shown = {c.channel: c.activations[0] for c in drawn[-1].channels}
    assert not torch.equal(validated[-1], trained[-1])
    for channel, value in shown.items():
        assert value == pytest.approx(float(recomputed[channel]), rel=1e-5)
    assert "Weights: averaged." in notes[-1]


def test_weights_that_changed_before_the_picture_are_told(tmp_path: Path, notes: list[str]) -> None:
    class Swapping(pl.Callback):
        def on_validation_batch_end(
            self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *index: int
        ) -> None:
            if index[0] == 1 and self.active:
                with torch.no_grad():
                    pl_module.net[0].weight.mul_(3)

        active = False

    swapping = Swapping()
    for active in (False, True):
        notes.clear()
        swapping.active = active
        run = trainer(tmp_path / str(active), swapping, small(probe=8), max_epochs=1)
        run.fit(LitNet(), loader(), loader())
        assert notes
        assert all(("Not what validation saw" in note) == active for note in notes)


def test_it_can_be_copied_and_pickled_after_a_run(tmp_path: Path) -> None:
    callback = small()
    trainer(tmp_path, callback, max_epochs=1).fit(LitNet(), loader(), loader())
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert equal(other.state_dict(), callback.state_dict())
        assert other.state_key == callback.state_key


# ---- what is kept ------------------------------------------------------------------------------------


def test_a_run_that_is_continued_keeps_its_choices(tmp_path: Path, drawn: list) -> None:
    first = small(layers="net.1", every_n_epochs=2)
    run = trainer(tmp_path / "a", first, max_epochs=3)
    run.fit(LitNet(), loader(), loader())
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"][first.state_key]
    history = saved.pop("history")
    assert [each["epoch"] for each in history["net.1"]["moments"]] == [0, 2]
    assert saved == {
        "layers": ["net.1"],
        "module": "",
        "channels": 2,
        "probe": {0: [0], 1: [0]},
        "epoch": 2,
        "step": 6,
    }
    before = [layer.rows[0].panels[0].image for layer in drawn]
    drawn.clear()
    second = small(layers="net.1", every_n_epochs=2)
    more = trainer(tmp_path / "b", second, max_epochs=5)
    more.fit(LitNet(), loader(), loader(), ckpt_path=path)
    assert len(drawn) == 1
    assert torch.equal(drawn[0].rows[0].panels[0].image, before[0])
    assert [list(row.epochs) for row in drawn[0].evolution] == [[0, 2, 4]] * 2


def test_two_on_one_trainer_do_not_collide(tmp_path: Path) -> None:
    both = small(layers="net.1"), small(layers="net.4")
    assert both[0].state_key != both[1].state_key
    trainer(tmp_path, *both, max_epochs=1).fit(LitNet(), loader(), loader())
    assert pictures(tmp_path).keys() == {
        *expected_tags("net.1"),
        *expected_tags("net.4", tag="deconv_2"),
    }


def test_two_that_log_different_things_of_the_same_layers(tmp_path: Path, drawn: list) -> None:
    both = small(layers="net.1", log=["grid"]), small(layers="net.1", log=["evolution"])
    run = trainer(tmp_path, *both, max_epochs=1)
    run.fit(LitNet(), loader(), loader())
    assert pictures(tmp_path).keys() == {"deconv/net.1/grid", "deconv_2/net.1/evolution"}
    # the hooks of one do not take what the other runs for more images of the validation
    assert [layer.ranked for layer in drawn] == [8, 8]
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    assert {callback.state_key for callback in both} <= saved.keys()


def test_no_two_write_under_one_name(tmp_path: Path) -> None:
    tags = ["x", "x", "x_2", "x"]
    ours = [small(tag=tag, channels=n + 1) for n, tag in enumerate(tags)]
    run = trainer(tmp_path, *ours)
    assert [callback._tag_among(run) for callback in ours] == ["x", "x_3", "x_2", "x_4"]


def test_a_checkpoint_is_kept_by_a_number_of_ours(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="deconv/net.1/never_fires", save_top_k=1)
    run = trainer(tmp_path / "run", small(every_n_epochs=2), best, enable_checkpointing=True)
    run.fit(LitNet(), loader(), loader())
    assert best.best_model_score == run.callback_metrics["deconv/net.1/never_fires"]
    assert Path(best.best_model_path).exists()


def test_trained_weights_beside_averaged_ones_are_told(tmp_path: Path, notes: list[str]) -> None:
    # without a validation nothing puts the averaged ones in their place
    both = small(layers="net.1"), EMAWeightAveraging(decay=0.5)
    trainer(tmp_path, *both, max_epochs=1).fit(LitNet(), loader())
    assert all("not averaged" in note for note in notes)
    assert notes


def test_fit_then_validate_then_another_model(tmp_path: Path) -> None:
    callback = small()
    run = trainer(tmp_path / "fit", callback, max_epochs=1)
    run.fit(LitNet(), loader(), loader())
    other = LitNet(tiny_net(1))
    again = trainer(tmp_path / "other", callback)
    again.validate(other, loader(channels=1), verbose=False)
    found = pictures(tmp_path / "other").keys()
    assert found == expected_tags("net.1", "net.4", fitting=False)


# ---- other ways in -------------------------------------------------------------------------------------


def test_the_trainer_of_the_other_package_name(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import pytorch_lightning, torch
from torch.nn import functional
from callback_models import loader, pictures, tiny_net
from lit_deconv.callbacks import DeconvCallback, gallery

class Lit(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = tiny_net()
    def forward(self, images):
        return self.net(images)
    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

trainer = pytorch_lightning.Trainer(
    max_epochs=1, accelerator="cpu", default_root_dir={str(tmp_path)!r}, devices=1,
    callbacks=[DeconvCallback(channels=2, probe=2, compare_images=1, on_error="raise")],
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
)
trainer.fit(Lit(), loader(), loader())
"""
    command = [
        sys.executable,
        "-c",
        script,
    ]  # elsewhere than beside a lit_deconv without its callbacks
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pictures(tmp_path).keys() == TAGS


def test_no_warning_where_nothing_fails(tmp_path: Path) -> None:
    _, given = recorded(
        lambda: trainer(tmp_path, small(on_error="warn")).fit(LitNet(), loader(), loader())
    )
    assert not [text for text in given if "Deconv" in text]
