"""Which input each block of each output shows, of Co-Mixup: arXiv 2102.03065.

Shape suffixes: B grids, R rows and C columns of blocks, K = 2^C sets of blocks of a row, L labels; P parts of a batch,
M inputs of a part and as many outputs, N = R C blocks of an output in row-major order.
"""
import torch

_ABSENT = 1e9  # cost of labels that are not there; not infinite, which times 0 would be no number
_HALF = 5e-4  # what a block gains that is half of two inputs, in the paper's code
_LEAST = 1e-9  # less than this is rounding


def alpha_expansion(
        cost_BLRC: torch.Tensor, distance_BLL: torch.Tensor, label_BRC: torch.Tensor, moves: int = 8,
) -> torch.Tensor:
    """Lower sum_i cost[l_i, i] + sum_(i, j) distance[l_i, l_j] over labels l of a grid, i and j neighbours.

    A move gives one label to any set of blocks: Boykov, Veksler and Zabih, PAMI 23 (2001). Of all labels and sets that
    of the least energy is taken, until none lowers it or the moves are used up: it takes 7 at most in Co-Mixup. It is
    found exactly, for any distances, by dynamic programming from row to row, whose states are the sets of blocks of a
    row.

    Args:
        cost_BLRC: (B, L, R, C) costs, float64, finite; C is 6 at most.
        distance_BLL: (B, L, L) distances, symmetric, 0 between a label and itself.
        label_BRC: (B, R, C) labels to start from, int64.
        moves: The most moves of a grid.

    Returns:
        (B, R, C) labels, whose energy is not above that of the start. Nothing waits for the device.

    Raises:
        ValueError: Grids of more than 6 columns.

    Example:
        >>> import torch
        >>> cost = torch.tensor([[0.0, 5.0, 4.0], [3.0, 2.0, 9.0], [9.0, 2.5, 1.0]]).double().view(1, 3, 1, 3)
        >>> start, distance = torch.zeros(1, 1, 3, dtype=torch.int64), 1 - torch.eye(3, dtype=torch.float64)[None]
        >>> alpha_expansion(cost, 0.1 * distance, start)
        tensor([[[0, 1, 2]]])
        >>> alpha_expansion(cost, 2.0 * distance, start)
        tensor([[[0, 2, 2]]])
    """
    B, L, R, C = cost_BLRC.shape
    if C > 6:
        raise ValueError(f'rows of {C} blocks have 2^{C} states; this programme is for 6 columns at most')
    K, device = 2 ** C, cost_BLRC.device
    in_set_KC = torch.arange(K, device=device).unsqueeze(1) >> torch.arange(C, device=device) & 1
    in_set_CK = in_set_KC.t().to(cost_BLRC.dtype)
    both_CK = in_set_CK[:-1] * in_set_CK[1:]
    common_CKK = (in_set_CK.unsqueeze(2) * in_set_CK.unsqueeze(1)).flatten(1)
    for _ in range(moves):
        label = label_BRC.unsqueeze(1)
        away = distance_BLL.gather(2, label.flatten(2).expand(B, L, -1)).view(B, L, R, C)
        # All in differences to the energy before: the empty set has 0. A pair of neighbours changes by one term for
        # each block in the set, and one if both are.
        change, together = cost_BLRC - cost_BLRC.gather(1, label), []
        for dim, length in ((2, R - 1), (3, C - 1)):
            first, second = away.narrow(dim, 0, length), away.narrow(dim, 1, length)
            before = second.gather(1, label.narrow(dim, 0, length))
            change.narrow(dim, 0, length).add_(second - before)
            change.narrow(dim, 1, length).add_(first - before)
            together.append(before - first - second)
        below, right = together
        row_BLRK = change @ in_set_CK + right @ both_CK
        joint_BLRKK = (below @ common_CKK).unflatten(3, (K, K))
        least_BLK, origins = row_BLRK[:, :, 0], []
        for r in range(1, R):
            least_BLK, origin_BLK = (least_BLK.unsqueeze(3) + joint_BLRKK[:, :, r - 1]).min(dim=2)
            least_BLK = least_BLK + row_BLRK[:, :, r]
            origins.append(origin_BLK)
        least_B, best_B = least_BLK.flatten(1).min(dim=1)
        new_B, state_B, states = best_B // K, best_B % K, [best_B % K]
        for origin_BLK in reversed(origins):
            state_B = origin_BLK.flatten(1).gather(1, (new_B * K + state_B).unsqueeze(1)).squeeze(1)
            states.insert(0, state_B)
        lower_B = least_B < -_LEAST
        chosen_BRC = in_set_KC.index_select(0, torch.stack(states, dim=1).flatten()).view(B, R, C) > 0
        label_BRC = torch.where(chosen_BRC & lower_B.view(-1, 1, 1), new_B.view(-1, 1, 1), label_BRC)
        if device.type == 'cpu' and not lower_B.any():  # elsewhere the host would wait; moves from here on are none
            break
    return label_BRC


def co_mixup_labels(
        cost_PMRC: torch.Tensor,
        compatibility_PMM: torch.Tensor,
        start_PMRC: torch.Tensor,
        present_PM: torch.Tensor,
        beta: float = 0.32,
        gamma: float = 1.0,
        tau: float = 0.83,
        threshold: str = 'hard',
        sweeps: int = 4,
        resolve: bool = True,
) -> torch.Tensor:
    """Label the blocks of the outputs of each part by inputs, or by halves of two: section 4 of arXiv 2102.03065.

    The outputs are labelled one after the other, several times, each with a cost for inputs that the others show often.
    From the second sweep on halves of two inputs, of those that an output shows most, are labels too. Sums below are
    over blocks i and neighbours i, j of an output: sum_i (cost + penalty)[l_i, i] + beta / N sum_(i, j) d[l_i, l_j].
    Parts are independent, and end where a sweep changes their objective by less than a millionth.

    Args:
        cost_PMRC: (P, M, R, C) cost of each input at each block, float64: minus its saliency there, and its prior.
        compatibility_PMM: (P, M, M) A of the paper, float64.
        start_PMRC: (P, M, R, C) inputs that the outputs show at the start, int64.
        present_PM: (P, M) bool, False for inputs and outputs that a part lacks because it is smaller.
        beta: Smoothness.
        gamma: Weight of the penalty, 2 gamma / N (A n) for n blocks of each input in the other outputs.
        tau: It holds where A n is above tau N.
        threshold: 'hard', or 'soft': the penalty of A n - tau N.
        sweeps: Number of sweeps over the outputs.
        resolve: Part outputs that show the same set of inputs, two or more, in the last sweep.

    Returns:
        (P, M, R, C, 2) the two inputs that each block of each output shows in halves, int64; equal for a block of one.
        Nothing waits for the device.

    Example:
        >>> import torch
        >>> cost = -torch.eye(4, dtype=torch.float64).view(1, 4, 2, 2)  # each input is salient in one block
        >>> start, present = torch.zeros(1, 4, 2, 2, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool)
        >>> co_mixup_labels(cost, torch.eye(4, dtype=torch.float64)[None], start, present, gamma=0)[0, 0, ..., 0]
        tensor([[0, 1],
                [2, 3]])
    """
    P, M, R, C = cost_PMRC.shape
    N, cpu = R * C, cost_PMRC.device.type == 'cpu'
    cost_PMRC = torch.where(present_PM.view(P, M, 1, 1), cost_PMRC, _ABSENT)
    present_PM1 = present_PM.unsqueeze(2)
    shown_PMRC2 = torch.stack([start_PMRC, start_PMRC], dim=4)
    count_PMM = _weights(shown_PMRC2, M).sum(dim=(2, 3)) * present_PM1  # blocks of each output that show an input
    apart_PMM = torch.zeros_like(count_PMM)
    objective_P = _objective(cost_PMRC, shown_PMRC2, present_PM, beta / N, gamma / N)
    active_P = torch.ones_like(present_PM[:, 0])
    for sweep in range(sweeps):
        for output in range(M):
            elsewhere_PM = count_PMM.sum(dim=1) - count_PMM[:, output]
            known_PM = (compatibility_PMM @ elsewhere_PM.unsqueeze(2)).squeeze(2)
            penalty_PM = (known_PM - tau * N if threshold == 'soft' else known_PM) * (known_PM > tau * N)
            penalty_PM = gamma / N * (2 * penalty_PM + apart_PMM[:, output])
            present_PRC2 = shown_PMRC2[:, output]
            inputs_PL2, *terms = _with_halves(
                cost_PMRC + penalty_PM.view(P, M, 1, 1), present_PRC2, count_PMM[:, output], offered=sweep > 0)
            cost_PLRC, distance_PLL, label_PRC = terms
            label_PRC = alpha_expansion(cost_PLRC, beta / N * distance_PLL, label_PRC)
            new_PRC2 = inputs_PL2.gather(1, label_PRC.view(P, N, 1).expand(P, N, 2)).view(P, R, C, 2)
            new_PRC2 = torch.where(active_P.view(P, 1, 1, 1), new_PRC2, present_PRC2)
            shown_PMRC2[:, output] = new_PRC2
            count_PMM[:, output] = _weights(new_PRC2, M).sum(dim=(1, 2)) * present_PM1[:, output]
        if resolve and sweep == sweeps - 2:
            apart_PMM = _apart(count_PMM > 0).to(count_PMM.dtype)
        before_P, objective_P = objective_P, _objective(cost_PMRC, shown_PMRC2, present_PM, beta / N, gamma / N)
        active_P = active_P & ((objective_P - before_P).abs() >= 1e-6 * objective_P.abs())
        if cpu and not active_P.any():
            break
    return shown_PMRC2


def _weights(shown: torch.Tensor, M: int) -> torch.Tensor:
    """Weight of each input, (..., M) float64, of the two in the last dimension."""
    return torch.zeros(*shown.shape[:-1], M, dtype=torch.float64, device=shown.device).scatter_add_(
        -1, shown, torch.full(shown.shape, 0.5, dtype=torch.float64, device=shown.device))


def _with_halves(
        cost_PMRC: torch.Tensor, shown_PRC2: torch.Tensor, count_PM: torch.Tensor, offered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels of an output, M inputs and three halves: their inputs (P, L, 2), costs, distances, and the present label.

    Of an output of two inputs their half is offered, of one of more those of any two of the three that it shows most. A
    half that it shows and that is not offered any more is replaced by the cheaper of its inputs.
    """
    P, M, R, C = cost_PMRC.shape
    device = cost_PMRC.device
    order_PM, own_M = count_PM.sort(dim=1, descending=True, stable=True).indices, torch.arange(M, device=device)
    one, two, three = (order_PM[:, min(k, M - 1)] for k in range(3))
    halves_P32 = torch.stack([one, two, one, three, two, three], dim=1).view(P, 3, 2).sort(dim=2).values
    inputs_PL2 = torch.cat([own_M.view(1, M, 1).expand(P, M, 2), halves_P32], dim=1)
    several_P = (count_PM > 0).sum(dim=1)
    offered_P3 = torch.stack([several_P >= 2, several_P >= 3, several_P >= 3], dim=1) & offered
    index = halves_P32.view(P, 6, 1, 1).expand(P, 6, R, C)
    half_P3RC = cost_PMRC.gather(1, index).view(P, 3, 2, R, C).mean(dim=2) - _HALF
    half_P3RC = torch.where(offered_P3.view(P, 3, 1, 1), half_P3RC, _ABSENT)
    # Distances of the halves are not those of their vectors, by the paper's code.
    part_P3M = (halves_P32.unsqueeze(3) == own_M).any(dim=2)
    distance_PLL = (1 - torch.eye(M + 3, dtype=cost_PMRC.dtype, device=device)).repeat(P, 1, 1)
    distance_PLL[:, M:, :M].masked_fill_(part_P3M, 0.25)
    distance_PLL[:, :M, M:].masked_fill_(part_P3M.transpose(1, 2), 0.25)
    same_P3RC = (halves_P32.view(P, 3, 1, 1, 2) == shown_PRC2.unsqueeze(1)).all(dim=4) & offered_P3.view(P, 3, 1, 1)
    cost_PRC2 = cost_PMRC.gather(1, shown_PRC2.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    label_PRC = torch.where(cost_PRC2[..., 0] <= cost_PRC2[..., 1], shown_PRC2[..., 0], shown_PRC2[..., 1])
    for k, same_PRC in enumerate(same_P3RC.unbind(dim=1)):
        label_PRC = torch.where(same_PRC, M + k, label_PRC)
    return inputs_PL2, torch.cat([cost_PMRC, half_P3RC], dim=1), distance_PLL, label_PRC


def _apart(showing_PMM: torch.Tensor) -> torch.Tensor:
    """Of outputs that show the same inputs, two or more: the first input in the one, the second in the later one."""
    same_PMM = (showing_PMM.unsqueeze(2) == showing_PMM.unsqueeze(1)).all(dim=3)
    rank_PMM = showing_PMM.cumsum(dim=2) * showing_PMM
    several_PM1 = showing_PMM.sum(dim=2, keepdim=True) >= 2
    later_PM1, earlier_PM1 = (
        side(same_PMM, k).any(dim=2, keepdim=True) for side, k in ((torch.triu, 1), (torch.tril, -1)))
    return several_PM1 & ((rank_PMM == 1) & later_PM1 | (rank_PMM == 2) & earlier_PM1)


def _objective(
        cost_PMRC: torch.Tensor, shown_PMRC2: torch.Tensor, present_PM: torch.Tensor, beta: float, gamma: float,
) -> torch.Tensor:
    """Objective of each part, (P,), without threshold and compatibility, as the paper's code looks at it."""
    z_PMRCM = _weights(shown_PMRC2, cost_PMRC.shape[1]) * present_PM.view(*present_PM.shape, 1, 1, 1)
    own = (cost_PMRC.permute(0, 2, 3, 1).unsqueeze(1) * z_PMRCM).flatten(1).sum(dim=1)
    borders = sum(z_PMRCM.diff(dim=dim).square().flatten(1).sum(dim=1) for dim in (2, 3))
    count_PMM = z_PMRCM.sum(dim=(2, 3))
    together = count_PMM.sum(dim=1).square().sum(dim=1) - count_PMM.square().sum(dim=(1, 2))
    return own + beta / 2 * borders + gamma * together
