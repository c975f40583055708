"""Labels of least energy on grids, for convex energies: one minimum cut for each grid, found exactly and in integers.

Shape suffixes: B grids, R rows and C columns of nodes, L = K + 1 labels, K layers of the cut.
"""
import torch
import torch.nn.functional as F

FAR = 2 ** 20  # distance of nodes that do not reach the sink; above the number of nodes
ROUNDS = 8  # rounds of pushes between two searches for distances
SWEEPS = 4  # steps of a search between two looks at whether it is done
# Neighbours: below, above, right, left. An arc's reverse is that of the opposite direction.
_OPPOSITE = (1, 0, 3, 2)


def level_cut(cost_BLRC: torch.Tensor, below_BRC: torch.Tensor, right_BRC: torch.Tensor) -> torch.Tensor:
    """Minimise sum_i cost[l_i, i] + sum_(i, j) weight_ij (l_i - l_j)^2 over labels l of a grid, i and j neighbours.

    With costs convex in the label this is one minimum cut with a layer of nodes for each step between labels: Ishikawa,
    PAMI 25 (2003). It is found by pushes and relabels of all nodes at once (Goldberg and Tarjan, JACM 35, 1988), of
    which the first phase will do. Distances are searched anew every 8 rounds, and there the host waits for the device,
    but not in the Triton form (int32, 16 x 16 nodes with up to 5 labels).

    Args:
        cost_BLRC: (B, K + 1, R, C) costs of labels 0 to K, int32 or int64, convex in the label.
        below_BRC: (B, R - 1, C) weights >= 0 between a node and the one below, of the same dtype.
        right_BRC: (B, R, C - 1) weights >= 0 between a node and the one on its right. 4 K^2 times the sum of all
            weights of a grid must fit the dtype.

    Returns:
        (B, R, C) labels, int64; the largest where several are best.

    Raises:
        ValueError: Shapes that do not fit, or a dtype other than int32 and int64.

    Example:
        >>> import torch
        >>> cost = torch.tensor([[0, 5, 9], [3, 2, 3], [9, 2, 0]], dtype=torch.int32).view(1, 3, 1, 3)
        >>> none, one = torch.zeros(1, 0, 3, dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.int32)
        >>> level_cut(cost, none, one)
        tensor([[[0, 1, 2]]])
        >>> level_cut(cost, none, 9 * one)
        tensor([[[1, 1, 1]]])
    """
    B, L, R, C = cost_BLRC.shape
    dtypes = {x.dtype for x in (cost_BLRC, below_BRC, right_BRC)}
    if dtypes not in ({torch.int32}, {torch.int64}):
        raise ValueError(f'costs and weights must be int32 or int64, all the same, got {sorted(map(str, dtypes))}')
    if below_BRC.shape != (B, R - 1, C) or right_BRC.shape != (B, R, C - 1):
        raise ValueError(
            f'costs {tuple(cost_BLRC.shape)} need weights {(B, R - 1, C)} and {(B, R, C - 1)}, got '
            f'{tuple(below_BRC.shape)} and {tuple(right_BRC.shape)}')
    # Grids come last, so that neighbours are far apart in memory and rows of it are long.
    cost, below, right = (x.movedim(0, -1) for x in (cost_BLRC, below_BRC, right_BRC))
    weight = cost.new_zeros(4, R, C, B)
    for direction, values in enumerate((below, below, right, right)):
        _having(direction, weight[direction]).copy_(values)
    # Layer p says that the label is above p. (l - m)^2 is what the arcs between the layers cut, but for a term of each
    # node, which its price gets.
    K, around = L - 1, weight.sum(0, dtype=cost.dtype)
    odd = torch.arange(1 - K, K, 2, device=cost.device, dtype=cost.dtype).view(-1, 1, 1, 1)
    limit = K * around + 1  # a higher price decides for the node as well, and would only make numbers large
    price = torch.minimum(torch.maximum(cost.diff(dim=0) + odd * around, -limit), limit)
    return source_side_op(price, weight).sum(dim=0).movedim(-1, 0)


def source_side(price: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Nodes x that minimise the sum of their prices and of the cut arcs; the most of them.

    Args:
        price: (K, R, C, B).
        weight: (4, R, C, B) capacities of the arcs from each layer of a node to each layer of its neighbours.

    Returns:
        (K, R, C, B) bool.
    """
    K = len(price)
    # (own layer, direction, other layer, R, C, B); a copy, even of a single layer.
    residual = weight.expand(K, K, *weight.shape).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    excess, sink = (-price).clamp_min(0), price.clamp_min(0)
    while True:
        height = _distances(residual, sink)
        if not ((excess > 0) & (height < FAR)).any():
            return height >= FAR
        for _ in range(ROUNDS):
            excess, sink = _push(excess, sink, residual, height)
            height = _relabel(_closed(residual), sink, height)


# Opaque to torch.compile, which cannot follow loops that depend on values. timm_alignmix.kernels adds a Triton form.
source_side_op = torch.library.custom_op('timm_alignmix::source_side', source_side, mutates_args=())


@source_side_op.register_fake
def _(price, weight):
    return torch.empty_like(price, dtype=torch.bool, memory_format=torch.contiguous_format)


def _push(
        excess: torch.Tensor, sink: torch.Tensor, residual: torch.Tensor, height: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Push all excess that can go one step down, arc after arc."""
    amount = torch.minimum(excess, sink)
    excess, sink = excess - amount, sink - amount
    down = height[:, None, None] == _neighbours(height) + 1
    room = (residual * down).flatten(1, 2)
    before = room.cumsum(dim=1, dtype=room.dtype) - room
    amount = torch.minimum((excess.unsqueeze(1) - before).clamp_min(0), room).view_as(residual)
    residual -= amount
    excess = excess - amount.sum(dim=(1, 2), dtype=excess.dtype)
    for direction, opposite in enumerate(_OPPOSITE):
        arrived = _having(direction, amount[:, direction].transpose(0, 1))
        _having(opposite, residual[:, opposite]).add_(arrived)
        _having(opposite, excess).add_(arrived.sum(dim=1, dtype=excess.dtype))
    return excess, sink


def _having(direction: int, x: torch.Tensor) -> torch.Tensor:
    """View of the nodes of x, (..., R, C, B), that have a neighbour in a direction."""
    dim = -3 if direction < 2 else -2
    return x.narrow(dim, direction % 2, x.shape[dim] - 1)


def _neighbours(height: torch.Tensor) -> torch.Tensor:
    """Heights (4, K, R, C, B) of the neighbours of each node; those beyond the edge are far."""
    padded = F.pad(height, (0, 0, 1, 1, 1, 1), value=FAR)
    R, C = height.shape[1:3]
    return torch.stack([padded[:, 1 + i:1 + i + R, 1 + j:1 + j + C] for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))])


def _closed(residual: torch.Tensor) -> torch.Tensor:
    """What to add to a neighbour's height: nothing, or far if the arc has no room."""
    return (residual <= 0).to(residual.dtype) * FAR


def _relabel(closed: torch.Tensor, sink: torch.Tensor, height: torch.Tensor) -> torch.Tensor:
    """One above the lowest neighbour, for all nodes: of valid labels it makes valid ones that are no lower."""
    lowest = (closed + _neighbours(height)).amin(dim=(1, 2))
    return torch.where(sink > 0, 1, (lowest + 1).clamp_max(FAR)).to(height.dtype)


def _distances(residual: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Number of arcs to the sink, breadth first; far if there is no way."""
    closed, height = _closed(residual), torch.where(sink > 0, 1, FAR).to(sink.dtype)
    while True:
        before = height
        for _ in range(SWEEPS):
            height = _relabel(closed, sink, height)
        if torch.equal(height, before):
            return height
