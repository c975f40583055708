"""Loss of Dense MultiMix and its gradient by the kernels of mixed logits, arXiv 2311.05538, equations (10)-(14).

Shape suffixes: B batch, C classes, N generated examples, R positions.
"""
import torch

from ..functional.losses import GRAD_SCALE, attended_positions, subtract_target_gradient, target_logits
from .mixed_logits import mixed_logsumexp, pair_sums, softmax_sums


def loss_and_grads(
        logits_BRC: torch.Tensor, target: torch.Tensor, weights_RNB: torch.Tensor, attention_BR: torch.Tensor | None,
        smoothing: float, logits_grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton form of the function in functional/losses.py, without the attention's gradient, which is empty.

    Targets enter through the second moments P = M^T diag(share) M of the vectors alone: the loss of a position is
    sum_k share_k logsumexp_k - <Y^T L, P>, and the targets' part of its gradient is P Y.
    """
    R, N, _ = weights_RNB.shape
    logits_BRC = logits_BRC if logits_BRC.stride(2) == 1 else logits_BRC.contiguous()
    weights_RNB = weights_RNB.contiguous()
    scale: float | torch.Tensor = 1 / R
    if attention_BR is not None:
        attention_BR = attention_BR.float()
        scale = 1 / attended_positions(attention_BR)
        # Attention may be as small as the dtype allows; only ratios within a position matter.
        peak_1R = attention_BR.amax(dim=0, keepdim=True)
        attention_BR = (attention_BR / torch.where(peak_1R > 0, peak_1R, 1)).contiguous()
    lse_RN, sums_RN = mixed_logsumexp(logits_BRC, weights_RNB, attention_BR)
    total_R1 = sums_RN.sum(dim=1, keepdim=True)
    share_RN = sums_RN * (scale / torch.where(total_R1 > 0, total_R1, 1))
    pairs_RBB = pair_sums(logits_BRC, weights_RNB, attention_BR, sums_RN, share_RN)

    target = target.float() if target.is_floating_point() else target.long()
    # Labels only pick logits, in any dtype; products need float32.
    dots_RBB = target_logits(
        (logits_BRC.float() if target.is_floating_point() else logits_BRC).transpose(0, 1), target, smoothing)
    loss = (share_RN * lse_RN).sum() - (dots_RBB * pairs_RBB).sum()
    empty = pairs_RBB.new_empty(0)
    if not logits_grad:
        return loss, empty, empty.clone()
    grad_BRC = softmax_sums(logits_BRC, weights_RNB, attention_BR, sums_RN, lse_RN, share_RN)
    subtract_target_gradient(grad_BRC.transpose(0, 1), pairs_RBB, target, smoothing)
    return loss, grad_BRC.mul_(GRAD_SCALE).to(logits_BRC.dtype), empty
