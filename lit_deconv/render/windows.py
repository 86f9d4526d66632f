"""Which part of the image a figure shows: it moves into the image, the unit's box stays true."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Moves windows that reach past the image into it, so that a figure shows picture, not padding.

    The boxes themselves (a unit's receptive field) stay what they are; these are the windows shown.

    Args:
        boxes: int64 [U, 4]: top, left, bottom, right, half-open, at most as large as the image.
        height: H of the image.
        width: W of the image.

    Returns:
        int64 [U, 4], same sizes, wholly inside the image.

    Raises:
        ValueError: When a box is larger than the image.
    """
    sizes = boxes[:, 2:] - boxes[:, :2]
    limits = boxes.new_tensor([height, width])
    if bool((sizes > limits).any()):
        raise ValueError(f"boxes of {sizes.amax(0).tolist()} in an image of {height} x {width}")
    corner = torch.minimum(boxes[:, :2].clamp(min=0), limits - sizes)
    return torch.cat([corner, corner + sizes], dim=1)


def crop_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Cuts one window out of each image; what lies outside the image is 0.

    Args:
        images: [U, C, H, W].
        boxes: int64 [U, 4], all of one size.

    Returns:
        [U, C, h, w].
    """
    count, _, height, width = images.shape
    if boxes.shape != (count, 4):
        raise ValueError(f"expected one box for each of {count} images, got {list(boxes.shape)}")
    whole = boxes.new_tensor([[0, 0, height, width]]).expand(count, 4)
    return shift_patches(images, whole, boxes)


def shift_patches(patches: Tensor, boxes: Tensor, shown: Tensor) -> Tensor:
    """Moves what patches hold from one window to another: 0 where the first says nothing.

    Args:
        patches: [U, C, h, w], what lies in `boxes`.
        boxes: int64 [U, 4], all of one size.
        shown: int64 [U, 4], all of one size, such as `shift_boxes` gives.

    Returns:
        [U, C, h', w'], what lies in `shown`.
    """
    if not len(shown):
        return patches
    sizes = shown[:, 2:] - shown[:, :2]
    if bool((sizes != sizes[0]).any()):
        raise ValueError(f"windows of different sizes in one call: {sizes.unique(dim=0).tolist()}")
    tall, wide = sizes[0].tolist()
    moved = patches.new_zeros((*patches.shape[:2], tall, wide))
    top, left = torch.maximum(boxes[:, :2], shown[:, :2]).T.tolist()
    bottom, right = torch.minimum(boxes[:, 2:], shown[:, 2:]).T.tolist()
    for u, (into, out) in enumerate(zip(shown.tolist(), boxes.tolist(), strict=True)):
        if top[u] < bottom[u] and left[u] < right[u]:
            moved[
                u, :, top[u] - into[0] : bottom[u] - into[0], left[u] - into[1] : right[u] - into[1]
            ] = patches[
                u, :, top[u] - out[0] : bottom[u] - out[0], left[u] - out[1] : right[u] - out[1]
            ]
    return moved
