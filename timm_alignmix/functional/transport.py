"""Entropic optimal transport between two feature maps, and the alignment built on it.

AlignMixup: Improving Representations By Interpolating Aligned Features, CVPR 2022, arXiv 2103.15375 [A],
equations (6)-(10) and Algorithm 1.

Shape suffixes: B batch, D channels, R spatial positions (H * W). In cost_BRR and plan_BRR the first R are positions of
`feat_a`, the second R positions of `feat_b`.

Differences from the authors' release: the number of iterations is fixed (the release stops when the batch mean of
sum |du| < 0.1, which costs a device sync an iteration and makes a sample's plan depend on its batch), the cost is
computed without a (B, R, R, D) tensor, and the marginal that is exact at the end can be chosen.
"""
import math

import torch

from ._precision import at_least_fp32, full_precision

# Below this exp() underflows, which takes a CPU 50 times as long and adds nothing to a sum of about 1.
_FLOOR = {torch.float32: -87.0, torch.float64: -700.0}
# Elements of the cost that a CPU processes at a time.
_CPU_CHUNK = 2 ** 19


def _check_pair(feat_a: torch.Tensor, feat_b: torch.Tensor) -> None:
    if feat_a.ndim != 3 or feat_a.shape != feat_b.shape:
        raise ValueError(
            'features must be two (B, D, R) tensors of one shape, got '
            f'{tuple(feat_a.shape)} and {tuple(feat_b.shape)}; flatten the positions of a map with .flatten(2)')


def cost_matrix(feat_a_BDR: torch.Tensor, feat_b_BDR: torch.Tensor) -> torch.Tensor:
    """Squared distances, (B, R, R), in full precision."""
    with full_precision(feat_a_BDR.device):
        a_BDR, b_BDR = at_least_fp32(feat_a_BDR), at_least_fp32(feat_b_BDR)
        # Shifting both maps by one vector keeps the distances. Features after a ReLU all point the same way: without
        # the mean of `a`, most of the cancellation in |a|^2 + |b|^2 - 2ab is gone.
        centre_BD1 = a_BDR.mean(dim=2, keepdim=True)
        a_BDR, b_BDR = a_BDR - centre_BD1, b_BDR - centre_BD1
        norms_BRR = a_BDR.square().sum(1).unsqueeze(2) + b_BDR.square().sum(1).unsqueeze(1)
        return torch.baddbmm(norms_BRR, a_BDR.transpose(1, 2), b_BDR, alpha=-2).clamp_min_(0)


# Custom operators are opaque to torch.compile, which would trace the precision switches and unroll the loop.
# timm_alignmix.kernels adds Triton forms.
transport_cost_op = torch.library.custom_op('timm_alignmix::transport_cost', cost_matrix, mutates_args=())


@transport_cost_op.register_fake
def _(feat_a_BDR, feat_b_BDR):
    B, _, R = feat_a_BDR.shape
    dtype = feat_a_BDR.dtype if feat_a_BDR.dtype == torch.float64 else torch.float32
    return feat_a_BDR.new_empty((B, R, R), dtype=dtype)


def transport_cost(feat_a_BDR: torch.Tensor, feat_b_BDR: torch.Tensor) -> torch.Tensor:
    """Pairwise squared Euclidean cost of [A] equation (6): M_ij = ||a_i - b_j||^2.

    Summed over channels; not normalised, averaged or square-rooted (normalising makes the plan nearly uniform, which is
    another method). No gradient. Memory is that of the result plus two copies of the features.

    Args:
        feat_a_BDR: (B, D, R) features, any float dtype.
        feat_b_BDR: (B, D, R) features, any float dtype.

    Returns:
        (B, R, R) costs, float32 (float64 for float64 input), non-negative.

    Raises:
        ValueError: The shapes differ or are not (B, D, R).

    Example:
        >>> import torch
        >>> transport_cost(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.0, 3.0]]]))
        tensor([[[0., 9.],
                 [4., 1.]]])
    """
    _check_pair(feat_a_BDR, feat_b_BDR)
    return transport_cost_op(feat_a_BDR.detach(), feat_b_BDR.detach())


def plan_matrix(
        cost_BRR: torch.Tensor,
        eps: float,
        iterations: int,
        last: int,
        tolerance: float | None,
) -> torch.Tensor:
    """Transport plan; `last` is the dimension summed in the last half-step: 2 makes rows exact, 1 columns."""
    with full_precision(cost_BRR.device):
        if cost_BRR.device.type != 'cpu' or tolerance is not None:
            return _log_domain_plan(*centred_kernel(cost_BRR, eps, last), eps, iterations, last, tolerance)
        chunk = max(1, _CPU_CHUNK // cost_BRR.shape[1] ** 2)
        parts = [
            _scaled_plan(*centred_kernel(part_BRR, eps, last), iterations, last) for part_BRR in cost_BRR.split(chunk)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def centred_kernel(cost_BRR: torch.Tensor, eps: float, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel -cost / eps without its peak over the dimension summed first, and that peak.

    The potential normalised first absorbs the peak, so the plan is the same; but the entries that matter become small,
    and the rounding error of an exponent is relative to its size. Potentials are in units of eps and marginals are 1
    instead of 1/R: constants that cancel in the last softmax.
    """
    cost_BRR = at_least_fp32(cost_BRR)
    least = cost_BRR.amin(dim=3 - last, keepdim=True)
    return (cost_BRR - least).div_(-eps), least.div(-eps)


def _log_domain_plan(
        kernel_BRR: torch.Tensor,
        first: torch.Tensor,
        eps: float,
        iterations: int,
        last: int,
        tolerance: float | None,
) -> torch.Tensor:
    """Plan by log-sum-exp half-steps; `first` is the potential of the positions that `last` sums over."""
    first_dim = 3 - last
    buffer_BRR = torch.empty_like(kernel_BRR)
    second = torch.zeros_like(first).transpose(1, 2)
    active = None if tolerance is None else first.new_ones((len(first), 1, 1), dtype=torch.bool)
    for _ in range(iterations):
        update = _neg_logsumexp(kernel_BRR, second, first_dim, buffer_BRR)
        if active is None:
            first = update
        else:
            moved = (update - first).abs_().sum(dim=(1, 2), keepdim=True).mul_(eps)
            first = torch.where(active, update, first)
            active = active & (moved >= tolerance)
            # Reading the flag is free on a CPU. Elsewhere it would be a device sync, so the loop runs to its end.
            if active.device.type == 'cpu' and not active.any():
                break
        second = _neg_logsumexp(kernel_BRR, first, last, buffer_BRR)
    return final_softmax(kernel_BRR, first, last)


def _scaled_plan(kernel_BRR: torch.Tensor, first: torch.Tensor, iterations: int, last: int) -> torch.Tensor:
    """Plan by iterations in the log domain and, between them, as many scalings of exp(kernel + potentials) as is safe.

    A scaling half-step is a product with a vector, an order of magnitude cheaper than a log-sum-exp. Sinkhorn's map
    does not expand the largest difference of potentials, so the change of `second` in one iteration bounds all later
    ones: after a change of d, the next limit / d iterations change no potential by more than the limit. Within it,
    entries that underflowed stay negligible and nothing overflows.
    """
    first_dim = 3 - last
    buffer_BRR, scaled_BRR = torch.empty_like(kernel_BRR), None
    second = torch.zeros_like(first).transpose(1, 2)
    floor = _FLOOR[kernel_BRR.dtype]
    limit = -floor / 3
    while iterations > 0:
        first = _neg_logsumexp(kernel_BRR, second, first_dim, buffer_BRR)
        update = _neg_logsumexp(kernel_BRR, first, last, buffer_BRR)
        moved = (update - second).abs_().nan_to_num_(0).max().item()  # NaN stays in its sample
        second = update
        iterations -= 1
        steps = min(iterations, int(limit / max(moved, limit / 1e6)))
        if steps < 2:
            continue
        if scaled_BRR is None:
            scaled_BRR = torch.empty_like(kernel_BRR)
        torch.add(kernel_BRR, first, out=scaled_BRR).add_(second).clamp_min_(floor)
        # Zero what is at the floor: its products would underflow too.
        torch.threshold_(_exp_(scaled_BRR), 2 * math.exp(floor), 0.0)
        factor_second = torch.ones_like(second)
        for _ in range(steps):
            factor_first = _sums_of(scaled_BRR, factor_second).reciprocal_()
            factor_second = _sums_of(scaled_BRR, factor_first).reciprocal_()
        first, second = first + factor_first.log_(), second + factor_second.log_()
        iterations -= steps
    return final_softmax(kernel_BRR, first, last)


def final_softmax(kernel_BRR: torch.Tensor, first: torch.Tensor, last: int) -> torch.Tensor:
    """Plan from the potential that the last half-step sees; overwrites the kernel.

    Unlike exp(first + second + kernel), the final marginal is exact at any magnitude of the cost.
    """
    return torch.softmax(kernel_BRR.add_(first), dim=last).div_(kernel_BRR.shape[1])


def _neg_logsumexp(
        kernel_BRR: torch.Tensor, potential: torch.Tensor, dim: int, buffer_BRR: torch.Tensor) -> torch.Tensor:
    torch.add(kernel_BRR, potential, out=buffer_BRR)
    peak = buffer_BRR.amax(dim=dim, keepdim=True)
    exp = _exp_(buffer_BRR.sub_(peak).clamp_min_(_FLOOR[buffer_BRR.dtype]))
    return exp.sum(dim=dim, keepdim=True).log_().add_(peak).neg_()


def _exp_(x: torch.Tensor) -> torch.Tensor:
    """Exponential in place; on CPUs torch.exp2 takes a third of torch.exp's time."""
    return x.mul_(math.log2(math.e)).exp2_() if x.device.type == 'cpu' else x.exp_()


def _sums_of(scaled_BRR: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Sums of rows (B, R, 1) for factors of columns (B, 1, R), or of columns (B, 1, R) for factors (B, R, 1)."""
    if factors.shape[1] == 1:
        return torch.bmm(scaled_BRR, factors.transpose(1, 2))
    return torch.bmm(factors.transpose(1, 2), scaled_BRR)


sinkhorn_plan_op = torch.library.custom_op('timm_alignmix::sinkhorn_plan', plan_matrix, mutates_args=())


@sinkhorn_plan_op.register_fake
def _(cost_BRR, eps, iterations, last, tolerance):
    return torch.empty_like(cost_BRR, dtype=cost_BRR.dtype if cost_BRR.dtype == torch.float64 else torch.float32)


def sinkhorn_plan(
        cost_BRR: torch.Tensor,
        eps: float = 0.1,
        iterations: int = 100,
        final_marginal: str = 'rows',
        tolerance: float | None = None,
) -> torch.Tensor:
    """Entropic transport plan between uniform marginals 1/R, [A] equations (7) and (8), stable at any cost.

    No gradient, and no device sync on GPUs. In float32 the relative error of an entry is at most about
    (cost / eps) * 2**-24, from the rounding of exponents; the marginal normalised last is exact to rounding.

    Args:
        cost_BRR: (B, R, R) costs.
        eps: Entropy coefficient, in the unit of the cost.
        iterations: Sinkhorn-Knopp iterations, each normalising both sides once. 0 is a single softmax of -cost / eps
            over the side named by `final_marginal` ([A] Table 10, first row).
        final_marginal: Side normalised last and hence exact, 'rows' or 'columns'. The other is exact at convergence.
        tolerance: Stop a sample when sum |du| < tolerance, u its first potential in the unit of the cost. The authors'
            release does so with 0.1 and the mean over the batch.

    Returns:
        (B, R, R) plan of total mass 1 per sample, float32 (float64 for float64 input).

    Raises:
        ValueError: The cost is not (B, R, R), or an option is out of range.

    Example:
        >>> import torch
        >>> sinkhorn_plan(torch.tensor([[[0.0, 9.0], [4.0, 1.0]]]), eps=4.0)
        tensor([[[0.4088, 0.0912],
                 [0.0912, 0.4088]]])
    """
    if cost_BRR.ndim != 3 or cost_BRR.shape[1] != cost_BRR.shape[2]:
        raise ValueError(f'cost must be (B, R, R), got {tuple(cost_BRR.shape)}')
    if final_marginal not in ('rows', 'columns'):
        raise ValueError(f"final_marginal must be 'rows' or 'columns', got {final_marginal!r}")
    if eps <= 0 or iterations < 0:
        raise ValueError(f'eps must be > 0 and iterations >= 0, got eps={eps} and iterations={iterations}')
    return sinkhorn_plan_op(cost_BRR.detach(), float(eps), iterations, 2 if final_marginal == 'rows' else 1, tolerance)


def align_to(
        kept_BDR: torch.Tensor,
        moved_BDR: torch.Tensor,
        eps: float = 0.1,
        iterations: int = 100,
        final_marginal: str = 'kept',
        tolerance: float | None = None,
) -> torch.Tensor:
    """Transport features of `moved` to the positions of `kept`: [A] equation (9) for (A, A'), (10) for (A', A).

    The plan is detached ([A] Algorithm 1, line 21): gradients reach `moved` through the product alone.

    Args:
        kept_BDR: (B, D, R) features whose positions stay.
        moved_BDR: (B, D, R) features to bring to those positions.
        eps: Entropy coefficient of the plan.
        iterations: Sinkhorn iterations.
        final_marginal: Side normalised last. 'kept' makes every aligned feature a convex combination of features of
            `moved`; 'moved' conserves the mass of `moved` instead.
        tolerance: As in :func:`sinkhorn_plan`.

    Returns:
        (B, D, R) aligned features, in the dtype of `moved_BDR`.

    Raises:
        ValueError: Shapes differ, or an option is out of range.

    Example:
        >>> import torch
        >>> a_BDR = torch.tensor([[[0.0, 5.0, 9.0]]])
        >>> align_to(a_BDR, a_BDR.flip(2) + 1.0)
        tensor([[[ 1.,  6., 10.]]])
    """
    if final_marginal not in ('kept', 'moved'):
        raise ValueError(f"final_marginal must be 'kept' or 'moved', got {final_marginal!r}")
    side = 'rows' if final_marginal == 'kept' else 'columns'
    return _move(moved_BDR, sinkhorn_plan(transport_cost(kept_BDR, moved_BDR), eps, iterations, side, tolerance))


def _move(feat_BDR: torch.Tensor, plan_BRR: torch.Tensor) -> torch.Tensor:
    """Features of the plan's columns at the positions of its rows, in the memory layout and dtype of the features.

    The product runs in autocast's type where autocast is on: a float32 residual stream is no reason for a float32
    product.
    """
    # Matrix R of the paper, the number of positions times P: rows sum to 1, which keeps the scale of features.
    rows_BRR = (plan_BRR * plan_BRR.shape[1]).to(feat_BDR.dtype)
    if feat_BDR.stride(1) == 1:  # channels innermost: token and channels-last layouts
        moved_BDR = torch.matmul(rows_BRR, feat_BDR.transpose(1, 2)).transpose(1, 2)
    else:
        moved_BDR = torch.matmul(feat_BDR, rows_BRR.transpose(1, 2))
    return moved_BDR.to(feat_BDR.dtype)


def align(
        feat_a_BDR: torch.Tensor,
        feat_b_BDR: torch.Tensor,
        eps: float = 0.1,
        iterations: int = 100,
        final_marginal: str = 'kept',
        tolerance: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both alignments of two feature maps, [A] equations (9) and (10): A~ = A' R^T and A~' = A R.

    Args:
        feat_a_BDR: (B, D, R) features A.
        feat_b_BDR: (B, D, R) features A'.
        eps: Entropy coefficient of the plan.
        iterations: Sinkhorn iterations.
        final_marginal: 'kept' (each result uses the plan whose kept side is exact), or 'columns' / 'rows': one plan for
            both, normalised last over that side. 'columns' is the authors' release.
        tolerance: As in :func:`sinkhorn_plan`.

    Returns:
        A~, the features of A' at the positions of A, and A~', those of A at the positions of A'; both (B, D, R).

    Raises:
        ValueError: Shapes differ, or an option is out of range.

    Example:
        >>> import torch
        >>> align(torch.tensor([[[0.0, 5.0, 9.0]]]), torch.tensor([[[10.0, 6.0, 1.0]]]))
        (tensor([[[ 1.,  6., 10.]]]), tensor([[[9., 5., 0.]]]))
    """
    if final_marginal not in ('kept', 'columns', 'rows'):
        raise ValueError(f"final_marginal must be 'kept', 'columns' or 'rows', got {final_marginal!r}")
    cost_BRR = transport_cost(feat_a_BDR, feat_b_BDR)
    side_a, side_b = ('rows', 'columns') if final_marginal == 'kept' else (final_marginal,) * 2
    plan_a_BRR = sinkhorn_plan(cost_BRR, eps, iterations, side_a, tolerance)
    plan_b_BRR = plan_a_BRR if side_b == side_a else sinkhorn_plan(cost_BRR, eps, iterations, side_b, tolerance)
    return _move(feat_b_BDR, plan_a_BRR), _move(feat_a_BDR, plan_b_BRR.transpose(1, 2))
