"""Cross-entropy of mixed embeddings in closed form: MultiMix and Dense MultiMix, arXiv 2311.05538 [M].

The classifier is affine and an interpolation vector m sums to 1, so W (Z m) + b = (W Z + b) m: logits are computed once
for each clean location and mixed afterwards. Neither mixed embeddings nor mixed targets are ever formed:

    CE_k = logsumexp_c(L m_k) - m_k^T (Y^T L) m_k,    L = W Z + b of one position, Y the targets.

The loss and its gradient with respect to L come from one pass over chunks of positions, so the extra memory is one
chunk of (N, C) mixed logits instead of (R, N, C) kept for the backward pass.

Shape suffixes: B batch, C classes, N generated examples, R spatial positions. _RBC etc. as stored inside a chunk.
"""
import math

import torch
import torch.nn.functional as F

from ._precision import at_least_fp32, full_precision

# Elements of one chunk of mixed logits: in reach of a CPU's cache, and enough to fill a GPU.
_CHUNK_ELEMENTS = {'cpu': 2 ** 20, 'cuda': 2 ** 25}


def soft_target(
        target: torch.Tensor,
        num_classes: int,
        smoothing: float = 0.0,
        dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Targets as (B, C) probabilities, smoothed by timm's convention: s / C everywhere plus 1 - s on the target.

    Args:
        target: (B,) integer classes, or (B, C) probabilities.
        num_classes: C.
        smoothing: Label smoothing s in [0, 1).
        dtype: Of the result, unless the targets are float64.

    Returns:
        (B, C).

    Raises:
        ValueError: Wrong shape, or rows that do not sum to 1 (checked on the CPU only: a check elsewhere would wait for
            the device).
    """
    check_target(target, len(target), num_classes)
    target = F.one_hot(target.long(), num_classes) if target.ndim == 1 else target
    target = target.to(torch.float64 if target.dtype == torch.float64 else dtype)
    return target if smoothing == 0 else target * (1 - smoothing) + smoothing / num_classes


def check_target(target: torch.Tensor, batch: int, num_classes: int) -> None:
    """Raise ValueError unless `target` is (batch,) integers or (batch, num_classes) probabilities."""
    hard = target.shape == (batch,) and not target.is_floating_point()
    soft = target.shape == (batch, num_classes) and target.is_floating_point()
    if not hard and not soft:
        raise ValueError(
            f'target must be ({batch},) integers or ({batch}, {num_classes}) probabilities, '
            f'got {tuple(target.shape)} of {target.dtype}')
    if soft and target.device.type == 'cpu' and not torch.compiler.is_compiling():
        off = (target.float().sum(dim=1) - 1).abs().max()
        # bf16 probabilities of 1000 classes sum to 1 within about 2**-8.
        if off > 0.01:
            raise ValueError(
                f'targets must be probabilities that sum to 1, a row is off by {off:.3g}: the loss is softmax '
                'cross-entropy; multi-label targets need another criterion and mix none, mixup, cutmix, manifold or '
                'alignmix')


def soft_target_cross_entropy(logits_BC: torch.Tensor, target_BC: torch.Tensor) -> torch.Tensor:
    """Mean over examples of -sum_c y log softmax(logits), at least in float32.

    Args:
        logits_BC: (B, C) logits, any float dtype.
        target_BC: (B, C) probabilities.

    Returns:
        Scalar loss.
    """
    with torch.autocast(logits_BC.device.type, enabled=False):
        return F.cross_entropy(at_least_fp32(logits_BC), target_BC.to(at_least_fp32(logits_BC).dtype))


def multimix_loss(
        logits_BC: torch.Tensor,
        target: torch.Tensor,
        weights_NB: torch.Tensor,
        smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of N mixed embeddings, averaged over N: [M] equations (6)-(8).

    Args:
        logits_BC: (B, C) clean logits, affine in the embedding that is mixed.
        target: (B,) integer classes, or (B, C) probabilities.
        weights_NB: (N, B) interpolation vectors, rows summing to 1.
        smoothing: Label smoothing, timm's convention.

    Returns:
        Scalar loss, float32 (float64 for float64 logits). Differentiable once, with respect to `logits_BC`.

    Raises:
        ValueError: Shapes do not fit, or targets do not sum to 1.

    Example:
        >>> import torch
        >>> logits_BC = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> multimix_loss(logits_BC, torch.tensor([0, 1]), torch.eye(2))  # one-hot weights: the clean loss
        tensor(0.2201)
    """
    if logits_BC.ndim != 2 or weights_NB.ndim != 2:
        raise ValueError(
            f'logits must be (B, C) and weights (N, B), got {tuple(logits_BC.shape)} and {tuple(weights_NB.shape)}')
    return dense_multimix_loss(logits_BC.unsqueeze(1), target, weights_NB.unsqueeze(0), smoothing=smoothing)


def dense_multimix_loss(
        logits_BRC: torch.Tensor,
        target: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None = None,
        smoothing: float = 0.0,
        attention_grad: bool = False,
        chunk_size: int | None = None,
) -> torch.Tensor:
    """Attention-weighted cross-entropy of N mixed embeddings at each position: [M] equations (10)-(14).

    For a position with attention a: M = diag(a) Lambda, s its sums over the batch, M^ = M / s, and the loss of the
    position is sum_k s_k CE_k / sum_k s_k. The result is the mean over positions that have any attention. A vector or a
    position without attention contributes 0, in value and in gradient. Attention need not be normalised.

    Args:
        logits_BRC: (B, R, C) clean logits of each position, affine in the embedding that is mixed.
        target: (B,) integer classes, or (B, C) probabilities.
        weights_RNB: (R, N, B) interpolation vectors, the last dimension summing to 1.
        attention_BR: (B, R), non-negative; None weighs every example and position alike.
        smoothing: Label smoothing, timm's convention.
        attention_grad: Let gradients reach the attention, a confidence otherwise.
        chunk_size: Positions processed at a time; None chooses by device.

    Returns:
        Scalar loss, float32 (float64 for float64 logits). Differentiable once.

    Raises:
        ValueError: Shapes do not fit, or targets do not sum to 1.
    """
    if logits_BRC.ndim != 3 or weights_RNB.ndim != 3:
        raise ValueError(
            f'logits must be (B, R, C) and weights (R, N, B), got {tuple(logits_BRC.shape)} and '
            f'{tuple(weights_RNB.shape)}')
    B, R, C = logits_BRC.shape
    N = weights_RNB.shape[1]
    if weights_RNB.shape != (R, N, B):
        raise ValueError(
            f'for logits (B={B}, R={R}, C={C}) weights must be ({R}, N, {B}), got {tuple(weights_RNB.shape)}')
    if attention_BR is not None and attention_BR.shape != (B, R):
        raise ValueError(
            f'for logits (B={B}, R={R}, C={C}) attention must be ({B}, {R}), got {tuple(attention_BR.shape)}')
    check_target(target, B, C)
    if not attention_grad and attention_BR is not None:
        attention_BR = attention_BR.detach()
    if chunk_size is None:
        chunk_size = max(1, _CHUNK_ELEMENTS.get(logits_BRC.device.type, 2 ** 25) // (N * C))
    return _DenseMultiMixLoss.apply(logits_BRC, target, weights_RNB, attention_BR, smoothing, chunk_size)


def dense_multimix_rows(
        logits_BRC: torch.Tensor,
        target: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None = None,
        smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of :func:`dense_multimix_loss` as rows for a plain soft-target cross-entropy, at the full memory.

    Args: as :func:`dense_multimix_loss`; the attention keeps its gradient.

    Returns:
        Mixed logits (R * N, C) and scaled targets (R * N, C): the mean over rows of -sum_c target log softmax(logits)
        is equation (14) averaged over positions with attention.
    """
    R, N, _ = weights_RNB.shape
    logits_RBC = at_least_fp32(logits_BRC).transpose(0, 1)
    target_BC = soft_target(target, logits_RBC.shape[2], smoothing, logits_RBC.dtype).to(logits_RBC.dtype)
    attended = R
    if attention_BR is not None:
        attention_BR = attention_BR.to(logits_RBC.dtype)
        attended = attended_positions(attention_BR).to(logits_RBC.dtype)
    mixed_RNB, share_RN, _ = _mixing(weights_RNB.to(logits_RBC.dtype), attention_BR)
    scale_RN1 = (share_RN * (R * N / attended)).unsqueeze(2)
    with torch.autocast(logits_RBC.device.type, enabled=False):
        return (mixed_RNB @ logits_RBC).flatten(0, 1), (mixed_RNB @ target_BC * scale_RN1).flatten(0, 1)


class _DenseMultiMixLoss(torch.autograd.Function):
    """Loss and gradients in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, logits_BRC, target, weights_RNB, attention_BR, smoothing, chunk_size):
        logits_grad = ctx.needs_input_grad[0]
        attention_grad = attention_BR is not None and ctx.needs_input_grad[3]
        loss, *grads = dense_loss_op(
            logits_BRC.detach(), target, weights_RNB, None if attention_BR is None else attention_BR.detach(),
            smoothing, chunk_size, logits_grad, attention_grad)
        ctx.save_for_backward(*grads)
        ctx.dtypes = logits_BRC.dtype, None if attention_BR is None else attention_BR.dtype
        ctx.wants = logits_grad, attention_grad
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        # Kept in float32 and scaled before the cast, so that a loss scaler protects half-precision logits.
        grads = [
            (grad * grad_loss).to(dtype) if wanted else None
            for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
        ]
        return grads[0], None, None, grads[1], None, None


def loss_and_grads(
        logits_BRC: torch.Tensor,
        target: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None,
        smoothing: float,
        chunk_size: int,
        logits_grad: bool,
        attention_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, d(loss)/d(logits) and d(loss)/d(attention); a gradient that is not wanted is an empty tensor."""
    dtype = at_least_fp32(logits_BRC).dtype
    B, R, C = logits_BRC.shape
    N = weights_RNB.shape[1]
    losses_R = logits_BRC.new_zeros(R, dtype=dtype)
    grad_BRC = logits_BRC.new_empty((B, R, C) if logits_grad else (0,), dtype=dtype)
    grad_BR = logits_BRC.new_empty((B, R) if attention_grad else (0,), dtype=dtype)
    scale = 1 / R
    if attention_BR is not None:
        attention_BR = attention_BR.to(dtype)
        scale = 1 / attended_positions(attention_BR).to(dtype)
    target = target.to(dtype if target.is_floating_point() else torch.int64)
    # What is smaller than mixed logits is made for several chunks at once, up to a quarter of the size of one of those.
    block = chunk_size * max(1, min(N, C) // (4 * B))
    with full_precision(logits_BRC.device):
        for start in range(0, R, block):
            here = slice(start, min(start + block, R))
            logits_RBC = logits_BRC[:, here].transpose(0, 1).to(dtype)
            weights_rNB = weights_RNB[here].to(dtype)
            mixed_RNB, share_RN, total_R1 = _mixing(
                weights_rNB, None if attention_BR is None else attention_BR[:, here])
            shared_RNB = mixed_RNB * share_RN.unsqueeze(2)
            pairs_RBB = shared_RNB.transpose(1, 2) @ mixed_RNB
            dots_RBB = target_logits(logits_RBC, target, smoothing)
            lse_RN, sums_RBC, means_RNB = _mixed_softmax(
                logits_RBC, mixed_RNB, shared_RNB, chunk_size, logits_grad, attention_grad)
            losses_R[here] = (share_RN * lse_RN).sum(dim=1) - (dots_RBB * pairs_RBB).sum(dim=(1, 2))
            if attention_grad:
                grad_BR[:, here] = _attention_gradient(
                    dots_RBB, weights_rNB, mixed_RNB, share_RN, total_R1, lse_RN, means_RNB, losses_R[here],
                ).mul_(scale).t()
            if logits_grad:
                grad_RBC = subtract_target_gradient(sums_RBC, pairs_RBB, target, smoothing)
                torch.mul(grad_RBC.transpose(0, 1), scale, out=grad_BRC[:, here])
    return losses_R.sum() * scale, grad_BRC, grad_BR


# Opaque to torch.compile. timm_alignmix.kernels gives it another form on GPUs.
dense_loss_op = torch.library.custom_op(
    'timm_alignmix::dense_multimix_loss_and_grads', loss_and_grads, mutates_args=())


@dense_loss_op.register_fake
def _(logits_BRC, target, weights_RNB, attention_BR, smoothing, chunk_size, logits_grad, attention_grad):
    B, R, C = logits_BRC.shape
    dtype = logits_BRC.dtype if logits_BRC.dtype == torch.float64 else torch.float32
    return (
        logits_BRC.new_empty((), dtype=dtype),
        logits_BRC.new_empty((B, R, C) if logits_grad else (0,), dtype=dtype),
        logits_BRC.new_empty((B, R) if attention_grad else (0,), dtype=dtype),
    )


def attended_positions(attention_BR: torch.Tensor) -> torch.Tensor:
    """How many positions have any attention, at least 1."""
    return (attention_BR > 0).any(dim=0).sum().clamp(min=1)


def _mixing(
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised vectors M^ (R, N, B), their shares s / sum(s) (R, N) and sum(s) (R, 1); zeros where s is 0."""
    if attention_BR is None:
        R, N, _ = weights_RNB.shape
        return weights_RNB, weights_RNB.new_full((R, N), 1 / N), weights_RNB.new_full((R, 1), N)
    # Attention of one position may be as small as the dtype allows: scaled by its maximum before it meets the weights.
    attention_RB = attention_BR.t()
    peak_R1 = attention_RB.amax(dim=1, keepdim=True)
    mixed_RNB = weights_RNB * (attention_RB / torch.where(peak_R1 > 0, peak_R1, 1)).unsqueeze(1)
    sums_RN = mixed_RNB.sum(dim=2)
    mixed_RNB = mixed_RNB / torch.where(sums_RN > 0, sums_RN, 1).unsqueeze(2)
    total_R1 = sums_RN.sum(dim=1, keepdim=True)
    return mixed_RNB, sums_RN / torch.where(total_R1 > 0, total_R1, 1), total_R1 * peak_R1


def target_logits(logits_RBC: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """(L^T Y)[j, i] = y_i . L_j of each position: (R, B, B)."""
    if target.is_floating_point():
        dots_RBB = logits_RBC @ target.t()
    else:
        dots_RBB = logits_RBC.index_select(2, target)
    if smoothing:
        dots_RBB = dots_RBB * (1 - smoothing) + logits_RBC.mean(dim=2, keepdim=True) * smoothing
    return dots_RBB


def _mixed_softmax(
        logits_RBC: torch.Tensor,
        mixed_RNB: torch.Tensor,
        shared_RNB: torch.Tensor,
        chunk_size: int,
        want_sums: bool,
        want_means: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What the loss and its gradients need of the mixed logits S = M^ L of each position.

    Passes over (R, N, C) are most of the cost: one buffer is used again and again, exponentials are made in place, and
    what uses them divides something smaller by their sums. They are powers of two, which processors make faster than
    those of e; the clean logits take up the factor.

    Returns:
        lse_RN, the logsumexp over classes; (shared^T softmax(S)) (R, B, C); softmax(S) L^T (R, N, B).
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


def _common_shift(logits_RBC: torch.Tensor) -> torch.Tensor | None:
    """What can be subtracted from all logits of a position in place of each mixture's peak; None: nothing, or unknown.

    Mixtures lie between the least and the largest logit. Where these are close enough for no exponential to underflow,
    subtracting the largest before mixing saves two passes over the mixtures. Only a CPU tells without a wait.
    """
    if logits_RBC.device.type != 'cpu':
        return None
    least, most = logits_RBC.amin(dim=(1, 2), keepdim=True), logits_RBC.amax(dim=(1, 2), keepdim=True)
    return most if (most - least).max().item() < 60 else None


def subtract_target_gradient(
        grad_RBC: torch.Tensor,
        pairs_RBB: torch.Tensor,
        target: torch.Tensor,
        smoothing: float,
) -> torch.Tensor:
    """Subtract M^T diag(share) M Y from the softmax's part of the gradient in place, given pairs M^T diag(share) M."""
    if smoothing:
        # A row of M sums to 1, so the sum over its second index leaves the vectors' shares.
        grad_RBC.sub_(pairs_RBB.sum(dim=2, keepdim=True) * (smoothing / grad_RBC.shape[2]))
        pairs_RBB = pairs_RBB * (1 - smoothing)
    if target.is_floating_point():
        return grad_RBC.sub_(pairs_RBB @ target)
    return grad_RBC.index_add_(2, target, pairs_RBB, alpha=-1)


def _attention_gradient(
        dots_RBB: torch.Tensor,
        weights_RNB: torch.Tensor,
        mixed_RNB: torch.Tensor,
        share_RN: torch.Tensor,
        total_R1: torch.Tensor,
        lse_RN: torch.Tensor,
        means_RNB: torch.Tensor,
        losses_R: torch.Tensor,
) -> torch.Tensor:
    """d(position's loss) / d(attention), (R, B).

    With u = M before normalisation: d(loss)/du_kb = (CE_k - loss + g_kb - g_k . m_k) / sum(s), g_k = d(CE_k)/d(m_k).
    """
    ce_RN = lse_RN - (mixed_RNB @ dots_RBB).mul_(mixed_RNB).sum(dim=2)
    grad_RNB = means_RNB - mixed_RNB @ (dots_RBB + dots_RBB.transpose(1, 2))
    grad_RNB -= (grad_RNB * mixed_RNB).sum(dim=2, keepdim=True)
    grad_RNB += (ce_RN - losses_R.unsqueeze(1)).unsqueeze(2)
    # A vector without attention is a corner of max(0, .): its gradient is taken as 0, as its value is.
    grad_RNB.mul_((share_RN > 0).unsqueeze(2)).mul_(weights_RNB)
    return grad_RNB.sum(dim=1) / torch.where(total_R1 > 0, total_R1, 1)
