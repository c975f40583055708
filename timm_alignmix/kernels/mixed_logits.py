"""Log-sum-exp of mixed logits and its gradient without the mixed logits: MultiMix and Dense MultiMix, arXiv 2311.05538.

With M^ (N, B) the normalised interpolation vectors of a position and L (B, C) its clean logits, one kernel computes
logsumexp_c(M^ L) tile by tile with an online softmax, the other computes the tiles again and adds up
M^T diag(share) softmax(M^ L). Neither M^ nor M^ L, (R, N, C) in all, is ever stored: a program reads the vectors as
they were drawn and applies attention and normalisation itself. Batches of more examples than a program can hold go
tile by tile; the second kernel then mixes the logits anew for each tile of its result.

Precision: sums are in float32. Float32 logits are multiplied as three TF32 products, float32 in effect. Half-precision
logits are exact in float16, and the vectors M^ are rounded to it, 11 bits: no coarser than the logits themselves. These
roundings have no bias, so they all but vanish from the loss, an average over examples. Both kernels round alike, else a
softmax of large logits would not sum to 1. The gradient of half-precision logits multiplies softmax and vectors in
float16.

Shape suffixes: B batch, C classes, N generated examples, R positions.
"""
import torch
import triton
import triton.language as tl

MAX_BLOCK_B = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # examples that a program holds at once
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _mixing_weights(weights_ptr, attention_ptr, position, n, b, N, B, R, HAS_ATTENTION: tl.constexpr):
    """(n, b) block of weights * attention, the attention scaled by its maximum over the batch."""
    mask = (n[:, None] < N) & (b[None, :] < B)
    weights = tl.load(weights_ptr + (position * N + n[:, None]) * B + b[None, :], mask=mask, other=0.0)
    weights = weights.to(tl.float32)
    if HAS_ATTENTION:
        weights *= tl.load(attention_ptr + b * R + position, mask=b < B, other=0.0)[None, :]
    return weights


@triton.jit
def _as_float16(logits):
    """Logits as float16: bfloat16, of the range of float32, divided by 16. What this takes from small ones is 2e-7."""
    if logits.dtype == tl.bfloat16:
        logits = logits.to(tl.float32) * 0.0625
    return logits.to(tl.float16)


@triton.jit
def _dot(a, b, total):
    """total + a @ b: as three TF32 products where b is float32, else as one of float16."""
    if b.dtype == tl.float32:
        total = tl.dot(a, b, total, input_precision='tf32x3')
    else:
        total = tl.dot(a.to(tl.float16), b, total)
    return total


@triton.jit
def _logsumexp_kernel(
        logits_ptr, weights_ptr, attention_ptr, sums_ptr, lse_ptr, B, R, N, C, stride_b, stride_r,
        HAS_ATTENTION: tl.constexpr, TILED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_X: tl.constexpr):
    position = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.arange(0, BLOCK_B)
    base_ptr = logits_ptr + position * stride_r
    rows_ptr = base_ptr + b.to(tl.int64) * stride_b  # B * R * C may exceed 2^31
    vectors = _mixing_weights(weights_ptr, attention_ptr, position, n, b, N, B, R, HAS_ATTENTION)
    if HAS_ATTENTION:
        sums = tl.sum(vectors, axis=1)
        if TILED:
            for first in range(BLOCK_B, B, BLOCK_B):
                tile = _mixing_weights(weights_ptr, attention_ptr, position, n, first + b, N, B, R, HAS_ATTENTION)
                sums += tl.sum(tile, axis=1)
        norm = 1.0 / tl.where(sums > 0, sums, 1.0)
        vectors *= norm[:, None]
        tl.store(sums_ptr + position * N + n, sums, mask=n < N)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    to_log2: tl.constexpr = 16 * _LOG2_E if dtype == tl.bfloat16 else _LOG2_E
    if dtype != tl.float32:
        vectors = vectors.to(tl.float16)
    peak = tl.full([BLOCK_N], float('-inf'), dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, C, BLOCK_X):
        c = start + tl.arange(0, BLOCK_X)
        mixed = tl.zeros([BLOCK_N, BLOCK_X], dtype=tl.float32)
        if TILED:
            for first in range(0, B, BLOCK_B):
                tile = _mixing_weights(weights_ptr, attention_ptr, position, n, first + b, N, B, R, HAS_ATTENTION)
                if HAS_ATTENTION:
                    tile *= norm[:, None]
                logits = tl.load(
                    base_ptr + (first + b).to(tl.int64)[:, None] * stride_b + c[None, :],
                    mask=(first + b[:, None] < B) & (c[None, :] < C), other=0.0)
                if dtype != tl.float32:
                    logits = _as_float16(logits)
                mixed = _dot(tile, logits, mixed)
        else:
            logits = tl.load(
                rows_ptr[:, None] + c[None, :], mask=(b[:, None] < B) & (c[None, :] < C), other=0.0)
            if dtype != tl.float32:
                logits = _as_float16(logits)
            mixed = _dot(vectors, logits, mixed)
        mixed = tl.where(c[None, :] < C, mixed * to_log2, float('-inf'))
        new_peak = tl.maximum(peak, tl.max(mixed, axis=1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(mixed - new_peak[:, None]), axis=1)
        peak = new_peak
    tl.store(lse_ptr + position * N + n, (peak + tl.log2(total)) * _LN_2, mask=n < N)


@triton.jit
def _weighted_sum_kernel(
        logits_ptr, weights_ptr, attention_ptr, sums_ptr, lse_ptr, share_ptr, out_ptr, B, R, N, X, stride_b, stride_r,
        out_stride_b, out_stride_r, HAS_ATTENTION: tl.constexpr, TILED: tl.constexpr, PAIRS: tl.constexpr,
        BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr):
    """out[b, x] = sum_k share_k M^_kb V_kx, where V is softmax(M^ L) over X classes, or M^ itself (PAIRS)."""
    position = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    i = tl.arange(0, BLOCK_B)
    b = tl.program_id(2) * BLOCK_B + i if TILED else i
    base_ptr = logits_ptr + position * stride_r
    rows_ptr = base_ptr + i.to(tl.int64) * stride_b  # B * R * C may exceed 2^31
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    to_log2: tl.constexpr = 16 * _LOG2_E if dtype == tl.bfloat16 else _LOG2_E
    if not PAIRS and not TILED:
        logits = tl.load(rows_ptr[None, :] + x[:, None], mask=(b[None, :] < B) & (x[:, None] < X), other=0.0)
        if dtype != tl.float32:
            logits = _as_float16(logits)
    out = tl.zeros([BLOCK_X, BLOCK_B], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        vectors = _mixing_weights(weights_ptr, attention_ptr, position, n, b, N, B, R, HAS_ATTENTION)
        share = tl.load(share_ptr + position * N + n, mask=n < N, other=0.0)
        if HAS_ATTENTION:
            sums = tl.load(sums_ptr + position * N + n, mask=n < N, other=0.0)
            norm = 1.0 / tl.where(sums > 0, sums, 1.0)
            vectors *= norm[:, None]
        if PAIRS:
            values = _mixing_weights(weights_ptr, attention_ptr, position, n, x, N, B, R, HAS_ATTENTION)
            if HAS_ATTENTION:
                values *= norm[:, None]
            values = tl.trans(values)
        else:
            lse = tl.load(lse_ptr + position * N + n, mask=n < N, other=0.0)
            mixed = tl.zeros([BLOCK_X, BLOCK_N], dtype=tl.float32)
            if TILED:
                for first in range(0, B, BLOCK_B):
                    tile = _mixing_weights(weights_ptr, attention_ptr, position, n, first + i, N, B, R, HAS_ATTENTION)
                    if HAS_ATTENTION:
                        tile *= norm[:, None]
                    logits = tl.load(
                        base_ptr + (first + i).to(tl.int64)[None, :] * stride_b + x[:, None],
                        mask=(first + i[None, :] < B) & (x[:, None] < X), other=0.0)
                    if dtype != tl.float32:
                        logits = _as_float16(logits)
                    mixed = _dot(logits, tl.trans(tile.to(logits.dtype)), mixed)
            else:
                mixed = _dot(logits, tl.trans(vectors.to(logits.dtype)), mixed)
            values = tl.exp2(mixed * to_log2 - (lse * _LOG2_E)[None, :])
        if dtype == tl.float32:
            out = _dot(values, vectors * share[:, None], out)
        else:
            # Times N: a share is about 1 / N, below what float16 can hold.
            out = _dot(values, (vectors * (share * N)[:, None]).to(tl.float16), out)
    if dtype != tl.float32:
        out *= 1.0 / N
    tl.store(
        out_ptr + b[None, :].to(tl.int64) * out_stride_b + position * out_stride_r + x[:, None], out,
        mask=(b[None, :] < B) & (x[:, None] < X))


def mixed_logsumexp(
        logits_BRC: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logsumexp over classes of every mixed example.

    Args:
        logits_BRC: (B, R, C) float32, bfloat16 or float16, classes adjacent in memory.
        weights_RNB: (R, N, B) interpolation vectors, contiguous.
        attention_BR: (B, R) float32, contiguous, non-negative and of maximum 1 (or 0) at each position; or None.

    Returns:
        lse_RN, and the sums s of equations (10)-(11), sums_RN, both float32. Without attention the sums are 1.
    """
    B, R, C = logits_BRC.shape
    N = weights_RNB.shape[1]
    lse_RN = torch.empty((R, N), dtype=torch.float32, device=logits_BRC.device)
    sums_RN = torch.empty_like(lse_RN) if attention_BR is not None else torch.ones_like(lse_RN)
    config = launch_config(B, logits_BRC.dtype, total=False, hopper=_hopper(logits_BRC.device))
    _logsumexp_kernel[(triton.cdiv(N, config['BLOCK_N']), R)](
        logits_BRC, weights_RNB, attention_BR, sums_RN, lse_RN, B, R, N, C, *logits_BRC.stride()[:2],
        HAS_ATTENTION=attention_BR is not None, **config)
    return lse_RN, sums_RN


def softmax_sums(
        logits_BRC: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None,
        sums_RN: torch.Tensor,
        lse_RN: torch.Tensor,
        share_RN: torch.Tensor,
) -> torch.Tensor:
    """sum_k share_k M^_kb softmax_c(mixed logits of k) of each position: (B, R, C) float32."""
    B, R, C = logits_BRC.shape
    out_BRC = torch.empty((B, R, C), dtype=torch.float32, device=logits_BRC.device)
    _launch_sum(
        logits_BRC, weights_RNB, attention_BR, sums_RN, lse_RN, share_RN, out_BRC, out_BRC.stride()[:2], pairs=False)
    return out_BRC


def pair_sums(
        logits_BRC: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor | None,
        sums_RN: torch.Tensor,
        share_RN: torch.Tensor,
) -> torch.Tensor:
    """sum_k share_k M^_kb M^_ki of each position: (R, B, B) float32."""
    B, R, _ = logits_BRC.shape
    out_RBB = torch.empty((R, B, B), dtype=torch.float32, device=logits_BRC.device)
    strides = out_RBB.stride()[1], out_RBB.stride()[0]
    _launch_sum(logits_BRC, weights_RNB, attention_BR, sums_RN, sums_RN, share_RN, out_RBB, strides, pairs=True)
    return out_RBB


def _launch_sum(logits_BRC, weights_RNB, attention_BR, sums_RN, lse_RN, share_RN, out, out_strides, pairs):
    B, R, _ = logits_BRC.shape
    N, X = weights_RNB.shape[1], out.shape[2]
    config = launch_config(B, logits_BRC.dtype, total=True, hopper=_hopper(logits_BRC.device))
    _weighted_sum_kernel[(triton.cdiv(X, config['BLOCK_X']), R, triton.cdiv(B, config['BLOCK_B']))](
        logits_BRC, weights_RNB, attention_BR, sums_RN, lse_RN, share_RN, out, B, R, N, X,
        *logits_BRC.stride()[:2], *out_strides, HAS_ATTENTION=attention_BR is not None, PAIRS=pairs, **config)


def launch_config(B: int, dtype: torch.dtype, total: bool, hopper: bool) -> dict[str, int | bool]:
    """Block shapes and warps, those that ptxas fits into registers (`total`: the second kernel).

    A program holds vectors over the batch, or a tile of it. Hopper's own matrix instructions take blocks of 64 rows at
    least: vectors in the first kernel, classes in the second.
    """
    block_b = max(16, triton.next_power_of_2(B))
    tiled = block_b > MAX_BLOCK_B[dtype]
    if tiled:
        block_b = MAX_BLOCK_B[dtype] // 2  # what a tile mixes takes registers of its own
    small = block_b <= 128 and not tiled
    if dtype == torch.float32:
        block_n, block_x = 16, 32
    elif total:
        block_n = 32
        block_x = 128 if small else 64 if hopper else 32
    else:
        block_n = 128 if small else 64 if hopper else 32
        block_x = 128 if small else 64
    return dict(
        TILED=tiled, BLOCK_B=block_b, BLOCK_N=block_n, BLOCK_X=block_x,
        num_warps=4 if block_b <= 32 else 8, num_stages=1)


def _hopper(device: torch.device) -> bool:
    return device.type != 'cuda' or torch.cuda.get_device_capability(device)[0] >= 9
