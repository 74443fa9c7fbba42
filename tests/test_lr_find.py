"The trial that finds a learning rate: its rates, what is read from it, and that nothing is left of it."
import math, random
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from blocks import Callback, EarlyStoppingCallback, Learner, SaveModelCallback, TrainingError, accuracy
from blocks.train.lr_find import LRFinder, SuggestionMethod, minimum, slide, steep, valley

@pytest.fixture
def make(dls, tiny, tmp_path):
    def make(model=None, **kw):
        learn = Learner(dls, model or tiny(), path=tmp_path, metrics=accuracy, **kw)
        learn.remove_cbs(learn.progress)
        return learn
    return make

class Spy(Callback):
    "Keeps rates and losses of the training steps; raises at one of them"
    def __init__(self, error=None, at=None): self.lrs, self.losses, self.error, self.at = [], [], error, at
    def after_loss(self):
        if not self.learn.training: return
        self.lrs.append(self.learn.opt.param_groups[-1]['lr']); self.losses.append(self.learn.loss.item())
        if len(self.lrs) == self.at: raise self.error

def state(learn):
    opt = learn.opt and [(k, v.clone() if isinstance(v, torch.Tensor) else v) for s in learn.opt.state.values() for k, v in s.items()]
    return dict(model={k: v.clone() for k, v in learn.model.state_dict().items()}, opt=opt, groups=learn.opt and [{k: v for k, v in g.items() if k != 'params'} for g in learn.opt.param_groups],
                records=(list(learn.recorder.values), list(learn.recorder.losses), list(learn.recorder.lrs)), passes=learn.passes, epoch=learn.dls.train.epoch, modes=[m.training for m in learn.model.modules()],
                needs=[p.requires_grad for p in learn.model.parameters()], random=(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()), cbs=list(learn.cbs), frozen=learn.frozen)

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

# --- the trial
def test_rates_and_smoothing(make):
    learn, spy = make(), Spy()
    learn.fit(3, cbs=[finder := LRFinder(1e-6, 1e-2, num_it=11), spy])
    assert spy.lrs == finder.lrs == pytest.approx([1e-6*1e4**(i/11) for i in range(11)])
    mean = 0.
    for i, loss in enumerate(spy.losses):
        mean = .98*mean + .02*loss
        assert finder.losses[i] == pytest.approx(mean/(1 - .98**(i + 1)))

def test_it_stops_at_divergence_or_not(make):
    for stop in (True, False):
        learn, spy = make(opt_func='sgd', cbs=(spy := Spy())), spy
        learn.lr_find(end_lr=1e4, num_it=60, stop_div=stop, show_plot=False)
        assert (len(spy.lrs) < 60) == stop

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_ends_the_trial_without_an_error(make, bad):
    class Break(Callback):
        order, n = -1, 0
        def after_loss(self):
            self.n += self.learn.training
            if self.n > 40: self.learn.loss = self.learn.loss*bad
    r = make(cbs=Break()).lr_find(show_plot=False)
    assert 0 < r.valley < 1e-7*1e8**.4

def test_a_trial_too_short_to_read_says_so_and_restores(make):
    learn = make(opt_func='sgd')
    before = state(learn)
    with pytest.raises(TrainingError, match='smaller start_lr'): learn.lr_find(start_lr=1e6, end_lr=1e9)
    assert same(before, state(learn))

def test_groups_may_have_ranges_of_their_own(make):
    learn = make(splitter=lambda m: [list(m[0].parameters()) + list(m[1].parameters()), list(m[5].parameters())], cbs=(spy := Spy()))
    learn.lr_find(start_lr=[1e-8, 1e-7], end_lr=[1., 10.], show_plot=False)
    assert spy.lrs[0] == pytest.approx(1e-7)

# --- as if nothing had happened
@pytest.mark.parametrize('error', [None, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize('fitted', [False, True])
def test_everything_is_as_before(make, tiny, tmp_path, error, fitted):
    model = tiny(); model.insert(5, nn.Dropout(.5))                      # draws random numbers
    learn = make(model)
    if fitted: learn.fit(1, 1e-3)
    before, files = state(learn), sorted(tmp_path.rglob('*'))
    spy = Spy(error and error(), error and 7)
    learn.add_cb(spy)
    if error:
        with pytest.raises(error): learn.lr_find(show_plot=False)
    else: learn.lr_find(show_plot=False, stop_div=False)
    learn.remove_cb(spy)
    assert len(spy.lrs) == (7 if error else 100) and same(before, state(learn)) and all(p.grad is None for p in learn.model.parameters())
    assert sorted(tmp_path.rglob('*')) == files

def test_training_after_it_is_training_without_it(make, dls):
    def run(search):
        torch.manual_seed(0); dls.train.epoch = 0
        model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(8, 2))
        learn = make(model)
        learn.fit(1, 1e-2)
        if search: learn.lr_find(num_it=20, show_plot=False)
        learn.fit_one_cycle(1, 1e-2)
        return learn.model.state_dict()
    assert same(dict(run(False)), dict(run(True)))

def test_what_keeps_or_stops_does_not_take_part(make, tmp_path):
    learn = make(cbs=[SaveModelCallback(), EarlyStoppingCallback(patience=1), spy := Spy()])
    learn.lr_find(stop_div=False, show_plot=False)
    assert len(spy.lrs) == 100 and not list(tmp_path.rglob('*.pth'))
    learn.fit(1); assert list(tmp_path.rglob('*.pth'))

def test_not_inside_of_a_fit(make):
    class Inside(Callback):
        def after_epoch(self): self.learn.lr_find()
    with pytest.raises(TrainingError, match='inside of a fit'): make().fit(1, cbs=Inside())

# --- reading the curve
def test_known_curves():
    lrs = np.logspace(-7, 0, 40)
    v = np.concatenate([np.full(10, 2.), np.linspace(1.9, 1., 18), np.linspace(1.5, 8, 12)])     # level, falling for 18 steps (19 losses), exploding
    assert v.argmin() == 27
    n, end = 19, 27
    assert valley(lrs, v)[0] == lrs[end - n + n//3 + n//6]
    assert minimum(lrs, v) == (lrs[27]/10, (lrs[27], 1.)) and steep(lrs, np.where(np.arange(40) > 20, 1., 3.))[0] == lrs[20]
    slopes = np.gradient(v)                                              # a window of 15 steps: the last place, from the right, where the slopes at its ends differ
    i = 24
    while i >= 0 and abs(slopes[i + 15] - slopes[i]) > .005: i -= 1
    assert slide(lrs, v)[0] == lrs[i + 1 if i < 24 else 24] and slide(lrs, v, adjust_value=.5)[0] == pytest.approx(.5*slide(lrs, v)[0])

def test_degenerate_curves_give_a_rate_of_the_trial():
    lrs = np.logspace(-7, 0, 40)
    for losses in (np.arange(40.), -np.arange(40.), np.ones(40), np.random.default_rng(0).random(40)):
        for n in (2, 3, 17, 40):
            for f in (valley, slide, steep): assert lrs[0] <= f(lrs[:n], losses[:n])[0] <= lrs[n-1]
            assert minimum(lrs[:n], losses[:n])[0] >= lrs[0]/10

def test_suggestions_are_named_and_marked(make):
    import matplotlib.pyplot as plt
    plt.close('all')
    r = make().lr_find(suggest_funcs=(SuggestionMethod.Valley, partial(slide, lr_diff=10), minimum, SuggestionMethod.Steep))
    assert r._fields == ('valley', 'slide', 'minimum', 'steep') and all(type(o) is float for o in r)
    labels = [t.get_text() for t in plt.gca().get_legend().get_texts()]
    assert [o.split(':')[0] for o in labels] == list(r._fields) and plt.gca().get_xscale() == 'log' and f'{r.valley:.2g}' in labels[0]
    plt.close('all')
    assert make().lr_find(suggest_funcs=None, show_plot=False) is None and not plt.get_fignums()
    assert make().lr_find(show_plot=False)._fields == ('valley',)
