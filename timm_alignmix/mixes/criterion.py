"""What the methods need to know about a training criterion."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from ..functional import BinaryCrossEntropy, soft_target, soft_target_cross_entropy


@dataclass(frozen=True)
class Criterion:
    """A loss of (logits, soft targets), and the closed form of its mean over mixed embeddings, if it has one.

    Attributes:
        loss: The criterion itself.
        softmax: It is softmax cross-entropy, which is computed in float32 or better.
        binary: The closed form of binary cross-entropy, if it is that.
        smoothing: Label smoothing: of all targets for softmax cross-entropy, else of classes alone, as in
            timm.data.Mixup.
        dense_smoothing: Smoothing towards 1/2, which the criterion applies to rows of targets by itself.

    Example:
        >>> criterion = Criterion.of(torch.nn.BCEWithLogitsLoss())
        >>> logits_BC = torch.zeros(1, 2)
        >>> criterion(logits_BC, criterion.soft_target(torch.tensor([1]), logits_BC))
        tensor(0.6931)
    """
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    softmax: bool
    binary: BinaryCrossEntropy | None
    smoothing: float
    dense_smoothing: float

    @classmethod
    def of(cls, loss: Any) -> 'Criterion':
        """Recognise timm's and torch's cross-entropies; any other callable is taken as it is."""
        smoothing = _softmax_smoothing(loss)
        if smoothing is not None:
            return cls(loss, True, None, smoothing, 0.0)
        smoothing = getattr(loss, 'smoothing', None) or getattr(loss, 'label_smoothing', None) or 0.0
        if isinstance(loss, nn.CrossEntropyLoss):  # smooths rows as it does classes
            return cls(loss, False, None, 0.0, 0.0)
        if getattr(loss, 'smooth_dense', False):
            return cls(loss, False, _binary(loss), 0.0, smoothing)
        return cls(loss, False, _binary(loss), smoothing, 0.0)

    @property
    def closed_form(self) -> bool:
        return self.softmax or self.binary is not None

    def __call__(self, logits: torch.Tensor, target_BC: torch.Tensor) -> torch.Tensor:
        return soft_target_cross_entropy(logits, target_BC) if self.softmax else self.loss(logits, target_BC)

    def soft_target(self, target: torch.Tensor, logits_BC: torch.Tensor) -> torch.Tensor:
        """Targets to mix and to call the criterion with, (B, C) float32 (float64 for float64 logits)."""
        dtype = torch.promote_types(logits_BC.dtype, torch.float32)
        return soft_target(target, logits_BC.shape[1], self._smoothing_of(target), dtype)

    def closed_form_target(self, target: torch.Tensor, logits_BC: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Targets, and their label smoothing, for a closed form."""
        if self.dense_smoothing:
            target_BC = self.soft_target(target, logits_BC)
            return target_BC * (1 - self.dense_smoothing) + self.dense_smoothing / 2, 0.0
        return target, self._smoothing_of(target)

    def _smoothing_of(self, target: torch.Tensor) -> float:
        return self.smoothing if self.softmax or target.ndim == 1 else 0.0


def _is(loss: Any, cls: type[nn.Module]) -> bool:
    """Check for a class; its subclasses often compute another loss, such as the focal loss."""
    return isinstance(loss, cls) and type(loss).forward is cls.forward


def _softmax_smoothing(loss: Any) -> float | None:
    """Label smoothing of a plain softmax cross-entropy; None for any other criterion."""
    if _is(loss, LabelSmoothingCrossEntropy):
        return loss.smoothing
    if _is(loss, SoftTargetCrossEntropy):
        return 0.0
    plain = _is(loss, nn.CrossEntropyLoss) and loss.weight is None and loss.reduction == 'mean'
    return loss.label_smoothing if plain and not ignores(loss) else None


def _binary(loss: Any) -> BinaryCrossEntropy | None:
    """Closed form of a mean over examples of binary cross-entropies; None for any other criterion."""
    if _is(loss, TimmBinaryCrossEntropy) and (loss.sum_classes or loss.reduction == 'mean'):
        return BinaryCrossEntropy(loss.weight, loss.pos_weight, loss.target_threshold, loss.sum_classes)
    if _is(loss, nn.BCEWithLogitsLoss) and loss.reduction == 'mean':
        return BinaryCrossEntropy(loss.weight, loss.pos_weight)
    return None


def ignores(loss: Any) -> bool:
    """Check for an ignore_index of its own; the default of -100 is no class of a data set."""
    return getattr(loss, 'ignore_index', -100) != -100
