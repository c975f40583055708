"""Boxes from class activation maps and their evaluation.

Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020, arXiv 2001.07437. The figures
depend on conventions of its public evaluation: boxes are (x0, y0, x1, y1) in whole pixels that all belong to the box; a
predicted box ends one pixel beyond its contour, unless that is outside the map; maps have 256 levels.
"""
from functools import cache
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

THRESHOLDS = np.arange(0, 1, 0.001)  # relative to the maximum of the map
IOUS = (0.3, 0.5, 0.7)


@cache
def opencv() -> Any:
    """Import OpenCV.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        import cv2
    except ImportError as e:
        raise ImportError('localization needs OpenCV: pip install opencv-python-headless') from e
    cv2.setNumThreads(1)  # images are spread over threads already
    return cv2


def inclusive_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """IoU (N, M) of boxes (N, 4) and (M, 4) that include their last row and column: (0, 0, 0, 0) has one pixel."""
    return box_iou(*(torch.from_numpy(boxes + [0, 0, 1, 1]).double() for boxes in (boxes_a, boxes_b))).numpy()


def resize_box(box: np.ndarray, size: tuple[float, float], new_size: tuple[int, int]) -> np.ndarray:
    """Scale boxes (N, 4) from an image of `size` (width, height) to `new_size`, rounded down to whole pixels."""
    # In this order: a quotient's rounding would take a coordinate that is whole to the pixel below.
    scaled = np.asarray(box, dtype=np.float64) * (new_size * 2) / (size * 2)
    return scaled.astype(np.int64).clip(0, [new_size[0] - 1, new_size[1] - 1] * 2)


def score_bytes(class_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a class activation map (h, w) bicubically to `size` (width, height) and scale it to 0-255.

    A map without contrast or with NaN becomes 0 everywhere.
    """
    if not class_map.min() < class_map.max():  # before resizing: its rounding errors would count as contrast
        return np.zeros(size[::-1], dtype=np.uint8)
    scores = opencv().resize(class_map.astype(np.float32), size, interpolation=opencv().INTER_CUBIC)
    low, high = scores.min(), scores.max()
    return ((scores - low) / (high - low) * 255).astype(np.uint8)


def threshold_boxes(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Boxes (N, 4) around the contours of a map (H, W) above a threshold, the largest contour first.

    The threshold is relative to the maximum. If nothing is above it, the result is a single box (0, 0, 0, 0).
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
        scores: np.ndarray, truth: np.ndarray, thresholds: np.ndarray = THRESHOLDS) -> tuple[np.ndarray, np.ndarray]:
    """Best IoU with any true box (M, 4) of a map (H, W) uint8 at T thresholds, relative to its maximum.

    Returns:
        (T,) for the box of the largest contour, and (T,) for the best box of all contours.
    """
    # A thousand thresholds correspond to at most 256 levels.
    levels, place = np.unique((thresholds * scores.max()).astype(np.int64), return_inverse=True)
    found = [inclusive_iou(_level_boxes(scores, int(level)), truth) for level in levels]
    return np.array([iou[0].max() for iou in found])[place], np.array([iou.max() for iou in found])[place]


def box_accuracy(iou_NT: np.ndarray, least: float) -> np.ndarray:
    """Percentage (T,) of images whose box has an IoU of at least `least` at each threshold."""
    return 100 * (iou_NT >= least).mean(axis=0)


def max_box_accuracy(iou_NT: np.ndarray, least: float = 0.5) -> tuple[float, float]:
    """Box accuracy at the best threshold for the whole set, and that threshold (the first one if several are best)."""
    curve = box_accuracy(iou_NT, least)
    best = int(curve.argmax())
    return float(curve[best]), float(THRESHOLDS[best])
