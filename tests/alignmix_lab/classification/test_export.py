"""The export that a training run ends with."""
import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from alignmix_lab.classification import TrainConfig, build, train
from alignmix_lab.classification.build import model_arguments
from alignmix_lab.runs.models import create_model
from timm_alignmix import weights


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'photos'
    random = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label in ('cat', 'dog', 'owl'):
            (folder / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f'{i}.png')
    return folder


def config(photos, output, **options) -> TrainConfig:
    return TrainConfig(
        data_dir=str(photos), loader='timm', workers=0, model='test_resnet', img_size=32, epochs=1, warmup_epochs=0,
        batch_size=4, lr=0.01, device='cpu', output=str(output), experiment='run', **options)


def test_a_run_leaves_its_last_weights(photos, tmp_path):
    options = dict(mix='multimix', mix_kwargs={'n': 8}, model_ema=True, model_ema_decay=0.5, export='raw')
    result = train(config(photos, tmp_path, **options))
    folder = result['folder'] / 'export'
    saved = torch.load(result['folder'] / 'last.pth.tar', weights_only=True)
    got = load_file(folder / 'model.safetensors')
    assert all(torch.equal(got[key], value) for key, value in saved['state_dict'].items())
    config_json = weights.read_config(folder)
    assert config_json['label_names'] == ['cat', 'dog', 'owl']
    facts = config_json['training']
    assert facts['accuracy']['last'] == pytest.approx(result['last'])
    assert facts['mix_options']['n'] == 8 and facts['global_batch_size'] == 4 and facts['loader'] == 'timm'
    assert facts['weights'] == 'raw' and facts['accuracy']['measured_on'] == 'ema'
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).pretrained_cfg['tag'] == 'multimix_photos'


@pytest.mark.parametrize('size', [dict(img_size=32), dict(img_size=None, input_size=[3, 32, 64])])
def test_a_vit_is_built_for_the_images_of_the_run(photos, tmp_path, size):
    options = {**config(photos, tmp_path).to_dict(), 'model': 'vit_tiny_patch16_224', **size}
    sides = tuple(options['input_size'][1:]) if options['input_size'] else (32, 32)
    model = timm.create_model(f'local-dir:{train(TrainConfig(**options))["folder"] / "export"}', pretrained=True)
    assert tuple(model.patch_embed.img_size) == sides and tuple(model.pretrained_cfg['input_size']) == (3, *sides)


@pytest.mark.parametrize('model, options, expected', [
    ('test_resnet', {}, None),
    ('swin_tiny_patch4_window7_224', {}, 96),
    ('vit_tiny_patch16_224', {'dynamic_img_size': True}, None),
    ('vit_tiny_patch16_224', {'img_size': 64}, 64),
])
def test_only_networks_of_another_fixed_size_are_told_the_size(photos, tmp_path, model, options, expected):
    arguments = model_arguments(TrainConfig(model=model, img_size=96, model_kwargs=options))
    assert arguments.get('img_size') == expected


@pytest.mark.parametrize('model, size, builds', [
    ('test_resnet', 96, 1), ('test_vit', None, 1), ('vit_tiny_patch16_224', 96, 2), ('levit_128s', 300, 2)])
def test_a_run_builds_and_tries_each_form_of_the_network_once(monkeypatch, model, size, builds):
    built, tried = [], []

    def create(*args, **kwargs):
        built.append(create_model(*args, **kwargs))
        built[-1].register_forward_pre_hook(lambda *_: tried.append(1))
        return built[-1]

    monkeypatch.setattr(build, 'create_model', create)
    config = TrainConfig(model=model, img_size=size)
    if model == 'levit_128s':  # img_size is no remedy
        with pytest.raises(ValueError, match='pass --img-size 224'):
            build.resolve_model(config)
    else:
        arguments, data_config = build.resolve_model(config)
        assert arguments.get('img_size') == (size if builds == 2 else None)
        assert data_config['input_size'][-1] == (size or 160)
    assert len(built) == builds and len(tried) <= builds


def test_no_export(photos, tmp_path):
    assert not (train(config(photos, tmp_path, export='none'))['folder'] / 'export').exists()


def test_a_failing_export_does_not_lose_the_run(photos, tmp_path, caplog):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'export').write_text('in the way')
    with caplog.at_level(logging.ERROR):
        result = train(config(photos, tmp_path))
    assert result['last']['epoch'] == 0 and 'was not exported' in caplog.text


def test_average_that_is_not_kept():
    with pytest.raises(ValueError, match='--export ema needs --model-ema'):
        TrainConfig(export='ema')
