"""All input mixes of one pair of images, from one image to the other."""
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from alignmix_lab.runs.plotting import figure, panels
from timm_alignmix.functional import spectral_residual
from timm_alignmix.mixes import create_mix, list_mixes
from timm_alignmix.step_random import StepRandom

from .images import show

LAMS = (0.9, 0.7, 0.5, 0.3, 0.1)
_STEPS = 100  # drawn for a method, to find weights near those wanted


def input_mixes() -> list[str]:
    """Names of the methods that mix images alone."""
    mixes = {name: create_mix(name) for name in list_mixes()}
    return [name for name, mix in mixes.items() if not mix.binds and name != 'none']


def gallery(
        pixels: torch.Tensor, names: Sequence[str] = ('first', 'second'), lams: Sequence[float] = LAMS,
        seed: int = 0) -> Figure:
    """Draw what each input mix makes of two images, with its target.

    Methods that mix by the gradient of a network get the spectral residual of the images in its place.

    Args:
        pixels: (2, 3, H, W) in [0, 1].
        names: Names of the images, e.g. their classes.
        lams: Weights of the first image. Each method shows the step that comes nearest, of the steps it drew; methods
            that draw no weight have fewer pictures. With a single weight, a picture of each method.
        seed: Seed of the draws.
    """
    mixes = input_mixes()
    if len(lams) == 1:  # a picture for each method
        fig, axes = panels(len(mixes) + 2, most_columns=7, size=(1.35, 1.55))
        pictures = [*pixels, *(mixed_pairs(name, pixels, lams, seed)[0][0] for name in mixes)]
        for ax, image, title in zip(axes, pictures, [*names, *mixes], strict=True):
            show(ax, image, title)
        return fig
    fig, axes = figure(len(mixes), len(lams) + 2, size=(1.35, 1.55))
    for row, name in zip(axes, mixes, strict=True):
        show(row[0], pixels[0], f'A: {names[0]}' if name == mixes[0] else '')
        show(row[-1], pixels[1], f'B: {names[1]}' if name == mixes[0] else '')
        row[0].set_ylabel(name, fontsize=11)
        shown = set()
        for ax, (image, lam, step) in zip(row[1:-1], mixed_pairs(name, pixels, lams, seed), strict=True):
            if step in shown:
                ax.set_axis_off()
                continue
            shown.add(step)
            show(ax, image, f'{lam:.2f} A + {1 - lam:.2f} B' if lam < 1 else 'A')
            ax.title.set_fontsize(9)
    return fig


def mixed_pairs(
        name: str, pixels: torch.Tensor, lams: Sequence[float], seed: int = 0) -> list[tuple[torch.Tensor, float, int]]:
    """Mixed pixels (3, H, W), weight of the first image and step, of the step whose weight is nearest to each lam."""
    mix, random, eye = create_mix(name), StepRandom(seed), torch.eye(2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in mix.normalization)
    images = (pixels - mean) / std
    if hasattr(mix, 'probs'):
        mix.probs = {'input': 1.0}
    found, saliency = [], spectral_residual(images)
    for step in range(_STEPS):
        draw = mix.draw(images, random.at(step, images.device))
        if 'clean_pass' in draw:
            draw = mix.complete(images, draw, saliency, None)
        # Of the rows of a method that keeps the clean batch too, the last ones are mixed.
        weights = mix.target(eye, draw)[-2]
        partner = draw.get('perm', torch.tensor([1]))[0]
        if partner == 1:  # not A with itself
            found.append(((weights[0] / weights.sum()).item(), draw, step))
    chosen = [min(found, key=lambda item, lam=lam: abs(item[0] - lam)) for lam in lams]
    return [(mix.images(images, draw)[-2] * std + mean, lam, step) for lam, draw, step in chosen]
