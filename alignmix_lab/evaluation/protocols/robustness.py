"""Top-1 error under l_inf-bounded FGSM and PGD attacks, as the papers report it.

FGSM: Goodfellow et al. 2015, arXiv 1412.6572. PGD: Madry et al. 2018, arXiv 1706.06083. The papers use 8/255 for FGSM
and 4/255 with steps of 2/255 for PGD. They do not state the number of PGD iterations or the start; both are taken from
the public evaluation of PuzzleMix, which the papers follow.
"""
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from alignmix_lab.runs.options import Options, config_option
from alignmix_lab.runs.plotting import GREY, figure, line, shared_legend

from ..base import register_protocol
from ..context import Evaluation
from ..data import Batch
from ..models import EvalModel, eval_mode
from ..predictions import check_finite
from ..result import BOLD, Column, Result, standard_error
from .noise import image_noise

_option = partial(config_option, 'Robustness (sizes in 1/255 of the pixel range)')


@dataclass
class RobustnessOptions(Options):
    """Options of the robustness protocol."""
    fgsm_eps: float = _option(8.0, "bound of FGSM", float, low=0.001)
    fgsm_curve: list[float] = _option([1, 2, 4, 8, 16], 'more bounds for the curve', float, nargs='+', low=0)
    pgd: bool = _option(True, 'attack by PGD too, which takes 30 times as long as FGSM', bool)
    pgd_eps: float = _option(4.0, "bound of PGD", float, low=0.001)
    pgd_step: float = _option(2.0, "step of PGD at --pgd-eps; scaled with the bound on the curve", float, low=0)
    pgd_iterations: int = _option(20, "iterations of PGD", int, low=1)
    pgd_start: str = _option('uniform', 'start of PGD: random within the bound, or the image',
                             choices=('uniform', 'image'))
    pgd_curve: list[float] = _option(
        [1, 2, 4, 8], 'more bounds for the curve; each costs as much as the attack', float, nargs='+', low=0)

    @property
    def attacks(self) -> list[str]:
        """Attacks to run."""
        return ['fgsm', 'pgd'] if self.pgd else ['fgsm']

    def bounds(self, attack: str) -> list[float]:
        """Sorted bounds of 'fgsm' or 'pgd' in 1/255, without 0, which is the clean image; none if it is not run."""
        if attack not in self.attacks:
            return []
        curve = {*getattr(self, f'{attack}_curve'), getattr(self, f'{attack}_eps')}
        return sorted(curve - {0})


def loss_gradient(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient (B, C, H, W) of each image's cross-entropy, and the logits (B, classes).

    Losses are summed, not averaged, so that the gradient of an image does not depend on its batch. The model must be in
    evaluation mode, because batch norms would couple the images of a batch.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images)
        gradient, = torch.autograd.grad(F.cross_entropy(logits, labels, reduction='sum'), images)
    return gradient, logits.detach()


def fgsm(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> torch.Tensor:
    """Fast gradient sign method: one step of `eps` from the image; see :func:`pgd`."""
    return pgd(model, images, labels, eps, step=eps, iterations=1)


def pgd(
        model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float, step: float, iterations: int,
        start: torch.Tensor | None = None) -> torch.Tensor:
    """Projected gradient descent with an l_inf bound.

    Each step is projected onto the box around the clean image, then onto the pixel range.

    Args:
        model: Takes pixels in [0, 1] and normalises them itself; used in evaluation mode.
        images: (B, C, H, W) pixels in [0, 1]; `eps` and `step` are on their scale.
        start: Offset of the start from the images, within the bound; None starts at the images.

    Returns:
        Images (B, C, H, W) in [0, 1], at most `eps` from the clean ones.
    """
    with eval_mode(model):
        x = images if start is None else (images + start).clamp(0, 1)
        for _ in range(iterations):
            x = _project(x + step * loss_gradient(model, x, labels)[0].sign(), images, eps)
    return x


def _project(x: torch.Tensor, images: torch.Tensor, eps: float) -> torch.Tensor:
    return (images + (x - images).clamp(-eps, eps)).clamp(0, 1)


@register_protocol('robustness', RobustnessOptions)
def robustness(ev: Evaluation) -> Result:
    """Top-1 error under FGSM and PGD attacks, with curves over the bound."""
    options = ev.config
    rows, curves = [], {}
    for model in ev.models:
        wrong = attack(ev, model)
        error = {name: 100 * float(np.mean(values)) for name, values in wrong.items() if name != 'no_gradient'}
        curves[model.label] = {
            kind: {'eps': [0.0, *options.bounds(kind)],
                   'error': [error['clean'], *(error[f'{kind}_{eps:g}'] for eps in options.bounds(kind))]}
            for kind in options.attacks
        }
        images = len(wrong['clean'])
        shown = {'clean': error['clean']}
        shown |= {kind: error[f'{kind}_{getattr(options, f"{kind}_eps"):g}'] for kind in options.attacks}
        rows.append({
            'model': model.label,
            **shown,
            'no_gradient': int(wrong['no_gradient'].sum()),
            'images': images,
            **error,
            **{f'{name}_standard_error': standard_error(value, images) for name, value in shown.items()},
        })
    start = {'uniform': 'from a uniformly random start', 'image': 'from the image'}[options.pgd_start]
    pgd_note = (
        f' PGD: l_inf {options.pgd_eps:g}/255, step {options.pgd_step:g}/255, {options.pgd_iterations} iterations '
        f'{start}; on the curve the step scales with the bound. The papers do not state the number of iterations.')
    return Result(
        columns={
            'clean': Column('clean error (%)', '.2f', 'lower', 'clean_standard_error'),
            **{kind: Column(
                f'{kind.upper()} {getattr(options, f"{kind}_eps"):g}/255 error (%)', '.2f', 'lower',
                f'{kind}_standard_error') for kind in options.attacks},
            'no_gradient': Column('no gradient', 'd'),
            'images': Column('images', 'd'),
        },
        rows=rows,
        notes=[
            f'FGSM: l_inf {options.fgsm_eps:g}/255, one step from the image.' + (pgd_note if options.pgd else ''),
            'Gradients, steps and bounds refer to pixels in [0, 1]; normalisation inside the model, batch norms in '
            'evaluation mode, float32, true labels, all images.',
            'No gradient: images whose loss has a gradient of exactly 0. The attacks cannot change them, so an '
            'overconfident model looks robust there.',
            BOLD,
        ],
        details={'curves': curves},
        figures={'': draw(curves, options)},
    )


def attack(ev: Evaluation, model: EvalModel) -> dict[str, np.ndarray]:
    """Attack all images and find the wrong predictions.

    Returns:
        Bool arrays over all images by name: 'clean', 'fgsm_EPS' and 'pgd_EPS' (EPS in 1/255), where a prediction is
        wrong, and 'no_gradient'.
    """
    options, loader = ev.config, ev.loader(model)
    facts = {'model': model.fingerprint, 'data': loader.description, 'seed': options.seed}
    steps = (options.pgd_step / options.pgd_eps, options.pgd_iterations, options.pgd_start)
    jobs = {'fgsm': ev.store(f'{model.label} fgsm', **facts, bounds=options.bounds('fgsm'))}
    for eps in options.bounds('pgd'):
        jobs[eps] = ev.store(f'{model.label} pgd {eps:g}', **facts, bound=eps, steps=steps)
    indices = []
    with ev.progress(f'attack {model.label}', len(loader) * len(jobs)) as bar:
        for batch in loader:
            indices.append(batch.indices)
            for eps, store in jobs.items():
                if not store.has(batch.indices):
                    store.add(batch.indices, **(
                        _all_fgsm(model, batch, options) if eps == 'fgsm' else _one_pgd(model, batch, eps, options)))
                bar.update()
    own = torch.cat(indices) if indices else torch.empty(0, dtype=torch.int64)
    found = ev.gather(own, **{name: values for store in jobs.values() for name, values in store.take(own).items()})
    del found['index']
    return found


def _wrong(model: EvalModel, logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    check_finite(logits, model.label)
    return (logits.argmax(dim=1) != labels).cpu().numpy()


def _all_fgsm(model: EvalModel, batch: Batch, options: RobustnessOptions) -> dict[str, np.ndarray]:
    """Evaluate the clean images and FGSM at every bound, with a single gradient."""
    images, labels, network = batch.images, batch.labels, model.network
    gradient, logits = loss_gradient(network, images, labels)
    found = {
        'clean': _wrong(model, logits, labels),
        'no_gradient': (gradient == 0).flatten(1).all(dim=1).cpu().numpy(),
    }
    for eps in options.bounds('fgsm'):
        with torch.inference_mode():
            moved = _project(images + eps / 255 * gradient.sign(), images, eps / 255)
            found[f'fgsm_{eps:g}'] = _wrong(model, network(moved), labels)
    return found


def _one_pgd(model: EvalModel, batch: Batch, eps: float, options: RobustnessOptions) -> dict[str, np.ndarray]:
    bound, start = eps / 255, None
    if options.pgd_start == 'uniform':
        noise = image_noise(torch.rand, tuple(batch.images.shape[1:]), batch.indices, options.seed)
        start = (2 * bound * noise - bound).to(batch.images.device)
    step = bound * options.pgd_step / options.pgd_eps
    moved = pgd(model.network, batch.images, batch.labels, bound, step, options.pgd_iterations, start)
    with torch.inference_mode():
        return {f'pgd_{eps:g}': _wrong(model, model.network(moved), batch.labels)}


def draw(curves: dict[str, dict[str, dict[str, list[float]]]], options: RobustnessOptions) -> Figure:
    """Plot the error over the bound: a panel per attack, a line per model."""
    fig, axes = figure(1, len(options.attacks), size=(4.6, 3.6), sharey=True)
    titles = {'fgsm': 'FGSM, one step', 'pgd': f'PGD, {options.pgd_iterations} iterations'}
    for ax, kind in zip(axes[0], options.attacks, strict=True):
        for place, (label, attacks) in enumerate(curves.items()):
            ax.plot(attacks[kind]['eps'], attacks[kind]['error'], **line(place), label=label)
        reported = getattr(options, f'{kind}_eps')
        ax.axvline(reported, color=GREY, linewidth=1, zorder=0)
        ax.annotate('in the table', (reported, 0), xycoords=('data', 'axes fraction'), xytext=(-3, 3),
                    textcoords='offset points', ha='right', color=GREY, fontsize=8)
        ax.set(title=titles[kind], xlabel='l_inf bound (1/255 of the pixel range)', ylim=(0, 102))
    axes[0, 0].set_ylabel('top-1 error (%), lower is better')
    shared_legend(fig, axes[0, 0])
    return fig
