"""Tags of a local registry in timm, and what of timm they rely on."""
import json
import os
import pwd
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg, model_entrypoint

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
warnings.simplefilter('ignore', ResourceWarning)  # torch 2.5 gives one
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

cfg = timm.get_pretrained_cfg('test_vit.densemultimix_photos')
assert type(cfg) is timm.models.PretrainedCfg and cfg.has_weights and cfg.label_names[3] == 'class 3', cfg
assert (cfg.architecture, cfg.tag, cfg.num_classes) == ('test_vit', 'densemultimix_photos', 7), cfg
assert (list(cfg.input_size), cfg.crop_pct, list(cfg.mean)) == ([3, 64, 64], 0.9, [0.4, 0.5, 0.6]), cfg
assert after['test_vit.densemultimix_photos'] == cfg and timm.is_model_pretrained('test_vit.densemultimix_photos')

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


def test_every_network_of_timm_takes_a_tag_and_keeps_its_own(run_python):
    """What is relied on in timm: `default_cfgs` of each module, registering again, and deep copies of the entries."""
    run_python("""
from pathlib import Path
import timm, timm_alignmix
from timm.models import get_arch_pretrained_cfgs
from timm_alignmix.weights import registry

def tables():
    names = timm.list_models()
    return dict(
        names=names, modules={m: timm.list_models(module=m) for m in timm.list_modules()},
        default={name: timm.get_pretrained_cfg(name) for name in names},
        deprecated=timm.models.get_deprecated_models(), cfgs={name: get_arch_pretrained_cfgs(name) for name in names},
        tags=set(timm.list_models(include_tags=True)), pretrained=set(timm.list_pretrained()))

before = tables()
for name in before['names']:
    registry._register(f'{name}.ours', Path('/no/folder'))
registry._LocalCfg.__deepcopy__ = lambda self, memo: 'ours'
after = tables()
for name in before['names']:
    assert after['cfgs'][name].pop(f'{name}.ours') == 'ours'
    assert list(after['cfgs'][name]) == list(before['cfgs'][name])
ours = {f'{name}.ours' for name in before['names']}
assert after.pop('tags') == before.pop('tags') | ours and after.pop('pretrained') == before.pop('pretrained') | ours
assert after == before
""", plugin=True)


@pytest.fixture
def hostile(registry, tmp_path):
    """A registry with whatever may lie in a folder."""
    folder = tmp_path / 'hostile'
    shutil.copytree(registry, folder)
    (folder / 'test_resnet.empty').mkdir()
    (folder / 'test_resnet.file').write_text('no folder')
    (folder / 'test_resnet.broken_link').symlink_to(folder / 'nowhere')
    (folder / 'test_resnet.loop').symlink_to(folder / 'test_resnet.loop')
    for name in ('.hidden', 'no_tag', 'test_resnet.', 'test_resnet..x', 'test_resnet.a b', 'test_resnet.\n',
                 'test_resnet.t\u00e4g', 'unknown_network.tag', 'con:.tag', 'test_resnet.[x]', '-.-'):
        (folder / name).mkdir(exist_ok=True)
    os.mkdir(os.fsencode(folder) + b'/test_resnet.\xff')
    garbage = folder / 'test_resnet.garbage'
    garbage.mkdir()
    (garbage / 'config.json').write_bytes(b'\xff\x00{')
    closed = folder / 'test_resnet.closed'
    shutil.copytree(registry / 'test_resnet.none_photos', closed)
    closed.chmod(0)
    yield folder
    closed.chmod(0o755)


def test_import_lists_one_folder_and_opens_no_file(hostile, run_python):
    output = run_python(f"""
import sys, timm
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args[0]))) if event in ('open', 'os.listdir', 'os.scandir')
                 else None)
import timm_alignmix
there = [(event, path) for event, path in seen if path.startswith({str(hostile)!r})]
assert there == [('os.listdir', {str(hostile)!r})], there
assert len(seen) > 10  # modules of the package: the hook works
names = [name for name in timm.list_pretrained() if name not in {timm.list_pretrained()!r}]
print(names)
for name in timm.list_pretrained():
    name.encode('ascii')
""", plugin=True, TIMM_ALIGNMIX_WEIGHTS=str(hostile))
    assert output.strip() == str([
        'preactresnet18.alignmix_photos', 'test_resnet.closed', 'test_resnet.empty', 'test_resnet.garbage',
        'test_resnet.none_photos', 'test_vit.densemultimix_photos'])


@pytest.mark.parametrize(('environment', 'code'), [
    ({'TIMM_ALIGNMIX_NO_LOCAL_WEIGHTS': '1'}, ''),
    ({'TIMM_ALIGNMIX_WEIGHTS': ''}, """
import os
from pathlib import Path
def expanduser(self):
    raise RuntimeError('Could not determine home directory.')
Path.expanduser = expanduser
os.environ.pop('XDG_DATA_HOME', None)
"""),
], ids=['switched off', 'no home'])
def test_import_without_local_weights(registry, run_python, environment, code):
    output = run_python(f"""
import sys, timm
before, seen = timm.list_pretrained(), []
sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event in ('os.listdir', 'os.scandir') else None)
{code}
import timm_alignmix
assert set(timm.list_pretrained()) == {{*before, 'vgg16_gap.tv_in1k'}}
assert not [path for path in seen if 'photos' in path or path == {str(registry)!r}], seen
assert timm_alignmix.weights.register_local({str(registry)!r})  # by hand it still works
""", plugin=True, **{'TIMM_ALIGNMIX_WEIGHTS': str(registry), **environment})
    assert not output


def test_a_registry_that_cannot_be_listed_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / 'file').write_text('in its place')
    assert weights.register_local(tmp_path / 'file') == []
    assert f'Installed weights are not available: [Errno 20] Not a directory: \'{tmp_path / "file"}' in caplog.text

    def closed(path):
        raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(os, 'listdir', closed)
    assert weights.register_local(tmp_path) == [] and 'Permission denied' in caplog.text


@pytest.mark.parametrize(('tag', 'message'), [
    ('empty', r'test_resnet\.empty is not a folder of exported weights'),
    ('garbage', r'test_resnet\.garbage is not a folder of exported weights'),
    ('gone', r'test_resnet\.gone is not a folder of exported weights'),
    ('vit', r'test_resnet\.vit has weights of test_vit, not of test_resnet as its name says'),
    ('future', r"does not fit this version of timm \(.*'new_key'"),
])
def test_broken_files_are_named_when_their_tag_is_asked_for(registry, hostile, own_tables, tag, message):
    name = f'test_resnet.{tag}'
    if tag == 'gone':
        (hostile / name).mkdir()
    elif tag == 'vit':
        shutil.copytree(registry / 'test_vit.densemultimix_photos', hostile / name)
    elif tag == 'future':
        shutil.copytree(registry / 'test_resnet.none_photos', hostile / name)
        config = json.loads((hostile / name / 'config.json').read_text())
        config['pretrained_cfg']['new_key'] = 1
        (hostile / name / 'config.json').write_text(json.dumps(config))
    assert name in weights.register_local(hostile)
    if tag == 'gone':
        (hostile / name).rmdir()
    for ask in (timm.get_pretrained_cfg, timm.create_model, lambda name: timm.create_model(name, pretrained=True)):
        with pytest.raises(ValueError, match=message):
            ask(name)
    assert timm.create_model('test_resnet.none_photos', pretrained=True).num_classes == 7  # the others still load


def test_partial_weights_are_refused_where_timm_would_not_ask(registry, own_tables, caplog, tmp_path):
    shutil.copytree(registry / 'test_resnet.none_photos', tmp_path / 'test_resnet.none_photos')
    path = tmp_path / 'test_resnet.none_photos' / 'model.safetensors'
    state = load_file(path)
    del state['layer2.0.bn2.weight']
    save_file(state, path)
    assert weights.register_local(tmp_path) == ['test_resnet.none_photos'] and not caplog.text
    with pytest.raises(ValueError, match='missing keys: layer2.0.bn2.weight$'):
        timm.create_model('test_resnet.none_photos', pretrained=True, features_only=True)


def test_weights_of_timms_own_are_kept(registry, own_tables, caplog, tmp_path):
    name = 'test_resnet.r160_in1k'
    shutil.copytree(registry / 'test_resnet.none_photos', tmp_path / name)
    before = timm.list_pretrained(), get_pretrained_cfg(name)
    assert weights.register_local(tmp_path) == []
    assert f'{tmp_path / name} is not available as {name}: timm has weights of its own named {name}' in caplog.text
    assert (timm.list_pretrained(), get_pretrained_cfg(name)) == before


def test_install(cnn, own_tables, tmp_path):
    assert weights.install(cnn.folder, 'mine', tmp_path) == 'test_resnet.mine'
    folder = tmp_path / 'test_resnet.mine'
    assert weights.list_local(tmp_path) == {'test_resnet.mine': folder}
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    assert '# test_resnet.mine\n' in (folder / 'README.md').read_text()
    assert weights.verify(folder)['pretrained_cfg']['tag'] == 'mine'
    model = timm.create_model('test_resnet.mine', pretrained=True).eval()  # known without another import
    with torch.no_grad():
        assert torch.equal(model(cnn.images), cnn.model(cnn.images))
    weights.install(cnn.folder, 'mine', tmp_path / 'elsewhere')  # again, from another registry
    assert get_pretrained_cfg('test_resnet.mine').file == str(tmp_path / 'elsewhere' / 'test_resnet.mine')


@pytest.mark.parametrize(('tag', 'message'), [
    ('r160_in1k', 'timm has weights of its own named test_resnet.r160_in1k'),
    ('../elsewhere', 'is not a tag'),
    ('two words', 'is not a tag'),
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


def test_registry_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('TIMM_ALIGNMIX_WEIGHTS', str(tmp_path / 'there'))
    assert weights.registry_dir() == tmp_path / 'there'
    assert weights.register_local() == [] and weights.list_local() == {}
    monkeypatch.delenv('TIMM_ALIGNMIX_WEIGHTS')
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path))
    assert weights.registry_dir() == tmp_path / 'timm_alignmix' / 'weights'
    monkeypatch.delenv('XDG_DATA_HOME')
    assert weights.registry_dir() == Path.home() / '.local' / 'share' / 'timm_alignmix' / 'weights'
    monkeypatch.delenv('HOME')
    monkeypatch.setattr(pwd, 'getpwuid', {}.__getitem__)  # a container whose user has no entry
    with pytest.raises(RuntimeError, match='no home directory .*; set TIMM_ALIGNMIX_WEIGHTS to a folder'):
        weights.registry_dir()
    assert weights.register_local() == []


def test_timm_is_as_it_was_after_the_import():
    """No tag was registered in this process, so none of timm's entry points is another function."""
    assert model_entrypoint('test_resnet') is timm.models.test_resnet
