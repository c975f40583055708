"""Run by test_processes.py on each of several processes: python two_processes.py JOBS.json FOLDER.

Trains each configuration and saves what this process saw and ended with as FOLDER/NAME-RANK.pt.
"""
import hashlib
import json
import sys
from pathlib import Path

import torch

from timm_alignmix.training import TrainConfig, fit, prepare


def fingerprints(loader) -> list[str]:
    return [hashlib.sha1(image.numpy().tobytes()).hexdigest() for images, _ in loader for image in images]


def main(jobs: str, folder: str) -> None:
    torch.set_num_threads(1)
    todo = json.loads(Path(jobs).read_text())
    for name, options in todo.items():
        run, saver = prepare(TrainConfig(**options))
        rank = run.accelerator.process_index
        run.loaders.train.set_epoch(0)
        seen = {'train': fingerprints(run.loaders.train), 'val': fingerprints(run.loaders.val)}
        if name != list(todo)[-1]:
            run.accelerator.end_training = lambda: None  # the processes stay connected for the next
        result = fit(run, saver)
        ema = run.task.get_eval_model(ema=True) if run.task.has_ema() else None
        torch.save({
            **seen,
            'processes': run.accelerator.num_processes,
            'history': result['history'],
            'state_dict': run.task.get_eval_model().state_dict(),
            'state_dict_ema': ema and ema.state_dict(),
        }, Path(folder) / f'{name}-{rank}.pt')


if __name__ == '__main__':
    main(*sys.argv[1:])
