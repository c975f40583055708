"""Rows of a symmetric Dirichlet distribution in one kernel: MultiMix's interpolation vectors, arXiv 2311.05538.

The method is that of functional/weights.py (Marsaglia and Tsang's for Gamma(alpha + 1), the accepted uniform used again
for the boost to Gamma(alpha)). Random numbers are a function of a seed, the row, the column and the attempt (Philox
4x32-10): four words make two proposals, which leaves one variate in some thousands to another attempt. Rows are
normalised where they are drawn, so each weight is written once and nothing is read but one alpha a row.

Shape suffixes: N rows, M entries of a row.
"""
import torch
import triton
import triton.language as tl
from triton.language.random import pair_uniform_to_normal, uint_to_uniform_float

# Largest M: a program holds whole rows.
MAX_ENTRIES = 4096
_LOG2_E = tl.constexpr(1.4426950408889634)
_TINY = tl.constexpr(1.1754943508222875e-38)
# Bounds the loop where alpha is not a number; nothing else ever gets there.
_ATTEMPTS = tl.constexpr(64)


@triton.jit
def _proposal(normal, word, alpha, d, width):
    """A Gamma(alpha) variate and whether it is accepted."""
    u = tl.maximum(uint_to_uniform_float(word), 2.3e-10)
    root = tl.maximum(normal * width + 1.0, 1e-12)  # of what is below 0, t is as good as 0
    cube = root * root * root
    log_t = tl.minimum((normal * normal * 0.5 + d - d * cube) * _LOG2_E + 3.0 * d * tl.log2(root), 0.0)
    log_u = tl.log2(u) - log_t
    return tl.maximum(d * cube * tl.exp2(tl.minimum(log_u, 0.0) / alpha), _TINY), log_u <= 0.0


@triton.jit
def _dirichlet_kernel(alpha_ptr, seed_ptr, out_ptr, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    j = tl.arange(0, BLOCK_M)[None, :]
    inside = (n < N) & (j < M)
    seed = tl.load(seed_ptr)
    alpha = tl.load(alpha_ptr + n, mask=n < N, other=1.0)
    d = alpha + 0.6666666666666666
    width = 1.0 / tl.sqrt(9.0 * d)
    gamma = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    waiting = inside.to(tl.int32)
    row, column = n + 0 * j, j + 0 * n
    attempt = 0
    while (tl.max(tl.max(waiting, axis=1), axis=0) > 0) & (attempt < _ATTEMPTS):
        word0, word1, word2, word3 = tl.philox(seed, row, column, 0 * row + attempt, 0 * row)
        normal, another = pair_uniform_to_normal(uint_to_uniform_float(word0), uint_to_uniform_float(word1))
        value, accepted = _proposal(normal, word2, alpha, d, width)
        gamma = tl.where((waiting > 0) & accepted, value, gamma)
        waiting = tl.where(accepted, 0, waiting)
        value, accepted = _proposal(another, word3, alpha, d, width)
        gamma = tl.where((waiting > 0) & accepted, value, gamma)
        waiting = tl.where(accepted, 0, waiting)
        attempt += 1
    total = tl.sum(gamma, axis=1)
    weights = gamma / tl.where(total > 0, total, 1.0)[:, None]  # 0: beyond the last row
    tl.store(out_ptr + n.to(tl.int64) * M + j, weights, mask=inside)


def dirichlet_rows(alpha_N: torch.Tensor, m: int, seed: torch.Tensor) -> torch.Tensor:
    """(N, m) rows of Dir(alpha), alpha (N,) float32 and positive, m up to `MAX_ENTRIES`.

    `seed` is (1,) int64 on the same device: the host needs not know it.
    """
    out_NM = alpha_N.new_empty(len(alpha_N), m)
    config = launch_config(m)
    _dirichlet_kernel[(triton.cdiv(len(alpha_N), config['BLOCK_N']),)](
        alpha_N, seed, out_NM, len(alpha_N), m, **config)
    return out_NM


def launch_config(m: int) -> dict[str, int]:
    """Whole rows, 8 entries a thread: what waits for another attempt holds up few."""
    block_m = triton.next_power_of_2(m)
    block_n = max(1, 1024 // block_m)
    return dict(BLOCK_N=block_n, BLOCK_M=block_m, num_warps=max(1, block_n * block_m // 256), num_stages=1)
