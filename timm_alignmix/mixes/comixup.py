"""Co-Mixup: Saliency Guided Joint Mixup with Supermodular Diversity, ICLR 2021, arXiv 2102.03065.

Parts of a batch make as many outputs as they have inputs. Each block of a grid shows an input, or half of two, in each
output: those that are salient there (unary terms), with smooth borders, and different ones in different outputs
(supermodular term, penalised above a threshold). A, which says how well two inputs go together, is (1 - omega) I +
omega D, D being the distances of their most salient places. The saliency of a pixel is the root mean square over the
channels of the gradient of the clean loss. The target of an output is the mean over its blocks.

Departures from the published code:

- Each output is labelled by expansion moves, found exactly and for all parts at once on the device, in float64, from
  the labels that it has. The code moves between two labels at a time (alpha-beta swap), part by part on the CPU, from
  the first label everywhere, and rounds the smoothness to 1/1000.
- Parts of a batch have equal sizes, or sizes that differ by one, and not a smaller last one.
- A salient place is a window of 8x8 pixels, of all those of images up to 64 pixels a side (there, of CIFAR and
  TinyImageNet), and of every eighth in larger ones (ImageNet). Where all places are the same, D is 0 and not 0 / 0.
- The clean loss is for saliency alone, in evaluation mode, and not trained on (its clean_lam = 0).
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from ..functional import co_mixup_labels, move_blocks, shares
from ..step_random import StepRandom
from .base import Draw, Mix, check_completed, mix_examples
from .registry import register_mix

_WINDOW = 8  # pixels of a salient place, per side
_SMALL = 64  # sides up to which windows overlap


@register_mix('comixup')
class CoMixup(Mix):
    """Co-Mixup: fit the salient blocks of many images together, in outputs that differ.

    Each step first takes the gradient of the clean loss with respect to the images, about two thirds of a step more.

    Args:
        m: The most examples of a part, which are mixed with one another.
        blocks: Blocks per side, 2 to 6.
        alpha: Concentration of the Dirichlet distribution of the prior, drawn for each part.
        beta: Smoothness.
        gamma: Weight of the penalty for inputs that other outputs show.
        eta: Weight of the prior.
        tau: Share of an image that the other outputs may show of an input without penalty.
        threshold: 'hard', or 'soft': only what is above tau is penalised.
        omega: Weight of distances between salient places in A, 0 to 1.
        sweeps: Number of times that the outputs are labelled in turn.
        resolve: Part outputs that show the same inputs, in the last sweep.
        saliency_mode: Mode of the model in the pass for the saliency, 'eval' or 'train'.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'comixup')
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['mode']
        'input'
    """

    def __init__(
            self,
            m: int = 20,
            blocks: int = 4,
            alpha: float = 2.0,
            beta: float = 0.32,
            gamma: float = 1.0,
            eta: float = 0.05,
            tau: float = 0.83,
            threshold: str = 'hard',
            omega: float = 0.001,
            sweeps: int = 4,
            resolve: bool = True,
            saliency_mode: str = 'eval',
    ) -> None:
        super().__init__()
        if not (m >= 1 and 2 <= blocks <= 6 and sweeps >= 1):
            raise ValueError(
                'comixup needs m >= 1, 2 to 6 blocks per side and sweeps >= 1, got '
                f'm={m}, blocks={blocks} and sweeps={sweeps}')
        if not (alpha > 0 and min(beta, gamma, eta, tau) >= 0 and 0 <= omega <= 1):
            raise ValueError(
                'comixup needs alpha > 0, beta, gamma, eta and tau >= 0 and 0 <= omega <= 1, got '
                f'alpha={alpha}, beta={beta}, gamma={gamma}, eta={eta}, tau={tau} and omega={omega}')
        if threshold not in ('hard', 'soft') or saliency_mode not in ('eval', 'train'):
            raise ValueError(
                "threshold must be 'hard' or 'soft' and saliency_mode 'eval' or 'train', got "
                f'threshold={threshold!r} and saliency_mode={saliency_mode!r}')
        self.m, self.blocks, self.alpha, self.eta, self.omega = m, blocks, float(alpha), eta, omega
        self.clean_pass = saliency_mode
        self.labelling: dict[str, Any] = dict(
            beta=beta, gamma=gamma, tau=tau, threshold=threshold, sweeps=sweeps, resolve=resolve)

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        (B, _, H, W), S = images.shape, self.blocks
        if H % S or W % S:
            raise ValueError(
                f'comixup needs images whose sides {S} blocks divide, got {H}x{W}; crop or resize them, or set its '
                'option blocks')
        options: dict[str, Any] = dict(dtype=torch.float64, device=images.device)
        return dict(
            mode='input', layer=None, lam=None, clean_pass=self.clean_pass,
            # Gamma variates; divided by the sum of a part they are Dirichlet. And where in a part to start.
            variate=torch._standard_gamma(torch.full((B,), self.alpha, **options), generator=rng.device),
            start=torch.rand(B, S, S, generator=rng.device, **options))

    def complete(self, images: torch.Tensor, draw: Draw, seen: torch.Tensor | None, target: torch.Tensor) -> Draw:
        B, S = len(images), self.blocks
        with torch.autocast(images.device.type, enabled=False):
            terms = self.terms(seen, draw['variate'], draw['start'])
            # Inputs by their number in the batch, without the rows that parts lack.
            sizes = [len(part) for part in images.tensor_split(self.parts(B))]
            starts = [sum(sizes[:k]) for k in range(len(sizes))]
            shown = torch.cat([
                labels[:size] + start
                for labels, size, start in zip(co_mixup_labels(*terms, **self.labelling), sizes, starts, strict=True)])
            weights = torch.zeros(B, B, dtype=torch.float32, device=images.device)
            weights.scatter_add_(1, shown.flatten(1), weights.new_full((), 0.5 / S ** 2).expand(B, 2 * S * S))
        return dict({key: draw[key] for key in ('mode', 'layer', 'lam')}, shown=shown, weights=weights)

    def parts(self, B: int) -> int:
        """Number of parts of a batch."""
        return -(-B // self.m)

    def terms(
            self, saliency_BHW: torch.Tensor, variate_B: torch.Tensor, start_BSS: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Costs (P, M, S, S), A (P, M, M), start (P, M, S, S) and which there are (P, M), as :func:`co_mixup_labels`.

        Args:
            saliency_BHW: Saliency of each pixel.
            variate_B: Gamma variates of the prior.
            start_BSS: Where in a part to start, in [0, 1).
        """
        B, H, W = saliency_BHW.shape
        S = self.blocks

        def of_parts(x: torch.Tensor) -> torch.Tensor:
            return pad_sequence([*x.tensor_split(self.parts(B))], batch_first=True)

        present_PM = of_parts(torch.ones_like(variate_B))
        variate_PM = of_parts(variate_B)
        prior_PM = variate_PM / variate_PM.sum(dim=1, keepdim=True)
        u_PMSS = of_parts(shares(saliency_BHW, (H // S, W // S)).double())
        cost_PMSS = -u_PMSS - self.eta / S ** 2 * (prior_PM + 1e-8).log().view(*prior_PM.shape, 1, 1)
        # A.
        stride = 1 if max(H, W) <= _SMALL else _WINDOW
        window_BHW = F.avg_pool2d(shares(saliency_BHW).unsqueeze(1), min(_WINDOW, H, W), stride).squeeze(1)
        columns, place_B = window_BHW.shape[2], window_BHW.flatten(1).argmax(dim=1)
        place_PM2 = of_parts(torch.stack([place_B // columns, place_B % columns], dim=1).double())
        distance_PMM = torch.cdist(place_PM2, place_PM2, p=1) * present_PM.unsqueeze(1) * present_PM.unsqueeze(2)
        count_P11 = present_PM.sum(dim=1).view(-1, 1, 1)
        distance_PMM = (distance_PMM * count_P11 / distance_PMM.sum(dim=(1, 2), keepdim=True)).nan_to_num(nan=0)
        own_MM = torch.eye(present_PM.shape[1], dtype=torch.float64, device=saliency_BHW.device)
        compatibility_PMM = (1 - self.omega) * own_MM + self.omega * distance_PMM
        start_PMSS = (of_parts(start_BSS) * count_P11.unsqueeze(3)).long()
        return cost_PMSS, compatibility_PMM, start_PMSS, present_PM > 0

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        check_completed(self, draw)
        S = self.blocks
        own_SS = torch.arange(S * S, device=images.device).view(S, S).expand(len(images), S, S)
        first, second = (move_blocks(images, shown, own_SS) for shown in draw['shown'].unbind(dim=3))
        return first.lerp_(second, 0.5)

    def target(self, target_BC: torch.Tensor, draw: Draw) -> torch.Tensor:
        return mix_examples(target_BC, draw['weights'])
