"""Boxes, and masks of pixels made from them.

Shape suffixes: K boxes, H rows and W columns of pixels. A box is top, left, bottom, right; the last two are exclusive.
"""
import torch


def box_sides(lam_K1: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Sides of boxes of a share 1 - lam of the image and of its aspect, rounded down: equation (2) of CutMix.

    Args:
        lam_K1: (K, 1), any float dtype.
        H: Height of the image.
        W: Width of the image.

    Returns:
        (K, 2) heights and widths, int32.

    Example:
        >>> import torch
        >>> box_sides(torch.tensor([[0.75]]), H=20, W=31)
        tensor([[10, 15]], dtype=torch.int32)
    """
    share = (1 - lam_K1.double()).sqrt()
    return torch.cat([H * share, W * share], dim=1).int()


def box_around(centre_K2: torch.Tensor, sides_K2: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Boxes around centres, clipped to the image.

    Args:
        centre_K2: (K, 2) rows and columns, integers.
        sides_K2: (K, 2) or (1, 2) heights and widths, integers. Of an odd side, the larger part is below or right of
            the centre.
        H: Height of the image.
        W: Width of the image.

    Returns:
        (K, 4) boxes.

    Example:
        >>> import torch
        >>> box_around(torch.tensor([[0, 5], [4, 4]]), torch.tensor([[5, 4]]), H=8, W=8)
        tensor([[0, 3, 3, 7],
                [2, 2, 7, 6]])
    """
    top, left = (centre_K2 - sides_K2 // 2).clamp_min(0).unbind(dim=1)
    bottom, right = (centre_K2 + (sides_K2 + 1) // 2).unbind(dim=1)
    return torch.stack([top, left, bottom.clamp_max(H), right.clamp_max(W)], dim=1)


def inside(box_K4: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Masks of the pixels in boxes.

    Args:
        box_K4: (K, 4) boxes.
        H: Height of the image.
        W: Width of the image.

    Returns:
        (K, 1, H, W) bool, on the device of the boxes.

    Example:
        >>> import torch
        >>> inside(torch.tensor([[0, 1, 2, 3]]), H=3, W=4)[0, 0].int()
        tensor([[0, 1, 1, 0],
                [0, 1, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    top, left, bottom, right = box_K4.view(-1, 4, 1, 1, 1).unbind(dim=1)
    y = torch.arange(H, device=box_K4.device).view(1, 1, H, 1)
    x = torch.arange(W, device=box_K4.device).view(1, 1, 1, W)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
