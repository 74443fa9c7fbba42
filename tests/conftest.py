"""Small real files shared by the tests."""
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope='session')
def two_class(tmp_path_factory):
    "24 reddish cats and 24 greenish dogs, 40×32 pixels, in a folder for each class"
    root, rng = tmp_path_factory.mktemp('two'), np.random.default_rng(0)
    for name, channel in (('cat', 0), ('dog', 1)):
        (root/name).mkdir()
        for i in range(24):
            a = rng.integers(0, 90, (32, 40, 3), dtype=np.uint8)
            a[..., channel] += 120
            Image.fromarray(a).save(root/name/f'{name}_{i}.png')
    return root


@pytest.fixture
def dls(two_class):
    "Loaders over the two classes at 16 pixels, read in the main thread"
    from blocks import DataBlock, RandomSplitter, Resize, get_image_files, parent_label
    block = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(16))
    return block.dataloaders(two_class, bs=8, num_workers=0, seed=1, device='cpu')


@pytest.fixture
def tiny():
    "A function that makes a tiny classifier"
    import torch
    from torch import nn
    def make(n_out=2, seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out))
    return make
