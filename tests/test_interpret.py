"Mistakes are counted and shown as they are, for the items that they belong to."
import gc

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from blocks import CategoryBlock, ClassificationInterpretation, DataBlock, DataError, ImageBlock, Learner, RandomSplitter, Resize, aug_transforms, get_image_files
from blocks.data.block import open_image
from blocks.train.interpret import Interpretation


@pytest.fixture
def dls(two_class):
    "Three classes: some cats are lions"
    label = lambda p: 'lion' if p.parent.name == 'cat' and int(p.stem.split('_')[1]) < 9 else p.parent.name
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=label, splitter=RandomSplitter(.5, seed=2), item_tfms=Resize(16), batch_tfms=aug_transforms())
    return block.dataloaders(two_class, bs=5, num_workers=0, seed=1, device='cpu')

@pytest.fixture
def learn(dls, tiny):
    learn = Learner(dls, tiny(3), precision='fp32')
    learn.remove_cbs(learn.progress)
    learn.model.load_state_dict({**learn.model.state_dict(), '5.bias': torch.tensor([.2, 0., .1])})
    return learn

@pytest.fixture
def interp(learn): return ClassificationInterpretation.from_learner(learn)

@pytest.fixture
def known(dls):
    "Five answers by hand: actual a a b c c, predicted a c b c a"
    probs = F.one_hot(torch.tensor([0, 2, 1, 2, 0]), 3).float()*.8 + .05
    return ClassificationInterpretation(dls.valid, list('abc'), probs, torch.tensor([0, 0, 1, 2, 2]), torch.tensor([.1, .9, .3, .2, .8]))

def test_rows_are_actual_and_columns_predicted(known):
    assert known.confusion_matrix().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    known.targs = torch.tensor([0, 0, 1, 2, 1])
    assert known.confusion_matrix().tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]] and known.most_confused() == [('a', 'c', 1), ('b', 'a', 1)]

def test_most_confused_first(known):
    known.targs = torch.tensor([1, 0, 1, 2, 1])
    assert known.most_confused() == [('b', 'a', 2), ('a', 'c', 1)] and known.most_confused(min_val=2) == [('b', 'a', 2)] and known.most_confused(3) == []
    assert known.confusion_matrix()[0, 0] == 0                            # looking for confusions changed no count

def test_the_picture_of_the_matrix(known):
    ax = known.plot_confusion_matrix(figsize=(4, 4))
    assert ax.get_ylabel() == 'actual' and ax.get_xlabel() == 'predicted' and [t.get_text() for t in ax.get_xticklabels()] == list('abc') and ax.figure.get_size_inches().tolist() == [4, 4]
    assert {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}[0, 2] == '1'
    shares = known.plot_confusion_matrix(normalize=True)
    assert [t.get_text() for t in shares.texts][:3] == ['0.50', '0.00', '0.50']
    known.plot_confusion_matrix(figsize=(4, 4), dpi=60)                   # as people write it for large matrices

def test_a_class_that_does_not_occur(dls):
    empty = ClassificationInterpretation(dls.valid, list('abc'), torch.eye(3)[:2], torch.tensor([0, 0]), torch.zeros(2))
    assert np.isfinite(empty.plot_confusion_matrix(normalize=True).images[0].get_array()).all() and empty.confusion_matrix().shape == (3, 3)
    assert 'c' in empty.classification_report()

def test_top_losses_are_those_of_the_items(interp, learn, dls):
    losses, idx, items = interp.top_losses(4, items=True)
    assert losses.tolist() == sorted(interp.losses.tolist(), reverse=True)[:4] and len(interp.top_losses()[0]) == len(dls.valid_ds)
    for loss, i, f in zip(losses, idx, items):
        probs = learn.predict(f)[2]
        assert float(loss) == pytest.approx(-float(probs[interp.targs[i]].log()), abs=1e-4) and f == dls.valid_ds.fields[0][i]
    assert interp.top_losses(3, largest=False)[0].tolist() == sorted(interp.losses.tolist())[:3]

@pytest.mark.parametrize('which', [0, 'shuffled'])
def test_training_items_too_are_the_ones_the_losses_belong_to(learn, dls, which):
    interp = ClassificationInterpretation.from_learner(learn, **(dict(ds_idx=0) if which == 0 else dict(dl=dls.train)))
    for i, f in zip(*interp.top_losses(9, items=True)[1:]):
        block = dls.targets[0]
        assert f.parent.name == 'dog' or interp.vocab[interp.targs[i]] in ('cat', 'lion')
        assert interp.targs[i] == block.index('dog' if f.parent.name == 'dog' else 'lion' if int(f.stem.split('_')[1]) < 9 else 'cat')
        assert torch.allclose(interp.probs[i], learn.predict(f)[2], atol=1e-4)

def test_pictures_of_the_top_losses(interp, dls):
    axs = interp.plot_top_losses(7, nrows=2)
    losses, idx = interp.top_losses(7)
    assert len(axs) == 7
    for ax, loss, i in zip(axs, losses, idx):
        said, numbers = ax.get_title().split('\n')
        assert said == f'{interp.vocab[interp.decoded[i]]} / {interp.vocab[interp.targs[i]]}' and f'{loss:.2f}' in numbers
        shown = np.asarray(ax.images[0].get_array())
        assert np.allclose(shown, np.asarray(dls.valid_ds[i][0].permute(1, 2, 0))/255, atol=1e-6)
    assert len(interp.plot_top_losses(100)) == len(dls.valid_ds)
    plt.close('all')

def test_the_report(interp, capsys):
    interp.print_classification_report()
    out = capsys.readouterr().out
    assert all(o in out for o in ('precision', 'recall', 'cat', 'dog', 'lion'))

def test_numbers_as_classes(two_class, tiny, capsys):
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda p: len(p.stem) % 2, splitter=RandomSplitter(.5, seed=1), item_tfms=Resize(16)).dataloaders(two_class, bs=8, num_workers=0, device='cpu')
    interp = ClassificationInterpretation.from_learner(Learner(dls, tiny()))
    interp.plot_confusion_matrix(); interp.print_classification_report(); interp.plot_top_losses(2)
    assert all(a in (0, 1) for a, _, _ in interp.most_confused())

def test_no_pictures_are_kept(interp):
    gc.collect()
    kept = [v for v in vars(interp).values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() for t in kept) == len(interp.targs)*(3 + 3)      # probabilities; target, loss, decoded: and no pixel

def test_what_cannot_be_interpreted_is_said(learn, dls, two_class):
    with pytest.raises(DataError, match='target'): ClassificationInterpretation.from_learner(learn, dl=dls.test_dl(get_image_files(two_class)[:3]))

def test_items_are_read_again_only_when_shown(interp, monkeypatch):
    import blocks.data.block as module
    read = []
    monkeypatch.setattr(module, 'open_image', lambda raw, **kw: (read.append(raw), open_image(raw, **kw))[1])
    interp.confusion_matrix(); interp.most_confused(); interp.top_losses(items=True)
    assert not read
    interp.plot_top_losses(3)
    assert len(read) == 3

# --- which split
def test_the_split_is_said(two_class, tiny, learn, dls):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda p: p.parent.name, splitter=RandomSplitter(.25, seed=1, test_pct=.2), item_tfms=Resize(16))
    three = Learner(block.dataloaders(two_class, bs=8, num_workers=0, device='cpu'), tiny())
    test = ClassificationInterpretation.from_learner(three, split='test')
    assert len(test) == len(three.dls.test_ds) == 9 and "'test'" in repr(test) and '9 items' in repr(test) and 'valid' not in repr(test)
    assert test.plot_confusion_matrix().get_title() == 'Confusion matrix · test' and "'test'" in test.plot_top_losses(2)[0].figure._suptitle.get_text() and 'test' in test.class_table().index.name
    assert test.top_losses(3, items=True).items[0] in list(three.dls.test_ds.fields[0])
    assert ClassificationInterpretation.from_learner(learn).split == 'valid' and ClassificationInterpretation.from_learner(learn, 0).split == 'train' and ClassificationInterpretation.from_learner(learn, dl=dls.train).split == 'train'
    assert ClassificationInterpretation.from_learner(learn, dl=dls.valid.new()).split is None
    with pytest.raises(DataError, match='test'): ClassificationInterpretation.from_learner(learn, split='test')
    plt.close('all')

# --- the table
def interp_of(actual, said, k, dl=None):
    return ClassificationInterpretation(dl, [f'c{i}' for i in range(k)], F.one_hot(torch.as_tensor(said), k).float(), torch.as_tensor(actual), torch.zeros(len(actual)))

def random_answers(n=400, k=4, right=.7, seed=0):
    rng = np.random.default_rng(seed)
    actual = rng.integers(0, k, n)
    return actual, np.where(rng.random(n) < right, actual, rng.integers(0, k, n))

def test_the_table_has_the_scores_of_scikit_learn():
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support
    actual, said = random_answers()
    table = interp_of(actual, said, 4).class_table(n_boot=50)
    for name, want in zip(('precision', 'recall', 'f1', 'support'), precision_recall_fscore_support(actual, said)): assert np.allclose(table[name][:4], want)
    for name, want in zip(('precision', 'recall', 'f1'), precision_recall_fscore_support(actual, said, average='macro')): assert table[name]['macro'] == pytest.approx(want)
    assert set(table.loc['accuracy', ['precision', 'recall', 'f1']]) == {accuracy_score(actual, said)} and table.support['accuracy'] == 400

def test_the_intervals_are_those_of_drawing_the_items_again():
    from sklearn.metrics import precision_recall_fscore_support
    actual, said = random_answers()
    table, rng = interp_of(actual, said, 4).class_table(n_boot=2000), np.random.default_rng(1)
    draws = [rng.integers(0, 400, 400) for _ in range(400)]
    scores = np.array([[*precision_recall_fscore_support(actual[d], said[d])[:3]] for d in draws])                      # (draws, 3, classes)
    macro, right = scores.mean(2), [(actual[d] == said[d]).mean() for d in draws]
    for m, name in enumerate(('precision', 'recall', 'f1')):
        for row, values in [*((f'c{c}', scores[:, m, c]) for c in range(4)), ('macro', macro[:, m]), ('accuracy', right)]:
            low, high = np.quantile(values, [.025, .975])
            got = table[f'{name} 95%'][row]
            assert got.left == pytest.approx(low, abs=.03) and got.right == pytest.approx(high, abs=.03) and table[name][row] in got

def test_few_items_give_wide_intervals_and_none_gives_none():
    table = interp_of([0]*100 + [1]*3 + [2], [0]*100 + [1]*3 + [0], 5).class_table()
    width = lambda name, c: table[f'{name} 95%'][c].length
    assert width('recall', 'c0') < .06 and width('recall', 'c1') > .4 and width('precision', 'c1') > .4 and width('f1', 'c1') > .25 and width('recall', 'c2') > .7
    assert table.precision['c2'] == table.recall['c2'] == 0 and table['recall 95%']['c2'].left == 0 and table['precision 95%']['c2'].length > .9
    for c in ('c3', 'c4'): assert table.loc[c].drop('support').isna().all() and table.support[c] == 0
    assert table.recall['macro'] == pytest.approx(2/3)
    never_there = interp_of([0, 0, 1], [0, 2, 1], 3).class_table()        # predicted, but there is none of it
    assert never_there.loc['c2'].drop('support').isna().all()

def test_a_level_and_a_seed():
    actual, said = random_answers(60)
    interp, state = interp_of(actual, said, 4), np.random.get_state()[1].tolist()
    a = interp.class_table(seed=1)
    assert a.equals(interp.class_table(seed=1)) and not a.equals(interp.class_table(seed=2)) and np.random.get_state()[1].tolist() == state
    narrow = interp.class_table(level=.5)
    assert all(narrow['f1 50%'][c].length < a['f1 95%'][c].length for c in a.index)
    for bad in dict(level=95), dict(n_boot=0):
        with pytest.raises(DataError): interp.class_table(**bad)

def test_the_intervals_hold_what_they_promise():
    "The true recall of a class lies in its interval in about 95 of 100 samples, also for a class with few items"
    held = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        actual = np.array([0]*90 + [1]*6)
        said = np.where(rng.random(96) < .85, actual, 1 - actual)
        table = interp_of(actual, said, 2).class_table(n_boot=300, seed=seed)
        held.append([.85 in table['recall 95%'][c] for c in ('c0', 'c1')])
    assert (np.mean(held, 0) > .9).all()

def test_many_classes_need_no_loop_over_items():
    actual, said = random_answers(20000, 300)
    table = interp_of(actual, said, 300).class_table(n_boot=60)
    assert len(table) == 302 and table['accuracy' == table.index]['recall 95%'].iloc[0].length < .03

def test_the_table_prints_as_intervals():
    text = interp_of(*random_answers(100), 4).class_table().round(3).to_string()
    assert 'precision 95%' in text and '[0.' in text and 'macro' in text

# --- other targets
def other(two_class, tiny, block, get_y, n_out, **kw):
    from blocks import MaskBlock, MultiCategoryBlock, PointBlock, RegressionBlock
    kinds = dict(number=RegressionBlock, labels=MultiCategoryBlock, points=PointBlock, mask=MaskBlock(codes=['a', 'b']))
    dls = DataBlock((ImageBlock, kinds[block]), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(.5, seed=2), item_tfms=Resize((32, 40))).dataloaders(two_class, bs=5, num_workers=0, seed=1, device='cpu')
    learn = Learner(dls, torch.nn.Conv2d(3, 2, 1) if block == 'mask' else tiny(n_out), precision='fp32')
    learn.remove_cbs(learn.progress)
    return learn

number = lambda p: int(p.stem.split('_')[1])/10
OTHERS = dict(number=(number, 1), labels=(lambda p: [p.parent.name] + ['even']*(int(p.stem.split('_')[1]) % 2 == 0), 3), points=(lambda p: [(number(p)*10, 5), (20, 10 + number(p))], 4), mask=(lambda p: np.full((32, 40), p.parent.name == 'dog').astype(np.uint8), 2))

@pytest.mark.parametrize('kind', OTHERS)
@pytest.mark.parametrize('where', [{}, dict(ds_idx=0)])
def test_top_losses_of_every_kind_of_target(two_class, tiny, kind, where):
    learn = other(two_class, tiny, kind, *OTHERS[kind])
    interp, (ds_idx, block) = Interpretation.from_learner(learn, **where), (where.get('ds_idx', 1), learn.dls.targets[0])
    assert len(interp) == 24 and interp.losses.shape == (24,) and repr(interp).startswith('Interpretation of')
    losses, idx, items = interp.top_losses(24, items=True)
    samples = learn.dls[ds_idx].samples
    for loss, i, f in zip(losses.tolist(), idx.tolist(), items):
        x, y = samples.new(train=False).read(i)
        assert f == samples.fields[0][i]
        with torch.no_grad(): pred = learn.model.eval()(learn.dls.valid.finish(samples.collate([(x, y)]))[0])
        assert loss == pytest.approx(float(block.loss(pred, learn.dls.valid.finish(samples.collate([(x, y)]))[1], 'none')[0]), abs=1e-4)
    axs = interp.plot_top_losses(3)
    assert len(axs) == (6 if block.kind is not None else 3) and f'{losses[0]:.2f}' in axs[0].get_title()
    shown = np.asarray(axs[0].images[0].get_array())
    assert np.allclose(shown, np.asarray(samples.new(train=False).read(int(idx[0]))[0].permute(1, 2, 0))/255, atol=1e-6)
    plt.close('all')

def test_predicted_and_actual_of_numbers_and_labels(two_class, tiny):
    for kind in ('number', 'labels'):
        learn = other(two_class, tiny, kind, *OTHERS[kind])
        interp = Interpretation.from_learner(learn)
        i = int(interp.top_losses(1)[1][0])
        raw, said = learn.dls.valid_ds.fields[1][i], interp.plot_top_losses(1)[0].get_title().split('\n')[0].split(' / ')
        assert said[1] == (f'{raw:.4g}' if kind == 'number' else ', '.join(learn.dls.targets[0].decode(interp.targs[i]))) and len(said) == 2
    plt.close('all')

def test_masks_are_not_kept(two_class, tiny):
    interp = Interpretation.from_learner(other(two_class, tiny, 'mask', *OTHERS['mask']))
    assert interp.preds is None and interp.targs is None and sum(v.numel() for v in vars(interp).values() if isinstance(v, torch.Tensor)) == 24

def test_heat_maps_lie_over_the_pictures(interp, two_class, tiny):
    from blocks.train.gradcam import grad_cam
    plain, axs = interp.plot_top_losses(4), interp.plot_top_losses(4, heatmap=True)
    assert [len(a.images) for a in plain] == [1]*4 and [len(a.images) for a in axs] == [2]*4 and [a.get_title() for a in axs] == [a.get_title() for a in plain]
    i = int(interp.top_losses(1)[1][0])
    x = interp.dl.finish(interp.dl.samples.collate([interp.dl.samples.read(i)]))[0]
    assert np.allclose(axs[0].images[1].get_array(), grad_cam(interp.learn.model, x, int(interp.decoded[i]))[0], atol=1e-4)
    with pytest.raises(DataError, match='places'): Interpretation.from_learner(other(two_class, tiny, 'mask', *OTHERS['mask'])).plot_top_losses(1, heatmap=True)
    interp.learn = None
    with pytest.raises(DataError, match='from_learner'): interp.plot_top_losses(1, heatmap=True)
    plt.close('all')

def test_calibration_of_what_was_predicted(interp, two_class, tiny):
    from blocks.train.calibrate import calibration_curve
    ece = calibration_curve(interp.probs, interp.targs, 5).ece
    assert interp.plot_calibration(5).get_title() == f'valid, ECE {ece:.3f}'
    assert 'ECE' in Interpretation.from_learner(other(two_class, tiny, 'labels', *OTHERS['labels'])).plot_calibration().get_title()
    with pytest.raises(DataError, match='RegressionBlock'): Interpretation.from_learner(other(two_class, tiny, 'number', *OTHERS['number'])).plot_calibration()
    plt.close('all')

def test_classes_are_not_asked_of_numbers(two_class, tiny):
    with pytest.raises(DataError, match='RegressionBlock'): ClassificationInterpretation.from_learner(other(two_class, tiny, 'number', *OTHERS['number']))
