"""Calibration: is a model that is 80 % confident right in 80 % of the cases?

ECE: Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599. OE: Thulasidasan et al. 2019, arXiv 1905.11001. Brier score:
Brier 1950, summed over classes.
"""
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from alignmix_lab.runs.options import Options, config_option
from alignmix_lab.runs.plotting import GREY, color, paired_panels, shared_legend

from ..base import register_protocol
from ..context import Evaluation
from ..result import BOLD, Column, Result, standard_error


@dataclass
class CalibrationOptions(Options):
    """Options of the calibration protocol."""
    bins: int = config_option('Calibration', 15, 'number of equal-width confidence bins', int, low=1)


@dataclass(frozen=True)
class Bins:
    """Confidences in bins of equal width, [low, high); the last one includes 1."""
    edges: np.ndarray  # (M + 1,) from 0 to 1
    count: np.ndarray  # (M,) images
    confidence: np.ndarray  # (M,) their mean confidence, NaN for an empty bin
    accuracy: np.ndarray  # (M,) their accuracy, NaN for an empty bin


def fill_bins(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Bins:
    """Sort the probabilities of N predicted classes into bins; `correct` is whether they are right.

    Raises:
        ValueError: There are no images, or confidences that are not probabilities.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if len(confidence) == 0 or len(confidence) != len(correct):
        raise ValueError(f'calibration needs as many confidences as outcomes, got {len(confidence)} and {len(correct)}')
    bad = confidence[~((confidence >= 0) & (confidence <= 1))]  # NaN included
    if len(bad):
        raise ValueError(f'{len(bad)} of {len(confidence)} confidences are not probabilities, e.g. {bad[0]}')
    edges = np.linspace(0, 1, bins + 1)
    place = np.minimum(np.searchsorted(edges, confidence, side='right') - 1, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid='ignore'):  # an empty bin has no mean
        return Bins(
            edges,
            count,
            np.bincount(place, weights=confidence, minlength=bins) / count,
            np.bincount(place, weights=correct, minlength=bins) / count,
        )


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """ECE with the l1 norm, like torchmetrics' MulticlassCalibrationError; from 0 to 1.

    torchmetrics puts a confidence of exactly 1 in a bin of its own; here it belongs to the last one.
    """
    from torchmetrics.functional.classification import binary_calibration_error
    below_one = np.minimum(confidence, np.nextafter(1, 0))
    # The multi-class error is the binary one of (confidence, correct).
    return float(binary_calibration_error(
        torch.from_numpy(below_one), torch.from_numpy(np.asarray(correct)).int(), n_bins=bins, norm='l1'))


def overconfidence_error(bins: Bins) -> float:
    """OE: sum over bins of weight * confidence * max(confidence - accuracy, 0); from 0 to 1."""
    full = bins.count > 0
    weight, confidence = (bins.count / bins.count.sum())[full], bins.confidence[full]
    return float(np.sum(weight * confidence * np.maximum(confidence - bins.accuracy[full], 0)))


@register_protocol('calibration', CalibrationOptions)
def calibration(ev: Evaluation) -> Result:
    """ECE, OE, Brier score, NLL and reliability diagrams."""
    count = ev.config.bins
    rows, diagrams = [], {}
    for model in ev.models:
        found = ev.predictions(model)
        filled = fill_bins(found.confidence, found.correct, count)
        diagrams[model.label] = filled
        rows.append({
            'model': model.label,
            'ece': 100 * expected_calibration_error(found.confidence, found.correct, count),
            'oe': 100 * overconfidence_error(filled),
            'brier': float(found.brier.mean()),
            'nll': float(found.nll.mean()),
            'confidence': 100 * float(found.confidence.mean()),
            'top1': found.top(1),
            'top1_error': standard_error(found.top(1), len(found.label)),
            'images': len(found.label),
        })
    return Result(
        columns={
            'ece': Column('ECE (%)', '.2f', 'lower'),
            'oe': Column('OE (%)', '.2f', 'lower'),
            'brier': Column('Brier', '.4f', 'lower'),
            'nll': Column('NLL', '.4f', 'lower'),
            'confidence': Column('mean confidence (%)', '.2f'),
            'top1': Column('top-1 (%)', '.2f', 'higher', 'top1_error'),
            'images': Column('images', 'd'),
        },
        rows=rows,
        notes=[
            f'Confidence: the largest softmax probability. ECE and OE use {count} bins of equal width, [low, high), '
            'the last one including 1. ECE: l1 norm (torchmetrics). OE: sum of weight x confidence x max(confidence - '
            'accuracy, 0).',
            'Brier: squared error of all probabilities, summed over classes (0 to 2). NLL: in nats. No temperature '
            'scaling.',
            BOLD,
        ],
        details={'bins': {label: vars(filled) for label, filled in diagrams.items()}},
        figures={'': draw(diagrams, rows)},
    )


def draw(diagrams: dict[str, Bins], rows: list[dict]) -> Figure:
    """Draw reliability diagrams of all models, with the number of images in each bin below."""
    fig, pairs = paired_panels(len(diagrams), title='Reliability: accuracy of the images in each bin of confidence')
    highest = max(bins.count.max() for bins in diagrams.values())
    for place, ((label, bins), row, (upper, lower)) in enumerate(zip(diagrams.items(), rows, pairs, strict=True)):
        width, middle, full = np.diff(bins.edges), (bins.edges[:-1] + bins.edges[1:]) / 2, bins.count > 0
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle='--', label='perfectly calibrated')
        upper.bar(middle[full], bins.accuracy[full], 0.94 * width[full], color=color(place))
        upper.plot(bins.confidence[full], bins.accuracy[full], 'o', color='black', markersize=3,
                   label='at the mean confidence')
        upper.set_title(f'{label}: ECE {row["ece"]:.1f} %, OE {row["oe"]:.1f} %', fontsize=9)
        upper.set(xlim=(0, 1), ylim=(0, 1))
        lower.bar(middle, bins.count, 0.94 * width, color=color(place))
        lower.set(xlabel='confidence', xlim=(0, 1), ylim=(0, 1.05 * highest))
        upper.set_ylabel('accuracy')
        lower.set_ylabel('images')
    pairs[0][0].bar(0, 0, color=GREY, label='accuracy')  # one legend entry for all colours
    shared_legend(fig, pairs[0][0])
    return fig
