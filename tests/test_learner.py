"The loop around a model: what is trained, how fast, what is measured, what is kept."
import io
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from blocks import (Callback, CategoryBlock, DataBlock, DataError, ImageBlock, Learner, ProgressCallback, RandomSplitter, Resize, SaveModelCallback, TrainingError, accuracy, aug_transforms,
                    get_image_files, parent_label, set_seed)


def loaders(root, **kw):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(16), batch_tfms=kw.pop('batch_tfms', None))
    return block.dataloaders(root, **(dict(bs=8, num_workers=0, seed=1, device='cpu') | kw))

@pytest.fixture
def make(dls, tiny, tmp_path):
    "A function that makes a silent learner"
    def make(model=None, dls=dls, **kw):
        learn = Learner(dls, model or tiny(), path=kw.pop('path', tmp_path), **kw)
        learn.remove_cbs(learn.progress)
        return learn
    return make

class See(Callback):
    "Calls a function at an event"
    def __init__(self, event, do): setattr(self, event, lambda: do(self.learn))

class Stop(Callback):
    def __init__(self, e=KeyboardInterrupt, when=lambda l: l.iter == 2): self.e, self.when = e, when
    def before_batch(self):
        if self.learn.training and self.when(self.learn): raise self.e

def three(model): return [list(model[0].parameters()), list(model[1].parameters()), list(model[5].parameters())]
def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def equal(a, b): return all(torch.equal(a[k], b[k]) for k in a)
def field(learn, name): return sorted({g[name] for g in learn.opt.param_groups})

# --- measuring
def test_validation_is_over_the_whole_set_with_unequal_batches(make, two_class):
    learn = make(dls=loaders(two_class, val_bs=5), metrics=[accuracy])
    loss, acc = learn.validate()
    probs, y = learn.get_preds()
    assert len(y) == 12 and loss == pytest.approx(float(F.nll_loss(probs.log(), y)), abs=1e-5) and acc == pytest.approx(float((probs.argmax(1) == y).float().mean()))

def test_metrics_as_function_torchmetrics_and_list(make):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
    learn = make(metrics=[accuracy, MulticlassAccuracy(2, average='micro'), MulticlassF1Score(2), lambda p, y: float(len(y))])
    _, a, b, f1, n = learn.validate()
    assert a == pytest.approx(b) and 0 <= f1 <= 1 and n == 12
    assert make(metrics=accuracy).validate()[1] == make(metrics=[accuracy]).validate()[1] == a

def test_validate_takes_a_loader_or_the_number_of_a_split(make, dls, two_class):
    learn = make(metrics=accuracy)
    assert list(learn.validate(dl=dls.valid)) == list(learn.validate()) == list(learn.validate(1))
    probs, y = learn.get_preds(ds_idx=0)
    assert learn.validate(0)[0] == pytest.approx(float(F.nll_loss(probs.log(), y)), abs=1e-5) and len(y) == 36

def test_measuring_without_targets_is_a_clear_error(make, dls, two_class):
    with pytest.raises((DataError, TrainingError), match='target'): make(metrics=accuracy).validate(dl=dls.test_dl(get_image_files(two_class)[:3]))

@pytest.mark.parametrize('ds_idx', [2, -3])
def test_a_split_that_is_not_there_is_a_clear_error(make, ds_idx):
    with pytest.raises((DataError, TrainingError), match='ds_idx'): make().validate(ds_idx)

def test_get_preds_and_all_it_can_add(make, dls):
    learn = make()
    x, probs, y, decoded, losses = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    assert x.shape == (12, 3, 16, 16) and torch.allclose(probs.sum(1), torch.ones(12)) and torch.equal(decoded, probs.argmax(1))
    assert torch.allclose(losses, F.nll_loss(probs.log(), y, reduction='none'), atol=1e-5) and [int(o) for o in y] == [int(dls.valid_ds[i][1]) for i in range(12)]
    raw, _ = learn.get_preds(act=lambda o: o)
    assert torch.allclose(raw.softmax(1), probs, atol=1e-6) and torch.allclose(x[3], dls.valid_ds[3][0].float()/255)

@pytest.mark.parametrize('loss', [None, F.cross_entropy, nn.CrossEntropyLoss(), lambda p, y: F.cross_entropy(p, y), partial(F.cross_entropy, reduction='mean')])
def test_losses_of_single_items_whatever_the_loss(make, loss):
    learn = make(loss_func=loss)
    probs, y, losses = learn.get_preds(with_loss=True)
    assert losses.shape == (12,) and torch.allclose(losses, F.nll_loss(probs.log(), y, reduction='none'), atol=1e-5)
    assert getattr(loss, 'reduction', 'mean') == 'mean'

def test_the_training_items_come_in_order_and_unaugmented(make, two_class):
    dls = loaders(two_class, batch_tfms=aug_transforms())
    x, _, y = make(dls=dls).get_preds(ds_idx=0, with_input=True)
    plain = dls.train_ds.new(train=False)
    assert len(y) == 36 and all(torch.allclose(x[i], plain[i][0].float()/255) for i in (0, 17, 35)) and [int(o) for o in y] == [int(plain[i][1]) for i in range(36)]

def test_a_loader_of_inputs_has_no_targets_and_no_losses(make, dls, two_class):
    files = get_image_files(two_class)[:5]
    probs, y, losses = make().get_preds(dl=dls.test_dl(files), with_loss=True)
    assert len(probs) == 5 and y is None and losses is None
    with pytest.raises(DataError, match='nothing'): make().get_preds(dl=dls.test_dl([]))

def test_show_results_marks_what_is_wrong(make, dls, two_class):
    import matplotlib.pyplot as plt
    learn = make()
    _, y, decoded = learn.get_preds(with_decoded=True)
    plt.close('all'); learn.show_results(max_n=4)
    axs = [a for a in plt.gcf().axes if a.images]
    assert [a.title.get_color() for a in axs] == ['black' if a == b else 'red' for a, b in zip(y[:4].tolist(), decoded[:4].tolist())]
    assert axs[0].get_title().split('\n') == [dls.vocab[y[0]], dls.vocab[decoded[0]]]

def test_show_results_of_a_loader_without_targets_is_no_crash(make, dls, two_class):
    dl = dls.test_dl(get_image_files(two_class)[:3])
    try: make().show_results(dl=dl)
    except DataError as e: assert 'target' in str(e)

# --- from inside a fit
@pytest.mark.parametrize('do', [lambda l: l.get_preds(), lambda l: l.validate(), lambda l: l.predict(np.zeros((16, 16, 3), np.uint8))])
def test_measuring_from_a_callback_leaves_the_fit_as_it_is(make, tiny, do):
    def run(cbs):
        set_seed(3)
        modes, model = [], tiny()
        model.insert(5, nn.Dropout(.5))
        learn = make(model, dls=loaders(root), cbs=cbs + [See('before_backward', lambda l: modes.append(l.model.training))])
        learn.fit_one_cycle(2, 1e-2)
        return weights(learn), modes
    root = make().dls.train_ds.fields[0][0].parent.parent
    plain, modes = run([])
    for event in ('after_epoch', 'after_batch'):
        looked, modes = run([See(event, lambda l: do(l) if l.training or event == 'after_epoch' else None)])
        assert all(modes) and equal(plain, looked)

# --- rates, groups, decay
def test_a_slice_spreads_the_rates_over_the_groups(make):
    learn = make(splitter=three)
    learn.fit(1, slice(1e-5, 1e-3))
    assert field(learn, 'lr') == pytest.approx([1e-5, 1e-4, 1e-3])
    learn.fit(1, slice(1e-3))
    assert field(learn, 'lr') == pytest.approx([1e-4, 1e-3])
    learn.fit(1)
    assert field(learn, 'lr') == [1e-3]
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))

def test_fine_tune_rates_and_what_learns(make):
    seen = []
    learn = make(splitter=three, cbs=See('before_batch', lambda l: l.training and l.iter == 0 and seen.append(({round(g['lr'], 12) for g in l.opt.param_groups}, l.frozen))))
    learn.fine_tune(1)
    (head, frozen), (rates, thawed) = seen
    assert max(head) == pytest.approx(2e-3/25) and (frozen, thawed) == (2, 0) and sorted(rates) == pytest.approx([2e-6, 2e-5, 2e-4])

def test_the_last_fit_of_a_cycle_ends_low(make):
    learn = make()
    learn.fit_one_cycle(2, 1e-2)
    lrs, moms = learn.recorder.lrs, learn.recorder.moms
    assert lrs[0] == pytest.approx(1e-2/25) and max(lrs) == pytest.approx(1e-2, rel=.05) and lrs[-1] < 1e-3 and moms[0] == .95 and min(moms) == pytest.approx(.85, abs=.01)

def test_freezing_keeps_weights_and_statistics(make):
    learn = make(splitter=three, train_bn=False)
    learn.freeze()
    before = weights(learn)
    learn.fit(1, 1e-1)
    moved = lambda: {k for k, v in weights(learn).items() if not torch.equal(v, before[k])}
    assert moved() == {'5.weight', '5.bias'}
    learn.unfreeze(); learn.fit(1, 1e-1)
    assert moved() == {k for k, _ in learn.model.named_parameters()}     # all that learns by gradients, and no statistics

def test_normalisation_of_a_frozen_body_may_go_on(make):
    learn = make(splitter=three, train_bn=True)
    learn.freeze()
    before = weights(learn)
    learn.fit(1, 1e-1)
    moved = {k for k, v in weights(learn).items() if not torch.equal(v, before[k])}
    assert {'1.weight', '1.running_mean'} <= moved and '0.weight' not in moved

def test_freeze_to_counts_from_both_ends_and_checks(make):
    learn = make(splitter=three)
    learn.freeze_to(1)
    assert [p.requires_grad for g in three(learn.model) for p in g] == [False]*2 + [True]*4
    learn.freeze_to(-3)
    assert all(p.requires_grad for p in learn.model.parameters())
    for n in (3, -4):
        with pytest.raises(TrainingError, match='3 layer groups'): learn.freeze_to(n)
    assert learn.frozen == 0

def test_no_decay_on_biases_and_norms(make, tiny):
    learn = make(wd=.1)
    learn.fit(1)
    decay = {id(p): g['weight_decay'] for g in learn.opt.param_groups for p in g['params']}
    assert {k: decay[id(p)] for k, p in learn.model.named_parameters()} == {k: .1 if k in ('0.weight', '5.weight') else 0. for k, _ in learn.model.named_parameters()}
    learn = make(tiny(), wd=.1, wd_bn_bias=True); learn.fit(1)
    assert field(learn, 'weight_decay') == [.1]

def test_a_decay_for_one_fit_holds_for_that_fit(make):
    learn = make(wd=.01)
    learn.fit(1, wd=.2); assert field(learn, 'weight_decay') == [0., .2]
    learn.fit(1); assert field(learn, 'weight_decay') == [0., .01]

def test_a_decay_can_come_back_after_zero(make):
    learn = make(wd=0.)
    learn.fit(1)
    learn.fit(1, wd=.1); assert field(learn, 'weight_decay') == [0., .1]

# --- optimizers
@pytest.mark.parametrize('opt,cls', [('adam', torch.optim.Adam), ('SGD', torch.optim.SGD), (torch.optim.SGD, torch.optim.SGD), (partial(torch.optim.SGD, momentum=.9), torch.optim.SGD),
                                     (torch.optim.Adagrad, torch.optim.Adagrad), ('adadelta', torch.optim.Adadelta), ('rmsprop', torch.optim.RMSprop)])
def test_optimizers_by_name_class_and_partial(make, opt, cls):
    learn = make(opt_func=opt)
    learn.fit(1, 1e-2)
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert type(learn.opt) is cls and not equal(before, weights(learn)) and np.isfinite(learn.recorder.losses).all()

def test_an_optimizer_with_groups_of_its_own(make):
    learn = make(opt_func=lambda groups, lr: torch.optim.SGD([p for g in groups for p in g['params']], lr))
    try: learn.fit(1)
    except TrainingError as e: assert 'opt_func' in str(e)

def test_an_unknown_optimizer_lists_the_known(make):
    with pytest.raises(TrainingError, match="'foo'.*adamw"): make(opt_func='foo').fit(1)

def test_two_fits_go_on_and_reset_opt_begins_anew(make):
    learn, steps = make(), lambda: int(next(iter(learn.opt.state.values()))['step'])
    learn.fit(1); opt = learn.opt; assert steps() == 4
    learn.fit(1); assert learn.opt is opt and steps() == 8
    learn.fit_one_cycle(1, reset_opt=True); assert learn.opt is not opt and steps() == 4

def test_another_model_is_the_one_that_trains(make, tiny):
    learn = make()
    learn.fit(1)
    learn.model = tiny(seed=1)
    before = weights(learn)
    learn.fit(1, 1e-1)
    assert not torch.equal(before['0.weight'], learn.model[0].weight)

def test_a_new_head_trains_too(make):
    learn = make()
    learn.fit(1)
    learn.model[5] = nn.Linear(8, 2)
    before = weights(learn)
    learn.fit(1, 1e-1)
    assert not torch.equal(before['5.weight'], learn.model[5].weight)

def test_what_people_type(dls, tiny, tmp_path):
    learn = Learner(dls, tiny(), loss_func=nn.CrossEntropyLoss(), metrics=[accuracy], opt_func=torch.optim.SGD, path=str(tmp_path))
    with learn.no_bar():
        learn.fit(1, lr=1e-2); learn.fit_one_cycle(1, lr_max=1e-2, wd=.1); learn.fine_tune(1, freeze_epochs=0); learn.fit(0)
    assert learn.export('x.pkl') == tmp_path/'x.pkl' and learn.load(learn.save('m').stem) is learn

def test_callbacks_are_added_and_removed_by_the_known_names(make):
    learn = Learner(make().dls, make().model)
    cb = Callback()
    assert learn.add_cb(cb) is learn and cb in learn.cbs
    learn.remove_cb(cb)
    assert cb not in learn.cbs
    learn.remove_cb(ProgressCallback)                                    # a class means all of it
    assert learn.progress not in learn.cbs

def test_a_typo_in_a_keyword(dls, tiny):
    with pytest.raises(TypeError, match='metric'): Learner(dls, tiny(), metric=accuracy)
    with pytest.raises(TrainingError, match="'fp8'"): Learner(dls, tiny(), precision='fp8')

# --- precision
@pytest.mark.parametrize('precision,dtype', [('fp32', torch.float32), ('bf16', torch.bfloat16)])
def test_precision(make, precision, dtype):
    seen, outputs, learn = [], set(), make(precision=precision, metrics=accuracy)
    learn.model[0].register_forward_hook(lambda m, i, o: seen.append((learn.model.training, o.dtype)))
    learn.fit(2, 1e-2, cbs=See('after_pred', lambda l: outputs.add(l.pred.dtype)))
    assert {d for t, d in seen if t} == {d for t, d in seen if not t} == {dtype}              # training and validation
    assert outputs == {torch.float32} == {learn.get_preds()[0].dtype} and all(p.dtype == torch.float32 for p in learn.model.parameters()) and np.isfinite(learn.recorder.losses).all()

def test_what_is_measured_in_16_bits_is_that_of_32_but_for_rounding_and_single_answers_are_in_32(make, dls):
    from torch.nn.modules.module import register_module_forward_hook
    learn, kinds = make(precision='bf16', metrics=accuracy), set()
    learn.fit(1, 1e-2)
    short, (probs, _, losses) = learn.validate(), learn.get_preds(with_loss=True)
    hook = register_module_forward_hook(lambda m, i, o: kinds.add(o.dtype))
    learn.predict(dls.valid_ds.fields[0][0]); learn.predict_batch(list(dls.valid_ds.fields[0][:2])); learn.to_fp32().validate()
    hook.remove()
    assert kinds == {torch.float32}
    long, (want, _, each) = learn.validate(), learn.get_preds(with_loss=True)
    assert (probs - want).abs().max() < 1e-2 and torch.allclose(losses, each, atol=2e-2) and short[0] == pytest.approx(long[0], abs=1e-2) and not torch.equal(probs, want)

class Numpy(nn.Module):
    "Leaves PyTorch in evaluation, to where 16 bits are not known"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x):
        x = self.model(x)
        return x if self.training else torch.from_numpy(x.detach().numpy() + 1)

def test_a_model_that_16_bits_are_too_few_for_is_measured_in_32(make, tiny, monkeypatch):
    import blocks.train.tricks as module
    monkeypatch.setattr(module, 'native_bf16', lambda device: True)
    learn = make(Numpy(tiny()), metrics=accuracy, splitter=lambda m: [list(m.parameters())])
    with pytest.warns(UserWarning, match="BFloat16.*precision='fp32'"): learn.fit(2, 1e-2)
    assert len(learn.recorder.values) == 2 and torch.equal(learn.get_preds()[0], learn.to_fp32().get_preds()[0])
    with pytest.raises(TypeError): learn.to_bf16().get_preds()                # what was asked for is not changed

def test_an_error_of_a_model_is_told_once_as_it_is(make):
    learn = make(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    with pytest.raises(RuntimeError, match='mat1') as e: learn.get_preds()
    assert e.value.__context__ is None

# --- seeds
def test_same_seed_same_weights_whatever_the_workers(make, tiny, two_class):
    def run(workers, seed=7):
        set_seed(seed)
        model = tiny(); model.insert(5, nn.Dropout(.3))
        learn = make(model, dls=loaders(two_class, num_workers=workers, seed=None, batch_tfms=aug_transforms()))
        learn.fit_one_cycle(2, 1e-2)
        return weights(learn)
    a = run(0)
    assert equal(a, run(0)) and equal(a, run(2)) and not equal(a, run(0, 8))

# --- what goes wrong
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_broken_fit_leaves_a_usable_learner(make, error):
    learn = make(metrics=accuracy)
    with pytest.raises(error) as e: learn.fit(2, 1e-2, cbs=Stop(error, lambda l: l.epoch == 1 and l.iter == 2))
    assert 'epoch 1 of 2, training step 3 of 4' in e.value.__notes__[0]
    assert len(learn.recorder.values) == 1 and len(learn.recorder.losses) == 6 and all(p.grad is None for p in learn.model.parameters())
    learn.predict(np.zeros((16, 16, 3), np.uint8)); learn.validate(); learn.export(); learn.save('m')
    learn.fit_one_cycle(1, 1e-2)
    assert len(learn.recorder.values) == 1 and len(learn.recorder.losses) == 4

def test_an_interrupt_inside_fine_tune(make):
    learn = make(splitter=three)
    with pytest.raises(KeyboardInterrupt): learn.fine_tune(2, cbs=Stop(when=lambda l: l.frozen == 0 and l.epoch == 1))
    assert len(learn.recorder.values) == 1
    with pytest.raises(KeyboardInterrupt): learn.fine_tune(1, cbs=Stop())
    assert learn.frozen == 2                                             # broken off while frozen
    learn.fine_tune(1)
    assert learn.frozen == 0 and len(learn.recorder.values) == 1

def test_an_unreadable_file_in_the_middle_is_named(make, two_class, tmp_path):
    import shutil
    shutil.copytree(two_class, tmp_path/'d')
    learn = make(dls=loaders(tmp_path/'d'))
    bad = learn.dls.train_ds.fields[0][5]
    bad.write_bytes(bad.read_bytes()[:70])
    with pytest.raises(DataError, match=bad.name): learn.fit(1)

def test_a_single_class_is_an_error_at_fit(make, tmp_path):
    for i in range(8): (tmp_path/'a').mkdir(exist_ok=True); Image.new('RGB', (16, 16)).save(tmp_path/'a'/f'{i}.png')
    with pytest.warns(UserWarning, match="'a'"): dls = loaders(tmp_path, bs=2)
    for fit in ('fit', 'fit_one_cycle', 'fine_tune'):
        with pytest.raises(TrainingError, match="only one class, 'a'"): getattr(make(dls=dls), fit)(1)

def flat(): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2))

@pytest.mark.parametrize('kw', [dict(bs=1), dict(bs=7, drop_last=False)])
def test_a_batch_of_one_with_batchnorm_is_said_before_the_fit(make, two_class, kw):
    steps, learn = [], make(flat(), dls=loaders(two_class, **kw), cbs=See('after_step', lambda l: steps.append(1)))           # 36 = 5·7 + 1
    with pytest.raises(TrainingError, match='BatchNorm'): learn.fit(1)
    assert not steps

def test_no_training_batch_is_said_before_the_fit(make, dls):
    dls.train.bs = 100
    with pytest.raises(TrainingError, match='36 items, bs=100'): make().fit(1)

def test_a_loss_that_is_not_known_is_an_error(dls, tiny):
    dls.train.samples = dls.train.samples.new(n_inp=2)
    with pytest.raises(TrainingError, match='loss_func'): Learner(dls, tiny())

def test_other_loaders_may_take_the_place(make, two_class):
    learn = make(metrics=accuracy)
    learn.fit(1)
    learn.dls = loaders(two_class, bs=12, val_bs=3)
    learn.fit(1)
    assert len(learn.recorder.losses) == 3 and len(learn.get_preds()[0]) == 12 and learn.predictor.geometries == learn.dls.valid_ds.geometries

# --- keeping
def test_save_and_load(make, tiny):
    learn = make()
    learn.fit(1, 1e-2)
    file, want = learn.save('m'), weights(learn)
    assert file == learn.path/'models'/'m.pth'
    learn.fit(1, 1e-2)
    assert not equal(want, weights(learn)) and learn.load('m') is learn and equal(want, weights(learn))
    assert equal(want, weights(make(tiny(seed=3)).load(file))) and learn.save('v1.2').name == 'v1.2.pth'

def test_training_goes_on_from_a_checkpoint_in_a_fresh_learner(make, tiny, dls):
    def run(learn): dls.train.epoch = 5; learn.fit(1, 1e-2); return weights(learn)
    learn = make()
    learn.fit(1, 1e-2)
    learn.save('m')
    want = run(learn)
    assert equal(want, run(make(tiny(seed=9)).load('m')))                # weights and the state of the optimizer
    assert not equal(want, run(make(tiny(seed=9)).load('m', with_opt=False)))

def test_a_checkpoint_without_optimizer(make, tiny):
    learn = make()
    learn.fit(1)
    file = learn.save('m', with_opt=False)
    assert torch.load(file, weights_only=True)['opt'] is None
    learn.load('m'); learn.fit(1)

def test_a_plain_state_dict_is_loaded_too(make, tiny, tmp_path):
    (tmp_path/'models').mkdir()
    torch.save(tiny(seed=4).state_dict(), tmp_path/'models'/'plain.pth')
    assert equal(tiny(seed=4).state_dict(), weights(make().load('plain')))

def test_weights_that_do_not_fit_are_listed_and_change_nothing(make, tiny):
    make(tiny(n_out=5, seed=2)).save('m')
    learn = make()
    before = weights(learn)
    with pytest.raises(TrainingError, match=r'm\.pth(?s:.*)5\.weight'): learn.load('m')
    assert equal(before, weights(learn))

def test_an_optimizer_that_does_not_fit_is_said_at_load(make, tiny):
    learn = make()
    learn.fit(1); learn.save('m')
    other = make(tiny(), opt_func='sgd')
    other.fit(1)
    with pytest.raises(TrainingError, match='with_opt=False'): other.load('m')
    other.fit(1)

def test_missing_and_damaged_checkpoints(make, tmp_path):
    with pytest.raises(TrainingError, match='nope'): make().load('nope')
    (tmp_path/'models').mkdir()
    for content in (b'', b'123', make().save('m').read_bytes()[:300]):
        (tmp_path/'models'/'bad.pth').write_bytes(content)
        with pytest.raises(TrainingError, match='bad.pth'): make().load('bad')

def test_a_save_that_fails_keeps_the_old_file_and_leaves_no_other(make, monkeypatch):
    file = make().save('m')
    before, listing = file.read_bytes(), sorted(file.parent.iterdir())
    def fail(state, f):
        with (f if hasattr(f, 'write') else open(f, 'wb')) as f: f.write(b'half')
        raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='space'): make().save('m')
    assert file.read_bytes() == before and sorted(file.parent.iterdir()) == listing

@pytest.mark.skipif(os.name != 'posix', reason='permissions of POSIX')
def test_files_are_for_others_to_read_as_the_umask_says(make):
    old = os.umask(0o027)
    try: modes = [oct(f.stat().st_mode & 0o777) for f in (make().save('m'), make().export())]
    finally: os.umask(old)
    assert modes == ['0o640']*2

def test_no_bar_for_a_while(dls, tiny, monkeypatch):
    learn, out = Learner(dls, tiny()), io.StringIO()
    monkeypatch.setattr('sys.stdout', out)
    with learn.no_bar():
        with learn.no_bar(): learn.fit(1)
        learn.fit(1)
    assert out.getvalue() == ''
    learn.fit(1)
    assert len(out.getvalue().splitlines()) == 2 and learn.cbs.count(learn.progress) == 1

def test_saving_best_then_loading_elsewhere(make, tiny):
    learn = make(metrics=accuracy)
    learn.fit(2, 1e-2, cbs=SaveModelCallback(monitor='accuracy', fname='best'))
    assert equal(weights(learn), weights(make(tiny(seed=5)).load('best')))

# --- one size after another
def test_progressive_sizes_are_those_that_training_sees_and_the_last_one_stays(two_class, tiny):
    dls = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(24)).dataloaders(two_class, bs=12, num_workers=0, device='cpu')
    class Sizes(Callback):
        seen = []
        def before_batch(self):
            if self.learn.training: self.seen.append(self.learn.xb[0].shape[-1])
    learn = Learner(dls, tiny(), cbs=Sizes())
    with learn.no_bar(): learn.fit_progressive([(8, 2), ((16, 16), 1)], 1e-2)
    assert Sizes.seen == [8]*6 + [16]*3 and learn.dls.one_batch()[0].shape[-1] == 16 and dls.one_batch()[0].shape[-1] == 24
    assert learn.predictor.geometries[-1].size == (16, 16)

def test_progressive_stages_are_pairs(dls, tiny):
    for wrong in ([], [128, 3], [(8, 1, 2)]):
        with pytest.raises(TrainingError, match='size, epochs'): Learner(dls, tiny()).fit_progressive(wrong)

# --- results of every kind of target
@pytest.fixture
def every(two_class):
    "A function that makes loaders for a target"
    def make(target, get_y): return DataBlock(blocks=(ImageBlock, target), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(.25, seed=1),
                                              item_tfms=Resize(16, method='squish')).dataloaders(two_class, bs=8, num_workers=0, device='cpu')
    return make

def test_show_results_puts_places_side_by_side(every, tiny):
    import matplotlib.pyplot as plt
    from blocks import MaskBlock, PointBlock
    for target, y, model in ((MaskBlock(codes=['a', 'b']), lambda p: np.eye(32, 40, dtype=np.uint8), nn.Conv2d(3, 2, 1)), (PointBlock, lambda p: [[1., 2.], [30., 20.]], tiny(4))):
        plt.close('all')
        learn = Learner(every(target, y), model)
        with learn.no_bar(): learn.fit(1, 1e-3); learn.show_results(max_n=3)
        axes = [a for a in plt.gcf().axes if a.images]
        assert [a.get_title() for a in axes] == ['target', 'prediction']*3

def test_show_results_of_several_labels_and_numbers(every, tiny):
    import matplotlib.pyplot as plt
    from blocks import MultiCategoryBlock, RegressionBlock
    for target, y, n in ((MultiCategoryBlock, lambda p: ['animal', p.parent.name], 3), (RegressionBlock, lambda p: float(p.stem.split('_')[1]), 1)):
        plt.close('all')
        learn = Learner(every(target, y), tiny(n))
        learn.show_results(max_n=4)
        assert len([a for a in plt.gcf().axes if '\n' in a.get_title()]) == 4

def test_decoded_predictions_have_the_form_of_the_targets(every, tiny):
    from blocks import MultiCategoryBlock
    learn = Learner(every(MultiCategoryBlock, lambda p: ['animal', p.parent.name]), tiny(3))
    with learn.no_bar(): p, y, decoded = learn.get_preds(with_decoded=True)
    assert decoded.shape == y.shape == p.shape and decoded.dtype == torch.bool and torch.equal(decoded, p > .5)

def test_predictions_of_every_kind_survive_export(every, tiny, tmp_path):
    from blocks import MaskBlock, MultiCategoryBlock, PointBlock, RegressionBlock, load_learner
    kinds = ((MultiCategoryBlock, lambda p: ['animal', p.parent.name], tiny(3)), (RegressionBlock, lambda p: 1., tiny(1)), (PointBlock, lambda p: [[1., 2.], [3., 4.]], tiny(4)),
             (MaskBlock(codes=['a', 'b']), lambda p: np.zeros((32, 40), np.uint8), nn.Conv2d(3, 2, 1)))
    for target, y, model in kinds:
        learn = Learner(every(target, y), model)
        file = learn.dls.valid_ds.fields[0][0]
        want, back = learn.predict(file), load_learner(learn.export(tmp_path/'e.pkl'), model=model)
        got = back.predict(file)
        assert torch.equal(want[2], got[2]) and type(back.target) is type(learn.dls.targets[0]) and back.target == learn.dls.targets[0]
        assert np.array_equal(want[0], got[0]) and len(back.predict_batch([file]*3).labels) == 3

# --- test-time augmentation
def test_tta_is_the_mean_over_views_that_are_drawn_as_in_training(two_class, tiny):
    learn = Learner(loaders(two_class, batch_tfms=aug_transforms(p_affine=1., p_lighting=1.)), tiny())
    with learn.no_bar():
        (views, plain), y = learn.tta(n=3, beta=None)
        want, _ = learn.get_preds()
        mixed, most = learn.tta(n=3, beta=.25)[0], learn.tta(n=3, use_max=True)[0]
        again = learn.tta(n=3, beta=None)[0][0]
    assert torch.equal(plain, want) and not torch.allclose(views, want, atol=1e-4) and torch.equal(views, again)
    assert torch.allclose(mixed, .75*views + .25*plain) and torch.equal(most, torch.maximum(views, plain)) and [int(o) for o in y] == [int(learn.dls.valid_ds[i][1]) for i in range(len(y))]

def test_tta_is_for_answers_about_the_whole_picture(every):
    from blocks import MaskBlock
    learn = Learner(every(MaskBlock(codes=['a', 'b']), lambda p: np.zeros((32, 40), np.uint8)), nn.Conv2d(3, 2, 1))
    with pytest.raises(DataError, match='MaskBlock'): learn.tta()

def test_titles_of_results_are_short():
    from blocks.train.evaluate import _said
    assert _said(['a', 'b']) == 'a;b' and _said(1/3) == '0.3333' and _said((.5, 2.)) == '0.5;2' and _said('cat') == 'cat'
