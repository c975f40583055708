#!/usr/bin/env python3
"""Parameters and step cost of AlignMixup/AE against AlignMixup and the plain model, as the paper's Table 2 has them.

    python benchmarks/autoencoder.py --model resnet50 --img-size 224 --batch 2 --rounds 5

Each case of a method is timed by itself, in turn with all others; a method's cost is the mean of its cases by their
probabilities, as a ratio to the plain step of the same round. Writes nothing; prints a table.
"""
import argparse
import time

import timm
import torch

from alignmix_lab.runs.timing import Spread, hardware, time_interleaved
from timm_alignmix import MixTask

METHODS = {
    'none': ('none', {}),
    'alignmix': ('alignmix', {}),
    'alignmix_ae': ('alignmix_ae', {}),
    'alignmix_ae, decoder at 64 px': ('alignmix_ae', dict(decode_size=64)),
}


def build(name: str, options: dict, args: argparse.Namespace) -> MixTask:
    model = timm.create_model(args.model, num_classes=args.classes)
    return MixTask(model, name, options, img_size=args.img_size, device=args.device, verbose=False).to(args.device)


def steps(task: MixTask, args: argparse.Namespace) -> dict:
    """A training step, forward and backward, of each case."""
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, device=args.device)
    target = torch.arange(args.batch, device=args.device) % args.classes

    def step(mode: str) -> None:
        if mode:
            task.mix.probs = {mode: 1.0}
        task(images, target)['loss'].backward()
        for parameter in task.parameters():
            parameter.grad = None

    return {mode: lambda mode=mode: step(mode) for mode in getattr(task.mix, 'probs', ['']) or ['']}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    tasks = {label: build(name, options, args) for label, (name, options) in METHODS.items()}
    probs = {label: dict(getattr(task.mix, 'probs', {})) or {'': 1.0} for label, task in tasks.items()}
    cases = {(label, mode): call for label, task in tasks.items() for mode, call in steps(task, args).items()}
    # On a CPU its own time counts, not that of other programs.
    clock = time.process_time if args.device == 'cpu' else time.perf_counter
    timings = time_interleaved(cases, args.device, args.rounds, warmup=1, clock=clock)

    print(f'{time.strftime("%Y-%m-%d")}, {hardware(args.device)}, timm {timm.__version__}; {args.model}, batch '
          f'{args.batch} at {args.img_size} px, {args.rounds} rounds, median (quartiles)\n')
    print('| method | parameters in training (M) | of the exported model (M) | step, ratio to none | cases, ratio |')
    print('|---|---|---|---|---|')
    base = timings['none', '']
    for label, task in tasks.items():
        ratios = [
            sum(p * timings[label, mode].seconds[i] for mode, p in probs[label].items()) / base.seconds[i]
            for i in range(args.rounds)]
        trained, exported = (
            sum(p.numel() for p in m.parameters()) / 1e6 for m in (task.trainable_module, task.get_eval_model()))
        parts = ', '.join(f'{mode} {timings[label, mode].over(base).median:.2f}' for mode in probs[label] if mode)
        print(f'| {label} | {trained:.2f} | {exported:.2f} | {Spread.of(ratios):.2f} | {parts or "-"} |')


if __name__ == '__main__':
    main()
