"""`alignmix convert`: images to the .beton files that FFCV loads."""
import argparse
import logging

from alignmix_lab.data.ffcv.writer import WriteSettings, convert
from alignmix_lab.runs.options import exit_with_message


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description='Convert an image dataset to train.beton and val.beton, the files that FFCV loads. Every image is '
                    'fully decoded once; unreadable images are left out and listed beside the .beton file.',
        epilog='Examples:\n'
               '  alignmix convert --data-dir imagenet --output imagenet_ffcv\n'
               '      imagenet/train/<class>/*.JPEG and imagenet/validation/<class>/*.JPEG (or val/, or test/). With\n'
               '      the default settings ImageNet takes about 340 GB; --write-mode jpg takes far less.\n'
               '  alignmix convert --dataset torch/cifar10 --dataset-download --data-dir cifar \\\n'
               '      --val-split test --output cifar_ffcv --write-mode raw\n'
               '  alignmix verify imagenet_ffcv/train.beton\n'
               '      after copying the files: compares every page with the checksums of the conversion.\n'
               'Train on the result with: train_imagenet.py --data-dir imagenet_ffcv',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = WriteSettings()
    parser.add_argument('--data-dir', metavar='DIR', help='ImageFolder root, or the folder of a named dataset')
    parser.add_argument('--dataset', default='', metavar='NAME',
                        help='timm dataset name (torch/..., hfds/..., wds/..., tfds/...); leave out for folders')
    parser.add_argument('--output', required=True, metavar='DIR', help='folder for train.beton and val.beton')
    parser.add_argument('--train-split', default='train', metavar='NAME',
                        help="training split; '' for none (%(default)s)")
    parser.add_argument('--val-split', default='validation', metavar='NAME',
                        help="evaluation split; '' for none (%(default)s)")
    parser.add_argument('--class-map', default='', metavar='FILE', help='timm class map: one class name per line')
    parser.add_argument('--dataset-download', action='store_true', help='let the named dataset download itself')
    parser.add_argument('--max-resolution', type=int, default=defaults.max_resolution, metavar='PX',
                        help='shrink images whose longer side is larger (%(default)s)')
    parser.add_argument('--write-mode', default=defaults.write_mode, choices=['proportion', 'jpg', 'raw'],
                        help='raw pixels load fastest, JPEG is about 10 times smaller (%(default)s)')
    parser.add_argument('--compress-probability', type=float, default=defaults.compress_probability, metavar='P',
                        help='share of JPEG images with --write-mode proportion (%(default)s)')
    parser.add_argument('--jpeg-quality', type=int, default=defaults.jpeg_quality, metavar='Q',
                        help='1-100 (%(default)s)')
    parser.add_argument('--max-pixels', type=int, default=defaults.max_pixels, metavar='N',
                        help='leave out non-JPEG images with more pixels (%(default)s)')
    parser.add_argument('--seed', type=int, default=defaults.seed, help='order of training samples (%(default)s)')
    parser.add_argument('--workers', type=int, default=None, metavar='N',
                        help='processes (default: one per visible CPU)')
    parser.add_argument('--overwrite', action='store_true', help='replace existing .beton files')
    return parser


def main(argv: list[str] | None = None, prog: str = 'alignmix convert') -> None:
    """Run the command."""
    args = vars(_parser(prog).parse_args(argv))
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    with exit_with_message(prog, RuntimeError):
        settings = WriteSettings(**{name: args.pop(name) for name in WriteSettings.__dataclass_fields__})
        convert(settings=settings, **args)
