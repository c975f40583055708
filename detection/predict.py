"""Detect objects in images and draw the boxes.

    python -m detection.predict IMAGE... --checkpoint output/detection/RUN/last.pth.tar

writes a picture per image and predictions.json (boxes as x1, y1, x2, y2 in pixels, scores, classes) to --output.
"""
import argparse
import json
from pathlib import Path

import torch

from alignmix_lab.data.images.folders import EXTENSIONS
from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.options import exit_with_message

from .data import open_image
from .export_checkpoint import load_detector
from .pictures import draw_detections


def find_images(paths: list[str]) -> list[Path]:
    """List image files, including those directly inside folders.

    Raises:
        ValueError: A path does not exist or a folder has no images.
    """
    files = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise ValueError(f'{path}: no such image' if not path.is_dir() else f'{path} has no images')
        files += inside
    return files


@torch.inference_mode()
def predict(
        images: list[str], checkpoint: str, output: str = 'output/predictions', threshold: float = 0.4,
        device: str = 'cuda' if torch.cuda.is_available() else 'cpu') -> Path:
    """Detect objects in images one by one; write pictures and predictions.json to a folder and return it.

    `images` are files or folders, `checkpoint` is a training checkpoint or exported folder.

    Raises:
        ValueError: An image or the checkpoint is missing or damaged.
    """
    files, folder, results, used = find_images(images), Path(output), [], set()
    model, class_names = load_detector(checkpoint)
    model.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        image = open_image(file)
        (found,) = model([image.to(device).float() / 255])
        keep = found['scores'] >= threshold
        found = {key: value[keep].cpu().numpy() for key, value in found.items()}
        name = file.stem if file.stem not in used else f'{file.stem}-{len(results)}'
        used.add(name)
        draw_detections(image, found, class_names, threshold).save(folder / f'{name}.png')
        results.append(dict(
            image=str(file),
            boxes=found['boxes'].astype(float).round(2).tolist(),
            scores=found['scores'].astype(float).round(4).tolist(),
            classes=[class_names[label - 1] for label in found['labels']],
        ))
        shown = ', '.join(f'{c} {s:.2f}' for c, s in zip(results[-1]['classes'], results[-1]['scores'], strict=True))
        print(f'{file} -> {folder / name}.png: {shown or "nothing"}')
    write_whole(folder / 'predictions.json', json.dumps(results, indent=4))
    return folder


def main(argv: list[str] | None = None, prog: str = 'python -m detection.predict') -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', help='image files or folders of images')
    parser.add_argument('--checkpoint', required=True, help='last.pth.tar of detection.train, or an exported folder')
    parser.add_argument('--output', default='output/predictions', help='folder to write (default: %(default)s)')
    parser.add_argument('--threshold', type=float, default=0.4, help='smallest score to draw (default: %(default)s)')
    args = parser.parse_args(argv)
    with exit_with_message(prog):
        predict(args.images, args.checkpoint, args.output, args.threshold)


if __name__ == '__main__':
    main()
