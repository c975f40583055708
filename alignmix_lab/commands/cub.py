"""Add the folders that training reads, train/CLASS and val/CLASS, to a folder in the format of CUB-200-2011.

    python -m alignmix_lab cub --data-dir CUB_200_2011
    python train_imagenet.py --data-dir CUB_200_2011 ...
    python evaluate.py localization --data-dir CUB_200_2011 ...
"""
import argparse
import os
import shutil
from pathlib import Path

from alignmix_lab.evaluation.protocols.box_data import CUB_FILES, cub_class_names, cub_table


def make_class_folders(root: Path, output: Path | None = None, copy: bool = False) -> dict[str, int]:
    """Link every image into train/CLASS or val/CLASS, following train_test_split.txt; returns their numbers.

    The folders go to `root` or, with links to the text files and images so that it can be evaluated too, to `output`.
    `copy` copies the images, for file systems without links.

    Raises:
        ValueError: The folder does not have the format of CUB-200-2011, or train or val exists already.
    """
    tables = {name: cub_table(root, name) for name in CUB_FILES}
    paths, labels, is_train = (tables[name] for name in CUB_FILES[:3])
    cub_class_names(root, paths, labels)
    output = output or root
    for split in ('train', 'val'):
        if (output / split).exists():
            raise ValueError(f'{output / split} is there already; remove it, or choose another --output')
    counts = {'train': 0, 'val': 0}
    for key, (path,) in paths.items():
        split = 'train' if is_train[key][0] == '1' else 'val'
        target = output / split / path
        target.parent.mkdir(parents=True, exist_ok=True)
        source = root / 'images' / path
        if not source.is_file():
            raise ValueError(f'{source} of images.txt is missing')
        (shutil.copyfile if copy else link)(source, target)
        counts[split] += 1
    if output.resolve() != root.resolve():
        for name in (*CUB_FILES, 'images'):
            link(root / name, output / name)
    return counts


def link(source: Path, target: Path) -> None:
    """Make a relative link, which survives moving both paths together."""
    target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))


def main(argv: list[str] | None = None, prog: str = 'alignmix cub') -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split('\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True, help='folder in the format of CUB-200-2011')
    parser.add_argument('--output', type=Path, help='folder for train and val; default: --data-dir')
    parser.add_argument('--copy', action='store_true', help='copy images instead of linking them')
    args = parser.parse_args(argv)
    try:
        counts = make_class_folders(args.data_dir, args.output, args.copy)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    print(f'{args.output or args.data_dir}: train {counts["train"]}, val {counts["val"]} images')
