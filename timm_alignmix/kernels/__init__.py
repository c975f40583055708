"""Triton forms of the hot functions of timm_alignmix.functional for NVIDIA GPUs.

They take the place of the PyTorch forms inside the custom operators of functional/ (the draws: in a table there), by
device, type and size; what they do not cover runs on in PyTorch, and so does everything where Triton is absent. Set
TIMM_ALIGNMIX_TRITON=0 to leave them out. Triton is imported when the first of them runs.
"""
import functools
import importlib.util
import os

import torch

from ..functional import losses, transport, weights
from ..functional._precision import full_precision

_HALF = (torch.bfloat16, torch.float16)


def register() -> None:
    """Make the operators and the draws choose between the two forms on CUDA devices."""
    transport.transport_cost_op.register_kernel('cuda', cost_matrix)
    transport.sinkhorn_plan_op.register_kernel('cuda', plan_matrix)
    losses.dense_loss_op.register_kernel('cuda', loss_and_grads)
    weights.DIRICHLET_ROWS['cuda'] = dirichlet_rows


def usable(device: torch.device) -> bool:
    """Whether Triton is installed and wanted, and the device is an NVIDIA GPU of the Ampere generation or later."""
    return (
        os.environ.get('TIMM_ALIGNMIX_TRITON', '1') != '0'
        and torch.version.cuda is not None
        and triton_installed()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported; looked up once."""
    return importlib.util.find_spec('triton') is not None


def cost_matrix(feat_a_BDR: torch.Tensor, feat_b_BDR: torch.Tensor) -> torch.Tensor:
    """:func:`timm_alignmix.functional.transport_cost`; Triton for two half-precision maps of one type."""
    if feat_a_BDR.dtype not in _HALF or feat_a_BDR.dtype != feat_b_BDR.dtype or not usable(feat_a_BDR.device):
        return transport.cost_matrix(feat_a_BDR, feat_b_BDR)
    from .cost import transport_cost
    with torch.cuda.device(feat_a_BDR.device):
        return transport_cost(feat_a_BDR, feat_b_BDR)


def plan_matrix(
        cost_BRR: torch.Tensor,
        eps: float,
        iterations: int,
        last: int,
        tolerance: float | None,
) -> torch.Tensor:
    """:func:`timm_alignmix.functional.sinkhorn_plan`; Triton for a fixed number of iterations in float32."""
    if iterations > 0 and tolerance is None and cost_BRR.dtype != torch.float64 and usable(cost_BRR.device):
        from . import sinkhorn
        if sinkhorn.fits(cost_BRR):
            with torch.cuda.device(cost_BRR.device):
                kernel_BRR, _ = transport.centred_kernel(cost_BRR, eps, last)
                first = sinkhorn.first_potential(kernel_BRR, iterations, last)
                return transport.final_softmax(kernel_BRR, first, last)
    return transport.plan_matrix(cost_BRR, eps, iterations, last, tolerance)


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
    """Loss and gradients of :func:`timm_alignmix.functional.dense_multimix_loss`; Triton without attention's gradient,
    up to the batch sizes whose vectors fit a program."""
    if not attention_grad and logits_BRC.dtype != torch.float64 and usable(logits_BRC.device):
        from . import dense_loss
        if dense_loss.fits(logits_BRC, weights_RNB):
            with torch.cuda.device(logits_BRC.device), full_precision(logits_BRC.device):
                return dense_loss.loss_and_grads(logits_BRC, target, weights_RNB, attention_BR, smoothing, logits_grad)
    return losses.loss_and_grads(
        logits_BRC, target, weights_RNB, attention_BR, smoothing, chunk_size, logits_grad, attention_grad)


def dirichlet_rows(alpha_N: torch.Tensor, m: int, generator: torch.Generator | None) -> torch.Tensor:
    """Rows of Dir(alpha); Triton in float32. The two forms draw different numbers from a generator."""
    if alpha_N.dtype == torch.float32 and usable(alpha_N.device):
        from . import dirichlet
        if m <= dirichlet.MAX_ENTRIES:
            with torch.cuda.device(alpha_N.device):
                seed = torch.randint(2 ** 63 - 1, (1,), generator=generator, device=alpha_N.device)
                return dirichlet.dirichlet_rows(alpha_N, m, seed)
    return weights.dirichlet_rows(alpha_N, m, generator)
