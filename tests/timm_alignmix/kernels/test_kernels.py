"""Triton kernels against float64 forms and POT: on a GPU, or interpreted (see test_interpreter.py)."""
import warnings

import numpy as np
import ot
import pytest
import torch

from timm_alignmix.functional import convex_weights, losses, transport

pytest.importorskip('triton', '3.6', 'needs Triton 3.6 or later, else its kernels are not used either')
HALF = (torch.bfloat16, torch.float16)


def pot_plan(cost_RR, iterations, last):
    """POT normalises columns first and rows last: transpose for the other order."""
    cost_RR = cost_RR.double().numpy() if last == 2 else cost_RR.double().numpy().T
    uniform = np.full(len(cost_RR), 1 / len(cost_RR))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it warns when it has not converged
        plan = ot.bregman.sinkhorn(
            uniform, uniform, cost_RR, 0.1, method='sinkhorn_log', numItermax=iterations, stopThr=0.0)
    return torch.from_numpy(plan if last == 2 else plan.T)


# ------------------------------------------------------------------------------------------------------------ Sinkhorn


@pytest.mark.parametrize('last', (1, 2))
@pytest.mark.parametrize('R, scale, iterations', (
    (49, 350.0, 100),  # in registers
    (70, 350.0, 20),  # several blocks of lines, the last one partly filled
    (16, 1e4, 100), (16, 0.0, 3), (7, 1.0, 1), (1, 1e4, 2),
))
def test_sinkhorn_equals_pot(kernel_device, R, scale, iterations, last):
    from timm_alignmix.kernels.sinkhorn import first_potential

    cost_BRR = scale * torch.rand(2, R, R)
    kernel_BRR, _ = transport.centred_kernel(cost_BRR.to(kernel_device), 0.1, last)
    before = kernel_BRR.clone()
    first = first_potential(kernel_BRR, iterations, last)
    assert torch.equal(kernel_BRR, before)
    plan_BRR = transport.final_softmax(kernel_BRR, first, last).cpu()
    assert (R * plan_BRR.sum(last) - 1).abs().max() <= 5e-7
    for plan_RR, cost_RR in zip(plan_BRR, cost_BRR, strict=True):
        expected = pot_plan(cost_RR, iterations, last)
        error = (plan_RR - expected).abs().max() / expected.max()
        assert error <= max(scale / 0.1, 16) * 2 ** -24


def test_sinkhorn_ends_on_what_is_not_finite(kernel_device):
    from timm_alignmix.kernels.sinkhorn import first_potential

    kernel_BRR = torch.full((2, 5, 5), float('nan'), device=kernel_device)
    kernel_BRR[1] = 0
    first = first_potential(kernel_BRR, 100, 2).cpu()
    assert first[0].isnan().all() and first[1].isfinite().all()


# ------------------------------------------------------------------------------------------------------------ level cut


@pytest.mark.parametrize('K, R, C, B', (
    (1, 2, 2, 9), (2, 4, 4, 5), (2, 3, 5, 4), (3, 4, 4, 3), (2, 16, 16, 2), (2, 1, 1, 2)))
def test_cuts_equal_the_eager_form(kernel_device, K, R, C, B):
    """The eager form is tested against all labellings and scipy's flow in functional/test_level_cut.py."""
    from timm_alignmix.functional.level_cut import source_side
    from timm_alignmix.kernels import level_cut

    generator = torch.Generator().manual_seed(R)
    price = torch.randint(-90, 91, (K, R, C, B), generator=generator, dtype=torch.int32).sort(dim=0).values
    weight = torch.zeros(4, R, C, B, dtype=torch.int32)
    weight[0, :-1] = torch.randint(0, 31, (R - 1, C, B), generator=generator)
    weight[1, 1:] = weight[0, :-1]
    weight[2, :, :-1] = torch.randint(0, 31, (R, C - 1, B), generator=generator)
    weight[3, :, 1:] = weight[2, :, :-1]
    assert level_cut.fits(price)
    found = level_cut.source_side(price.to(kernel_device), weight.to(kernel_device)).cpu()
    assert torch.equal(found, source_side(price, weight))
    assert B == 2 or found.float().mean().item() not in (0.0, 1.0)


def test_cuts_of_many_arcs_are_left_to_the_eager_form():
    from timm_alignmix.kernels import level_cut

    assert level_cut.fits(torch.empty(4, 16, 16, 1)) and not level_cut.fits(torch.empty(5, 16, 16, 1))


# ---------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('B, D, R', ((2, 100, 49), (1, 70, 130), (3, 5, 1)))
def test_cost_of_half_precision_features(kernel_device, B, D, R, dtype):
    """One map stored channels first, the other channels last; error in units of 2**-24 of the norms."""
    from timm_alignmix.kernels.cost import transport_cost

    a_BDR = (20 * torch.rand(B, D, R)).to(dtype)
    b_BDR = (20 * torch.rand(B, R, D)).to(dtype).transpose(1, 2)
    cost_BRR = transport_cost(a_BDR.to(kernel_device), b_BDR.to(kernel_device)).cpu()
    assert cost_BRR.dtype == torch.float32 and (cost_BRR >= 0).all()
    a_BDR, b_BDR = a_BDR.double(), b_BDR.double()
    exact = (a_BDR.unsqueeze(3) - b_BDR.unsqueeze(2)).square().sum(1)
    norms = a_BDR.square().sum(1).unsqueeze(2) + b_BDR.square().sum(1).unsqueeze(1)
    assert ((cost_BRR - exact).abs() / norms).max() < 16 * 2 ** -24


# ---------------------------------------------------------------------------------------------------------- dense loss


def dense_case(B, R, N, C, m=None):
    logits_BRC = 4 * torch.randn(B, R, C)
    weights_RNB = convex_weights(N, B, m=m, positions=R)
    attention_BR = torch.rand(B, R)
    return logits_BRC, weights_RNB, attention_BR


def textbook(logits_BRC, target_BC, weights_RNB, attention_BR):
    """Equations (10)-(14) in float64, the gradient by autograd."""
    logits_BRC = logits_BRC.double().requires_grad_()
    mass_RNB = weights_RNB.double()
    if attention_BR is not None:
        mass_RNB = mass_RNB * attention_BR.double().t().unsqueeze(1)
    sums_RN = mass_RNB.sum(2)
    mixed_RNB = mass_RNB / torch.where(sums_RN > 0, sums_RN, 1).unsqueeze(2)
    log_probs_RNC = (mixed_RNB @ logits_BRC.transpose(0, 1)).log_softmax(2)
    losses_RN = -(mixed_RNB @ target_BC.double() * log_probs_RNC).sum(2)
    total_R = sums_RN.sum(1)
    losses_R = (sums_RN * losses_RN).sum(1) / torch.where(total_R > 0, total_R, 1)
    attended = losses_R.new_tensor(1.0 * len(losses_R)) if attention_BR is None else (attention_BR > 0).any(0).sum()
    loss = losses_R.sum() / attended.clamp(min=1)
    return loss, torch.autograd.grad(loss, logits_BRC)[0]


def gradient_error(grad, expected):
    """Largest error relative to the largest entry; gradients come times a constant, in the type of the logits."""
    return ((grad.cpu().double() / losses.GRAD_SCALE - expected).abs().max() / expected.abs().max()).item()


# Sums of float32; half-precision logits meet vectors of 11 bits, whose errors have only 210 examples to average over.
# Gradients are rounded to the type of the logits.
TOLERANCES = {torch.float32: (2e-6, 2e-6), torch.float16: (2e-5, 2 ** -10), torch.bfloat16: (2e-5, 2 ** -8)}


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('kind', ('hard', 'soft'))
@pytest.mark.parametrize('smoothing', (0.0, 0.1))
@pytest.mark.parametrize('attended', (False, True))
def test_dense_loss_and_gradient(kernel_device, dtype, kind, smoothing, attended):
    """Sizes that fill no block: 9 examples, 70 vectors, 150 classes; some positions and vectors without attention."""
    from timm_alignmix.kernels import dense_loss

    B, R, N, C = 9, 3, 70, 150
    logits_BRC, weights_RNB, attention_BR = dense_case(B, R, N, C)
    logits_BRC = logits_BRC.to(dtype)
    if attended:
        attention_BR[:, 1] = 0
        attention_BR[2] = 0
        weights_RNB[:, 4] = 0
        weights_RNB[:, 4, 2] = 1  # draws on an example without attention alone
        attention_BR[:, 2] *= 1e-30
    else:
        attention_BR = None
    target = torch.randint(C, (B,)) if kind == 'hard' else torch.rand(B, C).softmax(1)
    arguments = [logits_BRC, target, weights_RNB, attention_BR]
    loss, grad, empty = dense_loss.loss_and_grads(
        *(None if t is None else t.to(kernel_device) for t in arguments), smoothing, True)
    expected, expected_grad = textbook(
        logits_BRC, losses.soft_target(target, C, smoothing, torch.float64), weights_RNB, attention_BR)
    loss_tolerance, grad_tolerance = TOLERANCES[dtype]
    assert loss.dtype == torch.float32 and grad.dtype == dtype and empty.numel() == 0
    assert loss.item() == pytest.approx(expected.item(), rel=loss_tolerance)
    assert gradient_error(grad, expected_grad) <= grad_tolerance


@pytest.mark.parametrize('dtype', HALF)
def test_dense_loss_of_many_examples(kernel_device, dtype):
    """Errors of half precision average out over examples, so bounds are tighter."""
    from timm_alignmix.kernels import dense_loss

    B, R, N, C = 32, 33, 1000, 40
    logits_BRC, weights_RNB, attention_BR = dense_case(B, R, N, C)
    logits_BRC = logits_BRC.to(dtype)
    target = torch.randint(C, (B,))
    loss, grad, _ = dense_loss.loss_and_grads(
        *(t.to(kernel_device) for t in (logits_BRC, target, weights_RNB, attention_BR)), 0.0, True)
    expected, expected_grad = textbook(logits_BRC, losses.soft_target(target, C), weights_RNB, attention_BR)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient_error(grad, expected_grad) <= (2 ** -10 if dtype == torch.float16 else 2 ** -8)


@pytest.mark.parametrize('attended', (False, True))
@pytest.mark.parametrize('dtype, B', ((torch.float32, 130), (torch.float16, 258), (torch.bfloat16, 300)))
def test_dense_loss_of_large_batches(kernel_device, dtype, B, attended):
    """More examples than a program holds at once: three tiles, the last of which is partly filled."""
    from timm_alignmix.kernels import dense_loss

    R, N, C = 2, 40, 70
    logits_BRC, weights_RNB, attention_BR = dense_case(B, R, N, C, m=5)  # few of many, else all mixtures are alike
    logits_BRC = logits_BRC.to(dtype)
    if attended:
        attention_BR[:128, 1] = 0  # vectors whose first tile, or all of it, has no attention
    target = torch.randint(C, (B,))
    arguments = [logits_BRC, target, weights_RNB, attention_BR if attended else None]
    loss, grad, _ = dense_loss.loss_and_grads(
        *(None if t is None else t.to(kernel_device) for t in arguments), 0.1, True)
    expected, expected_grad = textbook(
        logits_BRC, losses.soft_target(target, C, 0.1, torch.float64), weights_RNB, arguments[3])
    loss_tolerance, grad_tolerance = TOLERANCES[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=loss_tolerance)
    assert gradient_error(grad, expected_grad) <= grad_tolerance


def test_dense_loss_of_one_position_and_strided_logits(kernel_device):
    """MultiMix's case, and logits that are a transposed view; m < B leaves zeros in the vectors."""
    from timm_alignmix.kernels import dense_loss

    logits_BRC, weights_RNB, _ = dense_case(20, 1, 33, 10, m=3)
    target = torch.randint(10, (20,))
    expected, expected_grad = textbook(logits_BRC, losses.soft_target(target, 10), weights_RNB, None)
    for view in (logits_BRC, logits_BRC.transpose(0, 1).contiguous().transpose(0, 1),
                 logits_BRC.transpose(1, 2).contiguous().transpose(1, 2)):
        loss, grad, _ = dense_loss.loss_and_grads(
            view.to(kernel_device), target.to(kernel_device), weights_RNB.to(kernel_device), None, 0.0, True)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
        assert gradient_error(grad, expected_grad) <= 2e-6
    loss, grad, _ = dense_loss.loss_and_grads(
        logits_BRC.to(kernel_device), target.to(kernel_device), weights_RNB.to(kernel_device), None, 0.0, False)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6) and grad.numel() == 0


@pytest.mark.parametrize('dtype', HALF)
def test_dense_loss_survives_huge_logits_and_no_attention(kernel_device, dtype):
    from timm_alignmix.kernels import dense_loss

    logits_BRC = torch.zeros(3, 2, 5, dtype=dtype)
    logits_BRC[:, :, 0] = 57344
    target, weights_RNB = torch.tensor([0, 1, 2]), torch.full((2, 4, 3), 1 / 3)
    for attention_BR in (None, torch.zeros(3, 2)):
        arguments = [logits_BRC, target, weights_RNB, attention_BR]
        loss, grad, _ = dense_loss.loss_and_grads(
            *(None if t is None else t.to(kernel_device) for t in arguments), 0.0, True)
        assert loss.item() == pytest.approx(0 if attention_BR is not None else 57344 * 2 / 3, rel=1e-3)
        assert grad.isfinite().all() and (attention_BR is None or not grad.any())


@pytest.mark.parametrize('dtype', (torch.float16, torch.float32))
def test_offsets_beyond_32_bits(kernel_device, dtype):
    """256 examples of 576 positions and 21,841 classes are 3.2e9 logits; here three examples lie as far apart.

    The memory between them is never touched, so an operating system that hands it out on first use needs none.
    """
    from timm_alignmix.kernels import dense_loss

    stride = 2 ** 30 + 64
    if kernel_device.type == 'cuda' and torch.cuda.mem_get_info()[0] < 12 * stride:
        pytest.skip('needs 12 GiB of GPU memory')
    logits_BRC, weights_RNB, _ = dense_case(3, 2, 20, 10)
    logits_BRC, target = logits_BRC.to(dtype), torch.tensor([4, 0, 9])
    far_BRC = torch.empty(2 * stride + 20, dtype=dtype, device=kernel_device).as_strided((3, 2, 10), (stride, 10, 1))
    far_BRC.copy_(logits_BRC)
    expected, expected_grad = textbook(logits_BRC, losses.soft_target(target, 10), weights_RNB, None)
    loss, grad, _ = dense_loss.loss_and_grads(
        far_BRC, target.to(kernel_device), weights_RNB.to(kernel_device), None, 0.0, True)
    loss_tolerance, grad_tolerance = TOLERANCES[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=10 * loss_tolerance)
    assert gradient_error(grad, expected_grad) <= grad_tolerance
