"""Out-of-distribution detection by the largest softmax probability.

The baseline of Hendrycks and Gimpel 2017, arXiv 1610.02136, with the measures of ODIN, arXiv 1706.02690, and of the
papers. In-distribution (ID) images should have the higher scores.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from alignmix_lab.data.images.sources import ImageSource
from alignmix_lab.runs.options import Options, config_option
from alignmix_lab.runs.plotting import COLORS, GREY, bars, figure, panels, shared_legend

from ..base import register_protocol
from ..context import Evaluation
from ..data import Batch, EvalLoader, open_unlabelled
from ..models import EvalModel
from ..predictions import check_finite
from ..result import Column, Result
from .ood_sets import NOISES, fit, noise_batches, open_set

_option = partial(config_option, 'OOD detection')


@dataclass
class OodOptions(Options):
    """The sets that are out of distribution."""

    ood: list[str] | None = _option(
        None, 'sets: folders of images (with any folders inside), .npz or .npy files of uint8 images (N, H, W, C)',
        nargs='+')
    ood_key: str = _option('x', 'name of the images in .npz files')
    ood_fit: str = _option(
        'resize', "to the model's size: resize (shorter side, then centre crop) or crop (centre crop of unscaled "
        'pixels; smaller images are enlarged to fill it)', choices=('resize', 'crop'))
    ood_noise: list[str] | None = _option(
        list(NOISES), 'kinds of noise: U(0, 1) and N(0.5, 0.5) alone, as many images as the split has, or added to its '
        'images; none: no noise', nargs='+', choices=(*NOISES, 'none'))


@dataclass(frozen=True)
class OodMetrics:
    """Measures of a detector, from 0 to 1.

    Attributes:
        auroc: Area under the ROC curve.
        aupr_in: Average precision with ID as the positive class.
        aupr_out: Average precision with OOD as the positive class, scores negated.
        accuracy: Largest (TPR + TNR) / 2 over all thresholds.
        threshold: A threshold that reaches it; scores from there on are ID.
        accuracy_at: (TPR + TNR) / 2 at the threshold `fixed`.
        fixed: The fixed threshold.
    """
    auroc: float
    aupr_in: float
    aupr_out: float
    accuracy: float
    threshold: float
    accuracy_at: float
    fixed: float


def ood_metrics(id_scores: np.ndarray, ood_scores: np.ndarray, fixed: float = 0.5) -> OodMetrics:
    """Measure how well scores tell ID from OOD.

    Args:
        id_scores: (N,) of ID images; the higher, the more ID.
        ood_scores: (M,) of OOD images.
        fixed: Threshold of `accuracy_at`.

    Raises:
        ValueError: One of the two is empty, or scores are not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
    id_scores, ood_scores = np.asarray(id_scores, dtype=np.float64), np.asarray(ood_scores, dtype=np.float64)
    for name, scores in (('ID', id_scores), ('OOD', ood_scores)):
        if scores.size == 0:
            raise ValueError(f'there are no {name} scores; detection needs both kinds of images')
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
        threshold=float(thresholds[best]),
        accuracy_at=float(((id_scores >= fixed).mean() + (ood_scores < fixed).mean()) / 2),
        fixed=fixed,
    )


@torch.inference_mode()
def scores(ev: Evaluation, model: EvalModel, batches: Iterator[Batch], name: str, total: int) -> np.ndarray:
    """Largest softmax probability of all images of all processes, in the order of the data, float64."""
    indices, found = [], []
    with ev.progress(f'{name} {model.label}', total) as bar:
        for batch in batches:
            with ev.autocast():
                logits = model.network(batch.images)
            check_finite(logits, f'{model.label} on {name}')
            indices.append(batch.indices)
            found.append(logits.cpu().double().softmax(dim=1).amax(dim=1))
            bar.update()
    return ev.gather(indices, score=found)['score']


@register_protocol('ood', OodOptions)
def ood(ev: Evaluation) -> Result:
    """Detection of images from another distribution by the largest softmax probability."""
    options = ev.config
    sources = [open_set(name, options.ood_key) for name in options.ood or []]
    noises = [name for name in options.ood_noise or [] if name != 'none']
    names = [*(source.title for source in sources), *(NOISES[name] for name in noises)]
    if not names or len(set(names)) != len(names):
        raise ValueError(f'--ood and --ood-noise must name at least one set, each by its own name; got: {names}')
    rows: list[dict[str, Any]] = []
    score: dict[str, dict[str, np.ndarray]] = {}
    loaders: dict[Any, EvalLoader] = {}
    for model in ev.models:
        own = score[model.label] = {'ID': ev.predictions(model).confidence}
        for source in sources:
            loader = _loader(ev, model, source, loaders)
            own[source.title] = scores(ev, model, iter(loader), source.title, len(loader))
        for name in noises:
            own[NOISES[name]] = scores(ev, model, noise_batches(ev, model, name), name, len(ev.loader(model)))
        rows += [_row(model.label, name, own['ID'], own[name]) for name in names]
    fitted = {'resize': 'shorter side resized, then centre crop',
              'crop': 'centre crop of unscaled pixels, smaller images enlarged'}[options.ood_fit]
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
            'Score: largest softmax probability, higher for ID. AUPR: average precision, in: ID is the positive class, '
            'out: OOD is, scores negated; it depends on the share of OOD images. Detection accuracy: (TPR + TNR) / 2, '
            'at its best over all thresholds and where scores from 0.5 on are ID.',
            f"Sets: to the models' size by {fitted}. Noise: U(0, 1), and N(0.5, 0.5) with 0.5 the standard deviation, "
            'alone or added to the ID images, clipped to [0, 1].',
        ],
        details={'histograms': histograms(score)},
        figures={'': draw_histograms(score, rows), 'auroc': draw_auroc(rows, names)},
    )


def _loader(ev: Evaluation, model: EvalModel, source: ImageSource, loaders: dict[Any, EvalLoader]) -> EvalLoader:
    """Images of a set as a model takes them; models that take the same share one loader and its workers."""
    size = tuple(model.data_config['input_size'])
    key = source.title, size, model.data_config['interpolation']
    if key not in loaders:
        loaders[key] = open_unlabelled(
            source, fit(ev.config.ood_fit, model.data_config), ev.config, size, ev.device,
            ev.accelerator.process_index, ev.accelerator.num_processes)
    ev.used[loaders[key].description] = None
    return loaders[key]


def _row(label: str, name: str, id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, Any]:
    found = ood_metrics(id_scores, ood_scores)
    per_cent = {key: 100 * getattr(found, key) for key in ('auroc', 'aupr_in', 'aupr_out', 'accuracy', 'accuracy_at')}
    return {'model': label, 'set': name, **per_cent, 'threshold': found.threshold, 'id_images': len(id_scores),
            'ood_images': len(ood_scores)}


def histograms(score: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Numbers of images by score, in 50 bins from 0 to 1."""
    return {label: {name: np.histogram(values, 50, (0, 1))[0] for name, values in own.items()}
            for label, own in score.items()}


def draw_histograms(score: dict[str, dict[str, np.ndarray]], rows: list[dict[str, Any]]) -> Figure:
    """Scores of ID and OOD images: a row per model, a column per set."""

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
    """AUROC of every model on every set."""

    labels = list(dict.fromkeys(row['model'] for row in rows))
    found = {(row['model'], row['set']): row['auroc'] for row in rows}
    fig, axes = panels(len(names), size=(3.6, 0.8 + 0.3 * len(labels)), sharex=True, sharey=True,
                       title='AUROC (%): 50 is chance (grey line), 100 is perfect')
    for ax, name in zip(axes, names, strict=True):
        bars(ax, labels, [found[label, name] for label in labels])
        ax.axvline(50, color=GREY, linewidth=1)
        ax.set(title=f'ID against {name}', xlim=(0, 115), xticks=range(0, 101, 25))
    return fig
