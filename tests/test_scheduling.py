"What moves the learning rate: step by step against formulas written out here, and against PyTorch's own loop."
import math
import numpy as np, pytest, torch
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR
from blocks import Callback, DataError, Learner, ParamScheduler, SaveModelCallback, TrainingError

N = 4                                                                    # training steps in an epoch of these loaders

@pytest.fixture
def make(dls, tiny, tmp_path):
    def make(**kw):
        learn = Learner(dls, tiny(), path=tmp_path, **kw)
        learn.remove_cbs(learn.progress)
        return learn
    return make

def cos(a, b, p): return a + (b - a)*(1 - math.cos(math.pi*p))/2

# --- recipes
def test_one_cycle_step_by_step(make):
    learn = make()
    learn.fit_one_cycle(3, 1e-2, div=10., div_final=100., pct_start=.4, moms=(.9, .8, .95))
    p = [i/(3*N) for i in range(3*N)]
    assert learn.recorder.lrs == pytest.approx([cos(1e-3, 1e-2, o/.4) if o < .4 else cos(1e-2, 1e-4, (o - .4)/.6) for o in p])
    assert learn.recorder.moms == pytest.approx([cos(.9, .8, o/.4) if o < .4 else cos(.8, .95, (o - .4)/.6) for o in p])

@pytest.mark.parametrize('kw', [{}, dict(div_final=10., pct_start=.3)])
def test_flat_cos_step_by_step(make, kw):
    learn, start, div = make(), kw.get('pct_start', .75), kw.get('div_final', 1e5)
    learn.fit_flat_cos(3, 1e-2, **kw)
    assert learn.recorder.lrs == pytest.approx([1e-2 if i/(3*N) < start else cos(1e-2, 1e-2/div, (i/(3*N) - start)/(1 - start)) for i in range(3*N)])
    assert set(learn.recorder.moms) == {.9}                              # the momentum stays

@pytest.mark.parametrize('cycles,length,mult', [(3, 1, 2), (2, 2, 1), (2, 1, 3)])
def test_sgdr_step_by_step(make, cycles, length, mult):
    learn, want = make(), []
    learn.fit_sgdr(cycles, length, 1e-2, cycle_mult=mult)
    for c in range(cycles): want += [cos(1e-2, 0, i/(N*length*mult**c)) for i in range(N*length*mult**c)]
    assert learn.recorder.lrs == pytest.approx(want, abs=1e-9)

def test_a_slice_reaches_the_groups_of_the_other_recipes(make):
    seen = []
    class See(Callback):
        def before_batch(self): seen.append(sorted({g['lr'] for g in self.learn.opt.param_groups}))
    learn = make(splitter=lambda m: [list(m[0].parameters()) + list(m[1].parameters()), list(m[5].parameters())], cbs=See())
    for fit in (learn.fit_flat_cos, lambda n, lr: learn.fit_sgdr(1, n, lr)):
        seen.clear(); fit(1, slice(1e-4, 1e-2))
        assert seen[0] == pytest.approx([1e-4, 1e-2])

@pytest.mark.parametrize('args', [(0, 1), (2, 0), (1.5, 1), (2, '1')])
def test_sgdr_refuses(make, args):
    with pytest.raises(DataError, match='warm restarts'): make().fit_sgdr(*args)

# --- PyTorch's schedulers
def by_hand(make, epochs, every, lr, steps=N):
    "The rates of a loop written by hand"
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr, momentum=.9)
    sched, lrs = make(opt), []
    for _ in range(epochs):
        for _ in range(steps):
            lrs.append(opt.param_groups[0]['lr']); opt.step()
            if every == 'batch': sched.step()
        if every == 'epoch': sched.step()
    return lrs

@pytest.mark.parametrize('sched,every', [(lambda o: StepLR(o, 2), 'epoch'), (lambda o: ExponentialLR(o, .9), 'batch'), (lambda o: OneCycleLR(o, .1, total_steps=5*N), 'batch')])
@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
def test_schedulers_of_pytorch_step_by_step(make, sched, every, opt):
    learn = make(opt_func=opt)
    for _ in range(2):                                                   # the second fit begins anew
        learn.fit(5, .1, sched=sched, sched_every=every)
        assert learn.recorder.lrs == pytest.approx(by_hand(sched, 5, every, .1))
    learn.fit(1, .3); assert learn.recorder.lrs == [.3]*N
    learn.fit(1, .7, sched=lambda o: StepLR(o, 1)); assert learn.recorder.lrs == [.7]*N

def test_a_scheduler_leaves_the_optimizer_as_it_was_but_for_the_rate(make):
    learn = make()
    learn.fit(1, .1)
    before = [{k: v for k, v in g.items() if k not in ('params', 'lr')} for g in learn.opt.param_groups]
    with pytest.raises(ZeroDivisionError): learn.fit(2, .1, sched=lambda o: OneCycleLR(o, .1, total_steps=2*N), sched_every='batch', cbs=Boom())
    assert [{k: v for k, v in g.items() if k not in ('params', 'lr')} for g in learn.opt.param_groups] == before and 'step' not in vars(learn.opt)

class Boom(Callback):
    def after_step(self):
        if self.learn.epoch == 1: raise ZeroDivisionError

def test_plateau_gets_the_validation_loss(make):
    class Losses(Callback):
        order = 51
        def after_epoch(self): self.learn.recorder.values[-1][1] = [3., 2., 2., 2., 1.][self.learn.epoch]
    learn = make(cbs=Losses())
    learn.fit(5, .1, sched=lambda o: ReduceLROnPlateau(o, factor=.5, patience=0))
    assert learn.recorder.lrs[::N] == pytest.approx([.1, .1, .1, .05, .025])

def test_plateau_each_batch_is_refused(make):
    with pytest.raises(TrainingError, match='validation loss'): make().fit(1, sched=ReduceLROnPlateau, sched_every='batch')

def test_what_is_no_way_to_make_a_scheduler(make):
    learn = make()
    opt = torch.optim.SGD(learn.model.parameters(), .1)
    for sched, word in ((StepLR(opt, 4), 'lambda opt'), ('step', 'lambda opt'), (lambda o: None, 'NoneType')):
        with pytest.raises(TrainingError, match=word): learn.fit(1, sched=sched)
    with pytest.raises(TrainingError, match="sched_every='step'.*'epoch' or 'batch'"): learn.fit(1, sched=lambda o: StepLR(o, 4), sched_every='step')

def test_two_that_set_the_rate_are_refused_before_the_first_step(make):
    learn, step = make(), lambda o: StepLR(o, 2)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    for fit in (learn.fit_one_cycle, learn.fit_flat_cos, learn.fine_tune, lambda n, **kw: learn.fit_sgdr(1, n, **kw), lambda n, **kw: learn.fit(n, cbs=ParamScheduler({'lr': lambda p: .1}), **kw)):
        with pytest.raises(TrainingError, match='ParamScheduler.*set the learning rate|TorchScheduler.*set the learning rate'): fit(1, sched=step)
    learn.fit(1, sched=step, cbs=ParamScheduler({'mom': lambda p: .5}))
    assert set(learn.recorder.moms) == {.5} and len(before) == len(learn.model.state_dict())

def test_a_checkpoint_from_the_middle_of_a_scheduled_fit_fits_elsewhere(make):
    learn = make()
    learn.fit(2, .01, sched=lambda o: StepLR(o, 1), cbs=SaveModelCallback(with_opt=True))
    other = make().load('model')
    other.fit(1, .3, sched=lambda o: StepLR(o, 1))
    assert np.allclose(other.recorder.lrs, .3)
