#!/usr/bin/env python3
"""Train detectors on the same recipe from several backbone weights; a table, a picture and the commands.

Runs that are finished in --output are not run again, so an interrupted comparison goes on where it was. `random` stands
for random weights. Everything after `--` goes to detection.train.

    python benchmarks/compare_backbones.py --name detection --detectors ssd fasterrcnn \\
        --weights random none=RUN/last.pth.tar densemultimix=RUN/last.pth.tar -- --data-dir DIR --backbone resnet18

Draws benchmarks/results/NAME.png; prints the table and the commands.
"""
import argparse
import csv
import shlex
import time
from pathlib import Path

import timm
import torch
import torchvision
from comparison import ROOT, draw_curves, mean_spread, train_once

from alignmix_lab.runs.plotting import panels
from alignmix_lab.runs.timing import hardware

METRICS = ('voc07_11pt', 'voc_area', 'map', 'map50')


def run(args: argparse.Namespace, detector: str, weights: str, seed: int, flags: list[str]) -> dict:
    """Train once, or read the run if it is finished."""
    name, _, path = weights.partition('=')
    command = ['-m', 'detection.train', '--detector', detector, *(['--weights', path] if path else []), *flags,
               *shlex.split(args.ssd if detector == 'ssd' else args.fasterrcnn), '--seed', str(seed)]
    summary = train_once(command, args.output.resolve() / f'{args.name}-{detector}-{name}-{seed}')
    with open(summary, newline='') as file:
        epochs = [{key: float(row[f'eval_{key}']) for key in METRICS} for row in csv.DictReader(file)]
    shown = [Path(word).name if word.startswith('/') else word for word in command]
    if path:
        shown[shown.index('--weights') + 1] = f'{name}/last.pth.tar'
    return dict(
        detector=detector, weights=name, seed=seed, epochs=epochs, command=shlex.join(['python', *shown]))


def table(runs: list[dict]) -> list[str]:
    """Figures of the last epoch, over seeds."""
    lines = [f'| detector | backbone weights | seeds | {" | ".join(METRICS)} |', '|---' * (3 + len(METRICS)) + '|']
    for detector, weights in dict.fromkeys((entry['detector'], entry['weights']) for entry in runs):
        own = [entry for entry in runs if (entry['detector'], entry['weights']) == (detector, weights)]
        values = ' | '.join(mean_spread([entry['epochs'][-1][key] for entry in own], 1) for key in METRICS)
        lines.append(f'| {detector} | {weights} | {len(own)} | {values} |')
    return lines


def picture(runs: list[dict], path: Path) -> None:
    """VOC's area AP by epoch."""
    detectors = list(dict.fromkeys(entry['detector'] for entry in runs))
    fig, axes = panels(
        len(detectors), size=(4.5, 3.6), title='mean over seeds; band: range over seeds', sharey=True)
    for ax, detector in zip(axes, detectors, strict=True):
        curves = {}
        for entry in runs:
            if entry['detector'] == detector:
                curves.setdefault(entry['weights'], []).append([epoch['voc_area'] for epoch in entry['epochs']])
        draw_curves(ax, curves)
        ax.set(title=detector, xlabel='epoch', ylabel='AP at IoU 0.5, area (%)' if ax is axes[0] else None)
        ax.legend(title='backbone weights')
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--name', required=True, help='name of the picture and of the folders of the runs')
    parser.add_argument('--detectors', nargs='+', default=['ssd', 'fasterrcnn'])
    parser.add_argument('--weights', nargs='+', required=True, help="'random' or NAME=PATH")
    parser.add_argument('--ssd', default='', help='flags for SSD alone, in one word')
    parser.add_argument('--fasterrcnn', default='', help='flags for Faster R-CNN alone, in one word')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'compare_backbones')
    parser.add_argument('flags', nargs=argparse.REMAINDER, help='-- and flags of detection.train')
    args = parser.parse_args()
    flags = [flag for flag in args.flags if flag != '--']
    # Seed by seed, so that an unfinished comparison still compares.
    runs = [run(args, detector, weights, seed, flags)
            for seed in args.seeds for detector in args.detectors for weights in args.weights]

    picture(runs, ROOT / 'benchmarks' / 'results' / f'{args.name}.png')
    facts = dict(date=time.strftime('%Y-%m-%d'), hardware=hardware('cuda' if torch.cuda.is_available() else 'cpu'),
                 torchvision=torchvision.__version__, timm=timm.__version__)
    print('\n'.join([', '.join(f'{key} {value}' for key, value in facts.items()), '', *table(runs), '', *(
        f'    {entry["command"]}' for entry in runs if entry['seed'] == args.seeds[0])]))


if __name__ == '__main__':
    main()
