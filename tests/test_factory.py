"""Loaders in one call: folders with a test part, tables of several labels, masks, and datasets of others."""
import random
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from blocks import DataError, ImageDataLoaders, ItemError, RegressionBlock, Resize, SegmentationDataLoaders, get_image_files

KW = dict(item_tfms=Resize(16), bs=4, num_workers=0, device='cpu')

@pytest.fixture
def folders(two_class, tmp_path):
    "train/, valid/ and test/ with a folder for each class"
    for c in ('cat', 'dog'):
        for i, f in enumerate(sorted((two_class/c).iterdir())):
            to = tmp_path/('train' if i < 14 else 'valid' if i < 19 else 'test')/c
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, to/f.name)
    return tmp_path

def parts(dls): return {name: {f.parent.parent.name for f in dl.samples.fields[0]} for name, dl in dls.parts.items()}

# --- folders
def test_three_folders_are_three_splits(folders):
    dls = ImageDataLoaders.from_folder(folders, test='test', **KW)
    assert parts(dls) == dict(train={'train'}, valid={'valid'}, test={'test'}) and [len(dl.samples) for dl in dls.parts.values()] == [28, 10, 10]

def test_without_test_the_folder_is_left_alone(folders): assert parts(ImageDataLoaders.from_folder(folders, **KW)) == dict(train={'train'}, valid={'valid'})

def test_a_random_split_beside_a_test_folder(folders):
    shutil.rmtree(folders/'valid')
    dls = ImageDataLoaders.from_folder(folders, valid_pct=.25, test='test', seed=1, **KW)
    assert parts(dls) == dict(train={'train'}, valid={'train'}, test={'test'}) and len(dls.valid_ds) == 7

def test_a_missing_test_folder_is_named(folders):
    with pytest.raises(DataError, match="no folder 'tst'.*test="): ImageDataLoaders.from_folder(folders, test='tst', **KW)

# --- tables
@pytest.fixture
def table(two_class):
    files = get_image_files(two_class)
    return pd.DataFrame(dict(name=[str(f.relative_to(two_class)) for f in files], tags=[f'animal {f.parent.name}' for f in files], cat=[int(f.parent.name == 'cat') for f in files],
                             dog=[int(f.parent.name == 'dog') for f in files], age=[float(f.stem[4:]) for f in files]))

def test_a_delimiter_makes_several_labels(table, two_class):
    dls = ImageDataLoaders.from_df(table, two_class, label_delim=' ', **KW)
    assert list(dls.vocab) == ['animal', 'cat', 'dog'] and (dls.one_batch()[1].sum(1) == 2).all()

def test_several_columns_are_yes_or_no_for_each_class(table, two_class):
    dls = ImageDataLoaders.from_df(table, two_class, label_col=['cat', 'dog'], **KW)
    assert list(dls.vocab) == ['cat', 'dog'] and (dls.one_batch()[1].sum(1) == 1).all()

def test_a_block_makes_numbers(table, two_class, tmp_path):
    table.to_csv(tmp_path/'t.csv', index=False)
    dls = ImageDataLoaders.from_csv(two_class, tmp_path/'t.csv', label_col='age', y_block=RegressionBlock, **KW)
    assert dls.one_batch()[1].dtype == torch.float32 and dls.vocab is None

# --- masks
def test_masks_by_a_function(two_class, tmp_path):
    files = get_image_files(two_class)
    for f in files: Image.fromarray((np.arange(40)[None] > 19).repeat(32, 0).astype(np.uint8)).save(tmp_path/f.name)
    dls = SegmentationDataLoaders.from_label_func(two_class, files, lambda f: tmp_path/f.name, codes=['l', 'r'], **(KW | dict(item_tfms=Resize((32, 40)))))
    y = next(iter(dls.valid))[1]
    assert y.shape == (4, 32, 40) and (y[..., :20] == 0).all() and (y[..., 20:] == 1).all() and list(dls.vocab) == ['l', 'r']

# --- datasets of others
class Theirs(torch.utils.data.Dataset):
    "Pillow images and class numbers, without a way to know the labels other than reading"
    def __init__(self, files): self.files, self.read = files, 0
    def __len__(self): return len(self.files)
    def __getitem__(self, i): self.read += 1; return Image.open(self.files[i]), int(self.files[i].parent.name == 'dog')

class Torchvisions(Theirs):
    classes = ['zebra-cat', 'ant-dog']
    @property
    def targets(self): return [int(f.parent.name == 'dog') for f in self.files]

class Noisy(Theirs):
    "Draws from the global generators, as transforms of datasets do"
    def __getitem__(self, i): return torch.rand(3, 16, 16)*.5 + random.random()*.2 + np.random.rand()*.2, 0 if i % 2 else 1

@pytest.fixture
def files(two_class): return list(get_image_files(two_class))

def test_a_dataset_is_split_and_read(files):
    dls = ImageDataLoaders.from_dataset(Theirs(files), seed=1, **KW)
    assert len(dls.train_ds) == 39 and len(dls.valid_ds) == 9 and list(dls.vocab) == [0, 1] and dls.one_batch()[0].shape == (4, 3, 16, 16)
    for samples in (dls.train_ds, dls.valid_ds):
        for i in range(len(samples)): assert dls.vocab[int(samples[i][1])] == int(samples.fields[0].ds.files[samples.fields[0].idx[i]].parent.name == 'dog')

def test_labels_that_can_be_had_without_reading_are_and_keep_their_names(files):
    ds = Torchvisions(files)
    dls = ImageDataLoaders.from_dataset(ds, seed=1, **KW)
    assert ds.read == 0 and list(dls.vocab) == ['zebra-cat', 'ant-dog'] and dls.train_ds.fields[1][0] in ds.classes

def test_given_parts_are_used_as_they_are(files):
    dls = ImageDataLoaders.from_dataset(Theirs(files[4:44]), Theirs(files[:4] + files[44:]), Theirs(files[::5]), **KW)
    assert [len(dl.samples) for dl in dls.parts.values()] == [40, 8, 10]

def test_a_dataset_that_draws_gives_the_same_whatever_the_workers_and_leaves_the_global_state(files):
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    a, b = (ImageDataLoaders.from_dataset(Noisy(files), seed=1, **(KW | dict(num_workers=n))).train for n in (0, 2))
    first = [x for x, _ in a]
    assert all(torch.equal(x, u) for x, (u, _) in zip(first, b)) and not torch.equal(first[0], next(iter(a))[0])
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate() and state[2] == np.random.get_state()[1].tolist()

def test_an_item_that_fails_is_named_by_its_number(files):
    class Broken(Torchvisions):
        def __getitem__(self, i):
            if i == 7: raise RuntimeError('no such record')
            return super().__getitem__(i)
    dls = ImageDataLoaders.from_dataset(Broken(files), seed=1, **KW)
    with pytest.raises(ItemError, match='item 7 of Broken.*no such record'):
        for dl in dls: list(dl)

@pytest.mark.parametrize('ds, said', [(iter([]), 'map-style'), ([np.zeros((4, 4, 3), np.uint8)]*8, 'pair')])
def test_what_is_no_dataset_of_pairs_is_said(ds, said):
    with pytest.raises(DataError, match=said): ImageDataLoaders.from_dataset(ds, **KW)
