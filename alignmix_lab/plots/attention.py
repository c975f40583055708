"""Attention of Dense MultiMix, arXiv 2311.05538: all its forms over photos, and the resulting weights."""
import torch
from matplotlib.figure import Figure
from torch import nn

from alignmix_lab.runs.plotting import figure
from timm_alignmix.anatomy import Anatomy
from timm_alignmix.functional import attention_map, convex_weights

from .images import network_input, show, spotlight

_FORMS = (('gap', 'relu'), ('gap', 'softmax'), ('cam', 'relu'), ('cam', 'softmax'))


def attention(
        model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor | None = None,
        class_names: list[str] | None = None, n: int = 1000, seed: int = 0) -> Figure:
    """Draw every form of attention, and the share of each image in the mixed examples of each position.

    Args:
        model: A timm model that Dense MultiMix can train.
        pixels: (B, 3, H, W) in [0, 1], a mini-batch.
        labels: (B,) classes for 'cam'; None uses the model's predictions.
        class_names: Names of the classes.
        n: Number of mixed examples per position for the last column.
        seed: Random seed of the mixed examples.

    Raises:
        UnsupportedModel: The model has no dense head.
    """
    head = Anatomy(model, tuple(pixels.shape[2:])).dense_head(allow_class_token=True)
    x = head.feature_map(network_input(model, pixels))
    with torch.no_grad():
        logits_BRC, embed_BDR = head(x)
        labels = logits_BRC.mean(dim=1).argmax(dim=1) if labels is None else labels
        maps = {
            form: attention_map(embed_BDR, *form, weight=head.weight() if form[0] == 'cam' else None, labels=labels)
            for form in _FORMS}
    B, R = len(pixels), embed_BDR.shape[2]
    height = x.shape[2] if head.layout.kind == 'NCHW' else round((R * pixels.shape[2] / pixels.shape[3]) ** 0.5)
    default = 'gap', 'softmax' if head.layout.kind == 'NLC' else 'relu'  # of densemultimix
    shares_BR = position_shares(maps[default], n, torch.Generator().manual_seed(seed))

    title = f'Attention over {R} positions; uniform attention would be {100 / R:.1f} %'
    fig, axes = figure(B, len(_FORMS) + 2, size=(1.5, 1.72), title=title)
    for i, row in enumerate(axes):
        name = class_names[int(labels[i])] if class_names else f'as class {int(labels[i])}'
        show(row[0], pixels[i], name)
        for ax, ((by, normalize), maps_BR) in zip(row[1:-1], maps.items(), strict=True):
            title = f'{by.upper()}, {normalize}' + (' (default)' if (by, normalize) == default else '')
            _map(ax, pixels[i], maps_BR[i].view(height, -1), title if i == 0 else '')
        title = f'share in mixed\nexamples (mean {100 / B:.0f} %)' if i == 0 else ''
        _map(row[-1], pixels[i], shares_BR[i].view(height, -1), title, least=True)
    return fig


def position_shares(attention_BR: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Mean share (B, R) of each example in the n mixed examples of a position: the columns of M in (11)."""
    B, R = attention_BR.shape
    weights_RNB = convex_weights(n, B, generator=generator, positions=R)
    mixed_RNB = weights_RNB * attention_BR.t().unsqueeze(1)
    return (mixed_RNB / mixed_RNB.sum(dim=2, keepdim=True).clamp_min(1e-12)).mean(dim=1).t()


def _map(ax, pixels_CHW: torch.Tensor, weight_HW: torch.Tensor, title: str, least: bool = False) -> None:
    spotlight(ax, pixels_CHW, weight_HW, title)
    ax.title.set_fontsize(9)
    low = f'{100 * weight_HW.min():.0f} to ' if least else 'up to '
    ax.set_xlabel(f'{low}{100 * weight_HW.max():.0f} %', fontsize=8, labelpad=2)
