#!/usr/bin/env python3
"""What each method adds to a ResNet-50 step in its feature mode, part by part, in percent of a step of `none`.

    python benchmarks/breakdown.py --threads 1 --batch 8 --figure docs/images/step_parts.png
    python benchmarks/breakdown.py --batch 128 --amp-dtype bfloat16                               # a GPU
"""
import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import step_cost
import torch
import torch.nn.functional as F
from report import add_arguments, prepare, report

from alignmix_lab.runs.plotting import color, figure
from alignmix_lab.runs.timing import Spread, time_interleaved
from timm_alignmix.functional import (
    attention_map,
    convex_weights,
    dense_multimix_loss,
    multimix_loss,
    sinkhorn_plan,
    transport_cost,
)


def mix(feat_BDR: torch.Tensor, perm: torch.Tensor, rows_BRR: torch.Tensor) -> None:
    """Pair, align and mix, forward and backward."""
    feat_BDR = feat_BDR.detach().requires_grad_()
    torch.lerp(feat_BDR[perm] @ rows_BRR.transpose(1, 2), feat_BDR, 0.3).backward(feat_BDR.detach())


def parts(args: argparse.Namespace) -> dict[tuple[str, str], Callable[[], object]]:
    """Calls by (method, part), on random features of ResNet-50's shapes at 224 px."""
    device, dtype, B = torch.device(args.device), getattr(torch, args.amp_dtype or 'float32'), args.batch
    generator = torch.Generator(device).manual_seed(0)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for side, channels in ((14, 1024), (7, 2048)):
        R, method = side * side, f'AlignMixup, {side}x{side}'
        feat_BDR = torch.randn(B, channels, R, generator=generator, device=device).relu().to(dtype)
        perm = torch.randperm(B, generator=generator, device=device)
        cost_BRR = transport_cost(feat_BDR, feat_BDR[perm])
        rows_BRR = (R * sinkhorn_plan(cost_BRR)).to(dtype)
        calls[method, 'cost'] = lambda x=feat_BDR, y=feat_BDR[perm]: transport_cost(x, y)
        calls[method, 'plan'] = lambda x=cost_BRR: sinkhorn_plan(x)
        calls[method, 'pairing, product, mix and their gradient'] = partial(mix, feat_BDR, perm, rows_BRR)
    N, C, R, D = 1000, 1000, 49, 2048
    target = torch.randint(C, (B,), generator=generator, device=device)
    weight = torch.randn(C, D, generator=generator, device=device).to(dtype).requires_grad_()
    feat_BDR = torch.randn(B, D, R, generator=generator, device=device).relu().to(dtype).requires_grad_()
    logits_BRC = torch.randn(B, R, C, generator=generator, device=device).to(dtype).requires_grad_()
    logits_BC = logits_BRC.detach()[:, 0].clone().requires_grad_()
    weights_RNB = convex_weights(N, B, generator=generator, positions=R)
    attention_BR = torch.rand(B, R, generator=generator, device=device)
    calls['MultiMix', 'draws'] = lambda: convex_weights(N, B, generator=generator)
    calls['MultiMix', 'loss and its gradient'] = lambda: multimix_loss(logits_BC, target, weights_RNB[0]).backward()
    calls['Dense MultiMix', 'draws'] = lambda: convex_weights(N, B, generator=generator, positions=R)
    calls['Dense MultiMix', 'logits of every position, attention, their gradient'] = lambda: (
        attention_map(feat_BDR.detach()), F.linear(feat_BDR.transpose(1, 2), weight).backward(logits_BRC.detach()))
    calls['Dense MultiMix', 'loss and its gradient'] = (
        lambda: dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR).backward())
    return calls


def measure(args: argparse.Namespace) -> dict[tuple[str, str], Spread]:
    """Time of each part over the time of a step of `none`."""
    options = step_cost.parser().parse_args([])
    options.device, options.amp_dtype, options.channels_last = args.device, args.amp_dtype, args.device == 'cuda'
    options.mix_kwargs = {}
    name = 'resnet50'
    if args.quick:
        name, options.size = 'test_resnet', 64
    cases = parts(args)
    step = step_cost.build_step(name, 'none', args.batch, options)
    timings = time_interleaved(
        {'step': step.step, **cases}, args.device, args.rounds, 1, args.calls,
        time.process_time if args.threads == 1 else time.perf_counter)
    return {case: timings[case].over(timings['step']) for case in cases}


def draw(shares: dict[tuple[str, str], Spread], path: Path, where: str) -> None:
    """A bar for each method, stacked by part."""
    methods = list(dict.fromkeys(method for method, _ in shares))
    names = list(dict.fromkeys(part for _, part in shares))
    fig, ((ax,),) = figure(size=(8, 0.9 + 0.45 * len(methods)))
    left = dict.fromkeys(methods, 0.0)
    for i, name in enumerate(names):
        mine = [method for method in methods if (method, name) in shares]
        widths = [100 * shares[method, name].median for method in mine]
        ax.barh(mine, widths, left=[left[method] for method in mine], color=color(i), label=name)
        for method, width in zip(mine, widths, strict=True):
            left[method] += width
    for method, total in left.items():
        ax.text(total, method, f' {total:.1f} %', va='center', fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel(f'percent of a step without mixing ({where})')
    ax.legend(fontsize=7, loc='upper right')
    fig.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> None:
    """Measure, print and draw."""
    shares = measure(args)
    where = f'ResNet-50, 224 px, batch {args.batch}, {args.amp_dtype or "float32"}, {args.device}'
    report(
        'breakdown', 'What a feature step adds', ['method', 'part', '% of a step'],
        [[*case, Spread(100 * ratio.median, 100 * ratio.low, 100 * ratio.high)] for case, ratio in shares.items()],
        [f'{where}; N=1000, C=1000. Parts are timed by themselves, {args.rounds} rounds interleaved with the step. '
         'Over a whole training they count 2/3 (AlignMixup) and 1/2 (MultiMix).'], args)
    if args.figure:
        draw(shares, args.figure, where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--amp-dtype', choices=('bfloat16', 'float16'))
    parser.add_argument('--calls', type=int, default=1)
    parser.add_argument('--figure', type=Path, help='PNG or SVG to draw')
    args = parser.parse_args()
    prepare(args)
    if args.quick:
        args.batch, args.rounds = 2, 1
    run(args)


if __name__ == '__main__':
    main()
