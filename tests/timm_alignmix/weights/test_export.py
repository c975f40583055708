"""An exported folder against the model that was trained, in a process that has timm only."""
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_alignmix import MixTask, weights
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
    resized = timm.create_model('test_vit', num_classes=7, **vit.model_kwargs)
    resized.load_state_dict(vit.model.state_dict())
    resized.set_input_size((96, 96))  # timm's resizing of a live model, not of a file
    torch.testing.assert_close(fresh['vit']['larger'], resized.eval()(fresh['vit']['large']))


def test_configuration_carries_what_was_passed(cnn):
    config = weights.read_config(cnn.folder)
    assert config['num_classes'] == 7 and config['label_names'][3] == 'class 3'
    assert config['pretrained_cfg']['license'] == 'cc0-1.0'
    assert config['pretrained_cfg']['tag'] == 'none_flower_photos'
    assert config['training']['dataset'] == 'Flower Photos' and config['training']['recipe'] == {'lr': 0.1}


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


def test_card_says_when_our_package_is_needed(cnn, own_network, fresh):
    assert 'timm alone loads this folder' in (cnn.folder / 'README.md').read_text()
    assert '`import timm_alignmix`' in (own_network.folder / 'README.md').read_text()
    with torch.no_grad():
        loaded = timm.create_model(f'local-dir:{own_network.folder}', pretrained=True).eval()(own_network.images)
        assert torch.equal(loaded, own_network.model(own_network.images))


@pytest.mark.parametrize(('facts', 'tag'), [
    ({'mix': 'densemultimix', 'dataset': 'in1k'}, 'densemultimix_in1k'),
    ({'mix': 'none', 'dataset': 'CIFAR-10 (JPEG copy)'}, 'none_cifar_10_jpeg_copy'),
    ({'mix': 'none'}, None),
])
def test_tag(facts, tag):
    assert make_tag(facts) == tag


def test_hooks_of_a_training_task_do_not_matter(tmp_path):
    model = timm.create_model('test_resnet', num_classes=5)
    plain = weights.export(model, tmp_path / 'plain', training=dict(mix='alignmix'))
    task = MixTask(model, 'alignmix', verbose=False)
    hooked = weights.export(model, tmp_path / 'hooked', training=dict(mix='alignmix'))
    for name in ('model.safetensors', 'config.json'):
        assert (hooked / name).read_bytes() == (plain / name).read_bytes()
    assert any(module._forward_hooks for module in task.modules())  # it trains on
