"""A minimum cut of a grid in one program: PuzzleMix's masks without a wait of the host.

The rounds are those of functional.level_cut; the residual capacities stay in registers, and neighbours are read
through shared memory. A program ends when its own grid is done, not the slowest of the batch.

Arrays of arcs are flat: (layer of the node, direction, layer of the neighbour, node).
"""
import torch
import triton
import triton.language as tl

from ..functional.level_cut import FAR, ROUNDS, SWEEPS

MAX_ARCS = 2 ** 14  # of a program: 64 KB of shared memory
_FAR, _ROUNDS, _SWEEPS = tl.constexpr(FAR), tl.constexpr(ROUNDS), tl.constexpr(SWEEPS)


@triton.jit
def _relabel(closed, sink, height, neighbour, inside, LAYERS: tl.constexpr, NODES: tl.constexpr):
    """One above the lowest neighbour, and 1 at the sink; arrays of nodes are (LAYERS, NODES)."""
    around = tl.where(inside, tl.gather(tl.reshape(height, [LAYERS * NODES]), neighbour, 0), _FAR)
    lowest = tl.min(tl.reshape(around + closed, [LAYERS, 4 * LAYERS, NODES]), axis=1)
    return tl.where(sink > 0, 1, tl.minimum(lowest + 1, _FAR))


@triton.jit
def _distances(residual, sink, neighbour, inside, LAYERS: tl.constexpr, NODES: tl.constexpr):
    """Number of arcs to the sink, breadth first."""
    closed = tl.where(residual > 0, 0, _FAR)
    height = tl.where(sink > 0, 1, _FAR)
    moving = 1
    while moving > 0:
        before = height
        for _ in range(_SWEEPS):
            height = _relabel(closed, sink, height, neighbour, inside, LAYERS, NODES)
        moving = tl.max(tl.max((height != before).to(tl.int32), axis=1), axis=0)
    return height


@triton.jit
def _cut_kernel(
        price_ptr, weight_ptr, above_ptr, B, rows, columns, K: tl.constexpr, LAYERS: tl.constexpr,
        NODES: tl.constexpr):
    grid = tl.program_id(0)
    layer = tl.arange(0, LAYERS)[:, None]
    node = tl.arange(0, NODES)[None, :]
    real = (layer < K) & (node < rows * columns)
    place = (layer * rows * columns + node) * B + grid
    price = tl.load(price_ptr + place, mask=real, other=0)

    arc = tl.arange(0, LAYERS * 4 * LAYERS * NODES)
    start = arc % NODES
    other = arc // NODES % LAYERS
    direction = arc // (NODES * LAYERS) % 4
    own = arc // (4 * NODES * LAYERS)
    row, column = start // columns, start % columns
    row += tl.where(direction == 0, 1, tl.where(direction == 1, -1, 0))
    column += tl.where(direction == 2, 1, tl.where(direction == 3, -1, 0))
    inside = (start < rows * columns) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    inside &= (own < K) & (other < K)
    end = tl.where(inside, row * columns + column, 0)
    neighbour = other * NODES + end
    reverse = ((other * 4 + (direction ^ 1)) * LAYERS + own) * NODES + end
    residual = tl.load(weight_ptr + (direction * rows * columns + start) * B + grid, mask=inside, other=0)

    excess = tl.maximum(-price, 0)
    sink = tl.maximum(price, 0)
    height = _distances(residual, sink, neighbour, inside, LAYERS, NODES)
    active = tl.max(tl.max(((excess > 0) & (height < _FAR)).to(tl.int32), axis=1), axis=0)
    while active > 0:
        for _ in range(_ROUNDS):
            amount = tl.minimum(excess, sink)
            excess -= amount
            sink -= amount
            around = tl.gather(tl.reshape(height, [LAYERS * NODES]), neighbour, 0)
            here = tl.gather(tl.reshape(height, [LAYERS * NODES]), own * NODES + start, 0)
            room = tl.reshape(tl.where(inside & (here == around + 1), residual, 0), [LAYERS, 4 * LAYERS, NODES])
            before = tl.cumsum(room, axis=1) - room
            pushed = tl.minimum(tl.maximum(excess[:, None, :] - before, 0), room)
            amounts = tl.reshape(pushed, [LAYERS * 4 * LAYERS * NODES])
            arrived = tl.where(inside, tl.gather(amounts, reverse, 0), 0)
            residual += arrived - amounts
            change = tl.reshape(arrived, [LAYERS, 4 * LAYERS, NODES]) - pushed
            excess += tl.sum(change, axis=1)
            closed = tl.where(residual > 0, 0, _FAR)
            height = _relabel(closed, sink, height, neighbour, inside, LAYERS, NODES)
        height = _distances(residual, sink, neighbour, inside, LAYERS, NODES)
        active = tl.max(tl.max(((excess > 0) & (height < _FAR)).to(tl.int32), axis=1), axis=0)
    tl.store(above_ptr + place, height >= _FAR, mask=real)


def fits(price: torch.Tensor) -> bool:
    """Check that a program takes a cut of this size."""
    K, R, C, _ = price.shape
    config = launch_config(K, R * C)
    return 4 * config['LAYERS'] ** 2 * config['NODES'] <= MAX_ARCS


def source_side(price: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Triton form of functional.level_cut.source_side, for int32."""
    K, R, C, B = price.shape
    above = torch.empty(price.shape, dtype=torch.bool, device=price.device)
    _cut_kernel[(B,)](price.contiguous(), weight.contiguous(), above, B, R, C, K, **launch_config(K, R * C))
    return above


def launch_config(K: int, nodes: int) -> dict[str, int]:
    """Launch options: powers of 2 of layers and nodes, 16 arcs a thread."""
    layers, nodes = triton.next_power_of_2(K), triton.next_power_of_2(nodes)
    return dict(
        LAYERS=layers, NODES=nodes, num_warps=min(max(1, 4 * layers ** 2 * nodes // 512), 32), num_stages=1)
