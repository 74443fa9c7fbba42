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


@pytest.fixture
def dls(two_class):
    "Three classes: some cats are lions"
    label = lambda p: 'lion' if p.parent.name == 'cat' and int(p.stem.split('_')[1]) < 9 else p.parent.name
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=label, splitter=RandomSplitter(.5, seed=2), item_tfms=Resize(16), batch_tfms=aug_transforms())
    return block.dataloaders(two_class, bs=5, num_workers=0, seed=1, device='cpu')

@pytest.fixture
def learn(dls, tiny):
    learn = Learner(dls, tiny(3))
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
    monkeypatch.setattr(module, 'open_image', lambda raw: (read.append(raw), open_image(raw))[1])
    interp.confusion_matrix(); interp.most_confused(); interp.top_losses(items=True)
    assert not read
    interp.plot_top_losses(3)
    assert len(read) == 3
