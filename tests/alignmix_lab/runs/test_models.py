"""Models that cannot be built or loaded, which end in one sentence and without a wait; their frozen parts."""
import copy

import pytest
import timm
import torch
from huggingface_hub import constants
from torch import nn

from alignmix_lab.evaluation.config import EvalConfig
from alignmix_lab.evaluation.models import open_models
from alignmix_lab.runs.models import create_model, freeze, trained_norms
from detection.pretrained import read_source


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A hub that refuses connections, an empty cache, and no patience for retries."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('time.sleep', lambda seconds: pytest.fail(f'waits {seconds} seconds'))


def test_weights_without_network(no_network):
    said = r'--model resnet18: timm cannot build it with its pretrained weights \(http.* does not answer\); '
    with pytest.raises(ValueError, match=f'^{said}pass --checkpoint FILE, or --no-pretrained'):
        open_models(EvalConfig(model=['resnet18']), 'cpu')
    assert constants.HF_HUB_OFFLINE is False
    with pytest.raises(ValueError, match=r'^backbone resnet18: .* \(http.* not answer\); pass the .* as --weights$'):
        read_source('resnet18', 'resnet18')
    with pytest.raises(ValueError, match=r'hf-hub:me/net: timm cannot build it \(http.* does not answer\)$'):
        create_model('hf-hub:me/net', 'hf-hub:me/net')


def test_weights_that_are_here_need_no_network(no_network, tmp_path, monkeypatch):
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path, safe_serialization=True)
    monkeypatch.setattr('alignmix_lab.runs.models._hub_answers', lambda: pytest.fail('asks the hub'))
    assert create_model(f'local-dir:{tmp_path}', 'it', pretrained=True).num_classes == 3
    create_model('resnet18', 'it')


@pytest.mark.parametrize('name, options, said', [
    ('resnet50_mlp', dict(pretrained=True), r'^it: .* weights \(No pretrained weights exist.*\); do that$'),
    ('test_resnet', dict(colour='red'), r"^it: timm cannot build it \(.*'colour'\)$"),
    ('resnet18.none', dict(pretrained=True), r'^it: .*none'),
])
def test_models_that_timm_cannot_build(name, options, said):
    with pytest.raises(ValueError, match=said):
        create_model(name, 'it', 'do that', **options)


@pytest.mark.parametrize('name, part, frozen', [
    ('resnet18', '0', ('conv1', 'bn1')),
    ('resnet18', '2', ('conv1', 'bn1', 'layer1', 'layer2')),
    ('resnet18', 'backbone', ('conv1', 'bn1', 'layer')),
    ('convnext_atto', '1', ('stem', 'stages.0')),
    ('vit_tiny_patch16_224', '2', ('cls_token', 'pos_embed', 'patch_embed', 'blocks.0.', 'blocks.1.')),
    ('levit_128s', 'backbone', ('stem', 'stages')),  # its classifier has a batch norm
    ('wrn16_8', '1', ('conv1', 'layer1')),
])
def test_frozen_layers_stay_as_they_are(name, part, frozen):
    model = timm.create_model(name, num_classes=3)
    freeze(model, part, name)
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == {
        key for key, _ in model.named_parameters() if key.startswith(frozen)}
    for network in (model, copy.deepcopy(model)):
        network.eval().train()
        before = {key: value.clone() for key, value in network.named_buffers()}
        network(torch.randn(2, *network.pretrained_cfg['input_size'])).square().sum().backward()
        for key, buffer in network.named_buffers():
            if key.endswith(('running_mean', 'running_var', 'num_batches_tracked')):
                assert torch.equal(buffer, before[key]) == key.startswith(frozen), key
        assert all((p.grad is None) == key.startswith(frozen) for key, p in network.named_parameters())
        kept = {id(norm) for norm in trained_norms(network)}
        assert kept == {
            id(norm) for key, norm in network.named_modules()
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not key.startswith(frozen)}


def test_more_stages_than_there_are():
    with pytest.raises(ValueError, match='--freeze 5: resnet18 has 4 stages or blocks; --freeze backbone leaves only'):
        freeze(timm.create_model('resnet18'), '5', 'resnet18')
