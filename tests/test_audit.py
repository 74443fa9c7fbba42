"The audit: what it must find, and what it must leave alone."
import io
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from blocks import DataError
from blocks.core import stream
from blocks.data import audit as A
from blocks.data.audit import PROBLEMS, audit_images, find_label_errors, label_errors

elpv_dataset = pytest.importorskip('elpv_dataset')
CELLS = sorted((Path(elpv_dataset.__file__).parent/'data'/'images').glob('*.png'))


def noise(rng, h, w, beta, c=3):
    "Noise with a spectrum of 1/f**beta, which is that of photographs for beta 2; mean 0, sd 1"
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]); f[0, 0] = 1
    z = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((h, w)))/f**(beta/2), (h, w)) for _ in range(c)]
    return np.stack([(o-o.mean())/o.std() for o in z], -1)

@lru_cache(64)
def photo(i, seed=0):
    "A photograph-like picture: texture, sky, or sky over ground; of several sizes, landscape and portrait"
    rng = stream(seed, 'photo', i)
    h, w = [(240, 320), (320, 240), (320, 480), (256, 256), (200, 480)][i % 5]
    if i % 3 == 0: a = 128 + rng.uniform(25, 60)*noise(rng, h, w, rng.uniform(1.5, 3), 1)*.8 + 12*noise(rng, h, w, 2)
    elif i % 3 == 1:
        top, low = rng.uniform(90, 200, 3), rng.uniform(150, 250, 3)
        a = top + (low-top)*np.linspace(0, 1, h)[:, None, None] + rng.uniform(3, 6)*noise(rng, h, w, 3, 1) + rng.uniform(.5, 4)*rng.standard_normal((h, w, 1))
    else:
        sky = np.arange(h)[:, None, None] < h*rng.uniform(.4, .7)
        a = np.where(sky, rng.uniform(150, 220, 3) + 5*noise(rng, h, w, 3, 1), rng.uniform(40, 120, 3) + 25*noise(rng, h, w, 2, 1))
    return Image.fromarray(a.clip(0, 255).astype(np.uint8))

def encoded(im, kind='JPEG', **kw):
    f = io.BytesIO(); im.save(f, kind, **kw); return f.getvalue()

def again(im, quality, scale):
    "The picture saved again"
    return encoded(im.resize((max(1, round(im.width*scale)), max(1, round(im.height*scale))), Image.BICUBIC), quality=quality)

def problems(audit, i): return set(audit.table['problem'][(audit.table['index'] == i).fillna(False).astype(bool)])


# --- the planted set
def plant(root, clean, rng, corrupt, exact, near, leaks, blank):
    "Write `clean` ((name, bytes)) and faults made of them below `root`; returns the files, their splits, what must be found of each, and the originals"
    files, splits, want, originals = [], [], [], {}
    def add(name, data, split, problem=None, source=None):
        (root/name).write_bytes(data); files.append(root/name); splits.append(split); want.append(problem)
        if source is not None: originals[len(files)-1] = source
    for k, (name, data) in enumerate(clean): add(name, data, 'valid' if k % 5 == 0 else 'train')
    picks = iter(rng.permutation(len(clean)).tolist())
    other = {'train': 'valid', 'valid': 'train'}
    for k in range(corrupt):
        name, data = clean[next(picks)]
        if k % 2: name, data = 'j.jpg', encoded(Image.open(io.BytesIO(data)).convert('RGB'), quality=85)
        bad = [data[:len(data)//2], data[:-60], b'', rng.bytes(3000), bytes(64) + data[64:], b'<html></html>'][k % 6]
        add(f'corrupt{k}{Path(name).suffix}', bad, 'train', {'unreadable', 'truncated'})
    for k in range(exact):
        i = next(picks); add(f'exact{k}{files[i].suffix}', clean[i][1], splits[i], {'exact duplicate'}, i)
    for k in range(near + leaks):
        i = next(picks); data = again(Image.open(io.BytesIO(clean[i][1])), int(rng.integers(30, 91)), rng.uniform(.5, 1.5))
        if k < near: add(f'near{k}.jpg', data, splits[i], {'near duplicate'}, i)
        else: add(f'leak{k}.jpg', data, other[splits[i]], {'leak'}, i)
    for k in range(blank): add(f'blank{k}.png', encoded(Image.fromarray((np.full((120, 160), 40*k) + rng.normal(0, k, (120, 160))).clip(0, 255).astype(np.uint8)), 'PNG'), 'train', {'blank'})
    order = rng.permutation(len(files)).tolist(); at = {o: k for k, o in enumerate(order)}
    return [files[o] for o in order], [splits[o] for o in order], [want[o] for o in order], {at[i]: at[s] for i, s in originals.items()}

def check(root, clean, seed, allowed, **counts):
    files, splits, want, originals = plant(root, clean, stream(seed, 'plant'), **counts)
    audit = audit_images(files, splits=splits)
    lost = [(f.name, w, problems(audit, i)) for i, (f, w) in enumerate(zip(files, want)) if w and not w & problems(audit, i)]
    assert not lost
    assert not [(files[i].name, files[s].name) for i, s in originals.items() if audit.groups[i] != audit.groups[s]]
    known = set(originals.values())
    wrong = {files[i].name: problems(audit, i) for i, w in enumerate(want) if w is None and i not in known and problems(audit, i)}
    assert len(wrong) <= allowed, wrong
    together = {}
    for i, g in enumerate(audit.groups.tolist()): together.setdefault(g, set()).add(originals.get(i, i))
    assert max(map(len, together.values())) == 1                          # no group joins different pictures
    return audit

def as_files(pictures): return [(f'p{k:04d}.jpg', encoded(im, quality=92)) for k, im in enumerate(pictures)]

def test_a_planted_set_among_rendered_photographs(tmp_path):
    check(tmp_path, as_files(photo(i) for i in range(60)), 0, 0, corrupt=12, exact=8, near=16, leaks=6, blank=5)

def test_a_planted_set_among_look_alike_cells(tmp_path):
    some = CELLS[1250:1350]                                               # neighbours that correlate above 0.99
    check(tmp_path, [(f.name, f.read_bytes()) for f in some], 1, 0, corrupt=12, exact=8, near=20, leaks=8, blank=3)

@pytest.mark.slow
def test_the_whole_planted_set_among_1000_cells(tmp_path):
    some = [CELLS[i] for i in stream(2).choice(len(CELLS), 1000, replace=False)]
    check(tmp_path, [(f.name, f.read_bytes()) for f in some], 2, 5, corrupt=20, exact=30, near=30, leaks=10, blank=5)

@pytest.mark.slow
def test_the_whole_planted_set_among_500_rendered_photographs(tmp_path):
    check(tmp_path, as_files(photo(i, 3) for i in range(500)), 3, 5, corrupt=20, exact=30, near=30, leaks=10, blank=5)

@pytest.mark.slow
def test_2624_different_cells_are_different():
    audit = audit_images(CELLS)
    assert len(set(audit.groups.tolist())) == len(CELLS) and len(audit.table) <= 5


# --- files
@pytest.fixture(scope='module')
def jpg(): return encoded(photo(0), quality=90)

@pytest.mark.parametrize('kind,kw', [('JPEG', {}), ('JPEG', dict(progressive=True)), ('PNG', {}), ('WEBP', {}), ('BMP', {}), ('GIF', {})])
def test_cut_files_of_every_kind(kind, kw):
    data = encoded(photo(3), kind, **kw)
    assert not A._look(data).problem
    for part in (.3, .7, .97): assert A._look(data[:int(len(data)*part)]).problem in ('truncated', 'unreadable'), part

def test_a_large_jpeg_that_is_decoded_small_is_still_read_to_the_end():
    data = encoded(photo(3).resize((2400, 1800)), quality=85)
    assert A._look(data[:-100]).problem == 'truncated' and A._look(data[:int(len(data)*.6)] + b'\xff\xd9').problem == 'truncated' and not A._look(data).problem

def test_a_grey_wall_is_not_a_cut_jpeg():
    wall = np.full((240, 320, 3), 128, np.uint8); wall[60:180, 80:240] = np.asarray(photo(3).resize((160, 120)))
    assert not A._look(encoded(Image.fromarray(wall), quality=95)).problem

def test_each_kind_of_unreadable_item_is_told(tmp_path):
    (tmp_path/'empty.jpg').write_bytes(b''); (tmp_path/'text.jpg').write_text('no'); (tmp_path/'folder.jpg').mkdir()
    audit = audit_images([tmp_path/'empty.jpg', tmp_path/'text.jpg', tmp_path/'folder.jpg', tmp_path/'missing.jpg', None, np.zeros((4, 4, 9), np.uint8)])
    assert list(audit.table['problem']) == ['unreadable']*6 and 'empty' in audit.table['detail'][0]
    assert len(set(audit.groups.tolist())) == 6 and str(tmp_path/'missing.jpg') in set(audit.table['item']) and 'item 4' in set(audit.table['item'])

def test_every_form_of_raw_value_is_read_and_left_as_it_was(jpg, tmp_path):
    im = Image.open(io.BytesIO(jpg)); im.load(); a = np.asarray(im)
    (tmp_path/'a.jpg').write_bytes(jpg); f = open(tmp_path/'a.jpg', 'rb')
    audit = audit_images([tmp_path/'a.jpg', str(tmp_path/'a.jpg'), jpg, im, a, a/255., f])
    assert set(audit.table['problem']) <= {'exact duplicate', 'near duplicate'} and set(audit.groups.tolist()) == {0}
    assert im.size == (320, 240) and im.getpixel((0, 0)) == tuple(a[0, 0]) and not f.closed
    f.close()

def test_the_threads_read_and_the_answer_does_not_depend_on_them(monkeypatch):
    seen, look = set(), A._look
    monkeypatch.setattr(A, '_look', lambda raw: (seen.add(threading.current_thread().name), look(raw))[1])
    items = [np.asarray(photo(i)) for i in range(6)]*2
    one, many = audit_images(items, num_workers=1), audit_images(items, num_workers=3)
    assert one.table.equals(many.table) and all('blocks-audit' in n for n in seen)


# --- duplicates
def test_the_same_pixels_in_other_files_and_other_pixels_in_the_same_modes():
    im = photo(3)
    turned = Image.Exif(); turned[0x0112] = 3
    items = [encoded(im, 'PNG'), encoded(im, 'BMP'), encoded(im, 'PNG', compress_level=1), encoded(im.rotate(180), 'PNG'), encoded(im, 'PNG', exif=turned)]
    groups = audit_images(items).groups
    assert groups[0] == groups[1] == groups[2] and groups[3] == groups[4] != groups[0]

def test_different_colours_are_different_pictures():
    a = np.asarray(photo(0)).copy()
    grey = a @ np.array([.299, .587, .114])
    tint = lambda r, b: np.stack([grey + r, grey - (.299*r + .114*b)/.587, grey + b], -1).clip(0, 255).astype(np.uint8)
    assert len(set(audit_images([tint(20, -20), tint(-20, 20)]).groups.tolist())) == 2

def test_a_poor_copy_goes_with_its_original_and_not_with_a_look_alike():
    a, b = CELLS[1296], CELLS[1297]
    for source, want in ((a, 0), (b, 1)):
        for q, s in ((30, .5), (40, .7), (60, 1.), (90, 1.4)):
            groups = audit_images([a, b, again(Image.open(source), q, s)]).groups
            assert groups[0] != groups[1] and groups[2] == groups[want], (source.name, q, s)

def test_two_shots_with_their_own_noise_are_two_pictures():
    rng, scene = stream(4), np.asarray(photo(3).filter(ImageFilter.GaussianBlur(3))).mean(-1)*.7
    shot = lambda: (scene + rng.normal(0, 9, scene.shape)).clip(0, 255).astype(np.uint8)
    assert A._copies(*[A._look(Image.fromarray(o)).grey[None] for o in (shot(), shot())])[0].tolist() == [False]

def test_stretched_copies_are_not_taken_for_copies():
    assert len(set(audit_images([photo(3), photo(3).resize((512, 200))]).groups.tolist())) == 2

def test_groups_are_as_many_as_items_and_mend_a_leak(jpg):
    from blocks import GroupSplitter
    items = [np.asarray(photo(i)) for i in range(8)]; items += items[:4]
    audit = audit_images(items, splits=['train']*8 + ['valid']*4)
    assert audit.groups.dtype == np.int64 and audit.groups.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert set(audit.table['index'][audit.table['problem'] == 'leak']) == {0, 1, 2, 3, 8, 9, 10, 11}
    train, valid = GroupSplitter(groups=audit.groups, valid_pct=.25, seed=0)(items)
    assert not set(audit.groups[list(train)].tolist()) & set(audit.groups[list(valid)].tolist())

def test_leaks_and_conflicts_are_told_only_where_there_are_some():
    items = [np.asarray(photo(i)) for i in (0, 0, 1, 1, 2, 2)]
    audit = audit_images(items, labels=['a', 'b', 'a', 'a', ['x', 'y'], ['y', 'x']], splits=['train', 'train', 'train', 'test', 'valid', None], min_items=0)
    t = audit.table
    assert set(t['index'][t['problem'] == 'conflicting labels']) == {0, 1} and set(t['index'][t['problem'] == 'leak']) == {2, 3}
    assert set(t['group'][t['problem'] == 'leak']) == {audit.groups[2]} and 'test and train' in t['detail'][t['problem'] == 'leak'].iloc[0]

def test_blank_pictures_are_no_near_duplicates_of_each_other():
    audit = audit_images([np.full((90, 120, 3), 100+k, np.uint8) for k in range(4)])
    assert list(audit.table['problem']) == ['blank']*4 and len(set(audit.groups.tolist())) == 4

def test_10000_pictures_are_compared_in_pieces_that_give_the_same_answer():
    looks = [A._look(np.asarray(photo(i))) for i in range(20)]*3
    looks = [o._replace(digest=bytes([k])) for k, o in enumerate(looks)]
    grey, colour, aspect = np.stack([o.grey for o in looks]), np.stack([o.colour for o in looks]), np.zeros(60)
    for rows in (7, 60, 1024):
        g = A._group_near(grey, colour, aspect, rows)
        assert np.array_equal(g[:20], g[20:40]) and np.array_equal(g[:20], g[40:]) and len(set(g.tolist())) == 20


# --- one picture alone, and beside the others
def test_dark_bright_and_blurred():
    im = photo(3).resize((512, 512))
    look = lambda o: (A._look(o).poor or (None,))[0]
    assert look(im) is None and look(im.point(lambda v: v//14)) == 'dark' and look(im.point(lambda v: 246 + (v > 128)*9)) == 'bright'
    cell = Image.open(CELLS[0])
    assert look(cell) is None and look(cell.filter(ImageFilter.GaussianBlur(12))) == 'blurry'

def test_a_flat_grey_of_many_colours_is_not_blank():
    y = np.linspace(0, 100, 120)[:, None]*np.ones((1, 160))
    a = np.stack([100 + y, 100 - .299*y/.587, 100 + 0*y], -1).astype(np.uint8)
    assert A._look(a).poor is None

def test_odd_sizes_and_shapes():
    rng = stream(0)
    some = [photo(i).resize((w, h)) for i, (w, h) in enumerate([(160, 120), (120, 160), (180, 120), (200, 112), (300, 100)]*4)]
    assert audit_images(some).table.empty
    found = audit_images([*some, photo(41).resize((20, 15)), photo(42).resize((900, 60))]).table
    assert dict(zip(found['index'], found['problem'])) == {20: 'odd size', 21: 'odd aspect'}
    assert not len(A._outliers(np.log(rng.choice([64, 1024], 500, p=[.1, .9])), 4))                     # a second kind, not outliers
    assert not len(A._outliers(np.zeros(500), 4)) and A._outliers(np.log([10.]*99 + [99]), 4).tolist() == [99]


# --- classes
def rows(labels, splits=None, **kw): return {(r.problem, r.split, r.label) for r in audit_images([b'']*len(labels), labels, splits, **kw).table.itertuples() if r.problem != 'unreadable'}

def test_classes():
    assert rows(['a']*30 + ['b']*4) == {('tiny class', None, 'b')}
    assert rows(['a']*60 + ['b']*5) == {('imbalance', None, 'b')} and not rows(['a']*50 + ['b']*5) and not rows(['a']*60 + ['b']*5, max_ratio=12) and not rows(['a']*3, min_items=3)
    assert rows(['a', 'b', 'a', 'c'], ['train', 'train', 'valid', 'valid'], min_items=1) == {('missing in split', 'train', 'c'), ('missing in split', 'valid', 'b')}
    assert rows([['a', 'b'], ['a'], None, float('nan'), np.array(['a'])], min_items=2) == {('tiny class', None, 'b')} and not rows([None, None])
    assert rows([1]*9 + [0]*2) == {('tiny class', None, '0')}

def test_what_cannot_be_audited():
    for args in ([],), ([b''], ['a', 'b']), ([b''], None, ['train', 'valid']):
        with pytest.raises(DataError): audit_images(*args)


# --- the result
@pytest.fixture(scope='module')
def found(): return audit_images([np.asarray(photo(0)), np.asarray(photo(0)), b'', np.zeros((50, 60), np.uint8), np.asarray(photo(1))], list('aabbb'), ['train', 'valid', 'train', 'train', 'valid'])

def test_the_table_the_summary_and_the_file(found, tmp_path):
    import pandas as pd
    assert list(found.table.columns) == ['problem', 'item', 'split', 'label', 'detail', 'group', 'index'] and set(found.table['problem']) <= set(PROBLEMS)
    text = str(found)
    assert all(p in text for p in set(found.table['problem'])) and repr(found) == text and 'leak' in found._repr_html_() and '<table' in found._repr_html_()
    assert dict(zip(found.summary['problem'], found.summary['found'])) == found.table['problem'].value_counts().to_dict()
    found.to_csv(tmp_path/'a.csv')
    assert len(pd.read_csv(tmp_path/'a.csv')) == len(found.table)
    clean = audit_images([photo(1)])
    assert clean.table.empty and 'nothing found' in str(clean) and 'nothing found' in clean._repr_html_() and clean.summary.empty

def test_pictures(found, tmp_path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    shown = found._rows_to_show(None, 24, 6)
    assert [[o['index'] for o in row] for row in shown] == [[2, 0, 1, 3]]                               # each once, under its worst problem
    assert [[o['index'] for o in row] for row in found._rows_to_show(None, 24, 2)] == [[2], [0, 1], [3]]                              # a group is not torn
    assert sum(map(len, found._rows_to_show(None, 2, 6))) == 2
    found.show('leak'); assert len(plt.gcf().axes[0].images) == 1; plt.close('all')
    assert found.save(tmp_path/'a.png') and Image.open(tmp_path/'a.png').width > 500 and not plt.get_fignums()
    assert not audit_images([photo(1)]).save(tmp_path/'b.png') and not (tmp_path/'b.png').exists()
    with pytest.raises(DataError, match='leak'): found.show('leeks')


# --- labels
def planted_labels(n=900, k=4, wrong=.05, sharp=4., seed=0):
    rng = stream(seed); y = rng.integers(0, k, n); bad = rng.choice(n, int(n*wrong), replace=False)
    z = rng.normal(0, 1, (n, k)); z[np.arange(n), y] += sharp
    given = y.copy(); given[bad] = (y[bad] + rng.integers(1, k, len(bad))) % k
    return y, given, bad, np.exp(z)/np.exp(z).sum(1, keepdims=True)

def test_wrong_labels_of_digits_are_found():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    X, y = load_digits(return_X_y=True)
    rng = stream(3); bad = rng.choice(len(y), len(y)//20, replace=False)
    given = y.copy(); given[bad] = (y[bad] + rng.integers(1, 10, len(bad))) % 10
    found = find_label_errors(given, cross_val_predict(LogisticRegression(C=.5, max_iter=100), X/16, given, cv=3, method='predict_proba'))
    hit = np.isin(found.indices, bad)
    assert hit.sum() >= .75*len(bad) and hit.mean() >= .6 and (found.suggested[hit] == y[found.indices[hit]]).mean() > .9
    assert hit[:40].all() and (np.diff(found.confidence) <= 0).all()

def test_right_labels_and_sure_models_name_nothing():
    y, _, _, probs = planted_labels(sharp=12)
    assert len(find_label_errors(y, probs).indices) == 0

def test_a_class_that_a_model_is_never_sure_of_is_not_called_wrong():
    rng = stream(1); y = np.repeat([0, 1], 500); p1 = np.where(y == 1, rng.uniform(.4, .5, 1000), rng.uniform(0, .1, 1000))    # argmax says 0 for all
    assert len(find_label_errors(y, np.stack([1-p1, p1], 1)).indices) == 0

def test_planted_labels_in_a_frame():
    y, given, bad, probs = planted_labels()
    names = ['cat', 'dog', 'cow', 'hen']
    found, frame = find_label_errors(given, probs), label_errors([f'{i}.jpg' for i in range(len(y))], [names[i] for i in given], probs, names)
    assert np.isin(bad, found.indices).mean() > .8 and list(frame['index']) == found.indices.tolist() and all(frame['label'] != frame['suggested'])
    assert frame['item'][0] == f'{found.indices[0]}.jpg' and frame.equals(label_errors([f'{i}.jpg' for i in range(len(y))], given, probs, names))

@pytest.mark.parametrize('labels,probs', [([0, 1], np.ones((3, 2))/2), ([0, 2], np.ones((2, 2))/2), ([0, -1], np.ones((2, 2))/2), ([0., 1.], np.ones((2, 2))/2), ([0, 1], np.ones((2, 2))), ([0, 1], [[1.5, -.5]]*2), ([0, 1], [[np.nan, 1]]*2), ([], np.ones((0, 2)))])
def test_wrong_arguments_are_errors(labels, probs):
    with pytest.raises(DataError): find_label_errors(labels, probs)

def test_a_label_outside_of_the_vocab_is_an_error():
    with pytest.raises(DataError, match='cow'): label_errors(['a'], ['cow'], [[.5, .5]], ['cat', 'dog'])
