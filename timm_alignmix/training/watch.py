"""Watching a run: trackers, a picture of its curves after each epoch, a short report at its end."""
import csv
import hashlib
import logging
import math
import os
import platform
import shlex
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from accelerate.tracking import filter_trackers

from timm_alignmix.version import __version__

from .logs import write_whole

if TYPE_CHECKING:
    from .build import Run

_logger = logging.getLogger(__name__)

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#F0E442')


def check_trackers(names: list[str]) -> None:
    """Refuse trackers whose packages are missing; Accelerate would leave them out without a word.

    Raises:
        ValueError: One is missing.
    """
    for name in names:
        if find_spec(name) is None and not (name == 'tensorboard' and find_spec('tensorboardX')):
            raise ValueError(f'--log-trackers {name}: the package is not installed; pip install {name}')


def start_trackers(run: 'Run', folder: Path) -> None:
    """Start the trackers of --log-trackers: TensorBoard writes into the folder; a resumed run goes on where it was."""
    names, accelerator = run.config.log_trackers, run.accelerator
    if not names:
        return
    first = run.start_epoch * run.updates_per_epoch + run.start_update
    settings = {
        'tensorboard': dict(purge_step=first),
        'wandb': dict(
            name=folder.name,
            id=hashlib.sha1(str(folder.resolve()).encode()).hexdigest()[:16],
            resume='allow',
            dir=str(folder),
        ),
    }
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers(names, str(folder))
    options = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in run.config.to_dict().items()
    }
    accelerator.init_trackers('timm-alignmix', options, settings)


def track_epoch(run: 'Run', entry: dict[str, Any]) -> None:
    """Send an epoch's figures to the trackers."""
    if run.accelerator.trackers:
        values = {f'eval/{name}': value for name, value in entry.get('validation', {}).items()}
        values.update({'epoch': entry['epoch'], 'epoch/train_loss': entry['train']['loss']})
        run.accelerator.log(values, step=(entry['epoch'] + 1) * run.updates_per_epoch)


def draw_curves(summary: Path, picture: Path) -> None:
    """Draw losses, metrics and learning rate of a summary.csv, by epoch.

    Args:
        summary: The table.
        picture: PNG to write, whole.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        _logger.warning(f'{picture} is not drawn: matplotlib is not installed')
        return
    with open(summary, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row['epoch']) for row in rows]
    columns = [name for name in rows[0] if name != 'epoch']
    losses = [name for name in columns if name.endswith('loss')]
    panels = {
        'loss': losses,
        'metrics (%)': [name for name in columns if name.startswith('eval_') and name not in losses],
        'learning rate': ['lr'],
    }
    figure = Figure(figsize=(12, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for index, name in enumerate(names):
            values = [float(row[name]) if row[name] else math.nan for row in rows]
            shown = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
            axes.plot(
                *zip(*shown, strict=True) if shown else ([], []), label=name.replace('_', ' '),
                color=COLORS[index % len(COLORS)], linestyle=('-', '--', ':', '-.')[index % 4],
                marker='o' if len(shown) < 40 else None, markersize=3)
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize='small')
    temporary = picture.with_suffix('.tmp')
    figure.savefig(temporary, format='png', dpi=100)
    os.replace(temporary, picture)


def write_report(
        run: 'Run',
        folder: Path,
        last: dict[str, float],
        best: dict[str, float],
        train: dict[str, Any],
) -> None:
    """Write report.md: the command, where and how long it ran, and what came of it.

    Args:
        run: The run.
        folder: Its folder.
        last: `epoch` and metrics of the last epoch.
        best: The same of the best epoch.
        train: What the last epoch's training returned.
    """
    config, names = run.config, run.config.metrics
    lines = [
        f'# {folder.name}',
        '',
        f'    {shlex.join(sys.argv)}',
        '',
        f'- Network: {config.arch}',
        f'- Data: {run.loaders.description}',
        f'- Hardware: {_hardware(run)}',
        f'- Software: timm-alignmix {__version__}, timm {timm.__version__}, torch {torch.__version__}, '
        f'Python {platform.python_version()}',
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
        lines += ['', 'Training, last epoch:', '', '| mode | share of the steps | mean loss |', '|---|---|---|']
        lines += [f'| {mode} | {values["share"]:.1%} | {values["loss"]:.4g} |'
                  for mode, values in train['modes'].items()]
    lines += ['', f'Updates left out in the last epoch because the loss was not finite: {train["skipped"]}', '',
              '![curves](curves.png)', '']
    write_whole(folder / 'report.md', '\n'.join(lines))


def _hardware(run: 'Run') -> str:
    processes, device = run.accelerator.num_processes, run.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type}, {os.cpu_count()} cores'
    return f'{processes} process{"es" if processes > 1 else ""} on {name}, precision {run.accelerator.mixed_precision}'
