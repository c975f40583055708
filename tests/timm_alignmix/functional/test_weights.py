"""Interpolation vectors: their law (scipy, numpy), supports, independence and reproducibility."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from timm_alignmix.functional import convex_weights

REJECTED = 1e-6  # p-value under which a law is refuted; seeds are fixed, so a right law never lands there by chance
ACCEPTED = 1e-3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dirichlet(alpha_NB, rng):
    """Rows normalised from Gamma draws with any concentration per entry."""
    gamma_NB = rng.standard_gamma(alpha_NB)
    return gamma_NB / gamma_NB.sum(1, keepdims=True)


def dispersion(weights_NB):
    """Sum of squares of a row: near 1 for a small alpha, near 1/B for a large one."""
    return np.square(np.asarray(weights_NB, dtype=np.float64)).sum(-1)


@pytest.mark.parametrize('alpha', (0.3, 1.0, 4.0))
def test_fixed_alpha_has_beta_marginals(alpha):
    B = 6
    weights_NB = convex_weights(4000, B, alpha=alpha, generator=seeded(), dtype=torch.float64).numpy()
    for i in range(B):
        assert stats.kstest(weights_NB[:, i], stats.beta(alpha, (B - 1) * alpha).cdf).pvalue > ACCEPTED
    pair = stats.beta(2 * alpha, (B - 2) * alpha).cdf  # sums of entries are Beta too: the joint law, not marginals only
    assert stats.kstest(weights_NB[:, 1] + weights_NB[:, 4], pair).pvalue > ACCEPTED


@pytest.mark.parametrize('alpha', (0.5, 2.0, 20.0))
def test_marginals_of_many_draws(alpha):
    """Enough to see the few that a proposal gets wrong, and over several blocks of draws."""
    B = 4
    weights_NB = convex_weights(300_000, B, alpha=alpha, generator=seeded(6)).double().numpy()
    law = stats.beta(alpha, (B - 1) * alpha)
    for i in range(B):
        assert stats.kstest(weights_NB[:, i], law.cdf).pvalue > ACCEPTED
    for probability in (1e-4, 1 - 1e-4):  # the tails, which that test hardly sees
        below = (weights_NB < law.ppf(probability)).sum(0)
        assert (abs(below - 300_000 * probability) < 5 * 30 ** 0.5).all()


@pytest.mark.parametrize('alpha', (0.5, 2.0))
def test_second_moment_of_millions_of_draws(alpha):
    """E sum_i w_i^2 = (alpha + 1) / (B alpha + 1) of Dir(alpha), to a few parts in ten thousand."""
    B = 4
    squares_N = dispersion(convex_weights(2_000_000, B, alpha=alpha, generator=seeded(7)))
    error = squares_N.std() / len(squares_N) ** 0.5
    assert abs(squares_N.mean() - (alpha + 1) / (B * alpha + 1)) < 3.5 * error


def test_a_pair_of_equal_alphas_is_that_alpha():
    weights_NB = convex_weights(4000, 5, alpha=(0.7, 0.7), generator=seeded(1)).numpy()
    assert stats.kstest(weights_NB[:, 2], stats.beta(0.7, 4 * 0.7).cdf).pvalue > ACCEPTED


@pytest.mark.parametrize('low, high', ((0.5, 2.0), (0.05, 50.0)))
def test_one_alpha_for_each_row(low, high):
    """The law of a row's dispersion tells one alpha per row from one per matrix, per entry or per example."""
    N, B = 4000, 12
    rng = np.random.default_rng(0)
    drawn = dispersion(convex_weights(N, B, alpha=(low, high), generator=seeded(2)))
    per_row = dispersion(dirichlet(np.repeat(rng.uniform(low, high, (8 * N, 1)), B, 1), rng))
    assert stats.ks_2samp(drawn, per_row).pvalue > ACCEPTED

    per_matrix = dispersion(dirichlet(np.full((N, B), rng.uniform(low, high)), rng))
    per_entry = dispersion(dirichlet(rng.uniform(low, high, (N, B)), rng))
    per_example = dispersion(dirichlet(np.repeat(rng.uniform(low, high, (1, B)), N, 0), rng))
    from_zero = dispersion(dirichlet(np.repeat(rng.uniform(0.001, high, (N, 1)), B, 1), rng))
    wrong = [per_matrix, per_entry, per_example] + ([from_zero] if low == 0.5 else [])
    for other in wrong:
        assert stats.ks_2samp(other, per_row).pvalue < REJECTED  # the statistic does tell


def test_the_default_alpha_is_uniform_from_a_half_to_two():
    rng = np.random.default_rng(1)
    drawn = dispersion(convex_weights(4000, 12, generator=seeded(3)))
    expected = dispersion(dirichlet(np.repeat(rng.uniform(0.5, 2.0, (32000, 1)), 12, 1), rng))
    assert stats.ks_2samp(drawn, expected).pvalue > ACCEPTED


@pytest.mark.parametrize('B, m', ((7, 3), (6, 1), (5, 5), (9, 8)))
def test_support_is_exactly_m(B, m):
    weights_NB = convex_weights(500, B, m=m, generator=seeded(4))
    assert ((weights_NB > 0).sum(1) == m).all()
    if m == 1:
        assert set(weights_NB.unique().tolist()) == {0.0, 1.0}


def test_subsets_are_uniform_and_rows_within_them_dirichlet():
    B, m, alpha = 5, 2, 1.5
    weights_NB = convex_weights(6000, B, alpha=alpha, m=m, generator=seeded(5), dtype=torch.float64)
    codes = ((weights_NB > 0).long() * 2 ** torch.arange(B)).sum(1)
    subsets, counts = codes.unique(return_counts=True)
    assert len(subsets) == 10
    assert stats.chisquare(counts.numpy()).pvalue > ACCEPTED
    first = weights_NB[:, 0][weights_NB[:, 0] > 0].numpy()
    assert stats.kstest(first, stats.beta(alpha, (m - 1) * alpha).cdf).pvalue > ACCEPTED


def correlation(x, y):
    return stats.spearmanr(x, y).pvalue


def test_positions_are_independent():
    """The vector, its alpha and its subset are all drawn anew at each position."""
    R, N, B, m = 4, 3000, 8, 4
    full_RNB = convex_weights(N, B, alpha=(0.05, 50.0), generator=seeded(6), positions=R).double().numpy()
    part_RNB = convex_weights(N, B, alpha=(0.05, 50.0), m=m, generator=seeded(7), positions=R).double().numpy()
    assert full_RNB.shape == part_RNB.shape == (R, N, B)
    for j in range(R):
        for k in range(j):
            assert correlation(full_RNB[j, :, 0], full_RNB[k, :, 0]) > ACCEPTED  # entries
            assert correlation(dispersion(full_RNB[j]), dispersion(full_RNB[k])) > ACCEPTED  # alphas
            overlap = ((part_RNB[j] > 0) & (part_RNB[k] > 0)).sum(1)  # subsets: hypergeometric overlap
            counts = np.bincount(overlap, minlength=m + 1)
            expected = N * stats.hypergeom(B, m, m).pmf(np.arange(m + 1))
            assert stats.chisquare(counts, expected).pvalue > ACCEPTED


def test_rows_are_independent():
    weights_NB = convex_weights(4001, 8, alpha=(0.05, 50.0), generator=seeded(8)).double().numpy()
    assert correlation(weights_NB[1:, 0], weights_NB[:-1, 0]) > ACCEPTED
    assert correlation(dispersion(weights_NB[1:]), dispersion(weights_NB[:-1])) > ACCEPTED


def test_every_position_has_the_law_of_a_matrix():
    rng = np.random.default_rng(2)
    weights_RNB = convex_weights(500, 12, alpha=(0.05, 50.0), generator=seeded(9), positions=6)
    expected = dispersion(dirichlet(np.repeat(rng.uniform(0.05, 50.0, (24000, 1)), 12, 1), rng))
    assert stats.ks_2samp(dispersion(weights_RNB).ravel(), expected).pvalue > ACCEPTED


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    n, batch = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    m = data.draw(st.one_of(st.none(), st.integers(1, batch)))
    positions = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    alpha = data.draw(st.sampled_from((0.01, 0.5, 200.0, (0.5, 2.0), (0.01, 100.0))))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    options = dict(alpha=alpha, m=m, positions=positions, dtype=dtype)
    weights = convex_weights(n, batch, generator=seeded(1), **options)
    assert weights.shape == ((n, batch) if positions is None else (positions, n, batch))
    assert weights.dtype == dtype
    assert (weights >= 0).all() and ((weights > 0).sum(-1) <= (m or batch)).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=dtype))
    if batch == 1:
        assert torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(weights, convex_weights(n, batch, generator=seeded(1), **options))


@pytest.mark.parametrize('options', ({}, {'m': 3}, {'positions': 2}, {'m': 3, 'positions': 2}))
def test_draws_come_from_the_generator_alone(options):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = convex_weights(5, 8, generator=seeded(1), **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, convex_weights(5, 8, generator=seeded(1), **options))
    assert not torch.equal(first, convex_weights(5, 8, generator=seeded(2), **options))
    generator = seeded(1)
    convex_weights(5, 8, generator=generator, **options)
    assert not torch.equal(first, convex_weights(5, 8, generator=generator, **options))  # the generator moves on


def test_autocast_does_not_touch_the_draw():
    expected = convex_weights(20, 9, generator=seeded(3), m=5)
    with torch.autocast('cpu', torch.bfloat16):
        actual = convex_weights(20, 9, generator=seeded(3), m=5)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


@pytest.mark.parametrize('arguments, message', (
    ({'m': 6}, '6'), ({'m': 0}, '0'), ({'n': 0}, '0'), ({'batch': 0}, '0'),
    ({'alpha': 0.0}, '0.0'), ({'alpha': (-1.0, 2.0)}, '-1.0'), ({'alpha': (2.0, 0.5)}, '2.0, 0.5'),
))
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        convex_weights(**{'n': 4, 'batch': 5, **arguments})
