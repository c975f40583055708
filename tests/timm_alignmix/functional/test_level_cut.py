"""Cuts against all labellings of small grids, and against the maximum flow of scipy on larger ones."""
import itertools

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from timm_alignmix.functional import level_cut
from timm_alignmix.functional.level_cut import source_side_op


def problem(B, K, R, C, largest=12, dtype=torch.int32, seed=0):
    g = torch.Generator().manual_seed(seed)
    steps = torch.randint(-30, 31, (B, K, R, C), generator=g).sort(dim=1).values
    cost = torch.cat([torch.randint(-9, 9, (B, 1, R, C), generator=g), steps], dim=1).cumsum(dim=1)
    weights = (torch.randint(0, largest + 1, shape, generator=g) for shape in ((B, R - 1, C), (B, R, C - 1)))
    return tuple(x.to(dtype) for x in (cost, *weights))


def energies(cost, below, right, labels):
    own = cost.gather(1, labels.unsqueeze(1)).sum(dim=(1, 2, 3))
    pairs = [(w * labels.diff(dim=dim) ** 2).sum(dim=(1, 2)) for dim, w in ((1, below), (2, right))]
    return own + pairs[0] + pairs[1]


@pytest.mark.parametrize('K, R, C, B', [
    (1, 2, 2, 300), (1, 3, 3, 300), (1, 1, 5, 50), (2, 2, 2, 300), (2, 3, 3, 60), (2, 2, 3, 100), (3, 2, 2, 100),
])
def test_never_above_any_labelling(K, R, C, B):
    for largest in (0, 12, 100):
        terms = problem(B, K, R, C, largest)
        found = energies(*terms, level_cut(*terms))
        every = torch.tensor(list(itertools.product(range(K + 1), repeat=R * C))).view(-1, 1, R, C)
        least = torch.stack([energies(*terms, labels.expand(B, R, C)) for labels in every]).amin(dim=0)
        assert torch.equal(found, least)


def minimum_by_flow(cost, below, right):
    """Least energy of one grid: the constant plus the maximum flow through layers of nodes."""
    (L, R, C), graph, constant = cost.shape, {}, int(cost[0].sum())
    K, source, sink = L - 1, 0, 1

    def node(p, r, c):
        return 2 + (p * R + r) * C + c

    price = np.diff(cost, axis=0).astype(np.int64)
    for (r, c), (s, d), weight in [
            *(((r, c), (r + 1, c), below[r, c]) for r in range(R - 1) for c in range(C)),
            *(((r, c), (r, c + 1), right[r, c]) for r in range(R) for c in range(C - 1))]:
        for p, q in itertools.product(range(K), repeat=2):
            for arc in ((node(p, r, c), node(q, s, d)), (node(q, s, d), node(p, r, c))):
                graph[arc] = graph.get(arc, 0) + int(weight)
        for p in range(K):  # (l - m)^2 = what is cut - l (K - l) - m (K - m)
            price[p, r, c] += weight * (2 * p + 1 - K)
            price[p, s, d] += weight * (2 * p + 1 - K)
    for (p, r, c), value in np.ndenumerate(price):
        if value > 0:
            graph[node(p, r, c), sink] = int(value)
        else:
            graph[source, node(p, r, c)] = -int(value)
            constant += int(value)
    nodes = 2 + K * R * C
    rows, columns = np.array(list(graph), dtype=np.int32).T  # older releases of scipy take no other type
    matrix = csr_array((np.array(list(graph.values()), dtype=np.int32), (rows, columns)), shape=(nodes, nodes))
    return constant + maximum_flow(matrix, source, sink).flow_value


@pytest.mark.parametrize('K, S, B', [(1, 8, 6), (2, 8, 6), (3, 5, 3), (1, 16, 2), (2, 16, 3)])
def test_minimum_of_larger_grids(K, S, B):
    for largest in (4, 40):
        terms = problem(B, K, S, S, largest, seed=S)
        found = energies(*terms, level_cut(*terms)).tolist()
        assert found == [minimum_by_flow(*(x[i].numpy() for x in terms)) for i in range(B)]


def test_grids_are_independent_and_repeat():
    terms = problem(12, 2, 8, 8, 30)
    labels = level_cut(*terms)
    assert torch.equal(level_cut(*terms), labels)
    alone = [level_cut(*(x[i:i + 1] for x in terms)) for i in range(12)]
    assert torch.equal(torch.cat(alone), labels)
    assert torch.equal(level_cut(*(x.long() for x in terms)), labels)


def test_terms_are_not_changed_and_ties_go_to_the_largest_label():
    terms = problem(3, 2, 4, 4)
    copies = [x.clone() for x in terms]
    level_cut(*terms)
    assert all(torch.equal(a, b) for a, b in zip(terms, copies, strict=True))
    assert level_cut(*(torch.zeros_like(x) for x in terms)).unique().tolist() == [2]


def test_costs_far_above_the_weights_decide_alone():
    _, below, right = problem(4, 2, 4, 4)
    best = torch.randint(3, (4, 4, 4), generator=torch.Generator().manual_seed(1))
    cost = 500_000_000 * (torch.arange(3).view(3, 1, 1) - best.unsqueeze(1)) ** 2
    assert torch.equal(level_cut(cost.int(), below, right), best)


def test_wrong_shapes_and_dtypes():
    cost, below, right = problem(2, 2, 3, 3)
    with pytest.raises(ValueError, match='must be int32 or int64'):
        level_cut(cost.float(), below, right)
    with pytest.raises(ValueError, match=r'need weights \(2, 2, 3\) and \(2, 3, 2\)'):
        level_cut(cost, right, below)


@pytest.mark.parametrize('K', (1, 2))
def test_operator(K):
    """The schema (inputs stay as they are, even of one layer), the shapes of fake tensors, and compilation."""
    price = torch.tensor([-9, 3, 5, -2]).int().view(1, 2, 2, 1).expand(K, 2, 2, 1).contiguous()
    weight = torch.zeros(4, 2, 2, 1, dtype=torch.int32)
    weight[0, 0], weight[1, 1] = 4, 4
    torch.library.opcheck(source_side_op, (price, weight))
    terms = problem(3, K, 4, 4)
    assert torch.equal(torch.compile(level_cut, backend='aot_eager', fullgraph=True)(*terms), level_cut(*terms))
