#!/usr/bin/env python3
"""Overhead of every mix over `none` in a training step: averaged over the modes a method draws, and of each mode.

    python benchmarks/step_cost.py --threads 1 --batch 8                                     # a CPU
    python benchmarks/step_cost.py --amp-dtype bfloat16 --channels-last --batch 128 256      # a GPU
    python benchmarks/step_cost.py --mixes alignmix --mix-kwargs align_at=last               # 7x7 positions

Published (images/s x1000 on a V100): MultiMix costs ResNet-50 0.9 % and ViT-S/16 3.1 %, Dense MultiMix 23 % and 15 %;
AlignMixup costs ResNet-50 7.7 %. Here every mode of every method is a case of its own, all timed in turn.
"""
import argparse
import ast
import time
from functools import partial
from typing import Any

import timm
import torch
from report import add_arguments, milliseconds, percent, prepare, report

from alignmix_lab.evaluation.protocols.cost import TrainingStep
from alignmix_lab.runs.timing import Spread, Timing, peak_memory, time_interleaved
from timm_alignmix import dense_model_kwargs

MIXES = ('mixup', 'manifold', 'alignmix', 'multimix', 'densemultimix')


def build_step(name: str, mix: str, batch: int, args: argparse.Namespace) -> TrainingStep:
    """A training step of a network of its own."""
    device = torch.device(args.device)
    dense = dense_model_kwargs(name) if mix == 'densemultimix' or args.dense_kwargs else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=args.classes, **dense).to(device)
    images = torch.randn(batch, 3, args.size, args.size, device=device)
    if args.channels_last:
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    target = torch.arange(batch, device=device) % args.classes
    amp_dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else None
    options = args.mix_kwargs if mix != 'none' else {}
    return TrainingStep(model, mix, images, target, options, amp_dtype=amp_dtype, compile=args.compile, cycle=1)


def modes_of(step: TrainingStep) -> dict[str | None, float]:
    """Modes that a method draws and their probabilities."""
    return {mode: p for mode, p in getattr(step.task.mix, 'probs', {None: 1.0}).items() if p > 0}


def measure(name: str, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What every method costs on a model: seconds of each mode, overheads, memory."""
    steps = {mix: build_step(name, mix, batch, args) for mix in ('none', *args.mixes)}
    probs = {mix: modes_of(step) for mix, step in steps.items() if mix != 'none'}
    cases = {('none', None): steps['none'].step}
    for mix, modes in probs.items():
        cases.update({(mix, mode): partial(steps[mix].step, mode) for mode in modes})
    clock = time.process_time if args.threads == 1 else time.perf_counter
    timings = time_interleaved(cases, args.device, args.rounds, args.warmup, args.calls, clock)
    base = timings['none', None]
    memory = {}
    for mix, step in steps.items():
        step.optimizer.zero_grad()
        modes = probs.get(mix, {None: 1})
        memory[mix] = max(peak_memory(partial(step.step, mode), args.device) for mode in modes) + step.state_bytes()
        step.optimizer.zero_grad()
    results = [dict(mix='none', seconds=base, modes={}, memory=memory['none'], base=memory['none'])]
    for mix, modes in probs.items():
        mean = Timing([
            sum(p * timings[mix, mode].seconds[i] for mode, p in modes.items())
            for i in range(len(base.seconds))])
        results.append(dict(
            mix=mix, seconds=mean, overhead=mean.over(base), memory=memory[mix], base=memory['none'],
            modes={mode: timings[mix, mode].over(base) for mode in modes if mode is not None}))
    return results


def rows_of(name: str, batch: int, results: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows of the table."""
    rows = []
    for result in results:
        seconds: Spread = result['seconds'].spread
        rows.append([
            name, batch, result['mix'], milliseconds(seconds), f'{batch / seconds.median:.1f}',
            percent(result['overhead']) if 'overhead' in result else None,
            ', '.join(f'{mode} {100 * (ratio.median - 1):+.1f}' for mode, ratio in result['modes'].items()),
            100 * (result['memory'] / result['base'] - 1) if 'overhead' in result else None,
        ])
    return rows


COLUMNS = ['model', 'batch', 'mix', 'ms/step', 'images/s', 'overhead %', 'of each mode %', 'memory %']


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """'name=value' pairs, values as Python literals where they are."""
    options = {}
    for pair in pairs:
        key, value = pair.split('=', 1)
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument('--models', nargs='+', default=['resnet50', 'vit_small_patch16_224'])
    parser.add_argument('--batch', type=int, nargs='+', default=[128])
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--mixes', nargs='+', default=MIXES)
    parser.add_argument('--mix-kwargs', nargs='+', default=[], metavar='NAME=VALUE', help='options of every mix timed')
    parser.add_argument('--dense-kwargs', action='store_true', help="build every model as dense mixing needs it")
    parser.add_argument('--amp-dtype', choices=('bfloat16', 'float16'))
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--warmup', type=int, default=1, help='rounds before those that are timed')
    parser.add_argument('--calls', type=int, default=1, help='steps of one timing')
    parser.add_argument('--name', default='step_cost', help='name of the files')
    return parser


def main() -> None:
    args = parser().parse_args()
    args.mix_kwargs = parse_options(args.mix_kwargs)
    prepare(args)
    if args.quick:
        args.models, args.batch, args.size, args.classes, args.rounds = ['test_resnet'], [4], 64, 10, 2
    rows, details = [], {}
    for name in args.models:
        for batch in args.batch:
            results = measure(name, batch, args)
            rows += rows_of(name, batch, results)
            details[f'{name} {batch}'] = {result['mix']: result['seconds'].seconds for result in results}
    report(
        args.name, 'Overhead of mixing in a training step', COLUMNS, rows,
        [
            f'{args.size} px, {args.classes} classes, {args.amp_dtype or "float32"}'
            f'{", channels last" if args.channels_last else ""}{", compiled" if args.compile else ""}'
            f'{", " + str(args.mix_kwargs) if args.mix_kwargs else ""}. '
            'A step is drawing, forward, loss, backward and SGD update.',
            f'Median (quartiles) of {args.rounds} interleaved rounds, every mode of every method timed by itself; '
            'overhead: the mean over the modes with their probabilities, over `none`, within a round.',
            'Memory: parameters, momentum and the peak of a step, of the dearest mode, over `none`.',
            *(['Time is process time of one thread: other programs do not count.'] if args.threads == 1 else []),
        ],
        args, details)


if __name__ == '__main__':
    main()
