"""Progressive resizing: images grow over the epochs of training, not in evaluation."""
from alignmix_lab.classification.build import build_run
from alignmix_lab.classification.validate import validate
from alignmix_lab.runs.engine import train_one_epoch
from alignmix_lab.runs.fit import wrap_run


def test_images_grow_in_training_and_not_in_evaluation(make_config, tmp_path):
    config = make_config(tmp_path, batch_size=40, min_res=32, max_res=96, end_ramp=3, mix='manifold')
    run, seen = build_run(config), []
    wrap_run(run)
    model = run.task.get_eval_model()
    model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].shape[-1])))
    for epoch in range(4):
        train_one_epoch(run, epoch, save=lambda update, totals: None)
        validate(run, model)
    assert list(dict.fromkeys(seen)) == [(True, 32), (False, 64), (True, 64), (True, 96)]
    assert [side for training, side in seen if training] == [32] * 2 + [64] * 4 + [96] * 2
