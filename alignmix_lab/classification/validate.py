"""Evaluation of a classifier during training."""
import logging
import time
from collections import OrderedDict

import torch
from torch import nn

from alignmix_lab.runs.logs import progress_bar
from alignmix_lab.runs.run import Run
from alignmix_lab.runs.sharding import match_forwards

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def validate(run: Run, model: nn.Module, name: str = 'Test') -> OrderedDict[str, float]:
    """Evaluate a model on the whole validation set, every image once.

    Processes may have different numbers of batches, so they only synchronise after the last one.

    Returns:
        `loss`, and `top1` and `top5` in per cent. With --multi-label binary cross-entropy, and in per cent `map`, the
        average precision of a class averaged over all classes, and F1 of the labels with a probability of at least
        0.5: `micro_f1` of all labels, `macro_f1` averaged over classes and `sample_f1` over images. A class without
        images counts as 0.
    """
    loader, interval = run.loaders.val, run.config.log_interval
    model.eval()
    evaluator = run.config.evaluator(device=run.accelerator.device)
    batches, start = len(loader), time.perf_counter()
    with progress_bar(run, name, batches) as bar:
        for index, (images, target) in enumerate(loader):
            with run.accelerator.autocast():
                output = model(images)
            evaluator.update(output, target)
            bar.update()
            if index % interval == 0 and index + 1 < batches:
                _log_test(name, index, batches, start, evaluator.summary())
    match_forwards(run.accelerator, model, batches, run.data_config['input_size'])
    metrics = evaluator.compute(distributed=run.accelerator.num_processes > 1)
    _log_test(name, batches - 1, batches, start, metrics)
    return metrics


def _log_test(name: str, index: int, batches: int, start: float, metrics: OrderedDict[str, float]) -> None:
    shown = {'top1': 'Acc@1', 'top5': 'Acc@5', 'map': 'mAP', 'macro_f1': 'macro F1'}
    values = [f'{text}: {metrics[key]:>7.3f}' for key, text in shown.items() if key in metrics]
    _logger.info('  '.join([
        f'{name}: [{index:>4d}/{batches - 1}]',
        f'Time: {(time.perf_counter() - start) / max(1, index + 1):.3f}', f'Loss: {metrics["loss"]:>6.3f}', *values]))
