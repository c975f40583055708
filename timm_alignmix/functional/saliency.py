"""Where images draw attention, computed from their pixels alone, and pairs of images that differ there.

Shape suffixes: B batch, C channels, H rows, W columns.
"""
import math
from functools import reduce

import torch
import torch.nn.functional as F

from ._precision import at_least_fp32

_NEIGHBOURHOODS = (12, 24, 48, 28, 56, 112)  # pixels on each side of the centre
_SPECTRAL_SIDE = 128  # larger images are resized to it


def fine_grained_saliency(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Fine-grained static saliency of 8-bit images: Montabone and Soto, Image and Vision Computing 28 (2010).

    How far a pixel is above the mean of its neighbourhood (on) or below it (off), summed over six neighbourhoods. The
    integers are those of OpenCV's StaticSaliencyFineGrained, of RGB images. It adds in float32, which is exact up to
    32,896 pixels an image; these sums are exact up to 8 million.

    Args:
        pixels_BCHW: (B, 3, H, W) RGB or (B, 1, H, W) grey pixels 0 to 255, integers of any dtype.

    Returns:
        (B, H, W) saliency 0 to 255, int32; 0 everywhere in an image of one colour.

    Raises:
        ValueError: Not 1 or 3 channels.

    Example:
        >>> import torch
        >>> pixels = torch.arange(5).repeat(5, 1).expand(1, 3, 5, 5) * 50
        >>> fine_grained_saliency(pixels)[0, 0]
        tensor([255, 183,   0, 176, 255], dtype=torch.int32)
    """
    B, C, H, W = pixels_BCHW.shape
    if C not in (1, 3):
        raise ValueError(f'saliency is that of RGB or grey images, got {C} channels')
    pixels_BCHW = pixels_BCHW.int()
    # OpenCV's weights of red, green and blue, in 2**-15.
    grey = pixels_BCHW[:, 0] if C == 1 else (
        9798 * pixels_BCHW[:, 0] + 19235 * pixels_BCHW[:, 1] + 3735 * pixels_BCHW[:, 2] + 2 ** 14) >> 15
    grey = _binomial(_binomial(grey))
    integral = F.pad(grey, (1, 0, 1, 0)).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    on, off = torch.zeros_like(grey), torch.zeros_like(grey)
    for n in _NEIGHBOURHOODS:
        (top, bottom), (left, right) = (_window(side, n, grey.device) for side in (H, W))
        rows = integral.index_select(1, bottom) - integral.index_select(1, top)
        total = rows.index_select(2, right) - rows.index_select(2, left)
        area = (bottom - top).unsqueeze(1) * (right - left)
        # grey minus the mean of the others, towards 0: |excess| is below 2**24, and truncation commutes with the sign.
        excess = torch.div(area * grey - total, (area - 1).clamp_min(1), rounding_mode='trunc')
        on += excess.clamp_min(0)
        off -= excess.clamp_max(0)
    # OpenCV scales the sum again, by 255 over the larger maximum, which is 255, and keeps 8 bits.
    return (_to_8_bits(on) + _to_8_bits(off)) & 255


def _binomial(grey_BHW: torch.Tensor) -> torch.Tensor:
    """OpenCV's 3x3 Gaussian blur of 8-bit images."""
    for dim in (1, 2):
        last = grey_BHW.shape[dim] - 1
        place = torch.arange(-1, last + 2, device=grey_BHW.device).abs()
        padded = grey_BHW.index_select(dim, (last - (last - place).abs()).clamp_min(0))  # reflected at the edge pixels
        before, middle, after = (padded.narrow(dim, start, last + 1) for start in range(3))
        grey_BHW = before + 2 * middle + after
    return (grey_BHW + 8) >> 4


def _window(side: int, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First and, exclusive, last place of the window around each place, int32."""
    place = torch.arange(side, device=device, dtype=torch.int32)
    return (place - n + 1).clamp_min(0), (place + n + 1).clamp_max(side)


def _to_8_bits(value_BHW: torch.Tensor) -> torch.Tensor:
    """Scale to a maximum of 255 for each image. OpenCV's floats give the same for all sums, which are 1,530 at most."""
    return 255 * value_BHW // value_BHW.amax(dim=(1, 2), keepdim=True).clamp_min(1)


def spectral_residual(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Saliency as the part of the spectrum that its neighbourhood does not predict: Hou and Zhang, CVPR 2007.

    As in GuidedMixup, arXiv 2306.16612: of normalised images, at 128x128 if they are larger, not squared, blurred.

    Args:
        images_BCHW: (B, C, H, W), H and W above 3; channels are averaged unless they are 3, RGB.

    Returns:
        (B, H, W) saliency >= 0, float32 (float64 for float64 images).

    Example:
        >>> import torch
        >>> spectral_residual(torch.randn(2, 3, 224, 160)).shape
        torch.Size([2, 224, 160])
    """
    images_BCHW = at_least_fp32(images_BCHW)
    H, W = images_BCHW.shape[2:]
    if images_BCHW.shape[1] == 3:
        red, green, blue = images_BCHW.unbind(dim=1)
        grey = 0.2989 * red + 0.587 * green + 0.114 * blue
    else:
        grey = images_BCHW.mean(dim=1)
    if max(H, W) > _SPECTRAL_SIDE:
        grey = _resize(grey, _SPECTRAL_SIDE, _SPECTRAL_SIDE)
    spectrum = torch.fft.fft2(grey)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-10).sqrt()
    log = magnitude.log()
    mean = F.avg_pool2d(F.pad(log, (1, 1, 1, 1), mode='replicate'), 3, stride=1)
    saliency = gaussian_blur(torch.fft.ifft2(spectrum * ((log - mean).exp() / magnitude)).abs())
    return _resize(saliency, H, W) if max(H, W) > _SPECTRAL_SIDE else saliency


def _resize(x_BHW: torch.Tensor, H: int, W: int) -> torch.Tensor:
    return F.interpolate(x_BHW.unsqueeze(1), (H, W), mode='bilinear', antialias=True).squeeze(1)


def gaussian_blur(x_BHW: torch.Tensor, radius: int = 3, sigma: float = 3.0) -> torch.Tensor:
    """Blur with a Gaussian of 2 * radius + 1 taps; edges are reflected.

    Args:
        x_BHW: (B, H, W), any float dtype, H and W above the radius.
        radius: Taps on each side.
        sigma: Deviation in pixels.

    Returns:
        (B, H, W), of the dtype of x.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 9, 9)
        >>> x[0, 4, 4] = 1
        >>> round(gaussian_blur(x, sigma=1.0)[0, 4, 4].item(), 4)
        0.1592
    """
    # Sums of slices: a convolution would round to TF32, and its kernel would be copied to the device in every step.
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    padded = F.pad(x_BHW, (radius,) * 4, mode='reflect')
    for dim in (1, 2):
        size = padded.shape[dim] - 2 * radius
        padded = reduce(torch.add, (tap / sum(taps) * padded.narrow(dim, i, size) for i, tap in enumerate(taps)))
    return padded


def shares(saliency_BHW: torch.Tensor, block: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """Share of each block of pixels in the saliency of its image.

    Args:
        saliency_BHW: (B, H, W) saliency >= 0, float32 or float64, of any scale.
        block: Height and width of the blocks, which divide H and W.

    Returns:
        (B, rows, columns), each image's of sum 1; equal shares where an image has no saliency, or not finite ones.

    Example:
        >>> import torch
        >>> shares(torch.tensor([[[1.0, 0.0, 2.0, 1.0]], [[0.0] * 4]]), (1, 2))
        tensor([[[0.2500, 0.7500]],
        <BLANKLINE>
                [[0.5000, 0.5000]]])
    """
    mean = F.avg_pool2d(saliency_BHW.unsqueeze(1), block).squeeze(1)
    return (mean / mean.sum(dim=(1, 2), keepdim=True)).nan_to_num(nan=1 / mean[0].numel())


def greedy_cycle(distance_BB: torch.Tensor) -> torch.Tensor:
    """Pair each example with one that is far from it: one cycle through the batch, built greedily.

    GuidedMixup, arXiv 2306.16612: the largest distance gives the first example and its partner; the
    partner of that one is the farthest example that has no place in the cycle yet, and so on.

    Args:
        distance_BB: (B, B) distances; the diagonal is not looked at.

    Returns:
        (B,) partner of each example, int64, without fixed points for B > 1. Nothing waits for the device.

    Example:
        >>> import torch
        >>> place = torch.tensor([0.0, 1.0, 5.0, 9.0])
        >>> greedy_cycle((place[:, None] - place).abs())
        tensor([3, 2, 0, 1])
    """
    B = len(distance_BB)
    left = distance_BB.clone().fill_diagonal_(-torch.inf)
    largest = left.argmax().view(1)
    order = [largest // B, largest % B]
    for _ in range(B - 2):
        left.index_fill_(1, order[-2], -torch.inf)
        order.append(left.index_select(0, order[-1]).argmax(dim=1))
    order_B = torch.cat(order[:B])
    return torch.empty_like(order_B).scatter_(0, order_B, order_B.roll(-1))
