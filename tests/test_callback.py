"The events of the loop, what stops it, and the callbacks that watch it."
import math
import operator

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from blocks import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException,
                    CancelValidException, EarlyStoppingCallback, Learner, SaveModelCallback, TrackerCallback, accuracy)
from blocks.core import TrainingError
from blocks.data.block import Block
from blocks.data.datablock import DataBlock
from blocks.data.label import CategoryBlock
from blocks.data.source import IndexSplitter
from blocks.train.callback import EVENTS, GradientAccumulation, GradientClip, ReduceLROnPlateau, ShortEpochCallback, check_callback


class At(Callback):
    "Does something at one event, while a condition holds; `seen` lists all events, and is kept to the end"
    def __init__(self, event, do, when=lambda learn: True, order=0): self.event, self.do, self.when, self.seen, self.order = event, do, when, [], order
    def hear(self, event):
        self.seen.append(event)
        if event == self.event and self.when(self.learn): self.do(self.learn)

for _event in EVENTS:
    if not _event.startswith(('after_cancel', 'after_create')): setattr(At, _event, lambda self, event=_event: self.hear(event))

@dataclass(frozen=True)
class NumbersBlock(Block):
    "Inputs that are tensors already, by their name"
    raws: dict
    def read(self, raw, frame): return self.raws[raw]

def throw(e):
    def do(learn): raise e
    return do

def training(learn): return learn.training

@pytest.fixture
def learn(dls, tiny, tmp_path):
    learn = Learner(dls, tiny(), metrics=accuracy, path=tmp_path)
    learn.remove_cbs(learn.progress)
    return learn

def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def equal(a, b): return all(torch.equal(a[k], b[k]) for k in a)

BATCH = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch']
VALID = ['before_validate', *(['before_batch', 'after_pred', 'after_loss', 'after_batch']*2), 'after_validate']

# --- order
def test_the_events_in_order(learn):
    spy = At(None, None)
    learn.fit(2, cbs=spy)
    assert spy.seen == ['before_fit', *(['before_epoch', 'before_train', *BATCH*4, 'after_train', *VALID, 'after_epoch']*2), 'after_fit']

def test_validate_fires_its_own_events_only(learn):
    spy = At(None, None)
    learn.validate(cbs=spy)
    assert spy.seen == VALID

def test_callbacks_run_by_order_then_as_they_came(learn):
    said = []
    cbs = [type(f'C{i}', (Callback,), dict(order=order, before_fit=lambda self, i=i: said.append(i)))() for i, order in enumerate((5, -3, 5, 0))]
    learn.fit(1, cbs=cbs)
    assert said == [1, 3, 0, 2]

def test_a_callback_of_one_fit_is_gone_after_it_also_after_an_error(learn):
    before = list(learn.cbs)
    learn.fit(1, cbs=Callback())
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=At('after_loss', throw(ZeroDivisionError())))
    assert learn.cbs == before

# --- cancelling
def test_cancel_fit_in_a_batch_ends_the_fit_there(learn):
    spy = At('after_loss', throw(CancelFitException()), lambda l: l.iter == 1)
    learn.fit(3, cbs=spy)
    assert spy.seen[-2:] == ['after_loss', 'after_fit'] and spy.seen.count('before_epoch') == 1 and len(learn.recorder.losses) == 1 and len(learn.recorder.values) == 0

def test_cancel_epoch_goes_on_with_the_next(learn):
    spy = At('before_batch', throw(CancelEpochException()), lambda l: l.epoch == 0 and l.iter == 2)
    learn.fit(2, cbs=spy)
    assert spy.seen.count('after_epoch') == 2 and spy.seen.count('before_validate') == 1 and len(learn.recorder.values) == 2

def test_cancel_epoch_keeps_the_losses_of_the_steps_that_were_done(learn):
    learn.fit(2, cbs=At('before_batch', throw(CancelEpochException()), lambda l: l.epoch == 0 and l.iter == 2))
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == 2 + 4

def test_an_epoch_without_validation_does_not_repeat_the_values_of_the_last_one(learn):
    learn.fit(2, cbs=At('before_batch', throw(CancelEpochException()), lambda l: l.epoch == 1 and l.training))
    assert learn.recorder.values[0][1] is not None and list(learn.recorder.values[1][1:]) == [None, None]

def test_cancel_train_still_validates(learn):
    spy = At('before_batch', throw(CancelTrainException()), lambda l: l.training and l.iter == 1)
    learn.fit(1, cbs=spy)
    assert spy.seen.count('after_step') == 1 and spy.seen[-len(VALID)-4:-len(VALID)-2] == ['before_batch', 'after_train']
    assert spy.seen[-3:] == ['after_validate', 'after_epoch', 'after_fit'] and len(learn.recorder.losses) == 1 and learn.recorder.values[0][1] is not None

def test_cancel_valid_ends_validation_only(learn):
    spy = At('before_batch', throw(CancelValidException()), lambda l: not l.training and l.iter == 1)
    learn.fit(2, cbs=spy)
    assert spy.seen.count('after_validate') == spy.seen.count('after_epoch') == 2 and len(learn.recorder.losses) == 8

def test_cancel_batch_skips_one_step(learn):
    spy = At('after_pred', throw(CancelBatchException()), lambda l: l.training and l.iter == 1)
    learn.fit(1, cbs=spy)
    assert spy.seen.count('after_step') == 3 and spy.seen.count('after_batch') == 6 and len(learn.recorder.losses) == 3

def test_cancel_backward_leaves_the_weights(learn):
    spy, before = At('before_backward', throw(CancelBackwardException())), dict(learn.model.named_parameters())
    before = {k: v.clone() for k, v in before.items()}
    learn.fit(1, 1e-1, cbs=spy)
    assert 'after_backward' not in spy.seen and all(torch.equal(v, before[k]) for k, v in learn.model.named_parameters())

def test_cancel_step_leaves_the_weights_and_clears_the_gradients(learn):
    before = {k: v.clone() for k, v in learn.model.named_parameters()}
    learn.fit(1, 1e-1, cbs=At('before_step', throw(CancelStepException())))
    assert all(torch.equal(v, before[k]) and v.grad is None for k, v in learn.model.named_parameters())

@pytest.mark.parametrize('event,e', [('before_epoch', CancelEpochException), ('before_train', CancelTrainException), ('before_validate', CancelValidException),
                                     ('before_train', CancelEpochException), ('after_train', CancelEpochException), ('before_fit', CancelFitException), ('after_epoch', CancelFitException)])
def test_cancelling_at_the_edges(learn, event, e):
    spy = At(event, throw(e()))
    learn.fit(2, cbs=[spy, TrackerCallback()])
    assert spy.seen[-1] == 'after_fit'

# --- errors and interrupts
@pytest.mark.parametrize('error', [KeyboardInterrupt, ZeroDivisionError])
def test_after_fit_comes_also_after_an_error_and_an_interrupt(learn, error):
    spy = At('after_loss', throw(error()), lambda l: l.training and l.iter == 2)
    with pytest.raises(error): learn.fit(1, cbs=spy)
    assert spy.seen[-1] == 'after_fit'                                   # as the docstring of Callback.after_fit says

def test_a_method_that_looks_like_an_event_is_an_error_an_attribute_is_not():
    class Typo(Callback):
        def after_batches(self): pass
    class Holder(Callback):
        def __init__(self): self.before_weights = []
    with pytest.raises(TrainingError, match="'after_batches'.*before_fit"): check_callback(Typo)
    assert isinstance(check_callback(Holder()), Holder)

@pytest.mark.parametrize('no_cb', ['x', 3, len])
def test_what_is_no_callback_is_an_error(dls, tiny, no_cb):
    with pytest.raises(TrainingError, match='expected a Callback'): Learner(dls, tiny(), cbs=no_cb)

# --- not finite
def poison(learn):
    for p in learn.model.parameters(): p.data.fill_(math.nan)

def test_nan_stops_and_names_epoch_and_step(learn):
    with pytest.raises(TrainingError, match=r'not finite \(nan\) in epoch 1, step 3 of 4') as e: learn.fit(3, cbs=At('after_step', poison, lambda l: l.epoch == 1 and l.iter == 1))
    assert any('step 3 of 4' in note for note in e.value.__notes__) and len(learn.recorder.values) == 1      # the third step is the first that sees the poison

def test_the_last_good_weights_are_back_when_a_step_has_broken_them(learn):
    kept = {}
    def note(l): kept.update(weights(l))
    with pytest.raises(TrainingError, match='last good weights') as e:
        learn.fit(3, cbs=[At('before_fit', note), At('after_step', poison, lambda l: l.epoch == 0 and l.iter == 1)])
    assert all(torch.equal(p, kept[k]) for k, p in learn.model.named_parameters()) and 'step 3 of 4' in str(e.value)       # of the first look, before the first step
    learn.fit(1, 1e-3); assert all(map(math.isfinite, learn.recorder.losses))           # the optimizer has nothing of it left

def test_weights_broken_by_the_last_step_of_an_epoch_are_found(learn):
    with pytest.raises(TrainingError, match='weights are not finite.*epoch 0, step 4 of 4'): learn.fit(1, cbs=At('after_step', poison, lambda l: l.iter == 3))
    assert all(bool(torch.isfinite(v).all()) for v in learn.model.state_dict().values())

def test_a_loss_that_is_not_finite_leaves_good_weights_as_they_are(learn):
    before = {}
    def infinite(l): before.update(weights(l)); l.loss = l.loss*math.inf
    with pytest.raises(TrainingError, match='keeps its weights'): learn.fit(1, cbs=At('after_loss', infinite, lambda l: l.training and l.iter == 2, order=-30))
    assert equal(weights(learn), before)

def test_the_items_of_the_batch_are_named_and_the_bad_one_among_them(two_class, tiny, tmp_path):
    bad = torch.ones(3, 8, 8); bad[1, 2, 3] = math.inf
    raws = {f'item{i}': torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(7)} | {'item7': bad}
    block = DataBlock((NumbersBlock(raws), CategoryBlock), get_items=lambda _: list(raws), get_y=lambda k: int(k[4:]) % 2, splitter=IndexSplitter([0]))
    learn = Learner(block.dataloaders(None, bs=3, num_workers=0, seed=1, drop_last=False), nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), path=tmp_path, precision='fp32')
    with pytest.raises(TrainingError, match='not finite') as e, learn.no_bar(): learn.fit(1)
    order = [f'item{i + 1}' for i in learn.dls.train.order(0)]
    k = order.index('item7')//3
    named = str(e.value).split('items of the batch: ')[1].split('\n')[0]
    assert named == ', '.join(order[3*k:3*k+3]) and 'input 1 of item7 is not finite' in str(e.value)

def test_running_statistics_that_the_very_first_step_spoils_are_as_before(dls, tmp_path):
    learn = Learner(dls, nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), path=tmp_path)
    def endless(l): l.xb = tuple(x/0 for x in l.xb)
    before = weights(learn)
    with pytest.raises(TrainingError, match='last good weights.*step 1 of|step 1 of.*last good weights'), learn.no_bar(): learn.fit(1, cbs=At('before_batch', endless))
    assert equal(weights(learn), before)

def test_nan_in_validation_alone_goes_on(learn):
    learn.fit(1, cbs=At('after_pred', lambda l: setattr(l, 'pred', l.pred*math.nan), lambda l: not l.training))
    assert math.isnan(learn.recorder.values[0][1])

# --- watching
class Steer(Callback):
    "Gives each epoch a validation loss of one's choice, and marks the weights with the epoch"
    order = 51
    def __init__(self, losses): self.losses = losses
    def after_epoch(self):
        self.learn.recorder.values[-1][1] = self.losses[self.learn.epoch]
        torch.nn.init.constant_(self.learn.model[-1].bias, self.learn.epoch)

def marked(learn): return int(learn.model[-1].bias[0])

def test_saving_restores_the_best(learn):
    learn.fit(4, cbs=[Steer([3., 1., 2., 4.]), SaveModelCallback()])
    assert marked(learn) == 1 and (learn.path/'models'/'model.pth').is_file()

def test_saving_every_epoch(learn):
    learn.fit(2, cbs=[Steer([3., 4.]), SaveModelCallback(fname='e', every_epoch=True)])
    assert {f.name for f in (learn.path/'models').iterdir()} == {'e.pth', 'e_0.pth', 'e_1.pth'}

def test_the_best_of_an_earlier_fit_comes_back_when_asked(learn):
    cb = SaveModelCallback(reset_on_fit=False)
    learn.fit(2, cbs=[Steer([3., 1.]), cb])
    learn.fit(1, cbs=[Steer([2.]), cb])
    assert marked(learn) == 1

@pytest.mark.parametrize('patience,epochs', [(1, 3), (2, 5)])
def test_early_stopping(learn, capsys, patience, epochs):
    learn.add_cbs(learn.progress)                                        # what it says is shown where progress is
    learn.fit(6, cbs=[Steer([3., 2., 2.5, 1., 4., 5.] if patience == 1 else [3., 2., 2.5, 1.9999, 4., 5.]), EarlyStoppingCallback(patience=patience, min_delta=.01)])
    assert len(learn.recorder.values) == (3 if patience == 1 else 4)
    assert 'since epoch 1' in capsys.readouterr().out

@pytest.mark.parametrize('turned', [False, True])
def test_saving_and_early_stopping_in_both_orders(learn, turned):
    cbs = [EarlyStoppingCallback(patience=1), SaveModelCallback()]
    learn.fit(5, cbs=[Steer([3., 1., 2., 0., 0.]), *(cbs[::-1] if turned else cbs)])
    assert len(learn.recorder.values) == 3 and marked(learn) == 1

def test_higher_is_better_for_a_metric_and_lower_for_an_error():
    assert TrackerCallback(monitor='accuracy').comp(2., 1.) and TrackerCallback(monitor='error_rate').comp(1., 2.) and TrackerCallback(comp=operator.gt).lower is False

@pytest.mark.parametrize('cls', [EarlyStoppingCallback, SaveModelCallback])
def test_an_unknown_column_is_an_error_that_lists_them(learn, cls):
    with pytest.raises(TrainingError, match="'acc'.*train_loss, valid_loss, accuracy") as e: learn.fit(1, cbs=cls(monitor='acc'))
    assert not getattr(e.value, '__notes__', [])                         # no step has been taken yet

def test_an_unknown_column_loses_no_records_of_the_fit_before_and_names_no_step_of_it(learn):
    learn.fit(1)
    with pytest.raises(TrainingError) as e: learn.fit(1, cbs=EarlyStoppingCallback(monitor='acc'))
    assert not getattr(e.value, '__notes__', [])
    assert len(learn.recorder.values) == 1

def test_watching_an_epoch_without_a_value_is_no_step_forward(learn):
    cb = TrackerCallback()
    learn.fit(1, cbs=[cb, At('before_validate', throw(CancelValidException()))])
    assert not cb.new_best

@pytest.mark.parametrize('event,error,told', [('before_batch', 'CancelBatchException', 'batch'), ('before_backward', 'CancelBackwardException', 'backward'), ('before_step', 'CancelStepException', 'step'),
                                              ('before_train', 'CancelTrainException', 'train'), ('before_validate', 'CancelValidException', 'validate'),
                                              ('before_epoch', 'CancelEpochException', 'epoch'), ('before_fit', 'CancelFitException', 'fit')])
def test_what_is_cancelled_is_told(dls, tiny, event, error, told):
    import blocks
    heard = []
    def cancel(self): raise getattr(blocks, error)()
    spy = type('Spy', (Callback,), {event: cancel, f'after_cancel_{told}': lambda self: heard.append(told), 'after_create': lambda self: heard.append('created')})
    learn = Learner(dls, tiny(), cbs=spy())
    with learn.no_bar(): learn.fit(1)
    assert heard[0] == 'created' and heard[1] == told and set(heard) == {'created', told}

# --- keeping the best, or not
def test_the_last_weights_stay_without_restore_best(learn):
    learn.fit(4, cbs=[Steer([3., 1., 2., 4.]), SaveModelCallback(restore_best=False)])
    assert marked(learn) == 3
    learn.load('model'); assert marked(learn) == 1

# --- a plateau
@pytest.mark.parametrize('kw,want', [({}, [.1, .1, .01, .01, .001, .0001]), (dict(patience=2), [.1, .1, .1, .1, .1, .01]), (dict(factor=2., min_lr=.04), [.1, .1, .05, .05, .04, .04])])
def test_the_rate_is_divided_on_a_plateau(learn, capsys, kw, want):
    learn.add_cbs(learn.progress)                                        # what it says is shown where progress is
    steer = [3., 3., 2., 2., 2.5, 2.5]                                   # better in epochs 0 and 2
    learn.fit(6, .1, cbs=[Steer(steer), ReduceLROnPlateau(**kw)])
    assert learn.recorder.lrs[::4] == pytest.approx(want) and 'learning rate is now' in capsys.readouterr().out

def test_a_plateau_and_one_cycle_are_not_combined_silently(learn):
    with pytest.raises(TrainingError, match='ParamScheduler and ReduceLROnPlateau'): learn.fit_one_cycle(1, cbs=ReduceLROnPlateau())
    with pytest.raises(TrainingError, match='factor'): ReduceLROnPlateau(factor=1)

# --- less of an epoch
@pytest.mark.parametrize('pct,short_valid,steps,seen', [(.01, True, 1, 1), (.5, True, 2, 1), (.51, False, 3, 2), (1., True, 4, 2)])
def test_short_epochs(learn, pct, short_valid, steps, seen):
    spy = At(None, None)
    learn.fit(2, cbs=[ShortEpochCallback(pct, short_valid), spy])
    assert len(learn.recorder.values) == 2 and len(learn.recorder.losses) == 2*steps
    assert spy.seen.count('before_validate') == spy.seen.count('after_validate') == 2 and (spy.seen.count('after_pred') - 2*steps)//2 == seen

def test_a_time_limit_finishes_the_batch_and_validates(learn, monkeypatch, capsys):
    learn.add_cbs(learn.progress)                                        # what it says is shown where progress is
    import blocks.train.callback as module
    clock = iter([0.] + [10.]*5 + [100.]*1000)
    monkeypatch.setattr(module, 'time', type('T', (), dict(monotonic=staticmethod(lambda: next(clock)))))
    learn.fit(10, max_minutes=1)                                         # over after step 2 of the second epoch
    assert len(learn.recorder.losses) == 6 and len(learn.recorder.values) == 2 and learn.recorder.values[-1][1] is not None
    assert '1 minutes are over' in capsys.readouterr().out
    learn.fit(1, max_minutes=1000); assert len(learn.recorder.losses) == 4

def test_a_time_limit_is_for_all_of_fine_tune(learn, tmp_path):
    spy = At(None, None)
    learn.fine_tune(3, max_minutes=1e-9, cbs=spy)
    assert spy.seen.count('after_step') == 1 and spy.seen.count('after_fit') == 1 and len(learn.recorder.values) == 1
    with pytest.raises(TrainingError, match='max_minutes'): learn.fit(1, max_minutes=0)

# --- gradients
def plain(n=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, n))

def grads(learn): return torch.cat([p.grad.flatten() for p in learn.model.parameters()])

@pytest.mark.parametrize('n_acc', [8, 16, 24, 20])                       # 20: the third batch of 8 is more than enough
def test_accumulated_gradients_are_those_of_the_items_together(dls, n_acc):
    got, items = [], []
    learn = Learner(dls, plain(), precision='fp32', opt_func='sgd')
    see = [At('after_step', lambda l: got.append((grads(l).clone(), len(items)))), At('before_backward', lambda l: items.append((l.xb[0], l.yb[0])))]
    with learn.no_bar(): learn.fit(2, 0., wd=0., cbs=[GradientAccumulation(n_acc), *see])
    each = -(-n_acc//8)
    assert [n for _, n in got] == list(range(each, 9, each))             # counted on over the end of the epoch
    for g, n in got:
        x, y = (torch.cat(o) for o in zip(*items[n-each:n]))
        learn.model.zero_grad(); torch.nn.functional.cross_entropy(learn.model(x), y).backward()
        assert torch.allclose(g, grads(learn), atol=1e-6)

def test_accumulation_records_whole_losses_and_leaves_no_gradients(dls):
    def losses(cbs):
        learn = Learner(dls.new(), plain(), precision='fp32', opt_func='sgd')
        with learn.no_bar(): learn.fit(1, 0., wd=0., cbs=cbs)
        assert all(p.grad is None for p in learn.model.parameters())
        return learn.recorder.losses
    assert losses(GradientAccumulation(24)) == pytest.approx(losses(None))

def test_gradients_are_cut_to_a_norm(dls):
    norms, learn = [], Learner(dls, plain(), precision='fp32', cbs=[GradientClip(1e-3), GradientAccumulation(16)])
    with learn.no_bar(): learn.fit(1, cbs=At('after_step', lambda l: norms.append(float(grads(l).norm()))))
    assert len(norms) == 2 and norms == pytest.approx([1e-3]*2, rel=1e-2)
