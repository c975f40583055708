"""Wrong, partial and malicious files are refused, by name of what is wrong."""
import shutil
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from alignmix_lab.commands.weights import main
from timm_alignmix import weights


@pytest.fixture
def copy(cnn, tmp_path):
    return shutil.copytree(cnn.folder, tmp_path / 'copy')


def test_partial_weights(copy):
    """The case that timm itself lets pass: with another classifier it does not ask for every key."""
    state = load_file(copy / 'model.safetensors')
    del state['layer1.0.conv1.weight']
    save_file(state, copy / 'model.safetensors')
    timm.create_model(f'local-dir:{copy}', pretrained=True, num_classes=3)
    with pytest.raises(ValueError, match='test_resnet: missing keys: layer1.0.conv1.weight$'):
        weights.verify(copy)


def test_weights_of_another_network(copy, vit):
    shutil.copy(vit.folder / 'model.safetensors', copy / 'model.safetensors')
    with pytest.raises(ValueError, match='missing keys: conv1.0.weight.* more; unexpected keys: blocks.0'):
        weights.verify(copy)


def test_truncated_weights(copy):
    content = (copy / 'model.safetensors').read_bytes()
    (copy / 'model.safetensors').write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match='damaged or not in the safetensors format'):
        weights.verify(copy)


def test_pickled_weights(copy):
    torch.save(load_file(copy / 'model.safetensors'), copy / 'pytorch_model.bin')
    (copy / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match=r'no model\.safetensors; weights in other formats are not loaded'):
        weights.verify(copy)


@pytest.mark.parametrize(('text', 'message'), [
    (None, 'no folder of exported weights'),
    ('{', 'no folder of exported weights'),
    ('{"model_type": "bert"}', 'needs architecture'),
])
def test_no_configuration(copy, text, message):
    (copy / 'config.json').unlink() if text is None else (copy / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        weights.verify(copy)


class RunsWhenUnpickled:
    def __reduce__(self):
        return exec, ("import sys; sys.was_run = True",)


def test_a_checkpoint_never_runs_code(cnn, tmp_path):
    path = cnn.save(tmp_path / 'evil.pth.tar', extra=RunsWhenUnpickled())
    with pytest.raises(ValueError, match='damaged or no checkpoint'):
        weights.export(path, tmp_path / 'e')
    assert not hasattr(sys, 'was_run') and not (tmp_path / 'e').exists()


@pytest.mark.parametrize(('key', 'found'), [
    ('fc.weight', 'missing keys: fc.weight'),
    ('layer1.0.bn1.running_mean', 'missing keys: layer1.0.bn1.running_mean'),
])
def test_partial_checkpoint(cnn, tmp_path, key, found):
    state = dict(cnn.model.state_dict())
    del state[key]
    with pytest.raises(ValueError, match=found):
        weights.export(cnn.save(tmp_path / 'partial.pth.tar', state_dict=state), tmp_path / 'e')


def test_checkpoint_of_another_network(vit, cnn, tmp_path):
    path = cnn.save(tmp_path / 'other.pth.tar', args={**cnn.args, 'model': 'test_resnet', 'num_classes': 9})
    with pytest.raises(ValueError, match=r'fc.weight is \(7, 96\), not \(9, 96\)'):
        weights.export(path, tmp_path / 'e')


def test_checkpoint_without_arguments(cnn, tmp_path):
    state = {key: value for key, value in cnn.state().items() if key != 'args'}
    torch.save(state, tmp_path / 'bare.pth.tar')
    with pytest.raises(ValueError, match='does not hold the arguments'):
        weights.export(tmp_path / 'bare.pth.tar', tmp_path / 'e')


def test_export_by_command(cnn, tmp_path, capsys):
    words = ['--raw', '--dataset', 'in1k', '--license', 'mit']
    main(['export', str(cnn.checkpoint), str(tmp_path / 'e'), *words])
    assert f"timm.create_model('local-dir:{tmp_path / 'e'}', pretrained=True)" in capsys.readouterr().out
    cfg = weights.read_config(tmp_path / 'e')['pretrained_cfg']
    assert (cfg['tag'], cfg['license']) == ('none_in1k', 'mit')
    with pytest.raises(SystemExit, match='error: .* has no moving average'):
        main(['export', str(cnn.checkpoint), str(tmp_path / 'e'), '--ema'])


def test_command_says_what_is_wrong(copy, capsys):
    main(['verify', str(copy)])
    assert 'every weight of test_resnet is there' in capsys.readouterr().out
    (copy / 'model.safetensors').unlink()
    with pytest.raises(SystemExit, match=r'error: .* has no model\.safetensors'):
        main(['verify', str(copy)])
