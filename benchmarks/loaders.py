#!/usr/bin/env python3
"""Training batches through FFCV against ImageFolder + DataLoader, on the same JPEG files: images per CPU-second.

Both give uint8 random resized crops, flipped half the time, which is what a GPU is sent; CPU seconds are those of all
threads and worker processes.

    python benchmarks/loaders.py --data-dir imagenet/train --limit 20000 --workers 8
"""
import argparse
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import add_arguments, report

from alignmix_lab.commands.convert import main as write_main
from alignmix_lab.data.ffcv.beton import inspect_beton
from alignmix_lab.data.ffcv.loader import FFCVBatches
from alignmix_lab.data.options import LoaderOptions
from alignmix_lab.runs.timing import Spread, time_interleaved

WRITE_MODES = {'jpg': 'JPEG, quality 90', 'proportion': 'half JPEG, half raw', 'raw': 'raw pixels'}


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def sample_folder(source: Path, target: Path, limit: int) -> int:
    """Links to at most `limit` images of an ImageFolder, spread over its classes; returns how many."""
    files = sorted(path for path in source.glob('*/*') if path.is_file())
    if not files:
        raise SystemExit(f'{source} holds no CLASS/IMAGE files; give the folder that holds the classes')
    random.Random(0).shuffle(files)
    for path in files[:limit]:
        link = target / 'train' / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return min(limit, len(files))


def image_folder_epoch(folder: Path, args: argparse.Namespace) -> Callable[[], int]:
    """An epoch of torchvision's ImageFolder in a DataLoader; returns the images seen."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose([
        transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(folder), transform), args.batch, shuffle=True, drop_last=True, num_workers=args.workers)
    return lambda: sum(len(images) for images, _ in loader)


def ffcv_epoch(beton: Path, args: argparse.Namespace) -> Callable[[], int]:
    """An epoch through FFCV."""
    options = LoaderOptions(input_size=(3, args.size, args.size), batch_size=args.batch, workers=max(1, args.workers))
    batches = FFCVBatches(inspect_beton(beton), options, train=True)
    return lambda: sum(len(images) for images, _ in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument('--data-dir', type=Path, required=True, help='folder with a folder of JPEGs for each class')
    parser.add_argument('--limit', type=int, default=10_000, help='images, drawn at random')
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--max-resolution', type=int, default=500, help='longer side of images in the .beton files')
    parser.add_argument('--write-modes', nargs='+', default=['jpg', 'proportion'], choices=list(WRITE_MODES))
    args = parser.parse_args()
    if args.quick:
        args.limit, args.batch, args.rounds = 64, 16, 1
    torch.set_num_threads(args.threads or 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / 'images'
        count = sample_folder(args.data_dir, folder, args.limit)
        epochs = {'ImageFolder + DataLoader': image_folder_epoch(folder / 'train', args)}
        for mode in args.write_modes:
            output = Path(scratch) / mode
            write_main([
                '--data-dir', str(folder), '--val-split', '', '--output', str(output), '--write-mode', mode,
                '--max-resolution', str(args.max_resolution), '--workers', str(max(1, args.workers))])
            epochs[f'FFCV, {WRITE_MODES[mode]}'] = ffcv_epoch(output / 'train.beton', args)
        images = {name: epoch() for name, epoch in epochs.items()}  # compiles FFCV's pipelines, fills the page cache
        wall: dict[str, list[float]] = {name: [] for name in epochs}

        def timed(name: str) -> None:
            start = time.perf_counter()
            epochs[name]()
            wall[name].append(time.perf_counter() - start)

        timings = time_interleaved(
            {name: lambda name=name: timed(name) for name in epochs}, 'cpu', args.rounds, 0, clock=cpu_seconds)
    base = timings['ImageFolder + DataLoader']
    rows = []
    for name, timing in timings.items():
        per_second = Spread.of([images[name] / seconds for seconds in timing.seconds])
        rows.append([name, per_second, base.over(timing), images[name] / Spread.of(wall[name]).median])
    report(
        'loaders', 'Training batches: FFCV and ImageFolder',
        ['loader', 'images / CPU-second', 'times ImageFolder', 'images / second'], rows,
        [
            f'{count} JPEGs, {args.size} px crops, batch {args.batch}, {args.workers} workers, files in the page '
            f'cache; .beton files with a longer side of at most {args.max_resolution} px.',
            f'Median (quartiles) of {args.rounds} interleaved epochs after one that is not timed. CPU-seconds count '
            'every thread and worker, and no other program; images / second do not.',
        ],
        args, {name: timing.seconds for name, timing in timings.items()})


if __name__ == '__main__':
    main()
