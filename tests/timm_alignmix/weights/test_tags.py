"""Tags of a local registry in timm, and what of timm they rely on."""
import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model_pretrained, model_entrypoint

from alignmix_lab.commands.weights import main
from timm_alignmix import weights


@pytest.fixture(scope='module')
def registry(cnn, vit, own_network, tmp_path_factory):
    """A registry as `install` leaves it, made by hand: this process's timm must stay as it is."""
    folder = tmp_path_factory.mktemp('registry')
    for name, trained in (('test_resnet.none_photos', cnn), ('test_vit.densemultimix_photos', vit),
                          ('preactresnet18.alignmix_photos', own_network)):
        shutil.copytree(trained.folder, folder / name)
    return folder


def test_tags_in_a_fresh_process(registry, cnn, vit, own_network, run_python, tmp_path):
    save_file({'cnn': cnn.images, 'vit': vit.images, 'own': own_network.images}, tmp_path / 'in')
    output = run_python(f"""
import warnings
import timm
from timm.models import get_arch_pretrained_cfgs, model_entrypoint
from safetensors.torch import load_file, save_file
everything = lambda: {{m: timm.list_models(module=m) for m in timm.list_modules()}}
pretrained, modules, cfgs = set(timm.list_pretrained()), everything(), get_arch_pretrained_cfgs('test_vit')
default = timm.create_model('test_vit').state_dict().keys()
deit = get_arch_pretrained_cfgs('deit_tiny_patch16_224')

warnings.simplefilter('error')
import timm_alignmix
new = {{'test_resnet.none_photos', 'test_vit.densemultimix_photos', 'preactresnet18.alignmix_photos'}}
new.add('vgg16_gap.tv_in1k')  # a network of the package's own
assert set(timm.list_pretrained()) == pretrained | new, set(timm.list_pretrained()) ^ pretrained
assert {{m: names for m, names in everything().items() if m not in ('preact_resnet', 'vgg_gap')}} == modules
assert timm.list_pretrained('test_vit') == ['test_vit.densemultimix_photos', *cfgs]
after = get_arch_pretrained_cfgs('test_vit')
assert {{name: after[name] for name in cfgs}} == cfgs
assert get_arch_pretrained_cfgs('deit_tiny_patch16_224') == deit
assert timm.create_model('test_vit').state_dict().keys() == default  # without the tag, with class token
assert model_entrypoint('test_vit').__doc__ == timm.models.test_vit.__doc__

inputs, out = load_file({str(tmp_path / 'in')!r}), {{}}
names = dict(cnn='test_resnet.none_photos', vit='test_vit.densemultimix_photos', own='preactresnet18.alignmix_photos')
with torch.no_grad():
    for key, name in names.items():
        out[key] = timm.create_model(name, pretrained=True).eval()(inputs[key])
        maps = timm.create_model(name, pretrained=True, features_only=True).eval()
        out[key + '_map'] = maps(inputs[key])[-1].contiguous()
        assert timm.create_model(name, pretrained=True, num_classes=3)(inputs[key]).shape == (2, 3)
    larger = timm.create_model(names['vit'], pretrained=True, img_size=96)
    assert larger.cls_token is None and larger(torch.zeros(1, 3, 96, 96)).shape == (1, 7)
    # timm's own scripts resolve the tag to a configuration first
    args = timm.models.resolve_model_input_args(names['vit'], {{}})
    out['resolved'] = timm.create_model(**args, pretrained=True).eval()(inputs['vit'])
    assert timm.create_model(names['vit']).cls_token is None  # random weights, same network
save_file(out, {str(tmp_path / 'out')!r})

# fine-tuned from a tag, exported again: the arguments are still there
model = timm.create_model(names['vit'], pretrained=True, num_classes=3)
folder = timm_alignmix.weights.export(model, {str(tmp_path / 'again')!r})
assert timm.create_model(f'local-dir:{{folder}}', pretrained=True).cls_token is None
""", plugin=True, TIMM_ALIGNMIX_WEIGHTS=str(registry))
    assert 'arn' not in output, output
    got = load_file(tmp_path / 'out')
    with torch.no_grad():
        assert torch.equal(got['cnn'], cnn.model(cnn.images))
        assert torch.equal(got['vit'], vit.model(vit.images))
        assert torch.equal(got['resolved'], got['vit'])
        assert torch.equal(got['own'], own_network.model(own_network.images))
        assert torch.equal(got['cnn_map'], cnn.model.forward_features(cnn.images))


def test_partial_weights_are_refused_where_timm_would_not_ask(registry, own_tables, caplog, tmp_path):
    shutil.copytree(registry / 'test_resnet.none_photos', tmp_path / 'test_resnet.none_photos')
    path = tmp_path / 'test_resnet.none_photos' / 'model.safetensors'
    state = load_file(path)
    del state['layer2.0.bn2.weight']
    save_file(state, path)
    assert weights.register_local(tmp_path) == ['test_resnet.none_photos'] and not caplog.text
    with pytest.raises(ValueError, match='missing keys: layer2.0.bn2.weight$'):
        timm.create_model('test_resnet.none_photos', pretrained=True, features_only=True)


@pytest.mark.parametrize(('name', 'message'), [
    ('test_resnet.r160_in1k', 'timm has weights of its own named test_resnet.r160_in1k'),
    ('test_vit.photos', 'its network test_resnet is not known to timm as test_vit'),
])
def test_wrong_folders_are_left_out_with_a_warning(registry, own_tables, caplog, tmp_path, name, message):
    shutil.copytree(registry / 'test_resnet.none_photos', tmp_path / name)
    (tmp_path / 'test_resnet.broken').mkdir()
    (tmp_path / 'test_resnet.broken' / 'config.json').write_text('{}')
    before = timm.list_pretrained(), get_pretrained_cfg('test_resnet.r160_in1k')
    assert weights.register_local(tmp_path) == []
    assert f'{tmp_path / name} is not available as {name}: {message}' in caplog.text
    assert 'not available as test_resnet.broken' in caplog.text
    assert (timm.list_pretrained(), get_pretrained_cfg('test_resnet.r160_in1k')) == before


def test_what_is_relied_on_in_timm():
    """The tables that tags are entered in hold, for a tag of timm's own, what we enter for ours."""
    from timm.models import _registry as tables
    name = 'test_resnet.r160_in1k'
    cfg = tables._model_pretrained_cfgs[name]
    assert isinstance(cfg, PretrainedCfg)
    assert (cfg.architecture, cfg.tag) == ('test_resnet', 'r160_in1k')
    assert isinstance(tables._model_with_tags['test_resnet'], list) and name in tables._model_with_tags['test_resnet']
    assert isinstance(tables._model_has_pretrained, set) and name in tables._model_has_pretrained
    assert tables._model_entrypoints['test_resnet'] is model_entrypoint('test_resnet')
    assert is_model_pretrained(name)


def test_install_and_list_by_command(cnn, own_tables, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv('TIMM_ALIGNMIX_WEIGHTS', raising=False)
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path))
    main(['install', str(cnn.folder), '--tag', 'mine'])
    main(['list'])
    output = capsys.readouterr().out
    assert "timm.create_model('test_resnet.mine', pretrained=True)" in output
    assert 'test_resnet.mine: test_resnet trained without mixing on Flower Photos.' in output
    folder = tmp_path / 'timm_alignmix' / 'weights' / 'test_resnet.mine'
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    assert '# test_resnet.mine\n' in (folder / 'README.md').read_text()
    assert weights.verify(folder)['pretrained_cfg']['tag'] == 'mine'
    model = timm.create_model('test_resnet.mine', pretrained=True).eval()  # known without another import
    with torch.no_grad():
        assert torch.equal(model(cnn.images), cnn.model(cnn.images))


@pytest.mark.parametrize(('tag', 'message'), [
    ('r160_in1k', 'timm has weights of its own named test_resnet.r160_in1k'),
    ('../elsewhere', 'is no name'),
])
def test_tags_that_are_not_installed(cnn, tmp_path, tag, message):
    with pytest.raises(ValueError, match=message):
        weights.install(cnn.folder, tag, tmp_path)
    assert not os.listdir(tmp_path)


def test_weights_without_tag_need_one(cnn, tmp_path):
    folder = weights.export(cnn.model, tmp_path / 'untagged')
    assert 'tag' not in json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    with pytest.raises(ValueError, match='no tag of its own'):
        weights.install(folder, registry=tmp_path / 'registry')


def test_registry_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('TIMM_ALIGNMIX_WEIGHTS', str(tmp_path / 'there'))
    assert weights.registry_dir() == tmp_path / 'there'
    assert weights.register_local() == [] and weights.list_local() == {}
    main(['list'])
    assert f'nothing is installed in {tmp_path / "there"}' in capsys.readouterr().out
    monkeypatch.delenv('TIMM_ALIGNMIX_WEIGHTS')
    monkeypatch.delenv('XDG_DATA_HOME', raising=False)
    assert weights.registry_dir() == Path.home() / '.local' / 'share' / 'timm_alignmix' / 'weights'


def test_timm_is_as_it_was_after_the_import():
    """No tag was registered in this process, so none of timm's entry points is another function."""
    assert model_entrypoint('test_resnet') is timm.models.test_resnet
