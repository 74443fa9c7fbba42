"Mixed batches: the inputs, the loss, the draws, and that nothing else is touched"
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blocks.core import TrainingError
from blocks.data.block import ImageBlock
from blocks.data.datablock import DataBlock
from blocks.data.label import CategoryBlock, MultiCategoryBlock, RegressionBlock
from blocks.data.place import BBoxBlock, MaskBlock, PointBlock
from blocks.data.source import EndSplitter
from blocks.train.callback import Callback, CancelFitException
from blocks.train.learner import Learner
from blocks.train.loss import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from blocks.train.metric import accuracy
from blocks.train.mix import CutMix, MixUp, _inside

BOTH = pytest.mark.parametrize('mixer', [MixUp, CutMix])
H, W, N = 12, 20, 48

def pictures(n=N, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, H, W, 3), dtype=np.uint8)
def loaders(block, ys, xs=None, **kw):
    xs = pictures(len(ys)) if xs is None else xs
    blocks = DataBlock((ImageBlock, block), get_x=xs.__getitem__, get_y=ys.__getitem__, splitter=EndSplitter(.25))
    return blocks.dataloaders(range(len(ys)), **{**dict(bs=12, num_workers=0, seed=3, device='cpu'), **kw})

def network(n_out, seed=0, head=lambda n: [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, n)]):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *head(n_out))
def learner(dls, n_out, **kw): return Learner(dls, network(n_out), precision='fp32', **kw)

rng = np.random.default_rng(1)
CLASSES = ['a', 'b', 'c']*(N//3)
classes = lambda **kw: loaders(CategoryBlock(), CLASSES, **kw)
MASKS = rng.integers(0, 3, (N, H, W)).astype(np.uint8)
masks = lambda: loaders(MaskBlock(codes=['x', 'y', 'z']), MASKS)
mask_head = lambda n: [nn.Conv2d(8, n, 1)]

class Spy(Callback):
    "Notes each training batch, after the loss is mixed"
    order = 90
    def __init__(self, mixer=None, stop=False): self.mixer, self.stop, self.seen = mixer, stop, []
    def after_loss(self):
        l, m = self.learn, self.mixer
        if not l.training: return
        self.seen.append(SimpleNamespace(batch=l.batch, xb=l.xb, yb=l.yb, pred=l.pred.detach(), loss=l.loss.detach(), partner=getattr(m, 'partner', None), lam=getattr(m, 'lam', None)))
        if self.stop: raise CancelFitException

def seen(learn, *mixers, epochs=1, stop=False, lr=1e-3):
    spy = Spy(mixers[0] if mixers else None, stop)
    with learn.no_bar(): learn.fit(epochs, lr, cbs=[*mixers, spy])
    return spy.seen

# ---- what the model sees ------------------------------------------------------------------------------------------
def test_mixup_mixes_each_input_with_its_partner():
    for o in seen(learner(classes(), 3), MixUp()):
        x, mixed = o.batch[0], o.xb[0]
        want = torch.stack([lam*x[i] + (1-lam)*x[j] for i, (j, lam) in enumerate(zip(o.partner, o.lam))])
        assert torch.allclose(mixed, want, atol=1e-6) and not torch.allclose(mixed, x, atol=1e-3)
        assert sorted(o.partner.tolist()) == list(range(12)) and o.lam.min() >= .5 and o.lam.max() <= 1
        assert mixed.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(memory_format=torch.channels_last)

def test_cutmix_pastes_one_rectangle_and_lam_is_the_share_that_is_left():
    xs = np.broadcast_to(np.arange(N, dtype=np.uint8)[:, None, None, None], (N, H, W, 3))         # picture i is all i
    pasted = 0
    for o in seen(learner(loaders(CategoryBlock(), CLASSES, xs), 3), CutMix(), epochs=4):
        x, mixed = o.batch[0], o.xb[0]
        assert mixed.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(memory_format=torch.channels_last)
        for i, (j, lam) in enumerate(zip(o.partner.tolist(), o.lam)):
            own = (mixed[i] == x[i]).all(0)
            if i == j: assert own.all(); continue
            assert torch.equal(own.sum()/(H*W), lam), 'λ is not the share of pixels'
            assert torch.equal(mixed[i], torch.where(own, x[i], x[j]))
            rows, cols = (~own).any(1), (~own).any(0)
            assert torch.equal(~own, rows[:, None] & cols) and (rows.long().diff() == 1).sum() <= 1 and (cols.long().diff() == 1).sum() <= 1
            pasted += int(not own.all())
    assert pasted > 100

def test_a_pasted_pixel_is_that_of_the_same_place():
    for o in seen(learner(classes(), 3), CutMix()):
        x, mixed = o.batch[0], o.xb[0]; own, other = (mixed == x).all(1), (mixed == x[o.partner]).all(1)
        assert (own | other).all() and torch.allclose(own.float().mean((1, 2))[o.partner != torch.arange(12)], o.lam[o.partner != torch.arange(12)], atol=.01)

def test_rectangles_reach_every_pixel_about_as_often_at_corners_as_opposite_ones():
    m = CutMix(); m.partner = torch.arange(4000)
    m.learn = SimpleNamespace(xb=(torch.zeros(4000, 1, H, W),), yb=(), dls=None)
    m.learn.xb[0][:] = torch.arange(4000.).reshape(-1, 1, 1, 1); before = m.learn.xb[0].clone(); m.partner = m.partner.roll(1)
    m.mix(np.random.default_rng(0))
    share = (m.learn.xb[0] != before).float().mean((0, 1))
    assert share.min() > .1 and (share - share.flip(0)).abs().max() < .04 and (share - share.flip(1)).abs().max() < .04

def test_pixels_of_other_sizes_are_cut_at_the_same_place():
    edges = torch.tensor([[.25, 0., .75, .5]])
    for h, w in ((4, 8), (8, 16), (40, 80)): assert _inside(edges, h, w)[0].nonzero().aminmax(dim=0).max.tolist() == [h//2-1, w*3//4-1] and _inside(edges, h, w).sum() == h*w//4

@BOTH
def test_the_loaders_own_batch_is_not_changed(mixer):
    plain = [o.batch[0].clone() for o in seen(learner(classes(), 3))]
    assert all(torch.equal(a, o.batch[0]) for a, o in zip(plain, seen(learner(classes(), 3), mixer())))

def test_the_larger_alpha_the_more_even():
    spread = {}
    for alpha in (.1, 1., 20.):
        m = MixUp(alpha); m.learn, m.partner = SimpleNamespace(xb=(torch.zeros(2000, 1),)), torch.arange(2000)
        m.mix(np.random.default_rng(0)); spread[alpha] = float(m.lam.mean())
    assert spread[.1] > .9 and abs(spread[1.] - .75) < .02 and spread[20.] < .6

@BOTH
def test_two_inputs_are_mixed_alike(mixer):
    xs = pictures()
    block = DataBlock((ImageBlock, ImageBlock, CategoryBlock), get_x=[xs.__getitem__, xs.__getitem__], get_y=CLASSES.__getitem__, splitter=EndSplitter(.25), n_inp=2)
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.net = network(3)
        def forward(self, a, b): return self.net(a) + self.net(b)
    learn = Learner(block.dataloaders(range(N), bs=12, num_workers=0, device='cpu'), Two(), precision='fp32')
    for o in seen(learn, mixer()): assert torch.equal(*o.xb) and not torch.equal(o.xb[0], o.batch[0])

# ---- the loss -----------------------------------------------------------------------------------------------------
def no_reduction(pred, y): return F.cross_entropy(pred, y)
def smoothed(pred, y, reduction='mean'): return F.cross_entropy(pred, y, label_smoothing=.1, reduction=reduction)

ANY_TARGET = [
    ('category', classes, 3, None, F.cross_entropy), ('smooth', classes, 3, LabelSmoothingCrossEntropyFlat(.2), lambda p, y: F.cross_entropy(p, y, label_smoothing=.2)),
    ('focal', classes, 3, FocalLossFlat(2.), FocalLossFlat(2.)), ('torch module', classes, 3, nn.CrossEntropyLoss(label_smoothing=.1), lambda p, y: F.cross_entropy(p, y, label_smoothing=.1)),
    ('function', classes, 3, smoothed, smoothed), ('no reduction', classes, 3, no_reduction, F.cross_entropy),
    ('several', lambda: loaders(MultiCategoryBlock(vocab=('a', 'b', 'c')), [['a'], ['b', 'c'], [], ['c']]*(N//4)), 3, None, lambda p, y: F.binary_cross_entropy_with_logits(p, y)),
    ('several flat', lambda: loaders(MultiCategoryBlock(vocab=('a', 'b', 'c')), [['a'], ['b', 'c'], [], ['c']]*(N//4)), 3, BCEWithLogitsLossFlat(), lambda p, y: F.binary_cross_entropy_with_logits(p, y)),
    ('number', lambda: loaders(RegressionBlock(), [float(i) for i in range(N)]), 1, None, lambda p, y: F.mse_loss(p.reshape(-1), y.reshape(-1)))]

@BOTH
@pytest.mark.parametrize('name, dls, n_out, loss, by_hand', ANY_TARGET, ids=[o[0] for o in ANY_TARGET])
def test_the_loss_is_that_of_both_targets_item_by_item(mixer, name, dls, n_out, loss, by_hand):
    mixed = 0
    for o in seen(learner(dls(), n_out, loss_func=loss), mixer()):
        p, y = o.pred, o.yb[0]
        want = np.mean([float(lam*by_hand(p[i:i+1], y[i:i+1]) + (1-lam)*by_hand(p[i:i+1], y[j:j+1])) for i, (j, lam) in enumerate(zip(o.partner.tolist(), o.lam))])
        assert np.isclose(float(o.loss), want, rtol=1e-4) and torch.equal(y, o.batch[1])
        mixed += not np.isclose(float(by_hand(p, y)), want, rtol=1e-4)
    assert mixed

@BOTH
def test_the_gradient_is_that_of_the_mixed_target(mixer):
    class Grad(Callback):
        def after_backward(self): self.grad = self.learn.model[-1].bias.grad.clone(); raise CancelFitException
    m, g, spy = mixer(), Grad(), Spy(); spy.mixer = m
    learn = learner(classes(), 3)
    with learn.no_bar(): learn.fit(1, cbs=[m, spy, g])
    o = spy.seen[0]; y = F.one_hot(o.yb[0], 3).float()
    soft = o.lam[:, None]*y + (1-o.lam)[:, None]*y[o.partner]
    assert torch.allclose(g.grad, (o.pred.softmax(1) - soft).mean(0), atol=1e-6)

def test_masks_are_mixed_by_their_losses_with_mixup():
    for loss in (None, CrossEntropyLossFlat(axis=1)):
        for o in seen(Learner(masks(), network(3, head=mask_head), loss_func=loss, precision='fp32'), MixUp()):
            each = [F.cross_entropy(o.pred, y, reduction='none').mean((1, 2)) for y in (o.yb[0], o.yb[0][o.partner])]
            assert torch.allclose(o.loss, (o.lam*each[0] + (1-o.lam)*each[1]).mean(), atol=1e-5)

def test_masks_are_cut_and_pasted_with_cutmix():
    xs = np.repeat(MASKS[..., None]*100, 3, -1)                                       # the picture shows its mask
    learn = Learner(loaders(MaskBlock(codes=['x', 'y', 'z']), MASKS, xs), network(3, head=mask_head), precision='fp32')
    changed = 0
    for o in seen(learn, CutMix()):
        assert torch.equal(o.yb[0], (o.xb[0][:, 0]*2.55).round().long()) and o.yb[0].dtype == torch.int64
        assert torch.allclose(o.loss, F.cross_entropy(o.pred, o.yb[0]), atol=1e-5)
        changed += (o.yb[0] != o.batch[1]).any((1, 2)).sum()
    assert changed > 10

def test_pixels_without_a_class_count_for_nothing_with_cutmix():
    "The loss of a pasted mask is the loss of the block, over all pixels of the batch that have a class"
    some = np.where(np.arange(N)[:, None, None] % 3 > 0, 255, MASKS).astype(np.uint8); some[:, 0, 0] = 0
    learn = Learner(loaders(MaskBlock(codes=['x', 'y', 'z'], ignore_index=255), some), network(3, head=mask_head), precision='fp32')
    for o in seen(learn, CutMix()): assert torch.allclose(o.loss, F.cross_entropy(o.pred, o.yb[0], ignore_index=255), atol=1e-6)

def test_a_mask_and_a_class_at_once():
    xs = pictures()
    block = DataBlock((ImageBlock, MaskBlock(codes=['x', 'y', 'z']), CategoryBlock), get_x=xs.__getitem__, get_y=[MASKS.__getitem__, CLASSES.__getitem__], splitter=EndSplitter(.25), n_inp=1)
    def loss(pred, mask, y, reduction='mean'):
        each = F.cross_entropy(pred, mask, reduction='none').mean((1, 2)) + F.cross_entropy(pred.mean((2, 3)), y, reduction='none')
        return each if reduction == 'none' else each.mean()
    learn = Learner(block.dataloaders(range(N), bs=12, num_workers=0, device='cpu'), network(3, head=mask_head), loss_func=loss, precision='fp32')
    for o in seen(learn, CutMix()):
        mask, y = o.yb
        want = o.lam*loss(o.pred, mask, y, 'none') + (1-o.lam)*loss(o.pred, mask, y[o.partner], 'none')
        assert torch.allclose(o.loss, want.mean(), atol=1e-5) and not torch.equal(mask, o.batch[1]) and torch.equal(y, o.batch[2])

def test_points_are_mixed_but_not_cut():
    points = [[(rng.uniform(0, W), rng.uniform(0, H))] for _ in range(N)]
    learn = learner(loaders(PointBlock(), points), 2)
    assert all(o.loss.isfinite() for o in seen(learn, MixUp()))
    passes = learn.passes
    with pytest.raises(TrainingError, match='PointBlock.*MixUp'): learn.fit(1, cbs=CutMix())
    assert learn.passes == passes                                                     # refused before the first batch
    boxes = learner(loaders(BBoxBlock(), [([(1, 1, 5, 5)], ['a'])]*N), 2, loss_func=lambda p, y: p.mean())
    with pytest.raises(TrainingError, match='BBoxBlock'): boxes.fit(1, cbs=CutMix())

# ---- what is drawn -------------------------------------------------------------------------------------------------
@BOTH
def test_the_same_seed_mixes_the_same_and_each_pass_anew(mixer):
    runs = [seen(learner(classes(), 3), mixer(), epochs=2) for _ in range(2)]
    assert all(torch.equal(a.xb[0], b.xb[0]) and torch.equal(a.lam, b.lam) and torch.equal(a.loss, b.loss) for a, b in zip(*runs))
    lams = [tuple(o.lam.tolist()) for o in runs[0]]
    assert len(set(lams)) == len(lams) == 6
    learn = learner(classes(), 3)
    assert not torch.equal(seen(learn, mixer())[0].lam, seen(learn, mixer())[0].lam)         # a second fit
    assert not torch.equal(seen(learner(classes(seed=4), 3), mixer())[0].lam, runs[0][0].lam)

@BOTH
def test_no_global_generator_is_touched(mixer):
    learn, state, numpys = learner(classes(), 3), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    seen(learn, mixer())
    assert torch.equal(torch.random.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpys)

def test_with_both_each_batch_is_mixed_by_one_of_them_evenly():
    up, cut = MixUp(), CutMix()
    class Which(Callback):
        used = ()
        def before_batch(self):
            if self.learn.training: self.used += ((up.partner is not None, cut.partner is not None),)
    which, learn = Which(), learner(classes(bs=4), 3, cbs=[up])
    with learn.no_bar(): learn.fit(6, 1e-4, cbs=[which, cut])                        # given in two places
    assert set(which.used) == {(True, False), (False, True)} and 16 < sum(a for a, _ in which.used) < 38 and len(which.used) == 54

def test_with_both_the_loss_is_that_of_the_one_that_mixed():
    up, cut = MixUp(), CutMix()
    class Look(Callback):
        order = 90
        def after_loss(self):
            l, m = self.learn, up if up.partner is not None else cut
            if l.training: assert torch.allclose(l.loss, (m.lam*F.cross_entropy(l.pred, l.yb[0], reduction='none') + (1-m.lam)*F.cross_entropy(l.pred, l.yb[0][m.partner], reduction='none')).mean(), atol=1e-5)
    learn = learner(classes(), 3)
    with learn.no_bar(): learn.fit(4, cbs=[cut, up, Look()])

# ---- what is left alone ---------------------------------------------------------------------------------------------
@BOTH
def test_validation_and_metrics_are_those_of_whole_pictures(mixer):
    m = mixer()
    learn = learner(classes(), 3, metrics=accuracy, cbs=m)
    with learn.no_bar():
        learn.fit(1, 1e-3)
        with_it = learn.validate(); preds = learn.get_preds(with_loss=True)
        assert learn.recorder.values[-1][1:] == with_it
        learn.remove_cbs(m)
        assert learn.validate() == with_it and torch.equal(learn.get_preds()[0], preds[0])
    x, y = next(iter(learn.dls.valid))
    assert np.isclose(with_it[0], float(F.cross_entropy(learn.model.eval()(x), y).detach()), rtol=1e-4)

@BOTH
def test_measuring_in_the_middle_of_a_batch_does_not_disturb_it(mixer):
    class Measure(Callback):
        order = 5
        def after_pred(self):
            if self.learn.training: self.learn.validate()
    quiet = seen(learner(classes(), 3), mixer())
    loud = seen(learner(classes(), 3, cbs=Measure()), mixer())
    assert all(torch.equal(a.loss, b.loss) and torch.equal(a.lam, b.lam) for a, b in zip(quiet, loud))

@BOTH
@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward'])
def test_nothing_is_left_behind_after_an_error(mixer, error, event):
    class Fail(Callback): pass
    def fail(self): raise error
    setattr(Fail, event, fail)
    loss = LabelSmoothingCrossEntropyFlat()
    learn = learner(classes(), 3, loss_func=loss)
    before, x = dict(vars(loss)), next(iter(learn.dls.valid))
    with learn.no_bar():
        try: learn.fit(1, cbs=[mixer(), Fail()])
        except error: pass
        assert learn.loss_func is loss and loss.reduction == 'mean' and vars(loss).keys() == before.keys()
        assert not any(isinstance(cb, (MixUp, CutMix)) for cb in learn.cbs)
        assert np.isclose(learn.validate()[0], float(loss(learn.model.eval()(x[0]), x[1]).detach()), rtol=1e-4)

def test_a_loss_that_is_not_finite_is_still_found():
    learn = learner(classes(), 3, loss_func=lambda pred, y, reduction='mean': pred[:, 0]/0 if reduction == 'none' else pred[:, 0].mean())
    with pytest.raises(TrainingError, match='not finite'), learn.no_bar(): learn.fit(1, cbs=MixUp())

# ---- what is refused ------------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize('alpha', [0, -1., float('inf'), float('nan'), '1', None], ids=str)
def test_alpha(mixer, alpha):
    with pytest.raises(TrainingError, match=f'{mixer.__name__}.*alpha'): mixer(alpha)

def test_defaults_and_position(): assert (MixUp().alpha, CutMix().alpha, MixUp(.2).alpha, CutMix(alpha=2).alpha) == (.4, 1., .2, 2)

@BOTH
def test_a_loss_without_a_value_for_each_item_is_said(mixer):
    learn = learner(classes(), 3, loss_func=lambda pred, y, reduction='mean': F.cross_entropy(pred, y))
    with pytest.raises(TrainingError, match='the loss of each item is needed'), learn.no_bar(): learn.fit(1, cbs=mixer())

def test_inputs_that_cannot_be_mixed_are_said():
    class Change(Callback):
        order = -30
        def __init__(self, f): self.f = f
        def before_batch(self): self.learn.xb = tuple(self.f(x) for x in self.learn.xb)
    for mixer, f, says in ((MixUp, lambda x: x.long(), 'floats'), (CutMix, lambda x: x.long(), 'floats'), (CutMix, lambda x: x.flatten(1), 'images')):
        learn = learner(classes(), 3)
        with pytest.raises(TrainingError, match=f'{mixer.__name__}.*{says}'), learn.no_bar(): learn.fit(1, cbs=[mixer(), Change(f)])

# ---- and it learns ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('cbs', [[MixUp()], [CutMix()], [MixUp(), CutMix()]], ids=['MixUp', 'CutMix', 'both'])
def test_a_network_learns_from_mixed_batches_and_is_less_sure(cbs):
    "Bright pictures and dark ones, under much noise"
    r = np.random.default_rng(0); ys = ['dark', 'bright']*32
    xs = np.stack([(r.integers(0, 130, (H, W, 3)) + 60*(y == 'bright')).astype(np.uint8) for y in ys])
    sure = []
    for c in ([], cbs):
        learn = Learner(loaders(CategoryBlock(), ys, xs, bs=16), network(2), loss_func=LabelSmoothingCrossEntropyFlat(.05), metrics=accuracy, precision='fp32', cbs=c)
        with learn.no_bar(): learn.fit_one_cycle(12, 1e-2)
        assert learn.recorder.values[-1][2] > .95
        sure.append(float(learn.get_preds()[0].amax(1).mean()))
    assert sure[1] < sure[0] - .01
