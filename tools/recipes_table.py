"""Write the table of recipes/README.md: published figures, ours, and estimated GPU-hours of every recipe and method.

    python tools/recipes_table.py
    python tools/recipes_table.py --check    # exit with 1 where the table is stale

Published figures come from alignmix_lab/evaluation/published.csv, epochs and image sizes from the recipes. The hours
are those of one RTX 2080 Ti, for which AlignMixup's Table 2 has 418 ms per batch of 100 with ResNet-50 and no mixing.
This is 5.9 TFLOP/s, and other networks are taken to sustain the same:

    epochs x images x (GFLOP of the network / 8.18 of ResNet-50) x 4.18 ms x (step with this method / step with none)

The last factor is ResNet-50's too: milliseconds of AlignMixup's Table 2, or images per second of MultiMix's Table 3.
"""
import argparse
import sys
from pathlib import Path

from alignmix_lab.classification import TrainConfig, resolve_config
from alignmix_lab.evaluation.published import METHODS, Figure, figures, find
from alignmix_lab.runs.options import recipe_mixes

README = Path(__file__).resolve().parents[1] / 'recipes' / 'README.md'
BEGIN, END = '<!-- written by tools/recipes_table.py -->\n', '<!-- until here -->\n'
MIXES = (*METHODS, 'alignmix_release')

RESNET50_GFLOP = 8.18  # forward pass of an image of 224 pixels, multiplication and addition counted as two
# Figures in percent: error and accuracy are both shown as accuracy.
METRICS = ('top-1 error %', 'top-1 accuracy %', 'Top-1 localization %', 'MaxBoxAccV2 %', 'mAP %')

# GFLOP of a forward pass of an image (of 224 pixels where images grow) or None, then paper, table, dataset and network
# of the published figures.
RECIPES = {
    'cifar10/preactresnet18_300ep': (1.11,),
    'cifar10/preactresnet18_2000ep': (
        1.11, ('A', 'Table 1', 'CIFAR-10', 'PreActResNet-18'), ('M', 'Table 2', 'CIFAR-10', 'PreActResNet-18')),
    'cifar10/wrn16_8_300ep': (3.1,),
    'cifar10/wrn16_8_2000ep': (
        3.1, ('A', 'Table 1', 'CIFAR-10', 'WRN-16-8'), ('M', 'Table 2', 'CIFAR-10', 'WRN-16-8')),
    'cifar100/preactresnet18_300ep': (1.11, ('A', 'section 4.2', 'CIFAR-100 300 epochs', 'PreActResNet-18')),
    'cifar100/preactresnet18_2000ep': (
        1.11, ('A', 'Table 1', 'CIFAR-100', 'PreActResNet-18'), ('M', 'Table 2', 'CIFAR-100', 'PreActResNet-18')),
    'cifar100/wrn16_8_300ep': (3.1,),
    'cifar100/wrn16_8_2000ep': (
        3.1, ('A', 'Table 1', 'CIFAR-100', 'WRN-16-8'), ('M', 'Table 2', 'CIFAR-100', 'WRN-16-8')),
    'tinyimagenet/preactresnet18_1200ep': (
        4.44, ('A', 'Table 1', 'TinyImageNet', 'PreActResNet-18'), ('M', 'Table 2', 'TinyImageNet', 'PreActResNet-18')),
    'imagenet/resnet50_300ep': (
        RESNET50_GFLOP,
        ('A', 'Table 2', 'ImageNet 300 epochs', 'ResNet-50'),
        ('M', 'Table 3', 'ImageNet', 'ResNet-50'),
    ),
    'imagenet/resnet50_100ep': (RESNET50_GFLOP, ('A', 'Table 7', 'ImageNet 100 epochs', 'ResNet-50')),
    'imagenet/vit_small_300ep': (9.2, ('M', 'Table 3', 'ImageNet', 'ViT-S/16')),
    'imagenet/levit_128s_100ep': (0.61, ('A', 'supplement C', 'ImageNet 100 epochs', 'LeViT-128S')),
    'cub200/resnet50': (12.41, ('A', 'Table 5', 'CUB-200-2011', 'ResNet-50')),
    'cub200/vgg16_gap': (32.54, ('A', 'Table 5', 'CUB-200-2011', 'VGG-GAP')),
    'modern/ffcv_rn50_16ep': (RESNET50_GFLOP,),
    'modern/ffcv_rn50_32ep': (RESNET50_GFLOP,),
    'modern/ffcv_rn50_88ep': (RESNET50_GFLOP,),
    'modern/rsb_a2': (RESNET50_GFLOP,),
    'modern/rsb_a3': (RESNET50_GFLOP,),
    'study/preactresnet18_small': (None,),
    'finetune/resnet50': (None,),
    'finetune/convnext_tiny': (None,),
    'finetune/vit_small': (None,),
    'finetune/dinov2_small': (None,),
    'finetune/vit_large': (None,),
    'finetune/dinov3_7b': (None,),
    'detection/ssd300_voc0712': (None, ('M', 'Table 5', 'VOC07+12', 'SSD ResNet-50')),
    'detection/ssd300_voc07': (None,),
    'detection/fasterrcnn_coco': (None, ('M', 'Table 5', 'COCO', 'Faster R-CNN ResNet-50')),
    'detection/fasterrcnn_coco_torchvision': (None,),
    'detection/ssd300_coco_torchvision': (None,),
}
# Published elsewhere than in the two papers' tables; README.md says where.
ELSEWHERE = {
    ('cifar10/preactresnet18_2000ep', 'alignmix_release'): '97.05, 96.85 log',
    ('cifar10/wrn16_8_2000ep', 'alignmix_release'): '96.91, 96.80 log',
    ('cifar100/preactresnet18_2000ep', 'alignmix_release'): '81.71, 81.54 log',
    ('cifar100/wrn16_8_2000ep', 'alignmix_release'): '81.23, 81.16 log',
    ('tinyimagenet/preactresnet18_1200ep', 'alignmix_release'): '66.87, 65.79 log',
    ('modern/ffcv_rn50_16ep', 'none'): '73.8 F',
    ('modern/ffcv_rn50_32ep', 'none'): '76.6 F',
    ('modern/ffcv_rn50_88ep', 'none'): '78.4 F',
    ('modern/rsb_a2', 'cutmix'): '79.8 R',
    ('modern/rsb_a3', 'cutmix'): '78.1 R',
    ('detection/fasterrcnn_coco_torchvision', 'none'): '37.0 T',
    ('detection/ssd300_coco_torchvision', 'none'): '25.1 T',
}
# Measured with this code, in percent; none so far.
OURS: dict[tuple[str, str], float] = {}


def step_factor(mix: str) -> float | None:
    """Duration of a training step with a method, relative to one without mixing; None where none was published."""
    method = METHODS[mix.removesuffix('_release')]
    duration = {f.method: f.value for f in find(['ms per batch, RTX 2080 Ti'], 'A', 'Table 2')}
    speed = {f.method: f.value for f in find(['1000 images/s, V100'], 'M', 'Table 3') if f.network == 'ResNet-50'}
    if method in duration:
        return duration[method] / duration['baseline']
    return speed['baseline'] / speed[method] if method in speed else None


def gpu_hours(config: TrainConfig, gflop: float, mix: str) -> float:
    """Estimated hours of one RTX 2080 Ti, as the docstring of this file says."""
    ms_per_batch, = find(['ms per batch, RTX 2080 Ti'], 'A', 'Table 2', ['baseline'])
    epochs = config.epochs + (config.warmup_epochs if config.warmup_prefix else 0)
    sides = [config.train_side(epoch) or 224 for epoch in range(epochs)]
    images = config.dataset_size[0] * sum((side / 224) ** 2 for side in sides)
    return images * gflop / RESNET50_GFLOP * ms_per_batch.value / 100 / 1000 / 3600 * step_factor(mix)


def _label(figure: Figure) -> str:
    """Where a figure stands: A1 is AlignMixup's Table 1."""
    return figure.paper + figure.table.replace('Table ', '').replace('section ', ' §').replace('supplement', ' suppl.')


def _published(settings: tuple[tuple[str, str, str, str], ...], mix: str) -> list[str]:
    """Figures of a method, one entry a table."""
    found: dict[str, list[str]] = {}
    for setting in settings:
        for figure in figures():
            if figure.setting == setting and figure.metric in METRICS and figure.method == METHODS.get(mix):
                value = 100 - figure.value if 'error' in figure.metric else figure.value
                found.setdefault(_label(figure), []).append(f'{value:.2f}')
    return [f'{" / ".join(values)} {label}' for label, values in found.items()]


def _cell(recipe: str, mix: str) -> str:
    gflop, *settings = RECIPES[recipe]
    lines = _published(tuple(settings), mix)
    if (recipe, mix) in ELSEWHERE:
        lines.append(ELSEWHERE[recipe, mix])
    if (recipe, mix) in OURS:
        lines.append(f'**{OURS[recipe, mix]:.2f}**')
    if gflop and step_factor(mix) and (
            lines or mix not in ('alignmix_ae', 'alignmix_release') or mix in recipe_mixes(recipe, TrainConfig)):
        hours = gpu_hours(resolve_config({'mix': mix}, recipe), gflop, mix)
        lines.append(f'{hours:.{1 if hours < 9.95 else 0}f} h')
    return '<br>'.join(lines)


def table() -> str:
    """All recipes in Markdown."""
    rows = [['recipe', 'GPUs', *(f'`{mix}`' for mix in MIXES)], ['---'] * (2 + len(MIXES))]
    for recipe, (gflop, *_) in RECIPES.items():
        gpus = str(resolve_config({}, recipe).num_processes) if gflop else ''
        rows.append([f'[{recipe}]({recipe}.yaml)', gpus, *(_cell(recipe, mix) for mix in MIXES)])
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def updated(text: str) -> str:
    """README.md with the table as it should be."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return before + BEGIN + '\n' + table() + '\n' + END + after


def main(argv: list[str] | None = None) -> None:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 where the table is stale')
    args = parser.parse_args(argv)
    text = README.read_text(encoding='utf-8')
    new = updated(text)
    if args.check and new != text:
        sys.exit(f'{README} is stale: run python tools/recipes_table.py')
    if not args.check:
        README.write_text(new, encoding='utf-8')


if __name__ == '__main__':
    main()
