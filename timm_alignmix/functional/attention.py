"""Attention over the positions of an image: Dense MultiMix, arXiv 2311.05538 [M], section 3.3.

Shape suffixes: B batch, C classes, D channels, R spatial positions.
"""
import torch

from ._precision import at_least_fp32


def attention_map(
        feat_BDR: torch.Tensor,
        by: str = 'gap',
        normalize: str = 'relu',
        weight: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention a = h(z^T u) of each position, [M] equation (9). The paper leaves u and h open: all choices are here.

    Args:
        feat_BDR: (B, D, R) embeddings before pooling, any float dtype.
        by: 'gap' takes u = mean of z over positions, 'cam' takes u = W^T y, the classifier's weight of the example's
            class, 'none' gives every position 1/R.
        normalize: h, 'relu' (ReLU, then l1 normalisation over positions) or 'softmax' (over positions).
        weight: (C, D) classifier weight, for 'cam'.
        labels: (B,) class indices or (B, C) probabilities, for 'cam'.

    Returns:
        (B, R) attention, float32 (float64 for float64 input), non-negative and differentiable. A row sums to 1, or to 0
        if ReLU leaves nothing of it.

    Raises:
        ValueError: Unknown option, wrong shape, or 'cam' without weight and labels.

    Example:
        >>> import torch
        >>> feat_BDR = torch.tensor([[[3.0, 1.0, -2.0]]])  # one example, one channel, three positions
        >>> attention_map(feat_BDR)
        tensor([[0.7500, 0.2500, 0.0000]])
    """
    if feat_BDR.ndim != 3:
        raise ValueError(f'features must be (B, D, R), got {tuple(feat_BDR.shape)}')
    if by not in ('gap', 'cam', 'none'):
        raise ValueError(f"by must be 'gap', 'cam' or 'none', got {by!r}")
    if normalize not in ('relu', 'softmax'):
        raise ValueError(f"normalize must be 'relu' or 'softmax', got {normalize!r}")
    B, D, R = feat_BDR.shape
    if by == 'none':
        dtype = torch.promote_types(feat_BDR.dtype, torch.float32)
        return torch.full((B, R), 1 / R, device=feat_BDR.device, dtype=dtype)
    with torch.autocast(feat_BDR.device.type, enabled=False):
        feat_BDR = at_least_fp32(feat_BDR)
        if by == 'gap':
            query_BD = feat_BDR.mean(dim=2)
            score_BR = torch.einsum('bdr,bd->br', feat_BDR, query_BD)
        else:
            score_BR = class_activation(feat_BDR, weight, labels)
        if normalize == 'softmax':
            return score_BR.softmax(dim=1)
        score_BR = score_BR.relu()
        total_B1 = score_BR.sum(dim=1, keepdim=True)
        return score_BR / torch.where(total_B1 > 0, total_B1, 1)


def class_activation(
        feat_BDR: torch.Tensor, weight: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor:
    """Class activation map z^T W^T y of each example's class, CVPR 2016, arXiv 1512.04150, without the bias.

    Args:
        feat_BDR: (B, D, R) embeddings before pooling, any float dtype.
        weight: (C, D) classifier weight.
        labels: (B,) class indices or (B, C) probabilities.

    Returns:
        (B, R) scores of any sign, float32 (float64 for float64 input).

    Raises:
        ValueError: Wrong shape, or weight or labels missing.

    Example:
        >>> import torch
        >>> feat_BDR = torch.tensor([[[3.0, 1.0], [0.0, 2.0]]])  # one example, two channels, two positions
        >>> class_activation(feat_BDR, torch.tensor([[1.0, 0.0], [1.0, -1.0]]), torch.tensor([1]))
        tensor([[ 3., -1.]])
    """
    with torch.autocast(feat_BDR.device.type, enabled=False):
        feat_BDR = at_least_fp32(feat_BDR)
        query_BD = _class_weight(weight, labels, *feat_BDR.shape[:2]).to(feat_BDR.dtype)
        return torch.einsum('bdr,bd->br', feat_BDR, query_BD)


def _class_weight(weight: torch.Tensor | None, labels: torch.Tensor | None, B: int, D: int) -> torch.Tensor:
    """Weight W^T y of each example's class, (B, D)."""
    if weight is None or labels is None:
        raise ValueError("attention by 'cam' needs the classifier's weight (C, D) and labels (B,) or (B, C)")
    if weight.ndim != 2 or weight.shape[1] != D or labels.shape not in ((B,), (B, weight.shape[0])):
        raise ValueError(
            f'for features of {B} examples and {D} channels, weight must be (C, {D}) and labels ({B},) or ({B}, C), '
            f'got {tuple(weight.shape)} and {tuple(labels.shape)}')
    if labels.ndim == 1:
        return weight[labels]
    weight = at_least_fp32(weight)
    return labels.to(weight.dtype) @ weight
