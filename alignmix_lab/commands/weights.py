"""`alignmix weights`: exported weights on this machine and on the Hugging Face hub."""
import argparse
from pathlib import Path

from timm.utils import setup_default_logging

from alignmix_lab.runs.options import exit_with_message
from timm_alignmix.weights import install, list_local, push, read_config, registry_dir


def create_parser(prog: str) -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description='List, install or push weights exported by `alignmix export` or a training run.')
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('list', help="list this machine's registry")

    command = commands.add_parser('install', help="copy a folder to this machine's registry and give it a tag")
    command.add_argument('folder')
    command.add_argument('--tag', help="name for timm.create_model('MODEL.TAG'); default: {mix}_{dataset}")

    command = commands.add_parser('push', help='upload a folder to the Hugging Face hub')
    command.add_argument('folder')
    command.add_argument('repo_id', metavar='OWNER/NAME')
    command.add_argument('--private', action='store_true')
    command.add_argument('--revision')
    command.add_argument('--create-pr', action='store_true')
    command.add_argument('--message')
    return parser


def _run(args: argparse.Namespace) -> str:
    if args.command == 'install':
        return f"timm.create_model('{install(args.folder, args.tag)}', pretrained=True)  # after import timm_alignmix"
    if args.command == 'push':
        return push(
            args.folder, args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr,
            message=args.message)
    lines = [f'{name}: {_description(folder)}' for name, folder in list_local().items()]
    return '\n'.join(lines) or f'nothing is installed in {registry_dir()}'


def _description(folder: Path) -> str:
    try:
        return read_config(folder)['pretrained_cfg'].get('description', '')
    except ValueError as e:
        return f'error: {e}'


def main(argv: list[str] | None = None, prog: str = 'alignmix weights') -> None:
    """Run the command."""
    args = create_parser(prog).parse_args(argv)
    setup_default_logging()
    with exit_with_message(prog, RuntimeError):
        print(_run(args))
