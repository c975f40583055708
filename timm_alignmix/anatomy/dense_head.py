"""Head of a model as a function of one position.

Shape suffixes: B batch, C classes, D channels, R spatial positions.
"""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .layers import Layout, feature_map

NORMS = (nn.modules.batchnorm._BatchNorm,)
DROPOUTS = (nn.modules.dropout._DropoutNd,)


@dataclass(frozen=True)
class HeadStep:
    """Module between the pooled vector and the logits, and the shape of its input for one example."""
    module: nn.Module
    shape: tuple[int, ...]


class DenseHead:
    """Head of a model, applied at every position of the output of module `name` instead of once after pooling.

    A BatchNorm in the head normalises positions with the mean and variance of the POOLED batch, as one affine map, and
    leaves its running statistics to the model's own pooled forward. Dropout draws one channel mask per example. Other
    norms and layers after the pooling are applied per position, as [M] defines the dense classifier.
    """

    def __init__(
            self, model: nn.Module, name: str, layout: Layout, branches: list[list[HeadStep]],
            positions: dict[tuple[int, ...], int]) -> None:
        self.name, self.layout = name, layout
        self.exact_mean = False  # whether the mean of dense logits equals the model's logits (affine after pooling)
        self._model, self._branches, self._positions = model, branches, positions

    def positions_at(self, images: torch.Tensor) -> int:
        """Number of positions R for images of this size; a new size takes one clean forward pass."""
        size = tuple(images.shape[1:])
        if size not in self._positions:
            self._positions[size] = self.layout.positions(self.feature_map(images[:1])).shape[2]
        return self._positions[size]

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """Output of the module for clean images, in evaluation mode and without gradient."""
        return feature_map(self._model, self.name, images)

    def __call__(self, feature_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense logits logits_BRC and embeddings embed_BDR of a feature map.

        The logits are the mean over the model's linear heads, the embeddings their inputs, concatenated along D.
        """
        embeds = self._embeddings(feature_map)
        logits = [_apply(branch[-1], embed_BRD) for branch, embed_BRD in zip(self._branches, embeds, strict=True)]
        logits_BRC = logits[0] if len(logits) == 1 else torch.stack(logits).mean(dim=0)
        return logits_BRC, _joined(embeds)

    def embeddings(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Embeddings embed_BDR alone."""
        return _joined(self._embeddings(feature_map))

    def _embeddings(self, feature_map: torch.Tensor) -> list[torch.Tensor]:
        """Inputs (B, R, D) of the linear heads."""
        feat_BRD = self.layout.positions(feature_map).transpose(1, 2)
        return [self._embed(branch[:-1], feat_BRD) for branch in self._branches]

    def weight(self) -> torch.Tensor:
        """Weight (C, D) of the classifier of the embeddings."""
        weights = [branch[-1].module.weight.flatten(1) for branch in self._branches]
        return weights[0] if len(weights) == 1 else torch.cat(weights, dim=1) / len(weights)

    def _embed(self, steps: list[HeadStep], feat_BRD: torch.Tensor) -> torch.Tensor:
        normalised = any(isinstance(step.module, NORMS) for step in steps)
        if normalised:
            # The pooled vector becomes one more position, the one that statistics are computed from.
            feat_BRD = torch.cat([feat_BRD, feat_BRD.mean(dim=1, keepdim=True)], dim=1)
        dropped = False
        for step in steps:
            if isinstance(step.module, NORMS):
                feat_BRD = _norm_like_pooled(step.module, feat_BRD)
            elif isinstance(step.module, DROPOUTS):
                feat_BRD = _drop_channels(feat_BRD, step.module.p, step.module.training)
                dropped = True
            else:
                feat_BRD = _apply(step, feat_BRD)
        if not dropped:
            # ResNet and others call F.dropout(p=model.drop_rate) instead of a module.
            feat_BRD = _drop_channels(feat_BRD, float(getattr(self._model, 'drop_rate', 0.0)), self._model.training)
        return feat_BRD[:, :-1] if normalised else feat_BRD


def _joined(embeds: list[torch.Tensor]) -> torch.Tensor:
    return (embeds[0] if len(embeds) == 1 else torch.cat(embeds, dim=2)).transpose(1, 2)


def _apply(step: HeadStep, feat_BRD: torch.Tensor) -> torch.Tensor:
    B, R, _ = feat_BRD.shape
    if isinstance(step.module, (nn.Linear, nn.LayerNorm)) and len(step.shape) == 1:
        return step.module(feat_BRD)
    return step.module(feat_BRD.reshape(B * R, *step.shape)).reshape(B, R, -1)


def _drop_channels(feat_BRD: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    if not training or p == 0:
        return feat_BRD
    return feat_BRD * F.dropout(torch.ones_like(feat_BRD[:, :1]), p, training=True)


def _norm_like_pooled(bn: nn.Module, feat_BRD: torch.Tensor) -> torch.Tensor:
    """Apply a BatchNorm as one affine map, with the statistics of the last position, the pooled vector."""
    x = feat_BRD.float() if feat_BRD.dtype != torch.float64 else feat_BRD
    if bn.training or bn.running_mean is None:
        if isinstance(bn, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            mean, var = _global_moments(x[:, -1], bn.process_group)
        else:
            mean, var = x[:, -1].mean(dim=0), x[:, -1].var(dim=0, unbiased=False)
    else:
        mean, var = bn.running_mean, bn.running_var
    scale = torch.rsqrt(var + bn.eps)
    if bn.affine:
        scale = scale * bn.weight
    shift = -mean * scale + (bn.bias if bn.affine else 0)
    return (x * scale + shift).to(feat_BRD.dtype)


def _global_moments(pooled_BD: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over all ranks, differentiable, as in SyncBatchNorm."""
    from torch.distributed.nn.functional import all_reduce

    count = pooled_BD.new_full((1,), len(pooled_BD))
    total = all_reduce(torch.cat([pooled_BD.sum(dim=0), pooled_BD.square().sum(dim=0), count]), group=group)
    mean, square = total[:-1].div(total[-1]).chunk(2)
    return mean, square - mean.square()
