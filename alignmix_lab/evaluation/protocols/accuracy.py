"""Top-1 and top-5 accuracy and loss, or mean average precision of several labels; figures by class."""
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from alignmix_lab.runs.plotting import bars, figure

from ..base import register_protocol
from ..context import Evaluation
from ..models import EvalModel
from ..predictions import check_finite
from ..result import BOLD, Column, Result, standard_error
from .per_class import average_precision, class_scores, class_table, draw_confusion, most_confused

_BY_CLASS = (
    'By class, in accuracy-classes.csv: recall is the share of its images that are predicted to be of the class, '
    'precision the share of images predicted so that are of the class, F1 their harmonic mean.')
_BEST = 'The best epoch was selected on validation images; its {} on the same images is optimistic.'


@register_protocol('accuracy', multi_label=True)
def accuracy(ev: Evaluation) -> Result:
    """Top-1 and top-5 accuracy, loss, recall, precision and F1 by class, confusions; mAP with --multi-label."""
    return _of_labels(ev) if ev.config.multi_label else _of_classes(ev)


def _of_classes(ev: Evaluation) -> Result:
    rows, tables, confused, drawn = [], [], {}, {}
    for model in ev.models:
        found, names = ev.predictions(model), _class_names(ev, model)
        scores = class_scores(found.label, found.prediction, model.num_classes)
        tables += class_table(model.label, names, scores)
        confused[model.label] = most_confused(found.label, found.prediction, names)
        drawn.setdefault(tuple(names), {})[model.label] = found.label, found.prediction
        rows.append({
            'model': model.label,
            'top1': found.top(1),
            'top5': found.top(5),
            'f1': float(np.nanmean(scores['f1'])),
            'loss': float(found.nll.mean()),
            'images': len(found.label),
            **{f'top{k}_error': standard_error(found.top(k), len(found.label)) for k in (1, 5)},
            **_epoch(model),
        })
    fig, axes = figure(1, 2, size=(4.6, 0.9 + 0.36 * len(rows)), sharey=True)
    for ax, k in zip(axes[0], (1, 5), strict=True):
        values, errors = ([row[key] for row in rows] for key in (f'top{k}', f'top{k}_error'))
        bars(ax, [row['model'] for row in rows], values, errors=errors)
        ax.set_title(f'top-{k} accuracy (%), with standard error')
    matrices = {
        'confusion' + (f'-{place}' if place > 1 else ''): draw_confusion(predictions, list(names))
        for place, (names, predictions) in enumerate(drawn.items(), 1)}
    return Result(
        columns={
            'top1': Column('top-1 (%)', '.2f', 'higher', 'top1_error'),
            'top1_error': Column('standard error', '.2f'),
            'top5': Column('top-5 (%)', '.2f', 'higher', 'top5_error'),
            'f1': Column('macro F1 (%)', '.2f', 'higher'),
            'loss': Column('loss', '.4f', 'lower'),
            'images': Column('images', 'd'),
            'epoch_is': Column('epoch'),
        },
        rows=rows,
        notes=[
            'Loss: mean cross-entropy in nats. Standard error of top-1: sqrt(p (1 - p) / images), for the sampling of '
            'images only. Macro F1: the mean over the classes that images have or are predicted to have.',
            _BY_CLASS,
            *(f'Most confused, {label}: {_spell(pairs[:5])}.' for label, pairs in confused.items() if pairs),
            _BEST.format('accuracy'),
            BOLD,
        ],
        details={'most_confused': confused},
        figures={'': fig, **matrices},
        tables={'classes': tables},
    )


def _of_labels(ev: Evaluation) -> Result:
    rows, tables = [], []
    for model in ev.models:
        loader = ev.loader(model)
        found = ev.measure(
            f'predict {model.label}', loader, len(loader),
            lambda batch, model=model: {
                'logits': model.network(batch.images).double(), 'label': batch.labels.bool()})
        logits, label = found['logits'], found['label']
        check_finite(torch.from_numpy(logits), model.label)
        scores = {'ap': average_precision(logits, label), **class_scores(label, logits >= 0, model.num_classes)}
        tables += class_table(model.label, _class_names(ev, model), scores)
        rows.append({
            'model': model.label,
            'map': float(scores['ap'].mean()),
            'f1': float(np.nan_to_num(scores['f1']).mean()),
            'loss': F.binary_cross_entropy_with_logits(
                torch.from_numpy(logits), torch.from_numpy(label).double()).item(),
            'images': len(label),
            **_epoch(model),
        })
    fig, axes = figure(1, 2, size=(4.6, 0.9 + 0.36 * len(rows)), sharey=True)
    for ax, (key, title) in zip(axes[0], {'map': 'mAP (%)', 'f1': 'macro F1 (%)'}.items(), strict=True):
        bars(ax, [row['model'] for row in rows], [row[key] for row in rows])
        ax.set_title(title)
    return Result(
        columns={
            'map': Column('mAP (%)', '.2f', 'higher'),
            'f1': Column('macro F1 (%)', '.2f', 'higher'),
            'loss': Column('loss', '.4f', 'lower'),
            'images': Column('images', 'd'),
            'epoch_is': Column('epoch'),
        },
        rows=rows,
        notes=[
            'mAP: the average precision of a class (scikit-learn, without interpolation), averaged over all classes. '
            'F1: of the labels with a probability of at least 0.5, averaged over all classes. A class without images '
            'counts as 0. Loss: mean binary cross-entropy in nats.',
            _BY_CLASS,
            _BEST.format('mAP'),
            BOLD,
        ],
        figures={'': fig},
        tables={'classes': tables},
    )


def _spell(pairs: list[dict[str, Any]]) -> str:
    return ', '.join(f'{pair["class"]} as {pair["predicted"]} ({pair["images"]} of {pair["of"]})' for pair in pairs)


def _class_names(ev: Evaluation, model: EvalModel) -> list[str]:
    """Names of the model's classes, else of the data's, else their numbers."""
    names = model.class_names or ev.loader(model).class_names or ()
    return [names[index] if index < len(names) else str(index) for index in range(model.num_classes)]


def _epoch(model: EvalModel) -> dict[str, Any]:
    trained = model.training.get('accuracy', {})
    return {
        'epoch': (trained.get(trained.get('exported')) or {}).get('epoch'), 'epoch_is': trained.get('exported')}
