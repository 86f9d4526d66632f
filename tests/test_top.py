"""The strongest units against a brute force that stores every activation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lit_deconv import Deconvnet
from lit_deconv.engine.errors import LayerError
from lit_deconv.render import crop_boxes, shift_boxes
from lit_deconv.top import (
    NOT_COUNTED,
    Collector,
    TopActivations,
    batch_indices,
    collect_top,
    estimate,
    hashed,
    total_bytes,
)
from lit_deconv.top.ranking import as_key, as_value, bar_of, merged, no_units

K = 4
LAYERS = ["0", "2", "4", "5"]


def small_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(inplace=True),  # overwrites what the hook on the convolution saw
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
    ).eval()


def images(count: int = 23) -> Tensor:
    return torch.randn(count, 2, 16, 14, generator=torch.Generator().manual_seed(5))


def best_by_force(maps: Tensor, identity: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, identities and flat places [C, k] of [N, C, *map], one rank after the other."""
    found = []
    for channel in maps.flatten(2).unbind(1):
        left: dict[int, tuple[float, int]] = {}
        for who, row in zip(identity.tolist(), channel, strict=True):
            value, place = float(row.max()), int(row.argmax())
            if who not in left or left[who][0] < value:
                left[who] = (value, place)
        ranks: list[tuple[float, int, int]] = []
        while left and len(ranks) < k:
            top = max(value for value, _ in left.values())
            who = min(i for i, (value, _) in left.items() if value >= top - 1e-5 * abs(top))
            ranks.append((left[who][0], who, left.pop(who)[1]))
        found.append(ranks)
    columns = [[[entry[i] for entry in ranks] for ranks in found] for i in range(3)]
    return torch.tensor(columns[0]), torch.tensor(columns[1]), torch.tensor(columns[2])


def collected(
    model: nn.Module,
    batches: Sequence[Tensor],
    indices: Sequence[Sequence[int] | None],
    layers: Sequence[str] = LAYERS,
    k: int = K,
    **options: object,
) -> Collector:
    net = Deconvnet(model, list(layers))
    collector = Collector(net.layouts(batches[0]), k, **options)  # type: ignore[arg-type]
    show(net, collector, batches, indices)
    return collector


def show(
    net: Deconvnet,
    collector: Collector,
    batches: Sequence[Tensor],
    indices: Sequence[Sequence[int] | None],
) -> None:
    placed = [
        module.register_forward_hook(
            lambda module, args, output, name=name: collector.see(name, output)
        )
        for name, module in net.layers.items()
    ]
    with torch.no_grad():
        for batch, index in zip(batches, indices, strict=True):
            collector.begin(batch, index)
            net.model(batch)
            collector.end()
    for hook in placed:
        hook.remove()


def equal(one: TopActivations, other: TopActivations) -> None:
    assert list(one) == list(other)
    for name, layer in one.items():
        for field in ("values", "identity", "positions", "boxes", "largest", "fires", "kept"):
            assert torch.equal(getattr(layer, field), getattr(other[name], field)), (name, field)


@pytest.mark.parametrize("channels", [None, [4, 0, 2]])
def test_the_strongest_units_are_those_of_a_brute_force(channels: list[int] | None) -> None:
    model, x = small_net(), images()
    # 23 images in batches of 5: the last one is partial
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), 5)
    top = collect_top(model, loader, LAYERS, K, channels, progress=False)
    maps = Deconvnet(model, LAYERS).activations(x)
    for name, layer in top.items():
        chosen = maps[name] if channels is None else maps[name][:, channels]
        values, identity, place = best_by_force(chosen, torch.arange(len(x)), K)
        assert torch.equal(layer.identity, identity)
        torch.testing.assert_close(layer.values, values)
        width = maps[name].shape[3]
        assert torch.equal(layer.positions[..., 0] * width + layer.positions[..., 1], place)
        torch.testing.assert_close(layer.largest, maps[name].amax((0, 2, 3)))
        torch.testing.assert_close(layer.fires, (maps[name].amax((2, 3)) > 0).float().mean(0))
        assert layer.images == len(x)
        assert layer.channels.tolist() == (channels or list(range(maps[name].shape[1])))


def test_patches_are_crops_of_the_images_with_zeros_outside() -> None:
    model, x = small_net(), images()
    top = collect_top(model, DataLoader(x, 8), LAYERS, K, progress=False)  # type: ignore[arg-type]
    outside = 0
    for name, layer in top.items():
        assert layer.patches is not None
        _, boxes = Deconvnet(model, name).reconstruct(x, _units(layer), crop=True)
        assert torch.equal(boxes, layer.boxes.flatten(0, 1))
        flat = layer.boxes.flatten(0, 1).tolist()
        for patch, box, who in zip(
            layer.patches.flatten(0, 1), flat, layer.identity.flatten(), strict=True
        ):
            for row, column in itertools.product(range(patch.shape[1]), range(patch.shape[2])):
                y, z = box[0] + row, box[1] + column
                inside = 0 <= y < x.shape[2] and 0 <= z < x.shape[3]
                expected = x[who, :, y, z] if inside else torch.zeros(2)
                outside += not inside
                assert torch.equal(patch[:, row, column], expected)
    assert outside


def test_what_is_kept_are_the_boxes_moved_into_the_image() -> None:
    model, x = small_net(), images()
    top = collect_top(model, DataLoader(x, 8), LAYERS, K, progress=False)  # type: ignore[arg-type]
    moved = 0
    for layer in top.values():
        assert layer.kept is not None
        flat = layer.windows.flatten(0, 1)
        assert torch.equal(flat, shift_boxes(layer.boxes.flatten(0, 1), *x.shape[2:]))
        expected = crop_boxes(x[layer.identity.flatten()], flat)
        assert torch.equal(layer.cut_kept(layer.kept.flatten(0, 1), flat), expected)
        moved += int((flat != layer.boxes.flatten(0, 1)).any(1).sum())
    assert moved


def _units(layer: object) -> Tensor:
    channel = layer.channels[:, None, None].expand(*layer.identity.shape, 1)  # type: ignore[attr-defined]
    return torch.cat([layer.identity[..., None], channel, layer.positions], -1).flatten(0, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("known", [True, False])
def test_neither_order_nor_batches_nor_parts_change_the_result(known: bool) -> None:
    model, x = small_net(), images(24)
    x[20] = x[3]  # twice in the data: one image where it is known by its pixels

    def top_of(order: Tensor, size: int, parts: int) -> TopActivations:
        collectors = []
        for part in range(parts):
            rows = order[part::parts].split(size)
            indices = [row.tolist() if known else None for row in rows]
            collectors.append(collected(model, [x[row] for row in rows], indices, holder=part))
        first = collectors[0]
        for name, metric in first.metrics.items():
            others = [collector.metrics[name] for collector in collectors]
            metric.units = merged(torch.stack([other.units for other in others]))
            metric.largest = torch.stack([other.largest for other in others]).amax(0)
            metric.fires = torch.stack([other.fires for other in others]).sum(0)
            metric.images = torch.stack([other.images for other in others]).sum(0)
        return first.compute()

    reference = top_of(torch.arange(24), 24, 1)
    generator = torch.Generator().manual_seed(2)
    for size, parts in ((1, 1), (5, 1), (7, 2), (3, 4)):
        other = top_of(torch.randperm(24, generator=generator), size, parts)
        for name, layer in reference.items():
            assert torch.equal(layer.identity, other[name].identity)
            torch.testing.assert_close(layer.values, other[name].values)
            assert torch.equal(layer.positions, other[name].positions)
            torch.testing.assert_close(layer.fires, other[name].fires)


def values_only(values: Tensor, identity: Sequence[int], k: int, batch: int = 1) -> TopActivations:
    """Units of a layer that answers with given values: [N] -> one channel of one place."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
    x = values.view(-1, 1, 1, 1)
    rows = torch.arange(len(x)).split(batch)
    indices = [[identity[row] for row in part.tolist()] for part in rows]
    return collected(model, [x[part] for part in rows], indices, ["0"], k).compute()


def test_near_ties_go_to_the_lower_identity() -> None:
    values = 1 + 1e-7 * torch.arange(20)  # all within 1e-5, the later the larger
    assert values_only(values, range(20), 3)["0"].identity.tolist() == [[0, 1, 2]]
    assert values_only(values.flip(0), range(19, -1, -1), 3)["0"].identity.tolist() == [[0, 1, 2]]
    # a pair on both sides of a bucket's edge
    edge = as_value(torch.tensor([(int(as_key(torch.tensor(1.5))) >> 6) << 6]))
    pair = torch.cat([torch.nextafter(edge, torch.tensor(0.0)), edge])
    for batch in (1, 2):
        assert values_only(pair, [4, 7], 1, batch)["0"].identity.tolist() == [[4]]
        assert values_only(pair, [4, 7], 2, batch)["0"].identity.tolist() == [[4, 7]]
    apart = torch.tensor([1.0, 1.00003])
    assert values_only(apart, [0, 1], 2)["0"].identity.tolist() == [[1, 0]]


def test_an_image_counts_once() -> None:
    values = torch.tensor([3.0, 5.0, 3.0, 5.0, 1.0])
    for batch in (1, 2, 5):
        layer = values_only(values, [8, 2, 8, 2, 9], 4, batch)["0"]
        assert layer.identity[0, :3].tolist() == [2, 8, 9]
        assert layer.values.tolist() == [[5, 3, 1, -torch.inf]]
        assert layer.exists.tolist() == [[True, True, True, False]]
        assert layer.held.tolist() == [[True, True, True, False]]


def test_of_a_batch_only_what_can_enter_is_looked_at() -> None:
    best = torch.tensor([9.0, 9.0, 9.0, 8.0, 7.0, 7.0 + 1e-6, 5.0, 4.0])
    identity = [3, 3, 3, 4, 5, 6, 7, 8]
    # three are kept: of 3, of 4, and, as 5 and 6 are tied, of 5
    reached = bar_of(no_units(1, 2)).reached(best[None], torch.tensor(identity), 3)
    assert reached.tolist() == [[True] * 6 + [False] * 2]
    equal(values_only(best, identity, 3, 8), values_only(best, identity, 3, 1))


def test_images_that_another_process_counts_are_left_out() -> None:
    layer = values_only(torch.tensor([3.0, 9.0, 4.0]), [0, NOT_COUNTED, 1], 2, 3)["0"]
    assert layer.identity.tolist() == [[1, 0]]
    assert layer.images == 2
    assert layer.largest.tolist() == [4]
    empty = values_only(torch.tensor([3.0]), [NOT_COUNTED], 2)["0"]
    assert empty.images == 0
    assert not empty.exists.any()


def test_by_hash_indices_say_no_more_than_which_images_count() -> None:
    x = images(5)
    collector = Collector(Deconvnet(small_net(), LAYERS).layouts(x), K)
    collector.begin(x, [3, NOT_COUNTED, 4, 0, NOT_COUNTED], by_hash=True)
    counted = x[[0, 2, 3]]
    assert torch.equal(collector.batch[0], counted)
    assert torch.equal(collector.batch[1], hashed(counted))


def test_dead_channels_negative_values_and_what_is_no_number() -> None:
    dead = values_only(torch.zeros(7), range(7), 3, 2)["0"]
    assert dead.identity.tolist() == [[0, 1, 2]]
    assert dead.fires.tolist() == [0]
    negative = values_only(torch.tensor([-3.0, -1.0, -2.0, -0.0]), range(4), 4)["0"]
    assert negative.values.tolist() == [[0, -1, -2, -3]]
    odd = torch.tensor([1.0, torch.nan, torch.inf, 2.0])
    broken = values_only(odd, range(4), 4, 2)["0"]
    assert broken.identity[0, :3].tolist() == [2, 3, 0]
    assert broken.exists.tolist() == [[True, True, True, False]]
    assert broken.broken.tolist() == [1]


def test_keys_sort_like_numbers_and_give_them_back() -> None:
    numbers = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, torch.inf])
    assert (as_key(numbers).diff() > 0).all()
    assert torch.equal(as_value(as_key(numbers)), numbers)


def test_hashes_know_an_image_in_any_batch_and_tell_similar_ones_apart() -> None:
    x = images(40)
    assert torch.equal(hashed(x)[7:9], hashed(x[7:9].to(memory_format=torch.channels_last)))
    flags = torch.tensor([[(n >> bit) & 1 for bit in range(12)] for n in range(4096)])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.uint8):
        similar = flags.view(-1, 1, 3, 4).to(dtype)
        found = hashed(similar)
        assert len(found.unique()) == 4096
        assert (found < 0).all()
        if dtype.is_floating_point:
            assert len(hashed(1 - 2 * similar).unique()) == 4096  # they differ in signs alone


def test_known_orders() -> None:
    x = images(7)
    assert list(batch_indices(DataLoader(x, 3)) or ()) == [[0, 1, 2], [3, 4, 5], [6]]  # type: ignore[arg-type]
    assert batch_indices(DataLoader(x, 3, shuffle=True)) is None  # type: ignore[arg-type]
    assert batch_indices(DataLoader(x, batch_size=None)) is None  # type: ignore[arg-type]
    if "in_order" in signature(DataLoader).parameters:
        assert batch_indices(DataLoader(x, 3, num_workers=1, in_order=False)) is None  # type: ignore[arg-type]

    class Backwards(DataLoader[Tensor]):
        def __iter__(self) -> Any:
            return iter(list(super().__iter__())[::-1])

    assert batch_indices(Backwards(x, 3)) is None  # type: ignore[arg-type]
    counted: list[int] = []
    for rank, shuffle in itertools.product(range(4), (False, True)):
        sampler = DistributedSampler(x, 4, rank, shuffle=shuffle)  # type: ignore[arg-type,var-annotated]
        loader: DataLoader[Tensor] = DataLoader(x, 1, sampler=sampler)  # type: ignore[arg-type]
        given = [image for batch in batch_indices(loader) or () for image in batch]
        assert [a for a, b in zip(sampler, given, strict=True) if a != b] == [
            a for a, b in zip(sampler, given, strict=True) if b == NOT_COUNTED
        ]
        counted += [image for image in given if image != NOT_COUNTED]
    assert sorted(counted) == sorted([*range(7), *range(7)])


def test_memory_is_what_was_estimated_however_many_images() -> None:
    model, x = small_net(), images()
    net = Deconvnet(model, LAYERS)
    for channels in (None, [1, 3]):
        expected = estimate(net.layouts(x), K, channels, examples=2)
        collector = collected(model, [x], [None], channels=channels, examples=2)
        for _ in range(2):
            for name, metric in collector.metrics.items():
                states = [getattr(metric, state) for state in metric.start()]
                others = [
                    *metric.first,
                    *metric.bar,
                    metric.chosen,
                    metric.patches,
                ]
                kept = metric.examples
                assert kept is not None
                assert kept.images is not None
                whole = [kept.rows, kept.units, kept.images]
                assert expected[name].examples == sum(each.nbytes for each in whole)
                held = [t.untyped_storage().nbytes() for t in (*states, *others) if t is not None]
                patches = metric.patches
                assert patches is not None
                assert expected[name].patches == patches.nbytes
                assert expected[name].numbers == sum(held) - patches.nbytes
            show(net, collector, [x + shift for shift in range(10)], [None] * 10)
        assert total_bytes(collector.bytes.values()) == total_bytes(expected.values())


def test_the_bound_is_kept_and_numbers_beyond_it_are_refused() -> None:
    net = Deconvnet(small_net(), LAYERS)
    layouts = net.layouts(images())
    every = estimate(layouts, K)
    total = total_bytes(every.values())
    less = estimate(layouts, K, max_bytes=total - 1)
    assert total_bytes(less.values()) < total
    assert [name for name in LAYERS if not less[name].patches] == [
        max(LAYERS, key=lambda name: every[name].patches)
    ]
    with pytest.raises(ValueError, match="fewer channels or raise the bound"):
        estimate(layouts, K, max_bytes=1000)


@pytest.mark.parametrize("looks", [True, False])
def test_whole_images_of_the_strongest_units(looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_deconv.top.counting._may_look", lambda device: looks)
    model, x = small_net(), images()
    parts = [x[:9], x[9:]]
    collector = collected(model, [x + 3], [None], examples=3, channels=[4, 0, 2, 1])
    collector.reset()  # of another pass nothing is left
    show(Deconvnet(model, LAYERS), collector, [*parts[0].split(4), *parts[1].split(5)], [None] * 6)
    for layer in collector.compute().values():
        found = layer.examples
        assert found is not None
        assert found.channels.tolist() == [4, 0, 2]
        assert found.ranks.tolist() == [0, 0, 0]
        rows = [0, 1, 2]
        assert torch.equal(found.values, layer.values[rows, 0])
        assert torch.equal(found.positions, layer.positions[rows, 0])
        assert torch.equal(hashed(found.images), layer.identity[rows, 0])


def test_whole_images_that_do_not_fit_are_not_kept() -> None:
    layouts = Deconvnet(small_net(), LAYERS).layouts(images())
    bare = total_bytes(estimate(layouts, K, max_bytes=100_000).values())
    assert bare <= 100_000
    every = total_bytes(estimate(layouts, K, max_bytes=1 << 30, examples=2).values())
    assert every > total_bytes(estimate(layouts, K, max_bytes=1 << 30).values())
    numbers = sum(each.numbers for each in estimate(layouts, K).values())
    few = estimate(layouts, K, max_bytes=numbers + 1000, examples=2)
    assert not any(each.examples or each.patches for each in few.values())
    collector = Collector(layouts, K, max_bytes=numbers + 1000, examples=2)
    assert collector.metrics["0"].examples is None
    assert "without the whole images" in collector.summary()


def test_another_pass_starts_anew() -> None:
    model, x = small_net(), images()
    collector = collected(model, [x + 3], [None])
    collector.reset()
    show(Deconvnet(model, LAYERS), collector, [x], [None])
    equal(collector.compute(), collected(model, [x], [None]).compute())


def test_under_inference_mode_and_then_without() -> None:
    model, x = small_net(), images()
    net = Deconvnet(model, LAYERS)
    with torch.inference_mode():
        collector = Collector(net.layouts(x), K)
        show(net, collector, [x[:11].clone()], [None])
        collector.compute()
    show(net, collector, [x[11:]], [None])
    with torch.inference_mode():
        collector.compute()
        again = Collector(net.layouts(x), K)
        show(net, again, [x.clone()], [None])
        again.reset()
    show(net, again, [x], [None])
    equal(collector.compute(), again.compute())


def test_mistakes_are_named() -> None:
    model, x = small_net(), images()
    collector = Collector(Deconvnet(model, LAYERS).layouts(x), K)
    with pytest.raises(LayerError, match="before a batch"):
        collector.see("0", torch.zeros(1, 5, 16, 14))
    collector.begin(x)
    with pytest.raises(LayerError, match=r"expected \[23, 5, 16, 14\]"):
        collector.see("0", torch.zeros(22, 5, 16, 14))
    collector.see("2", model[:3](x).detach())
    with pytest.raises(LayerError, match="more than once"):
        collector.see("2", model[:3](x).detach())
    with pytest.raises(ValueError, match="of one size"):
        collector.begin(x[..., :12])
    with pytest.raises(ValueError, match="3 indices for 23 images"):
        collector.begin(x, [0, 1, 2])
    with pytest.raises(ValueError, match="from 0 to 4"):
        Collector(Deconvnet(model, ["0"]).layouts(x), channels=[5])
    with pytest.raises(ValueError, match="k=0"):
        Collector({}, 0)
    with pytest.raises(ValueError, match="no batch"):
        collect_top(model, [], "0", progress=False)
    with pytest.raises(ValueError, match="find_images"):
        collect_top(model, [["a picture"]], "0", progress=False)


class NoWaiting(TorchDispatchMode):
    """Refuses every op whose result's shape, or whose answer, the host would have to wait for."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert not any(name.lstrip("_").startswith(wait.lstrip("_")) for wait in self.waits), name
        if name.startswith("index"):
            indices = [i for i in args[1] if i is not None] if isinstance(args[1], list) else []
            assert not any(index.dtype == torch.bool for index in indices), name
        return func(*args, **(kwargs or {}))


def test_on_an_accelerator_nothing_waits() -> None:
    # "meta" tensors have no values: whatever asks for one fails, and shapes must be fixed
    layouts = Deconvnet(small_net(), LAYERS).layouts(images())
    collector = Collector(layouts, K, device="meta", examples=2)
    x = images().to("meta")
    model = small_net().to("meta")
    with torch.no_grad(), NoWaiting():
        padded = [NOT_COUNTED, *range(22)]
        for indices, by_hash in (
            (None, False),
            (range(23), False),
            (padded, False),
            (padded, True),
        ):
            collector.begin(x, indices, by_hash)
            out = x
            for name, module in model.named_children():
                out = module(out)
                if name in LAYERS:
                    collector.see(name, out)
            collector.end()
    assert collector.metrics["0"].patches is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_nothing_waits_and_the_result_is_the_cpus() -> None:
    model, x = small_net(), images()
    reference = collected(model, x.split(5), [None] * 5).compute()
    model, x = model.cuda(), x.cuda()
    net = Deconvnet(model, LAYERS)
    collector = Collector(net.layouts(x), K, device="cuda")
    show(net, collector, x.split(5), [None] * 5)  # cuDNN chooses its algorithms
    collector.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        show(net, collector, x.split(5), [None] * 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, layer in collector.compute().items():
        assert torch.equal(layer.identity.cpu(), reference[name].identity)
        assert torch.equal(layer.positions.cpu(), reference[name].positions)


def test_the_accelerators_way_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_net(), images()
    reference = collected(model, x.split(5), [None] * 5).compute()
    monkeypatch.setattr("lit_deconv.top.counting._may_look", lambda device: False)
    equal(collected(model, x.split(5), [None] * 5).compute(), reference)
