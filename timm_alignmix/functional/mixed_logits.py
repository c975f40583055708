"""Sums over mixed logits S = M^ L of each position: what a loss in closed form cannot take from the clean logits L.

Chunks of positions share buffers, so (R, N, C) mixed logits are never kept.

Shape suffixes: B batch, C classes, N generated examples, R positions.
"""
import math

import torch


def mixed_softmax(
        logits_RBC: torch.Tensor, mixed_RNB: torch.Tensor, shared_RNB: torch.Tensor, chunk_size: int, want_sums: bool,
        want_means: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Sums over the mixed logits S = M^ L of each position that the loss and its gradients need.

    Passes over (R, N, C) are most of the cost: chunks share one buffer, exponentials are taken in place, and the
    division by their sums is done on smaller tensors. Powers of two are faster than those of e; the clean logits carry
    the factor.

    Returns:
        lse_RN, the logsumexp over classes; shared^T softmax(S), (R, B, C); softmax(S) L^T, (R, N, B).
    """
    R, B, C = logits_RBC.shape
    N = mixed_RNB.shape[1]
    shift_R11 = _common_shift(logits_RBC)
    scaled_RBC = (logits_RBC if shift_R11 is None else logits_RBC - shift_R11) * math.log2(math.e)
    buffer_RNC = scaled_RBC.new_empty(min(chunk_size, R), N, C)
    total_RN1 = scaled_RBC.new_empty(R, N, 1)
    peak_RN1 = torch.empty_like(total_RN1) if shift_R11 is None else mixed_RNB.sum(dim=2, keepdim=True) * shift_R11
    sums_RBC = torch.empty_like(scaled_RBC) if want_sums else None
    means_RNB = torch.empty_like(mixed_RNB) if want_means else None
    for start in range(0, R, chunk_size):
        here = slice(start, min(start + chunk_size, R))
        total = total_RN1[here]
        exps_RNC = torch.bmm(mixed_RNB[here], scaled_RBC[here], out=buffer_RNC[:len(total)])
        if shift_R11 is None:
            peak = exps_RNC.amax(dim=2, keepdim=True)
            exps_RNC.sub_(peak)
            torch.mul(peak, math.log(2), out=peak_RN1[here])
        torch.sum(exps_RNC.exp2_(), dim=2, keepdim=True, out=total)
        if want_sums:
            torch.bmm((shared_RNB[here] / total).transpose(1, 2), exps_RNC, out=sums_RBC[here])
        if want_means:
            torch.bmm(exps_RNC, logits_RBC[here].transpose(1, 2), out=means_RNB[here]).div_(total)
    return (total_RN1.log() + peak_RN1).squeeze(2), sums_RBC, means_RNB


def mixed_sigmoid(
        logits_RBC: torch.Tensor, target_BC: torch.Tensor | None, mixed_RNB: torch.Tensor, shared_RNB: torch.Tensor,
        class_scale_C: torch.Tensor, pos_weight: torch.Tensor | None, threshold: float | None, chunk_size: int,
        want_sums: bool, want_means: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Sums over the mixed logits of each position that binary cross-entropy and its gradients need.

    With w the scale of classes, the loss of a mixture is sum_c w (softplus(S) - T S), T = M^ Y its targets. The second
    part is bilinear and left to the caller, as for softmax, if `target_BC` is None. A threshold or a weight p of
    positives makes it depend on each T, so then it is done here: sum_c w (q softplus(S) - p T S), q = 1 + (p - 1) T.

    Returns:
        The sums over classes, (R, N); shared^T G, (R, B, C), where w G is the derivative with respect to S; the
        derivative with respect to M^, (R, N, B).
    """
    R, _, C = logits_RBC.shape
    N = mixed_RNB.shape[1]
    logits_buffer, loss_buffer = (logits_RBC.new_empty(min(chunk_size, R), N, C) for _ in range(2))
    sums_RN = logits_RBC.new_empty(R, N)
    sums_RBC = torch.empty_like(logits_RBC) if want_sums else None
    means_RNB = torch.empty_like(mixed_RNB) if want_means else None
    for start in range(0, R, chunk_size):
        here = slice(start, min(start + chunk_size, R))
        mixed = mixed_RNB[here]
        logits_RNC = torch.bmm(mixed, logits_RBC[here], out=logits_buffer[:len(mixed)])
        # F.softplus takes no buffer. From 80 on the result is S itself, in float64 too.
        softplus_RNC = torch.ops.aten.softplus.out(logits_RNC, 1, 80, out=loss_buffer[:len(mixed)])
        toward_target_RNC = None
        if target_BC is None:
            torch.matmul(softplus_RNC, class_scale_C, out=sums_RN[here])
            slope_RNC = logits_RNC.sigmoid_()
        else:
            target_RNC = mixed @ target_BC
            if threshold is not None:
                target_RNC = (target_RNC > threshold).to(target_RNC.dtype)
            weight = 1 if pos_weight is None else pos_weight
            positive_RNC = target_RNC * weight
            factor_RNC = target_RNC.neg_().add_(positive_RNC).add_(1)
            slope_RNC = logits_RNC.sigmoid().mul_(factor_RNC).sub_(positive_RNC)
            if want_means and threshold is None:
                toward_target_RNC = softplus_RNC * (weight - 1) - logits_RNC * weight
            losses_RNC = softplus_RNC.mul_(factor_RNC).sub_(logits_RNC.mul_(positive_RNC))
            torch.matmul(losses_RNC, class_scale_C, out=sums_RN[here])
        if want_sums:
            torch.bmm(shared_RNB[here].transpose(1, 2), slope_RNC, out=sums_RBC[here])
        if want_means:
            scaled_RBC = logits_RBC[here] * class_scale_C
            torch.bmm(slope_RNC, scaled_RBC.transpose(1, 2), out=means_RNB[here])
            if toward_target_RNC is not None:
                means_RNB[here] += toward_target_RNC @ (target_BC * class_scale_C).t()
    return sums_RN, sums_RBC, means_RNB


def _common_shift(logits_RBC: torch.Tensor) -> torch.Tensor | None:
    """Largest logit of each position, (R, 1, 1), if it can replace the peak of each mixture; else None.

    Mixtures lie between the least and the largest logit. If these are so close that no exponential underflows,
    subtracting the largest before mixing saves two passes over the mixtures. Checked on CPUs only, where it needs no
    sync.
    """
    if logits_RBC.device.type != 'cpu':
        return None
    least, most = logits_RBC.amin(dim=(1, 2), keepdim=True), logits_RBC.amax(dim=(1, 2), keepdim=True)
    return most if (most - least).max().item() < 60 else None
