"""Lightning: a LightningModule around a MixTask, whose draws Lightning's checkpoints continue."""
import lightning as L
import timm
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import timm_alignmix
from alignmix_lab.data import sample_dir

EPOCHS = 6


class Classifier(L.LightningModule):
    def __init__(self, mix: str | dict[str, float], plain_epochs: int = 1) -> None:
        super().__init__()
        self.task = timm_alignmix.MixTask(timm.create_model('test_resnet', num_classes=10), mix)
        self.plain_epochs = plain_epochs  # epochs without mixing at the end

    def on_train_epoch_start(self) -> None:
        self.task.mix_enabled = self.current_epoch < self.trainer.max_epochs - self.plain_epochs

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.task(*batch)['loss']

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        result = self.task(*batch)  # in eval mode: the model alone and the clean loss
        accuracy = (result['output'].argmax(dim=1) == batch[1]).float().mean()
        self.log_dict(dict(val_loss=result['loss'], val_accuracy=accuracy), batch_size=len(batch[1]))

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=4e-3, total_steps=int(self.trainer.estimated_stepping_batches))
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=scheduler, interval='step'))


def loaders() -> tuple[DataLoader, DataLoader]:
    transform = v2.Compose([
        v2.ToImage(), v2.Resize(48), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    folder = sample_dir('timm')  # or your own: train/CLASS/*.png and validation/CLASS/*.png
    return (
        DataLoader(ImageFolder(folder / 'train', transform), batch_size=64, shuffle=True, drop_last=True),
        DataLoader(ImageFolder(folder / 'validation', transform), batch_size=256))


def main() -> torch.nn.Module:
    L.seed_everything(0)
    classifier = Classifier('densemultimix')
    trainer = L.Trainer(
        max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False, devices=1)
    trainer.fit(classifier, *loaders())
    print(f'val accuracy {trainer.callback_metrics["val_accuracy"].item():.4f}')
    return classifier.task.get_eval_model()  # the plain timm model


if __name__ == '__main__':
    main()
