"""Who an image is: its data index where the loader's order tells it, else a hash of its pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_models import LitNet, images_and_labels, loader, seeded, trainer
from lit_deconv.callbacks import DeconvCallback, order, session
from lit_deconv.callbacks.capture import Capture
from lit_deconv.callbacks.health import Health, table
from lit_deconv.callbacks.order import Given
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_deconv import Deconvnet
from lit_deconv.top import LayerTop

IMAGES = 8


def validated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: LitNet, val: Any
) -> dict[str, LayerTop]:
    """What was collected over a validation, by layer."""
    seen: dict[str, LayerTop] = {}
    draw = session.draw

    def noting(*args: Any) -> Any:
        seen.update(args[1])
        return draw(*args)

    callback = DeconvCallback(["net.1", "net.4"], "all", 4, compare=[], on_error="raise")
    with monkeypatch.context() as patched:
        patched.setattr(session, "draw", noting)
        trainer(folder, callback).validate(model, val, verbose=False)
    return seen


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return zip(*images_and_labels(), strict=True)


class Backwards(DataLoader):
    """A loader that does not keep to its sampler."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


class Stepping(LitNet):
    """Validates by a step that the test gives."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.step(self, batch)


def data() -> TensorDataset:
    return TensorDataset(*images_and_labels())


def test_images_are_known_by_their_data_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded()
    model, (images, _) = LitNet(), images_and_labels()
    found = validated(tmp_path, monkeypatch, model, DataLoader(data(), 3))
    for name, top in found.items():
        best = Deconvnet(model.cpu(), name).activations(images).amax((2, 3))
        for channel, row in enumerate(top.identity):
            expected = best[:, channel].argsort(descending=True)[:4]
            fires = best[expected, channel] > 0  # silent maps are tied
            assert torch.equal(row.cpu()[fires], expected[fires])
        assert int(top.identity.min()) >= 0


@pytest.mark.parametrize(
    "val",
    [
        lambda: DataLoader(data(), 4, shuffle=True),
        lambda: DataLoader(Stream(), 4),
        lambda: Backwards(data(), 3),
        # an index would not tell of which of them an image is
        lambda: [DataLoader(data(), 4), DataLoader(data(), 4)],
    ],
    ids=["shuffled", "iterable", "a loader of its own", "two loaders"],
)
def test_where_the_order_is_not_known_a_hash_it_is(
    val: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Stepping(lambda own, batch: own(batch[0]))
    for top in validated(tmp_path, monkeypatch, model, val()).values():
        assert int(top.identity.max()) < 0
        assert top.images in (IMAGES, 2 * IMAGES)


@pytest.mark.parametrize(
    "step",
    [
        lambda own, batch: own(batch[0] * 2),
        lambda own, batch: own(batch[0].flip(0)),
        lambda own, batch: own(torch.cat([batch[0], batch[0].flip(3)])),
        lambda own, batch: own(batch[0][1:]),
    ],
    ids=["scaled", "in another order", "two views", "without the first"],
)
def test_images_that_the_step_made_are_known_by_a_hash(
    step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for top in validated(tmp_path, monkeypatch, Stepping(step), loader()).values():
        assert int(top.identity.max()) < 0


def test_two_views_of_an_item_are_two_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = images_and_labels()
    val = DataLoader(TensorDataset(images, images.flip(3)), 4)
    model = Stepping(lambda own, batch: [own(view) for view in batch])
    for top in validated(tmp_path, monkeypatch, model, val).values():
        assert top.images == 2 * IMAGES
        known = top.identity >= 0
        assert known.any()
        assert not known.all()
        assert all(len(row.unique()) == len(row) for row in top.identity)


def test_the_same_images_twice_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stepping(lambda own, batch: [own(batch[0]) for _ in range(2)])
    for top in validated(tmp_path, monkeypatch, model, loader()).values():
        assert int(top.identity.min()) >= 0
        assert all(len(row.unique()) == len(row) for row in top.identity)


def test_the_same_winners_by_index_and_by_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded()
    model, val = LitNet(), DataLoader(data(), 3)
    indexed = validated(tmp_path / "index", monkeypatch, model, val)
    monkeypatch.setattr(order, "batch_indices", lambda given: None)
    hashed = validated(tmp_path / "hash", monkeypatch, model, val)
    for name, top in indexed.items():
        other = hashed[name]
        assert int(other.identity.max()) < 0 <= int(top.identity.min())
        differ = top.values > 0
        assert differ.any()
        assert torch.equal(top.values, other.values)
        assert torch.equal(top.positions[differ], other.positions[differ])
        assert top.kept is not None
        assert other.kept is not None
        assert torch.equal(top.kept[differ], other.kept[differ])
        assert torch.equal(top.fires, other.fires)


def test_no_batch_outlives_its_hooks() -> None:
    capture = Capture({})
    capture.attach()
    capture.given = Given(torch.zeros(1, 3, 4, 4), [5])
    capture.detach()
    assert capture.given == Given(None, [5])


def test_the_table_names_the_strongest_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded()
    val = DataLoader(data(), 3)
    top = validated(tmp_path, monkeypatch, LitNet(), val)["net.1"]
    fine = Health(torch.zeros(4), torch.full((4,), -1), torch.ones(4))

    def column(given: Tensor) -> list[str]:
        top.identity.copy_(given)
        lines = [line for line in table(top, fine).splitlines() if line.startswith("|")]
        at = [cell.strip() for cell in lines[0].split("|")].index("strongest image")
        return [line.split("|")[at].strip() for line in lines[2:]]

    assert column(top.identity.clone()) == [str(i) for i in top.identity[:, 0].tolist()]
    # a hash says nothing to a reader
    assert column(-top.identity - 2) == [""] * 4


def test_indices_draw_no_random_numbers() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    taken = order.Order(DataLoader(data(), 3, shuffle=True)), order.Order(DataLoader(data(), 3))
    given = [each.given(None, 0).indices for each in taken]
    assert given == [None, [0, 1, 2]]
    assert torch.equal(torch.get_rng_state(), before)
