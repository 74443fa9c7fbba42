import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from blocks import CategoryBlock, DataError, Frame, ImageBlock, Resize
from blocks.data.block import open_image, read_image, upright_size
from blocks.data.frame import FrameDraw


def photo(w=97, h=61, seed=0):
    "Smooth random colours, as photographs have"
    a = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(a).resize((w, h), Image.BICUBIC)

def encoded(im, **kw):
    f = io.BytesIO()
    im.save(f, **kw)
    return f.getvalue()

def whole(im, frame):
    "What a frame inside the picture means: full decode, crop, resize"
    return np.asarray(im.convert('RGB').resize(frame.size[::-1], Image.BILINEAR, box=frame.box)).astype(float)

# --- decoding through a frame
@pytest.mark.parametrize('box,size', [((0, 0, 1600, 1200), (64, 64)), ((200, 100, 1400, 1100), (96, 128)), ((700.5, 500.25, 900, 700), (150, 150)), ((0, 0, 1600, 1200), (1200, 1600))])
@pytest.mark.parametrize('kw', [dict(format='JPEG', quality=92), dict(format='PNG', compress_level=1)])
def test_fused_decode_is_within_two_levels_of_a_full_one(box, size, kw):
    data, frame = encoded(photo(1600, 1200), **kw), Frame(box, size)
    got = read_image(open_image(data), frame).astype(float)
    assert abs(got - whole(Image.open(io.BytesIO(data)), frame)).mean() < 2

def test_a_small_frame_decodes_a_jpeg_at_a_fraction_of_its_size():
    im = open_image(encoded(photo(1600, 1200), format='JPEG'))
    read_image(im, Frame((0, 0, 1600, 1200), (64, 64)))
    assert im.size == (200, 150)

def test_a_callers_image_is_never_changed():
    im = Image.open(io.BytesIO(encoded(photo(1600, 1200), format='JPEG')))
    ImageBlock().read(im, FrameDraw([Resize(64)]))
    assert im.size == (1600, 1200) and np.asarray(im).shape == (1200, 1600, 3)      # neither shrunk nor closed

def test_a_crop_without_scaling_is_exact():
    im = photo()
    a = read_image(im, Frame((3, 4, 53, 44), (40, 50)))
    assert (a == np.asarray(im)[4:44, 3:53]).all()

@pytest.mark.parametrize('mode,want', [('zeros', 0), ('border', None), ('reflection', None)])
def test_padding(mode, want):
    im = photo()
    a, full = read_image(im, Frame((-10, -5, 107, 66), (71, 117), mode)), np.asarray(im)
    assert (a[5:66, 10:107] == full).all()
    ref = np.pad(full, ((5, 5), (10, 10), (0, 0)), mode=dict(zeros='constant', border='edge', reflection='reflect')[mode])
    assert (a == ref).all()

def test_a_frame_entirely_or_almost_outside_still_gives_its_size():
    assert read_image(photo(), Frame((-500, -500, 1, 1), (32, 32), 'border')).shape == (32, 32, 3)
    assert read_image(Image.new('RGB', (1, 1), 'red'), Frame((-5, -5, 6, 6), (11, 11), 'reflection'))[..., 0].min() == 255

# --- orientation
@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
def test_pictures_come_out_upright(orientation, fmt):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(), format=fmt, exif=exif, **(dict(quality=100, subsampling=0) if fmt == 'JPEG' else dict(lossless=True) if fmt == 'WEBP' else {}))
    plain = Image.open(io.BytesIO(data))
    plain.load()
    ref = np.asarray(ImageOps.exif_transpose(plain).convert('RGB')).astype(float)
    im = open_image(data)
    w, h = upright_size(im)
    assert (h, w) == ref.shape[:2]
    got = read_image(im, Frame((0, 0, w, h), (h, w)))
    assert abs(got - ref).max() <= 1

# --- modes
def ramp(): return np.tile(np.linspace(0, 255, 64).astype(np.uint8), (16, 1))

@pytest.mark.parametrize('target,channels', [('RGB', 3), ('L', 1), ('RGBA', 4), ('LA', 2), ('CMYK', 4), ('YCbCr', 3), ('LAB', 3), ('HSV', 3)])
@pytest.mark.parametrize('source', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I;16', 'I', 'F'])
def test_every_mode_becomes_every_mode(source, target, channels):
    grey = Image.fromarray(ramp())
    im = Image.fromarray(ramp().astype(np.uint16)*257) if source == 'I;16' else grey.convert('RGB').convert(source) if source in ('LAB', 'HSV', 'YCbCr', 'CMYK') else grey.convert(source)
    a = read_image(im, Frame((0, 0, 64, 16), (8, 32)), target)
    assert a.shape == (8, 32, channels) and a.dtype == np.uint8
    if target in ('RGB', 'L') and source not in ('1',): assert abs(a[4, ::, 0].astype(int) - np.linspace(4, 251, 32)).max() < 12

def test_sixteen_bits_are_scaled_by_their_range_not_clipped():
    a = read_image(Image.fromarray(np.full((4, 4), 32768, np.uint16)), Frame((0, 0, 4, 4), (4, 4)), 'L')
    assert (a == 128).all()

@pytest.mark.parametrize('value,want', [(.5, 128), (128., 128), (32768., 128)])
def test_floats_by_the_smallest_range_that_holds_them(value, want):
    assert abs(int(read_image(Image.fromarray(np.full((4, 4), value, np.float32)), Frame((0, 0, 4, 4), (4, 4)), 'L')[0, 0, 0]) - want) <= 1

@pytest.mark.parametrize('value', [-1., np.nan, np.inf])
def test_floats_without_a_grey_scale_are_refused(value):
    with pytest.raises(DataError, match='grey scale'): read_image(Image.fromarray(np.full((4, 4), value, np.float32)), Frame((0, 0, 4, 4), (4, 4)))

def test_transparency_is_laid_on_white():
    im = Image.new('RGBA', (8, 8), (255, 0, 0, 0))
    assert (read_image(im, Frame((0, 0, 8, 8), (8, 8))) == 255).all()
    assert (read_image(im, Frame((0, 0, 8, 8), (8, 8)), 'RGBA')[..., 3] == 0).all()
    palette = Image.new('P', (8, 8), 0)
    palette.putpalette([0, 0, 0] + [255, 255, 255])
    palette.info['transparency'] = 0
    assert (read_image(palette, Frame((0, 0, 8, 8), (8, 8))) == 255).all()

def test_the_first_picture_of_an_animation():
    data = encoded(Image.new('RGB', (8, 8), 'red'), format='GIF', save_all=True, append_images=[Image.new('RGB', (8, 8), 'blue')])
    assert (read_image(open_image(data), Frame((0, 0, 8, 8), (8, 8)))[0, 0] == [255, 0, 0]).all()

# --- ImageBlock
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

# --- CategoryBlock
def test_fitting_gives_a_new_block_and_keeps_the_template():
    template = CategoryBlock()
    assert template.fit('ba').vocab == ('a', 'b') and template.fit('cd').vocab == ('c', 'd') and template.vocab is None

def test_numpy_labels_become_plain_values():
    vocab = CategoryBlock().fit(np.array(['x', 'y'])).vocab + CategoryBlock().fit(np.array([2, 1])).vocab
    assert [type(o) for o in vocab] == [str, str, int, int]

def test_true_and_one_are_told_from_text():
    block = CategoryBlock().fit([True, False, True])
    assert block.vocab == (False, True) and block.index(np.bool_(True)) == 1
    with pytest.raises(DataError, match="'True'"): block.index('True')

def test_an_unhashable_label_is_a_clear_error():
    with pytest.raises(DataError, match='one label'): CategoryBlock().fit([['a'], ['b']])
    with pytest.raises(DataError): CategoryBlock().fit('ab').index(['a'])

def test_decode_from_index_and_probabilities():
    block = CategoryBlock().fit('abc')
    assert block.decode(2) == block.decode(torch.tensor(2)) == block.decode(torch.tensor([.1, .2, .7])) == 'c'

def test_a_model_with_the_wrong_number_of_outputs_is_told_so():
    with pytest.raises(DataError, match='3 outputs for 2 classes'): CategoryBlock().fit('ab').loss(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))

def test_loss_of_bfloat16_logits_is_computed_in_32_bits():
    block, logits, y = CategoryBlock().fit('ab'), torch.tensor([[1.3, -.7]]), torch.tensor([1])
    assert block.loss(logits.bfloat16(), y).dtype == torch.float32
