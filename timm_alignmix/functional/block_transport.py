"""Transport of blocks of an image to where they are wanted.

Shape suffixes: B images, R rows and C columns of blocks.
"""
import torch


def block_transport(wanted_BRC: torch.Tensor, value_BRC: torch.Tensor, distance: float) -> torch.Tensor:
    """Move valuable blocks to places where they are wanted, by rounds: section 3.3 of PuzzleMix, arXiv 2009.06962.

    Block i at place j costs distance |i - j|^2 / (side - 1)^2 - value_i wanted_j. In each of `side` rounds every block
    proposes to its cheapest place and each place takes the cheapest proposal; those refused cost 1 more from then on.
    Ties go to the first. Places that end without a block show their own; PuzzleMix's code leaves them black.

    Args:
        wanted_BRC: (B, R, C) bool: the place is shown.
        value_BRC: (B, R, C) value of each block, float32 or float64.
        distance: Cost of moving along a whole side, the longer one.

    Returns:
        (B, R, C) block that each place shows, as its number in row-major order, int64. Every block is shown once at
        most, but for places that end without one. Nothing waits for the device.

    Example:
        >>> import torch
        >>> wanted = torch.tensor([[[True, False], [False, False]]])
        >>> block_transport(wanted, torch.tensor([[[0.1, 0.6], [0.2, 0.1]]]), distance=0.3)
        tensor([[[1, 0],
                 [2, 3]]])
    """
    B, R, C = wanted_BRC.shape
    N, side = R * C, max(R, C)
    block_N = torch.arange(N, device=wanted_BRC.device)
    row_N, column_N = block_N // C, block_N % C
    away_NN = (row_N.unsqueeze(1) - row_N).square() + (column_N.unsqueeze(1) - column_N).square()
    cost_BNN = distance / max(side - 1, 1) ** 2 * away_NN - (
        value_BRC.flatten(1).unsqueeze(2) * wanted_BRC.flatten(1).unsqueeze(1))
    block_BN = block_N.expand(B, N)
    for _ in range(side):
        place_BN = cost_BNN.argmin(dim=2)
        offer_BN = cost_BNN.gather(2, place_BN.unsqueeze(2)).squeeze(2)
        lowest_BN = torch.full_like(offer_BN, torch.inf).scatter_reduce_(1, place_BN, offer_BN, 'amin')
        candidate_BN = torch.where(offer_BN == lowest_BN.gather(1, place_BN), block_BN, N)
        taken_BN = torch.full_like(block_N, N).repeat(B, 1).scatter_reduce_(1, place_BN, candidate_BN, 'amin')
        refused_BN = taken_BN.gather(1, place_BN) != block_BN
        cost_BNN.scatter_add_(2, place_BN.unsqueeze(2), refused_BN.to(cost_BNN.dtype).unsqueeze(2))
    return torch.where(taken_BN < N, taken_BN, block_BN).view(B, R, C)


def move_blocks(images: torch.Tensor, example: torch.Tensor, block_BRC: torch.Tensor) -> torch.Tensor:
    """Images made of the blocks of others.

    Args:
        images: (B, channels, H, W), any dtype and memory format; R divides H, and C divides W.
        example: (B,) which image to take the blocks of, or (B, R, C) for each block.
        block_BRC: (B, R, C) which block to show at each place, in row-major order.

    Returns:
        (B, channels, H, W), in the memory format of the images.

    Example:
        >>> import torch
        >>> images = torch.arange(8.0).view(2, 1, 1, 4)
        >>> move_blocks(images, torch.tensor([1, 0]), torch.tensor([[[1, 1]], [[0, 1]]])).flatten(1)
        tensor([[6., 7., 6., 7.],
                [0., 1., 2., 3.]])
    """
    B, channels, H, W = images.shape
    R, C = block_BRC.shape[1:]
    split = (B, channels, R, H // R, C, W // C)
    blocks = images.view(split).permute(0, 2, 4, 1, 3, 5).reshape(B * R * C, -1)
    taken = blocks.index_select(0, (example.view(B, -1) * (R * C) + block_BRC.flatten(1)).flatten())
    moved = torch.empty_like(images)
    moved.view(split).copy_(taken.view(B, R, C, channels, H // R, W // C).permute(0, 3, 1, 4, 2, 5))
    return moved
