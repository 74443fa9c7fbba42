"""A careful loop by hand: torchvision's v2 transforms, two workers that stay, channels_last, a body that is really frozen, a fused optimizer.

Of the ways to write it, the fastest here was kept: a grey PNG stays one channel of a Pillow image until the batch is normalised; a JPEG is decoded by torchvision into a tensor and
cropped there; the bytes of the batch become normalised floats in the main process, in one pass. What Pillow or torchvision do not do by themselves (reading a JPEG at a fraction of
its size, one resample for all augmentations) is not done here either."""
import os
from common import calls, init_head, main, rate, read_set, spread, stats, timed, weights
import torch, torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

# data

class Pictures(Dataset):
    "Pictures as bytes, one channel or three, and the number of the class"
    def __init__(self, files, labels, tfm, opened):
        vocab = sorted({*labels})
        self.files, self.labels, self.tfm, self.opened = files, [vocab.index(o) for o in labels], tfm, opened
    def __len__(self): return len(self.files)
    def __getitem__(self, i): return self.tfm(self.opened(self.files[i])), self.labels[i]

def open_grey(file):
    with Image.open(file) as im: return im.convert('L')
def open_jpeg(file): return decode_jpeg(read_file(str(file)), mode=ImageReadMode.RGB)

def train_tfm(spec):
    if spec['set'] != 'png': return v2.Compose([v2.RandomResizedCrop(spec['size']), v2.RandomHorizontalFlip()])
    turn, light = v2.RandomAffine(10, scale=(1, 1.1), interpolation=v2.InterpolationMode.BILINEAR), v2.ColorJitter(.2, .2)
    return v2.Compose([v2.Resize(spec['presize']), v2.RandomCrop(spec['presize']), v2.RandomHorizontalFlip(), v2.RandomApply([turn], .75), v2.RandomPerspective(.2, p=.75), v2.RandomApply([light], .75),
                       v2.Resize(spec['size']), v2.PILToTensor()])

def valid_tfm(spec): return v2.Compose([v2.Resize(spec['size']), v2.CenterCrop(spec['size']), *([v2.PILToTensor()] if spec['set'] == 'png' else [])])

def loader(spec, files, labels, train):
    n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    data = Pictures(files, labels, (train_tfm if train else valid_tfm)(spec), open_grey if spec['set'] == 'png' else open_jpeg)
    return DataLoader(data, spec['bs'], shuffle=train, drop_last=train, num_workers=n, persistent_workers=True)

class Normalize:
    "Bytes of one channel or three → normalised floats of three, channels last, in one pass"
    def __init__(self, mean, std):
        mean, std = (torch.tensor(o).reshape(1, 3, 1, 1) for o in (mean, std))
        self.shift, self.scale = -mean/std, 1/(255*std)
    def __call__(self, x): return torch.addcmul(self.shift, x.expand(-1, 3, -1, -1), self.scale).contiguous(memory_format=torch.channels_last)

def loaders(spec):
    files, labels, n = read_set(spec)
    return loader(spec, files[:n], labels[:n], True), loader(spec, files[n:], labels[n:], False)

# model

class ConcatPool(nn.Module):
    def forward(self, x): return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)

def make_model(arch, n_out=2, seed=0):
    "The body from the weights that all arms start with, in one list of early and one of late parts, and a head as fastai makes it"
    state = torch.load(weights(arch))
    if arch.startswith('resnet'):
        whole = getattr(torchvision.models, arch)()
        whole.load_state_dict(state)
        parts, nf = list(whole.children())[:-2], whole.fc.in_features
        body, early = nn.Sequential(*parts), nn.ModuleList(parts[:6])
    else:
        import timm
        body = timm.create_model(arch, num_classes=0, global_pool='')
        body.load_state_dict(state)
        nf, early = body.num_features, nn.ModuleList([body.conv_stem, body.bn1, body.blocks[:4]])
    head = nn.Sequential(ConcatPool(), nn.BatchNorm1d(2*nf), nn.Dropout(.25), nn.Linear(2*nf, 512, bias=False), nn.ReLU(inplace=True), nn.BatchNorm1d(512), nn.Dropout(.5), nn.Linear(512, n_out, bias=False))
    init_head(head, seed)
    return Model(body, head, early).to(memory_format=torch.channels_last)

class Model(nn.Module):
    def __init__(self, body, head, early): super().__init__(); self.body, self.head, self._early, self.frozen = body, head, [early], False
    def freeze(self, frozen): self.frozen = frozen; self.body.requires_grad_(not frozen)
    def train(self, mode=True):
        super().train(mode)
        if self.frozen: self.body.eval()
        return self
    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen): x = self.body(x)
        return self.head(x)
    def groups(self):
        "Parameters of the first half of the body, the second half, and the head; of a frozen model those of the head"
        early = {id(p) for p in self._early[0].parameters()}
        body = list(self.body.parameters())
        head = list(self.head.parameters())
        return [head] if self.frozen else [[p for p in body if id(p) in early], [p for p in body if id(p) not in early], head]

# training

STAGES = (dict(frozen=True, epochs=1, lrs=[2e-3], pct_start=.99, div=25), dict(frozen=False, epochs=2, lrs=[1e-5, 1e-4, 1e-3], pct_start=.3, div=5))      # fine_tune(2), as fastai has it

def optimizer(groups, lrs, **kw):
    "AdamW without decay for biases and normalisation"
    parts = [dict(params=[p for p in ps if (p.ndim > 1) == decays], lr=lr, weight_decay=.01*decays) for ps, lr in zip(groups, lrs) for decays in (True, False)]
    return torch.optim.AdamW(parts, betas=(.95, .99), eps=1e-5, **kw)

def one_cycle(opt, stage, steps):
    return torch.optim.lr_scheduler.OneCycleLR(opt, [lr for lr in stage['lrs'] for _ in range(2)], total_steps=stage['epochs']*steps, pct_start=stage['pct_start'], div_factor=stage['div'],
                                               final_div_factor=1e5/stage['div'], base_momentum=.85, max_momentum=.95)

@torch.inference_mode()
def evaluate(model, dl, norm):
    "(mean loss, accuracy) over a whole loader"
    model.eval()
    loss = right = n = 0
    for x, y in dl:
        out = model(norm(x))
        loss, right, n = loss + nn.functional.cross_entropy(out, y, reduction='sum'), right + (out.argmax(1) == y).sum(), n + len(y)
    return float(loss/n), float(right/n)

def train(model, train_dl, valid_dl, norm):
    "The stages of fine-tuning; the last validation, and the mean training loss of each epoch"
    losses = []
    for stage in STAGES:
        model.freeze(stage['frozen'])
        opt = optimizer(model.groups(), stage['lrs'], fused=True)
        sched = one_cycle(opt, stage, len(train_dl))
        for _ in range(stage['epochs']):
            model.train()
            seen = []
            for x, y in train_dl:
                loss = nn.functional.cross_entropy(model(norm(x)), y)
                loss.backward()
                opt.step()
                opt.zero_grad()
                sched.step()
                seen.append(loss.detach())
            losses.append(float(torch.stack(seen).mean()))
            last = evaluate(model, valid_dl, norm)
    return dict(valid_loss=last[0], accuracy=last[1], train_losses=losses)

# works

def load(spec):
    train_dl, _ = loaders(spec)
    norm = Normalize(*stats('resnet18'))
    return rate(lambda: ((norm(x), y) for x, y in train_dl), spec['epochs'])

def fine_tune(spec):
    torch.manual_seed(spec['seed'])
    model, norm, dls = make_model(spec['arch'], seed=spec['seed']), Normalize(*stats(spec['arch'])), loaders(spec)
    seconds, got = timed(lambda: train(model, *dls, norm))
    return dict(seconds=seconds, **got)

def predict(spec):
    files, _, _ = read_set(spec)
    model, norm, tfm = make_model(spec['arch']).eval(), Normalize(*stats(spec['arch'])), valid_tfm(spec)
    def one():
        with torch.inference_mode(): return model(norm(tfm(open_grey(files[0]))[None])).softmax(1)
    return spread(calls(one, n=spec['n'])[0])

def get_preds(spec):
    files, labels, _ = read_set(spec)
    model, norm = make_model(spec['arch']).eval(), Normalize(*stats(spec['arch']))
    def run():
        with torch.inference_mode(): return torch.cat([model(norm(x)).softmax(1) for x, _ in loader(spec, files, labels, False)])
    seconds, probs = timed(run)
    return dict(img_s=len(probs)/seconds)

if __name__ == '__main__': main(dict(loader=load, fine_tune=fine_tune, predict=predict, get_preds=get_preds))
