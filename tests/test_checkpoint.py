"An interrupted fit that goes on has to end where an uninterrupted one does"
import random
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from blocks.core import TrainingError, set_seed
from blocks.data.augment import aug_transforms
from blocks.data.block import ImageBlock
from blocks.data.datablock import DataBlock
from blocks.data.frame import RandomResizedCrop
from blocks.data.label import CategoryBlock
from blocks.data.source import RandomSplitter
from blocks.train.callback import (Callback, EarlyStoppingCallback, GradientAccumulation, GradientClip, ReduceLROnPlateau, SaveModelCallback)
from blocks.train.checkpoint import CheckpointCallback
from blocks.train.learner import Learner
from blocks.train.metric import accuracy
from blocks.train.mix import MixUp

class PowerCut(Callback):
    "Ends the process, as far as a test can, before training batch number `at` of the whole fit number `fit`"
    order = -90
    def __init__(self, at, fit=0): self.at, self.fit, self.fits, self.seen = at, fit, -1, 0
    def before_fit(self): self.fits += 1; self.seen = 0
    def before_batch(self):
        if not self.learn.training: return
        if self.fits == self.fit and self.seen == self.at: raise KeyboardInterrupt
        self.seen += 1

class Draws(Callback):
    "A user's callback that uses all three global generators"
    def __init__(self): self.drawn = []
    def before_batch(self):
        if self.learn.training: self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    def state_dict(self): return dict(drawn=[list(o) for o in self.drawn])
    def load_state_dict(self, state): self.drawn = [tuple(o) for o in state['drawn']]

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i in range(26): Image.fromarray((rng.random((20, 20, 3))*120 + 100*(i % 2)).astype(np.uint8)).save(folder/f'{i}.png')
    return folder

@pytest.fixture()
def make(pictures, tmp_path):
    "A learner as a script would make it at its start"
    def make(**kw):
        set_seed(3)
        block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(p.iterdir()), get_y=lambda p: int(p.stem) % 2, splitter=RandomSplitter(.3, seed=0), item_tfms=RandomResizedCrop(16), batch_tfms=aug_transforms())
        body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        learn = Learner(block.dataloaders(pictures, bs=4, num_workers=0, seed=1), nn.Sequential(body, nn.Sequential(nn.Dropout(.4), nn.Linear(4, 2))), metrics=accuracy, path=tmp_path,
                        splitter=lambda m: [list(o.parameters()) for o in m], **{'precision': 'fp32', **kw})
        learn.remove_cbs(learn.progress)
        return learn
    return make

def interrupted(learn, train, cut, cbs, every):
    with pytest.raises(KeyboardInterrupt): train(learn, [*cbs, CheckpointCallback(every), cut])

def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert a.recorder.values == b.recorder.values and a.recorder.losses == b.recorder.losses and a.recorder.lrs == b.recorder.lrs and a.recorder.moms == b.recorder.moms
    assert a.passes == b.passes and len(a.recorder.times) == len(b.recorder.times)

TRAIN = dict(fit=lambda l, cbs: l.fit(3, 1e-2, cbs=cbs), one_cycle=lambda l, cbs: l.fit_one_cycle(3, slice(1e-3, 1e-2), cbs=cbs), flat=lambda l, cbs: l.fit_flat_cos(3, 1e-2, cbs=cbs),
             sgdr=lambda l, cbs: l.fit_sgdr(2, 1, 1e-2, cbs=cbs), strategy=lambda l, cbs: l.fit(3, 1e-2, strategy=('freeze_unfreeze', 2), cbs=cbs))

@pytest.mark.parametrize('every', ['epoch', 1, 3])
@pytest.mark.parametrize('train', list(TRAIN))
def test_every_way_to_train_goes_on_as_if_uninterrupted(make, train, every):
    cbs = lambda: [GradientClip(.5), MixUp(.4)]
    whole = make(); TRAIN[train](whole, cbs())
    interrupted(make(), TRAIN[train], PowerCut(7), cbs(), every)              # in the second epoch of 4 batches
    again = make(); again.resume(cbs=cbs())
    same(whole, again)

@pytest.mark.parametrize('fit,at', [(0, 2), (1, 0), (1, 3), (1, 5)])
def test_fine_tune_goes_on_in_the_fit_that_was_cut(make, fit, at):
    whole = make(); whole.fine_tune(2, 1e-2)
    interrupted(make(), lambda l, cbs: l.fine_tune(2, 1e-2, cbs=cbs), PowerCut(at, fit), [], 1)
    again = make(); again.resume(cbs=None)
    same(whole, again)

def test_accumulated_gradients_go_on(make):
    train = lambda l, cbs: l.fit(3, 1e-2, cbs=cbs)
    whole = make(); train(whole, GradientAccumulation(11))
    interrupted(make(), train, PowerCut(6), [GradientAccumulation(11)], 1)
    again = make(); again.resume(cbs=GradientAccumulation(11))
    same(whole, again)

def test_a_scheduler_of_pytorch_is_given_again(make):
    sched = lambda opt: torch.optim.lr_scheduler.StepLR(opt, 5, .3)
    train = lambda l, cbs: l.fit(3, 1e-2, sched=sched, sched_every='batch', cbs=cbs)
    whole = make(); train(whole, [])
    cut = make(); interrupted(cut, train, PowerCut(7), [], 3)
    with pytest.raises(TrainingError, match=r'sched=<lambda>.*resume\(sched='): make().resume(cbs=None)
    again = make(); again.resume(sched=sched, cbs=None); same(whole, again)
    cut.resume(cbs=None); same(whole, cut)                                      # the same learner still has it

def test_callbacks_of_the_library_come_back_by_themselves(make):
    cbs = lambda: [SaveModelCallback('accuracy', fname='best'), EarlyStoppingCallback(patience=9), CheckpointCallback(2)]
    whole = make(); whole.fit(3, 1e-2, cbs=cbs())
    cut = make(cbs=PowerCut(7))
    with pytest.raises(KeyboardInterrupt): cut.fit(3, 1e-2, cbs=cbs())
    again = make(); again.resume(); same(whole, again)

def test_watchers_keep_what_they_have_seen(make):
    class Steer(Callback):
        order = 51
        def after_epoch(self): self.learn.recorder.values[-1][1] = [1., 2., 3., 4., 5.][self.learn.epoch]
    train = lambda l, cbs: l.fit(5, 1e-2, cbs=cbs)
    cbs = lambda: [Steer(), ReduceLROnPlateau(patience=3)]
    whole = make(); train(whole, cbs())
    interrupted(make(), train, PowerCut(9), cbs(), 'epoch')
    again = make(); again.resume(cbs=cbs())
    same(whole, again); assert again.recorder.lrs[-1] == pytest.approx(1e-3)

def test_the_global_generators_go_on(make):
    train = lambda l, cbs: l.fit(2, 1e-2, cbs=cbs)
    a = Draws(); whole = make(); train(whole, a)
    interrupted(make(), train, PowerCut(6), [Draws()], 1)
    b = Draws(); again = make()
    random.seed(9); np.random.seed(9); torch.manual_seed(9)
    again.resume(cbs=b)
    assert a.drawn == b.drawn and len(a.drawn) == 8; same(whole, again)

def test_a_fit_that_was_complete_ends_the_same(make):
    whole = make(); whole.fit(2, 1e-2, cbs=[SaveModelCallback(), CheckpointCallback()])
    again = make(); again.resume(); same(whole, again)

def test_after_a_fit_the_file_brings_everything_back(make):
    a = make(); a.fit(1, 1e-2); a.save('full', full=True); a.fit(1, 1e-3)
    b = make(); b.resume('full'); assert len(b.recorder.values) == 1; b.fit(1, 1e-3); same(a, b)

def test_a_full_file_can_be_loaded_as_weights(make):
    a = make(); a.fit(1, 1e-2); a.save('full', full=True)
    b = make(); b.load('full')
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))

def test_float16_goes_on_with_its_scale(make):
    train = lambda l, cbs: l.fit(3, 1e-2, cbs=cbs)
    whole = make(precision='fp16'); train(whole, [])
    interrupted(make(precision='fp16'), train, PowerCut(7), [], 3)
    again = make(precision='fp16'); again.resume(cbs=None); same(whole, again)
    assert whole.scaler.state_dict() == again.scaler.state_dict() and whole.scaler.get_scale() > 1

def test_what_cannot_be_resumed_is_said(make):
    learn = make(); learn.fit(1, 1e-2); learn.save('weights')
    with pytest.raises(TrainingError, match='full=True'): learn.resume('weights')
    with pytest.raises(TrainingError, match='no file'): learn.resume()
    class Early(Callback):
        def after_step(self): self.learn.save('early', full=True)
    with pytest.raises(TrainingError, match='after_batch'): learn.fit(1, cbs=Early)
    class Odd(Callback):
        def state_dict(self): return dict(f=print)
    with pytest.raises(TrainingError, match='Odd'): learn.fit(1, cbs=[Odd, CheckpointCallback()])
    interrupted(make(), lambda l, cbs: l.fit(3, cbs=cbs), PowerCut(5), [GradientAccumulation(4)], 1)
    with pytest.raises(TrainingError, match='GradientAccumulation.*as before'): make().resume(cbs=None)
    for every in (0, 'step', 1.5):
        with pytest.raises(TrainingError, match='every='): CheckpointCallback(every)

def test_reading_a_checkpoint_runs_no_code(make, tmp_path):
    learn = make(); learn.fit(1, 1e-2, cbs=CheckpointCallback())
    file = tmp_path/'models'/'checkpoint.pth'
    state = torch.load(file, weights_only=True)
    state['recipe']['args']['cbs'] = dict(callback='Popen', module='subprocess', made_with=((['touch', str(tmp_path/'owned')],), {}))
    torch.save(state, file)
    with pytest.raises(TrainingError, match='Popen'): make().resume()
    assert not (tmp_path/'owned').exists()

def test_the_search_for_a_rate_leaves_the_recipe(make):
    learn = make(); learn.fit(1, 1e-2); recipe = learn.recipe
    learn.lr_find(num_it=8, show_plot=False, suggest_funcs=None)
    assert learn.recipe is recipe
