"""timm's transforms, its loader, its optimizer, and a loop as in its train script; the model and the schedule are those of the loop by hand.

Its transforms have flips, crops, brightness and contrast; rotation and perspective come only with RandAugment, which is something else, and are left out."""
import os
from common import main, rate, read_set, stats, timed
from arm_hand import STAGES, make_model, one_cycle
import timm.data, torch
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, accuracy
from PIL import Image
from torch import nn

class Pictures(torch.utils.data.Dataset):
    "As timm's ImageDataset, from lists of files and labels; `create_loader` sets the transform"
    def __init__(self, files, labels):
        vocab = sorted({*labels})
        self.files, self.labels, self.transform = files, [vocab.index(o) for o in labels], None
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        with Image.open(self.files[i]) as im: return self.transform(im.convert('RGB')), self.labels[i]

def loader(spec, files, labels, train, arch='resnet18'):
    mean, std = stats(arch)
    n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    augment = dict(scale=(1/1.1**2, 1.), ratio=(1., 1.), hflip=.5, color_jitter=(.2, .2, 0.)) if spec['set'] == 'png' else dict(hflip=.5, color_jitter=None)
    return timm.data.create_loader(Pictures(files, labels), (3, spec['size'], spec['size']), spec['bs'], is_training=train, use_prefetcher=False, interpolation='bilinear', mean=mean, std=std,
                                   num_workers=n, persistent_workers=True, crop_pct=1., **(augment if train else {}))

def loaders(spec, arch='resnet18'):
    files, labels, n = read_set(spec)
    return loader(spec, files[:n], labels[:n], True, arch), loader(spec, files[n:], labels[n:], False, arch)

def train_one_epoch(model, dl, opt, sched):
    model.train()
    meter = AverageMeter()
    for x, y in dl:
        loss = nn.functional.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        meter.update(loss.item(), len(x))
    return meter.avg

@torch.inference_mode()
def validate(model, dl):
    model.eval()
    losses, top1 = AverageMeter(), AverageMeter()
    for x, y in dl:
        out = model(x.contiguous(memory_format=torch.channels_last))
        losses.update(nn.functional.cross_entropy(out, y).item(), len(x))
        top1.update(accuracy(out, y)[0].item(), len(x))
    return losses.avg, top1.avg/100

def groups(model, lrs):
    "The groups of the loop by hand, without decay for biases and normalisation, as timm's weight decay does it"
    return [dict(params=[p for p in ps if (p.ndim > 1) == decays], lr=lr, weight_decay=.01*decays) for ps, lr in zip(model.groups(), lrs) for decays in (True, False)]

def train(model, train_dl, valid_dl):
    losses = []
    for stage in STAGES:
        model.freeze(stage['frozen'])
        opt = create_optimizer_v2(groups(model, stage['lrs']), opt='adamw', lr=stage['lrs'][-1], eps=1e-5, betas=(.95, .99))
        sched = one_cycle(opt, stage, len(train_dl))
        for _ in range(stage['epochs']):
            losses.append(train_one_epoch(model, train_dl, opt, sched))
            last = validate(model, valid_dl)
    return dict(valid_loss=last[0], accuracy=last[1], train_losses=losses)

def load(spec):
    train_dl, _ = loaders(spec)
    return rate(lambda: train_dl, spec['epochs'])

def fine_tune(spec):
    torch.manual_seed(spec['seed'])
    model, dls = make_model(spec['arch'], seed=spec['seed']), loaders(spec, spec['arch'])
    seconds, got = timed(lambda: train(model, *dls))
    return dict(seconds=seconds, **got)

def get_preds(spec):
    files, labels, _ = read_set(spec)
    model = make_model(spec['arch']).eval()
    def run():
        with torch.inference_mode(): return torch.cat([model(x.contiguous(memory_format=torch.channels_last)).softmax(1) for x, _ in loader(spec, files, labels, False)])
    seconds, probs = timed(run)
    return dict(img_s=len(probs)/seconds)

if __name__ == '__main__': main(dict(loader=load, fine_tune=fine_tune, get_preds=get_preds))
