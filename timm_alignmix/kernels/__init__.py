"""Triton forms of the hot functions of timm_alignmix.functional for NVIDIA GPUs.

The custom operators of functional/ choose them by device, dtype and size. All else runs in PyTorch, also where Triton
is not installed or older than TRITON, or TIMM_ALIGNMIX_TRITON=0 is set. Triton is imported when the first of them runs.
"""
import functools
import os

import torch

from ..functional import losses, transport
from ..functional._precision import full_precision
from ..functional.level_cut import source_side, source_side_op

TRITON = (3, 6)  # the oldest release that compiled and interpreted these kernels in tests: that of torch 2.11
_HALF = (torch.bfloat16, torch.float16)


def register() -> None:
    """Register the functions below for CUDA devices; each chooses between the two forms."""
    transport.transport_cost_op.register_kernel('cuda', cost_matrix)
    transport.sinkhorn_plan_op.register_kernel('cuda', plan_matrix)
    losses.dense_loss_op.register_kernel('cuda', loss_and_grads)
    source_side_op.register_kernel('cuda', cut_source_side)


def usable(device: torch.device) -> bool:
    """Check that a Triton of 3.6 or later is installed and not switched off, and the device an NVIDIA GPU of 8.0 on."""
    return (
        os.environ.get('TIMM_ALIGNMIX_TRITON', '1') != '0' and torch.version.cuda is not None
        and triton_version() >= TRITON and torch.cuda.get_device_capability(device) >= (8, 0))


@functools.cache
def triton_version() -> tuple[int, ...]:
    """Major and minor version of Triton, imported here for the first time; () where there is none."""
    try:
        import triton
    except ImportError:
        return ()
    return tuple(map(int, triton.__version__.split('.')[:2]))


def cost_matrix(feat_a_BDR: torch.Tensor, feat_b_BDR: torch.Tensor) -> torch.Tensor:
    """Form of functional.transport.cost_matrix: Triton for two half-precision maps of one dtype."""
    if feat_a_BDR.dtype not in _HALF or feat_a_BDR.dtype != feat_b_BDR.dtype or not usable(feat_a_BDR.device):
        return transport.cost_matrix(feat_a_BDR, feat_b_BDR)
    from .cost import transport_cost
    with torch.cuda.device(feat_a_BDR.device):
        return transport_cost(feat_a_BDR, feat_b_BDR)


def plan_matrix(cost_BRR, eps, iterations, last, tolerance):
    """Form of functional.transport.plan_matrix: Triton for a fixed number of iterations in float32."""
    if iterations > 0 and tolerance is None and cost_BRR.dtype != torch.float64 and usable(cost_BRR.device):
        from . import sinkhorn
        if sinkhorn.fits(cost_BRR):
            with torch.cuda.device(cost_BRR.device):
                kernel_BRR, _ = transport.centred_kernel(cost_BRR, eps, last)
                first = sinkhorn.first_potential(kernel_BRR, iterations, last)
                return transport.final_softmax(kernel_BRR, first, last)
    return transport.plan_matrix(cost_BRR, eps, iterations, last, tolerance)


def loss_and_grads(
        logits_BRC, target, weights_RNB, attention_BR, smoothing, chunk_size, logits_grad, attention_grad,
        class_scale_C=None, pos_weight=None, threshold=None):
    """Form of functional.losses.loss_and_grads: Triton for softmax cross-entropy without the attention's gradient."""
    fits = class_scale_C is None and weights_RNB.shape[1] <= 2 ** 15  # float16 holds N times a share
    if fits and not attention_grad and logits_BRC.dtype != torch.float64 and usable(logits_BRC.device):
        from . import dense_loss
        with torch.cuda.device(logits_BRC.device), full_precision(logits_BRC.device):
            return dense_loss.loss_and_grads(logits_BRC, target, weights_RNB, attention_BR, smoothing, logits_grad)
    return losses.loss_and_grads(
        logits_BRC, target, weights_RNB, attention_BR, smoothing, chunk_size, logits_grad, attention_grad,
        class_scale_C, pos_weight, threshold)


def cut_source_side(price: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Form of functional.level_cut.source_side: Triton for int32 and grids that fit a program."""
    if price.dtype == torch.int32 and price.numel() and usable(price.device):
        from . import level_cut
        if level_cut.fits(price):
            with torch.cuda.device(price.device):
                return level_cut.source_side(price, weight)
    return source_side(price, weight)
