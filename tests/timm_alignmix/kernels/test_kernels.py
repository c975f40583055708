"""Triton kernels against float64 forms and POT: on a GPU, or interpreted (see test_interpreter.py)."""
import itertools
import warnings

import numpy as np
import ot
import pytest
import torch
from scipy import stats

from timm_alignmix.functional import convex_weights, losses, transport

pytest.importorskip('triton', reason='Triton is not installed: its kernels are not used either')
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


# --------------------------------------------------------------------------------------------------------------- draws


def philox_words(seed, *counter):
    """Four 32-bit words of Philox 4x32-10 (Salmon et al., 2011) for arrays of counters, as int64."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in np.broadcast_arrays(*counter))
    low, key = np.uint64(2 ** 32 - 1), [np.uint64(seed % 2 ** 32), np.uint64(seed >> 32)]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ key[0], b & low, (a >> np.uint64(32)) ^ c3 ^ key[1], a & low
        key = [(k + np.uint64(step)) & low for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return [c.astype(np.int64) for c in (c0, c1, c2, c3)]


def uniform(word):
    """In (0, 1), from a word read as a signed integer whose negative half is folded."""
    folded = np.where(word < 2 ** 31, word, 2 ** 32 - 1 - word)
    return np.maximum(folded / 2 ** 31, 2.3e-10)


def dirichlet_rows_float64(alpha_N, m, seed):
    """What the kernel is meant to draw: two proposals of Marsaglia and Tsang from four words, again where both fail."""
    alpha = alpha_N[:, None]
    d = alpha + 1 - 1 / 3
    gamma = np.full((len(alpha_N), m), np.nan)
    for attempt in itertools.count():
        if not np.isnan(gamma).any():
            return gamma / gamma.sum(1, keepdims=True)
        words = philox_words(seed, np.arange(len(alpha_N))[:, None], np.arange(m), attempt, 0)
        radius = np.sqrt(-2 * np.log(np.maximum(uniform(words[0]), 1e-7)))
        for normal, word in ((radius * np.cos(2 * np.pi * uniform(words[1])), words[2]),
                             (radius * np.sin(2 * np.pi * uniform(words[1])), words[3])):
            v = np.maximum(1 + normal / np.sqrt(9 * d), 1e-12) ** 3
            t = np.minimum(np.exp(normal ** 2 / 2 + d - d * v + d * np.log(v)), 1)
            value = d * v * (uniform(word) / t) ** (1 / alpha)
            gamma = np.where(np.isnan(gamma) & (uniform(word) <= t), value, gamma)


def test_philox_words():
    """The known answers that its authors publish."""
    assert [hex(w) for w in philox_words(0, 0, 0, 0, 0)] == ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    ones = 2 ** 32 - 1
    assert [hex(w) for w in philox_words(2 ** 64 - 1, ones, ones, ones, ones)] == [
        '0x408f276d', '0x41c83b0e', '0xa20bc7c6', '0x6d5451fd']


@pytest.mark.parametrize('alpha', (0.5, 2.0, 20.0))
def test_the_law_of_what_is_meant_to_be_drawn(alpha):
    N, m = 400_000, 4
    rows = dirichlet_rows_float64(np.full(N, alpha), m, 7)
    for i in range(m):
        assert stats.kstest(rows[:, i], stats.beta(alpha, (m - 1) * alpha).cdf).pvalue > 1e-3
    assert stats.kstest(rows[:, 0] + rows[:, 1], stats.beta(2 * alpha, (m - 2) * alpha).cdf).pvalue > 1e-3
    squares = (rows ** 2).sum(1)
    assert abs(squares.mean() - (alpha + 1) / (m * alpha + 1)) < 4 * squares.std() / N ** 0.5
    assert stats.spearmanr(rows[1:, 0], rows[:-1, 0]).pvalue > 1e-3


@pytest.mark.parametrize('N, m', ((6000, 3), (100, 70), (5, 1)))
def test_dirichlet_rows(kernel_device, N, m):
    """The kernel draws what it is meant to, each row with its own alpha; blocks that are not full."""
    from timm_alignmix.kernels.dirichlet import dirichlet_rows

    alpha_N, seed = np.random.default_rng(0).uniform(0.3, 2, N), 2 ** 61 + 5
    rows = dirichlet_rows(
        torch.from_numpy(alpha_N).float().to(kernel_device), m, torch.tensor([seed], device=kernel_device)).cpu()
    assert rows.shape == (N, m) and (rows > 0).all() and ((rows.sum(1) - 1).abs() < 1e-6).all()
    expected = dirichlet_rows_float64(alpha_N.astype(np.float32).astype(np.float64), m, seed)
    equal = np.isclose(rows.numpy(), expected, rtol=1e-3, atol=1e-6).all(1)
    assert equal.mean() > 0.998  # a proposal at its limit may be taken in one precision and not in the other


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


# Sums of float32; half-precision logits meet vectors of 16 or 22 bits, and products of 11 bits in the gradient.
TOLERANCES = {torch.float32: (2e-6, 2e-6), torch.float16: (2e-6, 2 ** -11), torch.bfloat16: (1e-5, 2 ** -11)}


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
    assert loss.dtype == grad.dtype == torch.float32 and empty.numel() == 0
    assert loss.item() == pytest.approx(expected.item(), rel=loss_tolerance)
    assert (grad.cpu() - expected_grad).abs().max() <= grad_tolerance * expected_grad.abs().max()


@pytest.mark.parametrize('dtype', HALF)
def test_dense_loss_of_many_examples(kernel_device, dtype):
    """One product in place of two, at the sizes where it is chosen: errors average out, so bounds are tighter."""
    from timm_alignmix.kernels import dense_loss, mixed_logits

    B, R, N, C = 32, 33, 1000, 40
    assert mixed_logits.choose_operands(dtype, R * N) == 'half'
    logits_BRC, weights_RNB, attention_BR = dense_case(B, R, N, C)
    logits_BRC = logits_BRC.to(dtype)
    target = torch.randint(C, (B,))
    loss, grad, _ = dense_loss.loss_and_grads(
        *(t.to(kernel_device) for t in (logits_BRC, target, weights_RNB, attention_BR)), 0.0, True)
    expected, expected_grad = textbook(logits_BRC, losses.soft_target(target, C), weights_RNB, attention_BR)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (grad.cpu() - expected_grad).abs().max() <= 2 ** -12 * expected_grad.abs().max()


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
        torch.testing.assert_close(grad.cpu(), expected_grad.float(), rtol=1e-4, atol=1e-7)
    loss, grad, _ = dense_loss.loss_and_grads(
        logits_BRC.to(kernel_device), target.to(kernel_device), weights_RNB.to(kernel_device), None, 0.0, False)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6) and grad.numel() == 0


@pytest.mark.parametrize('many', (2 ** 15, 1))
@pytest.mark.parametrize('dtype', HALF)
def test_dense_loss_survives_huge_logits_and_no_attention(kernel_device, dtype, many, monkeypatch):
    from timm_alignmix.kernels import dense_loss, mixed_logits

    monkeypatch.setattr(mixed_logits, 'MANY', many)
    logits_BRC = torch.zeros(3, 2, 5, dtype=dtype)
    logits_BRC[:, :, 0] = 57344
    target, weights_RNB = torch.tensor([0, 1, 2]), torch.full((2, 4, 3), 1 / 3)
    for attention_BR in (None, torch.zeros(3, 2)):
        arguments = [logits_BRC, target, weights_RNB, attention_BR]
        loss, grad, _ = dense_loss.loss_and_grads(
            *(None if t is None else t.to(kernel_device) for t in arguments), 0.0, True)
        assert loss.item() == pytest.approx(0 if attention_BR is not None else 57344 * 2 / 3, rel=1e-3)
        assert grad.isfinite().all() and (attention_BR is None or not grad.any())
