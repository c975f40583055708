#!/usr/bin/env python3
"""Images/s of trained detectors in training and inference, one row per detector, as in MultiMix's Table 5.

Mixing ends with classification: two rows of a table are the same network with other weights, so their speed can
differ only by what the weights let through (proposals, boxes that are kept). All rows of one architecture are timed in
one run, interleaved, on the same images, which are on the device already.

    python -m benchmarks.detection_speed --data-dir VOCdevkit --batch-size 32 \\
        none=output/detection/none/last.pth.tar densemultimix=output/detection/densemultimix/last.pth.tar

Prints a table of images/s and of the speed relative to the first row, median and quartiles over rounds.
"""
import argparse
import json
import time
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from alignmix_lab.runs.timing import hardware, time_interleaved
from detection.data import Batch, DetectionDataset, DetectionLoader, read_annotations
from detection.export_checkpoint import load_detector
from detection.transforms import create_transform


def train_step(detector: nn.Module, optimizer: torch.optim.Optimizer, autocast: partial, batches: list[Batch]) -> None:
    """Forward, backward and update on each batch."""
    detector.train()
    for images, targets in batches:
        with autocast():
            loss = torch.stack([loss.float() for loss in detector(images, targets).values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def detect(detector: nn.Module, autocast: partial, batches: list[Batch]) -> None:
    """Boxes of each batch."""
    detector.eval()
    for images, _ in batches:
        with autocast():
            detector(images)


def measure(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each detector and for training and inference."""
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.amp)
    train, detection = {}, {}
    data = None
    for entry in args.detectors:
        name, _, path = entry.rpartition('=')
        detector, class_names = load_detector(path)
        detector.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
        if data is None:
            annotations = read_annotations(
                args.dataset, args.data_dir, args.train_split, args.val_split, class_names)
            mean = detector.transform.image_mean
            data = [list(islice(DetectionLoader(dataset, args.batch_size, training, device=device), args.batches))
                    for training, dataset in (
                        (True, DetectionDataset(annotations[0].records, create_transform('hflip', 0, mean))),
                        (False, DetectionDataset(annotations[1].records)))]
        # A rate so small that the weights, and with them the number of proposals, stay what they are.
        optimizer = torch.optim.SGD((p for p in detector.parameters() if p.requires_grad), lr=1e-9, momentum=0.9)
        train[name or path] = partial(train_step, detector, optimizer, autocast, data[0])
        detection[name or path] = partial(detect, detector, autocast, data[1])
    rows = []
    for what, cases, batches in (('training', train, data[0]), ('inference', detection, data[1])):
        timings = time_interleaved(cases, device, rounds=args.rounds, warmup=1)
        images, base = sum(len(batch[0]) for batch in batches), next(iter(timings.values()))
        for name, timing in timings.items():
            relative = base.over(timing)
            rows.append(dict(
                detector=name, what=what, images_per_s=images / timing.spread.median, relative=relative.median,
                low=relative.low, high=relative.high))
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: images/s, and the speed relative to the first row."""
    lines = ['| detector | training images/s | relative | inference images/s | relative |', '|---|---|---|---|---|']
    for name in dict.fromkeys(row['detector'] for row in rows):
        cells = (f'{row["images_per_s"]:.3g} | {row["relative"]:.2f} ({row["low"]:.2f}-{row["high"]:.2f})'
                 for row in rows if row['detector'] == name)
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('detectors', nargs='+', help='NAME=CHECKPOINT or NAME=FOLDER of trained detectors')
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--dataset', default='voc', choices=('voc', 'coco'))
    parser.add_argument('--train-split')
    parser.add_argument('--val-split')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--batches', type=int, default=4, help='batches of a timing')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--amp', action='store_true', help='bfloat16')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--json', type=Path, help='write the figures to this file')
    args = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    rows = measure(args, device)
    facts = f'{time.strftime("%Y-%m-%d")}, {hardware(device)}'
    if args.json:
        args.json.write_text(json.dumps(dict(hardware=facts, rows=rows), indent=1) + '\n', encoding='utf-8')
    print(f'{facts}\n\n{table(rows)}')


if __name__ == '__main__':
    main()
