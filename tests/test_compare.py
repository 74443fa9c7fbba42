"Every arm gets the same, an arm that fails costs only itself, and nothing outside changes."
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from blocks import Callback, CategoryBlock, DataBlock, DataError, ImageBlock, Learner, MultiCategoryBlock, RandomSplitter, RegressionBlock, Resize, accuracy, aug_transforms, error_rate, get_image_files, parent_label, set_seed
from blocks.train.compare import compare


def body(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
def maker(dls): return Learner(dls, body())
def broken(dls): raise RuntimeError('no such weights\nlook elsewhere')
def one_epoch(learn, n): learn.fit(n)

quiet = dict(bar=False, train=one_epoch, seed=3)

@pytest.fixture
def dls(two_class):
    block = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(16), batch_tfms=aug_transforms())
    return block.dataloaders(two_class, bs=8, num_workers=0, seed=1, device='cpu')

def test_a_row_for_each_in_the_order_given(dls):
    result = compare(dls, {'b': maker, 'a': maker}, 2, **quiet)
    table = result.to_df()
    assert list(table.index) == ['b', 'a'] and list(table)[:3] == ['valid_loss', 'valid_accuracy', 'params (M)'] and len(table.columns) == 5 and result.epochs == 2 and result.seed == 3
    assert all('here' in c for c in table.columns[3:]) and (table.iloc[:, 3:] > 0).all().all() and table['params (M)']['a'] == pytest.approx(sum(p.numel() for p in body().parameters())/1e6)
    assert 'test' not in ' '.join(table.columns) and 'valid_loss' in str(result) and '<table' in result._repr_html_()

def test_each_starts_from_the_same_seed_and_sees_the_same_batches(dls):
    seen = []
    class Watch(Callback):
        def before_fit(self): self.mine = [self.learn.model[5].weight.detach().sum().item()]; seen.append(self.mine)
        def before_batch(self): self.mine.append(float(self.learn.xb[0].sum()))
    def watched(dls): return Learner(dls, body(), cbs=Watch())
    next(iter(dls.train))                                                 # these loaders have been used before
    rows = compare(dls, [watched, watched, watched], 2, **quiet).rows
    assert seen[0] == seen[1] == seen[2] and [r['arch'] for r in rows] == ['watched', 'watched_2', 'watched_3'] and len({r['valid_loss'] for r in rows}) == 1
    assert compare(dls, [watched], 2, **{**quiet, 'seed': 4}).rows[0]['valid_loss'] != rows[0]['valid_loss']
    set_seed(3)
    assert compare(dls, [watched], 2, bar=False, train=one_epoch).rows[0]['valid_loss'] == rows[0]['valid_loss']

def test_nothing_outside_changes(dls):
    epoch, before = dls.train.epoch, (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    def greedy(dls): random.random(); np.random.rand(); return Learner(dls, nn.Sequential(body(), nn.Dropout(.5)))
    compare(dls, [greedy, broken], 1, **quiet)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1] and torch.equal(torch.get_rng_state(), before[2]) and dls.train.epoch == epoch

def test_the_scores_are_those_of_the_last_epoch(dls):
    result = compare(dls, [maker], 3, keep=True, **quiet)
    learn = result.learners['maker']
    assert [result.rows[0][k] for k in ('valid_loss', 'valid_accuracy')] == learn.recorder.values[-1][1:] and len(learn.recorder.values) == 3
    assert learn.validate()[0] == pytest.approx(result.rows[0]['valid_loss'], abs=1e-5)

def test_one_that_fails_does_not_lose_the_others(dls):
    def stops(dls):
        class Stop(Callback):
            def after_step(self): raise ValueError('in the middle')
        return Learner(dls, body(), cbs=Stop())
    table = compare(dls, [maker, broken, stops, maker], 1, **quiet).to_df()
    assert table.error['broken'] == 'RuntimeError: no such weights' and table.error['stops'] == 'ValueError: in the middle' and table.error[['maker', 'maker_2']].isna().all()
    assert table.valid_loss['maker'] == table.valid_loss['maker_2'] and table.valid_loss[['broken', 'stops']].isna().all()
    with pytest.raises(RuntimeError, match='no such weights'): compare(dls, [broken, stops], 1, **quiet)

def test_learners_go_unless_they_are_kept(dls):
    alive = []
    def known(dls): alive.append(weakref.ref(learn := Learner(dls, body()))); return learn
    result = compare(dls, [known, known], 1, **quiet)
    gc.collect()
    assert not result.learners and not any(r() for r in alive)
    assert list(compare(dls, [known], 1, keep=True, **quiet).learners) == ['known'] and alive[-1]() is not None

@pytest.mark.parametrize('block, get_y, name', [(CategoryBlock, parent_label, 'valid_accuracy'), (MultiCategoryBlock, lambda p: [parent_label(p)], 'valid_accuracy_multi'), (RegressionBlock(n_out=2), lambda p: (1., 2.), 'valid_mae')])
def test_metrics_that_fit_the_target(two_class, block, get_y, name):
    dls = DataBlock((ImageBlock, block), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(16)).dataloaders(two_class, bs=8, num_workers=0, device='cpu')
    assert list(compare(dls, [maker], 1, **quiet).to_df())[1] == name

def test_metrics_of_your_own(dls):
    def own(dls): return Learner(dls, body(), metrics=[error_rate])
    table = compare(dls, [own, maker], 1, metrics=accuracy, **quiet).to_df()
    assert table.valid_error_rate['own'] >= 0 and np.isnan(table.valid_accuracy['own']) and table.valid_accuracy['maker'] >= 0
    assert list(table.columns)[:3] == ['valid_loss', 'valid_error_rate', 'valid_accuracy']

def test_architectures_by_name_and_function_with_the_usual_training(dls):
    from torchvision.models import mobilenet_v3_small
    result = compare(dls, ['lcnet_035', mobilenet_v3_small], 1, lr=1e-3, seed=1, bar=False, keep=True, pretrained=False, lin_ftrs=[8])
    assert list(result.to_df().index) == ['lcnet_035', 'mobilenet_v3_small'] and not any('error' in r for r in result.rows)
    assert len(result.learners['lcnet_035'].recorder.values) == 1 and result.learners['lcnet_035'].lr == 1e-3 and result.learners['lcnet_035'].model[1][-1].in_features == 8

def test_what_cannot_be_compared_is_said(dls):
    with pytest.raises(DataError, match='no architecture'): compare(dls, [], 1)
    with pytest.raises(DataError, match='return a Learner'): compare(dls, [lambda dls: 3], 1)
    with pytest.raises(DataError, match='not trained'): compare(dls, [maker], 1, train=lambda learn, n: None, bar=False)
    with pytest.raises(TypeError, match='pretraned'): compare(dls, 'resnet18', 1, pretraned=False)

def test_each_training_is_shown_under_its_name(dls, capsys):
    compare(dls, [maker], 1, train=one_epoch, seed=1)
    assert 'maker' in capsys.readouterr().out
    compare(dls, [maker], 1, **quiet)
    assert capsys.readouterr().out == ''
