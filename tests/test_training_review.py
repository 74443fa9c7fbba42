"What users combine: resuming with strategies, measuring in the middle of a fit, float16 with cancelled steps"
import random
import numpy as np, pytest, torch
from torch import nn
from blocks.core import TrainingError, set_seed
from blocks.data.datablock import DataBlock
from blocks.data.frame import Resize
from blocks.data.source import RandomSplitter, get_image_files, parent_label
from blocks.train.callback import Callback, CancelFitException, CancelStepException, EarlyStoppingCallback, GradientAccumulation, ReduceLROnPlateau, SaveModelCallback
from blocks.train.average import SWACallback
from blocks.train.checkpoint import CheckpointCallback
from blocks.train.learner import Learner
from blocks.train.metric import accuracy
from blocks.train.scheduling import TorchScheduler

class Cut(Callback):
    "Breaks the fit off before training batch number `at`"
    order = -90
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.learn.training and self.learn.epoch*self.learn.n_iter + self.learn.iter == self.at: raise KeyboardInterrupt

@pytest.fixture
def make(dls, tiny, tmp_path):
    def make(loaders=None, model=None, **kw):
        set_seed(3)
        learn = Learner(loaders or dls.new(), model or tiny(), path=tmp_path, **{'precision': 'fp32', 'metrics': accuracy, 'splitter': lambda m: [list(m[:5].parameters()), list(m[5:].parameters())], **kw})
        learn.remove_cbs(learn.progress)
        return learn
    return make

def cut_off(learn, at, every, cbs=(), **kw):
    with pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-2, cbs=[CheckpointCallback(every), Cut(at), *cbs], **kw)

def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert a.recorder.values == b.recorder.values and a.frozen == b.frozen
    assert [p.requires_grad for p in a.model.parameters()] == [p.requires_grad for p in b.model.parameters()]

@pytest.mark.parametrize('strategy', [('freeze_unfreeze', 1), ('unfreeze_milestones', ((1, 2), 1))])
@pytest.mark.parametrize('epoch', [1, 2])
def test_layers_thaw_also_in_the_epoch_that_a_resumed_fit_begins_with(make, strategy, epoch):
    whole = make(); whole.fit(3, 1e-2, strategy=strategy)
    cut_off(make(), epoch*len(whole.dls.train) + 1, 'epoch', strategy=strategy)
    again = make(); again.resume(cbs=None); same(whole, again)

def test_what_callbacks_do_at_the_start_of_an_epoch_is_done_in_a_resumed_one(make):
    class Start(Callback):
        def __init__(self): self.drawn = []
        def before_epoch(self):
            self.drawn.append(random.random())
            for g in self.learn.opt.param_groups: g['lr'] = 1e-2/(1 + self.learn.epoch)
    a, b = Start(), Start()
    whole = make(); whole.fit(3, 1e-2, cbs=a)
    cut_off(make(), len(whole.dls.train) + 1, 'epoch', [Start()])
    again = make(); again.resume(cbs=b)
    assert b.drawn == a.drawn[1:] and again.recorder.lrs == whole.recorder.lrs; same(whole, again)

@pytest.mark.parametrize('event', ['before_validate', 'after_validate', 'after_epoch'])
@pytest.mark.parametrize('order', [0, 51])
def test_measuring_another_split_leaves_the_scores_of_the_epoch(make, event, order):
    class Look(Callback):
        def __init__(self): self.order = order; self.busy = False; setattr(self, event, self.look)
        def look(self):
            if self.busy: return
            self.busy = True; self.learn.validate(0); self.busy = False
    def items(pred, y): return float(len(y))
    plain, looked = make(metrics=items), make(metrics=items)
    plain.fit(1, 1e-2); looked.fit(1, 1e-2, cbs=Look())
    assert plain.recorder.values == looked.recorder.values

@pytest.mark.parametrize('error', [CancelStepException, ValueError])
def test_float16_goes_on_after_a_step_that_was_not_made(make, error):
    class Once(Callback):
        order, done = 5, False
        def before_step(self):
            if not self.done: self.done = True; raise error
    learn = make(precision='fp16')
    try: learn.fit(1, 1e-2, cbs=Once())
    except ValueError: pass
    learn.fit(1, 1e-2)
    assert len(learn.recorder.losses) == len(learn.dls.train)

def test_everything_can_be_saved_before_the_first_fit(make):
    make().save('x', full=True); make().resume('x').fit(1, 1e-2)

def test_float16_between_two_fits_in_a_fresh_learner(make):
    a = make(precision='fp16'); a.fit(1, 1e-2); a.save('x', full=True)
    a.fit(1, 1e-2)
    b = make(precision='fp16').resume('x'); b.fit(1, 1e-2); same(a, b)

@pytest.mark.parametrize('cb', [EarlyStoppingCallback, SaveModelCallback, ReduceLROnPlateau])
def test_watching_a_validation_that_does_not_happen_is_said_before_the_fit(make, two_class, cb):
    block = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(0.), item_tfms=Resize(16))
    learn = make(loaders=block.dataloaders(two_class, bs=8, num_workers=0, device='cpu'))
    with pytest.raises(TrainingError, match='validation'): learn.fit(3, 1e-2, cbs=cb())

def test_a_scheduler_puts_the_momentum_back_also_after_a_resume(make):
    sched = lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, 99)
    whole = make(); whole.fit(3, 1e-2, sched=sched, sched_every='batch')
    cut_off(make(), 6, 2, sched=sched, sched_every='batch')
    again = make(); again.resume(sched=sched, cbs=None)
    assert again.opt.param_groups[0]['betas'] == whole.opt.param_groups[0]['betas']

def test_several_outputs_for_several_targets(make, tiny, dls):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.m = tiny()
        def forward(self, x): return self.m(x), self.m(x)
    learn = make(model=Two(), metrics=None, splitter=lambda m: [list(m.parameters())], loss_func=lambda p, y: nn.functional.cross_entropy(p[0] + p[1], y))
    learn.fit(1, 1e-2); assert learn.recorder.values[0][1] is not None

def test_the_search_leaves_out_schedulers_of_the_learner(make):
    make(cbs=TorchScheduler(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1))).lr_find(show_plot=False, num_it=12)

def test_a_time_limit_is_for_all_stages_together(make):
    class Count(Callback):
        steps = 0
        def after_step(self): self.steps += 1
    count = Count(); make(cbs=count).fit_progressive([(12, 1), (16, 1)], 1e-2, max_minutes=1e-9)
    assert count.steps == 1                                                 # the second stage has no time left

@pytest.mark.parametrize('lr', [np.float64(1e-2), np.float32(1e-2), slice(np.float64(1e-3), np.float64(1e-2)), np.array([1e-3, 1e-2])])
def test_rates_of_numpy_in_a_checkpoint(make, lr):
    with pytest.raises(KeyboardInterrupt): make().fit_one_cycle(2, lr, cbs=[CheckpointCallback(1), Cut(6)])
    make().resume(cbs=None)

def test_callbacks_given_as_classes_come_back(make):
    with pytest.raises(KeyboardInterrupt): make(cbs=Cut(6)).fit(2, cbs=[CheckpointCallback, GradientAccumulation])
    make().resume()

def test_what_ran_out_of_time_can_be_resumed(make):
    whole = make(); whole.fit(2, 1e-2)
    make().fit(2, 1e-2, max_minutes=1e-9, cbs=CheckpointCallback())
    again = make(); again.resume(max_minutes=9); same(whole, again)

def test_the_mean_of_a_resumed_fit_that_is_cancelled_at_once(make):
    class Stop(Callback):
        def before_batch(self):
            if self.learn.training: raise CancelFitException
    with pytest.raises(KeyboardInterrupt): make().fit(5, 1e-2, cbs=[SWACallback(0.), CheckpointCallback(), Cut(13)])
    make().resume(cbs=[SWACallback(0.), Stop()])

def test_loaders_that_changed_are_said(make, dls):
    cut_off(make(), 5, 2)
    with pytest.raises(TrainingError, match='bs|batch'): make(loaders=dls.new(bs=6)).resume(cbs=None)

def test_an_infinite_buffer_of_the_model_is_no_broken_weight(make, tiny):
    model = tiny(); model.register_buffer('mask', torch.full((2,), -torch.inf))
    make(model=model).fit(1, 1e-2)
