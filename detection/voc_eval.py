"""Average precision as PASCAL VOC defines it, at one IoU threshold.

Two interpolations of the same precision-recall curve, which differ by 2 to 3 points on real detectors, so both are
named and reported: `voc07_11pt`, the mean of the best precision at recall 0, 0.1, ..., 1 (VOC 2007, and nearly every
table on VOC07 test), and `voc_area`, the area under the monotone envelope (VOC 2010 and later).

Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", IJCV 2015, and its development kit.
"""
from collections.abc import Sequence

import numpy as np

from .annotations import Record


def box_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """IoU of boxes (N, 4) and (M, 4), half-open: (N, M). On VOC's inclusive pixels this is the kit's `+ 1` form."""
    low = np.maximum(boxes_a[:, None, :2], boxes_b[None, :, :2])
    high = np.minimum(boxes_a[:, None, 2:], boxes_b[None, :, 2:])
    inter = (high - low).clip(0).prod(-1)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (boxes_a, boxes_b))
    return inter / (area_a[:, None] + area_b[None, :] - inter).clip(np.finfo(np.float64).tiny)


def average_precision(recall: np.ndarray, precision: np.ndarray) -> tuple[float, float]:
    """The 11-point mean and the area under the envelope of a curve in order of falling score."""
    points = [precision[recall >= level].max(initial=0.0) for level in np.arange(11) / 10]
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(recall, prepend=0.0)
    return float(np.mean(points)), float((steps * envelope).sum())


def class_average_precision(
        records: Sequence[Record],
        detections: Sequence[dict[str, np.ndarray]],
        label: int,
        iou_threshold: float = 0.5,
) -> tuple[float, float]:
    """Both average precisions of one class; nan where the class has no object that counts.

    In order of falling score, a detection is compared with the object of its class and image that it overlaps most.
    Below the threshold it is false; an object marked difficult makes it count neither way; the first detection of an
    object is true and every further one false.

    Args:
        records: The images and their objects.
        detections: For each image `boxes` (N, 4), `scores` (N,) and `labels` (N,).
        label: The class.
        iou_threshold: Smallest IoU of a true detection.
    """
    scores, outcomes, positives = [], [], 0
    for record, found in zip(records, detections, strict=True):
        truth = record.select(record.labels == label)
        positives += int((~truth.difficult).sum())
        mine = found['labels'] == label
        order = np.argsort(-found['scores'][mine], kind='stable')
        scores.append(found['scores'][mine][order])
        outcomes.append(_judge(found['boxes'][mine][order], truth, iou_threshold))
    if positives == 0:
        return float('nan'), float('nan')
    score, outcome = np.concatenate(scores), np.concatenate(outcomes)
    outcome = outcome[np.argsort(-score, kind='stable')]
    true, false = np.cumsum(outcome > 0), np.cumsum(outcome < 0)
    counted = outcome != 0
    true, false = true[counted], false[counted]
    return average_precision(true / positives, true / np.maximum(true + false, 1))


def _judge(boxes: np.ndarray, truth: Record, iou_threshold: float) -> np.ndarray:
    """For each detection of an image, best first: 1 true, -1 false, 0 does not count."""
    outcome = np.full(len(boxes), -1)
    if not len(truth.labels):
        return outcome
    iou, taken = box_iou(boxes, truth.boxes), np.zeros(len(truth.labels), dtype=bool)
    for index, overlaps in enumerate(iou):
        best = overlaps.argmax()
        if overlaps[best] < iou_threshold:
            continue
        if truth.difficult[best]:
            outcome[index] = 0
        elif not taken[best]:
            outcome[index], taken[best] = 1, True
    return outcome


def voc_metrics(
        records: Sequence[Record],
        detections: Sequence[dict[str, np.ndarray]],
        class_names: Sequence[str],
        iou_threshold: float = 0.5,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """VOC's mean average precision, in per cent.

    Args:
        records: The images and their objects.
        detections: For each image `boxes` (N, 4), `scores` (N,) and `labels` (N,).
        class_names: Names of labels 1, 2, ...
        iou_threshold: Smallest IoU of a true detection.

    Returns:
        `voc07_11pt` and `voc_area`, means over the classes that have objects; and both for every such class.
    """
    per_class = {}
    for label, name in enumerate(class_names, 1):
        eleven, area = class_average_precision(records, detections, label, iou_threshold)
        if not np.isnan(area):
            per_class[name] = dict(voc07_11pt=100 * eleven, voc_area=100 * area)
    if not per_class:
        raise ValueError('no object to detect in the validation images: nothing can be measured')
    means = {key: float(np.mean([values[key] for values in per_class.values()])) for key in ('voc07_11pt', 'voc_area')}
    return means, per_class
