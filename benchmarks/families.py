#!/usr/bin/env python3
"""Which timm model families can be mixed, and how: one small model of every timm model module, every method.

Each method takes one forward and backward step in its feature mode (input modes work on any classifier). Writes docs/families.md
and benchmarks/results/families.json.

    python benchmarks/families.py                     # all modules, about half an hour on two cores
    python benchmarks/families.py resnet levit vgg    # some, printed only
"""
import argparse
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

import timm_alignmix
from timm_alignmix import MixTask, UnsupportedModel

ROOT = Path(__file__).resolve().parent.parent
# Options that force the feature mode.
FEATURE_MODES = {
    'manifold': dict(layers=None),
    'alignmix': dict(mode_probs=(0, 1, 1)),
    'multimix': dict(prob=1.0, n=8),
    'densemultimix': dict(prob=1.0, n=8),
}
BATCH, CLASSES = 4, 7


def smallest_model(module: str) -> tuple[str, int]:
    """The model of a timm module with the fewest parameters times pixels, and its parameters. Nothing is allocated."""
    best = None
    for name in timm.list_models(module=module):
        if name.startswith('test_'):
            continue
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                model = timm.create_model(name)
            except Exception:
                continue  # a few models cannot be built on the meta device; their siblings can
        params = sum(p.numel() for p in model.parameters())
        cost = params * model.pretrained_cfg['input_size'][-1] ** 2
        if best is None or cost < best[0]:
            best = (cost, name, params)
    if best is None:
        raise RuntimeError(f'no model of timm.models.{module} could be built on the meta device')
    return best[1:]


def step(name: str, mix: str) -> dict[str, Any]:
    """One step in feature mode: {'result': 'exact' | 'per-position head' | 'refused' | 'failed', ...}."""
    kwargs = timm_alignmix.dense_model_kwargs(name) if mix == 'densemultimix' else {}
    model = timm.create_model(name, num_classes=CLASSES, **kwargs)
    row = dict(model_kwargs=kwargs) if kwargs else {}
    try:
        task = MixTask(model, mix, FEATURE_MODES[mix], verbose=False)
    except UnsupportedModel as e:
        return dict(row, result='refused', why=str(e).removeprefix(f'{name}: '))
    if mix == 'manifold':
        # Without the input: each step is at a layer.
        task.mix.probs = {layer: 1 / len(task.mix.layers) for layer in task.mix.layers}
    model.train()
    size = model.pretrained_cfg['input_size']
    images = torch.randn(BATCH, *size, generator=torch.Generator().manual_seed(0))
    result = task(images, torch.arange(BATCH) % CLASSES)
    result['loss'].backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    finite = bool(torch.isfinite(result['loss'])) and all(bool(torch.isfinite(g).all()) for g in grads)
    row.update(mode=result['mode'], layers={k: v.num_positions for k, v in task.mix.layers.items()})
    if not finite or not any(bool(g.any()) for g in grads):
        return dict(row, result='failed', why='loss or gradient is not finite, or the gradient is zero')
    if task.mix.head is not None:
        row.update(layers={task.mix.head.name: task.mix.head.positions_at(images)})
        if not task.mix.head.exact_mean:
            return dict(row, result='per-position head')
    return dict(row, result='exact')


def markdown(rows: list[dict[str, Any]], info: str) -> str:
    worked = {mix: sum(row[mix]['result'] in ('exact', 'per-position head') for row in rows) for mix in FEATURE_MODES}
    lines = [
        '# Model families',
        '',
        'One small model of every timm model module, one forward and backward step of every method in its feature mode. mixup, '
        'cutmix and none need no knowledge of the model and run on all of them.',
        '',
        f'`python benchmarks/families.py`, {info}.',
        '',
        '| method | modules it works on |',
        '|---|---|',
        *(f'| {mix} | {n} of {len(rows)} |' for mix, n in worked.items()),
        '',
        '- **exact**: the split reproduces the model\'s own forward; for densemultimix the mean of dense logits is the logits.',
        '- **per-position**: the head has a norm or layers after pooling and is applied to each position, so the mean of '
        'dense logits is not the logits.',
        '- a number is that of positions mixed at; `refused` models raise at construction with the reason below.',
        '',
        '| module | model | ' + ' | '.join(FEATURE_MODES) + ' |',
        '|---|---|' + '---|' * len(FEATURE_MODES),
    ]
    reasons = []
    for row in rows:
        cells = []
        for mix in FEATURE_MODES:
            cell = row[mix]
            where = ', '.join(f'`{layer}` {n}' for layer, n in cell.get('layers', {}).items())
            text = {'per-position head': 'per-position'}.get(cell['result'], cell['result'])
            cells.append(f'{text} {where}'.strip())
            if 'why' in cell:
                reasons.append(f'- {row["model"]}, {mix}: {cell["why"]}'.replace('\n', ' ')[:300])
        lines.append(f'| {row["module"]} | {row["model"]} | ' + ' | '.join(cells) + ' |')
    with_kwargs = [row for row in rows if row['densemultimix'].get('model_kwargs')]
    if with_kwargs:
        kwargs = ', '.join(f'{k}={v!r}' for k, v in with_kwargs[0]['densemultimix']['model_kwargs'].items())
        names = ', '.join(row['model'] for row in with_kwargs)
        lines += ['', f'For densemultimix these were created with `{kwargs}`: {names}.']
    return '\n'.join([*lines, '', '## Why refused', '', *reasons, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('modules', nargs='*', help='timm model modules; all when none is named')
    args = parser.parse_args()
    # Not ours: networks that only this package has are registered in timm too.
    modules = args.modules or [m for m in timm.list_modules() if hasattr(timm.models, m)]
    rows = []
    start = time.time()
    for module in tqdm(modules, unit='module'):
        name, params = smallest_model(module)
        row = dict(module=module, model=name, params=params)
        for mix in FEATURE_MODES:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                try:
                    row[mix] = step(name, mix)
                except Exception as e:
                    row[mix] = dict(result='failed', why=f'{type(e).__name__}: {e}')
            tqdm.write(f'{module} {name} {mix}: {row[mix]["result"]} {row[mix].get("why", "")}'[:200])
        rows.append(row)
    info = f'timm {timm.__version__}, torch {torch.__version__}, {platform.machine()} CPU, {time.strftime("%Y-%m-%d")}'
    text = markdown(rows, info)
    if args.modules:
        print(text)
        return
    (ROOT / 'docs' / 'families.md').write_text(text)
    results = dict(info=info, seconds=round(time.time() - start), rows=rows)
    (ROOT / 'benchmarks' / 'results' / 'families.json').write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
