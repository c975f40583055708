"""Layers that AlignMixup/AE adds to a network: embedding f, classifier g of the embedding, decoder D.

Shape suffixes: B batch, D channels.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..models.decoder import ResidualDecoder


class AELayers(nn.Module):
    """Layers f, g and D on the last feature map of a network, average-pooled to `resolution` x `resolution`.

    f turns a map into a code: a vector (B, dim), or a tensor (B, dim // 4, resolution // 2, resolution // 2). In the
    variational form it is twice as long along dimension 1, means and standard deviations of a normal distribution.
    Mixing codes then mixes both, and the squared distance of two codes is the squared 2-Wasserstein distance of the
    distributions.

    Args:
        chs: Channels of the feature map.
        resolution: Side of the pooled map, A of the paper.
        num_classes: Classes.
        dim: Length of the vector; a tensor has a quarter as many channels.
        tensor: Make the code a tensor E, by a 2x2 convolution of stride 2, instead of a vector e.
        variational: Make the code a distribution.
        img_size: Size of the decoder's images; None for no decoder.
        img_chans: Channels of the images.
        width: Channels of the decoder's last block.
    """

    def __init__(
            self,
            chs: int,
            resolution: int,
            num_classes: int,
            dim: int = 512,
            tensor: bool = False,
            variational: bool = False,
            img_size: tuple[int, int] | None = None,
            img_chans: int = 3,
            width: int = 64,
    ) -> None:
        super().__init__()
        self.resolution, self.tensor, self.variational = resolution, tensor, variational
        parts = 2 if variational else 1
        if tensor:
            self.code_shape: tuple[int, ...] = (dim // 4, resolution // 2, resolution // 2)
            self.embed: nn.Module = nn.Conv2d(chs, parts * (dim // 4), 2, stride=2)
        else:
            self.code_shape = (dim,)
            self.embed = nn.Linear(chs * resolution ** 2, parts * dim)
        size = torch.Size(self.code_shape).numel()
        self.classifier = nn.Linear(size, num_classes)
        self.decoder = None if img_size is None else ResidualDecoder(size, img_size, img_chans, width)

    def pool(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Pool a feature map (B, D, H, W) to A, (B, D, resolution, resolution)."""
        return F.adaptive_avg_pool2d(feature_map, self.resolution)

    def encode(self, map_BDHW: torch.Tensor) -> torch.Tensor:
        """Apply f: the code of a pooled map."""
        code = self.embed(map_BDHW if self.tensor else map_BDHW.flatten(1))
        if not self.variational:
            return code
        mean, log_var = code.float().chunk(2, dim=1) if code.dtype != torch.float64 else code.chunk(2, dim=1)
        return torch.cat([mean, (0.5 * log_var).exp()], dim=1)

    def sample(self, code: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Flat embeddings (B, size) of codes; in the variational form mean + noise * deviation, or the mean."""
        if self.variational:
            code, deviation = code.chunk(2, dim=1)
            if noise is not None:
                code = code + noise.to(code.dtype) * deviation
        return code.flatten(1)

    def divergence(self, code: torch.Tensor) -> torch.Tensor:
        """Kullback-Leibler divergence from the standard normal distribution, (B,), summed over the code."""
        mean, deviation = code.chunk(2, dim=1)
        return 0.5 * (mean.square() + deviation.square() - 1).flatten(1).sum(dim=1) - deviation.log().flatten(1).sum(1)
