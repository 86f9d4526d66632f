"""Pictures: found as named, made into inputs as torchvision does it, each at most once on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from lit_deconv.commands import pictures
from lit_deconv.commands.pictures import Pictures, View, find_pictures


def test_files_folders_and_globs_each_once(folder: Path) -> None:
    (folder / "pictures" / "deep").mkdir()
    (folder / "pictures" / "deep" / "PHOTO.JPG").touch()
    (folder / "pictures" / "notes.txt").touch()
    (folder / "pictures" / ".hidden.png").touch()
    found = [str(p) for p in find_pictures(["pictures/3.png", "pictures", "pictures/**/*.JPG"])]
    assert found[0] == "pictures/3.png"
    assert sorted(found) == [*(f"pictures/{n}.png" for n in range(5)), "pictures/deep/PHOTO.JPG"]


def test_a_name_with_brackets_is_a_file_first(folder: Path) -> None:
    Path("pictures/0.png").rename("pictures/a[1].png")
    assert find_pictures(["pictures/a[1].png"]) == [Path("pictures/a[1].png")]


@pytest.mark.parametrize("size", [(300, 260), (260, 301), (90, 90)])
def test_as_torchvision_prepares_them(size: tuple[int, int]) -> None:
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    noise = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    transforms = weights.transforms()
    view = View(
        (transforms.crop_size[0],) * 2,
        transforms.resize_size[0],
        tuple(transforms.mean),
        tuple(transforms.std),
    )
    torch.testing.assert_close(view.tensor(picture), transforms(picture), rtol=0, atol=1e-6)


def test_batches_hold_every_readable_picture_in_order(folder: Path) -> None:
    Path("pictures/2.png").write_bytes(b"")
    paths = find_pictures(["pictures"])
    given = Pictures(paths, View((32, 24)))
    batches = list(given.batches(2))
    assert [numbers for numbers, _ in batches] == [[0, 1], [3], [4]]
    for numbers, images in batches:
        assert images.shape[1:] == (3, 32, 24)
        assert torch.equal(images, given(numbers))
    assert list(given.skipped) == ["pictures/2.png"]


def test_what_is_kept_in_memory_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "KEPT_BYTES", 2 * 3 * 32 * 32 * 4)
    given = Pictures(find_pictures(["pictures"]), View((32, 32)), room=pictures.KEPT_BYTES)
    first = torch.cat([images for _, images in given.batches(3)])
    for path in given.paths[:2]:
        path.unlink()  # those are kept
    assert torch.equal(given(range(5)), first)
    given.paths[2].unlink()
    with pytest.raises(OSError, match=r"2\.png"):
        given([2])


def test_a_photograph_stands_upright(folder: Path) -> None:
    picture = Image.new("RGB", (20, 10))
    picture.paste((255, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save("turned.jpg", exif=exif, quality=95)
    (read,) = Pictures([Path("turned.jpg")], View((20, 10)))([0])
    assert read[0, :9].min() > 0.9
    assert read[0, 11:].max() < 0.1
