#!/usr/bin/env python3
"""Dense MultiMix's loss, forward and backward: the closed form against the paper's equations as they are printed.

    python benchmarks/dense_loss.py --threads 2
    python benchmarks/dense_loss.py --dtype bfloat16       # a GPU
"""
import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import add_arguments, milliseconds, prepare, report

from alignmix_lab.runs.timing import peak_memory, time_interleaved
from timm_alignmix.functional import convex_weights, dense_multimix_loss
from timm_alignmix.kernels import register


def textbook_loss(
        feat_RDB: torch.Tensor,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor,
        target: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor,
) -> torch.Tensor:
    """Equations (10)-(14): mix embeddings and targets at every position, classify, average.

    Matrix products in the type of the features, the loss in float32, as autocast would have it.
    """
    mass_RNB = weights_RNB * attention_BR.t().unsqueeze(1)
    sums_RN = mass_RNB.sum(2)
    mixed_RNB = mass_RNB / sums_RN.unsqueeze(2)
    mixed_RND = mixed_RNB.to(feat_RDB.dtype) @ feat_RDB.transpose(1, 2)
    logits_RNC = F.linear(mixed_RND, weight_CD, bias_C)
    target_RNC = mixed_RNB @ F.one_hot(target, len(weight_CD)).to(mixed_RNB.dtype)
    loss_RN = F.cross_entropy(
        logits_RNC.float().flatten(0, 1), target_RNC.flatten(0, 1), reduction='none').view_as(sums_RN)
    return ((sums_RN * loss_RN).sum(1) / sums_RN.sum(1)).mean()


def closed_form_loss(
        feat_RDB: torch.Tensor,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor,
        target: torch.Tensor,
        weights_RNB: torch.Tensor,
        attention_BR: torch.Tensor,
) -> torch.Tensor:
    """The same through clean logits, as training does it."""
    logits_BRC = F.linear(feat_RDB.permute(2, 0, 1), weight_CD, bias_C)
    return dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR)


def step(loss: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward and backward to features, weight and bias; returns the loss."""
    def call() -> torch.Tensor:
        for parameter in arguments[:3]:
            parameter.grad = None
        value = loss(*arguments)
        value.backward()
        return value.detach()
    return call


def cases(args: argparse.Namespace) -> tuple[list[list], dict]:
    """Rows of the table, and the seconds of every round."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    generator = torch.Generator(device).manual_seed(0)
    B, D, R, N, C = args.batch, args.channels, args.positions, args.examples, args.classes
    options = dict(generator=generator, device=device)
    feat_RDB = torch.randn(R, D, B, **options).relu().to(dtype).requires_grad_()
    weight_CD = (torch.randn(C, D, **options) / D ** 0.5).to(dtype).requires_grad_()
    bias_C = torch.zeros(C, device=device, dtype=dtype, requires_grad=True)
    target = torch.randint(C, (B,), **options)
    attention_BR = torch.rand(B, R, **options)
    weights_RNB = convex_weights(N, B, generator=generator, positions=R)
    arguments = feat_RDB, weight_CD, bias_C, target, weights_RNB, attention_BR
    functions = {'textbook': step(textbook_loss, *arguments), 'closed form': step(closed_form_loss, *arguments)}
    timings = time_interleaved(
        functions, device, args.rounds, 1, clock=time.process_time if args.threads == 1 else time.perf_counter)
    memory = {name: peak_memory(function, device) for name, function in functions.items()}
    values = {name: function().item() for name, function in functions.items()}
    rows = [
        [name, args.dtype, milliseconds(timings[name].spread), timings['textbook'].over(timings[name]),
         f'{memory[name] / 2 ** 20:.0f}', memory['textbook'] / memory[name], f'{values[name]:.6f}']
        for name in functions
    ]
    return rows, {name: timing.seconds for name, timing in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'),
                        default='bfloat16' if torch.cuda.is_available() else 'float32')
    for name, value in (('batch', 128), ('channels', 2048), ('positions', 49), ('examples', 1000), ('classes', 1000)):
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    prepare(args)
    if args.quick:
        args.batch, args.channels, args.positions, args.examples, args.classes, args.rounds = 8, 16, 4, 20, 10, 2
    register()
    rows, details = cases(args)
    report(
        'dense_loss', "Dense MultiMix's loss, forward and backward",
        ['form', 'type', 'ms', 'textbook / this', 'extra peak MiB', 'textbook / this', 'loss'], rows,
        [
            f'B={args.batch} D={args.channels} R={args.positions} N={args.examples} C={args.classes}, with attention; '
            'gradients of features, weight and bias.',
            f'Median (quartiles) of {args.rounds} interleaved rounds. Extra peak: all that a call holds beyond its '
            'inputs, gradients included.',
        ],
        args, details)


if __name__ == '__main__':
    main()
