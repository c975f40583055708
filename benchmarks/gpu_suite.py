#!/usr/bin/env python3
"""Everything about speed that needs a GPU, on one GPU, in under eight minutes; with several, models in shards too.

    python benchmarks/gpu_suite.py --output results                  # prints each table as soon as it is there
    python benchmarks/gpu_suite.py --device cpu --quick              # tiny sizes: shows that every part runs

Parts (--parts): ceilings (copy and bf16 matrix rates), accuracy (every Triton kernel against float64), kernels
(Sinkhorn and the dense loss against the release's loop and the textbook form, draws), steps (overhead of each mix over
none), syncs (what makes the host wait in a step), timm (a step of none against timm's train.py and the share of the
matrix peak), shards (two GPUs or more: losses of training in shards, and what compiling costs, against whole copies).
"""
import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import dense_loss
import sinkhorn
import step_cost
import timm
import torch
from report import add_arguments, milliseconds, percent, prepare, report
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from alignmix_lab.runs.timing import time_interleaved
from timm_alignmix import list_mixes
from timm_alignmix.functional import convex_weights, losses, transport

ROOT = Path(__file__).resolve().parents[1]
PARTS = ('ceilings', 'accuracy', 'kernels', 'steps', 'syncs', 'timm', 'shards')
MIXES = ['alignmix', 'multimix', 'densemultimix']
WAITS = ('cudaStreamSynchronize', 'cudaDeviceSynchronize', 'cudaEventSynchronize', 'Memcpy DtoH', 'aten::item')


def ceilings(args: Namespace) -> dict[str, float]:
    """Measured rates that the rest is held against: bf16 matrix products in TFLOP/s, copies in GB/s."""
    side, size = (256, 2 ** 20) if args.quick else (8192, 2 ** 32)
    dtype = torch.bfloat16
    a, b = (torch.randn(side, side, device=args.device, dtype=dtype) for _ in range(2))
    source = torch.randint(255, (size,), device=args.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    timings = time_interleaved(
        dict(matmul=lambda: a @ b, copy=lambda: target.copy_(source)), args.device, 5, 2, calls=10)
    rates = dict(
        tflops=2 * side ** 3 / timings['matmul'].spread.median / 1e12,
        gbytes=2 * size / timings['copy'].spread.median / 1e9)
    report(
        'ceilings', 'Measured ceilings', ['what', 'rate'],
        [['bf16 matrix product (TFLOP/s)', rates['tflops']], ['copy, read + written (GB/s)', rates['gbytes']]],
        [f'Matrices of {side}, {size / 2 ** 20:.0f} MiB, random data.'], args)
    return rates


def accuracy(args: Namespace) -> None:
    """Errors of the operators as the device runs them, and of the PyTorch forms, against float64."""
    generator = torch.Generator().manual_seed(1)
    rows = []

    def compare(name: str, operator: Callable, reference: Callable, inputs: list, exact: list) -> None:
        truth = reference(*exact)[0].double()
        errors = [
            ((function(*inputs)[0].double() - truth).abs().max() / truth.abs().max()).item()
            for function in (operator, reference)]
        rows.append([name, *(f'{value:.1e}' for value in errors)])

    for R in (9, 16) if args.quick else (49, 196):
        feat = [torch.randn(8, 64, R, generator=generator).relu().bfloat16().to(args.device) for _ in range(2)]
        compare(
            f'cost, bf16 features, R={R}', lambda a, b: (transport.transport_cost_op(a, b),),
            lambda a, b: (transport.cost_matrix(a, b),), feat, [x.double() for x in feat])
        cost = 7 * transport.cost_matrix(*feat)
        for last in (1, 2):
            compare(
                f'plan, R={R}, {"columns" if last == 1 else "rows"} last',
                lambda c, last=last: (transport.sinkhorn_plan_op(c, 0.1, 100, last, None),),
                lambda c, last=last: (transport.plan_matrix(c, 0.1, 100, last, None),), [cost], [cost.double()])
    # Errors of half-precision logits average out over examples.
    for B, R, N, C in [(8, 2, 20, 10)] if args.quick else [(128, 4, 500, 1000), (128, 49, 1000, 1000)]:
        logits = 4 * torch.randn(B, R, C, generator=generator)
        target = torch.randint(C, (B,), generator=generator).to(args.device)
        weights = convex_weights(N, B, generator=generator, positions=R).to(args.device)
        attention = torch.rand(B, R, generator=generator).to(args.device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            inputs = [logits.to(args.device, dtype), target, weights, attention]
            exact = [x.double() if x.is_floating_point() else x for x in inputs]
            for i, what in enumerate(('loss', 'gradient')):
                compare(
                    f'dense {what}, {str(dtype)[6:]} logits, {R * N} examples',
                    lambda *x, i=i: losses.dense_loss_op(*x, 0.0, 1, True, False)[i:],
                    lambda *x, i=i: losses.loss_and_grads(*x, 0.0, 1, True, False)[i:], inputs, exact)
    report(
        'accuracy', 'Accuracy against float64', ['what', 'as run', 'PyTorch form'], rows,
        ['Largest error relative to the largest value; costs up to some hundred, eps 0.1, 100 iterations.'], args)


def kernels(args: Namespace) -> None:
    """Sinkhorn, dense loss and draws."""
    sizes = Namespace(**{**vars(args), 'rounds': 2 if args.quick else 5})
    sizes.batch, sizes.positions = (4, [9, 16]) if args.quick else (128, [49, 196])
    rows, _ = sinkhorn.cases(sizes)
    report(
        'sinkhorn_gpu', 'Sinkhorn, 100 iterations', ['R', 'loop', 'ms', 'release / this', 'error', 'bound', 'peak MiB'],
        rows, [f'Batch {sizes.batch}, float32.'], args)
    shape = (8, 16, 4, 20, 10) if args.quick else (128, 2048, 49, 1000, 1000)
    sizes.dtype = 'float32' if args.quick else 'bfloat16'
    sizes.batch, sizes.channels, sizes.positions, sizes.examples, sizes.classes = shape
    rows, _ = dense_loss.cases(sizes)
    report(
        'dense_loss_gpu', "Dense MultiMix's loss, forward and backward",
        ['form', 'type', 'ms', 'textbook / this', 'extra peak MiB', 'textbook / this', 'loss'], rows,
        [f'(B, D, R, N, C) = {shape}.'], args)
    B, N = shape[0], shape[3]
    generator = torch.Generator(args.device).manual_seed(0)
    cases = {
        R: partial(convex_weights, N, B, generator=generator, positions=R)
        for R in ((1, 9) if args.quick else (1, 49, 196))}
    timings = time_interleaved(cases, args.device, sizes.rounds, 2, calls=10)
    report(
        'draws_gpu', 'Dirichlet weights', ['R', 'ms'],
        [[R, milliseconds(timing.spread)] for R, timing in timings.items()], [f'N={N}, B={B}.'], args)


def steps(args: Namespace) -> None:
    """Overhead of each mix: ResNet-50, ViT-S/16, and LeViT, which aligns after its stem."""
    plan = [('resnet50', 128, MIXES), ('resnet50', 256, MIXES), ('vit_small_patch16_224', 128, MIXES),
            ('vit_small_patch16_224', 256, MIXES), ('levit_128s', 256, ['alignmix'])]
    if args.quick:
        plan = [('test_resnet', 4, MIXES), ('test_vit', 4, MIXES)]
    rows = []
    for name, batch, mixes in plan:
        options = step_options(args)
        options.mixes = mixes
        rows += step_cost.rows_of(name, batch, step_cost.measure(name, batch, options))
        if args.device == 'cuda':
            torch.cuda.empty_cache()
    report(
        'steps_gpu', 'Overhead of mixing in a training step', step_cost.COLUMNS, rows,
        [f'{options.size} px, {options.amp_dtype or "float32"}, channels last; every mode a case of its own, '
         f'{options.rounds} interleaved rounds of {options.calls} steps.'], args)


def step_options(args: Namespace) -> Namespace:
    """Options of step_cost for this suite."""
    options = step_cost.parser().parse_args([])
    options.device, options.channels_last, options.mix_kwargs = args.device, True, {}
    options.amp_dtype, options.calls, options.rounds = 'bfloat16', 5, 8
    # The same network for every method, so that the overhead is that of the method.
    options.dense_kwargs = True
    if args.quick:
        options.size, options.classes, options.calls, options.rounds, options.amp_dtype = 160, 10, 1, 1, None
    return options


def syncs(args: Namespace) -> None:
    """What makes the host wait in a step, by the profiler: names and counts over three steps of each mode."""
    convnet, batch = ('test_resnet', 4) if args.quick else ('resnet50', 64)
    vit = 'test_vit' if args.quick else 'deit_small_patch16_224'
    rows = []
    for mix in sorted(set(list_mixes()) - {'alignmix_ae'}):
        options = step_options(args)
        options.dense_kwargs = mix not in ('tokenmix', 'transmix')  # these need the class token
        step = step_cost.build_step(convnet if options.dense_kwargs else vit, mix, batch, options)
        for mode in step_cost.modes_of(step):
            step.step(mode)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if args.device == 'cuda':
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.synchronize()
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(3):
                    step.step(mode)
            found = {
                event.key: event.count for event in profile.key_averages()
                if any(wait in event.key for wait in WAITS)}
            rows.append([mix, mode, ', '.join(f'{key} x {count}' for key, count in found.items()) or 'nothing'])
    report(
        'syncs', 'What makes the host wait in three steps', ['mix', 'mode', 'found'], rows,
        ['aten::item on tensors of the CPU (the draw of a mode) waits for nothing; the profiler itself ends with one '
         'synchronization.'], args)


def timm_steps(args: Namespace, rates: dict[str, float]) -> None:
    """A step of none, as train_imagenet.py makes it, against one as timm's train.py does, on one ResNet-50."""
    from torch.utils.flop_counter import FlopCounterMode

    name, batch = ('test_resnet', 4) if args.quick else ('resnet50', 256)
    options = step_options(args)
    device, dtype = torch.device(args.device), torch.bfloat16
    images = torch.randn(batch, 3, options.size, options.size, device=device).to(memory_format=torch.channels_last)
    target = torch.arange(batch, device=device) % options.classes

    def build(opt_kwargs: dict, compiled: bool, ours: bool) -> Callable[[], None]:
        from timm_alignmix import MixTask
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=options.classes).to(device, memory_format=torch.channels_last)
        criterion = torch.nn.CrossEntropyLoss()
        task = (MixTask if ours else ClassificationTask)(model.train(), criterion=criterion, verbose=False)
        optimizer = create_optimizer_v2(model, 'sgd', lr=0.0, momentum=0.9, weight_decay=1e-4, **opt_kwargs)
        if compiled:
            task.compile()
        return partial(train_step, task, optimizer, images, target, dtype)

    cases = {
        "timm's train.py": build({}, False, False),
        'this package': build({}, False, True),
        'this package, fused optimizer': build(dict(fused=True), False, True),
    }
    if not args.quick:
        cases['timm, --torchcompile'] = build({}, True, False)
        cases['this package, fused, --torchcompile'] = build(dict(fused=True), True, True)
    rounds, calls = (1, 1) if args.quick else (8, 5)
    timings = time_interleaved(cases, device, rounds, 1, calls)
    counter = FlopCounterMode(display=False)
    model = timm.create_model(name, num_classes=options.classes).to(device)
    with counter:
        model(images[:1].float()).sum().backward()
    flops = counter.get_total_flops() * batch
    base = timings["timm's train.py"]
    rows = [
        [case, milliseconds(timing.spread), batch / timing.spread.median, percent(base.over(timing)),
         100 * flops / timing.spread.median / 1e12 / rates['tflops']]
        for case, timing in timings.items()]
    report(
        'timm_gpu', "A step without mixing, against timm's",
        ['step', 'ms', 'images/s', "faster than timm's %", 'share of the measured bf16 peak %'], rows,
        [f'{name}, batch {batch}, {options.size} px, bf16, channels last, SGD; {flops / batch / 1e9:.1f} GFLOP an '
         'image, forward and backward.'], args)


def train_step(task, optimizer, images: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> None:
    """Forward, backward, update."""
    with torch.autocast(images.device.type, dtype):
        loss = task(images, target)['loss']
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def shards(args: Namespace) -> None:
    """Training in shards (FSDP2) and with whole copies, by accelerate launch: losses, and what compiling costs."""
    processes = torch.cuda.device_count() if args.device == 'cuda' else 0
    if processes < 2:
        print(f'*** SKIPPED: shards. FSDP needs two GPUs, and there are {processes}: nothing was run in shards. ***')
        return
    model, epochs = ('test_vit', 2) if args.quick else ('vit_small_patch16_224', 3)
    fsdp = ['--use_fsdp', '--fsdp_version', '2']
    cases = {
        'copies': (['--multi_gpu'], []), 'shards': (fsdp, []),
        'shards, checkpointing': (fsdp, ['--grad-checkpointing']),
        'copies, compiled whole': (['--multi_gpu'], ['--torchcompile']),
        'shards, compiled blocks': (fsdp, ['--torchcompile'])}
    seconds, losses = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (case, (launcher, options)) in enumerate(cases.items()):
            experiment, start = f'run{number}', time.perf_counter()
            subprocess.run(
                [sys.executable, '-m', 'accelerate.commands.launch', *launcher, '--num_machines', '1',
                 '--mixed_precision', 'no', '--dynamo_backend', 'no', '--num_processes', str(processes),
                 str(ROOT / 'train_imagenet.py'), '--loader', 'timm', '--workers', '0', '--model', model, '--img-size',
                 '64', '--mix', 'alignmix', '--batch-size', '32', '--train-samples', str(10 * 32 * processes), '--opt',
                 'adamw', '--lr', '1e-4', '--warmup-epochs', '0', '--epochs', str(epochs), '--export', 'none',
                 '--output', folder, '--experiment', experiment, *options],
                env={**os.environ, 'TORCHINDUCTOR_CACHE_DIR': str(Path(folder) / f'cache{number}')}, check=True,
                stdout=subprocess.DEVNULL)
            seconds[case] = time.perf_counter() - start
            with (Path(folder) / experiment / 'summary.csv').open(encoding='utf-8') as file:
                losses[case] = [float(row['train_loss']) for row in csv.DictReader(file)]
    rows = []
    for case in cases:
        apart = max(abs(a / b - 1) for a, b in zip(losses[case], losses['copies'], strict=True))
        added = seconds[case] - seconds[case.partition(',')[0]] if 'compiled' in case else None
        rows.append([
            case, seconds[case], added,
            ' '.join(f'{loss:.6f}' for loss in losses[case]), f'{apart:.1e}'])
    report(
        'shards_gpu', 'Training in shards against whole copies',
        ['run', 's with its start', 's that compiling adds', 'loss of each epoch', 'relative, apart from copies'], rows,
        [f'{processes} processes; {model}, 64 px, float32, alignmix, {epochs} epochs of 10 updates, 32 images each, '
         'evaluations, empty caches.'], args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument('--parts', nargs='+', default=PARTS, choices=PARTS)
    args = parser.parse_args()
    prepare(args)
    start = time.perf_counter()
    torch.backends.cudnn.benchmark = True
    rates = ceilings(args)
    for part in args.parts:
        if part == 'timm':
            timm_steps(args, rates)
        elif part != 'ceilings':
            dict(accuracy=accuracy, kernels=kernels, steps=steps, syncs=syncs, shards=shards)[part](args)
        print(f'\n[{part}: {time.perf_counter() - start:.0f} s since the start]\n', flush=True)


if __name__ == '__main__':
    main()
