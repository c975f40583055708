"""Boxes from class activation maps, and how they are judged.

Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020, arXiv 2001.07437, and its
public evaluation, whose habits fix the numbers: boxes are (x0, y0, x1, y1) in whole pixels that all belong to the box;
a predicted box ends one pixel beyond its contour where the map goes on; maps have 256 levels.
"""
from functools import cache
from typing import Any

import numpy as np

THRESHOLDS = np.arange(0, 1, 0.001)  # parts of the map's maximum
IOUS = (0.3, 0.5, 0.7)


@cache
def opencv() -> Any:
    """cv2, or what to install."""
    try:
        import cv2
    except ImportError as e:
        raise ImportError('localization needs OpenCV: pip install opencv-python-headless') from e
    cv2.setNumThreads(1)  # images are spread over threads already
    return cv2


def inclusive_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """IoU (N, M) of boxes (N, 4) and (M, 4) whose last row and column belong to them: (0, 0, 0, 0) has one pixel."""
    low = np.maximum(boxes_a[:, None, :2], boxes_b[None, :, :2])
    high = np.minimum(boxes_a[:, None, 2:], boxes_b[None, :, 2:])
    inter = (high - low + 1).clip(0).prod(-1)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2] + 1).prod(-1) for boxes in (boxes_a, boxes_b))
    return inter / (area_a[:, None] + area_b[None, :] - inter)


def resize_box(box: np.ndarray, size: tuple[float, float], new_size: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) of an image of `size` (width, height) in one of `new_size`, in whole pixels, rounded down."""
    scaled = np.asarray(box, dtype=np.float64) * ([new_size[0] / size[0], new_size[1] / size[1]] * 2)
    return scaled.astype(np.int64).clip(0, [new_size[0] - 1, new_size[1] - 1] * 2)


def score_bytes(class_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A class activation map (h, w), resized bicubically to `size` (width, height) and spread over 0-255.

    A map without contrast, or with nan, is 0 everywhere.
    """
    if not class_map.min() < class_map.max():  # before resizing, whose rounding would pass for contrast
        return np.zeros(size[::-1], dtype=np.uint8)
    scores = opencv().resize(class_map.astype(np.float32), size, interpolation=opencv().INTER_CUBIC)
    low, high = scores.min(), scores.max()
    return ((scores - low) / (high - low) * 255).astype(np.uint8)


def threshold_boxes(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Boxes (N, 4) around the contours of what is above a threshold, the largest contour first.

    Args:
        scores: (H, W) uint8.
        threshold: Part of the maximum.

    Returns:
        int64; (0, 0, 0, 0) alone where nothing is above.
    """
    return _level_boxes(scores, int(threshold * scores.max()))


def _level_boxes(scores: np.ndarray, level: int) -> np.ndarray:
    cv2 = opencv()
    above = (scores > level).astype(np.uint8)
    contours, _ = cv2.findContours(above, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return np.zeros((1, 4), dtype=np.int64)
    areas = [cv2.contourArea(contour) for contour in contours]
    largest = areas.index(max(areas))
    contours = [contours[largest], *contours[:largest], *contours[largest + 1:]]
    x, y, width, height = np.array([cv2.boundingRect(contour) for contour in contours], dtype=np.int64).T
    last_y, last_x = (side - 1 for side in scores.shape)
    return np.stack([x, y, (x + width).clip(max=last_x), (y + height).clip(max=last_y)], axis=1)


def best_ious(
        scores: np.ndarray,
        truth: np.ndarray,
        thresholds: np.ndarray = THRESHOLDS,
) -> tuple[np.ndarray, np.ndarray]:
    """At every threshold the best IoU with any true box.

    Args:
        scores: (H, W) uint8.
        truth: (M, 4) true boxes.
        thresholds: (T,) parts of the maximum.

    Returns:
        (T,) of the largest contour's box, and (T,) of the best of all contours' boxes.
    """
    # A thousand thresholds fall on 256 levels at most.
    levels, place = np.unique((thresholds * scores.max()).astype(np.int64), return_inverse=True)
    found = [inclusive_iou(_level_boxes(scores, int(level)), truth) for level in levels]
    return np.array([iou[0].max() for iou in found])[place], np.array([iou.max() for iou in found])[place]


def box_accuracy(iou_NT: np.ndarray, least: float) -> np.ndarray:
    """(T,) share of images, in per cent, whose box overlaps a true one by `least` or more at each threshold."""
    return 100 * (iou_NT >= least).mean(axis=0)


def max_box_accuracy(iou_NT: np.ndarray, least: float = 0.5) -> tuple[float, float]:
    """The box accuracy at the best threshold for the whole set, and that threshold (the first of equal ones)."""
    curve = box_accuracy(iou_NT, least)
    best = int(curve.argmax())
    return float(curve[best]), float(THRESHOLDS[best])
