"""Expansion moves against all labellings and all sets of blocks, and Co-Mixup's sweeps written again in loops."""
import itertools

import numpy as np
import pytest
import torch

from timm_alignmix.functional import alpha_expansion, co_labels, co_mixup_labels


def problem(B, L, R, C, smooth=0.3, seed=0):
    """Costs, distances that are no metric, and labels to start from."""
    g = torch.Generator().manual_seed(seed)
    cost = torch.randn(B, L, R, C, generator=g, dtype=torch.float64)
    distance = torch.rand(B, L, L, generator=g, dtype=torch.float64).triu(1) * smooth
    return cost, distance + distance.transpose(1, 2), torch.randint(L, (B, R, C), generator=g)


def energy(cost, distance, label):
    """Energy of one grid, by loops."""
    (R, C), total = label.shape, 0.0
    for r, c in np.ndindex(R, C):
        total += cost[label[r][c], r, c]
        if r + 1 < R:
            total += distance[label[r][c], label[r + 1][c]]
        if c + 1 < C:
            total += distance[label[r][c], label[r][c + 1]]
    return total


def energies(cost, distance, labels):
    """Energies (n,) of many labels (n, R, C) of one grid."""
    own = sum(cost[labels[:, r, c], r, c] for r, c in np.ndindex(*labels.shape[1:]))
    return own + distance[labels[:, 1:], labels[:, :-1]].sum(axis=(1, 2)) + distance[
        labels[:, :, 1:], labels[:, :, :-1]].sum(axis=(1, 2))


@pytest.mark.parametrize('R, C, L', [(4, 4, 3), (2, 3, 4), (3, 2, 6), (1, 4, 3), (4, 1, 3)])
def test_a_move_is_the_best_of_all_labels_and_sets_of_blocks(R, C, L):
    """Of a 4x4 grid those are 65,536 sets."""
    every = (np.arange(2 ** (R * C))[:, None] >> np.arange(R * C) & 1).reshape(-1, R, C) > 0
    moved = 0
    for smooth in (0.0, 0.3, 1.5):
        cost, distance, start = (x.numpy() for x in problem(4, L, R, C, smooth, seed=R * C))
        found = alpha_expansion(*map(torch.from_numpy, (cost, distance, start)), moves=1).numpy()
        for i in range(4):
            least = min(
                energies(cost[i], distance[i], np.where(every, label, start[i])).min() for label in range(L))
            assert energy(cost[i], distance[i], found[i]) == pytest.approx(least, abs=1e-12)
            moved += (found[i] != start[i]).any()
    assert moved > 6


@pytest.mark.parametrize('smooth', [0.1, 1.0])
def test_moves_lower_the_energy_until_none_does(smooth):
    cost, distance, start = problem(30, 6, 4, 4, smooth)
    before = start
    for moves in range(1, 12):
        label = alpha_expansion(cost, distance, start, moves)
        for c, d, old, new in zip(*(x.numpy() for x in (cost, distance, before, label)), strict=True):
            assert energy(c, d, new) < energy(c, d, old) or np.array_equal(old, new)
        before = label
    assert torch.equal(alpha_expansion(cost, distance, label), label)
    alone = [alpha_expansion(cost[i:i + 1], distance[i:i + 1], start[i:i + 1], 11) for i in range(30)]
    assert torch.equal(torch.cat(alone), label)


def test_least_energy_of_all_labellings_of_small_grids():
    """Expansions of Potts distances end near the minimum; on these grids they reach nearly all."""
    every = np.array(list(itertools.product(range(3), repeat=4))).reshape(-1, 2, 2)
    cost, _, start = problem(200, 3, 2, 2)
    distance = 0.5 * (1 - torch.eye(3, dtype=torch.float64)).expand(200, 3, 3)
    found, exact = alpha_expansion(cost, distance, start).numpy(), 0
    for c, d, label in zip(cost.numpy(), distance.numpy(), found, strict=True):
        all_of_them = energies(c, d, every)
        best = every[all_of_them.argmin()]
        # Their bound for Potts distances: borders count twice at most.
        assert all_of_them.min() - 1e-12 <= energy(c, d, label) <= all_of_them.min() + energy(0 * c, d, best) + 1e-12
        exact += energy(c, d, label) < all_of_them.min() + 1e-12
    assert exact > 190


def test_too_wide_grids_are_refused():
    with pytest.raises(ValueError, match='rows of 7 blocks have 2\\^7 states'):
        alpha_expansion(*problem(1, 2, 2, 7))


# The sweeps, in loops. Labellings are given, so that what is compared is what they are asked and what becomes of them.


def sweeps_by_loops(cost, A, start, label_with, *, beta, gamma, tau, threshold, sweeps, resolve):
    """Weights z[output][r][c][input] of one part; `label_with(cost, distance, labels)` labels one output."""
    M, R, C = cost.shape
    N = R * C
    z = np.zeros((M, R, C, M))
    for i, r, c in np.ndindex(M, R, C):
        z[i, r, c, start[i, r, c]] = 1
    extra, last = np.zeros((M, M)), objective(cost, z, beta, gamma)
    for sweep in range(sweeps):
        for i in range(M):
            n = sum((z[k].sum(axis=(0, 1)) for k in range(M) if k != i), np.zeros(M))
            asked = cost.copy()
            for j in range(M):
                known = sum(A[j, k] * n[k] for k in range(M))
                if known > tau * N:
                    asked[j] += 2 * gamma / N * (known - tau * N if threshold == 'soft' else known)
                asked[j] += gamma / N * extra[i, j]
            labels = [np.eye(M)[j] for j in range(M)]
            own = z[i].sum(axis=(0, 1))
            shown = [j for j in sorted(range(M), key=lambda j: (-own[j], j)) if own[j] > 0]
            halves = []
            if sweep and len(shown) >= 2:
                halves = list(itertools.combinations(shown[:3], 2))
            costs, L = list(asked), M + len(halves)
            distance = 1 - np.eye(L)
            for h, (a, b) in enumerate(halves):
                labels.append((np.eye(M)[a] + np.eye(M)[b]) / 2)
                costs.append((asked[a] + asked[b]) / 2 - 5e-4)
                for j in (a, b):
                    distance[M + h, j] = distance[j, M + h] = 0.25
            present = np.zeros((R, C), dtype=int)
            for r, c in np.ndindex(R, C):
                same = [k for k in range(L) if np.array_equal(labels[k], z[i, r, c])]
                two = [j for j in range(M) if z[i, r, c, j] > 0]
                present[r, c] = same[0] if same else min(two, key=lambda j: (asked[j][r, c], j))
            new = label_with(np.array(costs), beta / N * distance, present)
            for r, c in np.ndindex(R, C):
                z[i, r, c] = labels[new[r, c]]
        if resolve and sweep == sweeps - 2:
            for i, k in itertools.combinations(range(M), 2):
                one, two = ([j for j in range(M) if z[x, :, :, j].sum() > 0] for x in (i, k))
                if one == two and len(one) >= 2:
                    extra[i, one[0]] = extra[k, one[1]] = 1
        now = objective(cost, z, beta, gamma)
        if abs(last - now) / abs(now) < 1e-6:
            break
        last = now
    return z


def objective(cost, z, beta, gamma):
    """Of equation (2), without threshold and A."""
    M, R, C, _ = z.shape
    total = 0.0
    for i, r, c in np.ndindex(M, R, C):
        total += sum(cost[j, r, c] * z[i, r, c, j] for j in range(M))
        for s, d in ((r + 1, c), (r, c + 1)):
            if s < R and d < C:
                total += beta / (R * C) / 2 * ((z[i, r, c] - z[i, s, d]) ** 2).sum()
    count = z.sum(axis=(1, 2))
    for i, k in itertools.permutations(range(M), 2):
        total += gamma / (R * C) * count[i] @ count[k]
    return total


def by_expansion(cost, distance, labels):
    terms = cost[None], distance[None], labels[None]
    return alpha_expansion(*(torch.from_numpy(np.ascontiguousarray(x)) for x in terms))[0].numpy()


def part(M, S, P=1, seed=0, peak=3):
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(P, M, S // 2 + 1, S // 2 + 1, generator=g, dtype=torch.float64) ** peak
    u = torch.nn.functional.interpolate(u, (S, S), mode='bilinear')
    A = 0.9 * torch.eye(M, dtype=torch.float64) + 0.1 * torch.rand(P, M, M, generator=g, dtype=torch.float64)
    start = torch.randint(M, (P, M, S, S), generator=g)
    return -u / u.sum(dim=(2, 3), keepdim=True), A, start, torch.ones(P, M, dtype=torch.bool)


def weights_of(shown, M):
    return torch.nn.functional.one_hot(shown, M).double().mean(dim=-2)


OPTIONS = dict(beta=0.32, gamma=1.0, tau=0.83, threshold='hard', sweeps=4, resolve=True)


@pytest.mark.parametrize('M, S, changes', [
    (3, 2, {}), (3, 2, dict(beta=1.0)), (2, 2, {}), (1, 2, {}), (6, 2, dict(threshold='soft')), (8, 4, {}),
    (8, 4, dict(tau=0.3, threshold='soft')), (8, 4, dict(resolve=False)), (5, 3, dict(gamma=0.05)),
    (5, 4, dict(sweeps=2, beta=0.6)), (4, 4, dict(sweeps=12, gamma=0.3, beta=0.1)),
])
def test_sweeps_by_loops(M, S, changes):
    options = OPTIONS | changes
    for seed in range(5):
        cost, A, start, present = part(M, S, seed=seed, peak=1 + seed % 3)
        found = weights_of(co_mixup_labels(cost, A, start, present, **options)[0], M)
        expected = sweeps_by_loops(cost[0].numpy(), A[0].numpy(), start[0].numpy(), by_expansion, **options)
        assert torch.equal(found, torch.from_numpy(expected))


def test_no_labelling_raises_its_energy_and_nearly_all_find_the_least():
    """Three inputs and 2x2 blocks, against all labellings of the energies that the sweeps ask for."""
    rows = []

    def label_with(cost, distance, labels):
        every = np.array(list(itertools.product(range(len(cost)), repeat=4))).reshape(-1, 2, 2)
        new = by_expansion(cost, distance, labels)
        rows.append((
            energies(cost, distance, every).min(), energy(cost, distance, new), energy(cost, distance, labels)))
        return new

    for seed in range(15):
        cost, A, start, _ = (x[0].numpy() for x in part(3, 2, seed=seed, peak=1 + seed % 3))
        sweeps_by_loops(cost, A, start, label_with, **OPTIONS)
    least, found, before = np.array(rows).T
    assert (found >= least - 1e-12).all() and (found <= before + 1e-12).all()
    assert (found < before - 1e-6).mean() > 0.2 and (found <= least + 1e-12).mean() > 0.95


def test_parts_are_independent_and_smaller_ones_lack_the_last():
    cost, A, start, present = part(6, 4, P=3)
    small = torch.tensor([[True] * 6, [True] * 5 + [False], [True] * 6])
    start[1] %= 5
    found = co_mixup_labels(cost, A, start, small)
    for p, M in enumerate((6, 5, 6)):
        alone = co_mixup_labels(
            cost[p:p + 1, :M], A[p:p + 1, :M, :M], start[p:p + 1, :M], present[:1, :M])
        assert torch.equal(found[p, :M], alone[0])


def test_inputs_that_outputs_share_are_spread_by_the_penalty_and_by_resolving():
    """Two inputs, salient in half of the image each: without penalty both outputs are the same."""
    cost = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    cost[0, 0, :, 0] = cost[0, 1, :, 1] = -0.5
    start = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    terms = cost, torch.eye(2, dtype=torch.float64)[None], start, torch.ones(1, 2, dtype=torch.bool)
    shown = co_mixup_labels(*terms, beta=0.01, gamma=0.0, resolve=False)
    assert torch.equal(shown[0, 0], shown[0, 1]) and shown[0, 0, 0, :, 0].tolist() == [0, 1]
    shown = co_mixup_labels(*terms, beta=0.01, gamma=4.0, tau=0.9)
    assert not torch.equal(shown[0, 0], shown[0, 1])


def test_objective_by_loops():
    cost, _, _, present = part(4, 3, P=2)
    shown = torch.randint(4, (2, 4, 3, 3, 2), generator=torch.Generator().manual_seed(1))
    found = co_labels._objective(cost, shown, present, 0.7 / 9, 0.3 / 9)
    expected = [objective(c.numpy(), z.numpy(), 0.7, 0.3) for c, z in zip(cost, weights_of(shown, 4), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_halves_are_labels_from_the_second_sweep_on():
    terms = part(5, 3, peak=1)
    halves = [
        (weights_of(co_mixup_labels(*terms, gamma=0.05, sweeps=sweeps), 5) == 0.5).sum().item() for sweeps in (1, 2, 3)]
    assert halves[0] == 0 and min(halves[1:]) > 4


def test_arguments_are_left_alone():
    terms = part(4, 3, P=2)
    copies = [x.clone() for x in terms]
    co_mixup_labels(*terms)
    assert all(torch.equal(a, b) for a, b in zip(terms, copies, strict=True))
