"""Picture of a run's curves after each epoch, and a short report at its end."""
import csv
import math
import re
import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm

from timm_alignmix.version import __version__

from .files import write_whole
from .plotting import as_png, line, panels
from .run import Run
from .timing import hardware


def draw_curves(summary: Path, picture: Path) -> None:
    """Draw the losses, metrics and learning rate of a summary.csv into a PNG file."""
    with open(summary, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row['epoch']) for row in rows]
    columns = [name for name in rows[0] if name != 'epoch']
    losses = [name for name in columns if name.endswith('loss')]
    shown = {
        'loss': losses,
        'metrics (%)': [name for name in columns if name not in (*losses, 'lr')],
        'learning rate': ['lr'],
    }
    fig, axes = panels(len(shown), size=(4, 3.6))
    for ax, (title, names) in zip(axes, shown.items(), strict=True):
        for index, name in enumerate(names):
            values = [float(row[name] or math.nan) for row in rows]
            points = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
            style = line(index) if len(points) < 40 else {**line(index), 'marker': None}
            ax.plot(*zip(*points, strict=True) if points else ([], []), label=name.replace('_', ' '), **style)
        ax.set(title=title, xlabel='epoch')
        ax.xaxis.get_major_locator().set_params(integer=True)
        if len(names) > 1:
            ax.legend(fontsize='small')
    write_whole(picture, as_png(fig, dpi=100))


def write_report(run: Run, folder: Path, last: dict[str, float], best: dict[str, float], train: dict[str, Any]) -> None:
    """Write report.md: the command, hardware, time and results.

    `last` and `best` have `epoch` and metrics of these epochs, `train` is the training summary of the last one.
    """
    config, names, processes = run.config, run.config.metrics, run.accelerator.num_processes
    lines = [
        f'# {folder.name}',
        '',
        f'    {shlex.join(sys.argv)}',
        '',
        f'- Network: {config.arch}',
        f'- Data: {run.loaders.description}',
        f'- Hardware: {processes} process{"es" if processes > 1 else ""}, {hardware(run.accelerator.device)}, '
        f'precision {run.accelerator.mixed_precision}',
        f'- Software: timm-alignmix {__version__}, timm {timm.__version__}',
        f'- Time: {timedelta(seconds=round(run.seconds))} for {last["epoch"] + 1} epochs of {run.updates_per_epoch} '
        f'updates, {run.global_batch_size} images each',
        '',
        f'| epoch | {" | ".join(names)} |',
        f'|---|{"---|" * len(names)}',
    ]
    for which, entry in (('last', last), (f'best by {config.eval_metric}', best)):
        figures = ' | '.join(f'{entry[name]:.4g}' for name in names)
        lines.append(f'| {entry["epoch"]} ({which}) | {figures} |')
    if 'modes' in train:
        lines += ['', 'Training, last epoch:', '', '| mode | share of the steps | mean loss | accuracy (%) |',
                  '|---|---|---|---|']
        lines += [f'| {mode} | {values["share"]:.1%} | {values["loss"]:.4g} | {values.get("accuracy", math.nan):.4g} |'
                  for mode, values in train['modes'].items()]
    lines += ['', f'Updates skipped in the last epoch because the loss was not finite: {train["skipped"]}', '',
              '![curves](curves.png)', '']
    write_whole(folder / 'report.md', '\n'.join(lines))


def seconds_per_epoch(folder: Path) -> float | None:
    """Read from the report.md of a run how long an epoch took; None where there is none."""
    path = folder / 'report.md'
    text = path.read_text(encoding='utf-8') if path.is_file() else ''
    found = re.search(r'^- Time: (?:(\d+) days?, )?(\d+):(\d+):(\d+) for (\d+) epochs', text, re.MULTILINE)
    if found is None:
        return None
    days, hours, minutes, seconds, epochs = (int(number or 0) for number in found.groups())
    return (((24 * days + hours) * 60 + minutes) * 60 + seconds) / epochs
