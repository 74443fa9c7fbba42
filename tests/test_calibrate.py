"How sure a model is: counted right, mended on held-back items, and carried into its file."
import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from blocks import CategoryBlock, DataBlock, DataError, ImageBlock, Learner, MultiCategoryBlock, RandomSplitter, RegressionBlock, Resize, accuracy, accuracy_multi, get_image_files, load_learner, parent_label
from blocks.train.calibrate import calibrate, calibration_curve, find_temperature, plot_calibration

quick = settings(deadline=None, derandomize=True, max_examples=12)

def drawn(n=4000, k=3, seed=0, scale=2.):
    "Logits, and classes that are drawn with exactly their probabilities"
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, k, generator=g, dtype=torch.float64)*scale
    return z, torch.multinomial(z.softmax(-1), 1, generator=g)[:, 0]

# --- the curve
def test_each_bin_counts_its_own():
    probs = torch.tensor([[.6, .4], [.3, .7], [.1, .9], [.95, .05], [.95, .05]])
    c = calibration_curve(probs, torch.tensor([0, 0, 1, 0, 1]))
    assert c.count.tolist() == [0]*5 + [1, 1, 0, 1, 2] and np.isnan(c.frequency[:5]).all() and np.isnan(c.confidence[7])
    assert c.frequency[[5, 6, 8, 9]].tolist() == [1, 0, 1, .5] and c.confidence[9] == pytest.approx(.95)
    assert c.ece == pytest.approx((.4 + .7 + .1 + abs(1.9 - 1))/5)

@quick
@given(st.integers(1, 200), st.integers(2, 6), st.integers(1, 20), st.integers(0, 99))
def test_the_error_is_that_of_a_loop(n, k, n_bins, seed):
    g = torch.Generator().manual_seed(seed)
    probs, targs = torch.randn(n, k, generator=g).mul(2).softmax(-1), torch.randint(k, (n,), generator=g)
    sure, right, want = probs.max(1).values.numpy(), (probs.argmax(1) == targs).numpy(), 0
    for b in range(n_bins):
        inside = (sure > b/n_bins) & (sure <= (b+1)/n_bins)
        if inside.any(): want += abs(sure[inside].mean(dtype=float) - right[inside].mean())*inside.mean()
    assert calibration_curve(probs, targs, n_bins).ece == pytest.approx(want, abs=1e-6)

def test_several_labels_count_one_by_one():
    probs, targs = torch.tensor([[.05, .75], [.05, .65]]), torch.tensor([[0., 1.], [1., 0.]])
    c = calibration_curve(probs, targs, 10)
    assert c.count[[0, 6, 7]].tolist() == [2, 1, 1] and c.frequency[[0, 6, 7]].tolist() == [.5, 0, 1]
    single = calibration_curve([.05, .75], [0, 1])
    assert single.count.sum() == 2 and single.ece == pytest.approx((.05 + .25)/2)

@pytest.mark.parametrize('probs, targs', [([[2., -1.]], [0]), ([[.5, .5]], [0, 1]), ([[.5, .5]], [[.3, .7]]), ([[.5, .5]], [0.]), (torch.empty(0, 2), torch.empty(0).long()), ([[float('nan'), .5]], [0])])
def test_what_is_no_probability_is_said(probs, targs):
    with pytest.raises(DataError): calibration_curve(probs, torch.as_tensor(targs))

def test_the_picture_has_error_and_counts():
    probs, targs = torch.tensor([[.6, .4], [.95, .05], [.95, .05]]), torch.tensor([0, 0, 1])
    ax = plot_calibration(probs, targs, title='test')
    assert ax.get_title() == f'test, ECE {calibration_curve(probs, targs).ece:.3f}' and [t.get_text() for t in ax.texts] == ['1', '2'] and [p.get_height() for p in ax.patches][9] == .5
    assert plot_calibration(probs, targs, ax=ax) is ax
    plt.close('all')

# --- the temperature
@quick
@given(st.sampled_from([.3, .7, 1., 2., 6.]), st.integers(2, 8), st.integers(0, 20))
def test_a_known_temperature_is_found(true, k, seed):
    z, y = drawn(2000, k, seed)
    t = find_temperature(z*true, y)
    assert abs(t/true - 1) < .15
    nll = lambda s: float(F.cross_entropy(z*true/s, y))
    assert nll(t) <= min(map(nll, np.geomspace(.05, 20, 30))) + 1e-9       # nothing on a grid is better
    assert find_temperature((z*true).softmax(-1), y) == pytest.approx(t, rel=1e-3)
    assert find_temperature(z*true*3, y) == pytest.approx(3*t, rel=1e-3) if 3*t < 20 else True

def test_several_labels_too():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3000, 4, generator=g)*2
    y = (torch.rand(3000, 4, generator=g) < z.sigmoid()).float()
    assert find_temperature(z*4, y) == pytest.approx(4, rel=.08) and find_temperature((z*2).sigmoid(), y) == pytest.approx(2, rel=.08)

@pytest.mark.parametrize('scale', [1e-3, 1, 30, 1e4])
@pytest.mark.parametrize('k', [2, 5])
def test_separable_answers_stay_within_bounds_and_are_not_certain(scale, k):
    y = torch.arange(40) % k
    z = F.one_hot(y, k).float()*scale
    t = find_temperature(z, y, logits=True)
    assert .05 <= t*1.001 and t <= 20.001
    if scale in (1, 30): assert .9 < float((z/t).softmax(-1).max()) < .999
    yes = F.one_hot(y, k).float()
    assert .05 <= find_temperature((yes - .5)*scale, yes, logits=True)*1.001 <= 20.1

def test_a_model_that_knows_nothing_gets_the_upper_bound():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(2000, 5, generator=g)*50, torch.randint(5, (2000,), generator=g)
    assert find_temperature(z, y) == pytest.approx(20, rel=1e-2) and find_temperature(z, y, bounds=(.05, 5)) == pytest.approx(5, rel=1e-2)

def test_raw_outputs_that_look_like_probabilities():
    z, y = torch.full((50, 2), .5), torch.arange(50) % 2
    z[:25, 0] = .9; z[:25, 1] = .1
    assert find_temperature(z, y, logits=True) != pytest.approx(find_temperature(z, y, logits=False), rel=1e-2)

@pytest.mark.parametrize('bad', [(torch.randn(3, 2), torch.tensor([0, 1])), (torch.tensor([[float('nan'), 0.]]), torch.tensor([0])), (torch.empty(0, 2), torch.empty(0).long()), (torch.randn(3, 2), torch.rand(3, 2))])
def test_what_has_no_temperature_is_said(bad):
    with pytest.raises(DataError): find_temperature(*bad)

# --- in a learner
def block_of(y, get_y): return DataBlock((ImageBlock, y), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(.4, seed=1, test_pct=.2), item_tfms=Resize(16))

def noisy(p): return parent_label(p) if int(p.stem.split('_')[1]) % 4 else 'dog'

@pytest.fixture
def learn(two_class, tiny):
    dls = block_of(CategoryBlock, noisy).dataloaders(two_class, bs=8, num_workers=0, seed=1, device='cpu')
    learn = Learner(dls, tiny(), metrics=accuracy, precision='fp32')                # as predictions of single items are
    learn.remove_cbs(learn.progress)
    with torch.no_grad(): learn.model[5].weight.mul_(40)
    return learn

def test_probabilities_change_and_answers_do_not(learn, tmp_path, tiny):
    before, dls = {s: learn.get_preds(split=s) for s in ('train', 'valid', 'test')}, learn.dls
    scores, files = learn.validate(), learn.dls.test_ds.fields[0]
    t = calibrate(learn)
    logits, y = learn.get_preds(act=lambda o: o)
    assert t == find_temperature(logits, y, logits=True) and abs(t - 1) > .05
    for s, (probs, _) in before.items():
        raw, _ = learn.get_preds(split=s, act=lambda o: o)
        after, _ = learn.get_preds(split=s)
        assert torch.allclose(after, (raw/t).softmax(-1), atol=1e-6) and torch.equal(after.argmax(1), probs.argmax(1)) and not torch.allclose(after, probs, atol=1e-3)
    assert learn.validate() == scores                                     # loss and accuracy
    want = learn.get_preds(split='test')[0]
    back = load_learner(learn.export(tmp_path/'m.pkl'), model=tiny)
    assert back.target.temperature == t
    for f, p in zip(files, want): assert torch.allclose(back.predict(f)[2], p, atol=1e-5) and torch.allclose(learn.predict(f)[2], p, atol=1e-5)
    assert all(b.temperature == 1 for dl in dls.parts.values() for b in dl.samples.blocks[1:]) and all(dl.samples.blocks[-1].temperature == t for dl in learn.dls.parts.values())

def test_calibrating_twice_is_calibrating_once(learn):
    t = calibrate(learn)
    assert calibrate(learn) == t == learn.dls.targets[0].temperature and calibrate(learn, 'test') != t

def test_training_goes_on_as_without_it(two_class, tiny):
    def trained(between):
        learn = Learner(block_of(CategoryBlock, noisy).dataloaders(two_class, bs=8, num_workers=0, seed=1, device='cpu'), tiny())
        learn.remove_cbs(learn.progress)
        learn.fit(1, 1e-2)
        if between: calibrate(learn)
        learn.fit(1, 1e-2)
        return learn.recorder.losses, [v[:2] for v in learn.recorder.values]
    assert trained(True) == trained(False)

@pytest.mark.parametrize('thresh', [.5, .2, .9, 0])
def test_several_labels_keep_their_decisions(two_class, tiny, thresh):
    y = lambda p: [parent_label(p)] + ['third']*(int(p.stem.split('_')[1]) % 3 == 0)
    learn = Learner(block_of(MultiCategoryBlock(thresh=thresh), y).dataloaders(two_class, bs=8, num_workers=0, device='cpu'), tiny(3), metrics=accuracy_multi)
    learn.remove_cbs(learn.progress)
    with torch.no_grad(): learn.model[5].weight.mul_(20)
    probs, targs, said = learn.get_preds(with_decoded=True)
    scores = learn.validate()
    t = calibrate(learn)
    after, _, now = learn.get_preds(with_decoded=True)
    assert t != 1 and not torch.allclose(after, probs, atol=1e-3) and torch.equal(said, now) and learn.validate() == scores
    calibrate(learn, 'test')
    assert torch.equal(learn.get_preds(with_decoded=True)[2], said)

def test_it_is_said_where_the_temperature_comes_from(learn, capsys):
    learn.add_cb(learn.progress)
    calibrate(learn, 'test')
    out = capsys.readouterr().out
    assert "'test'" in out and 'optimistic' in out and 'ECE' in out

def test_what_cannot_be_calibrated_is_said(learn, two_class, tiny):
    with pytest.raises(DataError, match='held-back'): calibrate(learn, 'train')
    with pytest.raises(DataError, match='tets'): calibrate(learn, 'tets')
    assert learn.dls.targets[0].temperature == 1
    numbers = Learner(block_of(RegressionBlock, lambda p: 1.).dataloaders(two_class, bs=8, num_workers=0, device='cpu'), tiny(1))
    with pytest.raises(DataError, match='RegressionBlock'): calibrate(numbers)
