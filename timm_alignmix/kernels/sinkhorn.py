"""All Sinkhorn iterations of a sample in one program: AlignMixup's plan, arXiv 2103.15375, equations (7) and (8).

A half-step reads the whole (R, R) kernel, so one pass does both: it normalises a block of lines, whose sums lie within
the block, and adds the result up for the other side. Both halves use the same exponentials: an iteration is one pass
and R * R exponentials, where the release's loop has some twenty passes. Up to R = 64 the kernel stays in registers;
above, it streams through the multiprocessor's L1 cache (R = 196: 154 KB).

Exponentials are shifted by the potentials of the last iteration and underflow if a potential moves by more than 87 in
one iteration. Sinkhorn's map does not expand the largest move, so the first iterations are in log-sum-exp form, until
moves are small; later ones never need it.

Shape suffixes: B batch, R positions; P positions of the potential normalised first, Q those of the other.
"""
import torch
import triton
import triton.language as tl

# Largest R, with blocks of 4 lines of 1024.
MAX_POSITIONS = 1024
# Largest move of a potential in one iteration: terms that underflow after it are below exp(50 - 87) of a sum.
MAX_MOVE = 50.0
# Value of entries outside the kernel: -inf, but without the NaN of -inf + inf.
OUTSIDE = tl.constexpr(-1e30)


@triton.jit
def _load_lines(lines, p, q, R):
    """Block (P, Q) of a sample's kernel: OUTSIDE beyond the last q, 0 beyond the last line."""
    inside = (p[:, None] < R) & (q[None, :] < R)
    outside = tl.where(q[None, :] < R, 0.0, OUTSIDE)
    return tl.where(
        inside, tl.load(lines + p[:, None] * R + q[None, :], mask=inside, other=0.0), outside)


@triton.jit
def _lines(resident, sample_ptr, p, q, R, BLOCKS: tl.constexpr):
    """Block of lines, from registers if it is the only one."""
    lines = resident
    if BLOCKS > 1:
        lines = _load_lines(sample_ptr, p, q, R)
    return lines


@triton.jit
def _line_potential(shifted):
    """Minus the log-sum-exp of each line."""
    peak = tl.max(shifted, axis=1)
    return -(peak + tl.log(tl.sum(tl.exp(shifted - peak[:, None]), axis=1)))


@triton.jit
def _potentials_kernel(
        lines_ptr, first_ptr, R, iterations, max_move, BLOCKS: tl.constexpr, BLOCK_P: tl.constexpr,
        BLOCK_Q: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    sample_ptr = lines_ptr + sample * R * R
    p_block = tl.arange(0, BLOCK_P)
    q = tl.arange(0, BLOCK_Q)
    second = tl.zeros([BLOCK_Q], dtype=tl.float32)
    resident = _load_lines(sample_ptr, p_block, q, R)

    iteration = 0
    moved = float('inf')
    while (iteration < iterations - 1) & (moved > max_move):
        peak = tl.full([BLOCK_Q], OUTSIDE, dtype=tl.float32)
        total = tl.zeros([BLOCK_Q], dtype=tl.float32)
        for block in range(BLOCKS):
            p = block * BLOCK_P + p_block
            lines = _lines(resident, sample_ptr, p, q, R, BLOCKS)
            first = _line_potential(lines + second[None, :])
            lines = tl.where(p[:, None] < R, lines + first[:, None], OUTSIDE)
            block_peak = tl.maximum(peak, tl.max(lines, axis=0))
            total = total * tl.exp(peak - block_peak) + tl.sum(tl.exp(lines - block_peak[None, :]), axis=0)
            peak = block_peak
        update = tl.where(q < R, -(peak + tl.log(total)), 0.0)
        moved = tl.max(tl.abs(update - second), axis=0)
        second = update
        iteration += 1

    while iteration < iterations - 1:
        total = tl.zeros([BLOCK_Q], dtype=tl.float32)
        for block in range(BLOCKS):
            p = block * BLOCK_P + p_block
            lines = _lines(resident, sample_ptr, p, q, R, BLOCKS)
            shifted = lines + second[None, :]
            exps = tl.exp(shifted - tl.max(shifted, axis=1)[:, None])
            share = tl.where(p < R, 1.0 / tl.sum(exps, axis=1), 0.0)
            total += tl.sum(exps * share[:, None], axis=0)
        # The total is of exp(kernel + first + second), with the second potential before this iteration.
        second = tl.where(q < R, second - tl.log(total), 0.0)
        iteration += 1

    for block in range(BLOCKS):
        p = block * BLOCK_P + p_block
        first = _line_potential(_lines(resident, sample_ptr, p, q, R, BLOCKS) + second[None, :])
        tl.store(first_ptr + sample * R + p, first, mask=p < R)


def fits(cost_BRR: torch.Tensor) -> bool:
    """Check that the kernel takes a cost of this size."""
    return cost_BRR.shape[1] <= MAX_POSITIONS


def first_potential(kernel_BRR: torch.Tensor, iterations: int, last: int) -> torch.Tensor:
    """Potential that the last half-step sees, after `iterations` >= 1.

    Args:
        kernel_BRR: (B, R, R) float32, -cost / eps up to a constant for each position of the potential normalised first.
        iterations: Sinkhorn iterations; of the last only the first half is needed.
        last: Dimension that the last half-step sums over: 2 makes the rows exact, 1 the columns.

    Returns:
        (B, 1, R) for last = 2, (B, R, 1) for last = 1: in units of eps, with marginals of 1.
    """
    B, R, _ = kernel_BRR.shape
    lines_BPQ = (kernel_BRR if last == 1 else kernel_BRR.transpose(1, 2)).contiguous()
    first_BR = kernel_BRR.new_empty((B, R))
    _potentials_kernel[(B,)](lines_BPQ, first_BR, R, iterations, MAX_MOVE, **launch_config(R))
    return first_BR.unsqueeze(3 - last)


def launch_config(R: int) -> dict[str, int]:
    """Launch options: lines of a block and warps, 16 entries a thread, 4096 a program."""
    block_q = max(16, triton.next_power_of_2(R))
    block_p = min(block_q, 4096 // block_q)
    return dict(
        BLOCKS=triton.cdiv(R, block_p), BLOCK_P=block_p, BLOCK_Q=block_q,
        num_warps=max(1, block_p * block_q // 512), num_stages=1)
