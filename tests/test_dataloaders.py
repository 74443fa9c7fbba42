"""Three splits, samplers, and ways to look at the data."""
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from blocks import (BBoxBlock, BBoxLblBlock, CategoryBlock, DataBlock, DataError, FuncSplitter, ImageBlock, IndexSplitter, ItemError, MultiCategoryBlock, PointBlock, RegressionBlock,
                    Resize, WeightedSampler, aug_transforms, get_image_files, parent_label)

matplotlib.use('Agg')
CPU = dict(num_workers=0, device='cpu')

def block(**kw): return DataBlock(**{**dict(get_items=get_image_files, get_y=parent_label, splitter=lambda o: (range(0, 30), range(30, 40), range(40, 48)), item_tfms=Resize(16)), **kw})

def build(root, bs=8, **kw): return block(**kw).dataloaders(root, bs=bs, seed=3, **CPU)

@pytest.fixture
def figure():
    "A function that gives the axes with pictures of the figure drawn last"
    import matplotlib.pyplot as plt
    plt.close('all')
    yield lambda: [a for a in plt.gcf().axes if a.images]
    plt.close('all')

# --- the test split
def test_a_third_part_of_the_split_is_a_loader_of_its_own_that_training_never_draws(two_class):
    dls = build(two_class)
    files = list(get_image_files(two_class))
    assert list(dls.test_ds.fields[0]) == files[40:] and list(dls.parts) == ['train', 'valid', 'test'] and len(dls) == 2
    assert not set(dls.train_ds.fields[0]) & set(dls.test_ds.fields[0])
    x, y = next(iter(dls.test))
    assert x.shape == (8, 3, 16, 16) and [dls.vocab[i] for i in y] == [f.parent.name for f in files[40:]]

def test_without_a_third_part_there_is_no_test(two_class): assert build(two_class, splitter=IndexSplitter(range(40, 48))).test is None

def test_new_sizes_and_devices_reach_the_test_split(two_class):
    dls = build(two_class).new(size=24, bs=4)
    assert next(iter(dls.test))[0].shape == (4, 3, 24, 24) and dls.cpu().test.device.type == 'cpu'

def test_a_label_that_only_test_has_is_an_error_at_build(two_class):
    (two_class/'cat'/'cat_0.png').exists()
    with pytest.raises(DataError, match="1 class.*test split.*'new' \\(1\\)"): build(two_class, get_y=lambda p: 'new' if p.name == list(get_image_files(two_class))[47].name else p.parent.name)

def test_validate_names_the_split_that_is_missing(two_class, tiny):
    from blocks import Learner
    learn = Learner(build(two_class, splitter=IndexSplitter(range(40, 48))), tiny())
    with learn.no_bar(), pytest.raises(DataError, match="no split 'test', only 'train', 'valid'.*from_folder"): learn.validate(split='test')

def test_validate_measures_the_split_that_is_named(two_class, tiny):
    from blocks import Learner, accuracy
    learn = Learner(build(two_class), tiny(), metrics=accuracy)
    with learn.no_bar():
        _, acc = learn.validate(split='test')
        p, y = learn.get_preds(split='test')
    assert len(y) == 8 and acc == pytest.approx(float((p.argmax(1) == y).float().mean()))

# --- samplers
def test_a_balanced_sampler_draws_a_rare_class_as_often(two_class):
    rare = block(get_y=lambda p: 'rare' if p.stem in ('cat_0', 'cat_1', 'cat_2') else 'usual')
    dls = rare.dataloaders(two_class, bs=6, seed=1, sampler=WeightedSampler(n=600), **CPU)
    drawn = [dls.train_ds.fields[1][i] for i in dls.train.order(0)]
    assert len(drawn) == 600 == dls.train.n and len(dls.train) == 100 and 240 < drawn.count('rare') < 360
    assert len(dls.train.in_order().order(0)) == 30 and len(dls.valid.order(0)) == 10                    # measuring sees each once

def test_a_sampler_follows_the_seed_and_the_epoch(two_class):
    make = lambda seed: block().dataloaders(two_class, bs=6, seed=seed, sampler=WeightedSampler(), **CPU).train
    assert list(make(1).order(2)) == list(make(1).order(2)) != list(make(1).order(3)) and list(make(1).order(0)) != list(make(2).order(0))

def test_weights_may_be_given_for_classes_and_for_samples(two_class):
    only_cats = block().dataloaders(two_class, bs=6, sampler=WeightedSampler({'cat': 2.}), **CPU)
    assert {only_cats.train_ds.fields[1][i] for i in only_cats.train.order(0)} == {'cat'}
    one = block().dataloaders(two_class, bs=6, sampler=WeightedSampler([0.]*29 + [1.]), **CPU)
    assert set(one.train.order(0)) == {29}

@pytest.mark.parametrize('weights, said', [([1., 2.], '2 weights for 30'), ([-1.]*30, 'from 0 up'), ([0.]*30, 'not all'), ('even', "expected 'balanced'"), ({'cow': 1.}, "'cow' is not one")])
def test_weights_that_do_not_fit_are_said_when_the_loaders_are_built(two_class, weights, said):
    with pytest.raises(DataError, match=said): block().dataloaders(two_class, bs=6, sampler=WeightedSampler(weights), **CPU)

def test_a_sampler_needs_labels(two_class):
    with pytest.raises(DataError, match='RegressionBlock'): block(blocks=(ImageBlock, RegressionBlock), get_y=lambda p: 1.).dataloaders(two_class, bs=6, sampler=WeightedSampler(), **CPU)

# --- counting
def test_the_class_report_counts_each_split(two_class):
    report = build(two_class).class_report()
    assert list(report.index) == ['cat', 'dog'] and list(report.train) == [24, 6] and list(report.valid) == [0, 10] and list(report.test) == [0, 8]
    assert list(report['train share']) == [.8, .2] and list(report['test share']) == [0, 1]

def test_the_class_report_of_several_labels_counts_items_that_have_each(two_class):
    report = build(two_class, blocks=(ImageBlock, MultiCategoryBlock), get_y=lambda p: ['animal', p.parent.name]).class_report()
    assert dict(report.train) == dict(animal=30, cat=24, dog=6) and report.loc['animal', 'train share'] == 1

def test_the_class_report_speaks_readable_names(two_class):
    dls = build(two_class, blocks=(ImageBlock, CategoryBlock(class_names=dict(cat='felis', dog='canis'))))
    assert dict(dls.class_report().train) == dict(canis=6, felis=24)

def test_the_class_report_of_numbers_is_an_error(two_class):
    with pytest.raises(DataError, match='RegressionBlock'): build(two_class, blocks=(ImageBlock, RegressionBlock), get_y=lambda p: 1.).class_report()

def test_plot_classes_draws_a_bar_for_each_class_and_split(two_class):
    ax = build(two_class).plot_classes()
    assert sorted(p.get_width() for p in ax.patches) == [0, 0, 6, 8, 10, 24]

# --- looking
def test_show_augmentations_shows_one_sample_first_as_it_is(two_class, figure):
    dls = build(two_class, batch_tfms=aug_transforms(p_affine=1., p_lighting=1.))
    dls.show_augmentations(4, n=5)
    axes = figure()
    shown = [a.images[0].get_array() for a in axes]
    assert len(axes) == 6 and axes[0].get_title() == 'as it is' and {a.get_title() for a in axes[1:]} == {'cat'}
    plain = dls.train.in_order().samples[4][0].permute(1, 2, 0).numpy()/255
    assert np.allclose(shown[0], plain, atol=1e-6) and all(not np.allclose(o, plain, atol=1e-3) for o in shown[1:])

def test_looking_does_not_change_what_training_sees(two_class):
    a, b = build(two_class, batch_tfms=aug_transforms()), build(two_class, batch_tfms=aug_transforms())
    a.show_augmentations(2)
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(a.train, b.train))

def test_several_labels_share_a_title(two_class, figure):
    both = build(two_class, blocks=(ImageBlock, CategoryBlock, MultiCategoryBlock), n_inp=1, get_y=[parent_label, lambda p: ['animal', p.stem[-1]]])
    both.show_batch(max_n=2)
    assert all(a.get_title().split('\n')[0] in ('cat', 'dog') and 'animal' in a.get_title().split('\n')[1] for a in figure())

# --- several inputs and targets
def test_two_images_and_two_targets(two_class):
    dls = build(two_class, blocks=(ImageBlock, ImageBlock(mode='L'), CategoryBlock, RegressionBlock), n_inp=2, get_x=[lambda p: p, lambda p: p], get_y=[parent_label, lambda p: float(p.stem.split('_')[1])])
    a, b, y, v = dls.one_batch()
    assert a.shape == (8, 3, 16, 16) and b.shape == (8, 1, 16, 16) and y.dtype == torch.int64 and v.dtype == torch.float32 and dls.n_inp == 2
    rgb_as_grey = (a*torch.tensor([.299, .587, .114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert (rgb_as_grey - b).abs().max() < .02                                                          # one draw: both see the same part

# --- boxes as a pair
def pair(**kw): return block(**{**dict(blocks=(ImageBlock, BBoxBlock, BBoxLblBlock), get_y=[lambda p: [[0, 0, 20, 16], [10, 8, 40, 32]], lambda p: [p.parent.name, 'all']], n_inp=1), **kw})

def test_the_pair_of_box_blocks_becomes_one(two_class):
    dls = pair(item_tfms=Resize(16, method='squish')).dataloaders(two_class, bs=8, seed=1, **CPU)
    x, y = dls.one_batch()
    assert y.shape == (8, 2, 5) and torch.allclose(y[0, :, :4], torch.tensor([[-1., -1, 0, 0], [-.5, -.5, 1, 1]]), atol=1e-5)
    assert set(dls.vocab) >= {'all', 'cat', 'dog'} and {dls.vocab[int(i)] for i in y[:, 1, 4]} == {'all'}
    assert pair().new(item_tfms=Resize(8)).blocks == pair().blocks                                       # the template can be copied

def test_a_pair_in_the_wrong_order_or_with_one_function_is_an_error():
    with pytest.raises(DataError, match='right behind'): pair(blocks=(ImageBlock, BBoxLblBlock, BBoxBlock))
    with pytest.raises(DataError, match='a function each'): pair(get_y=lambda p: [[0, 0, 1, 1]])

# --- targets that do not fit are said at build
def test_a_target_that_a_split_has_wrong_is_an_error_at_build_that_names_the_item(two_class):
    last = get_image_files(two_class)[47].name
    wrong = lambda bad, good: lambda p: bad if p.name == last else good
    for blocks, get_y in (((ImageBlock, RegressionBlock), wrong(float('nan'), 1.)), ((ImageBlock, PointBlock), wrong([[1, 2]], [[1, 2], [3, 4]])), ((ImageBlock, RegressionBlock), wrong([1., 2.], 1.))):
        with pytest.raises(ItemError, match=last): build(two_class, blocks=blocks, get_y=get_y)

# --- bad files
def test_skipped_files_are_written_to_a_table(two_class, tmp_path):
    import pandas as pd
    import shutil
    root = shutil.copytree(two_class, tmp_path/'d')
    (root/'cat'/'cat_3.png').write_bytes(b'nothing')
    with pytest.warns(UserWarning, match='1 of 48'): dls = block(splitter=FuncSplitter(lambda p: '7' in p.name)).dataloaders(root, bs=8, on_bad='skip', path=tmp_path/'out', **CPU)
    table = pd.read_csv(tmp_path/'out'/'bad_items.csv')
    assert [o.name for o in dls.bad_items] == ['cat_3.png'] and len(table) == 1 and table.item[0].endswith('cat_3.png') and 'UnidentifiedImageError' in table.problem[0]

def test_nothing_is_written_when_nothing_is_skipped(two_class, tmp_path):
    block().dataloaders(two_class, bs=8, on_bad='skip', path=tmp_path, **CPU)
    assert not list(tmp_path.iterdir())

def test_images_in_memory_keep_their_pixels(two_class):
    arrays = np.stack([np.asarray(Image.open(f)) for f in get_image_files(two_class)])
    from blocks import ImageDataLoaders
    labels = [f.parent.name for f in get_image_files(two_class)]
    for images in (arrays, torch.from_numpy(arrays).permute(0, 3, 1, 2), [Image.fromarray(a) for a in arrays]):
        dls = ImageDataLoaders.from_arrays(images, labels, bs=8, seed=1, **CPU)
        i = list(dls.splits[0])[0]
        assert torch.equal(dls.train_ds[0][0].permute(1, 2, 0), torch.from_numpy(arrays[i])) and dls.vocab[int(dls.train_ds[0][1])] == labels[i]
