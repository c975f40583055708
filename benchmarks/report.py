"""Tables of the benchmarks: printed, and written as Markdown and JSON with date, hardware and command."""
import argparse
import ctypes
import datetime
import json
import platform
import shlex
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from alignmix_lab.runs.timing import Spread, hardware


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that every benchmark has."""
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=10, help='rounds; each times every case once')
    parser.add_argument('--threads', type=int, help='threads of torch on a CPU')
    parser.add_argument('--quick', action='store_true', help='tiny sizes: shows that it runs, measures nothing')
    parser.add_argument('--output', type=Path, help='folder for NAME.md and NAME.json; default: print only')


def prepare(args: argparse.Namespace) -> None:
    """Set --threads, and let a process on a CPU keep the memory that it frees, if its C library is glibc's.

    Given back and taken again, memory costs page faults: up to a percent of a step, in one network and not in the next.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == 'cpu' and platform.libc_ver()[0] == 'glibc':
        trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def report(
        name: str,
        title: str,
        columns: list[str],
        rows: list[list[Any]],
        notes: list[str],
        args: argparse.Namespace,
        details: dict[str, Any] | None = None,
) -> None:
    """Print a table and, with --output, write it.

    Args:
        name: Name of the files.
        title: Heading.
        columns: Headings of columns.
        rows: Cells; a :class:`Spread` is shown as median (quartiles).
        notes: What fixes the numbers.
        args: The parsed arguments.
        details: Anything more for the JSON file.
    """
    command = shlex.join(['python', *(f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:])])
    lines = [
        f'# {title}', '',
        f'{datetime.date.today()}, {hardware(args.device)}.', '',
        f'    {command}', '',
        f'| {" | ".join(columns)} |', f'|{"---|" * len(columns)}',
        *(f'| {" | ".join(_cell(value) for value in row)} |' for row in rows), '',
        *(f'* {note}' for note in notes),
    ]
    text = '\n'.join(lines)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f'{name}.md').write_text(text + '\n', encoding='utf-8')
        content = dict(
            title=title, date=str(datetime.date.today()), hardware=hardware(args.device), command=command,
            columns=columns, rows=rows, notes=notes, details=details or {})
        (args.output / f'{name}.json').write_text(
            json.dumps(content, indent=1, default=_plain) + '\n', encoding='utf-8')


def percent(ratio: Spread) -> Spread:
    """What a ratio is above 1, in percent."""
    return Spread(*(100 * (value - 1) for value in (ratio.median, ratio.low, ratio.high)))


def milliseconds(seconds: Spread) -> Spread:
    """Seconds as milliseconds."""
    return Spread(*(1000 * value for value in (seconds.median, seconds.low, seconds.high)))


def _cell(value: Any) -> str:
    if value is None:
        return '-'
    return f'{value:.2f}' if isinstance(value, (float, Spread)) else str(value)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else str(value)
