"""Export, check, install and upload trained weights.

    python -m timm_alignmix.weights export output/train/RUN/last.pth.tar FOLDER     # for timm's 'local-dir:FOLDER'
    python -m timm_alignmix.weights verify FOLDER                                   # do the files fit each other?
    python -m timm_alignmix.weights install FOLDER --tag densemultimix_in1k         # for timm's 'resnet50.TAG'
    python -m timm_alignmix.weights list
    python -m timm_alignmix.weights push FOLDER OWNER/NAME                          # to the Hugging Face hub
"""
import argparse
import sys

from huggingface_hub.errors import HfHubHTTPError
from timm.utils import setup_default_logging

from . import export, install, list_local, push, read_config, registry_dir, verify


def create_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_alignmix.weights', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)

    command = commands.add_parser('export', help='write a checkpoint as a folder for timm')
    command.add_argument('checkpoint', help='last.pth.tar, model_best.pth.tar, ... of a run')
    command.add_argument('folder')
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        '--ema', action='store_true', default=None, help='the moving average (default where there is one)')
    which.add_argument('--raw', action='store_false', dest='ema', help='the weights as trained')
    command.add_argument('--dataset', help='short name of the data set, for the tag, e.g. in1k')
    command.add_argument('--license', default='unknown', help='licence of the weights (default: unknown)')

    command = commands.add_parser('verify', help='check that a folder has every weight of its network')
    command.add_argument('folder')

    command = commands.add_parser('install', help="copy a folder to this machine's registry and give it a tag")
    command.add_argument('folder')
    command.add_argument('--tag', help='default: {mix}_{dataset}')

    commands.add_parser('list', help="what is in this machine's registry")

    command = commands.add_parser('push', help='upload a folder to the Hugging Face hub')
    command.add_argument('folder')
    command.add_argument('repo_id', metavar='OWNER/NAME')
    command.add_argument('--private', action='store_true')
    command.add_argument('--revision')
    command.add_argument('--create-pr', action='store_true')
    command.add_argument('--message')
    return parser


def _run(args: argparse.Namespace) -> str:
    if args.command == 'export':
        folder = export(args.checkpoint, args.folder, args.ema, dataset=args.dataset, license=args.license)
        return f"timm.create_model('local-dir:{folder}', pretrained=True)"
    if args.command == 'verify':
        return f'{args.folder}: every weight of {verify(args.folder)["architecture"]} is there'
    if args.command == 'install':
        return f"timm.create_model('{install(args.folder, args.tag)}', pretrained=True)  # after import timm_alignmix"
    if args.command == 'push':
        return push(
            args.folder, args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr,
            message=args.message)
    lines = [f'{name}: {read_config(folder)["pretrained_cfg"].get("description", "")}'
             for name, folder in list_local().items()]
    return '\n'.join(lines) or f'nothing is installed in {registry_dir()}'


def main(argv: list[str] | None = None) -> None:
    setup_default_logging()
    try:
        print(_run(create_parser().parse_args(argv)))
    except (ValueError, RuntimeError, ImportError, OSError, HfHubHTTPError) as e:
        sys.exit(f'timm_alignmix.weights: error: {e}')


if __name__ == '__main__':
    main()
