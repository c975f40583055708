"""Transport cost, Sinkhorn plan and alignment against POT, the textbook forms and theory."""
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from timm_alignmix.functional import _precision, align, align_to, sinkhorn_plan, transport, transport_cost

from . import textbook
from .memory import largest_allocation

EXACT = {'rtol': 1e-10, 'atol': 1e-13}
SIDES = ('rows', 'columns')
MATMUL_BACKENDS = _precision._MATMUL  # none before torch 2.9


@pytest.fixture
def matmul_precision():
    """Start from the default process-wide matmul precision, and put back what was there."""
    saved = [backend.fp32_precision for backend in MATMUL_BACKENDS]
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision('highest')
    for backend, value in zip(MATMUL_BACKENDS, saved, strict=True):
        backend.fp32_precision = value


def features(B=3, D=5, R=6, seed=0, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(B, D, R, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def costs(B=3, R=7, scale=1.0, seed=0, dtype=torch.float64):
    return scale * torch.rand(B, R, R, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def pot_plan(cost_BRR, eps, iterations, final_marginal):
    """POT normalises columns first and rows last, so the other order is the plan of the transposed cost."""
    R = cost_BRR.shape[1]
    uniform = np.full(R, 1 / R)
    plans = []
    for cost_RR in cost_BRR.double().numpy():
        cost_RR = cost_RR if final_marginal == 'rows' else cost_RR.T
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # it warns when it has not converged
            plan_RR = ot.bregman.sinkhorn(
                uniform, uniform, cost_RR, eps, method='sinkhorn_log', numItermax=iterations, stopThr=0.0)
        plans.append(plan_RR if final_marginal == 'rows' else plan_RR.T)
    return torch.from_numpy(np.stack(plans))


# -------------------------------------------------------------------------------------------------------------- cost


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(0, 9))
def test_cost_is_the_summed_squared_distance(B, D, R, seed):
    a_BDR, b_BDR = features(B, D, R, seed, scale=3.0), features(B, D, R, seed + 100, scale=3.0)
    cost_BRR = transport_cost(a_BDR, b_BDR)
    assert cost_BRR.dtype == torch.float64
    torch.testing.assert_close(cost_BRR, textbook.transport_cost(a_BDR, b_BDR), rtol=1e-12, atol=1e-12)


def test_cost_by_hand():
    """(0, 0) and (3, 4) against (3, 0) and (0, 4): rows are positions of the first map."""
    a_BDR = torch.tensor([[[0.0, 3.0], [0.0, 4.0]]])
    b_BDR = torch.tensor([[[3.0, 1.0], [0.0, 4.0]]])
    assert torch.equal(transport_cost(a_BDR, b_BDR), torch.tensor([[[9.0, 17.0], [16.0, 4.0]]]))


def float32_cost_error(a_BDR, b_BDR):
    """Largest error in units of 2**-24 (|a|^2 + |b|^2), what fp32 rounding of the norms amounts to."""
    exact = torch.cdist(a_BDR.double().mT, b_BDR.double().mT, compute_mode='donot_use_mm_for_euclid_dist').pow(2)
    norms = a_BDR.double().pow(2).sum(1)[:, :, None] + b_BDR.double().pow(2).sum(1)[:, None]
    return ((transport_cost(a_BDR, b_BDR).double() - exact) / norms).abs().max().item() * 2**24


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize('autocast', (False, True))
def test_cost_computes_in_float32_at_least(dtype, autocast):
    """256 channels of about 20: squared norms of 1e5 are beyond float16, and bfloat16 would be off by 500."""
    a_BDR = features(2, 256, 49, 0, 20.0).abs().to(dtype)
    b_BDR = features(2, 256, 49, 1, 20.0).abs().to(dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        assert transport_cost(a_BDR, b_BDR).dtype == torch.float32
        error = float32_cost_error(a_BDR, b_BDR)
    assert error < 16


@pytest.mark.parametrize('precision', ('high', 'medium'))
@pytest.mark.parametrize('device', ('cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='no CUDA device'))))
def test_cost_ignores_the_float32_matmul_precision(precision, device, matmul_precision):
    a_BDR = features(2, 256, 64, 0, 20.0, torch.float32).to(device)
    b_BDR = features(2, 256, 64, 1, 20.0, torch.float32).to(device)
    expected = transport_cost(a_BDR, b_BDR)
    torch.set_float32_matmul_precision(precision)
    assert torch.equal(transport_cost(a_BDR, b_BDR), expected)
    assert float32_cost_error(a_BDR, b_BDR) < 16
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize('backend', MATMUL_BACKENDS)
def test_precision_set_through_the_per_backend_switches(backend, matmul_precision):
    """torch.backends.*.matmul.fp32_precision is the newer way to ask for TF32; the older getter then raises."""
    a_BDR = features(2, 64, 9, dtype=torch.float32)
    expected = align(a_BDR, a_BDR.flip(2))[0]
    backend.fp32_precision = 'tf32'
    settings_before = [b.fp32_precision for b in MATMUL_BACKENDS]
    actual = align(a_BDR, a_BDR.flip(2))[0]
    torch.testing.assert_close(actual, expected)
    assert [b.fp32_precision for b in MATMUL_BACKENDS] == settings_before


def test_cost_never_holds_all_differences():
    """(B, R, R, D) would be 16 times the features."""
    a_BDR = features(2, 64, 16)
    assert largest_allocation(lambda: transport_cost(a_BDR, a_BDR.flip(2)), itemsize=8) <= a_BDR.numel()


@pytest.mark.parametrize('shape_a, shape_b', (
    ((2, 3, 4), (2, 3, 5)), ((2, 3, 4), (2, 4, 4)), ((2, 3, 4), (1, 3, 4)), ((3, 4), (3, 4)), ((2, 3, 4, 4),) * 2,
))
@pytest.mark.parametrize('function', (transport_cost, align))
def test_features_that_do_not_fit_are_refused(function, shape_a, shape_b):
    with pytest.raises(ValueError, match=', '.join(map(str, shape_b))):
        function(torch.zeros(shape_a), torch.zeros(shape_b))


# -------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize('final_marginal', SIDES)
@pytest.mark.parametrize('scale, iterations', ((1.0, 100), (5.0, 100), (1.0, 1), (30.0, 7), (300.0, 100)))
def test_plan_equals_pot(scale, iterations, final_marginal):
    """Converged or not, at the same number of iterations."""
    cost_BRR = costs(scale=scale)
    plan_BRR = sinkhorn_plan(cost_BRR, iterations=iterations, final_marginal=final_marginal)
    assert plan_BRR.dtype == torch.float64
    expected = pot_plan(cost_BRR, 0.1, iterations, final_marginal)
    torch.testing.assert_close(plan_BRR, expected, rtol=1e-8, atol=1e-13)


def test_small_costs_reach_the_converged_plan():
    """The converged plan is unique: POT's own stopping rule, another algorithm and both orders agree."""
    cost_BRR = costs()
    uniform = np.full(7, 1 / 7)
    for final_marginal in SIDES:
        plan_BRR = sinkhorn_plan(cost_BRR, final_marginal=final_marginal)
        for plan_RR, cost_RR in zip(plan_BRR, cost_BRR, strict=True):
            for method in ('sinkhorn_log', 'sinkhorn'):
                expected = ot.bregman.sinkhorn(uniform, uniform, cost_RR.numpy(), 0.1, method=method, stopThr=1e-12)
                torch.testing.assert_close(plan_RR, torch.from_numpy(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize('final_marginal', SIDES)
@pytest.mark.parametrize('scale', (1.0, 10.0, 350.0, 1e4))
def test_float32_error_grows_as_cost_over_eps(scale, final_marginal):
    cost_BRR = costs(R=16, scale=scale, dtype=torch.float32)
    plan_BRR = sinkhorn_plan(cost_BRR, final_marginal=final_marginal)
    assert plan_BRR.dtype == torch.float32
    expected = pot_plan(cost_BRR, 0.1, 100, final_marginal)
    error = (plan_BRR - expected).abs().max() / expected.max()
    assert error <= max(scale / 0.1, 8) * 2**-24


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 5), R=st.integers(1, 9), iterations=st.sampled_from((0, 1, 2, 10, 50)),
    eps=st.sampled_from((0.05, 0.1, 1.0)), scale=st.sampled_from((0.0, 0.3, 20.0, 1e4)),
    final_marginal=st.sampled_from(SIDES), seed=st.integers(0, 99),
)
def test_plan_of_any_shape(B, R, iterations, eps, scale, final_marginal, seed):
    cost_BRR = costs(B, R, scale, seed)
    plan_BRR = sinkhorn_plan(cost_BRR, eps=eps, iterations=iterations, final_marginal=final_marginal)
    expected = textbook.sinkhorn_plan(cost_BRR, eps, iterations, final_marginal)
    torch.testing.assert_close(plan_BRR, expected, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(plan_BRR.sum((1, 2)), torch.ones(B, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize('dtype, tolerance', ((torch.float32, 5e-7), (torch.float64, 1e-14)))
@pytest.mark.parametrize('scale', (1.0, 350.0, 1e4))
@pytest.mark.parametrize('iterations', (0, 1, 100))
@pytest.mark.parametrize('final_marginal', SIDES)
def test_final_marginal_is_exact_at_any_cost(final_marginal, iterations, scale, dtype, tolerance):
    cost_BRR = costs(R=49, scale=scale, dtype=dtype)
    plan_BRR = sinkhorn_plan(cost_BRR, iterations=iterations, final_marginal=final_marginal)
    assert plan_BRR.isfinite().all() and (plan_BRR >= 0).all()
    marginal_BR = plan_BRR.sum(2 if final_marginal == 'rows' else 1)
    assert (49 * marginal_BR - 1).abs().max() <= tolerance
    assert (plan_BRR.sum((1, 2)) - 1).abs().max() <= tolerance


def test_final_marginal_names_the_exact_side_only():
    """Un-converged at a cost of 350, as methods of this kind run in practice: the other side is visibly off."""
    for final_marginal, exact, free in (('rows', 2, 1), ('columns', 1, 2)):
        plan_BRR = sinkhorn_plan(costs(R=49, scale=350.0), final_marginal=final_marginal)
        assert (49 * plan_BRR.sum(exact) - 1).abs().max() < 1e-12
        assert (49 * plan_BRR.sum(free) - 1).abs().max() > 0.05


@pytest.mark.parametrize('final_marginal', SIDES)
def test_zero_iterations_are_one_softmax(final_marginal):
    cost_BRR = costs(scale=2.0)
    plan_BRR = sinkhorn_plan(cost_BRR, eps=0.3, iterations=0, final_marginal=final_marginal)
    expected = torch.softmax(-cost_BRR / 0.3, 2 if final_marginal == 'rows' else 1) / 7
    torch.testing.assert_close(plan_BRR, expected, **EXACT)


def test_ten_thousand_is_finite_and_a_permutation_is_found():
    """Cost 0 on a permutation and 1e4 elsewhere: all the mass goes there."""
    permutation = torch.tensor([3, 0, 4, 1, 2])
    cost_BRR = torch.full((1, 5, 5), 1e4)
    cost_BRR[0, torch.arange(5), permutation] = 0
    for final_marginal in SIDES:
        plan_BRR = sinkhorn_plan(cost_BRR, final_marginal=final_marginal)
        assert torch.equal(plan_BRR[0].argmax(1), permutation)
        torch.testing.assert_close(plan_BRR[0].amax(1), torch.full((5,), 0.2))


def test_identical_or_zero_features_give_the_uniform_plan():
    for value in (0.0, 2.5):
        feat_BDR = torch.full((2, 4, 6), value)
        for iterations in (0, 100):
            plan_BRR = sinkhorn_plan(transport_cost(feat_BDR, feat_BDR), iterations=iterations)
            torch.testing.assert_close(plan_BRR, torch.full((2, 6, 6), 1 / 36))


def test_one_position_is_the_whole_plan():
    assert torch.equal(sinkhorn_plan(torch.tensor([[[1e4]]])), torch.ones(1, 1, 1))


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float16))
def test_plan_under_autocast_and_from_half_precision(dtype):
    """Costs of 350 in units of eps are 3500: any half precision step would be off by whole factors of e."""
    cost_BRR = costs(R=16, scale=350.0).to(dtype)
    with torch.autocast('cpu', torch.bfloat16):
        plan_BRR = sinkhorn_plan(cost_BRR)
    assert plan_BRR.dtype == torch.float32
    expected = pot_plan(cost_BRR, 0.1, 100, 'rows')
    assert (plan_BRR - expected).abs().max() / expected.max() <= 3500 * 2**-24


@pytest.mark.parametrize('tolerance', (None, 1e-3))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_inputs_are_left_alone(dtype, tolerance):
    cost_BRR = costs(dtype=dtype)
    before = cost_BRR.clone()
    sinkhorn_plan(cost_BRR, tolerance=tolerance)
    assert torch.equal(cost_BRR, before)
    a_BDR, b_BDR = features(dtype=dtype), features(seed=1, dtype=dtype)
    kept = a_BDR.clone(), b_BDR.clone()
    align(a_BDR, b_BDR, tolerance=tolerance)
    assert torch.equal(a_BDR, kept[0]) and torch.equal(b_BDR, kept[1])


@pytest.mark.parametrize('tolerance', (None, 1e-4, 1e-2, 0.1))
@pytest.mark.parametrize('final_marginal', SIDES)
def test_plan_of_a_sample_does_not_depend_on_its_batch(final_marginal, tolerance):
    """Batches of easy costs (converged at once), hard ones, and both."""
    cost_BRR = costs(B=8, R=9) * torch.tensor([0.0, 0.01, 0.1, 1.0, 3.0, 10.0, 100.0, 350.0])[:, None, None]
    together = sinkhorn_plan(cost_BRR, final_marginal=final_marginal, tolerance=tolerance)
    for i in range(8):
        alone = sinkhorn_plan(cost_BRR[i:i + 1], final_marginal=final_marginal, tolerance=tolerance)
        torch.testing.assert_close(together[i:i + 1], alone, **EXACT)


@pytest.mark.parametrize('final_marginal', SIDES)
def test_tolerance_stops_early_and_keeps_the_final_marginal(final_marginal):
    cost_BRR = costs(R=16, scale=10.0)
    full = sinkhorn_plan(cost_BRR, iterations=200, final_marginal=final_marginal)
    errors = []
    for tolerance in (1e-9, 1e-2, 1.0, 1e6):
        plan_BRR = sinkhorn_plan(cost_BRR, iterations=200, final_marginal=final_marginal, tolerance=tolerance)
        marginal_BR = plan_BRR.sum(2 if final_marginal == 'rows' else 1)
        assert (16 * marginal_BR - 1).abs().max() < 1e-12
        errors.append((plan_BRR - full).abs().max().item())
    assert errors[0] < 1e-8 < errors[1] < errors[2] < errors[3]


def test_plan_and_cost_carry_no_gradient():
    a_BDR = features().requires_grad_()
    assert not transport_cost(a_BDR, features(seed=1)).requires_grad
    assert not sinkhorn_plan(costs().requires_grad_()).requires_grad


@pytest.mark.parametrize('options, message', (
    ({'final_marginal': 'kept'}, 'kept'), ({'eps': 0.0}, '0.0'), ({'iterations': -1}, '-1'),
))
def test_bad_plan_options(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_plan(costs(), **options)


@pytest.mark.parametrize('shape', ((5, 5), (2, 3, 4), (1, 2, 3, 3)))
def test_bad_cost_shapes(shape):
    with pytest.raises(ValueError, match=', '.join(map(str, shape))):
        sinkhorn_plan(torch.zeros(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('tolerance', (None, 1e-3))
def test_plan_never_waits_for_the_device(tolerance):
    cost_BRR = costs(scale=10.0).cuda()
    torch.cuda.set_sync_debug_mode('error')
    try:
        plan_BRR = sinkhorn_plan(cost_BRR, tolerance=tolerance)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    torch.testing.assert_close(plan_BRR.cpu(), sinkhorn_plan(cost_BRR.cpu(), tolerance=tolerance), **EXACT)


def test_large_batches_are_taken_in_parts(monkeypatch):
    """A CPU works on as many samples at a time as its cache holds: here 2, 2 and 1."""
    cost_BRR = costs(B=5, R=9, scale=30.0)
    expected = sinkhorn_plan(cost_BRR)
    monkeypatch.setattr(transport, '_CPU_CHUNK', 2 * 81 + 1)
    torch.testing.assert_close(sinkhorn_plan(cost_BRR), expected, **EXACT)


@pytest.mark.parametrize('bad', (float('nan'), float('inf')))
def test_a_cost_that_is_not_finite_spoils_its_sample_alone(bad):
    cost_BRR = costs(B=3, R=9, scale=350.0)
    expected = sinkhorn_plan(cost_BRR)
    cost_BRR[1] = bad
    plan_BRR = sinkhorn_plan(cost_BRR)
    assert plan_BRR[1].isnan().all()
    torch.testing.assert_close(plan_BRR[::2], expected[::2], **EXACT)


@pytest.mark.parametrize('eps, scale', ((0.1, 350.0), (0.01, 350.0), (0.001, 1e4)))
def test_scaling_agrees_with_the_log_domain_where_potentials_keep_moving(eps, scale):
    """Costs that no hundred iterations converge on; a tolerance of 0 never stops and stays in the log domain."""
    cost_BRR = costs(B=4, R=25, scale=scale) * torch.rand(4, 25, 1, dtype=torch.float64).pow(3)
    scaled, logs = (sinkhorn_plan(cost_BRR, eps=eps, tolerance=tolerance) for tolerance in (None, 0.0))
    torch.testing.assert_close(scaled, logs, rtol=1e-7, atol=1e-13)
    low = sinkhorn_plan(cost_BRR.float(), eps=eps).double()
    exact = sinkhorn_plan(cost_BRR.float().double(), eps=eps)
    assert (low - exact).abs().max() / exact.max() <= scale / eps * 2 ** -24


# --------------------------------------------------------------------------------------------------------- alignment


def plans_of(a_BDR, b_BDR, final_marginal, iterations=100, eps=0.1):
    """The two plans, rows of A and columns of A', that (9) and (10) use."""
    cost_BRR = textbook.transport_cost(a_BDR.detach(), b_BDR.detach())
    sides = {'kept': ('rows', 'columns'), 'columns': ('columns', 'columns'), 'rows': ('rows', 'rows')}[final_marginal]
    return [textbook.sinkhorn_plan(cost_BRR, eps, iterations, side) for side in sides]


@pytest.mark.parametrize('final_marginal', ('kept', *SIDES))
@pytest.mark.parametrize('B, D, R, iterations', ((3, 5, 6, 100), (1, 2, 4, 3), (2, 4, 1, 100), (2, 3, 5, 0)))
def test_align_value_and_gradients_with_the_plan_held_constant(B, D, R, iterations, final_marginal):
    a_BDR, b_BDR = (features(B, D, R, seed, scale=2.0).requires_grad_() for seed in (0, 1))
    plans = plans_of(a_BDR, b_BDR, final_marginal, iterations)
    expected = textbook.align(a_BDR, b_BDR, *plans)
    actual = align(a_BDR, b_BDR, iterations=iterations, final_marginal=final_marginal)
    upstream = features(B, D, R, 2)
    for got, want, source, other in zip(actual, expected, (b_BDR, a_BDR), (a_BDR, b_BDR), strict=True):
        assert got.dtype == torch.float64 and got.shape == (B, D, R)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
        got_grads = torch.autograd.grad(got, (source, other), upstream, allow_unused=True)
        want_grads = torch.autograd.grad(want, (source, other), upstream, allow_unused=True)
        torch.testing.assert_close(got_grads[0], want_grads[0], rtol=1e-8, atol=1e-11)
        assert want_grads[1] is None and got_grads[1] is None  # nothing through the plan


def test_gradients_of_the_mix_reach_both_inputs():
    a_BDR, b_BDR = (features(seed=seed).requires_grad_() for seed in (0, 1))
    aligned_ab_BDR, _ = align(a_BDR, b_BDR)
    grad_a, grad_b = torch.autograd.grad((0.3 * a_BDR + 0.7 * aligned_ab_BDR).sum(), (a_BDR, b_BDR))
    torch.testing.assert_close(grad_a, torch.full_like(grad_a, 0.3), **EXACT)
    # Each position of A takes from A' weights that sum to 1, hence 0.7 for each position and channel.
    torch.testing.assert_close(grad_b.sum(2), torch.full((3, 5), 0.7 * 6, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize('final_marginal', ('kept', *SIDES))
def test_direction_of_the_plan(final_marginal):
    """b is a with its positions shuffled by a permutation that is not its own inverse: each side must undo it."""
    permutation = torch.tensor([2, 0, 3, 4, 1, 5])
    assert not torch.equal(permutation, permutation.argsort())
    a_BDR = features(D=16, scale=5.0)
    b_BDR = a_BDR[:, :, permutation]
    aligned_ab_BDR, aligned_ba_BDR = align(a_BDR, b_BDR, final_marginal=final_marginal)
    torch.testing.assert_close(aligned_ab_BDR, a_BDR, rtol=0, atol=1e-8)
    torch.testing.assert_close(aligned_ba_BDR, b_BDR, rtol=0, atol=1e-8)
    assert (a_BDR[:, :, permutation.argsort()] - b_BDR).abs().max() > 1  # what the transposed plan would give


def test_mixing_aligned_with_itself_is_the_identity_for_every_lambda():
    a_BDR = features(D=16, scale=5.0)
    for aligned_BDR in align(a_BDR, a_BDR):
        for lam in (1.0, 0.4, 0.0):
            torch.testing.assert_close(lam * a_BDR + (1 - lam) * aligned_BDR, a_BDR, rtol=0, atol=1e-8)


def test_kept_order_gives_convex_combinations():
    """Far from converged at large costs: weights still sum to 1, so a constant channel stays and ranges are kept."""
    a_BDR, b_BDR = (features(2, 8, 25, seed, scale=10.0, dtype=torch.float32) for seed in (0, 1))
    a_BDR[:, 0], b_BDR[:, 0] = 3.0, 7.0
    ab_BDR, ba_BDR = align(a_BDR, b_BDR)
    for aligned_BDR, source_BDR, constant in ((ab_BDR, b_BDR, 7.0), (ba_BDR, a_BDR, 3.0)):
        torch.testing.assert_close(aligned_BDR[:, 0], torch.full((2, 25), constant), rtol=2e-6, atol=0)
        slack = 1e-5 * source_BDR.abs().max()
        assert (aligned_BDR.amax(2) <= source_BDR.amax(2) + slack).all()
        assert (aligned_BDR.amin(2) >= source_BDR.amin(2) - slack).all()


@pytest.mark.parametrize('final_marginal, plans', (('kept', 2), ('columns', 1), ('rows', 1)))
def test_plans_are_computed_once(final_marginal, plans, monkeypatch):
    computed = []
    monkeypatch.setattr(
        transport, 'sinkhorn_plan_op', lambda *args: computed.append(args) or transport.plan_matrix(*args))
    align(features(), features(seed=1), final_marginal=final_marginal)
    assert len(computed) == plans


@pytest.mark.parametrize('final_marginal', ('kept', 'moved'))
def test_align_keeps_the_memory_layout(final_marginal):
    """The same values and gradients, with channels innermost where the features have them so."""
    a_BDR, b_BDR = features(), features(seed=1).requires_grad_()
    a_last, b_last = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (a_BDR, b_BDR))
    upstream = features(seed=2)
    plain = align_to(a_BDR, b_BDR, final_marginal=final_marginal)
    last = align_to(a_last, b_last.requires_grad_(), final_marginal=final_marginal)
    torch.testing.assert_close(last, plain, **EXACT)
    assert last.stride() == b_last.stride() and plain.stride() == b_BDR.stride()
    grad, = torch.autograd.grad(plain, b_BDR, upstream)
    grad_last, = torch.autograd.grad(last, b_last, upstream)
    torch.testing.assert_close(grad_last, grad, **EXACT)
    assert grad_last.stride() == b_last.stride() and grad.stride() == b_BDR.stride()


class Products(TorchDispatchMode):
    """Types of batched products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('channels_last', (False, True))
def test_autocast_sets_the_type_of_the_product_alone(channels_last):
    """Float32 features under autocast, as in a ViT's residual stream: the plan keeps float32's accuracy."""
    a_BDR, b_BDR = (features(2, 16, 9, seed, dtype=torch.float32) for seed in (0, 1))
    if channels_last:
        a_BDR, b_BDR = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (a_BDR, b_BDR))
    b_BDR.requires_grad_()
    upstream = features(2, 16, 9, 2, dtype=torch.float32)
    with Products() as products:
        with torch.autocast('cpu', torch.bfloat16):
            aligned_BDR = align_to(a_BDR, b_BDR)
        grad_BDR, = torch.autograd.grad(aligned_BDR, b_BDR, upstream)
    assert products.dtypes == [torch.bfloat16] * 2  # forward and backward
    assert aligned_BDR.dtype == grad_BDR.dtype == torch.float32
    plan_BRR, _ = plans_of(a_BDR, b_BDR, 'kept')
    expected_BDR, _ = textbook.align(a_BDR.double(), b_BDR.double(), plan_BRR, plan_BRR)
    expected_grad_BDR = upstream.double() @ (9 * plan_BRR)
    for got, want in ((aligned_BDR, expected_BDR), (grad_BDR, expected_grad_BDR)):
        assert (got - want).abs().max() <= 2 ** -7 * want.abs().max()


@pytest.mark.parametrize('final_marginal', SIDES)
def test_one_plan_serves_both_sides(final_marginal):
    """Not so for 'kept': there both constant channels stay, here the side that is not exact shows."""
    a_BDR, b_BDR = (features(2, 8, 25, seed, scale=10.0) for seed in (0, 1))
    a_BDR[:, 0] = b_BDR[:, 0] = 1.0
    scale_ab_BR, scale_ba_BR = (aligned[:, 0] for aligned in align(a_BDR, b_BDR, final_marginal=final_marginal))
    plan_BRR, _ = plans_of(a_BDR, b_BDR, final_marginal)
    torch.testing.assert_close(scale_ab_BR, 25 * plan_BRR.sum(2), rtol=1e-8, atol=0)
    torch.testing.assert_close(scale_ba_BR, 25 * plan_BRR.sum(1), rtol=1e-8, atol=0)
    off = scale_ab_BR if final_marginal == 'columns' else scale_ba_BR
    assert (off - 1).abs().max() > 0.02


@pytest.mark.parametrize('iterations', (0, 100))
@pytest.mark.parametrize('dtype, tolerance', ((torch.float32, 1e-6), (torch.float64, 1e-13)))
def test_alignment_cancels_in_global_average_pooling(dtype, tolerance, iterations):
    """With exact columns the pooled mix (11) is the pooled unaligned mix; with exact rows so is that of (12)."""
    a_BDR, b_BDR = (features(3, 32, 49, seed, scale=5.0, dtype=dtype).relu() for seed in (0, 1))
    for lam in (0.0, 0.3):
        ab_BDR, _ = align(a_BDR, b_BDR, iterations=iterations, final_marginal='columns')
        _, ba_BDR = align(a_BDR, b_BDR, iterations=iterations, final_marginal='rows')
        for kept, aligned, moved in ((a_BDR, ab_BDR, b_BDR), (b_BDR, ba_BDR, a_BDR)):
            pooled = (lam * kept + (1 - lam) * aligned).mean(2)
            unaligned = (lam * kept + (1 - lam) * moved).mean(2)
            torch.testing.assert_close(pooled, unaligned, rtol=tolerance, atol=0)
            assert (aligned - moved).abs().max() > 1  # though the positions did move


@pytest.mark.parametrize('autocast', (False, True))
@pytest.mark.parametrize('dtype, tolerance', ((torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)))
def test_align_in_every_precision(dtype, tolerance, autocast):
    """As accurate as the type of the product holds: the inputs' own, or autocast's."""
    tolerance = 2 ** -7 if autocast else tolerance
    a_BDR, b_BDR = (features(2, 16, 9, seed).to(dtype) for seed in (0, 1))
    expected = textbook.align(a_BDR.double(), b_BDR.double(), *plans_of(a_BDR, b_BDR, 'kept'))
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        actual = align(a_BDR, b_BDR)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def test_align_is_equivariant_to_a_common_shift_of_the_features():
    """Distances do not move, the convex combinations move along."""
    a_BDR, b_BDR = features(), features(seed=1)
    for shifted, plain in zip(align(a_BDR + 3.0, b_BDR + 3.0), align(a_BDR, b_BDR), strict=True):
        torch.testing.assert_close(shifted, plain + 3.0, rtol=1e-8, atol=1e-10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.sampled_from(('kept', *SIDES)),
    st.sampled_from((0.0, 1.0, 100.0)), st.integers(0, 9),
)
def test_align_any_shape(B, D, R, final_marginal, scale, seed):
    a_BDR, b_BDR = features(B, D, R, seed, scale), features(B, D, R, seed + 100, scale)
    expected = textbook.align(a_BDR, b_BDR, *plans_of(a_BDR, b_BDR, final_marginal, iterations=20))
    actual = align(a_BDR, b_BDR, iterations=20, final_marginal=final_marginal)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 * scale)


def test_bad_final_marginal():
    with pytest.raises(ValueError, match='both'):
        align(features(), features(seed=1), final_marginal='both')
