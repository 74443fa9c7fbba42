import copy, pickle
from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from blocks.core import DataError, TrainingError
from blocks.data.label import CategoryBlock, MultiCategoryBlock, RegressionBlock
from blocks.data.place import MaskBlock
from blocks.train.loss import (BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat, L1LossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat, check_loss, flatten_check)

CLASS = [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, FocalLossFlat]
VALUE = [BCEWithLogitsLossFlat, MSELossFlat, L1LossFlat]

def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def classes(n, *shape, seed=1): return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(seed))
def same(a, b): torch.testing.assert_close(a, b)

# ---- flatten_check --------------------------------------------------------------------------------------------
@pytest.mark.parametrize('a,b', [((4,), (4,)), ((4, 1), (4,)), ((4,), (4, 1)), ((4, 3), (4, 3)), ((4, 6), (4, 3, 2)), ((4, 3, 2), (4, 6)), ((1, 4), (1, 2, 2)), ((), ()), ((1,), ()), ((2, 1, 5, 6), (2, 5, 6))])
def test_these_pair(a, b):
    p, t = flatten_check(torch.zeros(a), torch.zeros(b)); assert p.shape == t.shape == (torch.zeros(a).numel(),)
@pytest.mark.parametrize('a,b', [((4,), (5,)), ((4, 3), (4,)), ((4, 3), (3, 4)), ((1, 4), (4,)), ((4,), (1, 4)), ((4,), (2, 2)), ((2, 3, 5, 6), (2, 3, 6, 5)), ((), (2,))])
def test_these_do_not_pair_and_both_shapes_are_named(a, b):
    with pytest.raises(DataError) as e: flatten_check(torch.zeros(a), torch.zeros(b))
    assert str(a) in str(e.value) and str(b) in str(e.value)
@pytest.mark.parametrize('a,b,axis', [((4, 3), (5,), -1), ((4, 3, 5, 6), (4, 5, 6), -1), ((4, 3, 5, 6), (4, 6, 5), 1), ((4, 3), (4, 3), -1), ((1, 3), (3,), -1)])
def test_classes_do_not_pair(a, b, axis):
    with pytest.raises(DataError) as e: flatten_check(torch.zeros(a), torch.zeros(b), axis)
    assert str(a) in str(e.value) and str(b) in str(e.value)
def test_axis_is_moved_last():
    p = draw(4, 3, 5, 6); y = classes(3, 4, 5, 6); a, b = flatten_check(p, y, 1)
    assert torch.equal(a.reshape(4, 5, 6, 3)[2, 4, 1], p[2, :, 4, 1]) and torch.equal(b.reshape(4, 5, 6), y)

# ---- values ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('shape,axis', [((20, 5), -1), ((4, 5, 6, 7), 1), ((4, 6, 5), -1), ((5, 9), 0), ((5,), -1)])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('weight', [None, [1., 2, 3, 4, 5]])
def test_cross_entropy_is_pytorchs(shape, axis, reduction, weight):
    p = draw(*shape); rest = list(shape); del rest[axis]; y = classes(5, *rest); flat = p.movedim(axis, -1).reshape(-1, 5)
    w = None if weight is None else torch.tensor(weight)
    for kw in ({}, dict(label_smoothing=.2), dict(ignore_index=3)):
        same(CrossEntropyLossFlat(axis=axis, weight=weight, reduction=reduction, **kw)(p, y), F.cross_entropy(flat, y.reshape(-1), weight=w, reduction=reduction, **kw))

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_label_smoothing(reduction):
    p, y = draw(9, 4), classes(4, 9)
    same(LabelSmoothingCrossEntropyFlat(eps=.3, reduction=reduction)(p, y), F.cross_entropy(p, y, label_smoothing=.3, reduction=reduction))
    assert LabelSmoothingCrossEntropyFlat().label_smoothing == .1
    w = torch.tensor([1., 2, .5, 3]); same(LabelSmoothingCrossEntropyFlat(eps=.3, reduction=reduction, weight=w)(p, y), F.cross_entropy(p, y, w, label_smoothing=.3, reduction=reduction))
    same(LabelSmoothingCrossEntropyFlat(reduction=reduction, ignore_index=2)(p, y), F.cross_entropy(p, y, label_smoothing=.1, ignore_index=2, reduction=reduction))

@pytest.mark.parametrize('gamma', [0., .5, 1., 2., 5.])
def test_focal_by_its_formula(gamma):
    p, y = draw(9, 4).double(), classes(4, 9); w = torch.tensor([1., 2, .5, 3], dtype=torch.double)
    q = p.softmax(1)[range(9), y]; want = -(1 - q)**gamma*q.log()
    same(FocalLossFlat(gamma, reduction='none')(p, y), want); same(FocalLossFlat(gamma)(p, y), want.mean()); same(FocalLossFlat(gamma, reduction='sum')(p, y), want.sum())
    same(FocalLossFlat(gamma, weight=w, reduction='none')(p, y), want*w[y])       # the weight is no part of p
@pytest.mark.parametrize('gamma', [0., .5, 1., 2.])
def test_focal_has_finite_slopes_where_the_model_is_certain(gamma):
    p = torch.tensor([[200., 0.], [0., 200.], [30., 0.]], requires_grad=True); FocalLossFlat(gamma)(p, torch.zeros(3, dtype=torch.long)).backward()
    assert torch.isfinite(p.grad).all()
def test_focal_is_exact_for_easy_entries():
    q, y = torch.tensor([[12., 0.]]), torch.tensor([0])
    same(FocalLossFlat(1.)(q, y), FocalLossFlat(1.)(q.double(), y).float())
def test_focal_leaves_out_ignored_entries():
    p, y = draw(4, 3), torch.tensor([0, -100, 2, 1])
    got = FocalLossFlat(weight=[1, 2, 3], reduction='none')(p, y); assert got[1] == 0 and (got[[0, 2, 3]] > 0).all()
    y[1] = 255; left = [0, 2, 3]
    for w in (None, [1, 2, 3]): same(FocalLossFlat(weight=w, ignore_index=255)(p, y), FocalLossFlat(weight=w)(p[left], y[left]))

@pytest.mark.parametrize('shape', [(7,), (7, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_value_losses_are_pytorchs(shape, reduction):
    p, t = draw(*shape), (draw(*shape, seed=2) > 0).float()
    for ours, theirs in ((BCEWithLogitsLossFlat, F.binary_cross_entropy_with_logits), (MSELossFlat, F.mse_loss), (L1LossFlat, F.l1_loss)):
        want = theirs(p, t, reduction=reduction); same(ours(reduction=reduction)(p, t), want.reshape(-1) if reduction == 'none' else want)
def test_values_pair_and_are_not_crossed():
    p, t = draw(6, 1), draw(6, seed=2)
    same(MSELossFlat()(p, t), ((p[:, 0] - t)**2).mean()); same(L1LossFlat()(t, p), (p[:, 0] - t).abs().mean()); same(BCEWithLogitsLossFlat()(p, t > 0), F.binary_cross_entropy_with_logits(p[:, 0], (t > 0).float()))
    p, t = draw(6, 4), draw(6, 2, 2, seed=2); same(MSELossFlat()(p, t), ((p - t.reshape(6, 4))**2).mean())
@pytest.mark.parametrize('axis,shape', [(-1, (6, 3)), (1, (2, 3, 4, 5))])
def test_bce_weights_belong_to_the_classes(axis, shape):
    p, t = draw(*shape), (draw(*shape, seed=2) > 0).float(); w, pw = torch.tensor([1., 2, 3]), torch.tensor([5., .5, 1])
    at = [1]*len(shape); at[axis] = 3
    want = F.binary_cross_entropy_with_logits(p, t, w.reshape(at), pos_weight=pw.reshape(at), reduction='none')
    f = BCEWithLogitsLossFlat(axis=axis, weight=w, pos_weight=pw); same(f(p, t), want.mean())
    f.reduction = 'none'; same(f(p, t), want.movedim(axis, -1).reshape(-1))
def test_bce_takes_one_positive_weight_for_all():
    p, t = draw(6, 3), (draw(6, 3, seed=2) > 0).float()
    same(BCEWithLogitsLossFlat(pos_weight=4.)(p, t), F.binary_cross_entropy_with_logits(p, t, pos_weight=torch.tensor(4.)))

# ---- types ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('make', CLASS + VALUE)
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_half_precision_logits_are_compared_in_float32(make, dtype, reduction):
    p = (draw(300, 4)*4).to(dtype); y = classes(4, 300) if make in CLASS else (draw(300, 4, seed=2) > 0).to(dtype); f = make(reduction=reduction)
    with torch.autocast('cpu', dtype=torch.bfloat16): got = f(p, y)
    assert got.dtype == torch.float32; torch.testing.assert_close(got, f(p.float(), y), rtol=0, atol=0)
    assert f.activation(p).dtype == (p.dtype if make in (MSELossFlat, L1LossFlat) else torch.float32)
@pytest.mark.parametrize('make', CLASS + VALUE)
def test_double_stays_double(make):
    assert make()(draw(6, 4).double(), classes(4, 6) if make in CLASS else draw(6, 4) > 0).dtype == torch.float64
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_class_numbers_of_any_integer_type(dtype):
    p, y = draw(9, 4), classes(2, 9)
    for make in CLASS: same(make()(p, y.to(dtype)), make()(p, y))
@pytest.mark.parametrize('make', VALUE)
def test_targets_of_any_type_are_floated(make):
    p, t = draw(9, 2), classes(2, 9, 2)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16): same(make()(p, t.to(dtype)), make()(p, t.float()))
@pytest.mark.parametrize('make', CLASS)
def test_masks_of_torchvision_give_plain_tensors(make):
    from torchvision import tv_tensors
    p, m = draw(2, 3, 4, 4), tv_tensors.Mask(classes(3, 2, 4, 4)); got = make(axis=1)(p, m)
    assert type(got) is torch.Tensor; same(got, make(axis=1)(p, m.as_subclass(torch.Tensor)))
@pytest.mark.parametrize('make', CLASS + VALUE)
def test_slopes_reach_the_logits_in_their_own_type(make):
    p = draw(6, 4).bfloat16().requires_grad_(); make()(p, classes(4, 6) if make in CLASS else draw(6, 4) > 0).backward()
    assert p.grad.dtype == torch.bfloat16 and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0

# ---- activation, decodes, state -------------------------------------------------------------------------------
def test_activation_and_decodes():
    p = draw(2, 3, 4, 5)
    for make in CLASS:
        f = make(axis=1); same(f.activation(p), p.softmax(1)); assert torch.equal(f.decodes(f.activation(p)), p.argmax(1))
    f = BCEWithLogitsLossFlat(thresh=.3); same(f.activation(p), p.sigmoid()); assert torch.equal(f.decodes(p.sigmoid()), p.sigmoid() > .3)
    for make in (MSELossFlat, L1LossFlat): assert make().activation(p) is p and make().decodes(p) is p
@pytest.mark.parametrize('make', CLASS + VALUE)
def test_reduction_may_be_changed_and_pickled(make):
    f = make(); p, y = draw(6, 4), classes(4, 6) if make in CLASS else draw(6, 4, seed=3) > 0; mean = f(p, y)
    f.reduction = 'none'; each = f(p, y); assert each.shape == ((6,) if make in CLASS else (24,)); same(each.mean(), mean)
    for g in (pickle.loads(pickle.dumps(f)), copy.deepcopy(f)): same(g(p, y), each)
    f.reduction = 'average'
    with pytest.raises(DataError, match='average'): f(p, y)
def test_weights_are_state_and_move_with_the_loss():
    f = BCEWithLogitsLossFlat(weight=[1, 2], pos_weight=[3, 4]); assert set(f.state_dict()) == {'weight', 'pos_weight'} and not list(f.parameters())
    meta = CrossEntropyLossFlat(weight=[1, 2]); meta(torch.zeros(3, 2, device='meta'), torch.zeros(3, dtype=torch.long, device='meta')); assert meta.weight.device.type == 'meta'

# ---- what goes wrong ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('make', CLASS + VALUE)
def test_batch_sizes_that_differ(make):
    with pytest.raises(DataError) as e: make()(draw(8, 4), classes(4, 7) if make in CLASS else draw(7, 4))
    assert '(8, 4)' in str(e.value) and '(7' in str(e.value)
@pytest.mark.parametrize('make', CLASS)
@pytest.mark.parametrize('bad', [5, -1, 7])
def test_class_without_an_output(make, bad):
    y = classes(5, 6); y[3] = bad
    with pytest.raises(DataError, match=f'class {bad}, and the model has 5 outputs'): make()(draw(6, 5), y)
def test_ignored_class_is_not_the_one_blamed():
    with pytest.raises(DataError, match='class 9'): CrossEntropyLossFlat(ignore_index=255)(draw(3, 5), torch.tensor([255, 9, 0]))
    assert torch.isfinite(CrossEntropyLossFlat(ignore_index=255)(draw(3, 5), torch.tensor([255, 4, 0])))
@pytest.mark.parametrize('make', CLASS)
def test_float_targets_for_a_classifier(make):
    with pytest.raises(DataError, match='BCEWithLogitsLossFlat'): make()(draw(6, 5), draw(6))
@pytest.mark.parametrize('f,p,y', [(CrossEntropyLossFlat(weight=[1, 2]), (6, 3), 'c'), (FocalLossFlat(weight=[1, 2]), (6, 3), 'c'), (BCEWithLogitsLossFlat(weight=[1, 2]), (6, 3), 'v'), (BCEWithLogitsLossFlat(pos_weight=[1, 2]), (6, 3), 'v')])
def test_weights_that_are_not_one_for_each_class(f, p, y):
    with pytest.raises(DataError, match='2 values and the model 3 outputs'): f(draw(*p), classes(3, 6) if y == 'c' else draw(*p))
def test_arguments_that_cannot_be():
    for make in (lambda: CrossEntropyLossFlat(label_smoothing=1.5), lambda: LabelSmoothingCrossEntropyFlat(eps=-.1), lambda: FocalLossFlat(gamma=-1), lambda: CrossEntropyLossFlat(torch.ones(3))):
        with pytest.raises(DataError): make()
    with pytest.raises(TypeError): CrossEntropyLossFlat(reduce='mean')

# ---- Dice -----------------------------------------------------------------------------------------------------
MAPS, MASKS = draw(4, 3, 6, 5), classes(3, 4, 6, 5)
def dice_by_hand(p, y, smooth=1e-6, square=False):
    "(batch, classes), one picture and class at a time"
    q = p.double().softmax(1); t = torch.stack([(y == c).double() for c in range(p.shape[1])], 1)
    return torch.stack([torch.stack([1 - (2*(a*b).sum() + smooth)/(((a**2 if square else a) + b).sum() + smooth) for a, b in zip(*o)]) for o in zip(q, t)]).float()
@pytest.mark.parametrize('square', [False, True])
@pytest.mark.parametrize('smooth', [1e-6, 1.])
def test_dice_by_its_formula(square, smooth):
    y = MASKS.clamp(max=1); want = dice_by_hand(MAPS, y, smooth, square); f = partial(DiceLoss, smooth=smooth, square_in_union=square)         # class 2 is nowhere
    same(f()(MAPS, y), want.sum()); same(f(reduction='mean')(MAPS, y), want.mean()); same(f(reduction='none')(MAPS, y), want); same(f()(MAPS, y[:, None]), want.sum()); same(f(axis=-1)(MAPS.movedim(1, -1), y), want.sum())
    same(DiceLoss(1, smooth, 'mean', square)(MAPS, y.int()), want.mean())
    deep, voxels = draw(2, 3, 4, 5, 6), classes(3, 2, 4, 5, 6); same(f()(deep, voxels), dice_by_hand(deep, voxels, smooth, square).sum())
def test_dice_weights_and_what_is_ignored():
    w, each = torch.tensor([1., 2, 5]), dice_by_hand(MAPS, MASKS); holes = MASKS.clone(); holes[:, 2:4] = 255; kept = [0, 1, 4, 5]
    same(DiceLoss(weight=w)(MAPS, MASKS), (each*w).sum()); same(DiceLoss(weight=[1, 2, 5], reduction='mean')(MAPS, MASKS), (each*w).sum()/(4*8)); same(DiceLoss(weight=w, reduction='none')(MAPS, MASKS), each*w)
    same(DiceLoss(weight=2., reduction='mean')(MAPS, MASKS), each.mean()); same(DiceLoss(ignore_index=255)(MAPS, holes), DiceLoss()(MAPS[:, :, kept], MASKS[:, kept])); same(DiceLoss(ignore_index=0, reduction='none')(MAPS, MASKS)[:, 0], torch.ones(4))
def test_dice_in_half_precision_and_its_slopes():
    p = MAPS.half().requires_grad_(); loss = DiceLoss()(p, MASKS); assert loss.dtype == torch.float32; same(loss, DiceLoss()(MAPS.half().float(), MASKS)); loss.backward(); assert p.grad.dtype == torch.float16 and p.grad.abs().sum() > 0
    p = torch.zeros(1, 2, 4, 4, requires_grad=True); y = torch.zeros(1, 4, 4).long(); y[0, 0] = 1
    for _ in range(60): g, = torch.autograd.grad(DiceLoss()(p, y), p); p = (p - 20*g).detach().requires_grad_()
    assert torch.equal(p.argmax(1), y) and DiceLoss()(p, y) < .05                              # it leads to the target
def test_dice_state_and_activation():
    f = DiceLoss(weight=[1, 2, 3]); assert set(f.state_dict()) == {'weight'}; same(f.activation(MAPS), MAPS.softmax(1)); assert torch.equal(f.decodes(MAPS), MAPS.argmax(1)); same(pickle.loads(pickle.dumps(f))(MAPS, MASKS), f(MAPS, MASKS))
def test_dice_says_what_is_wrong():
    for f, p, y, word in ((DiceLoss(), MAPS, MASKS[:-1], 'do not pair'), (DiceLoss(), MAPS, MASKS.float(), 'class numbers'), (DiceLoss(), draw(6, 3), classes(3, 6), 'height, width'), (DiceLoss(), MAPS, MASKS + 1, 'class 3, and the model has 3'),
                          (DiceLoss(weight=[1, 2]), MAPS, MASKS, '2 values and the model 3'), (DiceLoss(reduction='all'), MAPS, MASKS, 'all'), (DiceLoss(ignore_index=9), MAPS, MASKS + 1, 'class 3')):
        with pytest.raises(DataError, match=word): f(p, y)
def test_an_axis_that_is_not_there():
    for f in (CrossEntropyLossFlat(axis=1), FocalLossFlat(axis=2)):
        with pytest.raises(DataError, match='no axis'): f(draw(4), classes(2, 4))

# ---- outputs of the right kind --------------------------------------------------------------------------------
def ends(*layers): return nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), *layers)
class Functional(nn.Module):
    "The classic first network, whose activation is a function"
    def __init__(self, act): super().__init__(); self.lin, self.drop, self.name = nn.Linear(6, 3), nn.Dropout(), act
    def forward(self, x): return {'log': F.log_softmax, 'soft': F.softmax, 'none': lambda x, dim: x}[self.name](self.lin(x), dim=1)
class LogNet(nn.Module):
    def __init__(self): super().__init__(); self.lin = nn.Linear(6, 3)
    def forward(self, x): return F.log_softmax(self.lin(x), dim=1)
NLL = [nn.NLLLoss(), F.nll_loss, partial(F.nll_loss, reduction='sum')]
LOGITS = [nn.CrossEntropyLoss(), F.cross_entropy, partial(F.cross_entropy, label_smoothing=.1), CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat(), FocalLossFlat(), DiceLoss(), nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits,
          BCEWithLogitsLossFlat(), CategoryBlock(vocab=list('abc')).loss, MultiCategoryBlock(vocab=list('abc')).loss, MaskBlock(codes=list('abc')).loss]
@pytest.mark.parametrize('loss', NLL)
def test_logits_for_nll(loss):
    for model in (ends(), ends(nn.Softmax(1)), ends(nn.LogSoftmax(1), nn.Linear(3, 3)), ends(nn.Dropout(), nn.Flatten())):
        with pytest.raises(TrainingError, match='NLLLoss wants the logarithms.*CrossEntropyLossFlat'): check_loss(model, loss)
    for model in (ends(nn.LogSoftmax(1)), ends(nn.LogSoftmax(1), nn.Dropout(), nn.Identity(), nn.Flatten()), LogNet(), nn.Sequential(LogNet())): check_loss(model, loss)
@pytest.mark.parametrize('loss', LOGITS)
@pytest.mark.parametrize('act', [nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid(), nn.Softmax2d(), nn.LogSigmoid()])
def test_activated_outputs_for_a_loss_of_logits(loss, act):
    for model in (ends(act), ends(nn.Sequential(act), nn.Flatten())):
        with pytest.raises(TrainingError, match=f'wants logits.*ends in {type(act).__name__}.*Leave it out'): check_loss(model, loss)
    for model in (ends(), ends(act, nn.Linear(3, 3)), ends(nn.ReLU())): check_loss(model, loss)
def test_losses_that_want_what_they_get():
    for loss in (nn.BCELoss(), nn.MSELoss(), MSELossFlat(), L1LossFlat(), F.mse_loss, RegressionBlock(n_out=1).loss, lambda p, y: p.sum(), nn.PoissonNLLLoss(), nn.GaussianNLLLoss()):
        for model in (ends(), ends(nn.Sigmoid()), ends(nn.LogSoftmax(1)), nn.Identity()): check_loss(model, loss)
def test_outputs_have_the_last_word():
    x = draw(8, 6)
    def check(model, loss): model.eval(); check_loss(model, loss, model(x))
    check(Functional('log'), nn.NLLLoss()); check(Functional('none'), CrossEntropyLossFlat()); check(ends(), BCEWithLogitsLossFlat())
    for name in ('none', 'soft'):
        with pytest.raises(TrainingError, match='logarithms'): check(Functional(name), nn.NLLLoss())
    for name in ('log', 'soft'):
        with pytest.raises(TrainingError, match='the model gives .*probabilities'): check(Functional(name), CrossEntropyLossFlat())
    with pytest.raises(TrainingError, match='Sigmoid'): check(ends(nn.Sigmoid()), nn.BCEWithLogitsLoss())
    unused = ends(nn.Softmax(1), nn.Sigmoid()); check_loss(unused, nn.CrossEntropyLoss(), draw(8, 3))       # registered, and left out by forward
    check_loss(ends(nn.Softmax(1)), nn.CrossEntropyLoss(), draw(8, 3)); check_loss(ends(), CrossEntropyLossFlat(), torch.zeros(8, 3)); check_loss(ends(), nn.CrossEntropyLoss(), (draw(2, 3), draw(2, 3)))
def test_outputs_on_another_axis():
    check_loss(ends(), nn.NLLLoss(), MAPS.log_softmax(1)); check_loss(ends(), CrossEntropyLossFlat(axis=1), MAPS)
    for loss, p in ((CrossEntropyLossFlat(axis=1), MAPS.softmax(1)), (CrossEntropyLossFlat(), MAPS.softmax(-1)), (nn.CrossEntropyLoss(), MAPS.softmax(1).half())):
        with pytest.raises(TrainingError, match='gives probabilities'): check_loss(ends(), loss, p)
