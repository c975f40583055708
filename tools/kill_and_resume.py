#!/usr/bin/env python3
"""Kill training runs with SIGKILL at random updates, continue them, and compare their ends with runs left alone.

    python tools/kill_and_resume.py --kills 3 --output FOLDER [--mixes none alignmix] [--loaders timm ffcv]

Each run trains on the built-in sample with gradient accumulation, a moving average and dropout, on the CPU. A killed
run is started again with --resume auto until it ends. Then every loss that was logged (updates that were made again
included), summary.csv, and every tensor of the last checkpoint (weights, average, optimizer) must be those of the run
left alone, bit by bit. Prints a table; ends with code 1 where something differs.
"""
import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
MIXES = ['none', 'mixup', 'cutmix', 'manifold', 'alignmix', 'multimix', 'densemultimix']
EPOCHS, CHECKPOINT_STEPS = 2, 3
OPTIONS = f"""
    --model test_resnet --img-size 64 --batch-size 48 --grad-accum-steps 3 --drop 0.1 --model-ema --model-ema-decay 0.9
    --epochs {EPOCHS} --warmup-epochs 0 --opt adamw --lr 0.003 --log-interval 1 --checkpoint-steps {CHECKPOINT_STEPS}
    --workers 2 --device cpu --export none --experiment run --resume auto""".split()
LINE = re.compile(r'Train: (\d+) \[ *(\d+)/(\d+) .*?Loss: (\S+) \((\S+)\)')


def start(folder: Path, mix: str, loader: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / 'train_imagenet.py'), '--mix', mix, '--loader', loader,
               '--output', str(folder), *OPTIONS]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace', start_new_session=True)


def watch(process: subprocess.Popen, kill_at: tuple[int, int] | None, delay: float) -> tuple[dict, list[str]]:
    """Losses by (epoch, update) of a run that ends, or dies shortly after it has logged an update."""
    losses, lines = {}, []
    for line in process.stdout:
        lines.append(line)
        match = LINE.search(line)
        if not match:
            continue
        where = int(match[1]), int(match[2])
        losses[where] = match[4], match[5]
        if kill_at is not None and where >= kill_at:
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)
            process.stdout.read()
            break
    code = process.wait()
    if code != (0 if kill_at is None else -signal.SIGKILL):
        sys.exit(f'the run ended with code {code}:\n' + ''.join(lines[-30:]))
    return losses, lines


def tensors(state: object, name: str = '') -> dict[str, object]:
    """Every number of a checkpoint by its place, but for times and folders."""
    if isinstance(state, dict):
        parts = state.items()
    elif isinstance(state, (list, tuple)):
        parts = enumerate(state)
    else:
        return {name: state}
    return {
        key: value for part, content in parts if part not in ('args', 'seconds')
        for key, value in tensors(content, f'{name}.{part}').items()}


def differences(found: Path, expected: Path) -> list[str]:
    """What differs between two finished runs."""
    differ = []
    if (found / 'summary.csv').read_bytes() != (expected / 'summary.csv').read_bytes():
        differ.append('summary.csv')
    one, other = (tensors(torch.load(run / 'last.pth.tar', weights_only=True)) for run in (found, expected))
    if one.keys() != other.keys():
        differ.append('the keys of last.pth.tar')
    for key in one.keys() & other.keys():
        same = torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        if not same:
            differ.append(key)
    return differ


def compare(folder: Path, mix: str, loader: str, kills: int, choose: random.Random) -> tuple[str, bool]:
    """Row of the table of a mix and a loader, and whether all is the same."""
    expected, lines = watch(start(folder / 'whole', mix, loader), None, 0.0)
    updates = int(LINE.search(next(line for line in lines if LINE.search(line)))[3])
    places = sorted(choose.sample(range(1, EPOCHS * updates), kills))
    wrong, resumed = [], []
    for kill in [*places, None]:
        at = None if kill is None else divmod(kill, updates)
        losses, lines = watch(start(folder / 'killed', mix, loader), at, choose.uniform(0, 0.2))
        wrong += [f'loss of {key}' for key, value in losses.items() if expected[key] != value]
        resumed += [re.search(r'Resumed \S*/(\S+?)\.pth', line)[1] for line in lines if 'Resumed ' in line]
    wrong += differences(folder / 'killed' / 'run', folder / 'whole' / 'run')
    killed = ', '.join('{}:{}'.format(*divmod(kill, updates)) for kill in places)
    verdict = 'bit-identical' if not wrong else f'{len(wrong)} DIFFER: ' + ', '.join(wrong[:4])
    return (f'| {loader} | {mix} | {EPOCHS * updates} | {killed} | {", ".join(resumed) or "anew"} | {verdict} |',
            not wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='new folder for the runs')
    parser.add_argument('--mixes', nargs='+', default=MIXES)
    parser.add_argument('--loaders', nargs='+', default=['timm', 'ffcv'])
    parser.add_argument('--kills', type=int, default=3, help='kills per run')
    parser.add_argument('--seed', type=int, default=0, help='seed of the places of the kills')
    args = parser.parse_args()
    choose, all_same = random.Random(args.seed), True
    print('| loader | mix | updates | killed at (epoch:update) | continued from | losses, weights, optimizer |')
    print('|---|---|---|---|---|---|')
    for loader in args.loaders:
        for mix in args.mixes:
            row, same = compare(args.output / loader / mix, mix, loader, args.kills, choose)
            all_same &= same
            print(row, flush=True)
    sys.exit(not all_same)


if __name__ == '__main__':
    main()
