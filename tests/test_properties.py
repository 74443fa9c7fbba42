"""What must hold for every picture, target and transform: more than 2,000 drawn examples."""
import io

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from blocks import (BBoxBlock, CategoryBlock, CropPad, DataError, GroupSplitter, ImageBlock, KFoldSplitter, MaskBlock, MultiCategoryBlock, PointBlock, RandomCrop, RandomErasing,
                    RandomResizedCrop, RandomResizedCropGPU, RandomSplitter, RatioResize, RegressionBlock, Resize, StratifiedSplitter, TrivialAugmentWide, aug_transforms)
from blocks.core import stream
from blocks.data.augment import apply_batch_tfms
from blocks.data.loader import Samples
from blocks.data.source import check_split

pytestmark = pytest.mark.slow

def examples(n): return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# --- what is drawn
MODES = ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F']
FORMATS = {'1': ['PNG', 'TIFF'], 'L': ['PNG', 'JPEG', 'TIFF', 'WEBP'], 'LA': ['PNG', 'TIFF'], 'P': ['PNG', 'GIF', 'TIFF'], 'RGB': ['PNG', 'JPEG', 'TIFF', 'WEBP', 'BMP'], 'RGBA': ['PNG', 'WEBP', 'TIFF'],
           'CMYK': ['JPEG', 'TIFF'], 'I;16': ['PNG', 'TIFF'], 'I': ['TIFF'], 'F': ['TIFF']}

def picture(mode, width, height, seed):
    "A smooth random picture of `mode`"
    small = np.random.default_rng(seed).integers(0, 256, (max(1, height//4), max(1, width//4), 3), dtype=np.uint8)
    rgb = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
    grey = np.asarray(rgb.convert('L'))
    if mode == 'I;16': return Image.fromarray(grey.astype(np.uint16)*257)
    if mode == 'I': return Image.fromarray(grey.astype(np.int32)*257)
    if mode == 'F': return Image.fromarray(grey.astype(np.float32)/255)
    return rgb.convert(mode)

@st.composite
def files(draw):
    "(bytes of a picture file, its upright (width, height))"
    mode, w, h, seed = draw(st.sampled_from(MODES)), draw(st.integers(1, 60)), draw(st.integers(1, 60)), draw(st.integers(0, 99))
    kind, o = draw(st.sampled_from(FORMATS[mode])), draw(st.integers(1, 8))
    im, out = picture(mode, w, h, seed), io.BytesIO()
    extra = {}
    if kind in ('JPEG', 'PNG', 'WEBP'):
        exif = Image.Exif(); exif[0x0112] = o
        extra = dict(exif=exif)
    else: o = 1
    im.save(out, kind, **extra)
    return out.getvalue(), (h, w) if o >= 5 else (w, h)

sizes = st.tuples(st.integers(2, 40), st.integers(2, 40))
modes = st.sampled_from(['zeros', 'border', 'reflection'])
geometries = st.one_of(
    st.builds(lambda s, m, p: [Resize(s, method=m, pad_mode=p)], sizes, st.sampled_from(['crop', 'pad', 'squish']), modes),
    st.builds(lambda s, m: [RandomResizedCrop(s, min_scale=m)], sizes, st.sampled_from([.05, .3, 1.])),
    st.builds(lambda s: [RandomCrop(s)], sizes), st.builds(lambda s, p: [CropPad(s, pad_mode=p)], sizes, modes),
    st.builds(lambda m, s: [RatioResize(m), Resize(s)], st.integers(4, 60), sizes), st.builds(lambda a, s: [Resize(a, method='pad'), RandomResizedCrop(s)], sizes, sizes))
augments = st.one_of(
    st.just([]), st.builds(lambda f, p, s: aug_transforms(flip_vert=f, pad_mode=p, p_affine=1., p_lighting=1., size=s), st.booleans(), modes, st.one_of(st.none(), sizes)),
    st.builds(lambda r, w: aug_transforms(max_rotate=r, max_warp=w, min_zoom=.5, max_zoom=2., p_affine=1.), st.floats(0, 180), st.floats(0, .9)),
    st.builds(lambda s: [RandomResizedCropGPU(s, min_scale=.2)], sizes), st.just([TrivialAugmentWide()]), st.just([RandomErasing(p=1.)]))

def run(samples, tfms, train, n=2):
    "A prepared batch of `samples`, as a loader makes it"
    batch = samples.collate([samples.read(i % len(samples), i) for i in range(n)])
    return [b.prepare(o) for b, o in zip(samples.blocks, apply_batch_tfms(tfms, batch, stream(5), train))]

@examples(700)
@given(files(), geometries, augments, st.booleans(), st.sampled_from(['RGB', 'L', 'RGBA']))
def test_any_picture_through_any_transform_is_a_float_batch_of_the_asked_size(file, geometry, tfms, train, mode):
    raw, (w, h) = file
    samples = Samples(([raw],), (ImageBlock(mode=mode),), tuple(geometry), train=train, seed=3)
    x, = run(samples, tfms, train)
    asked = next((t.size for t in tfms if getattr(t, 'size', None)), None) or geometry[-1].size
    assert x.shape == (2, dict(RGB=3, L=1, RGBA=4)[mode], *asked) and x.dtype == torch.float32 and torch.isfinite(x).all() and x.min() >= 0 and x.max() <= 1
    assert torch.equal(x, run(samples, tfms, train)[0])                                                # the same draw gives the same
    if not train: assert torch.equal(x[0], x[1])

@examples(500)
@given(st.integers(3, 50), st.integers(3, 50), geometries, augments, st.booleans(), st.data())
def test_masks_points_and_boxes_stay_what_they_are(w, h, geometry, tfms, train, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask, k = rng.integers(0, 4, (h, w)).astype(np.uint8), data.draw(st.integers(0, 4))
    points = [[float(rng.uniform(0, w)), float(rng.uniform(0, h))] for _ in range(3)]
    corners = [(rng.uniform(0, w*.8), rng.uniform(0, h*.8)) for _ in range(k)]
    boxes = [[x, y, float(rng.uniform(x+.1, w)), float(rng.uniform(y+.1, h))] for x, y in corners]
    raws = ([picture('RGB', w, h, 1)], [mask], [points], [(boxes, ['b', 'a', 'b', 'a'][:k])])
    blocks = (ImageBlock(), MaskBlock(codes=list('abcd')), PointBlock().fit([points]), BBoxBlock(vocab=['a', 'b']))
    x, m, p, b = run(Samples(raws, blocks, tuple(geometry), train=train, seed=3), tfms, train)
    assert m.shape == (2, *x.shape[2:]) and m.dtype == torch.int64 and set(m.unique().tolist()) <= {0, 1, 2, 3}
    assert p.shape == (2, 3, 2) and p.dtype == torch.float32 and torch.isfinite(p).all()
    there = b[..., 4] >= 0
    assert b.shape[0] == 2 and b.shape[2] == 5 and b.shape[1] <= max(k, 1)
    assert set(b[..., 4].unique().tolist()) <= {-1., 0., 1.} and (b[~there][:, :4] == 0).all()
    assert (b[there][:, 2:4] > b[there][:, :2]).all() and b[there][:, :4].abs().le(1 + 1e-5).all()

# --- a shape that is drawn is found again
@examples(400)
@given(st.integers(48, 80), st.integers(48, 80), st.tuples(st.floats(.3, .7), st.floats(.3, .7)), st.data())
def test_a_drawn_square_is_where_mask_point_and_box_say(w, h, place, data):
    geometry = data.draw(st.sampled_from([(Resize(64),), (Resize(64, method='squish'),), (Resize(64, method='pad', pad_mode='zeros'),), (RandomResizedCrop(64, min_scale=.6),), (CropPad(72),)]))
    tfms = data.draw(st.sampled_from([[], aug_transforms(flip_vert=True, max_rotate=40., p_affine=1., p_lighting=0., max_warp=.2, pad_mode='zeros'), aug_transforms(max_zoom=1.3, max_rotate=0, max_warp=0, p_affine=1., p_lighting=0.)]))
    x0, y0 = int(place[0]*w) - 6, int(place[1]*h) - 6
    a = np.zeros((h, w, 3), np.uint8); a[y0:y0+12, x0:x0+12] = 255
    raws = ([a], [(a[..., 0] > 0).astype(np.uint8)], [[[x0+6., y0+6.]]], [([[x0, y0, x0+12, y0+12]], ['s'])])
    blocks = (ImageBlock(), MaskBlock(codes=['bg', 'square']), PointBlock(n_points=1), BBoxBlock(vocab=['s']))
    x, m, p, b = run(Samples(raws, blocks, geometry, train=True, seed=data.draw(st.integers(0, 50))), tfms, True)
    for i in range(2):
        on = x[i].mean(0) > .5
        edge = torch.cat([on[0], on[-1], on[:, 0], on[:, -1]]).any()
        if edge or on.sum() < 30: continue                                                              # cut by the border: its middle is elsewhere
        rows, cols = torch.nonzero(on, as_tuple=True)
        n = torch.tensor([on.shape[1], on.shape[0]])
        middle = (torch.stack([cols.float().mean(), rows.float().mean()]) + .5)/n*2 - 1
        assert ((m[i] > 0) == on).float().mean() > .97
        assert (p[i, 0] - middle).abs().max() < .05
        assert b[i, 0, 4] == 0 and (b[i, 0, :4].view(2, 2).mean(0) - middle).abs().max() < .06
        seen = torch.stack([cols.min(), rows.min(), cols.max()+1, rows.max()+1])/n.repeat(2)*2 - 1
        assert (b[i, 0, :2] <= seen[:2] + .05).all() and (b[i, 0, 2:4] >= seen[2:] - .05).all()         # the box holds the square

# --- encode, then decode
labels = st.one_of(st.text(min_size=1, max_size=6), st.integers(-99, 99))

@examples(250)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=12))
def test_a_label_comes_back_from_its_number(raws):
    block = CategoryBlock().fit(raws)
    assert [block.decode(block.read(o, None)) for o in raws] == raws and list(block.vocab) == sorted(set(raws))

@examples(250)
@given(st.lists(st.sets(st.integers(0, 9), max_size=5), min_size=1, max_size=8).filter(lambda o: any(o)))
def test_labels_come_back_from_their_row(raws):
    block = MultiCategoryBlock().fit([list(o) for o in raws])
    for o in raws:
        row = block.read(list(o), None)
        assert set(block.decode(row)) == o and row.dtype == torch.float32 and row.shape == (len(block.vocab),)

@examples(100)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6))
def test_numbers_come_back(raws):
    block = RegressionBlock().fit(raws)
    assert [block.decode(block.read(o, None)) for o in raws] == pytest.approx(raws)

# --- splits are disjoint and complete
@examples(250)
@given(st.integers(10, 200), st.floats(.1, .5), st.integers(0, 99), st.sampled_from(['random', 'stratified', 'groups', 'folds']))
def test_a_split_has_each_item_once(n, pct, seed, kind):
    items, groups = list(range(n)), [i % 5 for i in range(n)]
    splitter = dict(random=lambda: RandomSplitter(pct, seed, test_pct=.2), stratified=lambda: StratifiedSplitter(max(pct, .3), seed), groups=lambda: GroupSplitter(groups, pct, seed),
                    folds=lambda: KFoldSplitter(seed % 3, n_folds=3, seed=seed))[kind]()
    parts = check_split(splitter(items, [i % 2 for i in items]) if getattr(splitter, 'needs_labels', False) else splitter(items), n)
    assert sorted(i for part in parts for i in part) == items
    if kind == 'groups': assert not {groups[i] for i in parts[0]} & {groups[i] for i in parts[1]}

def test_the_examples_are_refused_for_what_is_no_picture():
    with pytest.raises(Exception) as e: Samples(([b'no picture'],), (ImageBlock(),))[0]
    assert isinstance(e.value, DataError)
