"What the loop costs: whom it calls, what it holds, what it copies."
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from blocks import Callback, CancelBatchException, CancelBackwardException, CancelTrainException, Learner, accuracy
from blocks.train import callback as callbacks, conv, tricks
from blocks.train.callback import EVENTS, GradientAccumulation, StopOnNonFinite
from blocks.train.metric import as_metric


class At(Callback):
    "Calls a function at an event"
    def __init__(self, event, do, order=0): self.order = order; setattr(self, event, lambda: do(self.learn))

class Say(Callback):
    "Says its name at each training batch"
    def __init__(self, said, name, order=0): self.said, self.called, self.order = said, name, order
    def after_loss(self):
        if self.learn.training: self.said.append((self.learn.iter, self.called))

@pytest.fixture
def learn(dls, tiny, tmp_path):
    learn = Learner(dls, tiny(), metrics=accuracy, path=tmp_path, precision='fp32')
    learn.remove_cbs(learn.progress)
    return learn

# --- whom it calls
def test_what_does_nothing_is_never_called(learn, monkeypatch):
    calls = []
    for event in EVENTS: monkeypatch.setattr(Callback, event, lambda self, event=event: calls.append(event))
    learn.fit(1, cbs=[Callback(), Say([], 'a')])
    assert set(calls) <= {'after_create'}

def test_callbacks_that_come_and_go_in_the_middle_of_a_fit(learn):
    said = []
    late, early = Say(said, 'late'), Say(said, 'early')
    def change(l):
        if l.training and l.iter == 1: l.add_cbs(late)
        if l.training and l.iter == 2: l.remove_cbs(early)
        if l.training and l.iter == 3: l.cbs.remove(late)
    learn.add_cbs(early); learn.fit(1, cbs=At('before_batch', change))
    assert said == [(0, 'early'), (1, 'early'), (1, 'late'), (2, 'late')]

@pytest.mark.parametrize('change', [lambda l, cb: setattr(l, 'cbs', [*l.cbs, cb]), lambda l, cb: (setattr(cb, 'learn', l), l.cbs.append(cb))])
def test_a_list_of_callbacks_that_is_replaced_or_changed_from_outside(learn, change):
    said, cb = [], Say([], 'a')
    cb.learn, cb.said = learn, said
    learn.fit(1, cbs=At('before_batch', lambda l: change(l, cb) if l.training and l.iter == 2 and cb not in l.cbs else None))
    assert said == [(2, 'a'), (3, 'a')]

def test_a_callback_that_gets_an_event_or_another_order_in_the_middle_of_a_fit(learn):
    said = []
    plain, a, b = Callback(), Say(said, 'a', 1), Say(said, 'b', 2)
    def change(l):
        if l.training and l.iter == 1: plain.after_step = lambda: said.append((l.iter, 'new'))
        if l.training and l.iter == 2: a.order = 3; del plain.after_step
    learn.fit(1, cbs=[plain, a, b, At('before_batch', change)])
    assert said == [(0, 'a'), (0, 'b'), (1, 'a'), (1, 'b'), (1, 'new'), (2, 'b'), (2, 'a'), (3, 'b'), (3, 'a')]

def test_a_class_that_gets_an_event_between_two_fits(learn, monkeypatch):
    class Late(Callback): pass
    calls = []
    learn.add_cbs(Late()); learn.fit(1)
    monkeypatch.setattr(Late, 'after_fit', lambda self: calls.append(1), raising=False)
    learn.fit(1)
    assert calls == [1]

def test_the_order_is_found_once_for_a_fit(learn, monkeypatch):
    looked, acts_at = [], callbacks._acts_at
    monkeypatch.setattr('blocks.train.learner._acts_at', lambda cb, event: looked.append(event) or acts_at(cb, event))
    learn.fit(3)
    assert len(looked) == len(set(looked))*len(learn.cbs)                 # for each event each callback once, and not in each batch

# --- contexts
def test_convolutions_take_their_fast_ways_in_16_bits_unless_the_model_is_compiled(learn, monkeypatch):
    entered, real = [], conv.short_convs.__enter__
    monkeypatch.setattr(conv.short_convs, '__enter__', lambda self: entered.append(1) or real(self))
    learn.fit(1); learn.get_preds()
    assert not entered                                                    # 32 bits
    learn.to_bf16().get_preds()
    assert entered
    entered.clear(); learn.compile = True
    learn._called = lambda: learn.model
    learn.get_preds(); learn.fit(1)
    assert not entered

def test_the_precision_is_looked_up_for_a_pass_and_not_for_a_batch(learn, monkeypatch):
    asked = []
    monkeypatch.setattr(tricks, 'native_bf16', lambda device: asked.append(device) or False)
    learn.precision = 'auto'
    learn.fit(2)
    assert len(asked) == 4                                                # two of training, two of validation

# --- what it holds
class Holds(Callback):
    "Weak references to what belongs to a batch, and which of them are alive when the next one is about to be computed"
    order = 99
    def __init__(self): self.refs, self.alive = [], []
    def before_batch(self):
        gc.collect()
        self.alive += [name for name, ref in self.refs if ref() is not None]
        self.refs = []
    def keep(self, name, t): self.refs.append((name, weakref.ref(t)))
    def after_pred(self): self.keep('pred', self.learn.pred)
    def after_loss(self): self.keep('x', self.learn.xb[0]); self.keep('y', self.learn.yb[0]); self.keep('loss', self.learn.loss)

class Activation(nn.Module):
    "Notes what passes"
    def __init__(self, note): super().__init__(); self.note = note
    def forward(self, x):
        x = x*1.
        self.note(x)
        return x

def cancel(e):
    def do(learn):
        if learn.training: raise e()
    return do

@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(16)], [At('before_backward', cancel(CancelBackwardException))], [At('after_loss', cancel(CancelBatchException), 100)]],
                         ids=['plain', 'accumulation', 'no backward', 'no step'])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_nothing_of_a_batch_is_there_when_the_next_one_is_computed(learn, cbs, precision):
    holds = Holds()
    learn.precision = precision
    learn.model.insert(2, Activation(lambda x: holds.keep('activation', x)))
    learn.fit(2, cbs=[*cbs, holds])
    gc.collect()
    assert holds.refs and not holds.alive and not [name for name, ref in holds.refs if ref() is not None]

def test_the_batch_is_gone_when_the_next_one_is_read(learn):
    alive, train, refs = [], learn.dls.train, []
    plain = train.next_pass
    def next_pass(*args, **kw):
        for batch in plain(*args, **kw):
            refs.append(weakref.ref(batch[0]))
            yield batch
            del batch
            gc.collect()
            alive.extend(ref for ref in refs if ref() is not None)
    train.next_pass = next_pass
    learn.fit(1)
    assert len(refs) == 4 and not alive

def test_gradients_are_none_when_the_next_batch_is_computed(learn):
    seen = []
    learn.fit(2, cbs=At('before_batch', lambda l: seen.extend(p.grad for p in l.model.parameters())))
    assert len(seen) and set(seen) == {None}

def test_outputs_of_validation_are_not_kept(learn):
    refs = []
    learn.recorder.metrics = [as_metric(lambda p, y: float(len(p)))]      # of all outputs together
    note = At('after_pred', lambda l: refs.append(weakref.ref(l.pred.untyped_storage())))
    for measure in (lambda: learn.validate(cbs=note), lambda: learn.fit(1, cbs=note)):
        measure(); gc.collect()
        assert refs and not [r for r in refs if r() is not None]

def test_a_cancelled_pass_leaves_nothing(learn):
    learn.fit(1, cbs=At('after_pred', cancel(CancelTrainException)))
    assert learn.batch is learn.pred is None and learn.xb == learn.yb == () and learn.loss.grad_fn is None

# --- the guard
def guard(learn): return next(cb for cb in learn.cbs if isinstance(cb, StopOnNonFinite))

def test_the_last_good_weights_are_always_in_the_same_memory(learn):
    places = []
    guard(learn).every = 2
    learn.fit(2, 1e-2, cbs=At('after_step', lambda l: places.append({k: v.data_ptr() for k, v in guard(l).good.items()})))
    assert len(places) == 8 and all(o == places[0] for o in places) and set(places[0]) == set(learn.model.state_dict())

def test_a_copy_is_that_of_the_weights_that_gave_the_last_loss(learn):
    guard(learn).every = 1
    wrong = []
    def look(l): wrong.extend(k for k, v in l.model.named_parameters() if not torch.equal(v, guard(l).good[k]))
    learn.fit(2, 1e-1, cbs=At('before_step', look))
    assert not wrong

def test_only_what_learns_is_copied_also_when_that_changes_in_the_middle_of_an_epoch(learn):
    seen = []
    learn.model[0].requires_grad_(False)
    def thaw(l):
        if l.training and l.iter == 2: l.model[0].requires_grad_(True)
    learn.fit(1, 1e-2, cbs=[At('before_batch', thaw), At('after_step', lambda l: seen.append({'0.weight', '0.bias'} & set(guard(l).good)))])
    assert [len(o) for o in seen] == [0, 0, 2, 2]

def test_weights_that_learned_late_come_back(learn):
    first = learn.model[0].weight.detach().clone()
    learn.model[0].requires_grad_(False)
    def thaw(l):
        if l.training and l.iter == 2: l.model[0].requires_grad_(True)
    def poison(l):
        if l.iter == 2: l.model[0].weight.data.fill_(torch.nan)
    with pytest.raises(Exception, match='last good weights'): learn.fit(1, 1e-2, cbs=[At('before_batch', thaw), At('after_step', poison)])
    assert torch.equal(learn.model[0].weight, first)

def test_large_weights_whose_sum_overflows_are_finite(learn):
    learn.model.register_buffer('large', torch.full((4,), 3e38))
    learn.fit(1)

# --- torch.compile
def test_compiled_is_what_the_loop_calls_and_nothing_else(learn, tiny, monkeypatch):
    compiled = []
    class Compiled(nn.Module):
        def __init__(self, m): super().__init__(); self.m, self.calls = m, 0; compiled.append(self)
        def forward(self, x): self.calls += 1; return self.m(x)
    monkeypatch.setattr(torch, 'compile', Compiled)
    plain = Learner(learn.dls.new(), tiny(), precision='fp32', path=learn.path); faster = Learner(learn.dls.new(), tiny(), precision='fp32', path=learn.path, compile=True)
    for l in (plain, faster):
        l.remove_cbs(l.progress); l.fit_one_cycle(2, 1e-2); l.validate(); l.get_preds()
    (c,) = compiled                                                       # once, for training and evaluation
    assert c.calls == 2*(4 + 2) + 2 + 2 and c.m is faster.model and list(faster.model.state_dict()) == list(plain.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), faster.model.state_dict().values()))
    faster.save('m'); plain.load('m'); faster.predict(faster.dls.valid_ds.fields[0][0]); faster.export()
    assert c.calls == 2*(4 + 2) + 2 + 2
    faster.model = tiny(seed=1); faster.fit(1)
    assert len(compiled) == 2

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_compiled_model_learns_what_it_learns_otherwise(dls, tiny, tmp_path, monkeypatch, precision):
    from blocks import load_learner
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))         # all but the C++ compiler, which takes a minute
    make = tiny
    def model():
        model = make()
        return model.insert(2, nn.Conv2d(8, 8, 3, groups=8)) if precision == 'bf16' else model
    def run(compile):
        torch.manual_seed(0)
        learn = Learner(dls.new(), model(), precision=precision, path=tmp_path, compile=compile)
        with learn.no_bar(): learn.fit(1, 1e-2)
        return learn
    tiny, learn = (lambda seed=0: model()), run(True)
    plain, file = run(False), dls.valid_ds.fields[0][0]
    assert learn.recorder.losses == pytest.approx(plain.recorder.losses, abs=1e-3 if precision == 'fp32' else 2e-2) and list(learn.model.state_dict()) == list(plain.model.state_dict())
    back = load_learner(learn.export(), model=tiny())
    assert torch.allclose(back.predict(file)[2], learn.predict(file)[2]) and equal_files(learn, tiny)

def equal_files(learn, tiny):
    learn.save('m')
    other = Learner(learn.dls, tiny(seed=3), path=learn.path).load('m', with_opt=False)
    return all(torch.equal(a, b) for a, b in zip(other.model.state_dict().values(), learn.model.state_dict().values()))
