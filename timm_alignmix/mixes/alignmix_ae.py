"""AlignMixup/AE and AlignMixup/VAE: Improving Representations By Interpolating Aligned Features, CVPR 2022, arXiv
2103.15375 [A], section 4 and Algorithm 1 with its autoencoder. The authors' release does not contain it.

The network is an encoder F (the model up to the map that it pools), an FC layer f from that map A, pooled to 4x4, to e
in R^512, a classifier g of e and a residual decoder D of e. Each step is one of several cases, drawn uniformly: `clean`
(only ||x - D(f(F(x)))||^2), `input` (mix x), `feat` and `feat_prime` (mix aligned A, (11) and (12)), `embed` (mix e,
which has no positions to align). The published figures are of {x, A, e}, these five; Algorithm 1's four are {x, A}.

The exported model is ours. In the paper the classifier reads e, so inference would need f, 4.2 M parameters on
ResNet-18 and 16.8 M on ResNet-50, and a network that timm does not have. Here the plain timm model is exported, whose
own classifier reads the pooled map. Two classifiers are trained on the same mixed examples, the model's own and the
paper's g(f(.)), and the loss of a classification step is the mean of both losses (`plain_weight`). Both train
the encoder; f, g and D stay in the task. Where A or e is mixed, the model's own classifier gets the mixed pooled
vector: alignment keeps the mean over positions, so it reaches the encoder through f alone. `plain_weight=0` trains F,
f, g and D as in the paper, and the model's own classifier beside them without a gradient into the encoder.
:meth:`AlignMixAE.predict` gives the logits of the paper's network.

The paper leaves open: the scale of the reconstruction error (the mean over values here: a sum over the 12,288 values of
an image would drown every other gradient), the size of the decoder, and for the variational form the weight of the
divergence and the alignment of (M, Sigma) (by the squared 2-Wasserstein distance here).

All layers get a gradient in each step, 0 where the case does not use them: data parallel training needs it, and weight
decay and momentum then act alike on one process and on many.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..anatomy import Anatomy, FeatureLayer, UnsupportedModel
from ..functional import target_mass
from ..step_random import StepRandom
from .ae_layers import AELayers
from .alignmix import AlignedMix
from .base import Draw, draw_mode, mix_pairs, mode_probabilities
from .criterion import Criterion
from .registry import register_mix

_MODES = {'x': ('input',), 'A': ('feat', 'feat_prime'), 'e': ('embed',), 'E': ('embed', 'embed_prime')}


@register_mix('alignmix_ae')
class AlignMixAE(AlignedMix):
    """AlignMixup with an autoencoder, and the rows of [A] Table 6.

    Args:
        layers: Layers to mix: 'x' (the image), 'A' (the feature map), 'e' (the vector f(A)), 'E' (instead of e: a
            tensor of 128 x 2 x 2, made by a 2x2 convolution of stride 2, which is aligned). 'x,A,e' or a sequence.
        decoder: Add the decoder and the case `clean`.
        variational: Make the embedding (mu, sigma), or (M, Sigma) for 'E', sampled in training and mixed together.
        aligned: Align positions before mixing; False mixes maps and tensors position by position.
        resolution: Side of A, to which the last feature map is average-pooled. None is 4, or the side of the map if it
            is smaller.
        mode_probs: Probabilities of the cases, in the order 'clean', 'input', 'feat', 'feat_prime', 'embed',
            'embed_prime' (those that occur) or by name. None is uniform.
        alpha: lam ~ Beta(alpha, alpha).
        per_example: One lam for each example ([A] Algorithm 1) instead of one for the batch (the release).
        eps: Entropy coefficient of the alignment.
        iterations: Sinkhorn iterations; 0 is one softmax.
        final_marginal: 'kept' or 'columns', see :func:`timm_alignmix.functional.align`.
        tolerance: Early stop of the iterations for each sample.
        plain_weight: Weight of the model's own classifier against the paper's, 0 to 1. At 0 it learns without a
            gradient into the encoder.
        recon_weight: Weight of the mean squared reconstruction error of normalised images.
        kl_weight: Weight of the variational form's divergence per image value.
        dim: Length of e.
        width: Channels of the decoder's last block.
        decode_size: Side of the decoder's images; None is the size of the images.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> model = timm.create_model('test_resnet', num_classes=10)
        >>> options = dict(layers='x,A', dim=16, width=4, mode_probs=dict(clean=1))
        >>> task = MixTask(model, 'alignmix_ae', options, img_size=64)
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['mode']
        'clean'
    """
    pairs = False

    def __init__(
            self,
            layers: str | Sequence[str] = ('x', 'A', 'e'),
            decoder: bool = True,
            variational: bool = False,
            aligned: bool = True,
            resolution: int | None = None,
            mode_probs: Any = None,
            alpha: float = 2.0,
            per_example: bool = False,
            eps: float = 0.1,
            iterations: int = 100,
            final_marginal: str = 'kept',
            tolerance: float | None = None,
            plain_weight: float = 0.5,
            recon_weight: float = 1.0,
            kl_weight: float = 1.0,
            dim: int = 512,
            width: int = 64,
            decode_size: int | None = None,
    ) -> None:
        super().__init__(alpha, per_example, eps, iterations, final_marginal, tolerance)
        chosen = tuple(layers.replace(',', ' ').split() if isinstance(layers, str) else layers)
        if not chosen or not set(chosen) <= set(_MODES) or len(set(chosen)) < len(chosen) or {'e', 'E'} <= set(chosen):
            raise ValueError(f"layers must be some of x, A, and e or E, such as 'x,A,e', got {layers!r}")
        if variational and not decoder:
            raise ValueError('variational=True needs decoder=True: without it nothing keeps the distributions apart')
        if not 0 <= plain_weight <= 1:
            raise ValueError(f'plain_weight must be from 0 to 1, got {plain_weight}')
        modes = ('clean',) * decoder + tuple(mode for name in _MODES if name in chosen for mode in _MODES[name])
        self.probs = mode_probabilities([1] * len(modes) if mode_probs is None else mode_probs, modes)
        self.mixed_layers, self.decoder, self.variational, self.aligned = chosen, decoder, variational, aligned
        self.resolution, self.plain_weight = resolution, plain_weight
        self.recon_weight, self.kl_weight = recon_weight, kl_weight
        self.dim, self.width, self.decode_size = dim, width, decode_size

    def bind(self, anatomy: Anatomy) -> None:
        self.head = anatomy.dense_head(allow_class_token=True)
        name, tensor = self.head.name, 'E' in self.mixed_layers
        if self.head.layout.kind != 'NCHW':
            raise UnsupportedModel(
                f'{anatomy.name}: {self.name} embeds the channels x height x width map of a convolutional network, and '
                f'the output of {name!r} is not one; use mix alignmix')
        chs, *sides = anatomy.output_shape(name)
        resolution = min(4, *sides) if self.resolution is None else self.resolution
        if not 1 < resolution <= min(sides) or tensor and (resolution < 4 or resolution % 2):
            need = "an even one from 4 on for layer 'E'" if tensor else 'from 2 on'
            raise UnsupportedModel(
                f'{anatomy.name}: its last map is {sides[0]}x{sides[1]} for images of '
                f'{anatomy.input_size[1]}x{anatomy.input_size[2]}, resolution={resolution} must be {need} and fit into '
                'it; larger images or a stride of 1 in the last stage (output_stride=16 for many timm models) give a '
                'larger map')
        if not self.plain_weight:
            self.layers = {name: anatomy.layer(name)}
        size = anatomy.input_size[1:] if self.decode_size is None else (self.decode_size,) * 2
        like = next(anatomy.model.parameters())
        self.extra = AELayers(
            chs, resolution, anatomy.num_classes, self.dim, tensor, self.variational, size if self.decoder else None,
            anatomy.input_size[0], self.width,
        ).to(like.device, like.dtype)

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        mode = draw_mode(self.probs, rng)
        draw: Draw = dict(mode=mode, layer=self.head.name, lam=None)
        draw.update(dict(images=images) if mode == 'clean' else self.draw_pair(images, rng))
        if self.variational:
            draw['noise'] = torch.randn(
                len(images), *self.extra.code_shape, generator=rng.device, device=rng.device.device)
        return draw

    def features(self, x: torch.Tensor, layer: FeatureLayer, draw: Draw) -> torch.Tensor:
        return x.detach()  # plain_weight=0; f gets the map itself

    def loss(self, output, feature_map, target, draw, criterion):
        if draw['mode'] == 'clean':
            loss = self._reconstruction(feature_map, draw)
        else:
            loss = self._classification(output, feature_map, target, draw, criterion)
        return loss + 0 * output.float().sum()

    def mass(self, output: torch.Tensor, target: torch.Tensor, draw: Draw) -> torch.Tensor:
        # Steps that mix features mix those of the extra classifier; the output is of clean examples.
        return super().mass(output, target, draw) if draw['mode'] == 'input' else target_mass(output, target)

    def _reconstruction(self, feature_map: torch.Tensor, draw: Draw) -> torch.Tensor:
        layers, images = self.extra, draw['images']
        code = layers.encode(layers.pool(feature_map))
        decoded = layers.decoder(layers.sample(code, draw.get('noise')))
        if images.shape[2:] != decoded.shape[2:]:
            images = F.interpolate(images, decoded.shape[2:], mode='bilinear', antialias=True)
        loss = self.recon_weight * F.mse_loss(decoded.to(images.dtype), images)
        if self.variational:
            loss = loss + self.kl_weight * layers.divergence(code).mean() / images[0].numel()
        return loss

    def _classification(
            self,
            output: torch.Tensor,
            feature_map: torch.Tensor,
            target: torch.Tensor,
            draw: Draw,
            criterion: Criterion,
    ) -> torch.Tensor:
        layers, mode = self.extra, draw['mode']
        map_BDHW = layers.pool(feature_map)
        if mode in ('feat', 'feat_prime'):
            map_BDHW = self._mix_tensor(map_BDHW, draw)
        code = layers.encode(map_BDHW)
        if mode in ('embed', 'embed_prime'):
            code = self._mix_tensor(code, draw)
        embedded = layers.classifier(layers.sample(code, draw.get('noise')))
        # The classifier is affine: mixing its outputs is mixing its inputs.
        plain = output if mode == 'input' else mix_pairs(output, draw)
        target_BC = self.target(criterion.soft_target(target, output), draw)
        plain_loss, embedded_loss = (criterion(logits, target_BC) for logits in (plain, embedded))
        return (self.plain_weight or 1) * plain_loss + (1 - self.plain_weight) * embedded_loss

    def _mix_tensor(self, x: torch.Tensor, draw: Draw) -> torch.Tensor:
        if x.ndim == 2 or not self.aligned:
            return mix_pairs(x, draw)
        return self.mix_aligned(x.flatten(2), draw, keep_partner=draw['mode'].endswith('prime')).view_as(x)

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of the paper's network (F, f and g) for images (B, C, H, W), in evaluation mode."""
        layers = self.extra
        return layers.classifier(layers.sample(layers.encode(layers.pool(self.head.feature_map(images)))))
