"""Export a trained detector from its run and load it again; code in the files is never executed.

    python -m detection.export_checkpoint output/detection/RUN/last.pth.tar DIR

writes DIR/detector.json (its architecture and classes) and DIR/model.safetensors, from which `load_detector(DIR)` and
`python -m detection.predict` rebuild it.
"""
import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict
from torch import nn

from alignmix_lab.runs.checkpoint import load_weights, read_checkpoint
from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.options import exit_with_message

from .detector import rebuild

WEIGHTS_FILE, DESCRIPTION_FILE = 'model.safetensors', 'detector.json'


def read_weights(source: str | Path, ema: bool | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the weights and the description of a detector.

    Args:
        source: Exported folder or training checkpoint.
        ema: For a checkpoint, whether to read the moving average; None reads it if there is one.

    Raises:
        ValueError: There is no detector, or not the requested moving average.
    """
    source = Path(source)
    if source.is_dir():
        try:
            description = json.loads((source / DESCRIPTION_FILE).read_text(encoding='utf-8'))
            return load_file(source / WEIGHTS_FILE), description
        except (OSError, ValueError, SafetensorError) as e:
            raise ValueError(f'{source} is no exported detector ({e})') from e
    state = read_checkpoint(source)
    if 'detector' not in state.get('task_state', {}):
        raise ValueError(f'{source} is no checkpoint of a detector; pass one that detection.train wrote')
    if ema and 'state_dict_ema' not in state:
        raise ValueError(f'{source} has no moving average of the weights; use the raw ones')
    use_ema = 'state_dict_ema' in state if ema is None else ema
    return clean_state_dict(state['state_dict_ema' if use_ema else 'state_dict']), state['task_state']['detector']


def load_detector(source: str | Path, ema: bool | None = None) -> tuple[nn.Module, list[str]]:
    """Build a trained detector, ready to detect; the arguments are those of :func:`read_weights`.

    Returns:
        The detector, in evaluation mode on the CPU, and the names of its labels 1, 2, ...

    Raises:
        ValueError: There is no detector, or its weights do not fit.
    """
    state_dict, description = read_weights(source, ema)
    model = rebuild(description)
    load_weights(model, state_dict, source, 'the detector')
    return model.eval(), description['class_names']


def export_detector(checkpoint: str | Path, folder: str | Path, ema: bool | None = None) -> Path:
    """Export the detector of a checkpoint to a folder, and check that it loads; `ema` as for :func:`read_weights`."""
    state_dict, description = read_weights(checkpoint, ema)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state_dict.items()}, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors writes files for their owner only
    write_whole(folder / DESCRIPTION_FILE, json.dumps(description, indent=4))
    load_detector(folder)
    return folder


def main(argv: list[str] | None = None, prog: str = 'python -m detection.export_checkpoint') -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='last.pth.tar or model_best.pth.tar of detection.train')
    parser.add_argument('folder', help='folder to write')
    parser.add_argument('--ema', action=argparse.BooleanOptionalAction,
                        help='export the moving average; default: if there is one')
    args = parser.parse_args(argv)
    with exit_with_message(prog):
        print(export_detector(args.checkpoint, args.folder, args.ema))


if __name__ == '__main__':
    main()
