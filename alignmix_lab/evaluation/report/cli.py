"""The command line of reports."""
import argparse
import logging
import sys
from pathlib import Path

from alignmix_lab.runs.files import write_whole

from .page import render
from .sources import find_sources

_logger = logging.getLogger(__name__)

HELP = """One HTML page, readable without a network and without scripts, from what was written by

    evaluate.py PROTOCOL     tables beside the published figures, notes, pictures, commands
    evaluate.py ablation     the same
    train_imagenet.py        what was trained, how and on what, curves
    python -m detection.train

Folders are searched with all folders inside; other pictures and Markdown pages in them are shown at the end."""


def main(argv: list[str] | None = None, prog: str = 'alignmix report') -> None:
    """Write a report."""
    parser = argparse.ArgumentParser(
        prog=prog, usage='%(prog)s DIR [DIR ...] [-o report.html]', description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', type=Path, metavar='DIR', help='folders of results')
    parser.add_argument('-o', '--output', type=Path, default=Path('report.html'), help='file (default: report.html)')
    parser.add_argument('--title', default='timm-alignmix report', help='heading of the page')
    args = parser.parse_args(argv)
    try:
        found = find_sources(args.folders)
        page = render(found, args.title).encode()
        write_whole(args.output, page)
    except (ValueError, OSError) as e:
        sys.exit(f'{prog}: error: {e}')
    _logger.info(
        f'{args.output}: {len(found.results)} results, {len(found.runs)} training runs, {found.count_pictures()} '
        f'pictures, {len(page) / 2**20:.1f} MiB')
