"""Predictions of a model for all labelled images, shared by accuracy, calibration and OOD detection."""
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Predictions:
    """Predictions for N images, in dataset order; probabilities in float64."""
    label: np.ndarray  # (N,) true class
    prediction: np.ndarray  # (N,) most probable class
    confidence: np.ndarray  # (N,) its probability
    rank: np.ndarray  # (N,) number of classes that are more probable than the true one; ties go to the lower index
    nll: np.ndarray  # (N,) negative log-probability of the true class, in nats
    brier: np.ndarray  # (N,) sum over classes of (probability - 1[true class])^2

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool, whether the prediction is right."""
        return self.prediction == self.label

    def top(self, k: int) -> float:
        """Percentage of images whose true class is among the k most probable ones."""
        return 100 * float(np.mean(self.rank < k))


def summarize(logits: torch.Tensor, labels: torch.Tensor, where: str) -> dict[str, torch.Tensor]:
    """Compute the entries of `Predictions` from logits (B, C) and labels (B,); `where` names the model in errors.

    Raises:
        ValueError: Logits that are not finite.
    """
    logits, labels = logits.cpu().double(), labels.cpu()
    check_finite(logits, where)
    log_probs = logits.log_softmax(dim=1)
    probs = log_probs.exp()
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1]) < labels[:, None]
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[1])
    return {
        'label': labels,
        'prediction': logits.argmax(dim=1),
        'confidence': probs.amax(dim=1),
        'rank': ((logits > own) | ((logits == own) & earlier)).sum(dim=1),
        'nll': -log_probs.gather(1, labels[:, None])[:, 0],
        'brier': (probs - one_hot).square().sum(dim=1),
    }


def check_finite(logits: torch.Tensor, where: str) -> None:
    """Check logits or embeddings, and raise ValueError if some are NaN or infinite."""
    bad = (~logits.isfinite()).any(dim=1).sum().item()
    if bad:
        raise ValueError(
            f'{where}: the output for {bad} of {len(logits)} images is not finite; did the training run diverge, or '
            'does --amp-dtype float16 overflow?')
