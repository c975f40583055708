"""Cross-entropy of mixed embeddings in closed form: MultiMix and Dense MultiMix, arXiv 2311.05538 [M].

The classifier is affine and an interpolation vector m sums to 1, so W (Z m) + b = (W Z + b) m: logits are computed
once for each clean location and mixed afterwards. Mixed embeddings and mixed targets are never formed:

    CE_k = logsumexp_c(L m_k) - m_k^T (Y^T L) m_k,    L = W Z + b of one position, Y the targets.

Binary cross-entropy is the same with sum_c softplus(L m_k) for the first part, targets not being bound to sum to 1.

One pass over chunks of positions computes the loss and its gradient with respect to L, so the extra memory is one chunk
of (N, C) mixed logits instead of (R, N, C) kept for the backward pass.

Shape suffixes: B batch, C classes, N generated examples, R spatial positions.
"""
from dataclasses import dataclass

import torch

from ._precision import at_least_fp32, full_precision
from .mixed_logits import mixed_sigmoid, mixed_softmax
from .targets import check_target, soft_target

# Elements of one chunk of mixed logits: within a CPU's cache, and enough to fill a GPU.
_CHUNK_ELEMENTS = {'cpu': 2 ** 20, 'cuda': 2 ** 25}

# Gradients wait for the backward pass in the type of the logits, entries being about 1 / (B R). The factor, exact in
# any type, keeps them within float16's range before a loss scaler's factor reaches them.
GRAD_SCALE = 2 ** 12


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy of each class, as timm.loss.BinaryCrossEntropy and torch.nn.BCEWithLogitsLoss have it.

    Args:
        weight: (C,) or (1,) weight of each class.
        pos_weight: (C,) or one weight of the positive part, sigmoid's logarithm times the target.
        target_threshold: Targets above it become 1, others 0, after mixing and smoothing.
        sum_classes: Sum over classes instead of the mean.

    Example:
        >>> import torch
        >>> logits_BC, rows_BC = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        >>> multimix_loss(logits_BC, rows_BC, torch.eye(2), criterion=BinaryCrossEntropy())
        tensor(0.7066)
        >>> torch.nn.BCEWithLogitsLoss()(logits_BC, rows_BC)  # one-hot weights: the clean loss
        tensor(0.7066)
    """
    weight: torch.Tensor | None = None
    pos_weight: torch.Tensor | None = None
    target_threshold: float | None = None
    sum_classes: bool = False

    def class_scale(self, logits: torch.Tensor) -> torch.Tensor:
        """Factor of each class in the sum over classes, (C,).

        Raises:
            ValueError: Weights are not those of the classes.
        """
        C = logits.shape[-1]
        for name in ('weight', 'pos_weight'):
            shape = getattr(getattr(self, name), 'shape', ())
            if shape not in ((), (1,), (C,)):
                raise ValueError(f'{name} must be ({C},) or one number, got {tuple(shape)}')
        scale_C = logits.new_full((C,), 1 if self.sum_classes else 1 / C, dtype=at_least_fp32(logits).dtype)
        return scale_C if self.weight is None else scale_C * self.weight.to(scale_C.dtype)


def multimix_loss(
        logits_BC: torch.Tensor,
        target: torch.Tensor,
        weights_NB: torch.Tensor,
        smoothing: float = 0.0,
        criterion: BinaryCrossEntropy | None = None,
) -> torch.Tensor:
    """Cross-entropy of N mixed embeddings, averaged over N: [M] equations (6)-(8).

    Args:
        logits_BC: (B, C) clean logits, affine in the embedding that is mixed.
        target: (B,) integer classes, or (B, C) probabilities; any rows for binary cross-entropy.
        weights_NB: (N, B) interpolation vectors; rows sum to 1.
        smoothing: Label smoothing, timm's convention.
        criterion: Binary cross-entropy; None is softmax cross-entropy.

    Returns:
        Scalar loss, float32 (float64 for float64 logits). Differentiable once, with respect to `logits_BC`.

    Raises:
        ValueError: Shapes do not fit.

    Example:
        >>> import torch
        >>> logits_BC = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> multimix_loss(logits_BC, torch.tensor([0, 1]), torch.eye(2))  # one-hot weights: the clean loss
        tensor(0.2201)
    """
    if logits_BC.ndim != 2 or weights_NB.ndim != 2:
        raise ValueError(
            f'logits must be (B, C) and weights (N, B), got {tuple(logits_BC.shape)} and {tuple(weights_NB.shape)}')
    return dense_multimix_loss(
        logits_BC.unsqueeze(1), target, weights_NB.unsqueeze(0), smoothing=smoothing, criterion=criterion)


def dense_multimix_loss(
        logits_BRC: torch.Tensor,
        target: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None = None,
        smoothing: float = 0.0,
        attention_grad: bool = False,
        chunk_size: int | None = None,
        criterion: BinaryCrossEntropy | None = None,
) -> torch.Tensor:
    """Attention-weighted cross-entropy of N mixed embeddings at each position: [M] equations (10)-(14).

    At a position with attention a: M = diag(a) Lambda, s the sums of M over the batch, M^ = M / s, and the loss is
    sum_k s_k CE_k / sum_k s_k. The result is the mean over positions that have any attention (the paper leaves this
    reduction open). A vector or a position without attention contributes 0, in value and in gradient.

    Args:
        logits_BRC: (B, R, C) clean logits of each position, affine in the embedding that is mixed.
        target: (B,) integer classes, or (B, C) probabilities; any rows for binary cross-entropy.
        weights_RNB: (R, N, B) interpolation vectors; the last dimension sums to 1.
        attention_BR: (B, R) attention, non-negative, not necessarily normalised; None weighs all alike.
        smoothing: Label smoothing, timm's convention.
        attention_grad: Let gradients reach the attention; the paper leaves this open.
        chunk_size: Positions processed at a time; None chooses by device.
        criterion: Binary cross-entropy; None is softmax cross-entropy.

    Returns:
        Scalar loss, float32 (float64 for float64 logits). Differentiable once.

    Raises:
        ValueError: Shapes do not fit.

    Example:
        >>> import torch
        >>> logits_BRC = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
        >>> eye_RNB = torch.eye(2).expand(2, 2, 2)  # one-hot weights: the clean loss
        >>> attention_BR = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # of the first position alone
        >>> dense_multimix_loss(logits_BRC, torch.tensor([0, 1]), eye_RNB, attention_BR)
        tensor(0.2201)
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
    binary: tuple[torch.Tensor | None, torch.Tensor | None, float | None] = (None, None, None)
    if criterion is not None:
        binary = criterion.class_scale(logits_BRC), criterion.pos_weight, criterion.target_threshold
    return _DenseMultiMixLoss.apply(logits_BRC, target, weights_RNB, attention_BR, smoothing, chunk_size, *binary)


def dense_multimix_rows(
        logits_BRC: torch.Tensor,
        target: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None = None,
        smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose plain soft-target cross-entropy is the loss of :func:`dense_multimix_loss`; takes the full memory.

    Args:
        logits_BRC: (B, R, C) clean logits of each position.
        target: (B,) integer classes, or (B, C) probabilities.
        weights_RNB: (R, N, B) interpolation vectors.
        attention_BR: (B, R) attention, with its gradient; None weighs all alike.
        smoothing: Label smoothing, timm's convention.

    Returns:
        Mixed logits (R * N, C) and scaled targets (R * N, C), float32 (float64 for float64 logits). The loss is the
        mean over rows of -sum_c target log softmax(logits).

    Raises:
        ValueError: Targets of the wrong shape.

    Example:
        >>> import torch
        >>> weights_RNB = torch.tensor([[[0.5, 0.5]]])  # one position, one example midway between two
        >>> dense_multimix_rows(torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([0, 1]), weights_RNB)
        (tensor([[1.0000, 0.5000]]), tensor([[0.5000, 0.5000]]))
    """
    R, N, _ = weights_RNB.shape
    logits_RBC = at_least_fp32(logits_BRC).transpose(0, 1)
    target_BC = soft_target(target, logits_RBC.shape[2], smoothing, logits_RBC.dtype).to(logits_RBC.dtype)
    attended: int | torch.Tensor = R
    if attention_BR is not None:
        attention_BR = attention_BR.to(logits_RBC.dtype)
        attended = attended_positions(attention_BR).to(logits_RBC.dtype)
    mixed_RNB, share_RN, _ = _mixing(weights_RNB.to(logits_RBC.dtype), attention_BR)
    scale_RN1 = (share_RN * (R * N / attended)).unsqueeze(2)
    with torch.autocast(logits_RBC.device.type, enabled=False):
        return (mixed_RNB @ logits_RBC).flatten(0, 1), (mixed_RNB @ target_BC * scale_RN1).flatten(0, 1)


class _DenseMultiMixLoss(torch.autograd.Function):
    """Autograd function that computes loss and gradients in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, logits_BRC, target, weights_RNB, attention_BR, smoothing, chunk_size, *binary):
        logits_grad = ctx.needs_input_grad[0]
        attention_grad = attention_BR is not None and ctx.needs_input_grad[3]
        loss, *grads = dense_loss_op(
            logits_BRC.detach(), target, weights_RNB, None if attention_BR is None else attention_BR.detach(),
            smoothing, chunk_size, logits_grad, attention_grad, *binary)
        ctx.save_for_backward(*grads)
        ctx.dtypes = logits_BRC.dtype, None if attention_BR is None else attention_BR.dtype
        ctx.wants = logits_grad, attention_grad
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        # A vector of one element, unlike a scalar, makes the product float32; only then it is cast.
        factor = (grad_loss / GRAD_SCALE).view(1)
        grads = [
            (grad * factor).to(dtype) if wanted else None
            for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
        ]
        return grads[0], None, None, grads[1], *[None] * 5


def loss_and_grads(
        logits_BRC: torch.Tensor,
        target: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None,
        smoothing: float,
        chunk_size: int,
        logits_grad: bool,
        attention_grad: bool,
        class_scale_C: torch.Tensor | None = None,
        pos_weight: torch.Tensor | None = None,
        threshold: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, d(loss)/d(logits) in their type and d(loss)/d(attention), both times `GRAD_SCALE`.

    A gradient that is not wanted is an empty tensor. With a scale of classes the loss is binary cross-entropy, else
    that of the softmax.
    """
    dtype = at_least_fp32(logits_BRC).dtype
    B, R, C = logits_BRC.shape
    N = weights_RNB.shape[1]
    losses_R = logits_BRC.new_zeros(R, dtype=dtype)
    grad_BRC = logits_BRC.new_empty((B, R, C) if logits_grad else (0,))
    grad_BR = logits_BRC.new_empty((B, R) if attention_grad else (0,), dtype=dtype)
    scale: float | torch.Tensor = 1 / R
    if attention_BR is not None:
        attention_BR = attention_BR.to(dtype)
        scale = 1 / attended_positions(attention_BR).to(dtype)
    target = target.to(dtype if target.is_floating_point() else torch.int64)
    bilinear = pos_weight is None and threshold is None
    target_BC = None if bilinear else soft_target(target, C, smoothing, dtype)
    if pos_weight is not None:
        pos_weight = pos_weight.to(dtype)
    # Tensors smaller than the mixed logits are made for several chunks at once, up to a quarter of a chunk's size.
    block = chunk_size * max(1, min(N, C) // (4 * B))
    with full_precision(logits_BRC.device):
        for start in range(0, R, block):
            here = slice(start, min(start + block, R))
            logits_RBC = logits_BRC[:, here].transpose(0, 1).to(dtype)
            weights_rNB = weights_RNB[here].to(dtype)
            mixed_RNB, share_RN, total_R1 = _mixing(
                weights_rNB, None if attention_BR is None else attention_BR[:, here])
            shared_RNB = mixed_RNB * share_RN.unsqueeze(2)
            if class_scale_C is None:
                sums_RN, grad_RBC, means_RNB = mixed_softmax(
                    logits_RBC, mixed_RNB, shared_RNB, chunk_size, logits_grad, attention_grad)
            else:
                sums_RN, grad_RBC, means_RNB = mixed_sigmoid(
                    logits_RBC, target_BC, mixed_RNB, shared_RNB, class_scale_C, pos_weight, threshold, chunk_size,
                    logits_grad, attention_grad)
            losses_R[here] = (share_RN * sums_RN).sum(dim=1)
            dots_RBB = None
            if bilinear:
                pairs_RBB = shared_RNB.transpose(1, 2) @ mixed_RNB
                dots_RBB = target_logits(
                    logits_RBC if class_scale_C is None else logits_RBC * class_scale_C, target, smoothing)
                losses_R[here] -= (dots_RBB * pairs_RBB).sum(dim=(1, 2))
            if attention_grad:
                grad_BR[:, here] = _attention_gradient(
                    dots_RBB, weights_rNB, mixed_RNB, share_RN, total_R1, sums_RN, means_RNB, losses_R[here],
                ).mul_(GRAD_SCALE * scale).t()
            if logits_grad:
                if bilinear:
                    subtract_target_gradient(grad_RBC, pairs_RBB, target, smoothing)
                if class_scale_C is not None:
                    grad_RBC.mul_(class_scale_C)
                grad_BRC[:, here] = grad_RBC.mul_(GRAD_SCALE * scale).transpose(0, 1)
    return losses_R.sum() * scale, grad_BRC, grad_BR


# Opaque to torch.compile; timm_alignmix.kernels adds a Triton form.
dense_loss_op = torch.library.custom_op(
    'timm_alignmix::dense_multimix_loss_and_grads', loss_and_grads, mutates_args=())


@dense_loss_op.register_fake
def _(logits_BRC, target, weights_RNB, attention_BR, smoothing, chunk_size, logits_grad, attention_grad, *binary):
    B, R, C = logits_BRC.shape
    dtype = logits_BRC.dtype if logits_BRC.dtype == torch.float64 else torch.float32
    return (
        logits_BRC.new_empty((), dtype=dtype),
        logits_BRC.new_empty((B, R, C) if logits_grad else (0,)),
        logits_BRC.new_empty((B, R) if attention_grad else (0,), dtype=dtype),
    )


def attended_positions(attention_BR: torch.Tensor) -> torch.Tensor:
    """Number of positions with any attention, at least 1."""
    return (attention_BR > 0).any(dim=0).sum().clamp(min=1)


def _mixing(
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised vectors M^ (R, N, B), their shares s / sum(s) (R, N) and sum(s) (R, 1); zeros where s is 0."""
    if attention_BR is None:
        R, N, _ = weights_RNB.shape
        return weights_RNB, weights_RNB.new_full((R, N), 1 / N), weights_RNB.new_full((R, 1), N)
    # Attention may be as small as the dtype allows, so it is scaled by its maximum first.
    attention_RB = attention_BR.t()
    peak_R1 = attention_RB.amax(dim=1, keepdim=True)
    mixed_RNB = weights_RNB * (attention_RB / torch.where(peak_R1 > 0, peak_R1, 1)).unsqueeze(1)
    sums_RN = mixed_RNB.sum(dim=2)
    mixed_RNB = mixed_RNB / torch.where(sums_RN > 0, sums_RN, 1).unsqueeze(2)
    total_R1 = sums_RN.sum(dim=1, keepdim=True)
    return mixed_RNB, sums_RN / torch.where(total_R1 > 0, total_R1, 1), total_R1 * peak_R1


def target_logits(logits_RBC: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Products (L^T Y)[j, i] = y_i . L_j at each position, (R, B, B)."""
    if target.is_floating_point():
        dots_RBB = logits_RBC @ target.t()
    else:
        dots_RBB = logits_RBC.index_select(2, target)
    dots_RBB = at_least_fp32(dots_RBB)
    if smoothing:
        mean_RB1 = logits_RBC.mean(dim=2, keepdim=True, dtype=dots_RBB.dtype)
        dots_RBB = dots_RBB * (1 - smoothing) + mean_RB1 * smoothing
    return dots_RBB


def subtract_target_gradient(
        grad_RBC: torch.Tensor,
        pairs_RBB: torch.Tensor,
        target: torch.Tensor,
        smoothing: float,
) -> torch.Tensor:
    """Subtract pairs Y, the part of the targets, from the gradient in place; pairs are M^T diag(share) M."""
    if smoothing:
        # Rows of M sum to 1, so this sum leaves the shares of the vectors.
        grad_RBC.sub_(pairs_RBB.sum(dim=2, keepdim=True) * (smoothing / grad_RBC.shape[2]))
        pairs_RBB = pairs_RBB * (1 - smoothing)
    if target.is_floating_point():
        return grad_RBC.sub_(pairs_RBB @ target)
    return grad_RBC.index_add_(2, target, pairs_RBB, alpha=-1)


def _attention_gradient(
        dots_RBB: torch.Tensor | None, weights_RNB: torch.Tensor, mixed_RNB: torch.Tensor, share_RN: torch.Tensor,
        total_R1: torch.Tensor, sums_RN: torch.Tensor, means_RNB: torch.Tensor, losses_R: torch.Tensor) -> torch.Tensor:
    """Gradient of each position's loss with respect to attention, (R, B).

    With u = M before normalisation: d(loss)/du_kb = (CE_k - loss + g_kb - g_k . m_k) / sum(s), g_k = d(CE_k)/d(m_k).
    """
    losses_RN, grad_RNB = sums_RN, means_RNB
    if dots_RBB is not None:
        losses_RN = sums_RN - (mixed_RNB @ dots_RBB).mul_(mixed_RNB).sum(dim=2)
        grad_RNB = means_RNB - mixed_RNB @ (dots_RBB + dots_RBB.transpose(1, 2))
    grad_RNB -= (grad_RNB * mixed_RNB).sum(dim=2, keepdim=True)
    grad_RNB += (losses_RN - losses_R.unsqueeze(1)).unsqueeze(2)
    # At a vector without attention the loss has a corner: the gradient is taken as 0, like the value.
    grad_RNB.mul_((share_RN > 0).unsqueeze(2)).mul_(weights_RNB)
    return grad_RNB.sum(dim=1) / torch.where(total_R1 > 0, total_R1, 1)
