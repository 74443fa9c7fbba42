import io
import os
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from blocks import CategoryBlock, DataBlock, DataError, Frame, ImageBlock, RandomResizedCrop, RandomSplitter, Resize
from blocks.core import stream
from blocks.data import cache
from blocks.data.cache import kept_size, picture_caches, read_kept, snapped
from blocks.data.frame import CropPad, FrameDraw, RandomCrop
from blocks.data.loader import Loader, Samples
from blocks.data.place import MaskBlock


def photo(w, h, seed=0):
    a = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(a).resize((w, h), Image.BICUBIC)

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    for i in range(20): photo(300 + 10*i, 240, i).save(root/f'{i:02}.jpg', quality=92)
    return sorted(root.iterdir())

def loader(files, geometry, gb=None, train=True, **kw):
    labels = [i % 2 for i in range(len(files))]
    samples = Samples((files, labels), (ImageBlock(), CategoryBlock().fit(labels)), (geometry,), train=train, seed=3, cache=gb and picture_caches(gb, [2*len(files)])[0])
    return Loader(samples, bs=8, shuffle=train, seed=3, device='cpu', **kw)

def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))

@pytest.mark.parametrize('geometry', [Resize(64), RandomResizedCrop(64, min_scale=.35), Resize(64, 'squish'), Resize(64, 'pad'), RandomCrop(150), CropPad(400)])
def test_views_of_the_copies_look_like_those_of_the_files(files, geometry):
    plain, kept = loader(files, geometry), loader(files, geometry, .1)
    for epoch in range(3):
        for (x, y), (u, v) in zip(plain.batches(epoch), kept.batches(epoch)):
            assert torch.equal(y, v) and x.shape == u.shape and (x - u).abs().mean() < .04
    assert len(kept.samples.cache) == 20

@pytest.mark.parametrize('workers', [0, 1, 3])
def test_the_same_batches_whatever_the_workers_and_whether_the_copy_was_there(files, workers):
    kw = dict(geometry=RandomResizedCrop(64), gb=.1)
    first = loader(files, num_workers=2, **kw)
    list(first.batches(5))
    other = loader(files, num_workers=workers, **kw)
    assert same(list(first.batches(0)), list(other.batches(0)))

def test_validation_sees_the_very_pixels_of_the_files(files):
    plain, kept = loader(files, RandomResizedCrop(64), train=False), loader(files, RandomResizedCrop(64), .1, train=False)
    for _ in range(2): assert same(list(plain.batches(0)), list(kept.batches(0)))

def test_files_are_not_opened_again(files, tmp_path):
    copies = [tmp_path/f.name for f in files]
    for a, b in zip(files, copies): b.write_bytes(a.read_bytes())
    dl = loader(copies, Resize(64), .1)
    list(dl.batches(0))
    for f in copies: f.unlink()
    assert len(list(dl.batches(1))) == 3

def test_the_limit_holds_and_is_said_once(files):
    dl = loader(files, Resize(64), 64*64*3*7e-9)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        plain = loader(files, Resize(64, 'squish')), loader(files, Resize(64, 'squish'), 64*70*3*7e-9)
        for epoch in range(2): list(dl.batches(epoch))
        for epoch in range(2):
            for (x, _), (u, _) in zip(plain[0].batches(epoch), plain[1].batches(epoch)): assert (x - u).abs().mean() < .02
    cache = dl.samples.cache
    assert 0 < len(cache) < 20 and int(cache.memory.state[0]) <= cache.memory.limit
    assert [str(w.message) for w in said if 'cache' in str(w.message)][0].startswith('the cache is full') and len(said) == 2      # one for each cache

def test_forked_processes_share_it(files):
    if not hasattr(os, 'fork'): pytest.skip('no fork here')
    cache = picture_caches(.01, [4])[0]
    if (pid := os.fork()) == 0: cache.put(2, (9, 9), np.full((3, 4, 3), 5, np.uint8)); os._exit(0)
    os.waitpid(pid, 0)
    size, a = cache.get(2)
    assert size == (9, 9) and a.shape == (3, 4, 3) and (a == 5).all() and len(cache) == 1

def test_threads_that_put_at_once_do_not_overlap():
    cache = picture_caches(.01, [64])[0]
    threads = [threading.Thread(target=lambda k=k: [cache.put(i, (1, 1), np.full((5, 7, 3), i, np.uint8)) for i in range(k, 64, 4)]) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all((cache.get(i)[1] == i).all() for i in range(64))

def test_what_is_changed_in_what_is_read_leaves_the_cache_behind(files):
    s = loader(files, Resize(64), .1).samples
    assert s.new(seed=4).cache is s.cache and s.new(geometries=(Resize(32),)).cache is None and s.new(train=False).cache is None and s.new(fields=s.fields).cache is None
    assert pickle.loads(pickle.dumps(s)).cache is None

@pytest.mark.parametrize('gb', [0, -1, 'much', True, float('nan')])
def test_a_limit_that_is_none_is_an_error(gb):
    with pytest.raises(DataError, match='cache_gb'): picture_caches(gb, [3])

def test_more_memory_than_there_is_is_an_error(monkeypatch):
    def refuse(*args): raise OSError(12, 'Cannot allocate memory')
    monkeypatch.setattr(cache.mmap, 'mmap', refuse)
    with pytest.raises(DataError, match='cache_gb=9.*choose less'): picture_caches(9, [3])

def test_a_mask_follows_its_picture():
    "A bright square, the same in picture and mask: every view shows them at the same place"
    a = np.zeros((300, 400, 3), np.uint8); a[100:180, 150:260] = 255
    f = io.BytesIO(); Image.fromarray(a).save(f, 'PNG')
    mask = Image.fromarray((a[..., 0] > 0).astype(np.uint8))
    geometry = (RandomResizedCrop(64, min_scale=.5),)
    kept, image, seg = picture_caches(.1, [1])[0], ImageBlock(), MaskBlock(codes=('no', 'yes'))
    for epoch in range(12):
        frame = FrameDraw(geometry, lambda: stream(epoch))
        x, y = read_kept(kept, 0, image, f.getvalue(), frame), seg.read(mask, frame)
        assert ((x[0].float() > 127) == (y > 0)).float().mean() > .985, epoch
    assert kept.get(0)[1].shape[:2] < (300, 400)

@settings(max_examples=150, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32), st.sampled_from(['Resize', 'RandomResizedCrop', 'pad', 'RandomCrop']))
def test_a_snapped_frame_stays_where_it_was_drawn(w, h, oh, ow, seed, kind):
    g = {'Resize': Resize, 'RandomResizedCrop': RandomResizedCrop, 'pad': lambda s: Resize(s, 'pad'), 'RandomCrop': RandomCrop}[kind]((oh, ow))
    frame, small = FrameDraw([g], lambda: stream(seed))(w, h), kept_size((g,), w, h)
    assert small[0] <= w and small[1] <= h
    there, here = snapped(frame, (w, h), small)
    k = w/small[0], h/small[1]
    assert there.size == here.size == frame.size and all(abs(a - b) <= 2*k[i % 2] + 1e-6 for i, (a, b) in enumerate(zip(frame.box, there.box)))
    assert all(float(o).is_integer() for o in here.box) and here.box[2] > here.box[0] and here.box[3] > here.box[1]
    if frame.box[0] >= 0 and frame.box[1] >= 0 and frame.box[2] <= w and frame.box[3] <= h: assert here.box[0] >= 0 and here.box[1] >= 0 and here.box[2] <= small[0] and here.box[3] <= small[1]

def test_a_frame_of_a_copy_as_large_as_the_picture_is_the_frame():
    frame = Frame((3, 4, 50, 60), (32, 32))
    assert snapped(frame, (100, 80), (100, 80)) == (frame, frame)

def test_dataloaders_share_one_limit_and_a_new_size_gets_new_copies(files):
    dls = DataBlock(get_y=lambda f: int(f.stem) % 2, item_tfms=Resize(64), splitter=RandomSplitter(seed=1)).dataloaders(files, bs=4, device='cpu', cache_gb=.1)
    for dl in dls: list(dl.batches(0))
    train, valid = (dl.samples.cache for dl in dls)
    assert train.memory is valid.memory and len(train) == 16 and len(valid) == 4
    smaller, same_size = dls.new(size=32), dls.new(bs=2)
    assert same_size.train.samples.cache is train
    assert smaller.train.samples.cache is not train and len(smaller.train.samples.cache) == 0 and smaller.train.one_batch()[0].shape[-1] == 32
    with pytest.raises(DataError, match='cache_gb'): DataBlock(get_y=lambda f: 0, item_tfms=Resize(64)).dataloaders(files, device='cpu', cache_gb='all')
