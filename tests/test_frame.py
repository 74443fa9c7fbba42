import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blocks import DataError, Frame, RandomResizedCrop, Resize
from blocks.core import stream
from blocks.data.frame import PAD_MODES, CropPad, FrameDraw, RandomCrop, RatioResize


@pytest.mark.parametrize('w,h', [(300, 200), (200, 300), (1, 1), (5000, 3), (224, 224)])
@pytest.mark.parametrize('method', ['crop', 'pad', 'squish'])
@pytest.mark.parametrize('size', [64, (32, 96)])
def test_resize_gives_its_size_and_the_right_side_of_the_picture(w, h, method, size):
    for rng in (None, stream(1)):
        f = Resize(size, method).draw(w, h, rng)
        l, t, r, b = f.box
        assert f.size == ((64, 64) if size == 64 else size) and r > l and b > t
        if method == 'crop': assert l >= 0 and t >= 0 and r <= w and b <= h
        if method == 'pad': assert r-l >= w-1 and b-t >= h-1
        if method == 'squish': assert f.box == (0, 0, w, h)

def test_crop_and_pad_keep_proportions():
    for method in ('crop', 'pad'):
        sx, sy = Resize((100, 150), method).draw(640, 480).scale
        assert abs(sx/sy - 1) < .02

def test_without_a_generator_nothing_is_random():
    for g in (Resize(32), RandomResizedCrop(32)): assert g.draw(300, 200) == g.draw(300, 200)

def test_then_is_one_frame_through_another():
    outer, inner = Frame((10, 20, 110, 220), (100, 50)), Frame((5, 10, 25, 30), (64, 64))
    assert outer.then(inner) == Frame((20, 40, 60, 80), (64, 64))

def test_padding_of_the_first_transform_is_kept():
    frame = FrameDraw([Resize(100, 'pad', 'zeros'), RandomResizedCrop(50)])(200, 100)
    assert frame.pad_mode == 'zeros' and frame.size == (50, 50)

def test_fields_of_one_sample_share_a_frame_and_others_draw_the_same_numbers():
    draw = FrameDraw([RandomResizedCrop(32)], lambda: stream(3))
    a = draw(100, 80)
    b = draw(200, 160)
    assert draw(100, 80) is a
    assert all(abs(2*x - y) <= 2 for x, y in zip(a.box, b.box))        # the same part of a picture of twice the size

@pytest.mark.parametrize('make', [lambda: Resize(-1), lambda: Resize(1.5), lambda: Resize(8, pad_mode='mirror'), lambda: RandomResizedCrop(8, min_scale=0),
                                  lambda: RandomResizedCrop(8, ratio=(2, 1)), lambda: RandomResizedCrop(8, val_xtra=-1),
                                  lambda: RandomCrop(0), lambda: CropPad(8, 'mirror'), lambda: RatioResize(0), lambda: RatioResize((8, 8)), lambda: RatioResize(8).resized('8')])
def test_impossible_values_are_refused_at_once(make):
    with pytest.raises(DataError): make()

# --- properties of every geometry
SIDE = st.integers(1, 400)
SIZE = st.one_of(st.integers(1, 150), st.tuples(st.integers(1, 150), st.integers(1, 150)))
PADS = st.sampled_from(PAD_MODES)
GEOMETRY = st.one_of(
    st.builds(Resize, SIZE, st.sampled_from(['crop', 'pad', 'squish']), PADS), st.builds(RandomResizedCrop, SIZE, st.floats(.05, 1), val_xtra=st.floats(0, .5)),
    st.builds(RandomCrop, SIZE, PADS), st.builds(CropPad, SIZE, PADS), st.builds(RatioResize, st.integers(1, 150)))

@settings(deadline=None, derandomize=True)
@given(GEOMETRY, SIDE, SIDE, st.integers(0, 2**32))
def test_every_frame_has_its_size_and_a_sound_box(g, w, h, seed):
    for rng in (None, stream(seed)):
        f = g.draw(w, h, rng)
        l, t, r, b = f.box
        assert all(math.isfinite(o) for o in f.box) and l < r and t < b
        if isinstance(g, RatioResize):
            assert max(f.size) == g.max_sz and min(f.size) >= 1 and f.box == (0, 0, w, h)
            if min(f.size) > 1: assert abs(f.size[1]/f.size[0] - w/h) <= w/h*2/min(f.size)
        else: assert f.size == g.size
        crops = isinstance(g, (RandomResizedCrop, RatioResize)) or (isinstance(g, Resize) and g.method != 'pad') or (isinstance(g, CropPad) and g.size[0] <= h and g.size[1] <= w)
        if crops: assert l >= -1e-9 and t >= -1e-9 and r <= w + 1e-9 and b <= h + 1e-9
        if isinstance(g, CropPad):                                            # scale stays, and either the picture holds the box or the box holds the picture
            assert f.scale == (1, 1)
            for lo, hi, full in ((l, r, w), (t, b, h)): assert (lo >= 0 and hi <= full) if hi-lo <= full else (lo <= 0 and hi >= full)

@settings(deadline=None, derandomize=True)
@given(GEOMETRY, SIDE, SIDE, st.integers(0, 2**32))
def test_the_same_generator_gives_the_same_frame_and_none_gives_the_centre(g, w, h, seed):
    assert g.draw(w, h, stream(seed)) == g.draw(w, h, stream(seed)) and g.draw(w, h) == g.draw(w, h)
    (l, t, r, b), slack = g.draw(w, h).box, 1.5
    assert abs((l+r)/2 - w/2) <= slack and abs((t+b)/2 - h/2) <= slack

@pytest.mark.parametrize('g', [Resize(32), Resize(32, 'pad'), RandomResizedCrop(32), RandomCrop(32), RandomCrop(500)])
def test_training_draws_differ(g): assert len({g.draw(300, 200, stream(i)).box for i in range(20)}) > 10

@settings(deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_pixels_stay_square_where_proportions_are_equal(w, h, num, den):
    for method in ('crop', 'pad', 'squish'):
        sx, sy = Resize((h*num, w*num), method).draw(w*den, h*den).scale
        assert abs(sx/sy - 1) < 1e-6

def test_a_random_crop_reaches_every_place_evenly():
    lefts = [RandomCrop(8).draw(10, 8, stream(i)).box[0] for i in range(600)]
    assert all(150 < lefts.count(o) < 250 for o in (0, 1, 2))
    lefts = [RandomCrop(10).draw(8, 8, stream(i)).box[0] for i in range(600)]
    assert all(150 < lefts.count(o) < 250 for o in (-2, -1, 0))                # a smaller picture lies anywhere in the result

def test_croppad_centres_as_fastai_does():
    assert CropPad(5).draw(8, 8).box == (1, 1, 6, 6) and CropPad(8).draw(5, 5).box == (-2, -2, 6, 6)
    assert CropPad(4).pad_mode == RandomCrop(4).pad_mode == 'zeros'

def test_another_size():
    assert RatioResize(100).resized(64) == RatioResize(64) and RatioResize(100).resized((32, 48)) == RatioResize(48)
    assert RandomCrop(100, 'border').resized((8, 9)) == RandomCrop((8, 9), 'border') and CropPad(3).resized(4) == CropPad(4)

# --- composition
@settings(deadline=None, derandomize=True)
@given(GEOMETRY, GEOMETRY, SIDE, SIDE, st.integers(0, 2**32))
def test_a_chain_maps_places_as_its_parts_do(g1, g2, w, h, seed):
    a = g1.draw(w, h, stream(seed))
    b = g2.draw(*a.size[::-1], stream(seed, 1))
    whole = a.then(b)
    assert whole.size == b.size
    for k, full in enumerate((w, h)):
        place = lambda f, x: f.box[k] + x*f.scale[k]                          # of a result pixel in the source
        for x in (0, b.size[1-k]/3, b.size[1-k]): assert abs(place(whole, x) - place(a, place(b, x))) < 1e-6*(full+100)

def test_the_one_that_pads_says_how():
    box = lambda *gs: FrameDraw(gs)(200, 100)
    assert box(Resize(64), CropPad(80, 'zeros')).pad_mode == box(RatioResize(64), CropPad(64, 'zeros')).pad_mode == 'zeros'
    assert box(CropPad(300, 'border'), RandomCrop(200, 'zeros')).pad_mode == 'border'       # the second stays inside of the first

# --- reading
@settings(deadline=None, derandomize=True)
@given(st.integers(-60, 60), st.integers(1, 90), st.integers(1, 30), PADS)
def test_padding_rows_is_what_numpy_does(lo, n, full, mode):
    (_, top, _, bottom), (k, _), rows, cols = Frame((0, lo, 5, lo+n), (n, 5), mode).inside(5, full)
    assert cols is None and 0 <= top < bottom <= full
    shown = np.arange(n) if rows is None else rows
    shown = np.where(shown < 0, -1, shown + top)
    if rows is not None: assert bottom-top == k and shown.max() < bottom
    far = 300
    want = np.arange(full)
    want = np.pad(want, far, constant_values=-1) if mode == 'zeros' else np.pad(want, far, dict(border='edge', reflection='reflect')[mode])
    assert (shown == want[far+lo:far+lo+n]).all()

@settings(deadline=None, derandomize=True)
@given(st.floats(-500, 500), st.floats(.01, 900), st.integers(1, 50), st.integers(1, 50), PADS)
def test_what_is_read_lies_inside_whatever_the_frame(lo, length, n, full, mode):
    (l, _, r, _), (_, k), _, cols = Frame((lo, 0, lo+length, 3), (3, n), mode).inside(full, 3)
    assert 0 <= l < r <= full and k >= 1
    if cols is None: assert k == n
    else: assert len(cols) == n and cols.max() < k and cols.min() >= (-1 if mode == 'zeros' else 0)
    if mode == 'zeros' and (lo >= full or lo+length <= 0): assert (cols == -1).all()

@settings(deadline=None, derandomize=True)
@given(st.floats(-50, 50), st.floats(1, 100), st.integers(1, 40), st.integers(1, 50), PADS)
def test_a_mirrored_picture_is_read_and_padded_mirrored(lo, length, n, full, mode):
    if full*n < 2*length: return                                               # a picture of about one pixel may be on either side of a line
    (l, _, r, _), (_, k), _, cols = Frame((lo, 0, lo+length, 3), (3, n), mode).inside(full, 3)
    (l2, _, r2, _), (_, k2), _, cols2 = Frame((full-lo-length, 0, full-lo, 3), (3, n), mode).inside(full, 3)
    if k != k2 or (cols is None) != (cols2 is None): return                    # half a pixel, rounded after other sums
    assert abs(l2 - (full-r)) < 1e-6 and abs(r2 - (full-l)) < 1e-6
    if cols is not None: assert (np.where(cols2 < 0, -1, k-1-cols2)[::-1] == cols).all()
