#!/usr/bin/env python3
"""Train detectors on the same recipe from several backbone weights; a table, a picture and the commands.

Runs that are finished in --output are not run again, so an interrupted comparison goes on where it was. `random` stands
for random weights. Everything after `--` goes to detection.train.

    python benchmarks/compare_backbones.py --name detection --detectors ssd fasterrcnn \\
        --weights random none=RUN/last.pth.tar densemultimix=RUN/last.pth.tar -- --data-dir DIR --backbone resnet18

Writes benchmarks/results/NAME.json and NAME.png and prints the table.
"""
import argparse
import csv
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import timm
import torch
import torchvision

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
METRICS = ('voc07_11pt', 'voc_area', 'map', 'map50')


def run(args: argparse.Namespace, detector: str, weights: str, flags: list[str]) -> dict:
    """Train once, or read the run if it is finished."""
    name, _, path = weights.partition('=')
    folder = args.output.resolve() / f'{args.name}-{detector}-{name}'
    command = ['-m', 'detection.train', '--detector', detector, *(['--weights', path] if path else []), *flags,
               *shlex.split(args.ssd if detector == 'ssd' else args.fasterrcnn)]
    done = folder / 'seconds.txt'
    if not done.exists():
        start = time.time()
        resume = ['--resume', 'auto'] if (folder / 'last.pth.tar').exists() else []
        subprocess.run(
            [sys.executable, *command, '--output', str(folder.parent), '--experiment', folder.name, *resume],
            check=True, cwd=ROOT)
        done.write_text(f'{time.time() - start:.0f}\n')
    with open(folder / 'summary.csv', newline='') as file:
        epochs = [{key: float(row[f'eval_{key}']) for key in METRICS} for row in csv.DictReader(file)]
    shown = [Path(word).name if word.startswith('/') else word for word in command]
    if path:
        shown[shown.index('--weights') + 1] = f'{name}/last.pth.tar'
    return dict(detector=detector, weights=name, epochs=epochs, seconds=int(done.read_text()),
                command=shlex.join(['python', *shown]))


def table(runs: list[dict]) -> list[str]:
    """Figures of the last epoch."""
    lines = [f'| detector | backbone weights | {" | ".join(METRICS)} | seconds |', '|---' * (3 + len(METRICS)) + '|']
    for entry in runs:
        values = ' | '.join(f'{entry["epochs"][-1][key]:.1f}' for key in METRICS)
        lines.append(f'| {entry["detector"]} | {entry["weights"]} | {values} | {entry["seconds"]} |')
    return lines


def picture(runs: list[dict], path: Path) -> None:
    """VOC's area AP by epoch."""
    detectors = list(dict.fromkeys(entry['detector'] for entry in runs))
    fig, axes = plt.subplots(1, len(detectors), figsize=(4.5 * len(detectors), 3.6), layout='constrained',
                             squeeze=False, sharey=True)
    for ax, detector in zip(axes[0], detectors, strict=True):
        for entry, style in zip([e for e in runs if e['detector'] == detector], ('-', '--', '-.', ':'), strict=False):
            values = [epoch['voc_area'] for epoch in entry['epochs']]
            ax.plot(range(1, len(values) + 1), values, style, linewidth=2, label=entry['weights'])
        ax.set(title=detector, xlabel='epoch', ylabel='AP at IoU 0.5, area (%)' if ax is axes[0][0] else None)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(title='backbone weights')
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--name', required=True, help='name of the result files')
    parser.add_argument('--detectors', nargs='+', default=['ssd', 'fasterrcnn'])
    parser.add_argument('--weights', nargs='+', required=True, help="'random' or NAME=PATH")
    parser.add_argument('--ssd', default='', help='flags for SSD alone, in one word')
    parser.add_argument('--fasterrcnn', default='', help='flags for Faster R-CNN alone, in one word')
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'compare_backbones')
    parser.add_argument('flags', nargs=argparse.REMAINDER, help='-- and flags of detection.train')
    args = parser.parse_args()
    flags = [flag for flag in args.flags if flag != '--']
    runs = [run(args, detector, weights, flags) for detector in args.detectors for weights in args.weights]

    results = ROOT / 'benchmarks' / 'results'
    results.mkdir(exist_ok=True)
    hardware = f'{platform.machine()}, {torch.get_num_threads()} CPU threads' + (
        f', {torch.cuda.get_device_name()}' if torch.cuda.is_available() else '')
    facts = dict(
        date=time.strftime('%Y-%m-%d'), hardware=hardware, python=platform.python_version(), torch=torch.__version__,
        torchvision=torchvision.__version__, timm=timm.__version__)
    content = json.dumps(dict(**facts, runs=runs), indent=4)
    (results / f'{args.name}.json').write_text(content + '\n', encoding='utf-8')
    picture(runs, results / f'{args.name}.png')
    print('\n'.join([', '.join(f'{key} {value}' for key, value in facts.items()), '', *table(runs), '', *(
        f'    {entry["command"]}' for entry in runs)]))


if __name__ == '__main__':
    main()
