"""Models that cannot be built, or whose weights cannot be loaded, end in one sentence and without a wait."""
import pytest
import timm
from huggingface_hub import constants

from alignmix_lab.evaluation.config import EvalConfig
from alignmix_lab.evaluation.models import open_models
from alignmix_lab.runs.models import create_model
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
