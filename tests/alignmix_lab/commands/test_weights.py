"""`alignmix weights` and `alignmix verify` on an exported folder."""
import os

import pytest
import timm
import torch

from alignmix_lab.commands import verify
from alignmix_lab.commands.weights import main
from timm_alignmix import weights


@pytest.fixture
def exported(tmp_path):
    """Folder of a small model, and the model."""
    model = timm.create_model('test_resnet', num_classes=7).eval()
    return weights.export(model, tmp_path / 'export', dataset='Flower Photos', training={'mix': 'none'}), model


def test_install_and_list(exported, own_tables, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv('TIMM_ALIGNMIX_WEIGHTS', raising=False)
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path))
    main(['install', str(exported[0]), '--tag', 'mine'])
    folder = tmp_path / 'timm_alignmix' / 'weights' / 'test_resnet.mine'
    (folder.parent / 'test_resnet.empty').mkdir()
    main(['list'])
    output = capsys.readouterr().out
    assert "timm.create_model('test_resnet.mine', pretrained=True)" in output
    assert 'test_resnet.mine: test_resnet trained without mixing on Flower Photos.' in output
    assert 'test_resnet.empty: error: ' in output and 'is not a folder of exported weights' in output
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    assert '# test_resnet.mine\n' in (folder / 'README.md').read_text()
    model = timm.create_model('test_resnet.mine', pretrained=True).eval()  # known without another import
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(model(images), exported[1](images))


def test_list_of_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('TIMM_ALIGNMIX_WEIGHTS', str(tmp_path / 'there'))
    main(['list'])
    assert f'nothing is installed in {tmp_path / "there"}' in capsys.readouterr().out


def test_push_passes_its_options_on(monkeypatch, capsys):
    monkeypatch.setattr('alignmix_lab.commands.weights.push', lambda *args, **kw: f'{args} {sorted(kw.items())}')
    main(['push', 'folder', 'me/resnet', '--private', '--message', 'First'])
    output = capsys.readouterr().out
    assert "('folder', 'me/resnet')" in output and "('message', 'First'), ('private', True)" in output


def test_errors_are_one_line(own_tables, tmp_path):
    with pytest.raises(SystemExit, match='error: .* is not a folder of exported weights'):
        main(['install', str(tmp_path)])


def test_verify_says_what_is_wrong(exported, caplog):
    caplog.set_level('INFO')
    with pytest.raises(SystemExit) as e:
        verify.main([str(exported[0])])
    assert e.value.code == 0 and 'every weight of test_resnet is there' in caplog.text
    (exported[0] / 'model.safetensors').unlink()
    with pytest.raises(SystemExit) as e:
        verify.main([str(exported[0])])
    assert e.value.code == 1 and 'has no model.safetensors' in caplog.text
