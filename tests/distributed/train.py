"A script as anyone writes it, for one process; started by tests/test_distributed.py alone and under torchrun. The last lines write down what this process has learned"
import os
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from blocks import (
    CutMix,
    DataBlock,
    EarlyStoppingCallback,
    GradientAccumulation,
    IndexSplitter,
    Learner,
    MixUp,
    SaveModelCallback,
    accuracy,
    aug_transforms,
    cnn_learner,
    set_seed,
)
from blocks.core import stream

torch.set_num_threads(1)
out, rank = Path(sys.argv[1]), os.environ.get('RANK', '0')

def picture(i, size=64):
    "Stripes across or along, in noise"
    a = stream(0, 'picture', i).normal(128, 40, (size, size, 3)).clip(0, 255)
    a[i % 5::4] = a[i % 5::4]*.5 + (60 if i % 3 else 0)
    return Image.fromarray((a.swapaxes(0, 1) if i % 2 else a).astype('uint8'))

def loaders(n_train, bs, n_valid=7, batch_tfms=(), **kw):
    block = DataBlock(get_x=picture, get_y=lambda i: 'along' if i % 2 else 'across', splitter=IndexSplitter(range(n_train, n_train + n_valid)), batch_tfms=batch_tfms)
    return block.dataloaders(range(n_train + n_valid), bs=bs, seed=3, num_workers=2, device='cpu', **kw)

def result(learn): return dict(weights=learn.model.state_dict(), losses=learn.recorder.losses, table=[list(v) for v in learn.recorder.values])

set_seed(1)
results = {}

# dropout in the head, augmentation, a last batch of one item in validation
dls = loaders(27, 12, n_valid=13, batch_tfms=[*aug_transforms(mult=1.5), v2.GaussianNoise()])
learn = cnn_learner(dls, 'resnet18', pretrained=False, ps=.3, lin_ftrs=[], first_bn=False, metrics=accuracy, precision='fp32', opt_func='sgd', path=out)
learn.fit_one_cycle(2, 1e-4)
results['resnet18'] = result(learn)
results['preds'] = learn.get_preds()[0]
results['validate'] = list(learn.validate())
results['file'] = learn.export('model.pkl').name

# a last batch of fewer items than processes, several batches to a step, a table that ends early, weights that are saved and loaded
def net(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
for name, cbs, kw in (('adam', [], {}), ('accumulation', [GradientAccumulation(8)], dict(opt_func='sgd')), ('mixed', [MixUp(), CutMix()], {})):
    learn = Learner(loaders(13, 4, drop_last=False), net(), metrics=accuracy, lr=5e-3, precision='fp32', path=out, **kw)
    with learn.no_bar(): learn.fit(4, cbs=[*cbs, EarlyStoppingCallback(min_delta=.5), SaveModelCallback(fname=name)])
    results[name] = result(learn)

torch.save(results, out/f'result_{rank}.pt')
