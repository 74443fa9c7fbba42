"""Each item is held back once."""
import numpy as np
import pytest
import torch

from blocks import DataBlock, DataError, Learner, RegressionBlock, Resize, accuracy, cross_validate, get_image_files, mae, parent_label

CPU = dict(num_workers=0, device='cpu', bs=8)

@pytest.fixture
def block(): return DataBlock(get_items=get_image_files, get_y=parent_label, item_tfms=Resize(16))

def trainer(tiny, seen=None, epochs=0, metrics=accuracy):
    def train(dls):
        if seen is not None: seen.append(dls)
        learn = Learner(dls, tiny(dls.c), metrics=metrics)
        with learn.no_bar(): learn.fit(epochs, 1e-2)
        return learn
    return train

def test_every_item_is_predicted_once_by_a_model_that_did_not_see_it(block, two_class, tiny):
    seen = []
    cv = cross_validate(block, two_class, trainer(tiny, seen), n_folds=4, seed=2, **CPU)
    files = list(get_image_files(two_class))
    assert list(cv.idx) == list(range(48)) and list(cv.items) == files
    assert sorted(f for dls in seen for f in dls.valid_ds.fields[0]) == files and not any(set(dls.train_ds.fields[0]) & set(dls.valid_ds.fields[0]) for dls in seen)
    assert [cv.vocab[i] for i in cv.targets] == [f.parent.name for f in files]
    assert all(dls.class_report().valid.tolist() == [6, 6] for dls in seen)                             # stratified, without being asked
    again = Learner(seen[0], tiny(2)).predictor
    own = files.index(seen[0].valid_ds.fields[0][0])
    assert torch.allclose(cv.probs[own], again.predict(files[own])[2], atol=1e-5)                       # nothing was trained: all models are alike

def test_mean_and_deviation_are_those_of_the_folds(block, two_class, tiny):
    cv = cross_validate(block, two_class, trainer(tiny), n_folds=3, seed=1, **CPU)
    assert cv.names == ['valid_loss', 'accuracy'] and cv.scores.shape == (3, 2)
    assert cv.mean['accuracy'] == pytest.approx(np.mean(cv.scores[:, 1])) and cv.std['accuracy'] == pytest.approx(np.std(cv.scores[:, 1], ddof=1))
    table = cv.to_df()
    assert list(table.index) == [0, 1, 2, 'mean', 'sd'] and table.loc['mean', 'accuracy'] == pytest.approx(cv.mean['accuracy'])
    assert f"accuracy {cv.mean['accuracy']:.4f} ±" in str(cv)

def test_groups_stay_together(block, two_class, tiny):
    seen = []
    cross_validate(block, two_class, trainer(tiny, seen), n_folds=3, seed=1, groups=lambda p: p.stem.split('_')[1], **CPU)
    number = lambda s: {f.stem.split('_')[1] for f in s.fields[0]}
    assert all(not number(dls.train_ds) & number(dls.valid_ds) for dls in seen)

def test_numbers_are_cross_validated_too(two_class, tiny):
    block = DataBlock(blocks=(DataBlock().blocks[0], RegressionBlock), get_items=get_image_files, get_y=lambda p: float(p.stem.split('_')[1]), item_tfms=Resize(16))
    cv = cross_validate(block, two_class, trainer(tiny, metrics=mae), n_folds=3, seed=1, **CPU)
    assert cv.vocab is None and cv.mean['mae'] > 0
    with pytest.raises(DataError, match='one class'): cv.label_errors()

def test_labels_turned_around_are_found(block, two_class, tiny):
    files = get_image_files(two_class)
    wrong = {files[5].name, files[40].name}
    flipped = block.new(get_y=lambda p: p.parent.name if p.name not in wrong else {'cat': 'dog', 'dog': 'cat'}[p.parent.name])
    found = cross_validate(flipped, two_class, trainer(tiny, epochs=12), n_folds=3, seed=1, **CPU).label_errors()
    assert {o.rsplit('/')[-1] for o in map(str, found.item)} == wrong and set(found.suggested) == {'cat', 'dog'}

def test_a_failing_fold_is_named_with_what_was_scored_before(block, two_class, tiny):
    good, n = trainer(tiny), []
    def train(dls):
        n.append(1)
        if len(n) == 2: raise ValueError('no memory')
        return good(dls)
    with pytest.raises(ValueError, match='no memory') as e: cross_validate(block, two_class, train, n_folds=3, **CPU)
    assert 'fold 1 of 3' in e.value.__notes__[0]

def test_a_recipe_that_returns_no_learner_is_said(block, two_class):
    with pytest.raises(DataError, match='returns the trained Learner'): cross_validate(block, two_class, lambda dls: None, n_folds=3, **CPU)
