"""Progress bar, summary.csv and args.yaml of a run."""
import csv
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

if TYPE_CHECKING:
    from .build import Run

@contextmanager
def progress_bar(run: 'Run', name: str, total: int) -> Iterator[tqdm]:
    """A bar on the main process, on a terminal or where asked for; log lines appear above it."""
    shown = run.accelerator.is_main_process and (run.config.progress or sys.stderr.isatty())
    with logging_redirect_tqdm(), tqdm(total=total, desc=name, leave=False, disable=not shown) as bar:
        yield bar


def append_summary(
        path: Path,
        epoch: int,
        train_metrics: dict[str, float],
        eval_metrics: dict[str, float] | None,
        lr: float,
        metrics: tuple[str, ...] = ('loss', 'top1', 'top5'),
) -> None:
    """Add an epoch to summary.csv, with the header where the file is new; an epoch without evaluation has gaps."""
    columns = ['epoch', 'train_loss', *(f'eval_{key}' for key in metrics), 'lr']
    row = {'epoch': epoch, 'train_loss': train_metrics['loss'], 'lr': lr}
    row.update({f'eval_{key}': eval_metrics[key] for key in metrics if eval_metrics})
    is_new = not path.exists() or path.stat().st_size == 0
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def write_args(path: Path, args: dict[str, Any]) -> None:
    """Write args.yaml, which --config reads back."""
    temporary = path.with_suffix('.tmp')
    temporary.write_text(yaml.safe_dump(args, default_flow_style=False), encoding='utf-8')
    os.replace(temporary, path)


def result_json(history: list[dict[str, Any]], eval_metric: str) -> str:
    """timm's closing `--result` block: the ten best epochs, the best one last."""
    evaluated = [entry for entry in history if 'validation' in entry]
    ranked = sorted(evaluated, key=lambda entry: entry['validation'][eval_metric], reverse=eval_metric == 'loss')
    return '--result\n' + json.dumps(ranked[-10:], indent=4)
