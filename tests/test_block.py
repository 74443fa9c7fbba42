import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from blocks import DataBlock, DataError, EndSplitter, ImageBlock, Normalize, RandomResizedCrop, Resize
from blocks.data.frame import Frame, FrameDraw


def photo(w=97, h=61, seed=0):
    "Smooth random colours, as photographs have"
    a = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(a).resize((w, h), Image.BICUBIC)

def encoded(im, **kw):
    f = io.BytesIO()
    im.save(f, **kw)
    return f.getvalue()

# --- ImageBlock
@pytest.mark.parametrize('mode,channels', [('L', 1), ('RGB', 3), ('RGBA', 4)])
def test_from_files_to_what_the_model_gets(tmp_path, mode, channels):
    rgba = np.random.default_rng(0).integers(1, 256, (20, 30, 4), dtype=np.uint8)
    for i in range(6): Image.fromarray(rgba).save(tmp_path/f'{i}.png')
    stats = Normalize.from_stats((.5,)*channels, (.25,)*channels)
    db = DataBlock(blocks=(ImageBlock(mode=mode),), n_inp=1, get_items=lambda p: sorted(p.glob('*.png')), splitter=EndSplitter(.5), item_tfms=RandomResizedCrop(16), batch_tfms=stats)
    dls = db.dataloaders(tmp_path, bs=2, num_workers=0, device='cpu')
    x = dls.one_batch()[0]
    assert x.shape == (2, channels, 16, 16) and x.dtype == torch.float32 and dls.blocks[0].channels == channels and x.min() >= -2.001 and x.max() <= 2.001

@pytest.mark.parametrize('make', [lambda a: a, lambda a: a/255., lambda a: torch.from_numpy(a).permute(2, 0, 1), lambda a: torch.from_numpy(a/255.).permute(2, 0, 1), lambda a: Image.fromarray(a)])
def test_alpha_of_arrays_and_tensors_is_kept(make):
    a = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    got = ImageBlock(mode='RGBA').read(make(a), FrameDraw([]))
    assert torch.equal(got.as_subclass(torch.Tensor), torch.from_numpy(a).permute(2, 0, 1))
    larger = ImageBlock(mode='RGBA').read(make(a), FrameDraw([Resize(12, 'squish')]))
    assert larger.shape == (4, 12, 12) and abs(larger[3].float().mean() - a[..., 3].mean()) < 12

@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'LA', 'CMYK', 'YCbCr', 'LAB', 'HSV'])
def test_every_mode_can_be_shown(mode):
    import matplotlib.pyplot as plt
    block, fig = ImageBlock(mode=mode), plt.figure()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        block.show(block.prepare(block.collate([block.read(photo(), FrameDraw([]))]))[0], fig.add_subplot(), 'title')
    shown = fig.axes[0].images[0].get_array()
    plt.close(fig)
    want = np.asarray(photo().convert(mode) if mode != 'CMYK' else photo())
    if mode in ('RGB', 'L', 'RGBA'): assert abs(np.asarray(shown)*255 - want).max() < 1
    elif mode != 'LA': assert abs(np.asarray(shown).astype(int)[..., :3] - np.asarray(photo())).mean() < 8

def test_reading_leaves_no_file_open(tmp_path):
    import os
    photo().save(tmp_path/'a.png')
    before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else None
    if before is None: pytest.skip('needs /proc')
    for _ in range(20): ImageBlock().read(tmp_path/'a.png', FrameDraw([Resize(8)])); ImageBlock().verify(tmp_path/'a.png')
    assert len(os.listdir('/proc/self/fd')) <= before + 1

def test_verify_finds_a_truncated_file_only_by_reading_all_of_it(tmp_path):
    (tmp_path/'cut.png').write_bytes(encoded(photo(), format='PNG')[:600])
    ImageBlock().verify(tmp_path/'cut.png')
    with pytest.raises(OSError): ImageBlock().verify(tmp_path/'cut.png', whole=True)

def test_batches_are_channels_last_bytes_of_the_image_kind():
    b = ImageBlock()
    batch = b.collate([b.read(photo(seed=i), FrameDraw([Resize(16)])) for i in range(3)])
    assert isinstance(batch, tv_tensors.Image) and batch.dtype == torch.uint8 and batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch[1].as_subclass(torch.Tensor), b.read(photo(seed=1), FrameDraw([Resize(16)])).as_subclass(torch.Tensor))

def test_different_sizes_in_a_batch_say_what_to_add():
    b = ImageBlock()
    with pytest.raises(DataError, match='Resize'): b.collate([b.read(photo(30, 20), FrameDraw([])), b.read(photo(31, 20), FrameDraw([]))])

def test_an_unknown_mode_is_refused():
    with pytest.raises(DataError, match="'rgb'"): ImageBlock(mode='rgb')

# --- grey files as RGB: one channel in memory until the model
def grey_file(tmp_path, i=0):
    a = np.random.default_rng(i).integers(0, 255, (40, 50), dtype=np.uint8)
    Image.fromarray(a).save(f := tmp_path/f'{i}.png')
    return f, a

def test_a_grey_file_is_one_channel_in_memory_and_three_for_the_model(tmp_path):
    block, pairs = ImageBlock(), [grey_file(tmp_path, i) for i in range(3)]
    values = [block.read(f, lambda w, h: Frame((0, 0, w, h), (h, w))) for f, _ in pairs]
    assert all(v.shape == (3, 40, 50) and v.stride(0) == 0 and (v == torch.from_numpy(a)).all() for v, (_, a) in zip(values, pairs))
    batch = block.collate(values)
    assert batch.shape == (3, 3, 40, 50) and batch.untyped_storage().nbytes() == 3*40*50
    for b in (block, ImageBlock(mean=(.1, .2, .3), std=(.4, .5, .6))):
        x = b.prepare(batch)
        assert x.is_contiguous(memory_format=torch.channels_last) and torch.allclose(x, b.prepare(batch.clone(memory_format=torch.contiguous_format)), atol=1e-6)

@pytest.mark.parametrize('block', [ImageBlock(), ImageBlock(mean=(.1, .2, .3), std=(.4, .5, .6))], ids=['plain', 'normalised'])
@pytest.mark.parametrize('grey', [True, False])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_a_batch_prepared_into_memory_of_the_callers_is_the_same_to_the_bit(block, grey, dtype):
    x = torch.randint(0, 256, (5, 1 if grey else 3, 7, 9), generator=torch.Generator().manual_seed(0)).to(dtype)
    x = (x/255 if dtype.is_floating_point else x).contiguous(memory_format=torch.channels_last).expand(-1, 3, -1, -1)
    out = torch.full((5, 3, 7, 9), float('nan')).contiguous(memory_format=torch.channels_last)
    assert block.prepare(x, out=out) is out and torch.equal(out, block.prepare(x))

def test_grey_and_coloured_files_make_one_batch(tmp_path):
    (f, a), block = grey_file(tmp_path), ImageBlock()
    grey, colour = block.read(f, lambda w, h: Frame((0, 0, w, h), (h, w))), block.read(Image.new('RGB', (50, 40), (1, 2, 3)), lambda w, h: Frame((0, 0, w, h), (h, w)))
    batch = block.collate([grey, colour])
    assert (batch[0] == torch.from_numpy(a)).all() and batch[1, :, 0, 0].tolist() == [1, 2, 3]

def test_transparent_grey_is_laid_on_white(tmp_path):
    Image.new('LA', (8, 8), (0, 0)).save(f := tmp_path/'a.png')
    assert (ImageBlock().read(f, lambda w, h: Frame((0, 0, w, h), (h, w))) == 255).all()
