"""fastai: attach() mixes in the model's forward, and its loss is the Learner's loss_func."""
import timm
import torch
from fastai.vision.all import Callback, ImageDataLoaders, Learner, Normalize, Resize, accuracy, set_seed

import timm_alignmix
from alignmix_lab.data import sample_dir


class PlainEpochs(Callback):
    """Train without mixing in the last epochs."""

    def __init__(self, attached, epochs: int = 1) -> None:
        self.attached, self.epochs = attached, epochs

    def before_epoch(self) -> None:
        self.attached.mix_enabled = self.epoch < self.n_epoch - self.epochs


def main() -> torch.nn.Module:
    set_seed(0)
    folder = sample_dir('timm')  # or your own: train/CLASS/*.png and validation/CLASS/*.png
    loaders = ImageDataLoaders.from_folder(
        folder, train='train', valid='validation', item_tfms=Resize(48), bs=64, num_workers=0,
        batch_tfms=Normalize.from_stats([0.5] * 3, [0.5] * 3))
    model = timm.create_model('test_resnet', num_classes=loaders.c)
    attached = timm_alignmix.attach(model, 'densemultimix')
    learner = Learner(loaders, model, loss_func=attached.loss, metrics=accuracy, cbs=PlainEpochs(attached))
    with learner.no_bar():
        learner.fit_one_cycle(6, lr_max=4e-3)
        print(f'val accuracy {learner.validate()[1]:.4f}')
    return model


if __name__ == '__main__':
    main()
