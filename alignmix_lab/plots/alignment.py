"""Alignment of AlignMixup, arXiv 2103.15375: destinations of selected positions, and the plan as a matrix."""
from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from alignmix_lab.runs.plotting import COLORS, STYLE
from timm_alignmix.anatomy import Anatomy, feature_map
from timm_alignmix.functional import sinkhorn_plan, transport_cost

from .images import network_input, show, spotlight

# Colours of the palette that are distinguishable on dark and bright photos.
_MARKS = (COLORS[1], COLORS[5], COLORS[4], COLORS[2], COLORS[3], COLORS[0])


def alignment(
        model: nn.Module,
        pixels: torch.Tensor,
        layer: str | int = 'auto',
        positions: Sequence[tuple[int, int]] | None = None,
        count: int = 4,
        eps: float = 0.1,
        iterations: int = 100,
) -> Figure:
    """Draw two images with positions of each, and where the plan moves them in the other image.

    Args:
        model: A timm model.
        pixels: (2, 3, H, W) in [0, 1].
        layer: Layer to align, as `align_at` of alignmix.
        positions: Rows and columns of the feature map; None selects salient ones.
        count: Number of salient positions.
        eps: Entropy coefficient of the plan.
        iterations: Sinkhorn iterations.

    Raises:
        ValueError: The model has no such layer, or a position is outside its map.
    """
    found = Anatomy(model, tuple(pixels.shape[2:])).align_layer(layer)
    feat_BDR = found.layout.positions(feature_map(model, found.name, network_input(model, pixels)))
    height = _grid_height(feat_BDR.shape[2], pixels.shape[2] / pixels.shape[3])
    width = feat_BDR.shape[2] // height
    cost_BRR = transport_cost(feat_BDR, feat_BDR.flip(0))
    plans = sinkhorn_plan(cost_BRR, eps, iterations) * feat_BDR.shape[2]  # of A to B, and of B to A; rows sum to 1

    chosen = [_standing_out(feat_BDR[i], height, count) for i in range(2)]
    if positions is not None:
        if any(not 0 <= r < height or not 0 <= c < width for r, c in positions):
            raise ValueError(f'positions {list(positions)} are not all in the {height}x{width} map of {found.name!r}')
        chosen = [[r * width + c for r, c in positions]] * 2
    count = len(chosen[0])
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(1.45 * (count + 1) + 3.2, 3.5), layout='constrained')
        grid = fig.add_gridspec(2, count + 3)
        for i, name in enumerate('AB'):
            ax = fig.add_subplot(grid[i, 0])
            show(ax, pixels[i], f'photo {name}')
            _mark(ax, chosen[i], width, pixels.shape[3] / width)
            for k, r in enumerate(chosen[i]):
                weight_HW = plans[i, r].view(height, width)
                ax = fig.add_subplot(grid[i, k + 1])
                spotlight(ax, pixels[1 - i], weight_HW, f'{name}{k + 1} goes to', _MARKS[k % len(_MARKS)])
                ax.set_xlabel(f'up to {100 * weight_HW.max():.0f} %', fontsize=8, labelpad=3)
        _matrix(fig.add_subplot(grid[:, -2:]), plans[0], chosen[0], found.name, height, width)
    return fig


def _grid_height(positions: int, aspect: float) -> int:
    """Rows of a feature map with the aspect ratio of the image."""
    rows = [r for r in range(1, positions + 1) if positions % r == 0]
    return min(rows, key=lambda r: abs(r * r / positions - aspect))


def _standing_out(feat_DR: torch.Tensor, height: int, count: int) -> list[int]:
    """Find positions whose features are farthest from the mean and not adjacent, in order from the top."""
    width = feat_DR.shape[1] // height
    score = (feat_DR - feat_DR.mean(dim=1, keepdim=True)).square().sum(dim=0).view(height, width)
    chosen = []
    for _ in range(min(count, feat_DR.shape[1])):
        r, c = divmod(int(score.argmax()), width)
        chosen.append(r * width + c)
        score[max(r - 1, 0):r + 2, max(c - 1, 0):c + 2] -= score.max() - score.min() + 1
    return sorted(chosen)


def _mark(ax: Axes, chosen: list[int], width: int, cell: float) -> None:
    for k, position in enumerate(chosen):
        r, c = divmod(position, width)
        color = _MARKS[k % len(_MARKS)]
        ax.add_patch(Rectangle((c * cell, r * cell), cell, cell, fill=False, edgecolor=color, linewidth=2))
        ax.text((c + 0.5) * cell, (r + 0.5) * cell, str(k + 1), color='white', ha='center', va='center', fontsize=8,
                fontweight='bold', bbox={'boxstyle': 'circle,pad=0.15', 'facecolor': color, 'edgecolor': 'none'})


def _matrix(ax: Axes, plan_RR: torch.Tensor, chosen: list[int], layer: str, height: int, width: int) -> None:
    drawn = ax.imshow(plan_RR.numpy(), cmap='viridis', norm=PowerNorm(0.5, 0, float(plan_RR.max())))
    ax.grid(visible=False)
    ax.set_yticks(chosen, [f'A{k + 1}' for k in range(len(chosen))])
    for k, label in enumerate(ax.get_yticklabels()):
        label.set(color=_MARKS[k % len(_MARKS)], fontweight='bold')
    title = f'plan at {layer} ({height}x{width})\nrows: positions of A'
    ax.set(xticks=[], xlabel='columns: positions of B', title=title)
    ax.figure.colorbar(drawn, ax=ax, shrink=0.8, label='share of a row')
