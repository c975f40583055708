"""PASCAL VOC's average precision at one IoU threshold.

VOC has two interpolations of the precision-recall curve, which differ by 2 to 3 points on real detectors, so both are
reported: `voc07_11pt`, the mean of the best precision at recall 0, 0.1, ..., 1 (VOC 2007, and nearly every table on
VOC07 test), and `voc_area`, the area under the monotone envelope (VOC 2010 and later).

Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", IJCV 2015, and its development kit.
"""
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.ops import box_iou

from .annotations import Record

IOU_THRESHOLD = 0.5


def average_precision(recall: np.ndarray, precision: np.ndarray) -> tuple[float, float]:
    """Compute the 11-point mean and the area under the envelope of a curve sorted by falling score."""
    points = [precision[recall >= level].max(initial=0.0) for level in np.arange(11) / 10]
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(recall, prepend=0.0)
    return float(np.mean(points)), float((steps * envelope).sum())


def class_average_precision(
        records: Sequence[Record], detections: Sequence[dict[str, np.ndarray]], label: int) -> tuple[float, float]:
    """Compute both average precisions of one class; nan if the class has no objects that count.

    In order of falling score, each detection is compared with the object of its class and image that it overlaps most.
    It is false below the IoU threshold and ignored if that object is marked difficult. The first detection of an object
    is true, further ones are false.
    """
    scores, outcomes, positives = [], [], 0
    for record, found in zip(records, detections, strict=True):
        truth = record.select(record.labels == label)
        positives += int((~truth.difficult).sum())
        mine = found['labels'] == label
        order = np.argsort(-found['scores'][mine], kind='stable')
        scores.append(found['scores'][mine][order])
        outcomes.append(_judge(found['boxes'][mine][order], truth))
    if positives == 0:
        return float('nan'), float('nan')
    score, outcome = np.concatenate(scores), np.concatenate(outcomes)
    outcome = outcome[np.argsort(-score, kind='stable')]
    true, false = np.cumsum(outcome > 0), np.cumsum(outcome < 0)
    counted = outcome != 0
    true, false = true[counted], false[counted]
    return average_precision(true / positives, true / np.maximum(true + false, 1))


def _judge(boxes: np.ndarray, truth: Record) -> np.ndarray:
    """Judge the detections of an image, best first: 1 true, -1 false, 0 ignored."""
    outcome = np.full(len(boxes), -1)
    if not len(truth.labels):
        return outcome
    # On half-open boxes this is the development kit's `+ 1` form on inclusive pixels.
    iou = box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(truth.boxes)).numpy()
    taken = np.zeros(len(truth.labels), dtype=bool)
    for index, overlaps in enumerate(iou):
        best = overlaps.argmax()
        if overlaps[best] < IOU_THRESHOLD:
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
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Compute VOC's mean average precision in per cent.

    Detections of an image are `boxes` (N, 4), `scores` (N,) and `labels` (N,) from 1.

    Returns:
        `voc07_11pt` and `voc_area`, averaged over the classes with objects; and both for each of these classes.
    """
    per_class = {}
    for label, name in enumerate(class_names, 1):
        eleven, area = class_average_precision(records, detections, label)
        if not np.isnan(area):
            per_class[name] = dict(voc07_11pt=100 * eleven, voc_area=100 * area)
    if not per_class:
        raise ValueError('no object to detect in the validation images; pass a --val-split with annotated objects')
    means = {key: float(np.mean([values[key] for values in per_class.values()])) for key in ('voc07_11pt', 'voc_area')}
    return means, per_class
