import pytest

from blocks import DataError, Frame, RandomResizedCrop, Resize
from blocks.core import stream
from blocks.data.frame import FrameDraw


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
                                  lambda: RandomResizedCrop(8, ratio=(2, 1)), lambda: RandomResizedCrop(8, val_xtra=-1)])
def test_impossible_values_are_refused_at_once(make):
    with pytest.raises(DataError): make()
