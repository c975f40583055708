#!/usr/bin/env python3
"""Train one recipe with several mixing methods and seeds through train_imagenet.py; a table, a picture and the
commands.

Runs that are finished in --output are not run again, so an interrupted comparison goes on where it was. Everything
after `--` goes to train_imagenet.py.

    python benchmarks/compare_mixes.py --name photos --mixes none mixup alignmix multimix densemultimix --seeds 0 1 2 \\
        -- --data-dir DIR --model resnet18 --img-size 64 --epochs 12

Writes benchmarks/results/NAME.json, NAME.md and NAME.png. Both the last and the best epoch are reported; the best is
chosen on the very images it is measured on, so it is optimistic, more so for noisy curves.
"""
import argparse
import csv
import json
import shlex
import time
from pathlib import Path

import matplotlib
import timm
import torch

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from comparison import ROOT, draw_curves, mean_spread, train_once  # noqa: E402

from timm_alignmix.timing import hardware  # noqa: E402


def run(args: argparse.Namespace, mix: str, seed: int, flags: list[str]) -> dict:
    """Train once, or read the run if it is finished."""
    command = ['train_imagenet.py', '--mix', mix, '--seed', str(seed), *flags]
    summary = train_once(command, args.output.resolve() / f'{args.name}-{mix}-{seed}')
    with open(summary, newline='') as file:
        top1 = [float(row['eval_top1']) for row in csv.DictReader(file)]
    return dict(mix=mix, seed=seed, top1=top1, command=shlex.join(['python', *command]))


def table(runs: list[dict], mixes: list[str]) -> list[str]:
    lines = ['| mix | seeds | top-1, last epoch (%) | top-1, best epoch (%) |', '|---|---|---|---|']
    for mix in mixes:
        own = [r for r in runs if r['mix'] == mix]
        last, best = [r['top1'][-1] for r in own], [max(r['top1']) for r in own]
        lines.append(f'| {mix} | {len(own)} | {mean_spread(last)} | {mean_spread(best)} |')
    return lines


def picture(runs: list[dict], mixes: list[str], path: Path) -> None:
    """Mean top-1 by epoch, and its range over seeds."""
    fig, ax = plt.subplots(figsize=(7, 4.2), layout='constrained')
    draw_curves(ax, {mix: [r['top1'] for r in runs if r['mix'] == mix] for mix in mixes})
    ax.set(xlabel='epoch', ylabel='validation top-1 (%)', title='Mean over seeds; band: range over seeds')
    ax.legend(loc='lower right')
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--name', required=True, help='name of the result files')
    parser.add_argument('--mixes', nargs='+', default=['none', 'mixup', 'alignmix', 'multimix', 'densemultimix'])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'compare', help='folder of the training runs')
    parser.add_argument('--results', type=Path, default=ROOT / 'benchmarks' / 'results')
    parser.add_argument('--hardware', default=hardware('cuda' if torch.cuda.is_available() else 'cpu'))
    parser.add_argument('flags', nargs='*', help='flags of train_imagenet.py, after --')
    args = parser.parse_args()
    # Seed by seed, so that an unfinished comparison still compares.
    runs = [run(args, mix, seed, args.flags) for seed in args.seeds for mix in args.mixes]
    info = f'{time.strftime("%Y-%m-%d")}, {args.hardware}, timm {timm.__version__}'
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / args.name
    picture(runs, args.mixes, path.with_suffix('.png'))
    path.with_suffix('.json').write_text(json.dumps(dict(info=info, runs=runs), indent=1) + '\n')
    commands = [f'    {r["command"]}' for r in runs if r['seed'] == args.seeds[0]]
    lines = [f'# {args.name}', '', f'{info}.', '', *table(runs, args.mixes), '', f'![curves]({args.name}.png)', '']
    lines += [f'Commands (seed {args.seeds[0]}; the others differ in --seed):', '', *commands, '']
    path.with_suffix('.md').write_text('\n'.join(lines))
    print('\n'.join(table(runs, args.mixes)))


if __name__ == '__main__':
    main()
