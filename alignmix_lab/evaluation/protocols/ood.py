"""Out-of-distribution detection by the largest softmax probability.

The baseline of Hendrycks and Gimpel 2017, arXiv 1610.02136, with the metrics of ODIN, arXiv 1706.02690, and of the
papers. In-distribution (ID) images should score higher.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from alignmix_lab.runs.options import Options, config_option
from alignmix_lab.runs.plotting import COLORS, GREY, bars, figure, panels, shared_legend

from ..base import register_protocol
from ..context import Evaluation
from ..data import Batch
from ..models import EvalModel
from ..predictions import check_finite
from ..result import Column, Result
from .ood_sets import NOISES, crop_transform, noise_batches, open_set

_option = partial(config_option, 'OOD detection')


@dataclass
class OodOptions(Options):
    """Options of the OOD protocol."""
    ood: list[str] | None = _option(
        None, 'OOD sets: folders of images (searched recursively), .npz or .npy files of uint8 images (N, H, W, C)',
        nargs='+')
    ood_key: str = _option('x', 'name of the image array in .npz files')
    ood_fit: str = _option(
        'resize', "how to reach the model's image size: resize (shorter side, then centre crop) or crop (centre crop "
        'of the original pixels; smaller images are enlarged)', choices=('resize', 'crop'))
    ood_noise: list[str] | None = _option(
        list(NOISES), 'noise sets: U(0, 1) and N(0.5, 0.5) alone, with as many images as the split, or added to its '
        'images; none for no noise', nargs='+', choices=(*NOISES, 'none'))


@dataclass(frozen=True)
class OodMetrics:
    """Detection metrics, from 0 to 1."""
    auroc: float  # area under the ROC curve
    aupr_in: float  # average precision with ID as the positive class
    aupr_out: float  # average precision with OOD as the positive class and negated scores
    accuracy: float  # largest (TPR + TNR) / 2 over all thresholds
    accuracy_at: float  # (TPR + TNR) / 2 at the fixed threshold
    threshold: float  # a threshold that reaches `accuracy`; scores from this value on count as ID


def ood_metrics(id_scores: np.ndarray, ood_scores: np.ndarray, fixed: float = 0.5) -> OodMetrics:
    """Measure how well scores separate ID from OOD images; higher means ID. `fixed` is for `accuracy_at`.

    Raises:
        ValueError: Scores are missing or not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
    id_scores, ood_scores = np.asarray(id_scores, dtype=np.float64), np.asarray(ood_scores, dtype=np.float64)
    for name, scores in (('ID', id_scores), ('OOD', ood_scores)):
        if scores.size == 0:
            raise ValueError(f'there are no {name} scores; detection needs both ID and OOD images')
        if not np.isfinite(scores).all():
            raise ValueError(f'{(~np.isfinite(scores)).sum()} of {scores.size} {name} scores are not finite')
    scores = np.concatenate([id_scores, ood_scores])
    is_id = np.concatenate([np.ones(len(id_scores), dtype=int), np.zeros(len(ood_scores), dtype=int)])
    false_rate, true_rate, thresholds = roc_curve(is_id, scores, drop_intermediate=False)
    balanced = (true_rate + 1 - false_rate) / 2
    best = int(balanced.argmax())
    return OodMetrics(
        auroc=float(roc_auc_score(is_id, scores)),
        aupr_in=float(average_precision_score(is_id, scores)),
        aupr_out=float(average_precision_score(1 - is_id, -scores)),
        accuracy=float(balanced[best]),
        accuracy_at=float(((id_scores >= fixed).mean() + (ood_scores < fixed).mean()) / 2),
        threshold=float(thresholds[best]),
    )


def scores(ev: Evaluation, model: EvalModel, batches: Iterable[Batch], name: str, total: int) -> np.ndarray:
    """Compute the largest softmax probability of all images, in dataset order, as float64."""
    def score(batch: Batch) -> dict[str, torch.Tensor]:
        logits = model.network(batch.images)
        check_finite(logits, f'{model.label} on {name}')
        return {'score': logits.cpu().double().softmax(dim=1).amax(dim=1)}

    return ev.measure(f'{name} {model.label}', batches, total, score)['score']


@register_protocol('ood', OodOptions)
def ood(ev: Evaluation) -> Result:
    """Out-of-distribution detection by the largest softmax probability."""
    options = ev.config
    sources = [open_set(name, options.ood_key) for name in options.ood or []]
    noises = [name for name in options.ood_noise or [] if name != 'none']
    names = [*(source.title for source in sources), *(NOISES[name] for name in noises)]
    if not names or len(set(names)) != len(names):
        raise ValueError(f'--ood and --ood-noise must name at least one set, with different names; got: {names}')
    rows: list[dict[str, Any]] = []
    score: dict[str, dict[str, np.ndarray]] = {}
    for model in ev.models:
        own = score[model.label] = {'ID': ev.predictions(model).confidence}
        for source in sources:
            if options.ood_fit == 'crop':
                loader = ev.unlabelled(
                    model, source, partial(crop_transform, interpolation=model.data_config['interpolation']))
            else:
                loader = ev.unlabelled(model, source, crop_pct=1.0, crop_mode='center')
            own[source.title] = scores(ev, model, loader, source.title, len(loader))
        for name in noises:
            own[NOISES[name]] = scores(ev, model, noise_batches(ev, model, name), name, len(ev.loader(model)))
        rows += [_row(model.label, name, own['ID'], own[name]) for name in names]
    fitted = {
        'resize': 'resizing the shorter side and a centre crop',
        'crop': 'a centre crop of the original pixels (smaller images are enlarged)',
    }[options.ood_fit]
    return Result(
        columns={
            'set': Column('OOD set'),
            'auroc': Column('AUROC (%)', '.2f'),
            'aupr_in': Column('AUPR-in (%)', '.2f'),
            'aupr_out': Column('AUPR-out (%)', '.2f'),
            'accuracy': Column('detection accuracy, best threshold (%)', '.2f'),
            'accuracy_at': Column('at threshold 0.5 (%)', '.2f'),
            'id_images': Column('ID images', 'd'),
            'ood_images': Column('OOD images', 'd'),
        },
        rows=rows,
        notes=[
            'Score: largest softmax probability, higher for ID. AUPR: average precision with ID (in) or OOD (out, with '
            'negated scores) as the positive class; it depends on the share of OOD images. Detection accuracy: (TPR + '
            'TNR) / 2, at the best threshold and at 0.5.',
            f"Sets are brought to the models' image size by {fitted}. Noise: U(0, 1), and N(0.5, 0.5) with a standard "
            'deviation of 0.5, alone or added to the ID images, clipped to [0, 1].',
        ],
        details={'histograms': histograms(score)},
        figures={'': draw_histograms(score, rows), 'auroc': draw_auroc(rows, names)},
    )


def _row(label: str, name: str, id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, Any]:
    found = vars(ood_metrics(id_scores, ood_scores))
    row = {key: value if key == 'threshold' else 100 * value for key, value in found.items()}
    return {'model': label, 'set': name, **row, 'id_images': len(id_scores), 'ood_images': len(ood_scores)}


def histograms(score: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Histograms of the scores with 50 bins from 0 to 1."""
    return {label: {name: np.histogram(values, 50, (0, 1))[0] for name, values in own.items()}
            for label, own in score.items()}


def draw_histograms(score: dict[str, dict[str, np.ndarray]], rows: list[dict[str, Any]]) -> Figure:
    """Draw the scores of ID and OOD images: a row per model, a column per set."""
    names = [name for name in next(iter(score.values())) if name != 'ID']
    auroc = {(row['model'], row['set']): row['auroc'] for row in rows}
    fig, axes = figure(
        len(score), len(names), size=(2.2, 1.6), sharex=True, sharey='row',
        title='Largest softmax probability of ID and OOD images: share of the images in each bin')
    edges = np.linspace(0, 1, 21)
    for line, (label, own) in zip(axes, score.items(), strict=True):
        for ax, name in zip(line, names, strict=True):
            for place, (kind, values) in enumerate((('ID', own['ID']), ('OOD', own[name]))):
                ax.hist(values, edges, weights=np.full(len(values), 1 / len(values)), color=COLORS[place], alpha=0.6,
                        label=kind)
            ax.text(0.03, 0.95, f'AUROC {auroc[label, name]:.1f} %', transform=ax.transAxes, va='top', fontsize=8)
        line[0].set(ylabel=label, ylim=(0, 1.25 * line[0].get_ylim()[1]))  # room for the text
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name)
    for ax in axes[-1]:
        ax.set(xlabel='score', xlim=(0, 1), xticks=(0, 0.5, 1))
    shared_legend(fig, axes[0, 0])
    return fig


def draw_auroc(rows: list[dict[str, Any]], names: list[str]) -> Figure:
    """Draw the AUROC of every model on every set."""
    labels = list(dict.fromkeys(row['model'] for row in rows))
    found = {(row['model'], row['set']): row['auroc'] for row in rows}
    fig, axes = panels(len(names), size=(3.6, 0.8 + 0.3 * len(labels)), sharex=True, sharey=True,
                       title='AUROC (%): 50 is chance (grey line), 100 is perfect')
    for ax, name in zip(axes, names, strict=True):
        bars(ax, labels, [found[label, name] for label in labels])
        ax.axvline(50, color=GREY, linewidth=1)
        ax.set(title=f'ID against {name}', xlim=(0, 115), xticks=range(0, 101, 25))
    return fig
