"""The loop against the same training written out with plain timm and torch."""
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from alignmix_lab.classification import TrainConfig
from alignmix_lab.data import create_loaders
from alignmix_lab.runs.optim import fused_update

VIT = dict(model='test_vit', model_kwargs={'img_size': 64})


@pytest.fixture(scope='session')
def vit_weights(tmp_path_factory):
    """File of the weights that both trainings start from."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp('vit') / 'start.pth'
    torch.save(timm.create_model('test_vit', num_classes=10, img_size=64).state_dict(), path)
    return path


@pytest.fixture(scope='session')
def train_by_hand(vit_weights):
    """Callable: two epochs of SGD over groups of batches; the weights, mean losses and clipped updates."""
    def train(config: TrainConfig, batches_per_update: int):
        model = timm.create_model('test_vit', num_classes=10, img_size=64)
        model.load_state_dict(torch.load(vit_weights, weights_only=True))
        loader = create_loaders(
            config.data_dir, loader='timm', input_size=(3, 64, 64), batch_size=config.batch_size, crop_pct=1.0,
            mean=model.pretrained_cfg['mean'], std=model.pretrained_cfg['std'], no_aug=True, workers=0).train
        batches, starts = [], []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            starts += range(len(batches), len(batches) + len(loader), batches_per_update)
            batches += loader
        optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, nesterov=True)  # timm's sgd
        losses, clipped = [0.0, 0.0], 0
        for start in starts:
            epoch = start // len(loader)
            group = batches[start:min(start + batches_per_update, (epoch + 1) * len(loader))]
            images, labels = (torch.cat(parts) for parts in zip(*group, strict=True))
            loss = F.cross_entropy(model.train()(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if config.clip_grad is not None:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                clipped += int(norm > config.clip_grad)
            optimizer.step()
            losses[epoch] += loss.item() * len(group) / len(loader)
        return model.state_dict(), losses, clipped
    return train


@pytest.mark.parametrize('accumulated, clip', [(1, None), (2, None), (2, 1.0)])
def test_training_equals_plain_torch(
        make_config, run_training, train_by_hand, vit_weights, tmp_path, accumulated, clip):
    """5 batches; with two to an update the last update has one, and each update is that of the doubled batch."""
    config = make_config(
        tmp_path, **VIT, initial_checkpoint=str(vit_weights), no_aug=True, grad_accum_steps=accumulated, epochs=2,
        opt='sgd', lr=0.03, weight_decay=0.0, sched='none', clip_grad=clip)
    expected, losses, clipped = train_by_hand(config, accumulated)
    run = run_training(config)
    assert [entry['train']['loss'] for entry in run.result['history']] == pytest.approx(losses, rel=1e-5)
    found = torch.load(run.folder / 'last.pth.tar', weights_only=True)['state_dict']
    start = torch.load(vit_weights, weights_only=True)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=2e-6, rtol=0, msg=key)
    assert max((start[key] - value).abs().max() for key, value in expected.items()) > 1e-3
    assert clip is None or clipped > 0


def test_the_moving_average_is_timms(make_config, run_training, tmp_path):
    """After n updates with a constant average: decay 0 on the first, then ema = d * ema + (1 - d) * weights."""
    weights = []
    for epochs in (1, 2):  # one update each: the batch is the whole set
        config = make_config(
            tmp_path / str(epochs), batch_size=84, epochs=epochs, opt='sgd', lr=0.1, sched='none', model_ema=True,
            model_ema_decay=0.75, seed=5)
        weights.append(torch.load(run_training(config).folder / 'last.pth.tar', weights_only=True))
    first, second = (state['state_dict'] for state in weights)
    for key, value in weights[1]['state_dict_ema'].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * first[key] + 0.25 * second[key], atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize('opt', ['sgd', 'momentum', 'adam', 'adamw'])
def test_updates_on_a_gpu_are_fused(opt):
    """timm passes the argument on to an optimizer that takes it, and nothing else is chosen for the user."""
    chosen = fused_update(TrainConfig(opt=opt), torch.device('cuda'))
    optimizer = create_optimizer_v2([torch.nn.Parameter(torch.ones(2))], opt, lr=0.1, **chosen)
    assert optimizer.defaults['fused'] is True
    assert fused_update(TrainConfig(opt=opt), torch.device('cpu')) == {}
    assert fused_update(TrainConfig(opt=opt, opt_foreach=True), torch.device('cuda')) == {}
    assert fused_update(TrainConfig(opt=opt, opt_kwargs={'fused': False}), torch.device('cuda')) == {}
    assert fused_update(TrainConfig(opt='lamb'), torch.device('cuda')) == {}
