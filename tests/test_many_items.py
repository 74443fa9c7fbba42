"""Many items: what is kept for each of them, and that packed sequences stand in for lists everywhere."""
import gc, operator, os, pickle, random, subprocess, sys, tracemalloc
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType

import numpy as np
import pandas as pd
import pytest
from fastcore.foundation import L
from hypothesis import given, settings, strategies as st
from PIL import Image

from blocks.core import DataError, ItemError
from blocks.data import datablock
from blocks.data.block import ImageBlock
from blocks.data.datablock import DataBlock
from blocks.data.factory import ImageDataLoaders
from blocks.data.frame import Resize
from blocks.data.label import CategoryBlock, MultiCategoryBlock, RegressionBlock
from blocks.data.source import ColReader, PackedL, RandomSplitter, RegexLabeller, counted, get_image_files, pack, parent_label, pick

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A function that gives a folder with `n` links to one small picture, in ten class folders"
    root = tmp_path_factory.mktemp('a_folder_with_some_name')
    Image.new('RGB', (12, 8), 'red').save(root/'.one.png')
    def make(n):
        if not (root/str(n)).exists():
            for c in range(10): (root/str(n)/f'class_{c}').mkdir(parents=True)
            for i in range(n): os.link(root/'.one.png', root/str(n)/f'class_{i%10}'/f'photograph_{i:05}.png')
        return root/str(n)
    return make

def template(get_y=parent_label, **kw): return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(seed=1), item_tfms=Resize(8), **kw)
def build(folder, **kw): return template(**kw).dataloaders(folder, bs=8, device='cpu', num_workers=2, seed=0)
def reached(o):
    "How many objects can be reached from `o`, code left out"
    seen, todo = set(), [o]
    while todo:
        if id(o := todo.pop()) in seen or isinstance(o, (type, ModuleType, FunctionType, BuiltinFunctionType)): continue
        seen.add(id(o)); todo += gc.get_referents(o)
    return len(seen)

# ---- what is kept ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize('get_y', [parent_label, RegexLabeller(r'/(class_\d)/'), lambda o: o.parent.name], ids=['parent', 'regex', 'function'])
def test_the_number_of_objects_does_not_grow_with_the_items(tree, get_y):
    few, many = (build(tree(n), get_y=get_y) for n in (200, 1000))
    assert len(many.train_ds) + len(many.valid_ds) == 1000 and abs(reached(many) - reached(few)) < 20

def test_bytes_of_an_item(tree):
    held = {}
    for n in (200, 1200, 200, 1200):                                     # the first round fills what is kept once
        folder = tree(n); gc.collect(); tracemalloc.start()
        dls = build(folder); gc.collect()
        held[n] = tracemalloc.get_traced_memory()[0]; tracemalloc.stop()
        assert dls.c == 10
    assert (held[1200] - held[200])/1000 < 100

def test_a_worker_gets_some_tens_of_bytes_an_item(tree):
    few, many = (build(tree(n)) for n in (200, 1200))
    assert (len(pickle.dumps(many.train)) - len(pickle.dumps(few.train)))/800 < 60 and b'pathlib' not in pickle.dumps(many.splits)
    again = pickle.loads(pickle.dumps(many.train))
    assert again.samples.fields[0] == many.train_ds.fields[0] and again.samples.fields[1] == many.train_ds.fields[1]

def test_reading_makes_no_lasting_object(tree):
    dls = build(tree(200)); before = reached(dls.train_ds)
    for i in range(len(dls.train_ds)): dls.train_ds[i]
    assert reached(dls.train_ds) == before

def test_fields_are_right_and_look_like_lists(tree):
    files, dls = get_image_files(tree(200)), build(tree(200))
    for ds, idx in zip((dls.train_ds, dls.valid_ds), dls.splits):
        assert ds.fields[0] == [files[i] for i in idx] and ds.fields[1] == [files[i].parent.name for i in idx] and all(type(o) is str for o in ds.fields[1])
        assert ds.fields[0][-1] == files[idx[-1]] and ds.fields[0][:3] == files[list(idx[:3])] and list(np.array(ds.fields[1])) == list(ds.fields[1])
    assert type(dls.splits[0][0]) is int and isinstance(dls.splits[0], L) and sorted(dls.splits[0] + dls.splits[1]) == list(range(200)) and dls.items == files

def test_changing_the_list_later_does_not_change_the_loaders(tree):
    files = get_image_files(tree(200))
    for source in (files, list(files), L(list(files))):
        dls = DataBlock(get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=Resize(8)).dataloaders(source, bs=8, device='cpu')
        want = list(dls.train_ds.fields[0]); source.clear()
        assert dls.train_ds.fields[0] == want

# ---- tables and lists -----------------------------------------------------------------------------------------
TARGETS = dict(one=(CategoryBlock, ColReader('label')), several=(MultiCategoryBlock, ColReader('tags', label_delim=' ')), number=(RegressionBlock, ColReader('x')))
@pytest.mark.parametrize('kind', TARGETS)
def test_columns_are_not_copied_as_objects(kind, monkeypatch):
    monkeypatch.setattr(datablock, '_find_bad', lambda *a: {})
    def fields(n):
        df = pd.DataFrame(dict(file=[f'photograph_{i}' for i in range(n)], label=[f'class {i%7}' for i in range(n)], tags=[f'a{i%3} b{i%2}' for i in range(n)], x=np.arange(n)/n))
        block, get_y = TARGETS[kind]
        ds = DataBlock((ImageBlock, block), get_x=ColReader('file', pref='data/', suff='.png'), get_y=get_y, splitter=RandomSplitter(seed=1)).datasets(df)
        assert ds.items is df and ds.train.fields[1] == [get_y(df.iloc[i]) for i in ds.splits[0]] and ds.train.fields[0][0] == f'data/photograph_{ds.splits[0][0]}.png'
        return ds.train.fields
    assert abs(reached(fields(600)) - reached(fields(100))) < 10

def test_lists_of_files_and_labels(tree):
    files = list(get_image_files(tree(200)))
    labels = [f.parent.name for f in files]
    dls = ImageDataLoaders.from_lists(tree(200), files, labels, item_tfms=Resize(8), bs=8, device='cpu', seed=1)
    more = ImageDataLoaders.from_lists(tree(1000), (m := list(get_image_files(tree(1000)))), [f.parent.name for f in m], item_tfms=Resize(8), bs=8, device='cpu', seed=1)
    assert dls.items == list(zip(files, labels)) and type(dls.items[0]) is tuple and abs(reached(more.items) - reached(dls.items)) < 20

def test_rows_are_taken_out_when_asked_for():
    df = pd.DataFrame(dict(x=[1., 2., 3.], y=[0, 1, 0]))
    rows = datablock.evaluate('get_x', None, df)
    assert len(rows) == 3 and rows[-1].x == 3 and [r.y for r in rows] == [0, 1, 0] and reached(rows) < reached(list(rows))

# ---- checks ---------------------------------------------------------------------------------------------------
def test_headers_are_looked_at_evenly(tree, monkeypatch):
    seen = []
    monkeypatch.setattr(datablock, 'QUICK_LOOKS', 50); monkeypatch.setattr(ImageBlock, 'verify', lambda self, raw, whole=False: seen.append(raw))
    files = get_image_files(tree(200)); build(tree(200))
    assert sorted(seen) == [files[i] for i in np.linspace(0, 199, 50).astype(int)]

def test_an_item_without_a_label_is_named():
    with pytest.raises(ItemError, match='get_y failed for item two.png') as e: datablock.evaluate('get_y', parent_label, L(Path('a/one.png'), Path('two.png')))
    assert e.value.item == Path('two.png')

def test_unseen_labels_are_counted(tree):
    def odd(items): at = [i for i, o in enumerate(items) if o.parent.name == 'class_3']; return [i for i in range(len(items)) if i not in set(at)], at
    with pytest.raises(DataError, match=r"1 class\(es\) of the validation split.*'class_3' \(20\)"): DataBlock(get_items=get_image_files, get_y=parent_label, splitter=odd).datasets(tree(200))

def test_the_vocabulary_is_that_of_all_labels():
    labels = ['b', 'a', 'b', 'c', 'a', 'b']
    for kw in (dict(), dict(sort=False), dict(weights='balanced'), dict(weights={'c': 2.})):
        assert datablock.fit_block(CategoryBlock(**kw), dict(train=pack(labels)), 'get_y') == CategoryBlock(**kw).fit(labels)
    assert list(counted(pack(labels))) == [('b', 3, 0), ('a', 2, 1), ('c', 1, 3)] and list(counted(['x', 'x'])) == [('x', 1, 0), ('x', 1, 1)]

def test_common_formats_are_asked_first():
    code = "import blocks.data.source; from PIL import Image; print(max(map(Image.ID.index, ('JPEG', 'PNG'))) < Image.ID.index('IM'))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'True'

# ---- packed sequences -----------------------------------------------------------------------------------------
TEXT = st.text(st.characters(codec=None), max_size=5) | st.sampled_from(['a/b', 'a/', '/', 'ü/ö', '\udc80/x', '\ud83d\ude00'])
@settings(max_examples=150, deadline=None)
@given(st.one_of(*(st.lists(o, max_size=12) for o in (TEXT, st.integers(-2**70, 2**70), st.integers(-3, 3), st.booleans(), st.floats(), st.none() | TEXT, st.sampled_from([1, True, 1., '1']),
                                                     st.lists(TEXT, max_size=2), st.lists(st.integers(0, 1), max_size=2), TEXT.map(lambda t: Path('x' + t.replace('\0', ''))), TEXT.map(np.str_), st.tuples(TEXT)))), st.data())
def test_a_packed_list_is_that_list(values, data):
    same = lambda a, b: repr(list(a)) == repr(list(b)) and list(map(type, a)) == list(map(type, b))
    packed = pack(iter(values))
    assert same(packed, values) and len(packed) == len(values) and same(pickle.loads(pickle.dumps(packed)), values) and same([packed[i] for i in range(len(values))], values)
    assert pack(packed) is packed or type(packed) is list
    if values:
        at = data.draw(st.lists(st.integers(0, len(values)-1), max_size=6))
        assert same(pick(packed, np.array(at, int)), [values[i] for i in at]) and same(packed[::-2], values[::-2]) and same(PackedL.of(values)[at], [values[i] for i in at])
        assert same(PackedL.of(values)[np.arange(len(values)) % 2 == 0], values[::2])

def test_selections_and_positions():
    o = pack([Path(f'a/{i}.png') for i in range(9)])
    assert o[[True, False]*4 + [True]] == o[::2] == o[np.arange(0, 9, 2)] and o[-1] == Path('a/8.png') == o[np.int64(8)] and o[[]] == [] == o[9:] and o[[-1]] == [Path('a/8.png')]
    assert o == list(o) and list(o) == o and o != list(o)[:-1] and o != 'a' and o[:2] + [1] == [*o[:2], 1] and o.index(Path('a/3.png')) == 3
    for i in (9, -10):
        with pytest.raises(IndexError): o[i]
        with pytest.raises(IndexError): o[[i]]
    assert len(pickle.dumps(pack([f'{i}.png' for i in range(10_000)])[:3])) < 1000          # a part does not keep the whole

PATHS = [Path(f'r/{c}/{i}.png') for c in ('b', 'a') for i in (10, 9, 1)]
READING = dict(slice=lambda o: o[1:4], indices=lambda o: o[[3, 0, -1]], mask=lambda o: o[[True, False]*3], array=lambda o: o[np.array([2, 1])], tuple=lambda o: o[(0, 2)], L=lambda o: o[L(1, 2)],
    length=len, last=lambda o: o[-1], contains=lambda o: (PATHS[2] in o, Path('z') in o), iter=list, reversed=lambda o: list(reversed(o)), map=lambda o: o.map(str), filter=lambda o: o.filter(lambda p: p.parent.name == 'a'),
    sorted=lambda o: o.sorted(), by=lambda o: o.sorted(key='name', reverse=True), attrgot=lambda o: o.attrgot('stem'), unique=lambda o: o.attrgot('parent').unique(), plus=lambda o: o + o, more=lambda o: o + [Path('z')],
    mixed=lambda o: o + [1, None], radd=lambda o: [Path('z')] + o, one=lambda o: o + Path('z'), times=lambda o: o*2, text=repr, string=str, index=lambda o: o.index(PATHS[3]), count=lambda o: o.count(PATHS[3]), copy=lambda o: o.copy(),
    wrapped=lambda o: L(o), sequence=lambda o: L(o, use_list=True), enumerate=lambda o: o.enumerate(), zipwith=lambda o: o.zipwith(range(6)), argwhere=lambda o: o.argwhere(lambda p: p.stem == '9'), val2idx=lambda o: o.val2idx(),
    first=lambda o: o.first(lambda p: p.stem == '1'), groupby=lambda o: o.groupby(lambda p: p.parent.name), series=lambda o: list(pd.Series(o)), array2=lambda o: list(np.array(o)), shuffled=lambda o: random.Random(1).sample(o, 6),
    shuffle=lambda o: (random.seed(1), o.shuffle())[1], pickle=lambda o: pickle.loads(pickle.dumps(o)), equal=lambda o: (o == PATHS, o == PATHS[1:], o != PATHS, o == None, o == L(PATHS)), table=lambda o: hasattr(o, 'iloc') or hasattr(o, 'iterrows'))     # noqa: E711
@pytest.mark.parametrize('name', READING)
def test_reading_an_l_of_packed_paths(name):
    packed, plain = PackedL.of(PATHS), L(PATHS)
    a, b = READING[name](packed), READING[name](plain)
    assert a == b and isinstance(a, L) == isinstance(b, L) and repr(a) == repr(b) and packed._packed is not None         # still packed

CHANGES = dict(append=lambda o: o.append(Path('z')), remove=lambda o: o.remove(PATHS[1]), sort=lambda o: o.sort(), reverse=lambda o: o.reverse(), pop=lambda o: o.pop(2), insert=lambda o: o.insert(0, 1), clear=lambda o: o.clear(),
    extend=lambda o: o.extend(PATHS), item=lambda o: operator.setitem(o, 0, 5), items=lambda o: operator.setitem(o, [0, 2], 7), delete=lambda o: operator.delitem(o, 1), shuffle=lambda o: random.Random(3).shuffle(o), direct=lambda o: o.items.append(1))
@pytest.mark.parametrize('name', CHANGES)
def test_changing_an_l_of_packed_paths(name):
    packed, plain = PackedL.of(PATHS), L(list(PATHS))
    assert CHANGES[name](packed) == CHANGES[name](plain) and packed == plain and packed[:2] == plain[:2] and len(packed) == len(plain) and packed + [1] == plain + [1] and PATHS[0] == Path('r/b/10.png')

def test_notebooks_show_the_first_ones(tree):
    class Printer: text = lambda self, t: setattr(self, 'got', t)
    p, q, files = Printer(), Printer(), get_image_files(tree(1000))
    files._repr_pretty_(p, False); L(list(files))._repr_pretty_(q, False)
    assert p.got == q.got and p.got.startswith('(#1000) [')

# ---- listing --------------------------------------------------------------------------------------------------
def test_files_between_folders_and_odd_names(tmp_path, monkeypatch):
    for name in ('a/b/1.png', 'a/a.png', 'a/c.png', 'a/b.png', 'a.png', 'ü/ö.png', 'b b/\n.png', 'z/.png.png', 'z/x.tar.png'): (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).touch()
    if sys.platform == 'linux': Path(os.fsdecode(bytes(tmp_path) + b'/\xff.png')).touch()                                  # not Unicode
    want = sorted(p for p in tmp_path.rglob('*.png') if not p.name.startswith('.'))
    assert get_image_files(tmp_path) == want and all(f.exists() for f in get_image_files(tmp_path))
    monkeypatch.chdir(tmp_path)
    for root in ('.', './', Path('.')): assert list(map(str, get_image_files(root))) == [str(p.relative_to(tmp_path)) for p in want]
    assert get_image_files('.', folders=['a', 'a/b', '.']) == [p.relative_to(tmp_path) for p in want if p.parent == tmp_path or 'a' in p.relative_to(tmp_path).parts[:1]]
    assert get_image_files('.', folders=['z', 'a'], recurse=False) == sorted([*Path('a').glob('*.png'), Path('z/x.tar.png')])
