"""Model card of exported weights, made from their configuration alone."""
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCardData

_ALIGNMIX = ('2103.15375', 'AlignMixup: Improving Representations By Interpolating Aligned Features')
_MULTIMIX = ('2311.05538', 'Embedding Space Interpolation Beyond Mini-Batch, Beyond Pairs and Beyond Examples')
PAPERS = {  # method: arXiv id, title
    'mixup': ('1710.09412', 'mixup: Beyond Empirical Risk Minimization'),
    'comixup': ('2102.03065', 'Co-Mixup: Saliency Guided Joint Mixup with Supermodular Diversity'),
    'cutmix': ('1905.04899', 'CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features'),
    'cutout': ('1708.04552', 'Improved Regularization of Convolutional Neural Networks with Cutout'),
    'fmix': ('2002.12047', 'FMix: Enhancing Mixed Sample Data Augmentation'),
    'guidedmixup': ('2306.16612', 'GuidedMixup: An Efficient Mixup Strategy Guided by Saliency Maps'),
    'puzzlemix': ('2009.06962', 'Puzzle Mix: Exploiting Saliency and Local Statistics for Optimal Mixup'),
    'regmixup': (
        '2206.14502',
        'RegMixup: Mixup as a Regularizer Can Surprisingly Improve Accuracy and Out Distribution Robustness'),
    'resizemix': ('2012.11101', 'ResizeMix: Mixing Data with Preserved Object Information and True Labels'),
    'saliencymix': (
        '2006.01791', 'SaliencyMix: A Saliency Guided Data Augmentation Strategy for Better Regularization'),
    'snapmix': ('2012.04846', 'SnapMix: Semantically Proportional Mixing for Augmenting Fine-grained Data'),
    'tokenmix': ('2207.08409', 'TokenMix: Rethinking Image Mixing for Data Augmentation in Vision Transformers'),
    'transmix': ('2111.09833', 'TransMix: Attend to Mix for Vision Transformers'),
    'zeta': (
        '2204.03323',
        'Multi-Sample zeta-mixup: Richer, More Realistic Synthetic Samples from a p-Series Interpolant'),
    'manifold': ('1806.05236', 'Manifold Mixup: Better Representations by Interpolating Hidden States'),
    'alignmix': _ALIGNMIX,
    'alignmix_ae': _ALIGNMIX,
    'multimix': _MULTIMIX,
    'densemultimix': _MULTIMIX,
}


def needed_import(architecture: str) -> str | None:
    """Package to import before timm knows a network; None for timm's own networks."""
    package = timm.models.model_entrypoint(architecture).__module__.split('.')[0]
    return None if package == 'timm' else package


def _metadata(config: dict[str, Any], name: str) -> str:
    facts = config.get('training', {})
    accuracy = facts.get('accuracy', {})
    metrics = accuracy.get(accuracy.get('exported'), {})
    key, metric, metric_name = (
        ('map', 'mAP', 'mAP (%)') if facts.get('multi_label') else ('top1', 'accuracy', 'top-1 accuracy (%)'))
    results = None
    if metrics.get(key) is not None and accuracy['measured_on'] == facts['weights']:
        results = [EvalResult(
            task_type='image-classification', dataset_type=facts['dataset'], dataset_name=facts['dataset'],
            metric_type=metric, metric_name=metric_name, metric_value=round(metrics[key], 2))]
    return ModelCardData(
        license=config['pretrained_cfg']['license'], library_name='timm', pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-alignmix'], eval_results=results, model_name=name).to_yaml()


def _usage(config: dict[str, Any]) -> list[str]:
    package = needed_import(config['architecture'])
    if package:
        why = f"This network is not part of timm: `import {package}` before loading, which adds it."
    else:
        why = "This network is part of timm: timm alone loads this folder."
    imports = 'import timm' + (f', {package}  # {package} has the network' if package else '')
    return [
        '## Usage', '', why, '',
        '```python',
        imports,
        '',
        "model = timm.create_model('local-dir:FOLDER', pretrained=True).eval()  # from the hub: 'hf-hub:OWNER/NAME'",
        'data_config = timm.data.resolve_model_data_config(model)',
        'transform = timm.data.create_transform(**data_config, is_training=False)',
        "features = timm.create_model('local-dir:FOLDER', pretrained=True, features_only=True)",
        "other = timm.create_model('local-dir:FOLDER', pretrained=True, num_classes=5)  # a new classifier",
        '```',
    ]


def _accuracy(facts: dict[str, Any]) -> list[str]:
    accuracy = facts.get('accuracy')
    if not accuracy:
        return []
    lines = ['## Accuracy', '', f'On the validation images of {facts["dataset"]}; epochs count from 0.', '']
    columns = {'map': 'mAP (%)', 'macro_f1': 'macro F1 (%)'} if facts.get('multi_label') else {
        'top1': 'top-1 (%)', 'top5': 'top-5 (%)'}
    lines += [f'| epoch | | {" | ".join(columns.values())} | loss |', '|---|---|---|---|---|']
    for name, row in accuracy.items():
        if isinstance(row, dict):
            what = name + (', these weights' if name == accuracy['exported'] else '')
            figures = [f'{row[key]:.{4 if key == "loss" else 2}f}' if row.get(key) is not None else ''
                       for key in (*columns, 'loss')]
            lines.append(f'| {row["epoch"]} | {what} | {" | ".join(figures)} |')
    lines += ['', 'The best epoch was chosen on the images it was measured on, so its figure is optimistic.']
    if facts.get('loader') == 'ffcv':
        lines += ['', "Measured with FFCV's loader, which averages areas to shrink an image, whatever interpolation is "
                  'listed above; with another loader a few images may be classified differently.']
    if accuracy['measured_on'] != facts['weights']:
        lines += ['', f'Measured on the {accuracy["measured_on"]} weights; these are the {facts["weights"]} ones.']
    return [*lines, '']


def make_card(config: dict[str, Any]) -> str:
    """Write the README.md of an exported folder from its config.json: metadata for the hub, facts, how to load."""
    facts, cfg = config.get('training', {}), config['pretrained_cfg']
    name = '.'.join(part for part in (config['architecture'], cfg.get('tag')) if part)
    lines = ['---', _metadata(config, name), '---', f'# {name}', '', cfg['description'], '']
    details = {
        'network': config['architecture'],
        'arguments of the network': config.get('model_args'),
        'mix': facts.get('mix'),
        'drawn with weights': facts.get('mix_weights'),
        'options of the mix': facts.get('mix_options'),
        'data set': facts.get('dataset'),
        'classes': config['num_classes'],
        'labels': 'any number for an image: apply a sigmoid to the logits' if facts.get('multi_label') else None,
        'weights': {'raw': 'as trained', 'ema': 'moving average'}.get(facts.get('weights')),
        'started from': facts.get('initial_weights'),
        'images': f'{cfg["input_size"]}, mean {cfg["mean"]}, std {cfg["std"]}, {cfg["interpolation"]}, '
                  f'crop {cfg["crop_pct"]}',
        'licence': cfg['license'],
    }
    if facts.get('mix') in PAPERS:
        arxiv, title = PAPERS[facts['mix']]
        details['paper'] = f'[{title}](https://arxiv.org/abs/{arxiv})'
    lines += [f'- {key}: {value}' for key, value in details.items() if value not in (None, {}, '')]
    lines += ['', *_accuracy(facts), *_usage(config), '']
    if facts.get('recipe'):
        recipe = yaml.safe_dump(facts['recipe'], default_flow_style=None, sort_keys=True, width=110)
        lines += ['## Recipe', '', 'For `train_imagenet.py --config FILE.yaml` of timm-alignmix.', '',
                  '```yaml', recipe.rstrip(), '```', '']
    return '\n'.join(lines)
