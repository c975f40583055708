"""Top-1 and top-5 accuracy and loss."""
from alignmix_lab.runs.plotting import bars, figure

from ..base import register_protocol
from ..context import Evaluation
from ..result import BOLD, Column, Result, standard_error


@register_protocol('accuracy')
def accuracy(ev: Evaluation) -> Result:
    """Top-1 and top-5 accuracy and loss; for a training run, of the last and the best epoch."""
    rows = []
    for model in ev.models:
        found = ev.predictions(model)
        trained = model.training.get('accuracy', {})
        rows.append({
            'model': model.label,
            'top1': found.top(1),
            'top5': found.top(5),
            'loss': float(found.nll.mean()),
            'images': len(found.label),
            **{f'top{k}_error': standard_error(found.top(k), len(found.label)) for k in (1, 5)},
            'epoch': (trained.get(trained.get('exported')) or {}).get('epoch'),
            'epoch_is': trained.get('exported'),
        })
    fig, axes = figure(1, 2, size=(4.6, 0.9 + 0.36 * len(rows)), sharey=True)
    for ax, k in zip(axes[0], (1, 5), strict=True):
        values, errors = ([row[key] for row in rows] for key in (f'top{k}', f'top{k}_error'))
        bars(ax, [row['model'] for row in rows], values, errors=errors)
        ax.set_title(f'top-{k} accuracy (%), with standard error')
    return Result(
        columns={
            'top1': Column('top-1 (%)', '.2f', 'higher', 'top1_error'),
            'top1_error': Column('standard error', '.2f'),
            'top5': Column('top-5 (%)', '.2f', 'higher', 'top5_error'),
            'loss': Column('loss', '.4f', 'lower'),
            'images': Column('images', 'd'),
            'epoch_is': Column('epoch'),
        },
        rows=rows,
        notes=[
            'Loss: mean cross-entropy in nats. Standard error of top-1: sqrt(p (1 - p) / images), for the sampling of '
            'images only.',
            'The best epoch was selected on validation images; its accuracy on the same images is optimistic.',
            BOLD,
        ],
        figures={'': fig},
    )
