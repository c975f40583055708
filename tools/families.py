#!/usr/bin/env python3
"""Which timm model families can be mixed, and how: one small model of every timm model module, every method.

Each method takes one forward and backward step in its feature mode (input modes work on any classifier). Writes
docs/families.md.

    python tools/families.py                     # all modules, about half an hour on two cores
    python tools/families.py resnet levit vgg    # some, printed only
"""
import argparse
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
BATCH, CLASSES = 2, 7


# A small model of every module.
MODELS = dict(pair.split('=') for pair in """
beit=beit_base_patch16_224 byoanet=eca_halonext26ts byobnet=mobileone_s0 cait=cait_xxs24_224 coat=coat_tiny
convit=convit_tiny convmixer=convmixer_768_32 convnext=convnext_zepto_rms cpubone=cpubone_nano
crossvit=crossvit_tiny_240 csatv2=csatv2 cspnet=cs3darknet_focus_s cspnext=cspnext_tiny davit=davit_tiny
deepseek_vit=deepseek_vit_412m deit=deit_tiny_patch16_224 densenet=densenet121 dla=dla34 dpn=dpn68
edgenext=edgenext_x_small efficientformer=efficientformer_l1 efficientformer_v2=efficientformerv2_s0
efficientnet=mobilenetv2_035 efficientvim=efficientvim_m1 efficientvit_mit=efficientvit_b0
efficientvit_msra=efficientvit_m0 eva=eva02_tiny_patch14_224 fasternet=fasternet_t0 fastvit=fastvit_t8
focalnet=focalnet_tiny_srf gcvit=gcvit_xxtiny gemma4_vit=gemma4_vit_167m ghostnet=ghostnet_050
hardcorenas=hardcorenas_b hgnet=hgnetv2_b0 hiera=hiera_tiny_224 hieradet_sam2=hieradet_small
hrnet=hrnet_w18_small iformer=iformer_t inception_next=inception_next_atto
inception_resnet_v2=inception_resnet_v2 inception_v3=inception_v3 inception_v4=inception_v4
lcnetv2=lcnetv2_small levit=levit_128s lowformer=lowformer_b0 mambaout=mambaout_femto maxxvit=maxvit_pico_rw_256
metaformer=caformer_s18 mlp_mixer=gmlp_ti16_224 mobilenetv3=lcnet_035 mobilenetv5=mobilenetv5_base
mobilevit=mobilevit_xxs mvitv2=mvitv2_tiny naflexvit=naflexvit_base_patch16_siglip nasnet=nasnetalarge
nest=nest_tiny nextvit=nextvit_small nfnet=nf_regnet_b0 pit=pit_ti_224 pnasnet=pnasnet5large pvt_v2=pvt_v2_b0
qwen3_vit=qwen3_vit_88m rdnet=rdnet_tiny regnet=regnetx_002 repghost=repghostnet_050 repvit=repvit_m1
res2net=res2net50_26w_4s resnest=resnest26d resnet=resnet10t resnetv2=resnetv2_18 rexnet=rexnet_100
selecsls=selecsls42 senet=legacy_seresnet18 sequencer=sequencer2d_s shvit=shvit_s1 sknet=skresnet18
starnet=starnet_s050 swiftformer=swiftformer_xs swin_transformer=swin_tiny_patch4_window7_224
swin_transformer_v2=swinv2_tiny_window8_256 swin_transformer_v2_cr=swinv2_cr_tiny_224 tiny_vit=tiny_vit_5m_224
tnt=tnt_s_legacy_patch16_224 tresnet=tresnet_m twins=twins_svt_small vgg=vgg11 visformer=visformer_tiny
vision_transformer=vit_tiny_patch16_224 vision_transformer_hybrid=vit_tiny_r_s16_p8_224
vision_transformer_relpos=vit_srelpos_small_patch16_224 vision_transformer_sam=samvit_base_patch16
vitamin=vitamin_small_224 volo=volo_d1_224 vovnet=ese_vovnet19b_slim_dw xception=legacy_xception
xception_aligned=xception41 xcit=xcit_nano_12_p8_224
""".split())
# Where the default size is for documents or dense prediction, or 128 is too small. Other models that take any size run
# at ANY_SIZE.
SIZES = dict(
    eca_halonext26ts=256,
    samvit_base_patch16=256, qwen3_vit_88m=224, gemma4_vit_167m=224, deepseek_vit_412m=224,
    naflexvit_base_patch16_siglip=224,
)
ANY_SIZE = 128


def step(name: str, mix: str) -> dict[str, Any]:
    """One step in feature mode: {'result': 'exact' | 'per-position head' | 'refused' | 'failed', ...}."""
    kwargs = timm_alignmix.dense_model_kwargs(name) if mix == 'densemultimix' else {}
    row = dict(model_kwargs=kwargs) if kwargs else {}
    cfg = timm.get_pretrained_cfg(name)
    size = SIZES.get(name) or (cfg.input_size[-1] if cfg.fixed_input_size else ANY_SIZE)
    sized = dict(img_size=size) if cfg.fixed_input_size and size != cfg.input_size[-1] else {}
    model = timm.create_model(name, num_classes=CLASSES, **kwargs, **sized)
    try:
        task = MixTask(model, mix, FEATURE_MODES[mix], img_size=size, verbose=False)
    except UnsupportedModel as e:
        return dict(row, result='refused', why=str(e).removeprefix(f'{name}: '))
    if mix == 'manifold':
        # Without the input: each step is at a layer.
        task.mix.probs = {layer: 1 / len(task.mix.layers) for layer in task.mix.layers}
    model.train()
    images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
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
        'One small model of every timm model module, one forward and backward step of every method in its feature '
        'mode. mixup, cutmix and none need no knowledge of the model and run on all of them.',
        '',
        f'`python tools/families.py`, {info}.',
        '',
        '| method | modules it works on |',
        '|---|---|',
        *(f'| {mix} | {n} of {len(rows)} |' for mix, n in worked.items()),
        '',
        "- **exact**: the split reproduces the model's own forward; for densemultimix the mean of dense logits is the "
        'logits.',
        '- **per-position**: the head has a norm or layers after pooling and is applied to each position, so the mean '
        'of dense logits is not the logits.',
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
    # Networks that only this package has are registered in timm too; a module that is new in timm has no model here
    # yet.
    modules = args.modules or [m for m in timm.list_modules() if hasattr(timm.models, m)]
    rows = []
    for module in tqdm(modules, unit='module'):
        name = MODELS.get(module) or timm.list_models(module=module)[0]
        row = dict(module=module, model=name)
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


if __name__ == '__main__':
    main()
