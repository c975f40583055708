#!/usr/bin/env python3
"""What decoded mixes of an alignmix_ae run keep of each photo: the shape of the one, the colours of the other?

    python benchmarks/ae_morphs.py --model RUN --images DIR --pairs 100

For pairs of photos, A's map A and the features of B brought to A's positions are mixed (AlignMixup, equation (11)) and
decoded, and compared with the decoded photos themselves. Shape: the correlation of maps of distance from the image's
border colour. Colours: the Wasserstein distance of the channels' value distributions. Prints how often the mix is
nearer to A than to B in both, with and without alignment.
"""
import argparse
import random
from pathlib import Path

import torch

from alignmix_lab import plots
from alignmix_lab.plots.images import SUFFIXES, network_input, to_pixels
from timm_alignmix.functional import align


def shape(pixels: torch.Tensor) -> torch.Tensor:
    """Standardised maps (B, H * W) of the distance of each pixel from the mean colour of the image's border."""
    border = torch.cat([pixels[:, :, :3].flatten(2), pixels[:, :, -3:].flatten(2), pixels[:, :, :, :3].flatten(2),
                        pixels[:, :, :, -3:].flatten(2)], dim=2).mean(dim=2)
    distance = (pixels - border[:, :, None, None]).norm(dim=1).flatten(1)
    distance = distance - distance.mean(dim=1, keepdim=True)
    return distance / distance.norm(dim=1, keepdim=True)


def colours(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Wasserstein distance (B,) of the distributions of values, mean over channels."""
    return (a.flatten(2).sort(dim=2).values - b.flatten(2).sort(dim=2).values).abs().mean(dim=(1, 2))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='folder or checkpoint of a run with --mix alignmix_ae')
    parser.add_argument('--images', required=True, help='folder of photos')
    parser.add_argument('--pairs', type=int, default=100)
    args = parser.parse_args()
    model, mix = plots.open_autoencoder(args.model)
    files = sorted(file for file in Path(args.images).rglob('*') if file.suffix.lower() in SUFFIXES)
    files = random.Random(0).sample(files, 2 * args.pairs)
    pixels = plots.read_images(files, model.pretrained_cfg['input_size'][-1])
    layers = mix.extra

    def decode(map_BDHW: torch.Tensor) -> torch.Tensor:
        return to_pixels(model, layers.decoder(layers.sample(layers.encode(map_BDHW))))

    maps = layers.pool(mix.head.feature_map(network_input(model, pixels)))
    photos = decode(maps)
    error = ((photos - pixels) ** 2).mean()
    spread = ((pixels - pixels.mean(dim=0)) ** 2).mean()
    print(f'{len(files)} photos: reconstruction error {error:.4f}, variance of pixels around the mean photo '
          f'{spread:.4f} ({100 * (1 - error / spread):.0f} % explained)\n')
    a_BDR, b_BDR = maps.flatten(2).chunk(2)
    photo_a, photo_b = photos.chunk(2)
    at_a_BDR = align(a_BDR, b_BDR, mix.eps, mix.iterations, mix.final_marginal)[0]
    print('| weight of A | features of B | shape nearer to A (%) | colours nearer to A (%) | shape of A and colours of '
          'B (%) |\n|---|---|---|---|---|')
    for lam in (1.0, 0.5, 0.25, 0.0):
        for name, other in (('aligned to A', at_a_BDR), ('not aligned', b_BDR)):
            mixed = decode((lam * a_BDR + (1 - lam) * other).unflatten(2, maps.shape[2:]))
            like_a = (shape(mixed) * shape(photo_a)).sum(1) > (shape(mixed) * shape(photo_b)).sum(1)
            coloured_a = colours(mixed, photo_a) < colours(mixed, photo_b)
            values = (like_a, coloured_a, like_a & ~coloured_a)
            print(f'| {lam:.2f} | {name} | ' + ' | '.join(f'{100 * v.float().mean():.0f}' for v in values) + ' |')


if __name__ == '__main__':
    main()
