"""Figures 2 and 4 over a run: what is kept between epochs, what a resumed run shows, how channels fare."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_models import (
    LitNet,
    equal,
    loader,
    logged,
    pictures,
    recorded,
    seeded,
    tiny_net,
    trainer,
)
from lit_deconv.callbacks import DeconvCallback, gallery, watch
from lit_deconv.callbacks.health import health, twins
from lit_deconv.callbacks.history import EPOCHS, SIDE, History
from PIL import ImageChops

from lit_deconv.engine.geometry import ReceptiveField
from lit_deconv.engine.local import Layout
from lit_deconv.top import Collector, LayerTop, SpilledImages, TopReconstructions


def top_of(channels: int, fires: list[float]) -> LayerTop:
    """A layer of which nothing but its channels and how often they fire matters."""
    layout = Layout(len(fires), (4, 4), ReceptiveField((), (), (), ()), (3, 8, 8), True)
    return LayerTop(
        channels=torch.arange(channels),
        values=torch.zeros(channels, 1),
        identity=torch.zeros(channels, 1, dtype=torch.int64),
        positions=torch.zeros(channels, 1, 2, dtype=torch.int64),
        boxes=torch.zeros(channels, 1, 4, dtype=torch.int64),
        kept=None,
        held=torch.ones(channels, 1, dtype=torch.bool),
        largest=torch.zeros(len(fires)),
        fires=torch.tensor(fires),
        broken=torch.zeros(len(fires), dtype=torch.int64),
        images=8,
        recorded=torch.float32,
        layout=layout,
    )


def found_of(images: torch.Tensor) -> TopReconstructions:
    """Verified units [C, 1, c, h, w] with activation 1."""
    ones = torch.ones(images.shape[:2])
    return TopReconstructions(images, images, ones, ones.bool(), ones.bool())


# ---- history -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30, 101])
def test_epochs_are_thinned_evenly_with_the_first_and_the_latest(count: int) -> None:
    history = History()
    image = torch.randn(2, 1, 3, 5, 5)
    for epoch in range(3, 3 + count):
        history.add("a", epoch, top_of(2, [1, 1]), found_of(image))
    (epochs, _) = [list(row.epochs) for row in history.rows("a")]
    assert epochs[0] == 3
    assert epochs[-1] == 2 + count
    assert min(count, EPOCHS // 2) <= len(epochs) <= EPOCHS
    steps = [after - before for before, after in itertools.pairwise(epochs[:-1])]
    assert len(set(steps)) <= 1


def test_no_epoch_is_dropped_while_there_is_room() -> None:
    history = History()
    for epoch in range(3 * EPOCHS):
        history.add("a", epoch, top_of(1, [1]), found_of(torch.rand(1, 3, 4, 4)))
        (row,) = history.rows("a")
        if epoch < EPOCHS:
            assert list(row.epochs) == list(range(epoch + 1))
        assert len(row.epochs) <= EPOCHS


def test_a_picture_survives_the_history() -> None:
    history = History()
    images = torch.randn(2, 1, 3, 9, 9) * torch.tensor([1e-3, 1e3]).view(2, 1, 1, 1, 1)
    history.add("a", 0, top_of(2, [1, 1]), found_of(images))
    for row, image in zip(history.rows("a"), images[:, 0], strict=True):
        (kept,) = row.reconstructions
        assert kept is not None
        limit = image.abs().flatten().sort().values[-2]
        assert (kept - image.clamp(-limit, limit)).abs().max() <= image.abs().max() / 127


def test_an_epoch_seen_again_replaces_itself_and_a_new_run_its_predecessor() -> None:
    history = History()
    for epoch in (0, 1, 1, 2, 0, 1):
        image = torch.full((1, 1, 3, 5, 5), float(epoch + 1))
        history.add("a", epoch, top_of(1, [1]), found_of(image))
    (row,) = history.rows("a")
    assert list(row.epochs) == [0, 1]


def test_large_pictures_and_many_channels_are_bounded() -> None:
    history = History()
    for epoch in range(50):
        history.add("a", epoch, top_of(100, [1] * 100), found_of(torch.randn(100, 1, 1, 90, 70)))
    (layer,) = history.state_dict().values()
    assert len(layer["channels"]) == 16
    assert sum(each["images"].nbytes for each in layer["moments"]) <= 16 * EPOCHS * SIDE * SIDE


# ---- channels ----------------------------------------------------------------------------------------


def test_near_duplicates_are_those_that_correlate() -> None:
    base = torch.randn(400)
    other = torch.randn(400)
    maps = torch.stack([base, other, 3 * base + 1, torch.zeros(400), -base, other + 1e-3 * base])
    assert twins(maps).tolist() == [-1, -1, 0, -1, -1, 1]


def test_dead_channels_and_energy() -> None:
    activations = torch.zeros(2, 3, 4, 4)
    activations[:, 0], activations[0, 1, 0, 0] = 1, 2
    found = health(top_of(3, [1.0, 0.5, 0.0]), activations)
    assert found.dead.tolist() == [False, False, True]
    assert found.energy.tolist() == pytest.approx([32 / 36, 4 / 36, 0])
    assert found.scalars()["never_fires"] == pytest.approx(1 / 3)
    assert health(top_of(3, [0.0] * 3), activations * 0).energy.tolist() == [0, 0, 0]


def test_the_table_is_in_the_log(tmp_path: Path) -> None:
    run = trainer(tmp_path, DeconvCallback(layers="net.1", channels=[3, 0], compare=[]))
    run.fit(LitNet(), loader(), loader())
    events = logged(tmp_path)
    name = "deconv/net.1/channels/text_summary"
    assert name in events.Tags()["tensors"]
    text = events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("4 channels over 8 images")
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [int(row.split("|")[1]) for row in rows] == [3, 0]


# ---- over a run --------------------------------------------------------------------------------------


def fit(folder: Path, epochs: int, path: Path | None = None, **kwargs: Any) -> Any:
    seeded()
    callback = DeconvCallback(channels=3, probe=3, compare_images=1, on_error="raise", **kwargs)
    run = trainer(folder, callback, max_epochs=epochs)
    run.fit(LitNet(), loader(), loader(), ckpt_path=path)
    return run, callback


def test_a_run_that_is_stopped_and_resumed_gives_the_same_pictures(tmp_path: Path) -> None:
    fit(tmp_path / "whole", 3)
    run, callback = fit(tmp_path / "first", 2)
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"][callback.state_key]
    assert equal(saved, callback.state_dict())
    fit(tmp_path / "second", 3, path)
    whole, resumed = pictures(tmp_path / "whole"), pictures(tmp_path / "second")
    assert whole.keys() == resumed.keys()
    for tag, found in resumed.items():
        (step,) = found
        expected = whole[tag][step].convert("RGB")
        assert found[step].size == expected.size
        difference = ImageChops.difference(found[step].convert("RGB"), expected)
        extrema: Any = difference.getextrema()
        assert all(high <= 1 for _, high in extrema), tag


def test_patches_that_do_not_fit_lie_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    hang = gallery.Gallery.hang

    def hanging(own: Any, pictures: Any, *rest: Any) -> Any:
        seen[pictures.layer] = pictures.channels
        return hang(own, pictures, *rest)

    def drawn(bound: int) -> dict[str, Any]:
        seen.clear()
        _, warned = recorded(lambda: fit(tmp_path / str(bound), 1, max_bytes=bound))
        assert not any("DeconvCallback" in text for text in warned)
        return dict(seen)

    spilled: list[int] = []
    update = SpilledImages.update

    def updating(own: Any, *arguments: Any) -> None:
        update(own, *arguments)
        spilled.append(len(own))

    monkeypatch.setattr(gallery.Gallery, "hang", hanging)
    monkeypatch.setattr(SpilledImages, "update", updating)
    much = drawn(1 << 20)
    assert not spilled
    little = drawn(20_000)
    assert spilled[-1] == 8
    for layer, channels in much.items():
        for a, b in zip(channels, little[layer], strict=True):
            assert a.activations == pytest.approx(b.activations)
            assert torch.equal(a.patches, b.patches)
            assert torch.allclose(a.reconstructions, b.reconstructions, atol=1e-6)


def test_memory_is_said_once_before_any_patch_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    settle = Collector.end

    def settling(own: Collector) -> None:
        events.append("kept")
        settle(own)

    monkeypatch.setattr(Collector, "end", settling)
    monkeypatch.setattr(watch, "rank_zero_info", events.append)
    fit(tmp_path, 2, max_bytes=1 << 20, log=["channels"])
    said, *rest = events
    assert "layers net.1, net.4" in said
    assert "MiB (bound 1 MiB)" in said
    # two epochs of two batches
    assert rest == ["kept"] * 4


def test_at_most_one_validation_in_so_many_steps(tmp_path: Path) -> None:
    callback = DeconvCallback(layers="net.1", every_n_train_steps=3, compare=[])
    run = trainer(tmp_path, callback, max_epochs=6)
    run.fit(LitNet(), loader(), loader())
    # two steps an epoch: after 2, 6 and 10 of them
    assert sorted(pictures(tmp_path)["deconv/net.1/grid"]) == [1, 5, 9]


def test_all_channels_go_to_several_pictures(tmp_path: Path) -> None:
    net: Any = tiny_net()
    net[0] = torch.nn.Conv2d(3, 40, 3, padding=1)
    net[3] = torch.nn.Conv2d(40, 5, 3, padding=1)
    callback = DeconvCallback(layers="net.1", channels="all", log=["grid"], on_error="raise")
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(LitNet(net), loader(), loader())
    assert pictures(tmp_path).keys() == {"deconv/net.1/grid", "deconv/net.1/grid_2"}
