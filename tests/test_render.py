"""Pixels, windows, text and figures."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_deconv.render import (
    Evolution,
    Heading,
    Look,
    Panel,
    Row,
    Strongest,
    channel_grid,
    count_nonfinite,
    crop_boxes,
    enhance,
    figure2,
    figure4,
    filters,
    magnify,
    page,
    photograph,
    shift_boxes,
    shift_patches,
    side_by_side,
    thin_epochs,
    to_pil,
    to_tensor,
)

MAGENTA = torch.tensor([255, 0, 255], dtype=torch.uint8)
HEADING = Heading("features.3", epoch=2)


def strongest(channel: int = 3, units: int = 1, side: int = 7, seed: int = 0) -> Strongest:
    generator = torch.Generator().manual_seed(seed)
    shape = (units, 3, side, side)
    return Strongest(
        channel,
        [2.5 / (k + 1) for k in range(units)],
        torch.rand(shape, generator=generator),
        torch.randn(shape, generator=generator),
        fires=0.25,
    )


class TestEnhance:
    def test_zero_is_mid_grey_and_sign_is_kept(self) -> None:
        image = torch.zeros(3, 2, 2)
        image[:, 0, 0], image[:, 1, 1] = 2.0, -2.0
        drawn = enhance(image)
        assert drawn.dtype == torch.uint8
        assert drawn[:, 0, 1].tolist() == [128] * 3
        assert drawn[:, 0, 0].tolist() == [255] * 3
        assert drawn[:, 1, 1].tolist() == [1] * 3

    def test_scale_is_the_percentile_of_nonzero_values(self) -> None:
        image = torch.zeros(1, 20, 20)
        image[0, 0, :10] = torch.arange(1.0, 11.0)
        drawn = enhance(image, percentile=80)[0, 0, :10]
        expected = [min(255, round(128 + 127 * value / 8)) for value in range(1, 11)]
        assert drawn.tolist() == expected

    def test_a_positive_factor_changes_nothing(self) -> None:
        image = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(1))
        assert torch.equal(enhance(image), enhance(image.double() * 1e-30))
        assert torch.equal(enhance(image), enhance(image.double() * 1e30))

    def test_all_zero_stays_mid_grey(self) -> None:
        assert enhance(torch.zeros(3, 4, 4)).unique().tolist() == [128]

    @pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_is_magenta_and_does_not_set_the_scale(self, broken: float) -> None:
        image = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(2))
        image[:, 2, 2] = 0
        plain = enhance(image)
        image[1, 2, 2] = broken
        drawn = enhance(image)
        assert torch.equal(drawn[:, 2, 2], MAGENTA)
        drawn[:, 2, 2] = plain[:, 2, 2]
        assert torch.equal(drawn, plain)
        assert count_nonfinite(image) == 1

    def test_all_nan_is_all_magenta(self) -> None:
        drawn = enhance(torch.full((1, 3, 3), float("nan")))
        assert torch.equal(drawn, MAGENTA.view(3, 1, 1).expand(3, 3, 3))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_dtype(self, dtype: torch.dtype) -> None:
        image = torch.tensor([[[-1.0, 0.0, 1.0]]])
        assert torch.equal(enhance(image.to(dtype)), enhance(image))

    def test_one_channel_is_grey(self) -> None:
        drawn = enhance(torch.randn(1, 4, 6))
        assert drawn.shape == (3, 4, 6)
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[0], drawn[2])

    def test_other_counts_are_tiled_with_one_scale(self) -> None:
        image = torch.stack([torch.full((4, 4), value) for value in (1.0, 0.5, -1.0, 0.0, 0.25)])
        drawn = enhance(image, percentile=100)
        assert drawn.shape == (3, 9, 14)
        corners = [drawn[0, 0, 0], drawn[0, 0, 5], drawn[0, 0, 10], drawn[0, 5, 0], drawn[0, 5, 5]]
        assert [int(value) for value in corners] == [255, 192, 1, 128, 160]

    def test_selected_channels(self) -> None:
        image = torch.randn(5, 4, 4)
        one = enhance(image, input_channels=2)
        three = enhance(image, input_channels=(2, 0, 4))
        assert torch.equal(one[0], three[0])
        assert torch.equal(enhance(image, input_channels=4)[0], three[2])
        with pytest.raises(ValueError, match="choose among 0 to 4"):
            enhance(image, input_channels=5)

    @pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4, 4), (3, 0, 4)])
    def test_refuses_what_is_no_picture(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="one picture"):
            enhance(torch.zeros(shape))


class TestPhotograph:
    def test_undoes_normalisation(self) -> None:
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.1, 0.25)
        pixels = torch.randint(0, 256, (3, 6, 5), generator=torch.Generator().manual_seed(3))
        normalised = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
            3, 1, 1
        )
        assert torch.equal(photograph(normalised, mean, std), pixels.to(torch.uint8))

    def test_clips(self) -> None:
        drawn = photograph(torch.tensor([[[-9.0, 9.0]]]), 0.5, 0.2)
        assert drawn[0].tolist() == [[0, 255]]

    def test_unknown_is_stretched_and_said(self) -> None:
        drawn = photograph(torch.tensor([[[-1.0, 0.0, 3.0]]]))
        assert drawn[0].tolist() == [[0, 64, 255]]
        assert "unknown" in Look().warning
        assert Look(0.0, 1.0).warning == ""

    def test_flat_unknown_is_grey(self) -> None:
        assert photograph(torch.full((3, 2, 2), 7.0)).unique().tolist() == [128]

    def test_uint8_as_it_is(self) -> None:
        image = torch.arange(27, dtype=torch.uint8).view(3, 3, 3) * 9
        assert torch.equal(photograph(image), image)

    def test_nan_is_magenta(self) -> None:
        image = torch.rand(3, 2, 2)
        image[0, 0, 0] = float("nan")
        assert torch.equal(photograph(image)[:, 0, 0], MAGENTA)

    def test_refuses_wrong_number_of_means(self) -> None:
        with pytest.raises(ValueError, match="2 values for an image of 3 channels"):
            photograph(torch.zeros(3, 2, 2), (0.1, 0.2), (1.0, 1.0))


class TestLook:
    def test_refuses_half_a_normalisation(self) -> None:
        with pytest.raises(ValueError, match="both mean and std"):
            Look(mean=0.5)

    @pytest.mark.parametrize("percentile", [0, -1, 101])
    def test_refuses_percentiles(self, percentile: float) -> None:
        with pytest.raises(ValueError, match="percentile"):
            Look(percentile=percentile)

    def test_the_rule_gives_the_percentile(self) -> None:
        assert "percentile 99.5" in Look().rule()
        assert "each filter" in Look(percentile=90).rule("filter")


class TestMagnify:
    def test_whole_factor_keeps_pixels_square(self) -> None:
        image = torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8)
        large = magnify(image)
        assert large.shape == (3, 98, 126)
        assert torch.equal(large[:, ::14, ::14], image)
        assert torch.equal(large[:, 13::14, 13::14], image)

    @settings(max_examples=60, deadline=None)
    @given(height=st.integers(1, 300), width=st.integers(1, 300))
    def test_size_is_bounded_both_ways(self, height: int, width: int) -> None:
        large = magnify(torch.zeros(3, height, width, dtype=torch.uint8), 96, 124)
        short, long = sorted(large.shape[1:])
        assert long <= 124
        assert short >= 96 or long == 124

    def test_smooth_where_no_whole_factor_fits(self) -> None:
        image = torch.randint(0, 256, (3, 65, 65), dtype=torch.uint8)
        smooth, sharp = magnify(image, 96, 124), magnify(image, 96, 124, smooth=False)
        assert smooth.shape == sharp.shape == (3, 96, 96)
        assert not torch.equal(smooth, sharp)
        # no pixel is lost and none is made up
        for plane, drawn in zip(image, sharp, strict=True):
            assert torch.equal(drawn.unique(), plane.unique())

    def test_pil_there_and_back(self) -> None:
        image = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8)
        assert to_pil(image).size == (8, 5)
        assert torch.equal(to_tensor(to_pil(image)), image)
        with pytest.raises(ValueError, match="uint8"):
            to_pil(image.float())


class TestWindows:
    @settings(max_examples=100, deadline=None)
    @given(
        top=st.integers(-9, 25),
        left=st.integers(-9, 25),
        tall=st.integers(1, 12),
        wide=st.integers(1, 15),
    )
    def test_shifted_boxes_lie_inside_and_move_as_little_as_needed(
        self, top: int, left: int, tall: int, wide: int
    ) -> None:
        box = torch.tensor([[top, left, top + tall, left + wide]])
        moved = shift_boxes(box, 12, 15)[0].tolist()
        assert 0 <= moved[0] < moved[2] <= 12
        assert 0 <= moved[1] < moved[3] <= 15
        assert (moved[2] - moved[0], moved[3] - moved[1]) == (tall, wide)
        assert moved[0] == min(max(top, 0), 12 - tall)
        assert moved[1] == min(max(left, 0), 15 - wide)

    def test_box_is_left_as_it_was(self) -> None:
        box = torch.tensor([[-3, 2, 4, 9]])
        shift_boxes(box, 10, 10)
        assert box.tolist() == [[-3, 2, 4, 9]]

    def test_refuses_a_box_larger_than_the_image(self) -> None:
        with pytest.raises(ValueError, match="in an image of 4 x 4"):
            shift_boxes(torch.tensor([[0, 0, 5, 4]]), 4, 4)

    def test_crop_is_zero_outside(self) -> None:
        image = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
        patch = crop_boxes(image, torch.tensor([[-1, 2, 2, 5]]))[0, 0]
        assert patch.tolist() == [[0, 0, 0], [3, 4, 0], [7, 8, 0]]

    def test_shifting_keeps_what_is_inside_the_image(self) -> None:
        images = torch.rand(4, 2, 8, 9, generator=torch.Generator().manual_seed(4)) + 1
        boxes = torch.tensor([[-2, -1, 3, 4], [1, 1, 6, 6], [5, 6, 10, 11], [-9, -9, -4, -4]])
        shown = shift_boxes(boxes, 8, 9)
        moved = shift_patches(crop_boxes(images, boxes), boxes, shown)
        whole = crop_boxes(images, shown)
        for u, (box, window) in enumerate(zip(boxes.tolist(), shown.tolist(), strict=True)):
            for row in range(window[0], window[2]):
                for column in range(window[1], window[3]):
                    inside = box[0] <= row < box[2] and box[1] <= column < box[3]
                    seen = moved[u, :, row - window[0], column - window[1]]
                    pixel = whole[u, :, row - window[0], column - window[1]]
                    assert torch.equal(seen, pixel if inside else torch.zeros(2))

    def test_no_units(self) -> None:
        none = torch.zeros(0, 4, dtype=torch.int64)
        assert shift_boxes(none, 5, 5).shape == (0, 4)
        assert len(crop_boxes(torch.zeros(0, 3, 5, 5), none)) == 0

    def test_refuses_windows_of_two_sizes(self) -> None:
        with pytest.raises(ValueError, match="different sizes"):
            crop_boxes(torch.zeros(2, 1, 5, 5), torch.tensor([[0, 0, 2, 2], [0, 0, 3, 2]]))


class TestText:
    @settings(max_examples=60, deadline=None)
    @given(text=st.text(max_size=60), width=st.integers(30, 200))
    def test_no_line_is_wider_than_its_room_and_no_letter_is_lost(
        self, text: str, width: int
    ) -> None:
        lines = page.wrap(text, 16, width)
        assert all(page._length(line, 16) <= width for line in lines)
        assert "".join("".join(lines).split()) == "".join(page.plain(text).split())

    def test_names_break_where_their_parts_meet(self) -> None:
        lines = page.wrap("Captum NeuronDeconvolution", 20, 140)
        assert lines == ["Captum", "Neuron", "Deconvolution"]

    def test_shortened_text_says_so(self) -> None:
        lines = page.wrap("one two three four five six", 16, 60, most_lines=2)
        assert len(lines) == 2
        assert lines[-1].endswith("...")
        assert page._length(lines[-1], 16) <= 60

    def test_plain_is_ascii(self) -> None:
        assert page.plain("Größe 3×3 … é–ü → ☃").isascii()
        assert page.plain("é 3×3 …") == "e 3x3 ..."

    def test_enlarged_letters_are_whole_when_shrunk(self) -> None:
        large = to_tensor(page.write("channel 3, activation 2.5", 28, 600, scale=2))
        small = to_tensor(page.write("channel 3, activation 2.5", 14, 300))
        assert torch.equal(large[:, ::2, ::2], small)
        assert torch.equal(large[:, 1::2, 1::2], small)
        assert page.write("", 28, 600, scale=2).height == 0


class TestFigures:
    def test_grid_shows_patch_above_reconstruction(self) -> None:
        unit = strongest()
        look = Look(0.0, 1.0)
        drawn = channel_grid([unit], HEADING, look)
        patch = magnify(photograph(unit.patches[0], 0.0, 1.0))
        reconstruction = magnify(enhance(unit.reconstructions[0]))
        top, left = find(drawn, patch)
        assert find(drawn, reconstruction) == (top + patch.shape[1] + 2, left)

    def test_figure2_shows_all_nine_of_each_channel(self) -> None:
        units = [strongest(channel, 9, seed=channel) for channel in range(3)]
        drawn = figure2(units, HEADING, Look(0.0, 1.0))
        for unit in units:
            for k in range(9):
                row, column = find(drawn, magnify(enhance(unit.reconstructions[k])))
                beside = find(drawn, magnify(photograph(unit.patches[k], 0.0, 1.0)))
                assert beside[0] == row
                assert beside[1] > column

    @pytest.mark.parametrize(
        ("units", "side"), [(1, 3), (1, 40), (1, 224), (9, 11), (9, 65), (9, 171)]
    )
    def test_size_is_fit_for_a_card(self, units: int, side: int) -> None:
        many = [strongest(channel, units, side) for channel in range(16)]
        drawn = (figure2 if units > 1 else channel_grid)(many, HEADING)
        assert drawn.dtype == torch.uint8
        # shrunk to a card, whole pixels are left out: a grid is not shrunk, a square of nine once
        assert drawn.shape[2] == page.CARD * (1 if units == 1 and side < 200 else 2)
        # at most 4 blocks across, so 16 channels stand in 4 rows or more
        assert drawn.shape[1] >= 4 * (2 * 96 if units == 1 else 3 * 96)

    @pytest.mark.parametrize("units", [1, 2, 4, 9, 16])
    def test_no_reconstruction_is_small(self, units: int) -> None:
        unit = strongest(units=units, side=64)
        for draw in (figure2, channel_grid):
            drawn = draw([unit] * 4, HEADING, Look(0.0, 1.0))
            reconstruction = enhance(unit.reconstructions[0])
            sizes = [size for size in range(96, 240) if occurs(drawn, reconstruction, size)]
            assert sizes

    def test_fewer_than_k_units_and_none(self) -> None:
        nothing = Strongest(9, [], torch.zeros(0, 3, 7, 7), torch.zeros(0, 3, 7, 7), fires=0.0)
        drawn = figure2([strongest(units=4), nothing], HEADING)
        assert drawn.shape[0] == 3

    def test_caption_changes_the_picture(self) -> None:
        first = channel_grid([strongest(channel=3)], HEADING)
        assert not torch.equal(first, channel_grid([strongest(channel=4)], HEADING))
        assert not torch.equal(first, channel_grid([strongest()], Heading("features.3", epoch=3)))
        assert not torch.equal(first, channel_grid([strongest()], HEADING, Look(0.0, 1.0)))

    def test_does_not_change_what_it_is_given(self) -> None:
        unit = strongest()
        unit.reconstructions[0, 0, 0, 0] = float("nan")
        before = unit.reconstructions.clone()
        channel_grid([unit], HEADING)
        assert torch.equal(before.nan_to_num(9), unit.reconstructions.nan_to_num(9))

    def test_units_must_be_as_many(self) -> None:
        with pytest.raises(ValueError, match="channel 3: 2 activations, 1 patches"):
            Strongest(3, [1.0, 2.0], torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))

    def test_nothing_to_draw(self) -> None:
        for draw in (channel_grid, figure2, side_by_side, figure4):
            with pytest.raises(ValueError, match="to draw"):
                draw([], HEADING)

    def test_side_by_side_keeps_the_order_of_columns(self) -> None:
        images = torch.randn(3, 3, 8, 8)
        names = ["input", "single unit", "Captum NeuronDeconvolution"]
        panels = [Panel(n, i, "cosine 1.00") for n, i in zip(names, images, strict=True)]
        drawn = side_by_side([Row("image 0", panels)], HEADING)
        columns = [find(drawn, magnify(enhance(image)))[1] for image in images]
        assert columns == sorted(columns)

    def test_side_by_side_leaves_a_missing_picture_empty(self) -> None:
        panels = [
            Panel("input", torch.rand(3, 8, 8), is_photograph=True),
            Panel("class", None, "no logits"),
        ]
        drawn = side_by_side([Row("image 0", panels)], HEADING)
        empty = torch.tensor(page.VOID, dtype=torch.uint8).view(3, 1, 1).expand(3, 96, 96)
        assert find(drawn, empty)

    def test_side_by_side_refuses_rows_that_differ(self) -> None:
        rows = [Row("a", [Panel("x", None)]), Row("b", [Panel("y", None)])]
        with pytest.raises(ValueError, match="'b' has other panels"):
            side_by_side(rows, HEADING)

    def test_side_by_side_of_five_is_as_wide_as_a_card(self) -> None:
        images = torch.randn(5, 3, 8, 8)
        panels = [Panel(str(n), image, "cosine 1.00") for n, image in enumerate(images)]
        drawn = side_by_side([Row("image 0", panels)], HEADING)
        assert drawn.shape[2] == page.CARD
        spots = [find(drawn, magnify(enhance(image))) for image in images]
        assert len({row for row, _ in spots[:3]}) == len({row for row, _ in spots[3:]}) == 1
        assert spots[3][0] > spots[0][0]
        assert [column for _, column in spots[:2]] == [column for _, column in spots[3:]]

    def test_large_pictures_keep_their_pixels_at_actual_size(self) -> None:
        image = torch.randn(3, 224, 224)
        drawn = side_by_side([Row("image 0", [Panel("deconvnet", image)] * 5)], HEADING)
        assert drawn.shape[2] == 2 * page.CARD
        assert find(drawn, enhance(image))
        unit = Strongest(3, [1.0], torch.rand(1, 3, 224, 224), image[None])
        assert find(channel_grid([unit] * 4, HEADING, Look(0.0, 1.0)), enhance(image))

    def test_box_is_outlined_where_it_is(self) -> None:
        image = torch.zeros(3, 32, 32)
        panels = [Panel("input", image, is_photograph=True, box=(4, 8, 12, 20))]
        drawn = side_by_side([Row("a", panels)], HEADING, Look(0.0, 1.0))
        factor = 96 // 32
        black = torch.zeros(3, 8 * factor - 2, 12 * factor - 2, dtype=torch.uint8)
        white = torch.full((3, 8 * factor, 12 * factor), 255, dtype=torch.uint8)
        white[:, 1:-1, 1:-1] = black
        top, left = find(drawn, white)
        whole = find(drawn, torch.zeros(3, 4 * factor - 1, 32 * factor, dtype=torch.uint8))
        assert (top - whole[0], left - whole[1]) == (4 * factor, 8 * factor)

    def test_figure4_puts_epochs_in_columns(self) -> None:
        first, late = torch.randn(2, 3, 8, 8)
        rows = [
            Evolution(0, [0, 5], [first, late], [1.0, 2.0]),
            Evolution(7, [5], [first * late], [3.0]),
        ]
        drawn = figure4(rows, HEADING)
        top, column = find(drawn, magnify(enhance(late)))
        assert find(drawn, magnify(enhance(first)))[1] < column
        below = find(drawn, magnify(enhance(first * late)))
        assert below[1] == column
        assert below[0] > top

    @pytest.mark.parametrize(("count", "lines"), [(4, [4]), (7, [7]), (8, [4, 4]), (10, [5, 5])])
    def test_figure4_of_many_epochs_has_lines_as_long_as_each_other(
        self, count: int, lines: list[int]
    ) -> None:
        images = torch.randn(count, 3, 31, 31)
        drawn = figure4([Evolution(0, range(count), list(images), [1.0] * count)], HEADING)
        assert drawn.shape[2] == 2 * page.CARD
        side = 31 * (3 if count == 7 else 4)
        tops = [find(drawn, magnify(enhance(image), side, side))[0] for image in images]
        assert [tops.count(top) for top in sorted(set(tops))] == lines
        one = Evolution(0, [3], [images[0]], [1.0])
        assert figure4([one], HEADING).shape[2] == page.CARD

    def test_filters_all_or_evenly_spaced(self) -> None:
        weight = torch.randn(100, 3, 5, 5)
        drawn = filters(weight, HEADING, most=10)
        assert find(drawn, magnify(enhance(weight[0])))
        assert find(drawn, magnify(enhance(weight[99])))
        assert filters(torch.randn(6, 2, 3, 3), HEADING).shape[2] == 2 * page.CARD
        with pytest.raises(ValueError, match="filters"):
            filters(torch.zeros(0, 3, 3, 3), HEADING)

    @given(count=st.integers(1, 200), most=st.integers(2, 12))
    def test_thinned_epochs(self, count: int, most: int) -> None:
        epochs = [3 * n for n in range(count)]
        thinned = thin_epochs(epochs, most)
        assert thinned == sorted(set(thinned))
        assert len(thinned) == min(count, most)
        assert thinned[0] == epochs[0]
        assert thinned[-1] == epochs[-1]
        gaps = [b - a for a, b in pairwise(thinned)]
        assert not gaps or max(gaps) - min(gaps) <= 3


def occurs(figure: torch.Tensor, picture: torch.Tensor, size: int) -> bool:
    """Whether a picture stands in a figure, brought to this size as figures do it."""
    for smooth in (True, False):
        with suppress(AssertionError):
            find(figure, magnify(picture, 96, size, smooth))
            return True
    return False


def find(figure: torch.Tensor, part: torch.Tensor) -> tuple[int, int]:
    """Where a picture stands in a figure, to the pixel; fails when it is not there."""
    _, tall, wide = part.shape
    spots = (
        figure[:, : figure.shape[1] - tall + 1, : figure.shape[2] - wide + 1] == part[:, :1, :1]
    ).all(0)
    for row, column in spots.nonzero().tolist():
        if torch.equal(figure[:, row : row + tall, column : column + wide], part):
            return row, column
    raise AssertionError("the picture is not in the figure")
