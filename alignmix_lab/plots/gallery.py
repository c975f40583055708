"""All input mixes of one pair of images, from one image to the other."""
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from alignmix_lab.runs.plotting import figure
from timm_alignmix.mixes import create_mix
from timm_alignmix.mixes.cutmix import box_around

from .images import show

LAMS = (0.9, 0.7, 0.5, 0.3, 0.1)
_TITLES = {'mixup': 'input mixup', 'cutmix': 'CutMix'}


def gallery(
        pixels: torch.Tensor, names: Sequence[str] = ('first', 'second'), lams: Sequence[float] = LAMS,
        centre: tuple[float, float] = (0.5, 0.5)) -> Figure:
    """Draw the result of each input mix for two images, with its target.

    Args:
        pixels: (2, 3, H, W) in [0, 1].
        names: Names of the images, e.g. their classes.
        lams: Weights of the first image.
        centre: Centre of the CutMix box relative to height and width; random in training.
    """
    fig, axes = figure(len(_TITLES), len(lams) + 2, size=(1.35, 1.55))
    for row, name in zip(axes, _TITLES, strict=True):
        show(row[0], pixels[0], f'A: {names[0]}' if name == 'mixup' else '')
        show(row[-1], pixels[1], f'B: {names[1]}' if name == 'mixup' else '')
        row[0].set_ylabel(_TITLES[name], fontsize=11)
        for ax, lam in zip(row[1:-1], lams, strict=True):
            image, lam = mixed_pair(name, pixels, lam, centre)
            show(ax, image, f'{lam:.2f} A + {1 - lam:.2f} B')
            ax.title.set_fontsize(9)
    return fig


def mixed_pair(name: str, pixels: torch.Tensor, lam: float, centre: tuple[float, float]) -> tuple[torch.Tensor, float]:
    """Mix a pair of images; returns the mixed image (3, H, W) and the weight of the first one in the target."""
    draw = dict(mode='input', lam=torch.tensor(lam), perm=torch.tensor([1, 0]))
    if name == 'cutmix':
        H, W = pixels.shape[2:]
        middle = torch.tensor([[int(centre[0] * H), int(centre[1] * W)]])
        draw['box'] = box_around(middle, torch.tensor([[lam]]), H, W)
        top, left, bottom, right = draw['box'][0].tolist()
        lam = 1 - (bottom - top) * (right - left) / (H * W)
    return create_mix(name).images(pixels, draw)[0], lam
