"""Squared distances between half-precision features in one pass: AlignMixup, arXiv 2103.15375, equation (6).

Products of half-precision numbers are exact in float32, so tensor cores with float32 sums are as exact as converted
features, which would move several times the bytes.

Shape suffixes: B batch, D channels, R positions.
"""
import torch
import triton
import triton.language as tl


@triton.jit
def _cost_kernel(
        a_ptr, b_ptr, norm_a_ptr, norm_b_ptr, out_ptr, D, R, a_stride_b, a_stride_d, a_stride_r, b_stride_b, b_stride_d,
        b_stride_r, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    sample = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    dots = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    a_ptr += sample * a_stride_b
    b_ptr += sample * b_stride_b
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(
            a_ptr + d[None, :] * a_stride_d + i[:, None] * a_stride_r,
            mask=(d[None, :] < D) & (i[:, None] < R), other=0.0)
        b = tl.load(
            b_ptr + d[:, None] * b_stride_d + j[None, :] * b_stride_r,
            mask=(d[:, None] < D) & (j[None, :] < R), other=0.0)
        dots = tl.dot(a, b, dots)
    norm_a = tl.load(norm_a_ptr + sample * R + i, mask=i < R, other=0.0)
    norm_b = tl.load(norm_b_ptr + sample * R + j, mask=j < R, other=0.0)
    cost = tl.maximum(norm_a[:, None] + norm_b[None, :] - 2 * dots, 0.0)
    tl.store(out_ptr + (sample * R + i[:, None]) * R + j[None, :], cost, mask=(i[:, None] < R) & (j[None, :] < R))


def transport_cost(feat_a_BDR: torch.Tensor, feat_b_BDR: torch.Tensor) -> torch.Tensor:
    """Costs (B, R, R) in float32 of bfloat16 or float16 features (B, D, R) of any strides."""
    B, D, R = feat_a_BDR.shape
    cost_BRR = torch.empty((B, R, R), dtype=torch.float32, device=feat_a_BDR.device)
    norm_a_BR, norm_b_BR = (
        torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square_().contiguous()
        for x in (feat_a_BDR, feat_b_BDR))
    config = launch_config(R)
    tiles = triton.cdiv(R, config['BLOCK_R'])
    _cost_kernel[(tiles, tiles, B)](
        feat_a_BDR, feat_b_BDR, norm_a_BR, norm_b_BR, cost_BRR, D, R, *feat_a_BDR.stride(), *feat_b_BDR.stride(),
        **config)
    return cost_BRR


def launch_config(R: int) -> dict[str, int]:
    """Launch options: tile of the cost, channels at a time, warps."""
    block_r = 64 if R <= 64 else 128
    return dict(BLOCK_R=block_r, BLOCK_D=64, num_warps=4 if block_r == 64 else 8, num_stages=3)
