"""Models in shards (FSDP2) on several processes on the CPU, held against the same runs with whole copies (DDP)."""
import shutil
from argparse import Namespace

import pytest
import timm
import torch

import timm_alignmix
from alignmix_lab.classification import prepare
from alignmix_lab.classification.build import build_run
from alignmix_lab.runs.accelerator import create_accelerator
from alignmix_lab.runs.checkpoint import find_checkpoint, read_checkpoint
from alignmix_lab.runs.sharding import block_classes, compile_blocks, read_shards

FSDP = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2')
# A ViT whose last map is pooled, so that dense mixing trains its classifier on every position.
VIT = dict(
    model='test_vit', model_kwargs=dict(class_token=False, fc_norm=False, global_pool='avg'), mix='densemultimix',
    mix_kwargs={'n': 12}, batch_size=4, grad_checkpointing=True, clip_grad=0.5, layer_decay=0.8,
    model_ema=True, model_ema_decay=0.7)
# Buffers are not broadcast among shards.
RESNET = dict(model='test_resnet', no_ddp_bb=True, model_ema=True, model_ema_decay=0.7)
# Gradients are summed in another order; 20 updates of AdamW at a learning rate of 3e-3.
TOLERANCE = dict(atol=2e-5, rtol=0)
SEED = 1527  # draws each of METHODS within 20 steps
METHODS = sorted(set(timm_alignmix.list_mixes()) - {'none', 'alignmix_ae', 'tokenmix', 'transmix'})
TOKENS = dict(
    model='test_vit', mix=dict.fromkeys(('tokenmix', 'transmix', 'alignmix', 'manifold'), 0.25), epochs=1, batch_size=4,
    mix_kwargs={'tokenmix.prob': 1.0}, seed=22,  # draws each, tokenmix first
    grad_checkpointing=True, model_ema=True, model_ema_decay=0.7)


@pytest.fixture(scope='module')
def trained(make_config, on_processes, tmp_path_factory):
    """Callable: folder of the jobs on so many processes, and what a job's processes saved, by rank."""
    folders = {}

    def jobs_on(count: int, tokens: dict) -> dict[str, dict]:
        jobs = {'vit': dict(VIT, epochs=3, val_interval=3)}  # 21 updates
        if count == 2:
            several = dict(
                RESNET, mix=dict.fromkeys(METHODS, 1 / len(METHODS)), seed=SEED, epochs=1, batch_size=2,
                grad_accum_steps=2,
                mix_kwargs={'multimix.n': 12, 'densemultimix.n': 12, 'guidedmixup.saliency': 'ap'})
            jobs = {
                'vit': dict(VIT, export='auto', checkpoint_hist=1), 'several': several,
                'tokens': tokens,
                'layers': dict(
                    RESNET, mix='alignmix_ae', mix_kwargs={'dim': 8, 'width': 4}, epochs=1, batch_size=14, freeze='1',
                    head_lr_scale=5.0, clip_grad=0.01, clip_mode='value')}
        if count == 4:
            jobs = {'vit': dict(VIT, epochs=1, batch_size=7)}
        return jobs

    def train(count: int):
        if count in folders:
            return folders[count]
        folder = tmp_path_factory.mktemp(str(count))
        replicas = dict(
            ACCELERATE_USE_PARALLELISM_CONFIG='true', PARALLELISM_CONFIG_DP_REPLICATE_SIZE='2',
            PARALLELISM_CONFIG_DP_SHARD_SIZE='2') if count == 4 else {}
        tokens, jobs = dict(TOKENS, initial_checkpoint=str(folder / 'weights.pth')), {}
        torch.save(timm.create_model('test_vit', num_classes=10).state_dict(), tokens['initial_checkpoint'])
        for name, options in jobs_on(count, tokens).items():
            jobs[f'{name}-whole'] = (dict(options, export='none'), {})
            jobs[name] = (options, dict(launcher={**FSDP, **replicas}))
        if count == 2:
            stopped = dict(VIT, resume='auto')
            jobs['asked'] = (stopped, dict(launcher=FSDP, at=(15, 'signal')))
            jobs['asked-on'] = (dict(stopped, output=folder / 'asked'), dict(launcher=FSDP))
            jobs['full'] = (dict(VIT, checkpoint_steps=12), dict(launcher=FSDP, at=(11, 'spoil')))
            jobs['compiled'] = (dict(tokens, torchcompile='aot_eager'), dict(launcher=FSDP))
            jobs['unfit'] = (dict(VIT, opt='adafactor'), dict(launcher=FSDP))
        if count == 3:
            first, _ = train(2)
            for name in ('full', 'vit-whole'):
                shutil.copytree(first / name, folder / f'{name}-on')
                jobs[f'{name}-on'] = (dict(VIT, resume='auto'), dict(launcher=FSDP))  # one is at its end
        on_processes(count, 'train_in_shards', {
            name: {**make_config(options.pop('output', folder / name), **options).to_dict(), **extra}
            for name, (options, extra) in jobs.items()}, folder)
        folders[count] = folder, lambda name: [
            torch.load(folder / f'{name}-{rank}.pt', weights_only=True) for rank in range(count)]
        return folders[count]
    return train


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].keys() == expected[key].keys()
        for name, value in expected[key].items():
            if name.endswith(('running_mean', 'running_var')):
                continue  # of the process, until an evaluation
            torch.testing.assert_close(found[key][name], value, msg=f'{key} {name}', **(tolerance or TOLERANCE))


@pytest.mark.parametrize('count, name', [
    (2, 'vit'), (2, 'several'), (2, 'tokens'), (2, 'layers'), (2, 'compiled'), (3, 'vit'), (4, 'vit')])
def test_shards_train_as_copies_do(trained, count, name):
    """Losses of every step, gradients of the first update, weights and averages at the end.

    Four are 2 x 2; the compiled run has the options of `tokens`.
    """
    _, saved = trained(count)
    whole = 'tokens-whole' if name == 'compiled' else f'{name}-whole'
    for found, expected in zip(saved(name), saved(whole), strict=True):
        assert found['kinds'] == ['DTensor'] and expected['kinds'] == ['Parameter']
        assert len(found['losses']) == len(expected['losses'])
        for (mode, loss), (same_mode, same_loss) in zip(found['losses'], expected['losses'], strict=True):
            assert mode == same_mode and loss == pytest.approx(same_loss, rel=2e-6)
        for gradient, whole_gradient in zip(found['gradients'], expected['gradients'], strict=True):
            torch.testing.assert_close(gradient, whole_gradient, atol=1e-6, rtol=1e-5)
        assert_same(found['start'], expected['start'], atol=0, rtol=0)
        assert_same(found['end'], expected['end'])
        last, last_whole = (part['history'][-1]['validation'] for part in (found, expected))
        assert last == pytest.approx(last_whole, rel=1e-4)


def test_all_methods_were_drawn(trained):
    modes = {mode.partition('/')[0] for mode, _ in trained(2)[1]('several')[0]['losses']}
    assert modes == set(METHODS)


def test_weights_of_a_file_reach_the_shards(trained):
    folder, saved = trained(2)
    expected = torch.load(folder / 'weights.pth', weights_only=True)
    for part in saved('tokens'):
        assert_same({'start': part['start']['state_dict']}, {'start': expected}, atol=0, rtol=0)


def test_frozen_layers_stay(trained):
    """The stem and the first stage of test_resnet."""
    for part in trained(2)[1]('layers'):
        same = {name for name, value in part['start']['state_dict'].items() if name.endswith('weight')
                and torch.equal(value, part['end']['state_dict'][name])}
        names = {name for name in part['start']['state_dict'] if name.endswith('weight')}
        assert same == {name for name in names if name.startswith(('conv1', 'bn1', 'layer1'))}


def test_modes_share_the_compiled_blocks(trained):
    """One graph for the training of all blocks, one for the clean pass of tokenmix."""
    for part in trained(2)[1]('compiled'):
        assert {mode.partition('/')[0] for mode, _ in part['losses']} == set(TOKENS['mix'])
        assert set(part['graphs']) == {2}


def test_each_process_holds_its_part(trained):
    _, saved = trained(3)
    total = saved('vit-whole')[0]['local']
    assert sum(part['local'] for part in saved('vit')) == total
    assert max(part['local'] for part in saved('vit')) < 0.5 * total


def test_a_stopped_run_goes_on_as_if_it_had_not_been(trained):
    folder, saved = trained(2)
    assert [part['code'] for part in saved('asked')] == [75, 75]
    found, expected = saved('asked-on')[0], saved('vit')[0]
    steps = len(found['losses'])
    assert 0 < steps < len(expected['losses']) and found['losses'] == expected['losses'][-steps:]
    assert_same(found['end'], expected['end'], atol=0, rtol=0)
    assert found['history'] == expected['history'][-1:]


def test_an_optimizer_that_cannot_step_is_refused(trained):
    for part in trained(2)[1]('unfit'):
        assert '--opt adafactor cannot train a model in shards' in part['code']


def test_files_are_pruned_with_their_shards(trained):
    """After three epochs the last two files are left, and their folders."""
    folder = trained(3)[0] / 'vit' / 'run'
    kept = {read_checkpoint(path)['shards']['folder'] for path in folder.glob('*.pth.tar')}
    assert {path.name for path in folder.glob('*shards*')} == kept == {'shards-2-0', 'shards-3-0'}


def test_a_full_disk_leaves_the_checkpoint_before(trained):
    folder, saved = trained(2)
    for part in saved('full'):
        assert 'could not be written' in part['code'] and 'no space left' in part['code']
    assert find_checkpoint(folder / 'full' / 'run')[1]['epoch'] == 0


def test_missing_shards_are_passed_over(trained, tmp_path):
    shutil.copytree(trained(2)[0] / 'vit' / 'run', tmp_path / 'run')
    assert find_checkpoint(tmp_path / 'run')[0].name == 'last.pth.tar'
    shards = next((tmp_path / 'run' / 'shards-2-0').iterdir())
    shards.write_bytes(shards.read_bytes()[:-1])
    with pytest.raises(ValueError, match='missing or cut off'):
        read_checkpoint(tmp_path / 'run' / 'last.pth.tar')
    assert find_checkpoint(tmp_path / 'run')[1]['epoch'] == 0


@pytest.mark.parametrize('name', ['full', 'vit-whole'])
def test_three_processes_go_on_from_two(trained, name):
    """From shards, and from a checkpoint that has none."""
    (first, _), (_, saved) = trained(2), trained(3)
    path, state = find_checkpoint(first / name / 'run')
    state = read_shards(state, path)
    for part in saved(f'{name}-on'):
        assert_same(part['start'], {key: state[key] for key in ('state_dict', 'state_dict_ema')}, atol=0, rtol=0)
        assert name != 'full' or part['history'][-1]['epoch'] == 1


def test_one_process_goes_on_from_shards(trained, make_config, tmp_path):
    folder, saved = trained(2)
    shutil.copytree(folder / 'vit' / 'run', tmp_path / 'run')
    run, _ = prepare(make_config(tmp_path, **{**VIT, 'resume': 'auto', 'epochs': 3}))
    expected = saved('vit')[0]['end']['state_dict']
    for name, value in run.task.get_eval_model().state_dict().items():
        assert torch.equal(value, expected[name])
    moments = [state['exp_avg'] for state in run.optimizer.optimizer.state.values()]
    assert len(moments) == len(list(run.task.get_eval_model().parameters())) and all(m.any() for m in moments)
    run.lock.close()


def test_shards_are_exported_as_any_weights(trained):
    folder, saved = trained(2)
    model = timm.create_model(f'local-dir:{folder / "vit" / "run" / "export"}', pretrained=True)
    expected = saved('vit')[0]['end']['state_dict_ema']
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize('model, blocks', [
    ('vit_large_patch16_224', ['Block']), ('vit_7b_patch16_dinov3', ['EvaBlock']), ('resnet50', ['Bottleneck']),
    ('convnext_tiny', ['ConvNeXtBlock', 'ConvNeXtStage']), ('poolformer_s12', [])])
def test_blocks_are_found(model, blocks):
    with torch.device('meta'):
        assert block_classes(timm.create_model(model)) == blocks


@pytest.mark.parametrize('variables, said', [
    (dict(FSDP_VERSION='1'), 'fsdp_version 1 of accelerate launch is not supported: launch with --fsdp_version 2'),
    (dict(FSDP_OFFLOAD_PARAMS='true'), 'fsdp_offload_params true'),
    (dict(FSDP_ACTIVATION_CHECKPOINTING='true'), 'pass --grad-checkpointing'),
    (dict(FSDP_AUTO_WRAP_POLICY='SIZE_BASED_WRAP'), "the groups are the model's own blocks"),
    (dict(FSDP_TRANSFORMER_CLS_TO_WRAP='Block'), 'fsdp_transformer_cls_to_wrap Block'),
    (dict(FSDP_IGNORED_MODULES='head'), 'the whole model is sharded'),
    (dict(ACCELERATE_USE_DEEPSPEED='true'), 'configured for DEEPSPEED'),
    (dict(ACCELERATE_USE_MEGATRON_LM='true'), 'configured for MEGATRON_LM'),
    (dict(PARALLELISM_CONFIG_TP_SIZE='2'), 'parallelism_config_tp_size 2'),
    (dict(PARALLELISM_CONFIG_CP_SIZE='2'), 'parallelism_config_cp_size 2'),
    (dict(PARALLELISM_CONFIG_DP_SHARD_SIZE='3'), '1 processes cannot hold 1 x 3 shards'),
    ({}, '1 processes cannot hold 1 x 1 shards; launch at least 2'),
])
def test_what_shards_cannot_do_is_refused(monkeypatch, variables, said):
    for name, value in {**FSDP, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        create_accelerator('cpu', may_shard=True)


@pytest.mark.parametrize('device, precision, said', [
    ('cpu', 'fp16', 'float16 has not been tested with shards'), ('mps', 'no', 'mps devices cannot shard')])
def test_precisions_and_devices_that_shards_lack_are_refused(monkeypatch, device, precision, said):
    for name, value in {**FSDP, 'WORLD_SIZE': '2', 'ACCELERATE_MIXED_PRECISION': precision}.items():
        monkeypatch.setenv(name, value)
    state = Namespace(device=torch.device(device))
    monkeypatch.setattr('alignmix_lab.runs.accelerator.PartialState', lambda **_: state)
    with pytest.raises(ValueError, match=said):
        create_accelerator(may_shard=True)


@pytest.mark.parametrize('options, said', [
    (dict(clip_grad=0.1, clip_mode='agc'), '--clip-mode agc measures whole layers, which FSDP divides'),
    (dict(model_ema=True, model_ema_force_cpu=True), '--model-ema-force-cpu keeps the average in one piece')])
def test_options_that_need_whole_layers_are_refused(monkeypatch, make_config, tmp_path, options, said):
    monkeypatch.setattr('alignmix_lab.classification.build.start_processes', lambda *_, **__: Namespace(is_fsdp2=True))
    with pytest.raises(ValueError, match=said):
        build_run(make_config(tmp_path, **options))


def test_compiling_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match='compiles the blocks of models in shards, and MetaFormer has none'):
        compile_blocks(timm_alignmix.MixTask(timm.create_model('poolformer_s12'), verbose=False), 'eager')
