"""Puzzle Mix: Exploiting Saliency and Local Statistics for Optimal Mixup, ICML 2020, arXiv 2009.06962.

A grid of blocks, each of which takes one of `n_labels` weights z between the two images: those that keep salient blocks
(unary terms), have smooth borders (pairwise terms) and a mean near lam (prior), equation (4). Then salient blocks of
either image that the mask hides move to where it shows them, equation (5). The saliency of a pixel is the root mean
square over the channels of the gradient of the clean loss. lam is the mean of z, before blocks move.

Departures from the published code, see docs/findings.md:

- The masks are exact minima, found for the whole batch on the device. The code moves between two labels at a time
  (alpha-beta swap), image by image on the CPU. It adds 1e-8 to the probabilities of the prior, which is convex for lam
  from 1e-8^(1/K) on, K = n_labels - 1: a lam nearer to 0 or 1 (2 in 10,000 with three labels) counts as that one.
- The code overflows 32-bit integers for salient blocks: a block with more than some 21 / S^2 of the saliency loses it.
- Places that transport leaves without a block show their own, not black.
- The loss is cross-entropy on every data set; for CIFAR, the code's is the binary one of the softmax.
- Grids of any images whose sides the number of blocks divides; `neigh_size` and `t_size` are lowered to sizes that
  divide a block. Differences of pixels above the range of pictures, such as those of erased noise, count as full.
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..functional import block_transport, level_cut, move_blocks, shares
from ..functional._precision import at_least_fp32
from ..step_random import StepRandom
from .base import Draw, MaskPair, mix_masked
from .registry import register_mix

_BLOCKS = (2, 4, 8, 16)  # per side
_UNIT = 2e4  # of energy in integers, times the number of blocks


@register_mix('puzzlemix')
class PuzzleMix(MaskPair):
    """PuzzleMix: fit the salient blocks of two images together.

    Each step that mixes first takes the gradient of the clean loss with respect to the images, about two thirds of a
    step more.

    Args:
        alpha: lam ~ Beta(alpha, alpha), of the prior.
        per_example: One lam for each example instead of one for the batch.
        n_labels: Number of weights z, from 0 to 1 in equal steps.
        beta: Smoothness of the mask, 0 to 50.
        gamma: Share of it that depends on the images, 0 to 1.
        eta: Weight of the prior, 0 to 1000.
        neigh_size: Side of the pixels, averaged, that are compared at borders.
        transport: Move blocks.
        t_eps: Cost of moving along a whole side.
        t_size: Side of the blocks that move, in pixels; -1 are those of the mask.
        saliency_mode: Mode of the model in the pass for the saliency, 'eval' or 'train'.
        prob: Probability of mixing; the other steps are clean.
        std: Deviation by which pixels in [0, 1] were divided, per channel; None is that of `Mix.normalization`.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'puzzlemix')
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['lam'].shape
        torch.Size([4])
    """

    def __init__(
            self,
            alpha: float = 1.0,
            per_example: bool = False,
            n_labels: int = 3,
            beta: float = 1.2,
            gamma: float = 0.5,
            eta: float = 0.2,
            neigh_size: int = 4,
            transport: bool = True,
            t_eps: float = 0.8,
            t_size: int = -1,
            saliency_mode: str = 'eval',
            prob: float = 1.0,
            std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(prob, alpha, per_example, saliency_mode)
        # Above these bounds energies would not fit 32 bits, or borders would cost less than nothing.
        if not (0 <= beta <= 50 and 0 <= gamma <= 1 and 0 <= eta <= 1000 and t_eps >= 0):
            raise ValueError(
                'puzzlemix needs 0 <= beta <= 50, 0 <= gamma <= 1, 0 <= eta <= 1000 and t_eps >= 0, got '
                f'beta={beta}, gamma={gamma}, eta={eta} and t_eps={t_eps}')
        if not (2 <= n_labels <= 9 and neigh_size >= 1 and (t_size == -1 or t_size >= 1)):
            raise ValueError(
                'puzzlemix needs 2 to 9 labels, neigh_size >= 1 and t_size >= 1 or -1, got '
                f'n_labels={n_labels}, neigh_size={neigh_size} and t_size={t_size}')
        self.n_labels, self.beta, self.gamma, self.eta, self.neigh_size = n_labels, beta, gamma, eta, neigh_size
        self.transport, self.t_eps, self.t_size, self.std = transport, t_eps, t_size, std

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        H, W = images.shape[2:]
        sizes = [S for S in _BLOCKS if H % S == W % S == 0]
        if not sizes:
            raise ValueError(f'puzzlemix needs images with even sides, got {H}x{W}; crop or resize them')
        # On the host, because shapes depend on it.
        blocks = sizes[int(torch.randint(len(sizes), (), generator=rng.host))]
        pair = self.draw_pair(images, rng)
        return dict(perm=pair['perm'], prior_lam=pair['lam'], blocks=blocks)

    def complete_mask(
            self, images: torch.Tensor, draw: Draw, saliency_BHW: torch.Tensor, target: torch.Tensor) -> Draw:
        S, perm = draw['blocks'], draw['perm']
        H, W = images.shape[2:]
        h, w = H // S, W // S
        with torch.autocast(images.device.type, enabled=False):
            u_BSS = shares(saliency_BHW, (h, w))
            cost_BLSS, below, right = self.energy(images, perm, u_BSS, draw['prior_lam'])
            scale, K = _UNIT * S * S, self.n_labels - 1
            level_BSS = level_cut(*(
                (term * factor).round().int()
                for term, factor in ((cost_BLSS, scale), (below, scale / K ** 2), (right, scale / K ** 2))))
            z_BSS = 1 - level_BSS.to(u_BSS.dtype) / K
            drawn = dict(mask=_enlarge(z_BSS, h, w).unsqueeze(1), lam=z_BSS.mean(dim=(1, 2)))
            if not self.transport:
                return drawn
            if self.t_size > 0 and (t := math.gcd(self.t_size, h, w)) < max(h, w):
                u_BSS, z_BSS = shares(saliency_BHW, (t, t)), _enlarge(z_BSS, h // t, w // t)
            return dict(
                drawn, moved=block_transport(z_BSS > 0, u_BSS, self.t_eps),
                moved_partner=block_transport(z_BSS < 1, u_BSS.index_select(0, perm), self.t_eps))

    def energy(
            self, images: torch.Tensor, perm_B: torch.Tensor, u_BSS: torch.Tensor, lam: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Costs of each label, and weights of (z_s - z_t)^2 between a block and those below and on its right.

        Args:
            images: (B, C, H, W).
            perm_B: Partners.
            u_BSS: Share of each block in the saliency of its image.
            lam: Weight of the example in the prior, () or (B,).

        Returns:
            (B, n_labels, S, S), where label l is z = 1 - l / K; (B, S - 1, S); and (B, S, S - 1).
        """
        S, K = u_BSS.shape[1], self.n_labels - 1
        least = 1e-8 ** (1 / K)
        lam = lam.to(u_BSS.dtype).clamp(least, 1 - least).view(-1, 1, 1)
        smoothness = self.beta / (16 * S)
        # Of z = 1 and z = 0: what the image that is not shown has there, and borders.
        one_BSS, zero_BSS = u_BSS.index_select(0, perm_B), u_BSS.clone()
        weights = []
        for dim, (both, first, second, neither) in zip((1, 2), self._borders(images, perm_B, S), strict=True):
            both, first, second, neither = (
                smoothness * self.gamma * d for d in (both, first, second, neither))
            before, after = (slice(None, -1), slice(1, None))
            for part, one, zero in ((before, both + first, neither + second), (after, both + second, neither + first)):
                place = (slice(None), part) if dim == 1 else (slice(None), slice(None), part)
                one_BSS[place] += one / 2
                zero_BSS[place] += zero / 2
            weights.append(smoothness + (first + second - both - neither) / 2)
        cost = []
        for level in range(K + 1):
            probability = math.comb(K, level) * lam ** (K - level) * (1 - lam) ** level
            prior = -self.eta / S ** 2 * (probability + 1e-8).log()
            cost.append((1 - level / K) * one_BSS + level / K * zero_BSS + prior)
        return torch.stack(cost, dim=1), weights[0], weights[1]

    def _borders(self, images: torch.Tensor, perm_B: torch.Tensor, S: int) -> list[tuple[torch.Tensor, ...]]:
        """Mean difference of pixels along the borders of blocks, vertical neighbours first and then horizontal ones.

        Of four pairs: both blocks of the example, the first of it alone, the second alone, neither (so the partner's).
        """
        std = self.std or self.normalization[1]
        if len(std) != images.shape[1]:
            raise ValueError(
                f'puzzlemix needs the deviation of each of {images.shape[1]} channels, got std={std}: set its option '
                'std')
        h, w = (side // S for side in images.shape[2:])
        n = math.gcd(self.neigh_size, h, w)
        pooled = F.avg_pool2d(at_least_fp32(images), n)
        # Numbers of Python go to the device without a wait; a tensor of them would not.
        pixels = torch.stack([channel * s for channel, s in zip(pooled.unbind(1), std, strict=True)], dim=1)
        borders = []
        for k, x in ((h // n, pixels), (w // n, pixels.transpose(2, 3))):
            last, first = x[:, :, k - 1:-1:k], x[:, :, k::k]
            last_partner, first_partner = (edge.index_select(0, perm_B) for edge in (last, first))
            difference = [
                (a - c).abs().mean(dim=1).unflatten(2, (S, -1)).mean(dim=3).nan_to_num(nan=1).clamp_max(1)
                for a, c in ((last, first), (last, first_partner), (last_partner, first))]
            difference.append(difference[0].index_select(0, perm_B))
            borders.append(tuple(difference))
        vertical, horizontal = borders
        return [vertical, tuple(d.transpose(1, 2) for d in horizontal)]

    def mix_images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        if 'moved' not in draw:
            return super().mix_images(images, draw)
        own = torch.arange(len(images), device=images.device)
        return mix_masked(
            move_blocks(images, own, draw['moved']), move_blocks(images, draw['perm'], draw['moved_partner']),
            draw['mask'])


def _enlarge(x_BSS: torch.Tensor, h: int, w: int) -> torch.Tensor:
    return x_BSS.repeat_interleave(h, dim=1).repeat_interleave(w, dim=2)
