"""An exported folder against the model that was trained, in a process that has timm only."""
import json
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_alignmix import weights
from timm_alignmix.weights.export import make_tag

CODE = """
import sys, timm
from safetensors.torch import load_file, save_file
folder, name, out = {folder!r}, 'local-dir:' + {folder!r}, {{}}
inputs = load_file({inputs!r})
small, large = inputs['small'], inputs['large']
size = dict(img_size=large.shape[-1]) if {resize} else dict()
with torch.no_grad():
    model = timm.create_model(name, pretrained=True).eval()
    out['logits'] = model(small)
    out['larger'] = timm.create_model(name, pretrained=True, **size).eval()(large)
    out['last_map'] = timm.create_model(name, pretrained=True, features_only=True).eval()(small)[-1]
    other = timm.create_model(name, pretrained=True, num_classes=3).eval()
    assert other(small).shape == (2, 3), other(small).shape
    out['features'] = other.forward_features(small)
save_file({{key: value.contiguous() for key, value in out.items()}}, {outputs!r})
config = timm.data.resolve_model_data_config(model)
assert list(config['mean']) == [0.4, 0.5, 0.6] and config['crop_pct'] == 0.9, config
assert config['interpolation'] == 'bilinear' and config['crop_mode'] == 'squash', config
assert config['input_size'][-1] == small.shape[-1], config
"""

UNKNOWN = """
import timm
try:
    timm.create_model({name!r}, pretrained=True)
    raise SystemExit('timm loaded our network without our package')
except RuntimeError as e:
    assert 'Unknown model' in str(e), e
"""


@pytest.fixture(scope='module')
def fresh(cnn, vit, own_network, run_python, tmp_path_factory):
    """What timm alone makes of the folders."""
    outputs, code = {}, UNKNOWN.format(name=f'local-dir:{own_network.folder}')
    folder = tmp_path_factory.mktemp('fresh')
    for name, trained in (('cnn', cnn), ('vit', vit)):
        torch.manual_seed(5)
        save_file({'small': trained.images, 'large': torch.randn(2, 3, 96, 96)}, folder / f'{name}-in')
        outputs[name] = folder / f'{name}-out'
        code += CODE.format(folder=str(trained.folder), inputs=str(folder / f'{name}-in'), outputs=str(outputs[name]),
                            resize=name == 'vit')
    run_python(code)
    return {name: {**load_file(folder / f'{name}-in'), **load_file(path)} for name, path in outputs.items()}


@pytest.mark.parametrize('name', ['cnn', 'vit'])
@torch.no_grad()
def test_plain_timm_computes_the_same(name, fresh, request):
    trained, got = request.getfixturevalue(name), fresh[name]
    assert torch.equal(got['logits'], trained.model(trained.images))
    assert torch.equal(got['features'], trained.model.forward_features(trained.images))


@torch.no_grad()
def test_a_cnn_gives_its_feature_maps_and_takes_other_sizes(fresh, cnn):
    assert torch.equal(fresh['cnn']['last_map'], cnn.model.forward_features(cnn.images))
    assert torch.equal(fresh['cnn']['larger'], cnn.model(fresh['cnn']['large']))


@torch.no_grad()
def test_a_vit_gives_its_feature_maps_and_takes_other_sizes(fresh, vit):
    expected = vit.model.forward_intermediates(vit.images, indices=1, intermediates_only=True)[-1]
    assert torch.equal(fresh['vit']['last_map'], expected)
    resized = timm.create_model('test_vit', num_classes=7, **vit.args['model_kwargs'])
    resized.load_state_dict(vit.model.state_dict())
    resized.set_input_size((96, 96))  # timm's resizing of a live model, not of a file
    torch.testing.assert_close(fresh['vit']['larger'], resized.eval()(fresh['vit']['large']))


def test_arguments_of_a_vit_for_dense_mixing_are_kept(vit):
    """Given by the mix at training, not by the user."""
    args = {**vit.args, 'model_kwargs': {'img_size': 64}}
    folder = weights.export(vit.save(vit.folder.parent / 'dense.pth.tar', args=args), vit.folder.parent / 'dense')
    model_args = weights.read_config(folder)['model_args']
    assert model_args['class_token'] is False and model_args['fc_norm'] is False
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.cls_token is None and isinstance(model.fc_norm, torch.nn.Identity) and model.global_pool == 'avg'
    assert model.patch_embed.img_size == (64, 64)


def test_configuration_carries_the_runs_facts(cnn):
    config = weights.read_config(cnn.folder)
    assert config['num_classes'] == 7 and config['label_names'][3] == 'class 3'
    assert config['pretrained_cfg']['license'] == 'cc0-1.0'
    assert config['pretrained_cfg']['tag'] == 'none_flower_photos'
    facts = config['training']
    assert facts['mix'] == 'none' and facts['dataset'] == 'Flower Photos' and facts['weights'] == 'raw'
    assert facts['accuracy']['exported'] == 'last'
    assert facts['accuracy']['last'] == {'epoch': 2, 'loss': 1.5, 'top1': 61.25, 'top5': 91.0}
    assert facts['accuracy']['best']['top1'] == 63.75
    assert facts['recipe']['lr'] == 0.1 and facts['recipe']['epochs'] == 3


def test_options_of_the_mix_are_complete(vit):
    options = weights.read_config(vit.folder)['training']['mix_options']
    assert options['n'] == 1000 and options['attention'] == 'gap'  # defaults, written out


def test_no_path_of_the_machine_is_written(cnn):
    for file in ('config.json', 'README.md'):
        assert 'someone' not in (cnn.folder / file).read_text()


def test_nothing_of_the_source_weights_leaks(tmp_path):
    """resnet10t's own tag has another test size, crop, licence, address and paper."""
    model = timm.create_model('resnet10t', num_classes=4).to(memory_format=torch.channels_last)
    source = model.pretrained_cfg
    data_config = dict(input_size=(3, 32, 32), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0, interpolation='nearest')
    folder = weights.export(model, tmp_path / 'e', data_config=data_config, training={'mix': 'mixup'}, dataset='x')
    text = (folder / 'config.json').read_text() + (folder / 'README.md').read_text()
    for key in ('tag', 'license', 'test_input_size', 'test_crop_pct', 'hf_hub_id', 'crop_pct', 'interpolation'):
        assert source.get(key), key  # or the test shows nothing
        assert json.dumps(source[key]) not in text.replace('\n', ''), key
    cfg = timm.create_model(f'local-dir:{folder}').pretrained_cfg
    assert not {'url', 'hf_hub_id', 'origin_url', 'test_input_size', 'test_crop_pct'} & cfg.keys()
    assert cfg['license'] == 'unknown' and cfg['tag'] == 'mixup_x' and cfg['paper_ids'] == 'arXiv:1710.09412'


@torch.no_grad()
def test_weights_that_a_network_uses_twice(tmp_path):
    """safetensors refuses tensors that share memory, as CoaT's position encodings do."""
    model = timm.create_model('coat_tiny', num_classes=3, embed_dims=(16, 16, 16, 16), img_size=32).eval()
    assert model.cpe1.proj.weight is model.serial_blocks1[0].cpe.proj.weight
    loaded = timm.create_model(f'local-dir:{weights.export(model, tmp_path)}', pretrained=True).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert model.state_dict()['head.weight'].data_ptr() == model.head.weight.data_ptr()  # ours as it was


def test_average_or_raw_weights(cnn, tmp_path):
    average = {key: value * 2 for key, value in cnn.model.state_dict().items()}
    both = cnn.save(tmp_path / 'model_best.pth.tar', state_dict_ema=average, epoch=1)
    for ema, expected, name in ((None, average, 'ema'), (True, average, 'ema'), (False, cnn.model.state_dict(), 'raw')):
        folder = weights.export(both, tmp_path / name, ema)  # the second time over the first
        got = load_file(folder / 'model.safetensors')
        assert all(torch.equal(got[key], value) for key, value in expected.items())
        facts = weights.read_config(folder)['training']
        assert facts['weights'] == name and facts['accuracy']['measured_on'] == 'ema'
        assert facts['accuracy']['exported'] == 'best'
    assert 'Measured on the ema weights; these are the raw ones.' in (tmp_path / 'raw' / 'README.md').read_text()
    assert '63.75' in (tmp_path / 'ema' / 'README.md').read_text().split('---')[1]  # in the hub's metadata
    assert '63.75' not in (tmp_path / 'raw' / 'README.md').read_text().split('---')[1]
    with pytest.raises(ValueError, match='no moving average'):
        weights.export(cnn.checkpoint, tmp_path / 'none', ema=True)


def test_card_says_when_our_package_is_needed(cnn, own_network, fresh):
    assert 'timm alone loads this folder' in (cnn.folder / 'README.md').read_text()
    assert '`import timm_alignmix`' in (own_network.folder / 'README.md').read_text()
    with torch.no_grad():
        loaded = timm.create_model(f'local-dir:{own_network.folder}', pretrained=True).eval()(own_network.images)
        assert torch.equal(loaded, own_network.model(own_network.images))


def test_a_checkpoint_of_timms_script(cnn, tmp_path):
    """Arguments in a Namespace, no facts of ours, keys of a wrapped model."""
    args = {key: value for key, value in cnn.args.items() if key not in ('mix', 'mix_kwargs', 'loader')}
    path = tmp_path / 'checkpoint-2.pth.tar'
    state = {f'module.{key}': value for key, value in cnn.model.state_dict().items()}
    torch.save({'state_dict': state, 'optimizer': {}, 'epoch': 2, 'metric': 50.0, 'args': Namespace(**args)}, path)
    facts = weights.read_config(weights.export(path, tmp_path / 'e'))['training']
    assert facts['mix'] == 'none' and facts['accuracy']['epoch 2']['top1'] == 50.0
    with torch.no_grad():
        model = timm.create_model(f'local-dir:{tmp_path}/e', pretrained=True).eval()
        assert torch.equal(model(cnn.images), cnn.model(cnn.images))


@pytest.mark.parametrize(('facts', 'tag'), [
    ({'mix': 'densemultimix', 'dataset': 'in1k'}, 'densemultimix_in1k'),
    ({'mix': 'none', 'dataset': 'CIFAR-10 (JPEG copy)'}, 'none_cifar_10_jpeg_copy'),
    ({'mix': 'none'}, None),
])
def test_tag(facts, tag):
    assert make_tag(facts) == tag


def test_imagenet_is_known_by_its_classes(cnn, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=1000)
    names = [f'n{i:08}' for i in range(1000)]
    path = cnn.save(tmp_path / 'last.pth.tar', state_dict=model.state_dict(), data_config={'class_names': names})
    assert weights.read_config(weights.export(path, tmp_path / 'e'))['pretrained_cfg']['tag'] == 'none_in1k'
