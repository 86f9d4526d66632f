"""Reconstructions from what was kept of the images are those from the whole images."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lit_deconv import Deconvnet
from lit_deconv.attr import Path as Way
from lit_deconv.top import LayerTop, collect_top, estimate, reconstruct_top
from lit_deconv.top.sources import SpilledImages

K = 3
# A convolution, a small field, one that is the whole image in one dimension only, a layer behind an
# average pool (not computed on patches) and one that sees everything.
LAYERS = ["0", "2", "4", "6", "7", "9"]


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x.mean((2, 3))).sigmoid()[..., None, None]


def net_of_all_kinds() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(6, 6, (3, 5), padding=(1, 2)),
        nn.ReLU(),
        nn.Conv2d(6, 6, (1, 7), padding=(0, 3)),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 5, 3, padding=1),
        Gate(5),
    ).eval()


def images(count: int = 20) -> Tensor:
    return torch.randn(count, 3, 24, 20, generator=torch.Generator().manual_seed(6))


def units(layer: LayerTop) -> Tensor:
    channel = layer.channels[:, None, None].expand(*layer.identity.shape, 1)
    return torch.cat([layer.identity[..., None], channel, layer.positions], -1).flatten(0, 1)


class Stream(IterableDataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x)


class CountedReads(Dataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        self.reads.append(index)
        return self.x[index]


@pytest.mark.parametrize("path", ["auto", "autograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reconstructions_equal_those_of_whole_images(path: Way, dtype: torch.dtype) -> None:
    model, x = net_of_all_kinds().to(dtype), images().to(dtype)
    loader = DataLoader(TensorDataset(x), 6)
    top = collect_top(model, loader, LAYERS, K, progress=False, path=path)
    found = reconstruct_top(Deconvnet(model, LAYERS, path=path), top)
    inside = reconstruct_top(Deconvnet(model, LAYERS, path=path), top, inside=True)
    fields = set()
    for name, layer in top.items():
        whole = Deconvnet(model, name, path=path)
        mine = found[name]
        assert mine.verified.all()
        assert mine.doubtful == 0
        maps = whole.activations(x)
        exact = maps[units(layer).unbind(1)].view(layer.values.shape)
        torch.testing.assert_close(mine.activations, exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.activations.float(), layer.values, rtol=1e-4, atol=1e-5)
        full = whole.reconstruct(x, units(layer))
        expected = layer.cut(full, torch.arange(len(full)), layer.boxes.flatten(0, 1))
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            mine.images.flatten(0, 1), expected, rtol=1e-4, atol=1e-5 * scale
        )
        assert layer.patches is not None
        assert torch.equal(mine.patches, layer.patches)
        # as figures show it: windows moved into the image, with what is there of both
        rows, windows = torch.arange(len(full)), layer.windows.flatten(0, 1)
        shown = inside[name]
        seen = x.index_select(0, layer.identity.flatten())
        assert torch.equal(shown.patches.flatten(0, 1), layer.cut(seen, rows, windows))
        moved = layer.cut(expected, rows, windows - layer.boxes.flatten(0, 1))
        assert torch.allclose(shown.images.flatten(0, 1), moved, rtol=1e-4, atol=1e-5 * scale)
        fields.add((layer.layout.is_local, layer.layout.takes_image, layer.layout.field.whole))
    if path == "autograd":
        assert fields == {(False, True, (True, True))}
    else:
        assert (True, False, (False, False)) in fields
        assert (True, False, (False, True)) in fields
        assert {local for local, _, _ in fields} == {True, False}


@pytest.mark.parametrize("kind", ["map-style", "shuffled", "iterable"])
def test_without_room_for_patches_each_image_is_read_once_more(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net_of_all_kinds(), images()
    reads = CountedReads(x)
    loader: DataLoader[Tensor] = (
        DataLoader(Stream(x), 6)
        if kind == "iterable"
        else DataLoader(reads, 6, shuffle=kind == "shuffled")
    )
    written: list[str] = []
    save = torch.save

    def saving(image: Tensor, file: Path) -> None:
        written.append(file.name)
        save(image, file)

    monkeypatch.setattr("lit_deconv.top.sources.torch.save", saving)
    sizes = estimate(Deconvnet(model, LAYERS).layouts(x), K).values()
    bound = sum(size.numbers for size in sizes)
    top = collect_top(model, loader, LAYERS, K, max_bytes=bound, progress=False)
    reads.reads.clear()
    assert all(layer.kept is None and layer.patches is None for layer in top.values())
    # ties go by identity: the same kind of it on both sides
    same = DataLoader(x, 6) if kind == "map-style" else x.split(6)  # type: ignore[arg-type]
    reference = collect_top(model, same, LAYERS, K, progress=False)
    net = Deconvnet(model, LAYERS)
    found, expected = reconstruct_top(net, top), reconstruct_top(net, reference)
    for name, layer in top.items():
        torch.testing.assert_close(layer.values, reference[name].values)
        assert found[name].verified.all()
        torch.testing.assert_close(found[name].images, expected[name].images, rtol=1e-4, atol=1e-6)
        assert torch.equal(found[name].patches, expected[name].patches)
    if kind == "map-style":
        wanted = torch.cat([layer.identity.flatten() for layer in top.values()])
        assert sorted(reads.reads) == wanted.unique().tolist()
        assert not written
        return
    assert not reads.reads
    assert len(written) == len(set(written))
    source = top.images
    assert isinstance(source, SpilledImages)
    wanted = torch.cat([layer.identity.flatten() for layer in top.values()]).unique()
    assert len(wanted) <= len(source) <= len(x)
    folder = source._folder
    assert len(list(folder.iterdir())) == len(source)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del top, source
        gc.collect()
    assert not folder.exists()
    assert not warned


def test_other_weights_are_noticed_and_left_out() -> None:
    model, x = net_of_all_kinds(), images()
    stream = DataLoader(Stream(x), 6)
    top = collect_top(model, stream, LAYERS, K, progress=False)
    with torch.no_grad():
        model[0].weight[2] *= 1.01  # type: ignore[index,operator]
    found = reconstruct_top(Deconvnet(model, LAYERS), top)
    assert found["0"].verified.logical_not().nonzero()[:, 0].unique().tolist() == [2]
    assert found["0"].doubtful == K
    assert not found["0"].images[2].any()
    assert found["0"].images[3].any()
    assert found["9"].doubtful


def test_a_field_that_is_not_what_the_ops_say_falls_back_on_the_whole_image() -> None:
    model, x = net_of_all_kinds(), images()
    top = collect_top(model, DataLoader(x, 6), ["4"], K, progress=False)  # type: ignore[arg-type]
    layer = top["4"]
    assert layer.kept is not None
    layer.kept[1].mul_(1.5)  # what was kept is not enough
    found = reconstruct_top(Deconvnet(model, ["4"]), top)["4"]
    assert found.verified.all()
    full = Deconvnet(model, "4").reconstruct(x, units(layer), crop=True)[0]
    torch.testing.assert_close(found.images.flatten(0, 1), full, rtol=1e-4, atol=1e-6)


def test_fewer_images_than_units() -> None:
    model, x = net_of_all_kinds(), images(2)
    top = collect_top(model, DataLoader(x, 6), LAYERS, K, progress=False)  # type: ignore[arg-type]
    for name, found in reconstruct_top(Deconvnet(model, LAYERS), top).items():
        assert torch.equal(found.verified, top[name].exists)
        assert top[name].exists.sum(1).unique().tolist() == [2]
        assert not found.images[:, 2].any()
        assert found.activations[:, 2].isnan().all()


def test_activations_recorded_in_half_precision_are_recomputed_to_its_rounding() -> None:
    model, x = net_of_all_kinds(), images()
    with torch.autocast("cpu", torch.bfloat16):
        top = collect_top(model, DataLoader(x, 6), LAYERS, K, progress=False, autocast=True)  # type: ignore[arg-type]
    assert top["4"].recorded == torch.bfloat16
    found = reconstruct_top(Deconvnet(model, LAYERS), top)
    for name, layer in top.items():
        assert found[name].verified.all()
        torch.testing.assert_close(found[name].activations, layer.values, rtol=3e-2, atol=1e-3)
    assert not torch.equal(found["4"].activations, top["4"].values)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    model = nn.Sequential(conv(2, 3, 3, padding=1), nn.ReLU(), conv(3, 4, 3)).eval()
    x = torch.randn(9, 2, *[11] * dims)
    top = collect_top(model, DataLoader(x, 4), ["1", "2"], K, progress=False)  # type: ignore[arg-type]
    found = reconstruct_top(Deconvnet(model, ["1", "2"]), top)
    for name, layer in top.items():
        assert found[name].verified.all()
        expected, boxes = Deconvnet(model, name).reconstruct(x, units(layer), crop=True)
        torch.testing.assert_close(found[name].images.flatten(0, 1), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.boxes.flatten(0, 1), boxes)


def test_the_model_is_left_as_it_was_and_progress_goes_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, x = net_of_all_kinds(), images()
    model.train()
    model[3].eval()
    flags = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    collect_top(model, DataLoader(x, 6), "4", K)  # type: ignore[arg-type]
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    out, err = capsys.readouterr()
    assert out == ""
    assert "strongest units" in err
    assert "MiB" in err
