"""Draw one picture from images and a model."""
import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alignmix_lab import plots
from alignmix_lab.runs.options import exit_with_message


def _place(text: str) -> tuple[int, int]:
    row, column = text.split(',')
    return int(row), int(column)


def _names(files: list[Path], args: argparse.Namespace) -> list[str]:
    """Return the given names, or those of the images' folders, which are the classes in a data set."""
    return args.names or [file.resolve().parent.name for file in files]


def draw_gallery(files: list[Path], args: argparse.Namespace) -> Figure:
    pixels = plots.read_images(files, args.img_size or 128)
    return plots.gallery(pixels, _names(files, args), **_given(lams=args.lams))


def draw_alignment(files: list[Path], args: argparse.Namespace) -> Figure:
    network, pixels, _ = _open(files, args)
    return plots.alignment(network, pixels, args.layer, args.positions, args.count, args.eps, args.iterations)


def draw_attention(files: list[Path], args: argparse.Namespace) -> Figure:
    network, pixels, class_names = _open(files, args)
    return plots.attention(network, pixels, class_names=class_names, seed=args.seed)


def draw_hull(files: list[Path], args: argparse.Namespace) -> Figure:
    network, pixels, _ = _open(files, args)
    return plots.hull(network, pixels, _names(files, args), args.n, seed=args.seed)


def draw_morph(files: list[Path], args: argparse.Namespace) -> Figure:
    model, mix = plots.open_autoencoder(args.model)
    size = args.img_size or model.pretrained_cfg['input_size'][-1]
    return plots.morph(model, mix, plots.read_images(files, size), **_given(lams=args.lams))


def _open(files: list[Path], args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Open the network, the images at its size, and its class names."""
    opened = plots.open_network(args.model, args.pretrained, args.img_size)
    pixels = plots.read_images(files, opened.data_config['input_size'][-1])
    return opened.network.network, pixels, opened.class_names


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('images', nargs='+', help='image files, or folders to pick some from')
    common.add_argument('--output', type=Path, help='PNG, SVG or PDF file; default: NAME.png')
    common.add_argument('--img-size', type=int, help="side of the images in pixels; default: the model's")
    common.add_argument('--dpi', type=int, default=130)
    network = argparse.ArgumentParser(add_help=False)
    network.add_argument('--model', required=True,
                         help='timm model, folder of exported weights, training checkpoint, or folder of a run')
    network.add_argument('--no-pretrained', dest='pretrained', action='store_false',
                         help='random weights, with the name of a timm model')
    seed, names, lams = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    seed.add_argument('--seed', type=int, default=0)
    names.add_argument('--names', nargs='+', help='names of the images')
    lams.add_argument('--lams', nargs='+', type=float, help='mixing factors, from left to right')

    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest='name', required=True)

    def add(name: str, draw: Callable, count: int, help: str, *parents: argparse.ArgumentParser):
        command = commands.add_parser(name, help=help, description=help, parents=[common, *parents])
        command.set_defaults(draw=draw, image_count=count)
        return command

    add('gallery', draw_gallery, 2, 'what every input mix makes of two images', names, lams)
    command = add('alignment', draw_alignment, 2, 'which positions of two images AlignMixup aligns', network)
    command.add_argument('--layer', default='auto', help='layer to align, as align_at of alignmix')
    command.add_argument('--positions', nargs='+', type=_place, metavar='ROW,COLUMN',
                         help='positions of the feature map; default: salient ones')
    command.add_argument('--count', type=int, default=4, help='number of salient positions')
    command.add_argument('--eps', type=float, default=0.1, help='entropy coefficient')
    command.add_argument('--iterations', type=int, default=100, help='Sinkhorn iterations')
    command = add('attention', draw_attention, 3, 'attention of Dense MultiMix over images', network, seed)
    command.add_argument('--count', dest='image_count', type=int, help='number of images (default: 3)')
    command = add('hull', draw_hull, 10, 'MultiMix compared with pairs, in embedding space', network, seed, names)
    command.add_argument('--count', dest='image_count', type=int, help='number of images (default: 10)')
    command.add_argument('--n', type=int, default=1000, help='number of points drawn by MultiMix')
    add('morph', draw_morph, 2, 'decoded mixes of two images, from a run with --mix alignmix_ae', network, lams)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, prog: str = 'alignmix plot') -> None:
    """Draw one picture."""
    args = parse(argv, prog)
    with exit_with_message(prog):
        figure = args.draw(plots.find_images(args.images, args.image_count), args)
    output = args.output or Path(f'{args.name}.png')
    figure.savefig(output, dpi=args.dpi)
    print(output)
