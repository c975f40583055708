"""MultiMix's convex hull of embeddings, compared with mixed pairs: arXiv 2311.05538, Figure 1."""
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.spatial import ConvexHull
from torch import nn

from alignmix_lab.runs.plotting import COLORS, GREY, figure
from timm_alignmix.functional import convex_weights
from timm_alignmix.step_random import sample_beta

from .images import network_input


def hull(
        model: nn.Module, pixels: torch.Tensor, names: Sequence[str] | None = None, n: int = 1000, alpha: float = 2.0,
        seed: int = 0) -> Figure:
    """Draw the embeddings of a mini-batch and their mixes in the plane of the two principal directions.

    Args:
        model: A timm model.
        pixels: (B, 3, H, W) in [0, 1], with B >= 3.
        names: Names of the examples, e.g. their classes.
        n: Points that MultiMix draws.
        alpha: Parameter of lam ~ Beta(alpha, alpha) for pairs.
        seed: Random seed.

    Raises:
        ValueError: There are fewer than 3 images.
    """
    B = len(pixels)
    if B < 3:
        raise ValueError(f'a hull needs 3 images or more, got {B}')
    training = model.training
    with torch.no_grad():
        images = network_input(model, pixels)
        z_BD = model.eval().forward_head(model.forward_features(images), pre_logits=True).flatten(1)
    model.train(training)
    z_BD = z_BD - z_BD.mean(dim=0)
    _, scale, directions = torch.linalg.svd(z_BD, full_matrices=False)
    z_B2 = z_BD @ directions[:2].T

    generator = torch.Generator().manual_seed(seed)
    perm = torch.randperm(B, generator=generator)
    lam = sample_beta(alpha, (B, 1), generator)
    pairs_B2 = lam * z_B2 + (1 - lam) * z_B2[perm]
    points_N2 = convex_weights(n, B, generator=generator) @ z_B2

    fig, axes = figure(1, 2, size=(4.1, 3.6), sharex=True, sharey=True)
    left, right = axes[0]
    for i in range(B):
        left.plot(*torch.stack([z_B2[i], z_B2[perm[i]]]).T, color=GREY, linewidth=1, zorder=1)
    left.scatter(*pairs_B2.T, s=28, color=COLORS[1], edgecolors='black', linewidths=0.5, zorder=3,
                 label=f'{B} mixed examples')
    left.set_title('mixup: points between pairs')
    right.scatter(*points_N2.T, s=8, color=COLORS[1], zorder=1, label=f'{n} mixed examples')
    right.set_title('MultiMix: points of the convex hull')
    share = (scale[:2].square().sum() / scale.square().sum()).item()
    for ax in (left, right):
        _examples(ax, z_B2, names)
        ax.set(xlabel=f'two principal directions ({100 * share:.0f} % of the variance)', xticks=[], yticks=[])
        ax.legend(loc='upper center', bbox_to_anchor=(0.5, -0.09), ncols=2, fontsize=9)
    return fig


def _examples(ax: Axes, z_B2: torch.Tensor, names: Sequence[str] | None) -> None:
    corners = ConvexHull(z_B2.numpy()).vertices
    ax.fill(*z_B2[corners].T, facecolor=COLORS[5], alpha=0.15, edgecolor=COLORS[0], linewidth=1.5, zorder=0)
    ax.scatter(*z_B2.T, s=40, color=COLORS[0], marker='s', zorder=4, label=f'{len(z_B2)} examples')
    for place, name in zip(z_B2, names or [], strict=False):
        ax.annotate(name, place.tolist(), xytext=(0, 6), textcoords='offset points', ha='center', fontsize=7, zorder=5)
    ax.margins(0.14)
