"""Listing, labelling and splitting: faults, edge cases, random state, pickling."""
import inspect, itertools, os, pickle, subprocess, sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.foundation import L
from hypothesis import given, settings, strategies as st

import blocks.data.source as source
from blocks.core import BlocksError, DataError, ItemError, set_seed
from blocks.data.source import (AttrGetter, ColReader, ColSplitter, EndSplitter, FileGetter, FileSplitter, FuncSplitter, GrandparentSplitter, GroupSplitter, ImageGetter,
                                IndexSplitter, ItemGetter, KFoldSplitter, MaskSplitter, RandomSplitter, RandomSubsetSplitter, RegexLabeller, SourceError, StratifiedSplitter,
                                TrainTestSplitter, check_split, get_files, get_image_files, image_extensions, parent_label, using_attr)

def touch(root, *names):
    for n in names: (root/n).parent.mkdir(parents=True, exist_ok=True); (root/n).touch()
def names(root, files): return [f.relative_to(root).as_posix() for f in files]
def lists(split): return [list(o) for o in split]

# ---- the module -----------------------------------------------------------------------------------------------
def test_importing_loads_nothing_heavy():
    code = "import sys, blocks.data.source; print([m for m in ('torch', 'torchvision', 'pandas', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_every_public_thing_is_documented():
    for n in source.__all__:
        if n != 'image_extensions': assert inspect.getdoc(getattr(source, n)), n

# ---- files ----------------------------------------------------------------------------------------------------
def test_image_extensions():
    assert image_extensions >= {'.jpg', '.jpeg', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp'}
    assert all(s == s.lower() and s.startswith('.') for s in image_extensions) and not image_extensions & {'.pdf', '.txt', '.mpg', '.h5'}

def test_hidden_things_are_left_out_and_suffixes_have_no_case(tmp_path):
    touch(tmp_path, 'a/1.jpg', 'a/2.JPEG', 'a/.3.png', '.hid/4.png', 'a/.deep/5.png', '6.txt', 'png', 'a.png/7.PNG')
    files = get_image_files(tmp_path)
    assert isinstance(files, L) and all(isinstance(f, Path) for f in files) and names(tmp_path, files) == ['a/1.jpg', 'a/2.JPEG', 'a.png/7.PNG']
    assert names(tmp_path, get_files(tmp_path, ['TXT'])) == ['6.txt'] == names(tmp_path, get_files(tmp_path, '.txt', recurse=False))
    assert len(get_files(tmp_path)) == 5 and get_files(tmp_path, '.nothing') == []

def test_a_hidden_root_is_read(tmp_path):
    touch(tmp_path, '.root/1.png'); assert len(get_image_files(tmp_path/'.root')) == 1

def test_order_is_that_of_sorted_whatever_the_file_system_says(tmp_path, monkeypatch):
    touch(tmp_path, 'a/z.png', 'a.b/y.png', 'a-b/x.png', 'B/1.png', '10.png', '9.png', 'a/b/c.png')
    want, scandir = sorted(tmp_path.rglob('*.png')), os.scandir
    class Reversed:
        def __init__(self, path): self.entries = sorted(scandir(path), key=lambda e: e.name, reverse=True)
        def __enter__(self): return iter(self.entries)
        def __exit__(self, *_): pass
    assert get_image_files(tmp_path) == want
    monkeypatch.setattr(source.os, 'scandir', Reversed); assert get_image_files(tmp_path) == want

def test_no_file_is_touched(tmp_path, monkeypatch):
    touch(tmp_path, *(f'{d}/{i}.png' for d in 'ab' for i in range(5))); asked, stat = [], os.stat
    monkeypatch.setattr(os, 'stat', lambda p, *a, **k: asked.append(str(p)) or stat(p, *a, **k))
    assert len(get_image_files(tmp_path)) == 10 and not [p for p in asked if p.endswith('.png')]

def test_folders(tmp_path):
    touch(tmp_path, '0.png', 'a/1.png', 'a/deep/2.png', 'b/3.png', 'c/a/4.png')
    assert names(tmp_path, get_image_files(tmp_path, folders='a')) == ['a/1.png', 'a/deep/2.png']
    assert names(tmp_path, get_image_files(tmp_path, folders=['b', 'a', 'a/deep'], recurse=False)) == ['a/1.png', 'a/deep/2.png', 'b/3.png']
    assert names(tmp_path, get_image_files(tmp_path, folders=['.', 'b'])) == ['0.png', 'b/3.png']
    with pytest.raises(SourceError, match="'aa'.*Did you mean 'a'"): get_image_files(tmp_path, folders=['b', 'aa'])

def test_missing_folder_names_what_was_given_and_what_is_near(tmp_path):
    touch(tmp_path, 'images/cats/1.png')
    with pytest.raises(FileNotFoundError, match=r"imges/cats'.*has no folder 'imges'.*Did you mean 'images'") as e: get_image_files(f'{tmp_path}/imges/cats')
    assert isinstance(e.value, BlocksError) and isinstance(e.value, ValueError) and str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
    with pytest.raises(SourceError, match="The folders there: 'images'"): get_image_files(tmp_path/'xyz')
    with pytest.raises(SourceError, match='holds no folders'): get_image_files(tmp_path/'images'/'cats'/'zz')

def test_a_file_where_a_folder_is_expected(tmp_path):
    touch(tmp_path, 'labels.csv')
    with pytest.raises(SourceError, match='is a file, and a folder is expected'): get_image_files(tmp_path/'labels.csv')
    with pytest.raises(SourceError, match="has no folder 'labels.csv'"): get_image_files(tmp_path/'labels.csv'/'train')

def test_links(tmp_path):
    touch(tmp_path, 'data/1.png', 'data/sub/2.png', 'other/3.png')
    try: (tmp_path/'data/link').symlink_to(tmp_path/'other', target_is_directory=True)
    except OSError: pytest.skip('no links here')
    (tmp_path/'data/sub/up').symlink_to(tmp_path/'data'); (tmp_path/'other/back').symlink_to(tmp_path/'data/sub')
    got = names(tmp_path, get_files(tmp_path/'data', '.png'))
    assert got == ['data/1.png', 'data/link/3.png', 'data/link/back/2.png', 'data/sub/2.png']               # it ends, and all are there
    assert names(tmp_path, get_files(tmp_path/'data', followlinks=False)) == ['data/1.png', 'data/sub/2.png']

def test_getters(tmp_path):
    touch(tmp_path, 'im/a/1.png', 'im/2.png', 'im/a/3.txt')
    for g, want in ((ImageGetter('im'), 2), (ImageGetter('im', recurse=False), 1), (FileGetter('im', extensions=['.txt']), 1), (FileGetter(folders='im'), 3)):
        assert len(g(tmp_path)) == len(pickle.loads(pickle.dumps(g))(str(tmp_path))) == want

# ---- labels ---------------------------------------------------------------------------------------------------
def test_parent_label():
    assert parent_label('x/cat/1.jpg') == parent_label(Path('x/cat/1.jpg')) == 'cat'
    with pytest.raises(DataError, match="'1.jpg'"): parent_label('1.jpg')
    with pytest.raises(DataError, match='ColReader'): parent_label(pd.Series([1]))

def test_regex_labeller():
    f = pickle.loads(pickle.dumps(RegexLabeller(r'([^/]+)_\d+\.jpg$')))
    assert f(Path('d/great_pyrenees_173.jpg')) == 'great_pyrenees'
    with pytest.raises(DataError, match=r"\[\^/\]\+\)_.*is not found in 'd/cat\.jpg'"): f('d/cat.jpg')
    assert RegexLabeller('(b)')('ab') == 'b'
    with pytest.raises(DataError, match='beginning'): RegexLabeller('(b)', match=True)('ab')
    with pytest.raises(DataError, match='no group'): RegexLabeller(r'\d+')
    with pytest.raises(DataError, match='not a regular expression'): RegexLabeller(r'(\d+')
    with pytest.raises(DataError, match='not found'): RegexLabeller('a|(b)')('a')

def test_item_and_attribute_getters():
    P = namedtuple('P', 'name label')
    assert ItemGetter(1)((1, 2)) == 2 and ItemGetter('k')({'k': 3}) == 3 and AttrGetter('name')(P('n', 'l')) == 'n' and AttrGetter('none', 5)(P(0, 0)) == 5
    assert pickle.loads(pickle.dumps(using_attr(parent_label, 'name')))(P('cat/1.jpg', 0)) == 'cat'

@pytest.fixture()
def df(): return pd.DataFrame(dict(f=['a', 'b', 'c'], n=[0, 1, 1], x=[.5, 1., 2.], tags=['p, q', 'q', ''], lab=pd.Categorical(['u', 'v', 'u'])), index=[10, 20, 30])

@pytest.mark.parametrize('reader', [ColReader('f'), ColReader(0), ColReader(-1), ColReader('n'), ColReader('x'), ColReader('lab'), ColReader('tags', label_delim=','), ColReader(['f', 1]),
                                    ColReader('f', pref=Path('d'), suff='.png'), ColReader('n', suff='.png')], ids=str)
def test_a_column_at_once_equals_row_by_row(df, reader):
    want, typed = [reader(r) for _, r in df.iterrows()], lambda o: [type(v) for v in o]
    assert reader.column(df) == want == [reader(r) for r in df.itertuples()] == [reader(r) for r in df.itertuples(index=False)] == [reader(r) for r in df.to_dict('records')]
    assert typed(reader.column(df)) == typed(want) and not any(isinstance(v, np.generic) for v in want)

def test_col_reader_values(df):
    row = df.iloc[0]
    assert ColReader('f', pref=Path('d'), suff='.png')(row) == os.path.join('d', 'a.png') and ColReader('f', pref='d', suff='.png')(row) == 'da.png'
    assert ColReader('tags', label_delim=',').column(df) == [['p', 'q'], ['q'], []] and ColReader(['n'])(row) == 0 and ColReader(['f', 'n'])(row) == ['a', 0]
    assert ColReader(1)(['x.png', 'cat']) == 'cat' == ColReader(1)(np.array(['x.png', 'cat']))

def test_numbers_as_column_names_are_names():
    df = pd.DataFrame({1: ['one'], 0: ['zero']})
    assert ColReader(0).column(df) == ['zero'] == [ColReader(0)(df.iloc[0])]
    with pytest.raises(DataError, match='no column 2'): ColReader(2)(df.iloc[0])
    with pytest.raises(DataError, match='no column -1'): ColReader(-1).column(df)

def test_missing_columns_are_named(df):
    for read in (ColReader('tag').column, lambda d: ColReader('tag')(d.iloc[0]), lambda d: ColReader('tag')(next(d.itertuples())), ColSplitter('tag')):
        with pytest.raises(DataError, match="no column 'tag'.*'f', 'n', 'x', 'tags', 'lab'.*Did you mean 'tags'"): read(df)
    with pytest.raises(DataError, match='no column 5'): ColReader(5)(df.iloc[0])
    with pytest.raises(DataError, match="2 columns are named 'f'"): ColReader('f').column(pd.concat([df, df], axis=1))

@pytest.mark.parametrize('gap', [None, np.nan, np.float32('nan'), pd.NA, pd.NaT], ids=str)
def test_missing_values_name_row_and_column(gap):
    df = pd.DataFrame(dict(lab=pd.Series(['a', gap], dtype=object, index=['r1', 'r2'])))
    for read in (ColReader('lab').column, lambda d: ColReader('lab')(d.iloc[1]), lambda d: ColReader('lab')([*d.itertuples()][1]), ColReader('lab', pref='p').column):
        with pytest.raises(DataError, match="'lab' has no value in row 'r2'"): read(df)
    assert ColReader('lab', label_delim=' ').column(df) == [['a'], []]

def test_col_reader_refuses_what_it_cannot_read(df):
    for o in (df, 'a/b.png', Path('a/b.png'), 3):
        with pytest.raises(DataError, match='one row of a table'): ColReader(0)(o)
    with pytest.raises(DataError, match='label_delim'): ColReader('f', pref='x', label_delim=' ')

# ---- splits: what holds for all -------------------------------------------------------------------------------
ALL = [RandomSplitter(), RandomSplitter(.3, seed=1), TrainTestSplitter(), TrainTestSplitter(test_size=7, random_state=3), IndexSplitter([3, 1]), EndSplitter(), EndSplitter(.5, valid_last=False),
       MaskSplitter([True, False]*10), RandomSubsetSplitter(.5, .2), StratifiedSplitter(.2, seed=4),
       RandomSplitter(test_pct=.2), StratifiedSplitter(.2, 4, .3), IndexSplitter([3, 1], [5]), GroupSplitter(list(range(10))*2, test_pct=.2), KFoldSplitter(2), KFoldSplitter(2, stratify=True, groups=list(range(10))*2)]

@pytest.mark.parametrize('splitter', ALL, ids=repr)
def test_sound_repeatable_picklable_and_without_global_state(splitter):
    items, more = list(range(20)), ([0, 1]*10,) if getattr(splitter, 'needs_labels', False) else ()
    set_seed(5); before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    split = splitter(items, *more)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    assert lists(split) == lists(check_split(split, 20)) == lists(pickle.loads(pickle.dumps(splitter))(items, *more)) == lists(splitter(items, *more))
    assert all(isinstance(o, L) and all(type(i) is int for i in o) for o in split)
    if not isinstance(splitter, RandomSubsetSplitter): assert sorted(sum(map(list, split), [])) == items

@pytest.mark.parametrize('splitter', [RandomSplitter(), RandomSubsetSplitter(.5, .5), TrainTestSplitter(), StratifiedSplitter(), StratifiedSplitter(test_pct=.1),
                                      GroupSplitter(list(range(50))*2), KFoldSplitter(1), KFoldSplitter(1, stratify=True), KFoldSplitter(1, groups=list(range(50))*2)], ids=repr)
def test_without_a_seed_the_split_follows_set_seed(splitter):
    items, more = range(100), ([0, 1]*50,) if getattr(splitter, 'needs_labels', False) else ()
    set_seed(1); a = splitter(items, *more); torch.rand(3); np.random.rand(3); assert a == splitter(items, *more)
    set_seed(2); assert a != splitter(items, *more)
    set_seed(1); assert a == splitter(items, *more)

def test_random_splitter_is_fastais():
    assert lists(RandomSplitter(.2, seed=42)(range(10))) == [[1, 8, 4, 5, 0, 9, 3, 7], [2, 6]]

@pytest.mark.parametrize('pct', [1, 1., -.1, 20, '0.2', None, True, float('nan')])
def test_fractions_are_checked(pct):
    for make in (RandomSplitter, StratifiedSplitter, EndSplitter, lambda p: RandomSubsetSplitter(p, .1), lambda p: RandomSubsetSplitter(.1, p)):
        with pytest.raises(DataError, match=r'(valid_pct|train_sz|valid_sz).*got'): make(pct)

def test_nothing_held_back():
    assert lists(RandomSplitter(0, seed=1)(range(3)))[1] == [] and lists(EndSplitter(.1)(range(5))) == [[0, 1, 2, 3, 4], []] == lists(EndSplitter(0, valid_last=False)(range(5)))
    assert lists(StratifiedSplitter(0)(range(4), 'aabb')) == [[0, 1, 2, 3], []]

def test_subset_sizes():
    assert [len(o) for o in RandomSubsetSplitter(.6, .4)(range(50))] == [30, 20]
    with pytest.raises(DataError, match='at most 1 together'): RandomSubsetSplitter(.7, .4)
    with pytest.raises(DataError, match='above 0'): RandomSubsetSplitter(0, .4)

# ---- stratified -----------------------------------------------------------------------------------------------
def test_stratified_keeps_the_share_of_each_class():
    y = ['rare']*10 + ['often']*90
    for seed in range(5):
        _, valid = StratifiedSplitter(.2, seed=seed)(range(100), np.array(y)); assert sum(y[i] == 'rare' for i in valid) == 2 and len(valid) == 20
    assert StratifiedSplitter.needs_labels and StratifiedSplitter(.2, seed=1)(range(100), pd.Series(y)) == StratifiedSplitter(.2, seed=1)(range(100), L(y))
    assert len(StratifiedSplitter(.29, seed=2**40)(range(100), torch.arange(100) % 29)[1]) == 29
    y = [1, 'a', 1, 'a']; assert {y[i] for i in StratifiedSplitter(.5)(range(4), y)[1]} == {1, 'a'}        # of kinds that have no order

def test_stratified_faults_name_class_and_mend():
    with pytest.raises(DataError, match="'solo'.*'a' 4, 'solo' 1.*Add pictures"): StratifiedSplitter(.4)(range(5), ['a']*4 + ['solo'])
    with pytest.raises(DataError, match='is 1 valid and 9 train.*fewer than the 2 classes.*from 0.2 to 0.8'): StratifiedSplitter(.1)(range(10), 'ab'*5)
    with pytest.raises(DataError, match='is 9 valid and 1 train'): StratifiedSplitter(.9)(range(10), 'ab'*5)
    with pytest.raises(DataError, match='3 labels for 4 items'): StratifiedSplitter()(range(4), 'aab')
    with pytest.raises(DataError, match='needs the labels'): StratifiedSplitter()(range(4))
    with pytest.raises(DataError, match='several labels'): StratifiedSplitter()(range(2), [['a'], ['a', 'b']])
    with pytest.raises(DataError, match="left to train on of: 'rare'.*smaller valid_pct"):
        for seed in range(50): StratifiedSplitter(.9, seed=seed)(range(102), ['rare']*2 + ['often']*100)

def test_train_test_splitter_is_scikit_learns():
    from sklearn.model_selection import train_test_split
    y = [0]*80 + [1]*20; want = train_test_split(list(range(100)), test_size=.25, random_state=42, stratify=y)
    assert lists(TrainTestSplitter(.25, 42, y)(range(100))) == want
    assert lists(TrainTestSplitter(shuffle=False)(range(5))) == [[0, 1, 2, 3], [4]] and [len(o) for o in TrainTestSplitter(train_size=10)(range(100))] == [10, 20]
    for bad in (TrainTestSplitter(stratify=y), TrainTestSplitter(test_size=1.5), TrainTestSplitter(stratify=[0]*9 + [1])):
        with pytest.raises(DataError, match='10 items cannot be split'): bad(range(10))

# ---- by index, mask, function ---------------------------------------------------------------------------------
@pytest.mark.parametrize('idx,text', [([0, 5], 'outside of 0 to 4, for 5 items: 5'), ([-1], 'outside.*-1'), ([1, 1], 'more than once: 1'), ([True, False], 'MaskSplitter'),
                                      (np.array([True]*5), 'MaskSplitter'), (['a.png'], "holds 'a.png'"), ([1.], r'1\.0 \(float\)'), (None, 'must be a list of positions')], ids=str)
def test_index_splitter_faults(idx, text):
    with pytest.raises(DataError, match=text): IndexSplitter(idx)(range(5))
def test_index_splitter_takes_all_kinds_of_lists():
    for idx in ([1, 3], (1, 3), np.array([1, 3]), torch.tensor([1, 3]), pd.Series([1, 3]), L(1, 3), {1: 0, 3: 0}, iter([1, 3])): assert lists(IndexSplitter(idx)(range(5))) == [[0, 2, 4], [1, 3]]
    assert lists(IndexSplitter(2)(range(3))) == [[0, 1], [2]] and lists(IndexSplitter([])(range(2))) == [[0, 1], []]

def test_mask_splitter_faults():
    for mask in ([True, False], np.array([1, 0]), torch.tensor([True, False]), pd.Series([1., 0.])): assert lists(MaskSplitter(mask)(range(2))) == [[1], [0]]
    with pytest.raises(DataError, match='2 entries for 3 items'): MaskSplitter([True, False])(range(3))
    with pytest.raises(DataError, match="2 of 2 are not: 'True', 'False'"): MaskSplitter(['True', 'False'])(range(2))
    with pytest.raises(DataError, match="1 of 2 are not: '2'"): MaskSplitter([0, 2])(range(2))

def test_func_splitter(df):
    assert lists(FuncSplitter(lambda r: r['n'] == 0)(df)) == [[1, 2], [0]] == lists(FuncSplitter(lambda r: r.f == 'a')(df))
    with pytest.raises(ItemError, match="'b.png'.*KeyError") as e: FuncSplitter(lambda o: dict(a=1)[o[0]])(['a.png', 'b.png'])
    assert e.value.item == 'b.png'

# ---- by folder, file, column ----------------------------------------------------------------------------------
def tree(*folders): return [Path(f'r/{s}/c/{i}.png') for i, s in enumerate(folders)]

def test_grandparent_splitter():
    assert lists(GrandparentSplitter(('train', 'valid'), 'test')(tree('train', 'valid', 'train', 'test', 'other'))) == [[0, 2, 1], [3]]
    assert lists(GrandparentSplitter(valid_name=('valid', 'val'))([str(p) for p in tree('train', 'val')])) == [[0], [1]]
def test_grandparent_splitter_faults():
    with pytest.raises(DataError, match=r"'valid' \(valid_name\).*'train' 2, 'val' 1.*Did you mean 'val'"): GrandparentSplitter()(tree('train', 'val', 'train'))
    with pytest.raises(DataError, match=r"'train' \(train_name\).*'Training' 1"): GrandparentSplitter()(tree('Training', 'valid'))
    with pytest.raises(DataError, match='both'): GrandparentSplitter('a', ('b', 'a'))
    with pytest.raises(DataError, match='use ColSplitter'): GrandparentSplitter()(pd.DataFrame(dict(f=['a/b/c'])))

def test_file_splitter(tmp_path):
    f, items = tmp_path/'v.txt', [Path('x/cat/1.png'), Path('x/dog/1.png'), Path('x/dog/2.png')]
    f.write_text('2.png \r\n\r\n'); assert lists(FileSplitter(f)(items)) == [[0, 1], [2]]
    f.write_text('1.png\n'); assert lists(FileSplitter(str(f))([str(i) for i in items])) == [[2], [0, 1]]
    f.write_text('dog/1.png'); assert lists(FileSplitter(f)(items)) == [[0, 2], [1]]
    f.write_text('og/1.png\nb.png'); pytest.raises(DataError, FileSplitter(f), items).match("none of the 2 names.*'b.png', 'og/1.png'.*items: '1.png'")
    with pytest.raises(FileNotFoundError, match='nothing.txt'): FileSplitter(tmp_path/'nothing.txt')(items)

def test_col_splitter():
    df = pd.DataFrame(dict(is_valid=[0, 1, 0], s=['x', 'y', 'x'], t=['True', 'False', 'True'], u=[True, None, False]), index=[7, 8, 9])
    assert lists(ColSplitter()(df)) == [[0, 2], [1]] == lists(ColSplitter(0)(df)) == lists(ColSplitter('s', on='y')(df)) == lists(ColSplitter('s', on=['y', 'z'])(df))
    assert lists(ColSplitter('is_valid', on=0)(df)) == [[1], [0, 2]]
    with pytest.raises(DataError, match="column 't'.*3 of 3 are not: 'True', 'False'.*on="): ColSplitter('t')(df)
    with pytest.raises(DataError, match="column 'u'.*1 of 3 are not: 'None'"): ColSplitter('u')(df)
    with pytest.raises(DataError, match="nowhere on='valid'.*'x' 2, 'y' 1"): ColSplitter('s', on='valid')(df)
    with pytest.raises(DataError, match='DataFrame.*list'): ColSplitter()([1, 2])

# ---- check_split ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('split,text', [
    (([0, 1, 2], [2, 3]), r'leaks: train \(3 items\) and valid \(2 items\) share 1, at the positions: 2'), (([0, 1, 1], [2]), 'train part holds 1 positions more than once: 1'),
    (([0], [4]), 'valid part has 1 of 1 positions outside of 0 to 3, for 4 items: 4'), (([-1], [0]), 'train part.*-1'), (([], [0, 1]), 'nothing to train on.*valid 2 of the 4'),
    (([0], [1], [2], [3]), r'\(train, valid, test\).*returned 4'), (([0, 1], [2], [1]), r'leaks: train \(2 items\) and test \(1 items\) share 1, at the positions: 1'), (([0], [2], [1, 2]), 'valid.*and test.*share 1'), ((range(0), [1], [2]), 'train has 0 and valid 1, test 1'), ([0], 'returned 1'), (None, 'returned 1'), (([0, 1], 2), 'valid part must be a list.*2'), ((['a.png'], [1]), "train part.*'a.png'"),
    (([0], [True, False]), 'MaskSplitter'), ((torch.tensor([True, False]), [1]), 'MaskSplitter'), ((np.array([0., 1.]), [2]), r'0\.0 \(float\)')], ids=str)
def test_check_split_faults(split, text):
    with pytest.raises(DataError, match=text): check_split(split, 4)
def test_check_split_takes_what_is_sound():
    for split in (([0, 2], []), (np.array([0, 2]), np.array([])), (torch.tensor([0, 2]), ()), (L(0, 2), L()), iter([(0, 2), range(0)])):
        got = check_split(split, 4); assert lists(got) == [[0, 2], []] and all(type(i) is int for i in got[0])
def test_check_split_of_three():
    got = check_split(([3, 0], np.array([1]), []), 4); assert lists(got) == [[3, 0], [1], []] and all(isinstance(p, L) for p in got)

# ---- a test part ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('make', [RandomSplitter, StratifiedSplitter, lambda *a, **k: GroupSplitter(lambda i: i, *a, **k)])
def test_valid_and_test_leave_something(make):
    for v, t in ((.5, .5), (.9, .2), (0, 1), (.2, -.1), (.2, None), (.2, True)):
        with pytest.raises(DataError, match=r'(together|test_pct is a fraction).*got'): make(v, test_pct=t)
    assert len(make(.2, None)(range(20), *[['a', 'b']*10]*(make is StratifiedSplitter))) == 2

def test_random_with_a_test_part_keeps_train_and_valid():
    for n in (10, 37):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(5)).tolist(); a, b = int(.2*n), int(.3*n)
        assert lists(RandomSplitter(.2, 5)(range(n))) == [order[a:], order[:a]]
        assert lists(RandomSplitter(.2, 5, .3)(range(n))) == [order[a+b:], order[:a], order[a:a+b]]

def test_stratified_with_a_test_part():
    y = ['rare']*10 + ['often']*90
    for seed in range(5):
        train, valid, test = parts = check_split(StratifiedSplitter(.2, seed, .1)(range(100), y), 100)
        assert valid == StratifiedSplitter(.2, seed)(range(100), y)[1] and [sum(y[i] == 'rare' for i in p) for p in parts] == [7, 2, 1] and [len(p) for p in parts] == [70, 20, 10]
    assert lists(StratifiedSplitter(0, 1, .5)(range(4), 'abab'))[1] == []
    for seed in range(30):                                                 # a class of two: its last item is trained on, never tested on
        parts = StratifiedSplitter(.3, seed, .3)(range(42), ['two']*2 + ['often']*40); assert {0, 1} & set(parts[0]) and sum(map(len, parts)) == 42
    with pytest.raises(DataError, match=r'test_pct=0.1 of 10 items is 2 valid, 1 test and 7 train.*at least 0.2 for each, and at most 0.8'): StratifiedSplitter(.2, test_pct=.1)(range(10), 'ab'*5)

def test_index_grandparent_and_column_with_a_test_part():
    assert lists(IndexSplitter([1], [3, 0])(range(5))) == [[2, 4], [1], [3, 0]] and lists(IndexSplitter(1, [])(range(3))) == [[0, 2], [1], []]
    with pytest.raises(DataError, match='both in valid_idx and in test_idx: 1'): IndexSplitter([1, 2], [1])(range(5))
    with pytest.raises(DataError, match="test_idx has 1 of 1"): IndexSplitter([1], [9])(range(5))
    items = tree('train', 'valid', 'test', 'other')
    assert lists(GrandparentSplitter(test_name='test')(items)) == [[0], [1], [2]] and lists(GrandparentSplitter(test_name=('other', 'test'))(items)) == [[0], [1], [3, 2]]
    with pytest.raises(DataError, match=r"'tests' \(test_name\).*Did you mean 'test'"): GrandparentSplitter(test_name='tests')(items)
    with pytest.raises(DataError, match="'valid' is both in valid_name and in test_name"): GrandparentSplitter(test_name='valid')
    df = pd.DataFrame(dict(s=['train', 'test', 'valid', 'train']), index=[4, 3, 2, 1])
    assert lists(ColSplitter('s', 'valid', 'test')(df)) == [[0, 3], [2], [1]] and lists(ColSplitter('s', 'valid', ['test', 'x'])(df)) == [[0, 3], [2], [1]]
    for kw, text in ((dict(test_on='test'), 'say with on='), (dict(on='valid', test_on='tst'), "nowhere test_on='tst'"), (dict(on='valid', test_on=['valid', 'test']), 'both in on and in test_on')):
        with pytest.raises(DataError, match=text): ColSplitter('s', **kw)(df)

# ---- groups ---------------------------------------------------------------------------------------------------
def best(sizes, aim, leave):
    "How near a choice of groups can come to `aim`, all choices tried"
    sums = [sum(c) for k in range(1, len(sizes)-leave+1) for c in itertools.combinations(sizes, k)]
    return min(abs(s-aim) for s in sums)

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=3, max_size=9), st.sampled_from([.05, .2, .5, .8]), st.sampled_from([0., .1]), st.integers(0, 5))
def test_groups_stay_whole_and_valid_is_as_near_as_can_be(sizes, valid_pct, test_pct, seed):
    ids = [g for g, k in enumerate(sizes) for _ in range(k)]; np.random.default_rng(seed).shuffle(ids); n = len(ids)
    parts = check_split(GroupSplitter(ids, valid_pct, seed, test_pct)(range(n)), n)
    assert len(parts) == 2 + bool(test_pct) and sorted(sum(map(list, parts), [])) == list(range(n)) and all(map(len, parts)) and all(list(p) == sorted(p) for p in parts)
    assert sum(len({ids[i] for i in p}) for p in parts) == len(sizes)
    assert abs(len(parts[1]) - valid_pct*n) <= best(sizes, valid_pct*n, len(parts)-1) + 1e-9

def test_groups_of_a_large_set():
    sizes = np.random.default_rng(0).integers(1, 200, 3000); ids = np.repeat(np.arange(3000), sizes); n = len(ids)
    train, valid, test = GroupSplitter(ids, .2, 1, .1)(range(n))
    assert abs(len(valid) - .2*n) <= 1 and abs(len(test) - .1*n) <= 1 and not set(ids[list(valid)]) & (set(ids[list(train)]) | set(ids[list(test)]))
    a, b = (set(ids[list(GroupSplitter(ids, .2, seed)(range(n))[1])]) for seed in (1, 2)); assert len(a & b) < .5*len(a)

def test_what_groups_may_be():
    files = [Path(f'{g}/{i}.png') for i, g in enumerate('aabbbcddd')]; df = pd.DataFrame(dict(f=files, g=[p.parent.name for p in files]), index=range(20, 29))
    want = GroupSplitter(parent_label, .3, 1)(files); assert len(want[1]) == 3
    for groups in ('g', 1, ColReader('g'), lambda r: r.g, list('aabbbcddd'), df.g, np.array(list('aabbbcddd'))): assert GroupSplitter(groups, .3, 1)(df) == want
    assert pickle.loads(pickle.dumps(GroupSplitter(parent_label, .3, 1)))(files) == want

def test_group_faults():
    n = range(4)
    with pytest.raises(DataError, match=r'4 items are of 1 group\(s\).*2 parts'): GroupSplitter(['a']*4)(n)
    with pytest.raises(DataError, match='of 2 group.*3 parts'): GroupSplitter(list('aabb'), test_pct=.2)(n)
    with pytest.raises(DataError, match='3 groups for 4 items'): GroupSplitter([1, 2, 3])(n)
    with pytest.raises(DataError, match="groups='patient' names a column"): GroupSplitter('patient')(n)
    with pytest.raises(DataError, match="no column 'patiant'.*Did you mean 'patient'"): GroupSplitter('patiant')(pd.DataFrame(dict(patient=[1, 2])))
    with pytest.raises(DataError, match='plain value'): GroupSplitter([[1], [2], [1], [2]])(n)
    for none in (None, float('nan'), pd.NA):
        with pytest.raises(ItemError, match="'c.png'.*position 2 has no group") as e: GroupSplitter(['x', 'y', none, 'y'])(['a.png', 'b.png', 'c.png', 'd.png'])
        assert e.value.item == 'c.png'
    with pytest.raises(ItemError, match="position 1 has no group") as e: GroupSplitter('g')(pd.DataFrame(dict(g=['a', None, 'b'], f=['x', 'y', 'z'])))
    assert e.value.item['f'] == 'y'
    with pytest.raises(ItemError, match="KeyError"): GroupSplitter(lambda o: {}[o])(n)
    assert lists(GroupSplitter(['a']*4, 0)(n)) == [[0, 1, 2, 3], []]

# ---- folds ----------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(6, 40), st.integers(0, 5), st.booleans(), st.booleans())
def test_folds_are_disjoint_and_complete(k, n, seed, stratify, grouped):
    y, ids = [i % 3 for i in range(n)], [i % 7 for i in range(n)] if n > 12 else list(range(n))
    kw = dict(stratify=stratify, groups=ids if grouped else None)
    splits = [check_split(KFoldSplitter(f, k, seed, **kw)(range(n), *[y]*stratify), n) for f in range(k)]
    assert sorted(sum((list(v) for _, v in splits), [])) == list(range(n)) and all(sorted(t + v) == list(range(n)) and v for t, v in splits)
    if grouped: assert sum(len({ids[i] for i in v}) for _, v in splits) == len(set(ids))
    else: assert max(len(v) for _, v in splits) - min(len(v) for _, v in splits) <= 1
    if stratify and not grouped:
        for c in range(3): per = [sum(y[i] == c for i in v) for _, v in splits]; assert max(per) - min(per) <= 1

def test_folds_of_groups_are_balanced():
    sizes = [40, 30, 20, 10, 10, 10, 10, 5, 5, 5, 5]; ids = [g for g, k in enumerate(sizes) for _ in range(k)]
    assert sorted(len(KFoldSplitter(f, 3, seed=1, groups=ids)(range(150))[1]) for f in range(3)) == [50, 50, 50]
    y = ['rare' if g % 4 == 0 else 'often' for g in range(40) for _ in range(5)]; ids = [g for g in range(40) for _ in range(5)]
    for f in range(5): v = KFoldSplitter(f, 5, seed=2, stratify=True, groups=ids)(range(200), y)[1]; assert len(v) == 40 and sum(y[i] == 'rare' for i in v) == 10

def test_fold_seeds_and_labels():
    a, b = KFoldSplitter(0, seed=1)(range(50)), KFoldSplitter(0, seed=2)(range(50)); assert a != b and a == KFoldSplitter(0, seed=1)(range(50))
    assert KFoldSplitter(0, seed=1, groups=list(range(10))*5)(range(50)) != KFoldSplitter(0, seed=2, groups=list(range(10))*5)(range(50))
    assert not KFoldSplitter(0).needs_labels and KFoldSplitter(0, stratify=True).needs_labels
    with pytest.raises(DataError, match='needs the labels'): KFoldSplitter(0, stratify=True)(range(10))

def test_fold_faults():
    for bad in (-1, 5, 1.5, True, None, '0'):
        with pytest.raises(DataError, match='from 0 to 4'): KFoldSplitter(bad)
    for bad in (1, 0, 2.5, True):
        with pytest.raises(DataError, match='n_folds'): KFoldSplitter(0, bad)
    with pytest.raises(DataError, match='4 items cannot be divided into 5'): KFoldSplitter(0)(range(4))
    with pytest.raises(DataError, match='2 groups cannot be divided into 5'): KFoldSplitter(0, groups=[1, 2]*5)(range(10))
    with pytest.raises(DataError, match="single item.*'solo'"): KFoldSplitter(0, 2, stratify=True)(range(5), ['a']*4 + ['solo'])
    y = ['a']*6 + ['b']*2; folds = [KFoldSplitter(f, 2, seed=0, stratify=True, groups=[0, 0, 1, 1, 2, 2, 3, 3]) for f in range(2)]
    with pytest.raises(DataError, match="of one group.*'b'"): [f(range(8), y) for f in folds]
