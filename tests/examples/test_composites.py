"""The generated pictures: the same for the same seed, with masks that agree with what is drawn."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_deconv.examples import composites
from lit_deconv.examples.composites import (
    CLASS_NAMES,
    CompositePictures,
    draw_picture,
    draw_split,
)
from lit_deconv.examples.contact_sheet import main as write_contact_sheet
from lit_deconv.examples.parts import PARTS, Canvas, Pen, textured


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    return draw_split("train", 300)


def _kinds(part_map: np.ndarray) -> set[str]:
    return {PARTS[i - 1] for i in np.unique(part_map) if i}


def test_same_seed_same_pictures_whatever_the_count(
    drawn: tuple[np.ndarray, np.ndarray],
) -> None:
    again = draw_split("train", 20)
    np.testing.assert_array_equal(again[0], drawn[0][:20])
    np.testing.assert_array_equal(again[1], drawn[1][:20])


@pytest.mark.parametrize(("split", "seed"), [("val", 0), ("train", 1)])
def test_other_seed_or_split_gives_other_pictures(
    drawn: tuple[np.ndarray, np.ndarray], split: composites.Split, seed: int
) -> None:
    other, _ = draw_split(split, 20, seed=seed)
    differing = (other != drawn[0][:20]).any(axis=(1, 2, 3))
    assert differing.all()


def test_drawing_leaves_the_global_random_states_alone() -> None:
    before = random.getstate(), torch.get_rng_state()
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    draw_split("train", 3)
    assert random.getstate() == before[0]
    assert np.random.rand() == expected
    assert torch.equal(torch.get_rng_state(), before[1])


def test_every_object_is_visible_whole_and_not_the_whole_picture(
    drawn: tuple[np.ndarray, np.ndarray],
) -> None:
    masks = drawn[1] > 0
    share = masks.mean(axis=(1, 2))
    assert share.min() > 0.03
    assert share.max() < 0.75
    # Nothing is cut off: a picture's border belongs to the background, but for the odd pixel.
    border = np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], axis=1)
    assert border.mean() < 0.01


def test_each_class_shows_the_same_parts_in_every_picture(
    drawn: tuple[np.ndarray, np.ndarray],
) -> None:
    optional = {"tree": {"fruit"}}  # firs bear none
    for label, name in enumerate(CLASS_NAMES):
        kinds = [_kinds(m) for m in drawn[1][label :: len(CLASS_NAMES)]]
        always, ever = set.intersection(*kinds), set.union(*kinds)
        assert len(always) >= 2
        assert ever - always == optional.get(name, set())


def test_classes_share_parts(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    owners = {
        name: _kinds(drawn[1][label :: len(CLASS_NAMES)]) for label, name in enumerate(CLASS_NAMES)
    }
    shared = {part for a, b in itertools.combinations(owners.values(), 2) for part in a & b}
    assert {"eye", "wheel", "window", "ear", "roof", "chimney", "tail"} <= shared
    assert sum(bool(parts & shared) for parts in owners.values()) >= 7


def test_mask_is_where_the_object_changed_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picture without its object differs from it inside the mask and nowhere else."""
    monkeypatch.setattr(composites, "_with_grain", lambda rng, picture: picture)
    for i, name in enumerate(CLASS_NAMES):
        with_object, part_map = draw_picture(name, random.Random(i))
        monkeypatch.setitem(composites.objects.DRAW, name, lambda pen, main, second: None)
        without, empty = draw_picture(name, random.Random(i))
        assert not empty.any()
        changed = (with_object != without).any(axis=0)
        mask = part_map > 0
        # Contours reach one pixel past the mask, two at a sharp tip.
        grown = np.pad(mask, 1)
        near = np.lib.stride_tricks.sliding_window_view(grown, (3, 3)).any(axis=(2, 3))
        assert (changed & ~near).sum() <= 3
        assert (changed & mask).sum() > 0.97 * mask.sum()


def test_clutter_leaves_the_part_map_alone() -> None:
    canvas = Canvas(textured(random.Random(0), 128, (10, 10, 10), (20, 20, 20)))
    pen = Pen(canvas, random.Random(0), (64, 64), 30, clutter=True)
    before = canvas.picture.copy()
    composites.parts.loose_part(pen)
    assert canvas.picture.tobytes() != before.tobytes()
    assert not np.asarray(canvas.part_map).any()


def test_cache_hit_gives_the_same_and_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = CompositePictures("val", 20, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(composites, "draw_picture", None)
    second = CompositePictures("val", 20, cache=tmp_path)
    assert torch.equal(first.pictures, second.pictures)
    assert torch.equal(first.part_maps, second.part_maps)


def test_cache_keeps_settings_apart(tmp_path: Path) -> None:
    CompositePictures("val", 10, cache=tmp_path)
    CompositePictures("val", 10, seed=1, cache=tmp_path)
    CompositePictures("val", 10, size=32, cache=tmp_path)
    CompositePictures("train", 10, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_file_cut_short_is_drawn_again(tmp_path: Path, keep: int) -> None:
    first = CompositePictures("val", 10, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    assert torch.equal(CompositePictures("val", 10, cache=tmp_path).pictures, first.pictures)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_told_and_survived(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.warns(UserWarning, match="could not keep the drawn pictures"):
        pictures = CompositePictures("val", 10, cache=blocked)
    assert len(pictures) == 10


def test_items_are_images_and_labels_with_masks_beside(tmp_path: Path) -> None:
    pictures = CompositePictures("val", 20, cache=tmp_path)
    image, label = pictures[14]
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert CLASS_NAMES[label] == "car"
    masks = pictures.part_masks(14)
    assert {"wheel", "window", "body"} <= masks.keys()
    assert all(mask.any() for mask in masks.values())
    assert torch.equal(torch.stack(list(masks.values())).any(0), pictures.object_mask(14))
    with pytest.raises(IndexError):
        pictures[20]


def test_contact_sheet(tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "sheet.png"
    write_contact_sheet([str(out), "--per-class", "1", "--cache", str(tmp_path)])
    with Image.open(out) as sheet:
        assert sheet.width > 10 * 96
        assert len(sheet.getcolors(256) or []) > 50
