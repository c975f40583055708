"""Wrong and partial files are refused, by name of what is wrong."""
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

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
    (None, 'is not a folder of exported weights'),
    ('{', 'is not a folder of exported weights'),
    ('{"model_type": "bert"}', 'needs architecture'),
    ('{"architecture": "test_resnet", "num_classes": 7, "pretrained_cfg": []}', 'needs architecture'),
    ('{"architecture": "test_resnet", "num_classes": 7, "pretrained_cfg": {}, "model_args": [1]}', 'model_args are'),
    ('{"architecture": "test_resnet", "num_classes": 7, "pretrained_cfg": {}, "model_args": {"depth": 9}}',
     'does not fit this version of timm'),
])
def test_no_configuration(copy, text, message):
    (copy / 'config.json').unlink() if text is None else (copy / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        weights.verify(copy)
