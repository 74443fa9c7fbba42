"""PyTorch Lightning's Trainer, as it comes, around the model and the loaders of the loop by hand."""
import tempfile
from common import NotHere, main, read_set, stats, timed
from arm_hand import STAGES, Normalize, loader, loaders, make_model, one_cycle, optimizer
import lightning, torch
from torch.nn.functional import cross_entropy

class Task(lightning.LightningModule):
    def __init__(self, model, norm): super().__init__(); self.model, self.norm, self.train_losses = model, norm, []
    def start(self, stage, steps):
        self.stage, self.steps = stage, steps
        self.model.freeze(stage['frozen'])
    def configure_optimizers(self):
        opt = optimizer(self.model.groups(), self.stage['lrs'], fused=True)
        return dict(optimizer=opt, lr_scheduler=dict(scheduler=one_cycle(opt, self.stage, self.steps), interval='step'))
    def forward(self, x): return self.model(self.norm(x))
    def training_step(self, batch, i):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log('train_loss', loss, on_epoch=True)
        return loss
    def on_train_epoch_end(self): self.train_losses.append(float(self.trainer.callback_metrics['train_loss_epoch']))
    def validation_step(self, batch, i):
        out = self(batch[0])
        self.log('valid_loss', cross_entropy(out, batch[1]), batch_size=len(out))
        self.log('accuracy', (out.argmax(1) == batch[1]).float().mean(), batch_size=len(out))
    def predict_step(self, batch, i): return self(batch[0]).softmax(1)

def fine_tune(spec):
    torch.manual_seed(spec['seed'])
    task, dls = Task(make_model(spec['arch'], seed=spec['seed']), Normalize(*stats(spec['arch']))), loaders(spec)
    def run(folder):
        for stage in STAGES:
            task.start(stage, len(dls[0]))
            trainer = lightning.Trainer(max_epochs=stage['epochs'], default_root_dir=folder)
            trainer.fit(task, *dls)
        return trainer.callback_metrics
    with tempfile.TemporaryDirectory() as folder: seconds, got = timed(lambda: run(folder))
    return dict(seconds=seconds, valid_loss=float(got['valid_loss']), accuracy=float(got['accuracy']), train_losses=task.train_losses)

def get_preds(spec):
    files, labels, _ = read_set(spec)
    task, dl = Task(make_model(spec['arch']), Normalize(*stats(spec['arch']))), loader(spec, files, labels, False)
    with tempfile.TemporaryDirectory() as folder: seconds, probs = timed(lambda: torch.cat(lightning.Trainer(default_root_dir=folder).predict(task, dl)))
    return dict(img_s=len(probs)/seconds)

def load(spec): raise NotHere('has no loader of its own: that of the loop by hand is used')

if __name__ == '__main__': main(dict(loader=load, fine_tune=fine_tune, get_preds=get_preds))
