"""Random interpolation vectors of MultiMix, arXiv 2311.05538 [M], sections 3.2 and 3.3.

Shape suffixes: B batch, N generated examples, R spatial positions.
"""

import torch


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
    """Draw points of the convex hull of a mini-batch: each row a symmetric Dirichlet vector over the batch.

    One scalar alpha is drawn for each row (never one for the matrix or for an entry), then the row from Dir(alpha).
    With `positions`, rows of different positions are independent (Dense MultiMix).

    Args:
        n: Number N of rows.
        batch: Number B of examples.
        alpha: Concentration: a number, or a pair for U[low, high].
        m: Rows have weight on a random subset of m examples only, one subset a row; None is all of them.
        generator: Source of randomness; its device must be `device`.
        positions: Draw (positions, N, B) instead of (N, B).
        device: Where to draw; the generator's device when None.
        dtype: float32 or float64.

    Returns:
        weights_NB, or weights_RNB with `positions`; non-negative, the last dimension sums to 1.

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
    options = dict(generator=generator, device=device)
    rows = (n,) if positions is None else (positions, n)
    alpha_rows = torch.rand(*rows, 1, dtype=dtype, **options).mul_(high - low).add_(low)
    # The one sampler of torch that takes a generator; torch.distributions.Dirichlet draws from the global state.
    gamma = torch._standard_gamma(alpha_rows.expand(*rows, m).contiguous(), generator=generator)
    weights = gamma.div_(gamma.sum(dim=-1, keepdim=True))
    if m == batch:
        return weights
    chosen = torch.rand(*rows, batch, **options).topk(m, dim=-1).indices
    return weights.new_zeros(*rows, batch).scatter_(-1, chosen, weights)
