"""Residual decoder from a vector to an image: the generator of improved WGANs.

Paper: `Improved Training of Wasserstein GANs` - https://arxiv.org/abs/1704.00028

AlignMixup/AE (https://arxiv.org/abs/2103.15375) reconstructs images with it but does not give its size. A linear layer
makes a small map, residual blocks double it, and a norm, an activation and a 3x3 convolution follow. At 64 px and width
64 this is the generator paper's network for that size (blocks of 512, 256, 128 and 64 channels from 4x4). The output is
linear instead of a tanh, since images are normalised by mean and std, not into [-1, 1].
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

__all__ = ['ResidualDecoder']


class UpBlock(nn.Module):
    """Residual block that doubles the resolution: norm, activation, nearest neighbours, two 3x3 convolutions."""

    def __init__(self, in_chs: int, out_chs: int):
        super().__init__()
        self.norm1 = BatchNormAct2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, padding=1, bias=False)
        self.norm2 = BatchNormAct2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1)
        self.skip = nn.Conv2d(in_chs, out_chs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = F.interpolate(self.norm1(x), scale_factor=2.0, mode='nearest')
        branch = self.conv2(self.norm2(self.conv1(branch)))
        # The 1x1 convolution of the skip commutes with the upsampling and is cheaper before it.
        return branch + F.interpolate(self.skip(x), scale_factor=2.0, mode='nearest')


class ResidualDecoder(nn.Module):
    """Decoder of vectors of length `dim` into images.

    Args:
        img_size: Height and width of the images. Halved until the shorter side is 4 to 7, both must be whole.
        width: Channels of the last block; earlier blocks have twice as many each, up to 8 times.

    Raises:
        ValueError: Doubling a small map does not reach the size.
    """

    def __init__(self, dim: int, img_size: tuple[int, int], out_chans: int = 3, width: int = 64):
        super().__init__()
        doublings = max((min(img_size) // 4).bit_length() - 1, 0)
        if any(side % 2 ** doublings for side in img_size) or not doublings:
            raise ValueError(
                f'the decoder doubles a small map {doublings} times and cannot reach {img_size[0]}x{img_size[1]}; use '
                'a size such as 32, 64, 96, 128, 160 or 224')
        self.img_size = tuple(img_size)
        chs = [width * min(8, 2 ** (doublings - 1 - i)) for i in range(doublings)]
        self.base = (chs[0], img_size[0] // 2 ** doublings, img_size[1] // 2 ** doublings)
        self.fc = nn.Linear(dim, self.base[0] * self.base[1] * self.base[2])
        self.blocks = nn.Sequential(*(UpBlock(a, b) for a, b in zip([chs[0], *chs], chs, strict=False)))
        self.norm = BatchNormAct2d(chs[-1])
        self.conv = nn.Conv2d(chs[-1], out_chans, 3, padding=1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decode (B, dim) to (B, out_chans, *img_size)."""
        return self.conv(self.norm(self.blocks(self.fc(x).view(-1, *self.base))))
