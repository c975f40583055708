"""Random interpolation vectors of MultiMix, arXiv 2311.05538 [M], sections 3.2 and 3.3.

Shape suffixes: B batch, N generated examples, R spatial positions.
"""
import math
from typing import Any

import numpy as np
import torch

_BLOCK = 2 ** 17  # variates a CPU works on at a time, in its cache


def convex_weights(
        n: int,
        batch: int,
        alpha: float | tuple[float, float] = (0.5, 2.0),
        m: int | None = None,
        generator: torch.Generator | None = None,
        positions: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Draw interpolation vectors over a mini-batch, [M] sections 3.2 and 3.3: each row symmetric Dir(alpha).

    A scalar alpha is drawn for each row, then the row from Dir(alpha). With `positions`, rows of different positions
    are independent (Dense MultiMix).

    Args:
        n: Number N of rows.
        batch: Number B of examples.
        alpha: Concentration: a number, or a pair for U[low, high].
        m: Examples with any weight, a random subset for each row ([M] Figure 4(c)); None is all of them.
        generator: Source of randomness, on `device`; None is torch's global one.
        positions: R, to draw (R, N, B) instead of (N, B).
        device: Device to draw on; None is the generator's.
        dtype: float32 or float64.

    Returns:
        (N, B) weights, or (R, N, B) with `positions`; non-negative, the last dimension sums to 1.

    Raises:
        ValueError: A count below 1, m above the batch size, or alpha not positive.

    Example:
        >>> import torch
        >>> weights_NB = convex_weights(4, 3, m=2, generator=torch.Generator().manual_seed(0))
        >>> weights_NB.shape, (weights_NB > 0).sum(dim=1)
        (torch.Size([4, 3]), tensor([2, 2, 2, 2]))
    """
    low, high = (alpha, alpha) if isinstance(alpha, (int, float)) else alpha
    m = batch if m is None else m
    if n < 1 or batch < 1 or not 1 <= m <= batch:
        raise ValueError(f'need n >= 1, batch >= 1 and 1 <= m <= batch, got n={n}, batch={batch}, m={m}')
    if not 0 < low <= high:
        raise ValueError(f'alpha must be positive, or a pair with 0 < low <= high, got {alpha}')
    if device is None:
        device = generator.device if generator is not None else torch.device('cpu')
    options: dict[str, Any] = dict(generator=generator, device=device)
    rows: tuple[int, ...] = (n,) if positions is None else (positions, n)
    alpha_rows = torch.rand(*rows, dtype=dtype, **options).mul_(high - low).add_(low)
    draw_rows = _dirichlet_rows_cpu if device.type == 'cpu' else _dirichlet_rows
    weights = draw_rows(alpha_rows.flatten(), m, generator).view(*rows, m)
    if m == batch:
        return weights
    chosen = torch.rand(*rows, batch, **options).topk(m, dim=-1).indices
    return weights.new_zeros(*rows, batch).scatter_(-1, chosen, weights)


def _dirichlet_rows(alpha_N: torch.Tensor, m: int, generator: torch.Generator | None) -> torch.Tensor:
    """(N, m) rows of Dir(alpha), on any device."""
    # The one sampler of torch that takes a generator; torch.distributions.Dirichlet draws from the global state.
    gamma_NM = torch._standard_gamma(alpha_N.unsqueeze(1).expand(-1, m).contiguous(), generator=generator)
    return gamma_NM.div_(gamma_NM.sum(dim=1, keepdim=True))


def _dirichlet_rows_cpu(alpha_N: torch.Tensor, m: int, generator: torch.Generator | None) -> torch.Tensor:
    """(N, m) rows of Dir(alpha), several times faster than torch._standard_gamma, which draws one variate at a time.

    Marsaglia and Tsang, A Simple Method for Generating Gamma Variables (2000), for Gamma(alpha + 1), over whole
    tensors. A proposal is accepted with probability t, where a uniform u is below t; u / t is then uniform in its turn
    and independent of the proposal, so (u / t)^(1 / alpha) makes it Gamma(alpha). Some 2 % are rejected: torch draws
    those. Logarithms and powers are of base 2, which processors make faster. Variates of a row are strided, so that
    what is the same along a row broadcasts over adjacent memory.
    """
    N = len(alpha_N)
    result_NM = alpha_N.new_empty(N, m)
    block = max(1, min(N, _BLOCK // m))
    buffers = alpha_N.new_empty(4, m * block)  # a new one for each result would cost more than some results
    for start in range(0, N, block):
        alpha = alpha_N[start:start + block]
        normal, root, log_t, u = buffers[:, :m * len(alpha)].view(4, m, len(alpha))
        d = alpha + (1 - 1 / 3)
        normal.normal_(generator=generator)
        torch.mul(normal, (9 * d).rsqrt(), out=root).add_(1).clamp_(min=1e-12)  # of what is below 0, t is as good as 0
        # With v = root^3: log t = normal^2 / 2 + d - d v + d log v.
        torch.log2(root, out=log_t).mul_(3 * d).addcmul_(normal, normal, value=math.log2(math.e) / 2)
        log_t.addcmul_(root.pow_(3), d, value=-math.log2(math.e)).add_(d * math.log2(math.e)).clamp_(max=0)
        log_u = u.uniform_(generator=generator).neg_().add_(1).log2_().sub_(log_t)
        rejected = torch.from_numpy(np.flatnonzero(log_u.numpy() > 0))  # torch's nonzero takes ten times as long
        gamma = log_u.div_(alpha).exp2_().mul_(root).mul_(d)
        gamma.view(-1)[rejected] = torch._standard_gamma(alpha[rejected % len(alpha)], generator=generator)
        gamma.clamp_(min=torch.finfo(gamma.dtype).tiny)  # a row of zeros would have no direction
        torch.div(gamma.t(), gamma.sum(dim=0).unsqueeze(1), out=result_NM[start:start + block])
    return result_NM
