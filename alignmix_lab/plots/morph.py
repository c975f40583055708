"""Mixed features decoded by the autoencoder: Figures 1 and 3 of AlignMixup, arXiv 2103.15375."""
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import nn

from alignmix_lab.runs.plotting import figure
from timm_alignmix.functional import align
from timm_alignmix.mixes.alignmix_ae import AlignMixAE

from .images import network_input, show, to_pixels

LAMS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)


@torch.no_grad()
def morph(model: nn.Module, mix: AlignMixAE, pixels: torch.Tensor, lams: Sequence[float] = LAMS) -> Figure:
    """Draw two images and decoded mixes of their feature maps, with lambda from 1 to 0.

    Alignment moves the features of one image to the positions of the other: equation (11) keeps the positions of A, and
    (12), as printed in the paper, those of B.

    Args:
        model: The encoder.
        mix: The method with its trained decoder, see :func:`alignmix_lab.plots.open_autoencoder`.
        pixels: (2, 3, H, W) in [0, 1], A and B.
        lams: Weights of the image whose positions are kept.
    """
    layers = mix.extra
    A = layers.pool(mix.head.feature_map(network_input(model, pixels)))
    a, b = A.flatten(2)[:1], A.flatten(2)[1:]
    at_a, at_b = align(a, b, mix.eps, mix.iterations, mix.final_marginal)
    rows = {
        'aligned,\npositions of A': (a, at_a),
        'aligned,\npositions of B': (b, at_b),
        'not aligned': (a, b),
    }
    fig, axes = figure(len(rows), len(lams) + 2, size=(1.25, 1.42))
    for i, (row, (label, (kept, moved))) in enumerate(zip(axes, rows.items(), strict=True)):
        mixed = torch.cat([lam * kept + (1 - lam) * moved for lam in lams])
        decoded = layers.decoder(layers.sample(layers.encode(mixed.unflatten(2, A.shape[2:]))))
        first = 1 if kept is b else 0
        show(row[0], pixels[first], 'photo ' + 'AB'[first])
        row[0].set_ylabel(label, fontsize=9)
        show(row[-1], pixels[1 - first], 'photo ' + 'AB'[1 - first])
        for ax, lam, image in zip(row[1:-1], lams, to_pixels(model, decoded), strict=True):
            show(ax, image, f'$\\lambda$ = {lam:.1f}' if i == 0 else '')
    return fig
