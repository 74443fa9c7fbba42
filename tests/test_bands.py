import gc
import io
import os
import pickle
import warnings

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision import tv_tensors

from blocks import DataBlock, DataError, EndSplitter, Frame, ImageBlock, MissingExtraError, Normalize, RandomResizedCrop, Resize, aug_transforms
from blocks.data.bands import BandsBlock
from blocks.data.frame import PAD_MODES, CropPad, FrameDraw

WHOLE = FrameDraw([])

def numbers(h=20, w=30, n=5, dtype='uint16', seed=0):
    "Smooth random numbers over most of the range of `dtype`; floats from 0 to 1"
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    coarse = rng.random((4, 5, n), dtype=np.float32)
    a = np.stack([np.asarray(Image.fromarray(coarse[..., k]).resize((w, h), Image.BILINEAR)) for k in range(n)], -1)
    return a.astype(dtype) if dtype.kind == 'f' else (a*.99*np.iinfo(dtype).max).astype(dtype)

def read(block, raw, frame=WHOLE): return block.read(raw, frame).as_subclass(torch.Tensor).permute(1, 2, 0).numpy()

# --- files
def write(kind, a, path):
    first = np.moveaxis(a, -1, 0)
    if kind == 'npy': np.save(path, a)
    elif kind == 'fortran': np.save(path, np.asfortranarray(a))
    elif kind == 'npz': np.savez_compressed(path, a, np.zeros(3))
    elif kind == 'interleaved': tifffile.imwrite(path, a, photometric='minisblack', planarconfig='contig')
    elif kind == 'planar': tifffile.imwrite(path, first, photometric='minisblack', planarconfig='separate')
    elif kind == 'pages': tifffile.imwrite(path, first, photometric='minisblack')
    elif kind == 'tiles': tifffile.imwrite(path, a, photometric='minisblack', planarconfig='contig', tile=(16, 16), compression='zlib')
    elif kind == 'imagej': tifffile.imwrite(path, first, imagej=True, metadata=dict(axes='CYX'))
    elif kind == 'ome': tifffile.imwrite(path, first, ome=True, metadata=dict(axes='CYX'))
    elif kind == 'big-endian': tifffile.imwrite(path, a, photometric='minisblack', planarconfig='contig', byteorder='>')
    elif kind == 'bigtiff': tifffile.imwrite(path, a, photometric='minisblack', planarconfig='contig', bigtiff=True)
    return path

SUFFIX = dict(npy='.npy', fortran='.npy', npz='.npz', ome='.ome.tif')
KINDS = ['npy', 'fortran', 'npz', 'interleaved', 'planar', 'pages', 'tiles', 'imagej', 'ome', 'big-endian', 'bigtiff']

class Member(os.PathLike):
    def __init__(self, data): self.data = data
    def read_bytes(self): return self.data
    def __fspath__(self): return '/nowhere/a.tif'

@pytest.mark.parametrize('kind', KINDS)
def test_every_file_gives_the_same_numbers(tmp_path, kind):
    a = numbers()
    file = write(kind, a, tmp_path/f"a{SUFFIX.get(kind, '.tif')}")
    block = BandsBlock().fit([file])
    assert block == BandsBlock().fit([a]) and block.n_bands == 5 and block.max_value == 65535
    for raw in (file, str(file), file.read_bytes(), Member(file.read_bytes()), io.BytesIO(file.read_bytes())):
        block.verify(raw)
        block.verify(raw, whole=True)
        assert block.size(raw) == (30, 20)
        assert np.allclose(read(block, raw), a/65535, atol=1e-7)

@pytest.mark.parametrize('dtype,top', [('uint8', 255), ('uint16', 65535), ('int16', 32767), ('uint32', 2**32-1), ('int32', 2**31-1), ('float32', 1), ('float64', 1), ('float16', 1), ('bool', 1)])
@pytest.mark.parametrize('suffix', ['npy', 'tif', 'array', 'tensor'])
def test_depths(tmp_path, dtype, top, suffix):
    a = numbers(dtype='uint8') > 128 if dtype == 'bool' else numbers(dtype=dtype)
    raw = a
    if suffix == 'npy': raw = write('npy', a, tmp_path/'a.npy')
    if suffix == 'tif': raw = write('interleaved', a.astype('uint8') if dtype == 'bool' else a, tmp_path/'a.tif')
    if suffix == 'tensor': raw = torch.from_numpy(np.moveaxis(a, -1, 0).copy())
    block = BandsBlock().fit([raw])
    assert block.max_value == (255 if (dtype, suffix) == ('bool', 'tif') else top)
    x = block.read(raw, WHOLE)
    assert isinstance(x, tv_tensors.Image) and x.dtype == torch.float32 and x.shape == (5, 20, 30) and 0 <= x.min() and x.max() <= 1
    assert np.allclose(read(block, raw), a.astype(float)/block.max_value, atol=1e-6)

def test_one_band_needs_no_axis(tmp_path):
    a = numbers(n=1)[..., 0]
    np.save(tmp_path/'a.npy', a)
    tifffile.imwrite(tmp_path/'a.tif', a)
    for raw in (a, tmp_path/'a.npy', tmp_path/'a.tif', torch.from_numpy(a)):
        block = BandsBlock().fit([raw])
        assert block.channels == 1 and np.allclose(read(block, raw)[..., 0], a/65535)

def test_axes_of_one_are_dropped_and_more_than_one_axis_of_bands_is_refused(tmp_path):
    a = numbers()
    tifffile.imwrite(tmp_path/'one.tif', np.moveaxis(a, -1, 0)[None, None], imagej=True, metadata=dict(axes='TZCYX'))
    assert np.allclose(read(BandsBlock().fit([a]), tmp_path/'one.tif'), a/65535)
    tifffile.imwrite(tmp_path/'film.tif', np.stack([np.moveaxis(a, -1, 0)]*3), imagej=True, metadata=dict(axes='TCYX'))
    with pytest.raises(DataError, match='TCYX.*one file for each picture'): BandsBlock().verify(tmp_path/'film.tif')

def test_a_large_npy_file_is_not_read_whole(tmp_path):
    file = tmp_path/'scene.npy'
    scene = np.lib.format.open_memmap(file, 'w+', np.uint16, (6000, 7000, 8))      # sparse: 672 MB on paper
    scene[3000:3100, 3000:3100] = 1000
    scene.flush()
    del scene
    if file.stat().st_blocks*512 > 50e6: pytest.skip('the file system has no sparse files')
    import tracemalloc
    tracemalloc.start()
    x = BandsBlock(max_value=1000).read(file, lambda w, h: Frame((3000, 3000, 3100, 3100), (50, 50)))
    assert tracemalloc.get_traced_memory()[1] < 20e6 and (x[:, 2:-2, 2:-2] == 1).all()
    tracemalloc.stop()

def test_a_compressed_bomb_is_refused(monkeypatch, tmp_path):
    file = write('tiles', numbers(), tmp_path/'a.tif')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)
    with pytest.raises(DataError, match='30×20 = 600 pixels.*MAX_IMAGE_PIXELS'): BandsBlock().verify(file)

def test_tifffile_is_an_extra(monkeypatch, tmp_path):
    file = write('planar', numbers(), tmp_path/'a.tif')
    monkeypatch.setitem(__import__('sys').modules, 'tifffile', None)
    with pytest.raises(MissingExtraError, match=r'blocks\[tiff\]'): BandsBlock().verify(file)

def test_no_file_is_left_open(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for kind in ('npy', 'npz', 'planar'):
            file = write(kind, numbers(), tmp_path/f"a{SUFFIX.get(kind, '.tif')}")
            block = BandsBlock().fit([file])
            block.read(file, FrameDraw([Resize(8)]))
            block.verify(file, whole=True)
        gc.collect()
    assert not said

@pytest.mark.parametrize('content', [b'', b'PK\5\6' + bytes(18), b'\x89PNG\r\n\x1a\n', b'plain text', b'\x93NUMPY', b'II*\0', b'PK\3\4'])
def test_other_and_broken_files_are_errors(tmp_path, content):
    (tmp_path/'a.npy').write_bytes(content)
    with pytest.raises((DataError, OSError)): BandsBlock().verify(tmp_path/'a.npy')

def test_code_in_a_npy_file_is_not_run(tmp_path):
    np.save(tmp_path/'a.npy', np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(DataError, match='cannot be read'): BandsBlock().verify(tmp_path/'a.npy')

# --- what is learned
def test_the_range_of_floats_is_learned_from_training():
    low, high = numbers(dtype='float32'), numbers(dtype='float32', seed=1)*40
    assert BandsBlock().fit([low]).max_value == 1
    block = BandsBlock().fit([low, high, low])
    assert block.max_value == pytest.approx(high.max()) and read(block, high).max() == pytest.approx(1)
    assert read(block, high*2).max() == 1                                      # brighter than anything in training
    only = BandsBlock(bands=(1,)).fit([high])
    assert only.max_value == pytest.approx(high[..., 1].max())

def test_what_is_given_is_not_learned():
    block = BandsBlock(max_value=4095).fit([numbers()])
    assert block.max_value == 4095 and block.n_bands == 5 and block.fit([numbers(n=2)]) is block
    block.verify(numbers(dtype='float32'))                                     # what is white is said for all kinds of numbers
    assert BandsBlock(bands=(2, 0)).channels == 2

def test_fitting_leaves_the_template_alone():
    template = BandsBlock()
    assert template.fit([numbers()]).n_bands == 5 and template.fit([numbers(n=3)]).n_bands == 3 and template == BandsBlock()

def test_bands_are_chosen_in_order():
    a = numbers()
    for bands in ((4, 0), [2], (1, 1, 3), np.array([3, 2])):
        block = BandsBlock(bands).fit([a])
        assert block.channels == len(bands) and np.allclose(read(block, a), a[..., list(bands)]/65535)

def test_fields_are_plain_and_survive():
    block = BandsBlock(bands=np.array([1, 0]), mean=(.5, .5), std=(.2, .2)).fit([numbers(dtype='float32')])
    import dataclasses
    values = {f.name: getattr(block, f.name) for f in dataclasses.fields(block)}
    assert set(values) == {'bands', 'max_value', 'n_bands', 'dtype', 'mean', 'std'}
    assert all(type(o) in (tuple, float, int, str, type(None)) for o in values.values()) and all(type(o) is int for o in block.bands)
    assert BandsBlock(**values) == block == pickle.loads(pickle.dumps(block))

# --- geometry
@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(-15, 28), st.integers(-15, 18), st.integers(2, 50), st.integers(2, 50), st.integers(1, 40), st.integers(1, 40), st.sampled_from(PAD_MODES), st.sampled_from(['u1', 'u2', 'f4']))
def test_bands_are_seen_through_a_frame_as_images_are(l, t, w, h, ow, oh, mode, dtype):
    frame = lambda width, height: Frame((l, t, l+w, t+h), (oh, ow), mode)
    a = numbers(n=3, dtype='u1')
    image = ImageBlock().read(a, frame).permute(1, 2, 0).numpy().astype(float)
    wide = a if dtype == 'u1' else a.astype('u2')*257 if dtype == 'u2' else a.astype('f4')/255
    bands = read(BandsBlock().fit([wide]), wide, frame)
    assert bands.shape == (oh, ow, 3) and abs(bands*255 - image).max() <= 1.01

def test_a_crop_reads_what_lies_beside_it_as_a_whole_resize_does():
    a = numbers(60, 80)
    block = BandsBlock().fit([a])
    whole = np.stack([np.asarray(Image.fromarray((a[..., k]/np.float32(65535)).astype(np.float32)).resize((9, 7), Image.BILINEAR, box=(20.5, 10.25, 61, 47))) for k in range(5)], -1)
    assert np.allclose(read(block, a, lambda w, h: Frame((20.5, 10.25, 61, 47), (7, 9))), whole, atol=1e-6)

def test_a_crop_without_scaling_is_exact():
    a = numbers()
    assert (read(BandsBlock().fit([a]), a, FrameDraw([CropPad(16)])) == (a[2:18, 7:23].astype(np.float32)/np.float32(65535))).all()

# --- batches and pictures
def test_batches_are_channels_last_floats_and_normalised_once():
    a = numbers()
    block = BandsBlock(mean=(.5,)*5, std=(.25,)*5).fit([a])
    batch = block.collate([block.read(a, FrameDraw([Resize(16)]))]*3)
    assert isinstance(batch, tv_tensors.Image) and batch.dtype == torch.float32 and batch.shape == (3, 5, 16, 16) and batch.is_contiguous(memory_format=torch.channels_last)
    x = block.prepare(batch)
    assert type(x) is torch.Tensor and torch.allclose(x, (batch.as_subclass(torch.Tensor)-.5)/.25, atol=1e-6)
    assert np.allclose(block.decode(x[0]), batch[0].permute(1, 2, 0).numpy(), atol=1e-6)

def test_from_files_through_augmentation_to_what_the_model_gets(tmp_path):
    for i in range(8): write(('planar', 'interleaved')[i % 2], numbers(40, 40, seed=i), tmp_path/f'{i}.tif')
    db = DataBlock(blocks=(BandsBlock,), n_inp=1, get_items=lambda p: sorted(p.glob('*.tif')), splitter=EndSplitter(.5), item_tfms=RandomResizedCrop(24, min_scale=.5),
                   batch_tfms=[*aug_transforms(max_lighting=.3), Normalize.from_stats((.5,)*5, (.25,)*5)])
    dls = db.dataloaders(tmp_path, bs=2, num_workers=0, device='cpu')
    x = dls.one_batch()[0]
    assert x.shape == (2, 5, 24, 24) and x.dtype == torch.float32 and torch.isfinite(x).all() and x.min() >= -2.01 and x.max() <= 2.01
    assert dls.blocks[0].channels == 5 and dls.blocks[0].max_value == 65535 and isinstance(dls.blocks[0], ImageBlock)

@pytest.mark.parametrize('n,shape', [(1, (20, 30)), (2, (20, 30)), (3, (20, 30, 3)), (7, (20, 30, 3))])
def test_show(n, shape):
    import matplotlib.pyplot as plt
    fig, a = plt.figure(), numbers(n=n)
    block = BandsBlock().fit([a])
    block.show(block.prepare(block.collate([block.read(a//50, WHOLE)]))[0], fig.add_subplot(), 'dim')
    shown = np.asarray(fig.axes[0].images[0].get_array())
    plt.close(fig)
    assert shown.shape == shape and shown.min() == 0 and shown.max() == 1 and fig.axes[0].get_title() == 'dim'

def test_a_flat_picture_can_be_shown():
    import matplotlib.pyplot as plt
    fig, block = plt.figure(), BandsBlock(max_value=9)
    block.show(block.read(np.ones((4, 5, 3)), WHOLE), fig.add_subplot())
    assert np.isfinite(np.asarray(fig.axes[0].images[0].get_array())).all()
    plt.close(fig)

# --- mistakes
@pytest.mark.parametrize('make,match', [
    (lambda b: b.verify(numbers(n=4)), r'picture of 4 band.*\(20, 30, 4\).*training have 5'),
    (lambda b: b.read(numbers(n=4), WHOLE), 'picture of 4 band'),
    (lambda b: b.verify(numbers(dtype='uint8')), 'uint8 numbers.*uint16.*max_value='),
    (lambda b: b.read(numbers(dtype='float32'), WHOLE), 'float32 numbers'),
    (lambda b: BandsBlock((0, 5)).fit([numbers()]), r'no band 5 in a picture of 5'),
    (lambda b: BandsBlock().fit([]), 'no training picture'),
    (lambda b: BandsBlock().read(numbers(), WHOLE), 'after it was fitted'),
    (lambda b: BandsBlock().channels, 'before fitting'),
    (lambda b: BandsBlock().fit([np.moveaxis(numbers(30, 30), -1, 0)]), r'\(5, 30, 30\).*moveaxis'),
    (lambda b: BandsBlock().fit([np.zeros((2, 3, 4, 5))]), r'\(2, 3, 4, 5\)'),
    (lambda b: BandsBlock().fit([np.zeros((0, 3, 4))]), r'\(0, 3, 4\)'),
    (lambda b: BandsBlock().fit([np.zeros((3, 4, 2), complex)]), 'complex'),
    (lambda b: BandsBlock().fit([-numbers(dtype='float32')]), 'down to -'),
    (lambda b: BandsBlock().fit([np.full((3, 4, 2), 1e300)]), 'not finite'),
    (lambda b: b.verify(42), 'a int'),
    (lambda b: BandsBlock(bands=()), 'bands='), (lambda b: BandsBlock(bands=3), 'bands='), (lambda b: BandsBlock(bands=(-1,)), 'bands='), (lambda b: BandsBlock(max_value=0), 'max_value='),
])
def test_mistakes_say_what_came_and_what_was_expected(make, match):
    with pytest.raises(DataError, match=match): make(BandsBlock().fit([numbers()]))

def test_no_data_is_found_by_reading_all_of_it():
    a = numbers(dtype='float32')
    block = BandsBlock().fit([a])
    a[3, 4, 1] = np.nan
    block.verify(a)
    with pytest.raises(DataError, match='1 value.*not finite'): block.verify(a, whole=True)
    with pytest.raises(DataError, match='not finite'): block.read(a, WHOLE)
    BandsBlock(bands=(0, 2)).fit([a]).read(a, WHOLE)                            # a band that nobody looks at may hold anything
    b = numbers(dtype='int16')
    b[0, 0, 0] = -9999
    with pytest.raises(DataError, match='-9999'): BandsBlock().fit([b]).read(b, WHOLE)
