"""Units in bulk: together near the layer, in parts near the image, without what lies outside it."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.engine import UnsupportedOp, recording, units
from lit_deconv.engine.recorder import record
from lit_deconv.engine.rules import convolution
from lit_deconv.engine.rules.convolution import (
    _by_flipped_filters,
    _by_products,
    transposed_convolution,
)
from lit_deconv.engine.signal import Signal, Window, added
from lit_deconv.engine.units import _parts
from lit_deconv.engine.walk import Part, _grouped, union, walk, walk_in_parts

from .definition import all_units, assert_close


class Branched(nn.Module):
    """Strides, overlapping pools, a skip and a branch, so that windows are joined on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 5, stride=2, padding=3)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 6, 3, padding=1)
        self.right = nn.Conv2d(6, 4, 1)
        self.down = nn.Conv2d(10, 5, 1, stride=2)
        self.last = nn.Conv2d(5, 4, 3, padding=2, dilation=2)
        self.norm.register_buffer("running_var", torch.rand(6) + 0.5)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.pool(F.relu(self.first(x)))))
        y = torch.cat([y + F.relu(self.left(y)), self.right(y)], 1)
        return F.relu(self.last(F.relu(self.down(F.pad(y, (1, 1, 1, 1))))))


@pytest.mark.parametrize("via", ["images", "patches"])
@pytest.mark.parametrize("room", [1, 3, 10**6])
def test_all_units_at_once_are_each_as_on_the_full_map(
    via: Literal["images", "patches"], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (recording, units):
        monkeypatch.setattr(module, "rows_per_chunk", lambda largest, device, forward=None: room)
    net, images = Branched(), torch.randn(2, 3, 45, 38, dtype=torch.float64)
    wanted = all_units(Deconvnet(net, "last").activations(images).shape)
    wanted = wanted[torch.randperm(len(wanted), generator=torch.Generator().manual_seed(1))]
    found = Deconvnet(net, "last", path="rules").reconstruct(images, wanted, via=via)
    expected = Deconvnet(net, "last", path="autograd").reconstruct(images, wanted)
    assert_close(found, expected)
    by_rules, by_autograd = (
        Deconvnet(net, "last", path="rules"),
        Deconvnet(net, "last", path="autograd"),
    )
    many = torch.randn(9, 3, 45, 38, dtype=torch.float64)  # more than stay together
    assert_close(by_rules.attribute(many), by_autograd.attribute(many))
    assert_close(by_rules.maps(images, [0, 2]), by_autograd.maps(images, [0, 2]))


def test_parts_that_stay_together_keep_the_bounds_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is room for several parts, but not for all of them."""
    for module in (recording, units):
        monkeypatch.setattr(
            module, "rows_per_chunk", lambda largest, device, forward=None: 60_000 // largest
        )
    net, images = Branched(), torch.randn(1, 3, 45, 38, dtype=torch.float64)
    wanted = all_units(Deconvnet(net, "last").activations(images).shape)
    found = Deconvnet(net, "last", path="rules").reconstruct(images, wanted, via="images")
    assert_close(found, Deconvnet(net, "last", path="autograd").reconstruct(images, wanted))


class Uneven(nn.Module):
    """Two branches from one map, of the same size but of different stride."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.one, self.two = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2, padding=5)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(F.relu(self.one(y)) + F.relu(self.two(y)))


def test_windows_of_different_stride_are_joined_on_the_map() -> None:
    net, images = Uneven(), torch.randn(2, 3, 13, 13, dtype=torch.float64)
    wanted = all_units(Deconvnet(net, "last").activations(images).shape)
    found = Deconvnet(net, "last", path="rules").reconstruct(images, wanted, via="images")
    assert_close(found, Deconvnet(net, "last", path="autograd").reconstruct(images, wanted))
    with pytest.raises(UnsupportedOp, match="joins branches of different stride"):
        Deconvnet(net, "last").reconstruct(images, wanted, via="patches")


def ramp(shape: tuple[int, ...]) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)


@pytest.mark.parametrize(
    ("differing", "says"),
    [
        *(
            (lambda y, shape=shape: y + ramp(shape), "constant that differs over")
            for shape in [(1, 1, 1, 8), (8,), (8, 1), (8, 8), (4, 8, 1), (1, 4, 1, 8)]
        ),
        (lambda y: torch.clamp(y, min=0 * ramp((8, 8))), "constant that differs over"),
        (lambda y: y + (y > 0.1), "mask made of the map"),
    ],
)
def test_what_differs_over_the_map_is_not_computed_on_patches(
    differing: Callable[[Tensor], Tensor], says: str
) -> None:
    class Differing(Uneven):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(differing(self.first(x)))

    net, images = Differing(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    wanted = torch.tensor([[0, 1, 2, 3]])
    with pytest.raises(UnsupportedOp, match=says):
        Deconvnet(net, "last").reconstruct(images, wanted, via="patches")
    found = Deconvnet(net, "last").reconstruct(images, wanted)
    assert_close(found, Deconvnet(net, "last", path="autograd").reconstruct(images, wanted))


def test_seeds_part_where_there_is_no_more_room() -> None:
    """Far from the image all pass together; the pieces come back in order."""
    net, images = Branched(), torch.randn(3, 3, 40, 40, dtype=torch.float64)
    tape = record(net, (images,), {"last": net.last}, model=net)
    target = tape.layers["last"]
    seed = Signal(torch.randn(7, *target.shape[1:], dtype=torch.float64), torch.arange(7) % 3)
    convolutions = [op for op in tape.ops if op.name == "convolution"]
    sizes: list[int] = []
    room = {convolutions[-1]: 7, convolutions[0]: 3}
    parts = [Part(2), Part(2), Part(1), Part(2)]
    found = []
    for count, (signal,) in walk_in_parts(tape, target, seed, parts, room):
        assert signal is not None
        sizes.append(count)
        found.append(signal.values)
    assert sizes == [2, 3, 2]
    (whole,) = walk(tape, target, seed)
    assert whole is not None
    assert_close(torch.cat(found), whole.values)


def test_what_has_passed_an_op_is_let_go_while_its_parts_are_walked() -> None:
    net, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)), torch.randn(2, 3, 9, 9)
    tape = record(net, (images,), {"1": net[1]}, model=net)
    target = tape.layers["1"]
    room = dict(zip(tape.ops[1:], (2, 4), strict=True))
    values = torch.randn(4, *target.shape[1:])
    passed = weakref.ref(values)
    with torch.no_grad():
        walked = walk_in_parts(tape, target, Signal(values), [Part(2), Part(2)], room)
        del values
        next(walked)
    assert passed() is None


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("window", [(4, 3), (1, 1)])
@pytest.mark.parametrize(
    "constants",
    [
        {"_PRODUCTS_FROM": math.inf, "fast_in_channels_last": lambda _: True},
        {"_PRODUCTS_FROM": math.inf},
        {"_PRODUCTS_FROM": 0, "_PRODUCTS_FROM_PIXELS": 0, "_MOST_PRODUCTS": 10},
        {"_PRODUCTS_FROM": 0, "_PRODUCTS_FROM_PIXELS": 0, "_MOST_PRODUCTS": 1000},
    ],
    ids=["flipped", "transposed", "by_products_of_a_line", "by_products_of_maps"],
)
def test_a_part_of_a_transposed_convolution(
    monkeypatch: pytest.MonkeyPatch,
    kernel: int,
    stride: int,
    dilation: int,
    channels: int,
    window: tuple[int, int],
    constants: dict[str, Any],
) -> None:
    """The same numbers as cutting it out of the whole, zeros behind it."""
    for name, value in constants.items():
        monkeypatch.setattr(convolution, name, value)
    weight = torch.randn(9, channels, kernel, kernel, dtype=torch.float64)
    layer = nn.Conv2d(channels, 9, kernel, stride, dilation=dilation).double().eval()
    image = torch.randn(1, channels, 30, 30, dtype=torch.float64)
    tape = record(layer, (image,), {"": layer}, model=layer)
    (op,) = (op for op in tape.ops if op.name == "convolution")
    values = torch.randn(2, 9, *window, dtype=torch.float64)
    whole = F.conv_transpose2d(values, weight, stride=stride, dilation=dilation)
    height, width = whole.shape[2:]
    for first, stop in itertools.product((0, 1, 3), (height - 2, height, height + 1)):
        if stop <= first or first >= height:
            continue
        here = [(first, stop), (1, width + 2)] if width > 1 else [(first, stop), (0, width)]
        right = max(0, here[1][1] - width)
        padded = F.pad(whole, (0, right, 0, max(0, stop - height)))
        expected = padded[:, :, here[0][0] : here[0][1], here[1][0] : here[1][1]]
        assert_close(transposed_convolution(op, values, weight, here), expected)


class Asked(nn.Module):
    """Notes by which convolutions so many images ran; may refuse a number of them."""

    def __init__(self, channels: int, refused: int = 0) -> None:
        super().__init__()
        self.last = nn.Conv2d(3, channels, 3, padding=1)
        self.by_library: dict[int, Any] = {}
        self.refused = refused

    def forward(self, x: torch.Tensor) -> Any:
        self.by_library[len(x)] = torch.backends.mkldnn.enabled
        assert len(x) != self.refused
        return self.last(x)


@pytest.mark.cpu
@pytest.mark.parametrize(("side", "small"), [(8, True), (200, False)])
def test_three_small_images_are_asked_without_the_library(side: int, small: bool) -> None:
    net, images = Asked(2).eval(), torch.randn(4, 3, side, side)
    Deconvnet(net, "last").reconstruct(images, torch.tensor([[0, 1, 2, 3]]))
    assert net.by_library[2]
    assert net.by_library[3] is not small
    assert torch.backends.mkldnn.enabled


@pytest.mark.cpu
def test_the_library_is_used_again_where_three_images_fail() -> None:
    net, images = Asked(2, refused=3).eval(), torch.randn(4, 3, 8, 8)
    Deconvnet(net, "last").reconstruct(images, torch.tensor([[0, 1, 2, 3]]))
    assert not net.by_library[3]
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("stride", [1, 3])
def test_filters_of_one_pixel(groups: int, stride: int) -> None:
    net = nn.Sequential(nn.Conv2d(6, 9, 1, stride, groups=groups)).double().eval()
    image = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    found = Deconvnet(net, "0", path="rules").attribute(image)
    assert_close(found, Deconvnet(net, "0", path="autograd").attribute(image))


def test_a_convolution_that_sees_nothing_but_padding() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 2, stride=10, padding=4)).double().eval()
    image = torch.randn(2, 1, 1, 1, dtype=torch.float64)
    assert not Deconvnet(net, "0", path="rules").attribute(image).any()


@pytest.mark.parametrize("form", [_by_flipped_filters, _by_products])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (3, 5)])
def test_forms_of_the_transposed_convolution(
    form: Callable[..., torch.Tensor], kernel: tuple[int, int]
) -> None:
    weight = torch.randn(5, 4, *kernel, dtype=torch.float64)
    values = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    whole = F.conv_transpose2d(values, weight)
    assert_close(form(values, weight, [(0, extent) for extent in whole.shape[2:]]), whole)
    assert_close(form(values, weight, [(2, 9), (1, 2)]), whole[:, :, 2:9, 1:2])


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filters_are_turned_round_where_that_is_fast(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(6, 9, 3)).to(dtype).eval()
    with mock.patch.object(convolution, "_by_flipped_filters", wraps=_by_flipped_filters) as turned:
        Deconvnet(net, "0", path="rules").attribute(torch.randn(2, 6, 8, 7, dtype=dtype))
    assert turned.called == (dtype == torch.float32)


@pytest.mark.parametrize("interior", [None, ((2, 4), (3, 5)), ((5, 3), (5, 3)), ((0, 8), (0, 8))])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("share", [1, 8])
def test_parts_hold_every_unit_once_within_its_bounds(
    interior: tuple[tuple[int, int], ...] | None, rows: int, share: int
) -> None:
    places = torch.randint(0, 9, (200, 2), generator=torch.Generator().manual_seed(0))
    order, parts = _parts(F.pad(places, (2, 0)), interior, lambda span: rows, share)
    assert sorted(order.tolist()) == list(range(200))
    assert sum(part.seeds for part in parts) == 200
    assert max(part.seeds for part in parts) <= rows
    start = 0
    for count, span in parts:
        assert span is not None
        here = places[order[start : start + count]]
        for dim, (low, high) in enumerate(span):
            assert low <= here[:, dim].min()
            assert here[:, dim].max() <= high
        start += count


def test_units_that_see_the_same_part_of_the_image_go_together() -> None:
    corners = torch.tensor([[0, 0, 0, 0], [0, 0, 8, 8], [0, 0, 4, 4]] * 4)
    order, parts = _parts(corners, ((3, 5), (3, 5)), lambda span: 4, 8)
    assert [part.seeds for part in parts] == [4, 4, 4]
    groups = [corners[rows, 2].unique().tolist() for rows in order.split(4)]
    assert groups == [[4], [8], [0]]  # from the interior outwards
    assert parts[0].span == ((3, 5), (3, 5))


def test_what_lies_outside_the_map_for_all_is_not_carried_along() -> None:
    position = torch.tensor([[0], [1]])
    window = Window(position, (2,), (-3,), ((0, 1),))
    values = torch.arange(14.0).view(2, 1, 7)  # at -3 to 3 and at -1 to 5
    trimmed = Signal(values, None, window).trimmed([5])
    assert trimmed.window is not None
    assert trimmed.window.shift == (-2,)  # the first is at -3 and at -1
    assert trimmed.values.shape[2] == 6
    full = trimmed.full([5]).values
    assert full.tolist() == [[[3.0, 4, 5, 6, 0]], [[8.0, 9, 10, 11, 12]]]


def test_a_window_that_lies_outside_the_map_keeps_one_place() -> None:
    for shift, seen in ((-5, (1, 2)), (4, (0, 1))):
        window = Window(torch.tensor([[0]]), (1,), (shift,), ((0, 0),))
        assert window.seen([2], [4]) == [seen]
        assert not Signal(torch.ones(1, 1, 2), None, window).trimmed([4]).clipped([4]).values.any()


def test_values_that_something_else_holds_are_not_clipped_in_place() -> None:
    values, window = torch.ones(1, 1, 3), Window(torch.tensor([[0]]), (1,), (-1,))
    for owned in (False, True):
        clipped = Signal(values, None, window, owned=owned).clipped([5])
        assert clipped.values.tolist() == [[[0, 1, 1]]]
        assert (values.count_nonzero() == 2) == owned


def test_a_part_that_is_larger_than_the_room_goes_alone() -> None:
    assert _grouped([Part(5), Part(1), Part(2)], 3) == [[Part(5)], [Part(1), Part(2)]]


def test_bounds_of_several() -> None:
    assert union([((0, 1), (4, 4)), ((3, 5), (2, 3))]) == ((0, 5), (2, 4))
    assert union([((0, 1),), None]) is None
    assert union([]) is None


@pytest.mark.parametrize("shifts", [None, ((0,), (0,)), ((0,), (1,)), ((1,), (0,))])
@pytest.mark.parametrize("owned", [(False, False), (False, True), (True, False), (True, True)])
def test_a_sum_takes_the_place_of_what_nobody_holds(
    owned: tuple[bool, bool], shifts: tuple[tuple[int], tuple[int]] | None
) -> None:
    given = torch.tensor([[[1.0, 2.0]], [[10.0, 20.0]]]).unsqueeze(1)
    signals = [
        Signal(values, None, shift and Window(torch.tensor([[0]]), (1,), shift), owned=is_owned)
        for values, is_owned, shift in zip(
            given.clone(), owned, shifts or (None, None), strict=True
        )
    ]
    expected = {None: [11, 22], ((0,), (1,)): [1, 12, 20], ((1,), (0,)): [10, 21, 2]}
    total = added(signals[0], signals[1], [4])
    assert total.owned
    assert total.values.flatten().tolist() == expected.get(shifts, [11, 22])
    for signal, before, is_owned in zip(signals, given, owned, strict=True):
        assert is_owned or torch.equal(signal.values, before)
    if shifts is None:
        places = [signal.values.data_ptr() for signal in signals if signal.owned]
        assert (total.values.data_ptr() in places) == any(owned)


def test_a_sum_of_what_autograd_follows_is_made_anew() -> None:
    values = torch.ones(1, 1, 2, requires_grad=True)
    one, other = (Signal(values * 2, owned=True) for _ in range(2))
    assert not one.owned
    total = added(one, other, [2])
    assert one.values.flatten().tolist() == [2, 2]
    assert total.values.flatten().tolist() == [4, 4]
    mixed = added(
        Signal(torch.ones(1, 1, 2), owned=True), Signal(torch.ones(1, 1, 2).double()), [2]
    )
    assert mixed.values.dtype == torch.float64


class Twice(nn.Module):
    """One value goes two ways to the layer, one of them by a sum of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.last((self.inner(h) + h) + h)


def test_sums_in_place_reach_nobody_else() -> None:
    torch.manual_seed(0)
    model, images = Twice().eval().double(), torch.randn(2, 3, 6, 6).double()
    found, expected = (
        Deconvnet(model, "last", path=path).attribute(images) for path in ("rules", "autograd")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("owned", [False, True])
def test_what_lies_outside_the_map_is_zero_whatever_it_was(dtype: torch.dtype, owned: bool) -> None:
    """Also where it is no number, or infinite: a convolution would carry it into the map."""
    values = torch.tensor([[[torch.nan, -torch.inf, 3, torch.nan, torch.inf]]], dtype=dtype)
    given = values.clone()
    window = Window(torch.tensor([[0]]), (1,), (-2,))
    clipped = Signal(given, None, window, owned=owned).clipped([2]).values
    assert str(clipped.tolist()) == "[[[0.0, 0.0, 3.0, nan, 0.0]]]"
    if not owned:
        assert torch.equal(given.nan_to_num(), values.nan_to_num())
    filled = Signal(values, None, window).clipped([2], -torch.inf).values
    assert str(filled.tolist()) == "[[[-inf, -inf, 3.0, nan, -inf]]]"


def test_a_constant_of_its_own_for_each_image_is_not_computed_on_patches() -> None:
    class Placed(Uneven):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.linspace(1, 2, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x) + self.shift[: len(x)].view(-1, 1, 1, 1)))

    net, images = Placed(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    wanted = torch.tensor([[3, 1, 2, 3], [1, 0, 0, 5]])
    with pytest.raises(UnsupportedOp, match="differ from image to image"):
        Deconvnet(net, "last").reconstruct(images, wanted, via="patches")
    for count in (4, 2):
        units = wanted % torch.tensor([count, 9, 9, 9])
        found = Deconvnet(net, "last").reconstruct(images[:count], units)
        expected = Deconvnet(net, "last", path="autograd").reconstruct(images[:count], units)
        assert_close(found, expected)


@pytest.mark.parametrize("of", ["units", "maps"])
def test_where_the_tape_lost_track_the_error_says_so(of: str) -> None:
    """Written through another view: what is read afterwards comes from nowhere on the tape."""

    class Written(Uneven):
        def forward(self, x: Tensor) -> Tensor:
            y = F.elu(self.first(x))
            torch.relu_(y[:, 1:2])
            return self.last(y * 2)

    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    rules, auto = Deconvnet(Written(), "last", path="rules"), Deconvnet(Written(), "last")
    wanted = torch.tensor([[0, 1, 2, 3]])
    with pytest.raises(UnsupportedOp, match="overwritten in place"):
        rules.reconstruct(images, wanted) if of == "units" else rules.maps(images, [1])
    found = auto.reconstruct(images, wanted) if of == "units" else auto.maps(images, [1])
    assert found.any()


def test_chunks_are_bounded_by_the_forward_pass_where_it_was_small() -> None:
    cpu, megabyte = torch.device("cpu"), 1 << 20
    assert recording.rows_per_chunk(megabyte // 2, cpu) == 8
    assert recording.rows_per_chunk(megabyte // 2, cpu, forward=100 * megabyte) == 8
    assert recording.rows_per_chunk(megabyte // 2, cpu, forward=12 * megabyte) == 6
    assert recording.rows_per_chunk(megabyte // 8, cpu, forward=1) == 7  # of at least 7/8 MB
    assert recording.rows_per_chunk(100 * megabyte, cpu, forward=1) == 1


def test_what_a_kept_patch_holds_outside_the_image_does_not_matter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU()).double().eval()
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    corner = torch.tensor([[0, 1, 0, 0], [0, 2, 7, 7]])
    around = F.pad(image, (2, 2, 2, 2), value=9.0)
    patches = torch.cat([around[..., :5, :5], around[..., 7:, 7:]])
    units = corner.clone()
    units[:, 0] = torch.arange(2)
    activations, found = Deconvnet(net, "1").reconstruct_patches(patches, units, image.shape[1:])
    expected, _ = Deconvnet(net, "1").reconstruct(image, corner, crop=True, via="images")
    assert_close(found, expected)
    assert_close(activations, net(image)[corner.unbind(1)].detach())


class OneNumber(nn.Module):
    """A convolution whose stride is given once for both dimensions, as aten's own may be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.convolution(x, self.weight, None, [2], [1], [1], False, [0], 1)
        return self.last(x)


def test_one_number_stands_for_all_dimensions() -> None:
    torch.manual_seed(0)
    model, images = OneNumber().eval().double(), torch.randn(2, 3, 12, 12).double()
    units = torch.tensor([[0, 1, 0, 0], [1, 3, 2, 3]])
    found, expected = (
        Deconvnet(model, "last", path=path).reconstruct(images, units)
        for path in ("rules", "autograd")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
