"""Transport by rounds against plain loops and the optimal assignment of scipy."""
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from timm_alignmix.functional import block_transport, move_blocks


def problem(B, R, C, kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    value = torch.rand(B, R, C, generator=g, dtype=torch.float64) ** 4
    if kind == 'ties':
        value = (3 * value).round() + 0.125
    value = value / value.sum(dim=(1, 2), keepdim=True)
    share = torch.rand(B, 1, 1, generator=g)
    return torch.rand(B, R, C, generator=g) < share, value


def costs(wanted, value, distance):
    """(N, N) cost of block i at place j."""
    R, C = wanted.shape
    place = [(r, c) for r in range(R) for c in range(C)]
    return np.array([[
        distance * ((a - c) ** 2 + (b - d) ** 2) / (max(R, C) - 1) ** 2 - value[a, b] * wanted[c, d]
        for c, d in place] for a, b in place])


def linear_assignment(cost):
    """Best block of each place."""
    return linear_sum_assignment(cost.T)[1]


def by_loops(wanted, value, distance):
    cost, N, shown = costs(wanted, value, distance), wanted.size, None
    for _ in range(max(wanted.shape)):
        shown, wishes = {}, [int(np.argmin(cost[i])) for i in range(N)]
        for i, j in enumerate(wishes):
            if j not in shown or cost[i, j] < cost[shown[j], j]:
                shown[j] = i
        for i, j in enumerate(wishes):
            if shown[j] != i:
                cost[i, j] += 1
    return [shown.get(j, j) for j in range(N)]


@pytest.mark.parametrize('R, C', [(2, 2), (4, 4), (8, 8), (3, 5)])
@pytest.mark.parametrize('kind', ['random', 'ties'])
@pytest.mark.parametrize('distance', [0.0, 0.125, 0.8])
def test_rounds_by_loops(R, C, kind, distance):
    wanted, value = problem(6, R, C, kind)
    if kind == 'ties':  # numbers whose sums are exact in any order
        value = (value * 64).round() / 64
    found = block_transport(wanted, value, distance).flatten(1).tolist()
    assert found == [by_loops(m.numpy(), u.numpy(), distance) for m, u in zip(wanted, value, strict=True)]


@pytest.mark.parametrize('S', [2, 4, 8, 16])
def test_blocks_move_once_and_nearly_optimally(S):
    wanted, value = problem(8, S, S, 'random', seed=S)
    found = block_transport(wanted, value, 0.8).flatten(1)
    for m, u, shown in zip(wanted.numpy(), value.numpy(), found.numpy(), strict=True):
        places = np.flatnonzero(m.ravel())
        assert len(set(shown[places])) == len(places)
        cost, place = costs(m, u, 0.8)[:, places], np.arange(len(places))
        least, stay, total = (
            cost[blocks, place].sum() for blocks in (linear_assignment(cost), places, shown[places]))
        assert least - 1e-12 <= total <= stay + 1e-12
        if least < stay:
            assert (stay - total) / (stay - least) > 0.5


def test_the_most_valuable_neighbour_comes():
    wanted, value = torch.zeros(1, 4, 4, dtype=torch.bool), torch.full((1, 4, 4), 0.01)
    wanted[0, 1, 1], value[0, 1, 2] = True, 0.85
    assert block_transport(wanted, value, 0.8)[0, 1, 1] == 6
    assert block_transport(wanted, value, 9.0)[0, 1, 1] == 5


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_moved_blocks_by_loops(layout, dtype):
    images = torch.randn(3, 2, 8, 12).to(dtype).contiguous(memory_format=layout)
    example, block = torch.tensor([2, 2, 0]), torch.randint(24, (3, 4, 6))
    moved = move_blocks(images, example, block)
    assert moved.stride() == images.stride() and moved.dtype == dtype
    for i, r, c in np.ndindex(3, 4, 6):
        row, column = divmod(int(block[i, r, c]), 6)
        expected = images[example[i], :, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
        assert torch.equal(moved[i, :, 2 * r:2 * r + 2, 2 * c:2 * c + 2], expected)
