"""Two processes find together what one finds alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lit_deconv import Deconvnet
from lit_deconv.top import collect_top, of_all_processes, reconstruct_top

LAYERS = ["1", "3"]
KINDS = ("sampled", "listed", "apart")
"""Of data: indices known, hashed, and known to one process alone, which has data of its own."""


def net() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.ReLU()
    ).eval()


def images() -> Tensor:
    return torch.randn(13, 3, 12, 12, generator=torch.Generator().manual_seed(7))


def one_process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    try:
        for kind in KINDS:
            torch.save(results(rank, world, kind), f"{folder}/{rank}{kind}.pt")
        torch.distributed.barrier()  # one that leaves first may take the other's connections down
    finally:
        torch.distributed.destroy_process_group()


def results(rank: int, world: int, kind: str) -> dict[str, dict[str, Tensor]]:
    x, model = images(), net()
    # 13 images for two processes: the sampler gives one of them to both
    sampler: DistributedSampler[Tensor] = DistributedSampler(x, world, rank, shuffle=False)  # type: ignore[arg-type]
    loader: DataLoader[Tensor] = DataLoader(x, 3, sampler=sampler)  # type: ignore[arg-type]
    if kind == "apart":
        loader = DataLoader(x[rank::world], 3)  # type: ignore[arg-type]
    given = list(loader) if kind == "listed" else loader
    top = collect_top(model, given, LAYERS, 4, progress=False)
    found = reconstruct_top(Deconvnet(model, LAYERS), top)
    by_layer = {}
    for name, layer in top.items():
        assert layer.patches is not None
        own = found[name]
        assert torch.equal(own.verified, layer.held & layer.exists)
        by_layer[name] = {
            "values": layer.values,
            "identity": layer.identity,
            "positions": layer.positions,
            "largest": layer.largest,
            "fires": layer.fires,
            "images": torch.tensor(layer.images),
            "patches": of_all_processes(layer.patches, layer.held),
            "reconstructions": of_all_processes(own.images, layer.held),
            "held": layer.held,
        }
    return by_layer


def test_two_processes_find_what_one_does() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_process, (2, folder), nprocs=2)
        for kind in KINDS:
            found = [torch.load(Path(folder) / f"{rank}{kind}.pt") for rank in range(2)]
            compare(kind, found)


def compare(kind: str, found: list[dict[str, dict[str, Tensor]]]) -> None:
    x, model = images(), net()
    loader: DataLoader[Tensor] = DataLoader(x, 3)  # type: ignore[arg-type]
    given = loader if kind == "sampled" else list(loader)
    top = collect_top(model, given, LAYERS, 4, progress=False)
    expected = reconstruct_top(Deconvnet(model, LAYERS), top)
    for name, layer in top.items():
        zero, one = found[0][name], found[1][name]
        # each unit is held by one process, and both hold some
        assert not (zero["held"] & one["held"]).any()
        assert (zero["held"] | one["held"]).all()
        assert zero["held"].any()
        assert one["held"].any()
        for result in (zero, one):
            assert torch.equal(result["identity"], layer.identity)
            assert torch.equal(result["positions"], layer.positions)
            torch.testing.assert_close(result["values"], layer.values)
            torch.testing.assert_close(result["largest"], layer.largest)
            torch.testing.assert_close(result["patches"], layer.patches)
            torch.testing.assert_close(
                result["reconstructions"], expected[name].images, rtol=1e-4, atol=1e-6
            )
            if kind != "listed":
                torch.testing.assert_close(result["fires"], layer.fires)
                assert int(result["images"]) == 13
