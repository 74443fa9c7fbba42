"Averaged weights: what they are, when they are in the model, and that training, saving and resuming do not notice"
import copy

import numpy as np
import pytest
import torch
from torch import nn

from blocks.core import TrainingError, set_seed
from blocks.train.average import BnFreeze, EMACallback, SWACallback
from blocks.train.callback import Callback, CancelFitException, EarlyStoppingCallback, GradientAccumulation, SaveModelCallback
from blocks.train.checkpoint import CheckpointCallback
from blocks.train.learner import Learner
from blocks.train.metric import accuracy


def learner(dls, model, **kw): return Learner(dls.new(), model, precision='fp32', **{'metrics': accuracy, **kw})
def fit(learn, n, *cbs, lr=1e-2, **kw):
    set_seed(3)
    with learn.no_bar(): learn.fit(n, lr, cbs=list(cbs), **kw)
    return learn
def state(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def near(a, b): return a.keys() == b.keys() and all(torch.allclose(a[k].float(), b[k].float(), rtol=1e-5, atol=1e-7) for k in a)

class Reference(Callback):
    "The average, computed once more by hand; runs after each step, before the other callbacks"
    order = -50
    def __init__(self, decay=.999, warmup=True): self.decay, self.warmup = decay, warmup
    def before_fit(self): self.t, self.average, self.now = 0, state(self.learn.model), state(self.learn.model)
    def after_step(self):
        self.t, self.now = self.t + 1, state(self.learn.model)
        d = min(self.decay, (1 + self.t)/(10 + self.t)) if self.warmup else self.decay
        for k, v in self.now.items(): self.average[k] = d*self.average[k] + (1-d)*v if v.is_floating_point() else v

class At(Callback):
    "Calls `do(learn)` at an event, once `when(learn)` holds"
    in_lr_find = False
    def __init__(self, event, do, when=lambda l: True, order=0):
        self.order = order
        setattr(self, event, lambda: do(self.learn) if when(self.learn) else None)

def stop(kind=KeyboardInterrupt):
    def do(learn): raise kind
    return do

# ---- the moving average ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [{}, dict(decay=.3), dict(decay=.9, warmup=False)])
def test_ema_is_the_average_of_weights_and_statistics(dls, tiny, kw):
    ref = Reference(**kw)
    learn = fit(learner(dls, tiny()), 3, EMACallback(**kw), ref)
    assert ref.t == 12 and near(state(learn.model), ref.average) and not near(ref.now, ref.average)
    assert learn.model[1].num_batches_tracked == 12

def test_ema_does_not_change_the_training(dls, tiny):
    plain, ema = fit(learner(dls, tiny()), 3), fit(learner(dls, tiny()), 3, EMACallback(), ref := Reference())
    assert plain.recorder.losses == ema.recorder.losses and same(state(plain.model), ref.now)
    assert plain.recorder.values[-1][1] != ema.recorder.values[-1][1]

def test_ema_is_what_is_measured_and_what_is_left(dls, tiny):
    learn = fit(learner(dls, tiny()), 3, EMACallback())
    with learn.no_bar(): assert np.allclose(learn.validate(), learn.recorder.values[-1][1:], rtol=1e-6)

def test_ema_holds_the_averages_from_validation_to_the_next_training(dls, tiny):
    ref, wrong = Reference(), []
    names = dict(tiny().named_parameters())
    learns = lambda d: {k: v for k, v in d.items() if k in names}        # the statistics move in the forward pass already
    def expect(which): return lambda l: None if near(learns(state(l.model)), learns(getattr(ref, which))) else wrong.append((l.event, l.epoch, l.iter))
    training = lambda l: l.training
    spies = [At('before_batch', expect('now'), training, 99), At('before_backward', expect('now'), order=99), At('before_step', expect('now'), order=99), At('after_train', expect('now'), order=99),
             At('before_batch', expect('average'), lambda l: not l.training, 99), At('after_validate', expect('average')), At('after_epoch', expect('average'), order=56), At('before_epoch', expect('average'), lambda l: l.epoch)]
    fit(learner(dls, tiny()), 3, EMACallback(), ref, *spies)
    assert not wrong

def test_ema_counts_steps_not_batches(dls, tiny):
    ema = EMACallback()
    fit(learner(dls, tiny()), 2, ema, GradientAccumulation(16))
    assert ema.steps == 4

@pytest.mark.parametrize('event, when', [('after_pred', lambda l: l.training and l.epoch == 1 and l.iter == 2), ('before_step', lambda l: l.epoch == 1 and l.iter == 1),
                                         ('after_pred', lambda l: not l.training and l.epoch == 1), ('after_epoch', lambda l: l.epoch == 1), ('before_train', lambda l: l.epoch == 2)])
@pytest.mark.parametrize('error', [KeyboardInterrupt, CancelFitException])
def test_ema_after_a_fit_that_is_broken_off_is_whole(dls, tiny, event, when, error):
    ref, learn = Reference(), learner(dls, tiny())
    cbs = EMACallback(), ref, At(event, stop(error), when, 57)
    if error is CancelFitException: fit(learn, 3, *cbs)
    else:
        with pytest.raises(error): fit(learn, 3, *cbs)
    assert near(state(learn.model), ref.average) and not near(ref.now, ref.average)

def test_ema_without_validation(dls, tiny):
    dls = dls.new(); dls.valid = dls.valid.new(samples=dls.valid.samples.new(fields=tuple(f[:0] for f in dls.valid.samples.fields)))
    ref = Reference()
    learn = fit(Learner(dls, tiny(), precision='fp32'), 2, EMACallback(), ref)
    assert not len(dls.valid) and near(state(learn.model), ref.average)

def test_ema_of_weights_that_are_not_numbers_stays_out_of_the_model(dls, tiny):
    def spoil(l): l.model[-1].weight.data.fill_(float('nan'))
    learn = learner(dls, tiny())
    with pytest.raises(TrainingError, match='not finite'): fit(learn, 3, EMACallback(), At('after_step', spoil, lambda l: l.epoch == 1, -60))
    assert all(torch.isfinite(v).all() for v in learn.model.state_dict().values())

def test_save_model_gets_what_was_measured_and_the_best_stays(dls, tiny, tmp_path):
    seen = []
    learn = learner(dls, tiny(), path=tmp_path)
    fit(learn, 6, EMACallback(decay=.5), SaveModelCallback(), At('after_validate', lambda l: seen.append(state(l.model))), lr=.3)
    losses = [row[1] for row in learn.recorder.values]
    best = int(np.argmin(losses))
    assert same(state(learn.model), seen[best])
    with learn.no_bar(): assert np.isclose(learn.validate()[0], losses[best], rtol=1e-6)

def test_validation_in_the_middle_of_training_changes_nothing(dls, tiny):
    plain = fit(learner(dls, tiny()), 2, EMACallback())
    for event in ('after_batch', 'after_backward', 'after_step'):
        between = fit(learner(dls, tiny()), 2, EMACallback(), At(event, lambda l: l.validate(), lambda l: l.training, -5))
        assert plain.recorder.losses == between.recorder.losses and same(state(plain.model), state(between.model)), event

def test_ema_of_layers_that_thaw_and_of_buffers_that_are_replaced(dls, tiny):
    def thaw(l): l.model[0].requires_grad_(True)
    def replace(l): l.model[1].running_mean = l.model[1].running_mean.clone()
    learn, ref, start = learner(dls, tiny(), opt_func='sgd', wd=0.), Reference(), state(tiny())
    learn.model[0].requires_grad_(False)
    frozen = At('after_epoch', lambda l: same({'w': l.model[0].weight.detach()}, {'w': start['0.weight']}) or pytest.fail('a frozen layer has moved'), lambda l: l.epoch == 0, 56)
    fit(learn, 3, EMACallback(), ref, frozen, At('before_epoch', thaw, lambda l: l.epoch == 1), At('before_batch', replace, lambda l: l.training and l.iter == 1))
    assert near(state(learn.model), ref.average) and not near({'w': ref.average['0.weight']}, {'w': start['0.weight']})

def test_each_fit_begins_a_new_average(dls, tiny):
    ema, learn = EMACallback(), learner(dls, tiny())
    fit(learn, 1, ema); middle = state(learn.model)
    assert ema.average is None and ema.trained is None                    # no copies are held between fits
    fit(learn, 1, ema, ref := Reference())
    assert ema.steps == 4 and near(state(learn.model), ref.average) and not near(middle, ref.average)

def test_ema_of_a_learner_takes_no_part_outside_of_its_fits(dls, tiny):
    ema = EMACallback()
    learn = learner(dls, tiny(), cbs=ema)
    before = state(learn.model)
    with learn.no_bar():
        learn.validate(); learn.lr_find(num_it=8, suggest_funcs=None, show_plot=False)
        assert same(before, state(learn.model)) and ema.steps == 0
        fit(learn, 1); after = state(learn.model)
        learn.model[0].weight.data.zero_(); learn.validate()
        assert not learn.model[0].weight.any() and not same(after, state(learn.model))

def test_a_fit_that_fails_before_it_begins_leaves_the_model(dls, tiny):
    learn = learner(dls, tiny(), cbs=EMACallback())
    fit(learn, 1); before = state(learn.model)
    with pytest.raises(ValueError): fit(learn, 1, At('before_fit', stop(ValueError), order=-99))
    assert same(before, state(learn.model))

@pytest.mark.parametrize('decay', [-.1, 1, 1., 7])
def test_ema_decay_is_a_share(decay):
    with pytest.raises(TrainingError, match='decay='): EMACallback(decay)

# ---- resuming ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('make', [EMACallback, lambda: SWACallback(.3)], ids=['ema', 'swa'])
@pytest.mark.parametrize('every, event, when', [('epoch', 'before_batch', lambda l: l.epoch == 2 and l.training and l.iter == 1), (3, 'before_batch', lambda l: l.epoch == 1 and l.training and l.iter == 3),
                                                (3, 'before_validate', lambda l: l.epoch == 2)], ids=['of an epoch', 'of a batch', 'of the last batch of an epoch'])
def test_a_resumed_fit_ends_with_the_same_bits(dls, tiny, tmp_path, make, every, event, when):
    whole = fit(learner(dls, tiny()), 4, make())
    broken = learner(dls, tiny(), path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(broken, 4, make(), CheckpointCallback(every), At(event, stop(), when, 98))
    again = learner(dls, tiny(seed=5), path=tmp_path)
    with again.no_bar(): again.resume('checkpoint', cbs=[make(), CheckpointCallback(every)])
    assert same(state(whole.model), state(again.model))
    assert [list(v) for v in whole.recorder.values] == [list(v) for v in again.recorder.values] and whole.recorder.losses == again.recorder.losses

def test_averages_saved_between_fits_and_of_another_model(dls, tiny, tmp_path):
    learn = learner(dls, tiny(), path=tmp_path, cbs=EMACallback())
    fit(learn, 1); learn.save('between', full=True)
    other = learner(dls, tiny(seed=5), path=tmp_path, cbs=EMACallback())
    other.resume('between')
    assert same(state(learn.model), state(other.model))
    ema = EMACallback()
    fit(learner(dls, tiny()), 1, ema, At('after_epoch', lambda l: pytest.raises(TrainingError, ema.load_state_dict, dict(steps=1, average={'w': torch.ones(2)}, trained=None)), order=60))

# ---- the mean over epochs ----------------------------------------------------------------------------------------
class Weights(Callback):
    "The parameters at the end of each epoch, before anything else"
    order = -60
    def before_fit(self): self.seen = []
    def after_epoch(self): self.seen.append({k: p.detach().clone() for k, p in self.learn.model.named_parameters()})

def statistics(model, loader):
    "Mean over the batches of the mean and variance that reach the BatchNorm layer at place 1"
    with torch.no_grad(): maps = [model[0](x) for x, _ in loader]
    flat = [m.transpose(0, 1).flatten(1) for m in maps]
    return torch.stack([f.mean(1) for f in flat]).mean(0), torch.stack([f.var(1) for f in flat]).mean(0)

@pytest.mark.parametrize('start, n_epoch, first', [(.75, 4, 3), (.5, 4, 2), (0., 3, 1), (.7, 10, 7)])
def test_swa_is_the_mean_of_the_weights_at_the_ends_of_the_last_epochs(dls, tiny, start, n_epoch, first):
    w = Weights()
    learn = fit(learner(dls, tiny()), n_epoch, SWACallback(start), w)
    chosen = w.seen[first-1:]
    assert near({k: p.detach() for k, p in learn.model.named_parameters()}, {k: torch.stack([o[k] for o in chosen]).mean(0) for k in chosen[0]})
    assert not near(dict(learn.model.named_parameters()), w.seen[-1])

def test_swa_measures_the_statistics_anew_without_augmentation(dls, tiny):
    from blocks.data.augment import aug_transforms
    dls = dls.new(batch_tfms=aug_transforms())
    learn = fit(learner(dls, tiny()), 3, SWACallback(.3))
    train = dls.train
    mean, var = statistics(learn.model, train.new(samples=train.samples.new(train=False), shuffle=True, drop_last=True))
    bn = learn.model[1]
    assert torch.allclose(bn.running_mean, mean, atol=1e-5) and torch.allclose(bn.running_var, var, rtol=1e-4) and bn.momentum == .1

def test_swa_leaves_statistics_that_do_not_learn(dls):
    conv = lambda i, o: [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    torch.manual_seed(0)
    model = nn.Sequential(*conv(3, 8), *conv(8, 8), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model[1].requires_grad_(False)
    before = copy.deepcopy(model[1].state_dict())
    fit(learner(dls, model), 3, SWACallback(.3), BnFreeze())
    assert same(before, model[1].state_dict()) and model[4].num_batches_tracked == len(dls.train)

def test_swa_scores_are_those_of_the_model_that_is_left_and_are_said(dls, tiny, capsys):
    swa, learn = SWACallback(.3), learner(dls, tiny())
    set_seed(3); learn.fit(3, 1e-2, cbs=swa)
    said = capsys.readouterr().out
    assert f'{swa.scores[0]:.4f}' in said and 'accuracy' in said and '3 epochs' in said
    with learn.no_bar(): assert np.allclose(swa.scores, learn.validate())

def test_swa_changes_neither_training_nor_rates_nor_random_numbers(dls, tiny):
    plain, random = fit(learner(dls, tiny()), 4), torch.get_rng_state()
    swa = fit(learner(dls, tiny()), 4, SWACallback(.3))
    assert plain.recorder.losses == swa.recorder.losses and plain.recorder.lrs == swa.recorder.lrs and [list(v) for v in plain.recorder.values] == [list(v) for v in swa.recorder.values]
    assert torch.equal(torch.get_rng_state(), random)

def test_swa_of_a_fit_that_ends_early(dls, tiny):
    w = Weights()
    learn = fit(learner(dls, tiny()), 9, SWACallback(0.), w, EarlyStoppingCallback('valid_loss', comp=lambda new, best: False, patience=3))
    assert len(w.seen) == 3 and near(dict(learn.model.named_parameters()), {k: torch.stack([o[k] for o in w.seen]).mean(0) for k in w.seen[0]})

@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_swa_of_a_fit_that_is_broken_off_leaves_the_weights_of_the_moment(dls, tiny, error):
    plain, swa = learner(dls, tiny()), learner(dls, tiny())
    for learn, cbs in ((plain, []), (swa, [SWACallback(0.)])):
        with pytest.raises(error): fit(learn, 4, *cbs, At('after_epoch', stop(error), lambda l: l.epoch == 2))
    assert same(state(plain.model), state(swa.model))

def test_swa_that_is_broken_off_while_it_measures_leaves_the_weights_of_the_moment(dls, tiny, monkeypatch):
    plain, learn, passes = fit(learner(dls, tiny()), 3), learner(dls, tiny()), []
    def forward(x):
        if passes: raise KeyboardInterrupt
        return type(learn.model).forward(learn.model, x)
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, SWACallback(0.), At('after_epoch', lambda l: passes.append(setattr(l.model, 'forward', forward)), lambda l: l.epoch == 2, 69))
    assert passes and same(state(plain.model), state(learn.model)) and learn.model[1].momentum == .1

def test_swa_of_one_epoch_is_that_epoch(dls, tiny):
    assert same(state(fit(learner(dls, tiny()), 1).model), state(fit(learner(dls, tiny()), 1, SWACallback()).model))

@pytest.mark.parametrize('other', [EMACallback, SaveModelCallback])
def test_two_that_decide_which_weights_are_left_are_refused(dls, tiny, other):
    learn = learner(dls, tiny())
    before = state(learn.model)
    with pytest.raises(TrainingError, match='leave one out'): fit(learn, 3, SWACallback(), other())
    assert same(before, state(learn.model))

def test_swa_beside_a_callback_that_only_saves(dls, tiny, tmp_path):
    w = Weights()
    learn = fit(learner(dls, tiny(), path=tmp_path), 3, SWACallback(0.), SaveModelCallback(restore_best=False, every_epoch=True), w)
    saved = torch.load(tmp_path/'models'/'model_2.pth', weights_only=True)['model']
    assert torch.equal(saved['0.weight'], w.seen[2]['0.weight']) and not torch.equal(saved['0.weight'], learn.model[0].weight)
    with pytest.raises(TrainingError, match='start='): SWACallback(1.5)

# ---- statistics that stay ----------------------------------------------------------------------------------------
def two_blocks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = lambda i, o: [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
        return nn.Sequential(*conv(3, 8), *conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

def test_bn_freeze_keeps_the_statistics_of_frozen_layers_alone(dls):
    learn = learner(dls, two_blocks())
    learn.model[:3].requires_grad_(False)
    before = state(learn.model)
    fit(learn, 2, BnFreeze()); after = state(learn.model)
    moved = {k for k in before if 'running' in k and not torch.equal(before[k], after[k])}
    assert moved == {'4.running_mean', '4.running_var'}
    assert learn.model[1].num_batches_tracked == 0 and learn.model[4].num_batches_tracked == 8
    fit(learn, 1)
    assert learn.model[1].num_batches_tracked == 4                        # without it they move

def test_bn_freeze_follows_what_thaws_in_the_middle(dls):
    learn = learner(dls, two_blocks())
    learn.model[1].requires_grad_(False)
    fit(learn, 3, BnFreeze(), At('before_epoch', lambda l: l.model[1].requires_grad_(True), lambda l: l.epoch == 2))
    assert learn.model[1].num_batches_tracked == 4 and learn.model[4].num_batches_tracked == 12
