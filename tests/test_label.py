"What a picture is said to be: labels to tensors and back, and all that is no label."
import json
import pickle
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastcore.foundation import L
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blocks import DataError
from blocks.data.label import CategoryBlock, MultiCategoryBlock, RegressionBlock

quick = settings(deadline=None, derandomize=True)
texts = st.text(min_size=1, max_size=6)
labels = st.one_of(st.lists(texts, min_size=1, max_size=8), st.lists(st.integers(-9, 9), min_size=1, max_size=8))

def reloaded(block):
    "What an exported file makes of a block: its class, called with its fields"
    return type(block)(**{f.name: getattr(block, f.name) for f in fields(block)})

# --- CategoryBlock: vocabulary
def test_fitting_gives_a_new_block_and_keeps_the_template():
    template = CategoryBlock()
    assert template.fit('ba').vocab == ('a', 'b') and template.fit('cd').vocab == ('c', 'd') and template.vocab is None

@pytest.mark.parametrize('raws', [np.array(['x', 'y']), np.array([2, 1]), [torch.tensor(2), torch.tensor(1)], [np.array(2), np.array(1)], pd.Series([2, 1])])
def test_labels_of_other_libraries_become_plain_values(raws):
    block = CategoryBlock().fit(raws)
    assert len(block.vocab) == 2 and {type(o) for o in block.vocab} <= {int, str}
    assert sorted(int(block.read(o, None)) for o in raws) == [0, 1] and block.labels(raws[0])[0] in block.vocab

def test_true_and_one_are_told_from_text():
    block = CategoryBlock().fit([True, False, True])
    assert block.vocab == (False, True) and block.index(np.bool_(True)) == 1
    with pytest.raises(DataError, match="'True'"): block.index('True')

@pytest.mark.parametrize('bad', [['a'], ('a',), {'a'}, L('a'), np.array(['a']), torch.tensor([1]), {'a': 1}])
def test_several_labels_for_one_are_a_clear_error(bad):
    with pytest.raises(DataError, match='one label'): CategoryBlock().fit([bad, bad])
    for block in CategoryBlock().fit('ab'), CategoryBlock(add_na=True).fit('ab'):
        with pytest.raises(DataError): block.index(bad)

@pytest.mark.parametrize('gap', [None, float('nan'), np.nan, np.float32('nan'), pd.NA, pd.NaT])
def test_a_missing_label_is_an_error_or_na(gap):
    with pytest.raises(DataError, match='missing'): CategoryBlock().fit(['a', gap])
    block = CategoryBlock(add_na=True).fit(['a', gap, '#na#'])
    assert block.vocab == ('#na#', 'a') and block.index(gap) == block.index('unheard of') == 0 and block.labels(gap) == block.labels('unheard of') == ['#na#'] and block.labels('a') == ['a']

def test_na_keeps_the_place_it_is_given():
    block = CategoryBlock(['a', '#na#', 'b'], add_na=True)
    assert block.vocab == ('a', '#na#', 'b') and block.index('unheard of') == 1

@pytest.mark.parametrize('vocab', [True, {'a', 'b'}, [['a'], ['b']], 3])
def test_a_vocabulary_is_a_list_of_labels(vocab):
    for kind in CategoryBlock, MultiCategoryBlock:
        with pytest.raises(DataError): kind(vocab)
        assert kind(L('b', 'a')).vocab == kind(np.array(['b', 'a'])).vocab == ('b', 'a')

def test_a_block_without_a_vocabulary_says_so():
    with pytest.raises(DataError, match='fit it'): CategoryBlock().index('a')
    with pytest.raises(DataError, match='fit it'): MultiCategoryBlock().read(['a'], None)

@quick
@given(labels, st.booleans(), st.booleans())
def test_decode_undoes_read_for_every_label(raws, sort, add_na):
    assume('#na#' not in raws)
    block = CategoryBlock(sort=sort, add_na=add_na).fit(raws)
    assert [block.decode(block.read(o, None)) for o in raws] == raws
    assert list(block.vocab)[add_na:] == (sorted(set(raws)) if sort else list(dict.fromkeys(raws))) and reloaded(block) == block
    assert all(block.decode(F.one_hot(block.read(o, None), block.n_out).float()) == o for o in raws)

def test_decode_from_index_and_probabilities():
    block = CategoryBlock().fit('abc')
    assert block.decode(2) == block.decode(torch.tensor(2)) == block.decode(torch.tensor([.1, .2, .7])) == block.decode(block.decide(torch.tensor([.1, .2, .7]))) == 'c'

# --- CategoryBlock: readable names
flowers = {'21': 'fire lily', '3': 'canterbury bells', '45': 'bolero deep blue'}

@pytest.mark.parametrize('raws', [['21', '3', '21'], [21, 3, 21], np.array([21, 3]), ['fire lily', 'canterbury bells'], [21, 'canterbury bells']])
def test_names_are_the_vocabulary_for_labels_in_any_form(raws):
    block = CategoryBlock(class_names=flowers).fit(raws)
    assert block.vocab == ('canterbury bells', 'fire lily')
    assert all(block.index(o) == 1 for o in (21, '21', np.int64(21), torch.tensor(21), 'fire lily')) and block.labels(21) == ['fire lily']
    assert block.decode(block.read(21, None)) == 'fire lily' and reloaded(block) == block and block == pickle.loads(pickle.dumps(block))
    with pytest.raises(DataError, match='45'): block.index(45)                     # it has a name, and is no class here

def test_names_from_a_json_file(tmp_path):
    file = tmp_path/'cat_to_name.json'
    file.write_text(json.dumps({'1': 'Frauenschuh ♀'}, ensure_ascii=False), encoding='utf-8')
    for path in file, str(file):
        block = CategoryBlock(class_names=path).fit([1])
        assert block.vocab == ('Frauenschuh ♀',) and type(block.class_names) is dict       # nothing of the path remains
    file.unlink()
    assert reloaded(block) == block

@pytest.mark.parametrize('text', ['[1, 2]', '{"1": 2}', '{"1": ""}', '{}', '{"1": ', '{"1": "a", "2": "a"}'])
def test_a_bad_file_of_names_is_a_clear_error(text, tmp_path):
    (tmp_path/'names.json').write_text(text)
    with pytest.raises(DataError, match='names.json'): CategoryBlock(class_names=tmp_path/'names.json')
    with pytest.raises(DataError, match='none.json'): CategoryBlock(class_names=tmp_path/'none.json')

def test_labels_without_a_name_are_listed():
    for add_na in False, True:
        with pytest.raises(DataError, match=r"2 label\(s\): 7, 8"): CategoryBlock(class_names=flowers, add_na=add_na).fit([21, 7, 8])
    with pytest.raises(DataError, match='7'): CategoryBlock(vocab=[21, 7], class_names=flowers)

def test_two_labels_never_become_one_class():
    with pytest.raises(DataError, match="'n1' and 'n2'"): CategoryBlock(class_names={'n1': 'crane', 'n2': 'crane'})
    with pytest.raises(DataError, match='two names'): CategoryBlock(class_names={1: 'a', '1': 'b'})
    with pytest.raises(DataError, match='told'): CategoryBlock(class_names={'a': 'b', 'b': 'a'})
    with pytest.raises(DataError, match='more than once'): CategoryBlock(vocab=[21, 'fire lily'], class_names=flowers)
    assert CategoryBlock(class_names={'cat': 'cat', 'n2': 'dog'}).fit(['n2', 'cat']).vocab == ('cat', 'dog')

def test_a_given_vocabulary_keeps_its_order_under_either_name():
    assert CategoryBlock(vocab=[21, 3], class_names=flowers).vocab == CategoryBlock(vocab=['fire lily', '3'], class_names=flowers).vocab == ('fire lily', 'canterbury bells')
    assert CategoryBlock(vocab=[21], class_names=flowers, add_na=True).fit([21]).vocab == ('#na#', 'fire lily')

@quick
@given(st.dictionaries(st.integers(0, 99), st.text('abcäß ', min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=8))
def test_names_and_labels_agree_for_every_mapping(names):
    assume(len(set(names.values())) == len(names))
    block = CategoryBlock(class_names=names).fit(list(names))
    assert all(block.index(o) == block.index(str(o)) == block.index(n) and block.decode(block.read(o, None)) == n for o, n in names.items())
    assert block.vocab == tuple(sorted(names.values())) and reloaded(block) == block

# --- CategoryBlock: weights
def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight
    raws = list('aaaaaabbc')
    block = CategoryBlock(weights='balanced').fit(raws)
    assert block.weights == tuple(compute_class_weight('balanced', classes=np.array(block.vocab), y=raws).tolist()) and {type(o) for o in block.weights} == {float}
    assert reloaded(block) == block == block.fit(list('abc'))                      # fitted is fitted

def test_balanced_weights_of_a_given_vocabulary_and_of_classes_that_do_not_occur():
    block = CategoryBlock(['c', 'b', 'a'], weights='balanced').fit(list('aaab'))
    assert block.weights == (1., 2., 2/3)
    assert CategoryBlock(add_na=True, weights='balanced').fit(['a', 'a', None]).weights == (1.5, .75)
    with pytest.raises(DataError, match='fit'): CategoryBlock(['a', 'b'], weights='balanced').loss(torch.zeros(1, 2), torch.tensor([0]))

def test_given_weights_in_the_order_of_the_vocabulary_or_by_label():
    assert CategoryBlock(weights=[1, 2]).fit('ba').weights == CategoryBlock(weights=np.array([1, 2])).fit('ba').weights == CategoryBlock(weights=dict(b=2)).fit('ba').weights == (1., 2.)
    block = CategoryBlock(class_names=flowers, weights={21: 5, 'canterbury bells': 2})
    assert block.fit([21, 3]).weights == (2., 5.) and block == reloaded(block)

@pytest.mark.parametrize('weights,match', [([1, 2, 3], '3 numbers for 2'), ({'z': 2}, "'z'"), ([1, 0], 'above 0'), ([1, -1], 'above 0'), ({'a': float('nan')}, 'above 0'), ([1, float('inf')], 'above 0'),
                                           ('balance', 'balanced'), (3, 'balanced'), ({1., 2.}, 'balanced'), ([1, 'x'], 'numbers')])
def test_weights_that_do_not_fit(weights, match):
    for add_na in False, True:
        if match == '3 numbers for 2' and add_na: continue                         # with '#na#' there are three
        with pytest.raises(DataError, match=match): CategoryBlock(weights=weights, add_na=add_na).fit('ab')

def test_the_weighted_loss_is_that_of_pytorch():
    block, pred, y = CategoryBlock(weights=[1, 3]).fit('ab'), torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0, 1])
    w = torch.tensor([1., 3.])
    for reduction in 'mean', 'none', 'sum': assert torch.allclose(block.loss(pred, y, reduction), F.cross_entropy(pred.float(), y, w, reduction=reduction))
    assert not torch.allclose(block.loss(pred, y), replace(block, weights=None).loss(pred, y))

def test_a_model_with_the_wrong_number_of_outputs_is_told_so():
    for block, y in (CategoryBlock().fit('ab'), torch.zeros(4, dtype=torch.long)), (MultiCategoryBlock().fit([['a'], ['b']]), torch.zeros(4, 2)):
        with pytest.raises(DataError, match='3 outputs for 2 classes'): block.loss(torch.zeros(4, 3), y)

@pytest.mark.parametrize('block,y', [(CategoryBlock(['a', 'b'], weights=[1, 2]), torch.tensor([1])), (MultiCategoryBlock(['a', 'b']), torch.tensor([[0., 1.]])), (RegressionBlock(2), torch.tensor([[0., 1.]]))])
def test_loss_and_activation_of_bfloat16_are_computed_in_32_bits(block, y):
    pred = torch.tensor([[1.3, -.7]])
    assert block.loss(pred.bfloat16(), y).dtype == block.activate(pred.bfloat16()).dtype == torch.float32

# --- MultiCategoryBlock
@quick
@given(st.lists(st.one_of(st.lists(texts, max_size=5), st.sets(texts, max_size=5).map(frozenset)), min_size=1, max_size=8), st.booleans())
def test_decode_undoes_read_for_every_set_of_labels(raws, add_na):
    assume(any(raws) and not any('#na#' in o for o in raws))
    block = MultiCategoryBlock(add_na=add_na).fit(raws)
    for o in raws:
        y = block.read(o, None)
        assert y.shape == (block.n_out,) and y.dtype == torch.float32 and block.decode(y) == sorted(set(o)) == block.decode(y.bool()) == sorted(block.labels(o))
    assert reloaded(block) == block and block.decode(block.read([], None)) == []

@quick
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6), st.sampled_from([None, ['x', 'b', 'a']]))
def test_decode_undoes_read_for_encoded_rows(rows, vocab):
    block = MultiCategoryBlock(vocab, encoded=True).fit(np.array(rows, dtype=np.int64))
    for o in rows:
        assert block.decode(block.read(o, None)) == block.labels(o) == [c for c, yes in zip(vocab or range(3), o) if yes]
        assert block.read(o, None).tolist() == o and block.read(torch.tensor(o), None).dtype == torch.float32

@pytest.mark.parametrize('raw', [['b', 'a'], ('a', 'b'), {'a', 'b'}, L('a', 'b'), np.array(['a', 'b']), pd.Series(['a', 'b']), ['a', 'b', 'a'], np.array(['a', 'b'], object)])
def test_labels_may_come_in_any_collection(raw):
    block = MultiCategoryBlock().fit([raw, ['c']])
    assert block.vocab == ('a', 'b', 'c') and block.read(raw, None).tolist() == [1, 1, 0] and sorted(block.labels(raw)) == ['a', 'b']

@pytest.mark.parametrize('raw,match', [('a b', 'label_delim'), ('a', r'\[label\]'), (3, 'list'), (None, 'missing'), (float('nan'), 'missing'), (['a', None], 'missing'), ([['a'], ['b']], 'flat'), ({'a': 1}, 'list'), (iter('ab'), 'list')])
def test_what_is_no_list_of_labels_is_refused_with_the_mend(raw, match):
    fitted = MultiCategoryBlock(['a', 'b'])
    for f in MultiCategoryBlock().fit, fitted.fit:
        with pytest.raises(DataError, match=match): f([['a'], raw])
    for f in fitted.labels, fitted.verify, lambda o: fitted.read(o, None):
        with pytest.raises(DataError, match=match): f(raw)

def test_unknown_labels_are_an_error_or_na():
    with pytest.raises(DataError, match="'c'"): MultiCategoryBlock(['a', 'b']).read(['a', 'c'], None)
    block = MultiCategoryBlock(add_na=True).fit([['b'], ['a', None], None])
    assert block.vocab == ('#na#', 'a', 'b') and block.read(['c', 'd', 'a'], None).tolist() == [1, 1, 0] and block.labels(None) == ['#na#'] and block.labels(['c', 'a']) == ['#na#', 'a']

def test_rows_of_zeros_and_ones_are_not_taken_for_labels():
    for rows in ([[0, 1, 0], [1, 1, 0]], np.eye(3), [(False, True, False)]*2, [torch.tensor([1., 0., 0.])]*2):
        with pytest.raises(DataError, match='encoded=True'): MultiCategoryBlock().fit(rows)
    assert MultiCategoryBlock().fit([[0, 1], [1], []]).vocab == (0, 1)              # labels that are called 0 and 1

@pytest.mark.parametrize('row', [[1, 0], [1, 0, 2], [1, 0, .5], [1, 0, None], [1, 0, float('nan')], ['1', '0', '1'], {0, 1}, 'abc', None, [[1, 0, 1]], 1])
def test_what_is_no_encoded_row_is_refused(row):
    block = MultiCategoryBlock(['a', 'b', 'c'], encoded=True)
    for f in (lambda: block.fit([[1, 0, 1], row]), lambda: block.read(row, None), lambda: block.labels(row), lambda: MultiCategoryBlock(encoded=True).fit([[1, 0, 1], row])):
        with pytest.raises(DataError, match='row of 0 and 1'): f()

def test_data_without_any_label_and_options_that_exclude_each_other():
    with pytest.raises(DataError, match='none of the 2'): MultiCategoryBlock().fit([[], []])
    with pytest.raises(DataError, match='different types'): MultiCategoryBlock().fit([[1, 'a']])
    with pytest.raises(DataError, match='leave one out'): MultiCategoryBlock(encoded=True, add_na=True)
    for thresh in -.1, 1:
        with pytest.raises(DataError, match='thresh'): MultiCategoryBlock(thresh=thresh)

def test_multi_label_loss_is_one_number_an_item_and_needs_pairs():
    block, pred = MultiCategoryBlock(['a', 'b', 'c']), torch.randn(5, 3)
    y = (torch.rand(5, 3) > .5).float()
    want = F.binary_cross_entropy_with_logits(pred, y, reduction='none').mean(1)
    assert torch.allclose(block.loss(pred, y, 'none'), want) and torch.allclose(block.loss(pred, y), want.mean()) and torch.allclose(block.loss(pred, y.bool(), 'sum'), want.sum())
    with pytest.raises(DataError, match='pair'): block.loss(pred, y[:1])            # would be broadcast

def test_thresh_decides():
    block = MultiCategoryBlock(['a', 'b'], thresh=.8)
    act = block.activate(torch.tensor([[2., 1.], [0., 1.5]]))
    assert block.decide(act).tolist() == [[True, False], [False, True]] and [block.decode(o) for o in act] == [['a'], ['b']] and block.decode(block.read(['a', 'b'], None)) == ['a', 'b']

# --- RegressionBlock
numbers = st.floats(-1e6, 1e6, width=32)

@quick
@given(st.lists(numbers, min_size=1, max_size=5))
def test_decode_undoes_read_for_numbers(values):
    one, some = RegressionBlock().fit(values), RegressionBlock().fit([values]*2)
    assert one.n_out == 1 and some.n_out == len(values) and reloaded(some) == some
    assert [one.decode(one.read(o, None)) for o in values] == values and all(one.read(o, None).shape == () for o in values)
    y = some.read(values, None)
    assert y.dtype == torch.float32 and y.shape == ((len(values),) if len(values) > 1 else ()) and some.decode(y) == (tuple(values) if len(values) > 1 else values[0])

@pytest.mark.parametrize('raw', [3, 3., np.float32(3), np.int64(3), torch.tensor(3), np.array(3.), [3], (3.,), torch.tensor([3.], dtype=torch.bfloat16), L(3), pd.Series([3])])
def test_one_number_in_any_form(raw):
    block = RegressionBlock().fit([raw, raw])
    assert block.n_out == 1 and block.read(raw, None).shape == () and block.collate([block.read(raw, None)]*2).tolist() == [3, 3] and block.decode(block.read(raw, None)) == 3

@pytest.mark.parametrize('bad', [None, float('nan'), [1., None], [1., float('nan')], 'x', '3', ['1', '2'], float('inf'), 1e300, [], [[1, 2]], {1, 2}, {'a': 1}, 1j, np.datetime64('2020-01-01'), pd.NA, [1, 'a'], [1, [2, 3]]])
def test_what_is_no_number_is_named(bad):
    for f in RegressionBlock().verify, lambda o: RegressionBlock().read(o, None), lambda o: RegressionBlock().fit([o]):
        with pytest.raises(DataError, match='a target'): f(bad)

def test_lengths_that_differ_name_the_odd_one():
    with pytest.raises(DataError, match=r'most have 2 .*\[7, 8, 9\]'): RegressionBlock().fit([[1, 2], [7, 8, 9], [3, 4]])
    for f in (lambda: RegressionBlock(2).fit([[1, 2, 3]]), lambda: RegressionBlock(2).verify(5.), lambda: RegressionBlock(2).read([5.], None)):
        with pytest.raises(DataError, match='2 numbers'): f()
    with pytest.raises(DataError): RegressionBlock().fit([])

def test_y_range_is_checked():
    block = RegressionBlock(y_range=[0, 100]).fit([0, 100., 34])
    assert block == reloaded(block) == RegressionBlock(1, (0., 100.))
    with pytest.raises(DataError, match=r'101.*y_range'): block.fit([5, 101])
    block.verify(101)                                                               # only training values must be reached
    for bad in (1, 0), (1, 1), (1,), (0, float('nan')), 'ab', 5, (None, 1):
        with pytest.raises(DataError, match='y_range'): RegressionBlock(y_range=bad)
    for bad in 0, -1, 1.5, True, '2':
        with pytest.raises(DataError, match='n_out'): RegressionBlock(n_out=bad)

def test_predictions_of_n_by_1_pair_with_n_targets():
    block, pred, y = RegressionBlock(1), torch.randn(5, 1), torch.randn(5)
    assert torch.equal(block.loss(pred, y, 'none'), (pred[:, 0] - y)**2) and torch.equal(block.loss(pred, y), F.mse_loss(pred[:, 0], y))
    assert torch.equal(block.loss(pred[:, 0], y), block.loss(pred, y[:, None])) and block.activate(pred).shape == block.activate(pred[:, 0]).shape == (5,) and block.activate(pred[:1]).shape == (1,)
    for other in torch.randn(5, 2), torch.randn(1, 1), torch.randn(4):
        with pytest.raises(DataError, match='pair'): block.loss(other, y)

def test_several_numbers_have_one_loss_an_item():
    block, pred, y = RegressionBlock(3), torch.randn(4, 3), torch.randn(4, 3)
    assert torch.allclose(block.loss(pred, y, 'none'), ((pred - y)**2).mean(1)) and torch.allclose(block.loss(pred, y), F.mse_loss(pred, y))
    with pytest.raises(DataError, match='n_out=3'): block.loss(torch.randn(4, 1), y)

def test_the_metric_pairs_with_the_model_s_output():
    from blocks import mae
    assert float(mae(torch.tensor([[1.], [2.]]), torch.tensor([2., 2.]))) == .5

# --- what people see
def test_titles():
    import matplotlib
    matplotlib.use('agg')
    from matplotlib.figure import Figure
    def title(block, value): ax = Figure().subplots(); block.show(value, ax); return ax.get_title()
    assert title(CategoryBlock(), 3) == '3' and title(MultiCategoryBlock(), ['a', 1]) == 'a;1' and title(RegressionBlock(), 1/3) == '0.3333' and title(RegressionBlock(), (1., 2.5)) == '1; 2.5'

# --- temperature
@pytest.mark.parametrize('block', [CategoryBlock(['a', 'b', 'c']), MultiCategoryBlock(['a', 'b', 'c'])])
def test_a_temperature_divides_the_scores_and_leaves_the_loss_alone(block):
    pred = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))*4
    y = torch.arange(20) % 3 if isinstance(block, CategoryBlock) else (pred > .3).float()
    warm = replace(block, temperature=3)
    assert block.temperature == 1. and torch.allclose(warm.activate(3*pred), block.activate(pred)) and not torch.allclose(warm.activate(pred), block.activate(pred))
    assert torch.equal(warm.decide(warm.activate(pred)), block.decide(block.activate(pred))) and torch.equal(warm.loss(pred, y), block.loss(pred, y))
    assert reloaded(warm) == warm and type(warm.temperature) is float

@pytest.mark.parametrize('kind', [CategoryBlock, MultiCategoryBlock])
def test_fields_of_an_older_file_make_a_block_without_temperature(kind):
    old = {f.name: getattr(kind(['a', 'b']), f.name) for f in fields(kind) if f.name != 'temperature'}
    assert kind(**old) == kind(['a', 'b']) and kind(**old).temperature == 1.

@pytest.mark.parametrize('bad', [0, -1, float('nan'), float('inf'), 'hot', None])
@pytest.mark.parametrize('kind', [CategoryBlock, MultiCategoryBlock])
def test_a_temperature_is_above_zero(kind, bad):
    with pytest.raises(DataError, match='temperature'): kind(temperature=bad)
