"Policies: what is drawn, how each operation compares with torchvision's, and that places follow"
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from blocks.core import DataError, stream
from blocks.data.augment import Flip, GeometricTfm, Rotate, apply_batch_tfms, check_batch_tfms
from blocks.data.place import Points
from blocks.data.policy import _CHANGES, _MOVES, _OPS, _SIGNED, RandAugment, TrivialAugmentWide, _Changed, _Moved

POLICIES = [TrivialAugmentWide(), RandAugment(), RandAugment(3, 30), RandAugment(0), TrivialAugmentWide(batch=True), RandAugment(batch=True)]

def noise(n=8, c=3, h=21, w=17, seed=0): return torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
def smooth(n=1, c=3, h=40, w=56, seed=0):
    x = torch.rand(n, c, 5, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(x, size=(h, w), mode='bicubic', align_corners=False).clamp(0, 1).mul(255).round().to(torch.uint8)

def apply(tfms, x, seed=0, **kw): return apply_batch_tfms(tfms, (tv_tensors.Image(x),), stream(seed, 'batch'), **kw)[0].as_subclass(torch.Tensor)
def forced(policy, name, scale, n=1, **kw):
    op = np.full((1, n), name)
    amount = policy._amounts(op, np.full((1, n), float(scale)))
    return [_Moved(op, amount, policy._relative, pad_mode='zeros', **kw), _Changed(op, amount)]

def torchvisions(policy, name, image, magnitude):
    "What torchvision's class does with one operation"
    return policy._apply_image_or_video_transform(image, name, magnitude, interpolation=tvf.InterpolationMode.BILINEAR, fill={})

THEIRS = {TrivialAugmentWide: v2.TrivialAugmentWide(), RandAugment: v2.RandAugment()}
def their_magnitude(policy, name, level, h, w):
    levels, signed = THEIRS[type(policy)]._AUGMENTATION_SPACE[name][0](31, h, w), THEIRS[type(policy)]._AUGMENTATION_SPACE[name][1]
    return (0. if levels is None else round(float(levels[level]), 5)), signed          # the 16 pixels of level 15 are 15.999999 in their 32 bits, cut to 15

@pytest.mark.parametrize('policy', [TrivialAugmentWide(), RandAugment()], ids=['trivial', 'rand'])
@pytest.mark.parametrize('name', _OPS)
@pytest.mark.parametrize('c', [1, 3])
def test_each_operation_at_each_level_is_torchvisions(policy, name, c):
    "The scale, the sign, the direction and the values, on 8-bit images; theirs cuts fractions off, up to twice"
    x = smooth(c=c) if name in _MOVES else noise(1, c)
    h, w = x.shape[-2:]
    for level in range(0, 31, 5):
        magnitude, signed = their_magnitude(policy, name, level, h, w)
        assert signed == _SIGNED[_OPS.index(name)]
        for sign in (1, -1) if signed else (1,):
            got = apply(forced(policy, name, sign*level/30), x)*255
            want = torchvisions(THEIRS[type(policy)], name, x, sign*magnitude).float()
            if name == 'Solarize':                                                    # a pixel exactly at the threshold goes either way, by the last bit of theirs
                edge = ((255*magnitude - x).abs() < .01); got, want = got.masked_fill(edge, 0), want.masked_fill(edge, 0)
            assert (got - want).abs().max() < (.01 if name in ('Identity', 'Posterize', 'Solarize', 'Equalize') else 1. if name in _MOVES else 2.), (level, sign)

@pytest.mark.parametrize('name', ['Brightness', 'Color', 'Contrast', 'Sharpness', 'AutoContrast'])
def test_float_images_agree_closely(name):
    x = torch.rand(1, 3, 19, 23, generator=torch.Generator().manual_seed(0))
    for v in (-.99, -.3, .5, .99):
        got = apply(forced(TrivialAugmentWide(), name, v/.99), x)
        assert torch.allclose(got, torchvisions(THEIRS[TrivialAugmentWide], name, x, v), atol=3e-4), v      # their weights of grey have four digits

def test_the_names_of_the_operations_are_theirs():
    for policy, theirs in THEIRS.items(): assert tuple(theirs._AUGMENTATION_SPACE) == _OPS and set(policy._most) == set(_OPS)

# ---- what is drawn ------------------------------------------------------------------------------------------------
def test_every_operation_sign_and_level_is_drawn_evenly():
    moved, changed = TrivialAugmentWide().expand(stream(0), 28_000)
    assert np.array_equal(moved.op, changed.op) and moved.op.shape == (1, 28_000)
    counts = {o: int((moved.op == o).sum()) for o in _OPS}
    assert all(abs(n - 2000) < 200 for n in counts.values()), counts
    amount = moved.amount[moved.op == 'Rotate']
    assert abs((amount > 0).sum() - (amount < 0).sum()) < 250 and len(np.unique(amount)) == 61 and abs(amount).max() == 135
    assert set(np.unique(changed.amount[changed.op == 'Posterize'])) == set(range(7))

def test_rand_augment_draws_num_ops_at_one_strength():
    moved, _ = RandAugment(4, 15).expand(stream(0), 500)
    assert moved.op.shape == (4, 500) and set(np.unique(moved.amount[moved.op == 'Rotate'])) == {-15., 15.}
    assert not np.array_equal(moved.op[0], moved.op[1])

def test_images_of_a_batch_draw_apart_and_batch_draws_once():
    x = noise(1).repeat(32, 1, 1, 1)
    count = lambda t: len({o.numpy().tobytes() for o in apply([t], x)})
    assert count(TrivialAugmentWide()) > 15 and count(RandAugment()) > 20
    assert count(TrivialAugmentWide(batch=True)) == 1 and count(RandAugment(batch=True)) == 1

@pytest.mark.parametrize('policy', POLICIES, ids=repr)
def test_same_generator_same_pictures_and_nothing_global(policy):
    x, state, numpys = noise(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    before = x.clone()
    assert torch.equal(apply([policy], x, 3), apply([policy], x, 3)) and torch.equal(x, before)
    assert torch.equal(torch.random.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpys)

@pytest.mark.parametrize('c', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('size', [(21, 17), (1, 1), (2, 5)], ids=str)
def test_any_number_of_channels_and_any_size(c, size):
    x = noise(256, c, *size)
    for policy in POLICIES:
        out = apply([policy], x)
        assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all() and out.min() >= 0 and out.max() <= 1
        assert out.is_contiguous(memory_format=torch.channels_last)

def test_color_leaves_images_without_colour():
    x = noise(4, 4)
    assert torch.equal(apply(forced(TrivialAugmentWide(), 'Color', 1., 4), x), x.float()/255)

def test_identity_and_the_bottom_of_the_scale_are_bit_for_bit():
    x = torch.rand(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))        # not 8-bit values
    for name in ('Identity', *_MOVES, 'Brightness', 'Color', 'Contrast', 'Sharpness', 'Posterize'):
        assert torch.equal(apply(forced(TrivialAugmentWide(), name, 0., 2), x), x), name

def test_rows_keep_their_place():
    "Each image gets the operation that was drawn for it, whatever the others drew"
    x, names = noise(len(_CHANGES)), np.array([list(_CHANGES)])
    policy = TrivialAugmentWide(); amount = policy._amounts(names, np.full(names.shape, .8))
    together = _Changed(names, amount).apply(x.float()/255, None)
    for i in range(len(x)): assert torch.equal(together[i:i+1], _Changed(names[:, i:i+1], amount[:, i:i+1]).apply(x[i:i+1].float()/255, None))

def test_operations_follow_each_other():
    x = noise(3).float()/255
    names = np.array([['Contrast']*3, ['Solarize']*3]); policy = RandAugment(); amount = policy._amounts(names, np.full(names.shape, .6))
    step = lambda k, x: _Changed(names[k:k+1], amount[k:k+1]).apply(x, None)
    assert torch.equal(_Changed(names, amount).apply(x, None), step(1, step(0, x))) and not torch.equal(step(1, step(0, x)), step(0, step(1, x)))
    moves = np.array([['Rotate'], ['TranslateX']]); far = policy._amounts(moves, np.ones(moves.shape))
    x = smooth(h=48, w=48); one = lambda k: [_Moved(moves[k:k+1], far[k:k+1], True, pad_mode='zeros')]
    both = apply([_Moved(moves, far, True, pad_mode='zeros')], x)
    assert (both - apply(one(1), (apply(one(0), x)))).abs().mean() < .02 < (both - apply(one(0), (apply(one(1), x)))).abs().mean()

# ---- places follow ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('policy', [TrivialAugmentWide(pad_mode='zeros'), RandAugment(2, 20, pad_mode='zeros')], ids=['trivial', 'rand'])
def test_a_bright_dot_is_found_where_the_matrix_says(policy):
    "What masks, points and boxes are moved by is where the pixels went"
    n, h, w = 64, 60, 90
    x = torch.zeros(n, 1, h, w); x[:, :, 20:25, 60:65] = 1.
    moved = policy.expand(stream(5, 'batch'), n)[0]
    out = apply([moved], x)[:, 0]
    place = np.array([2*62.5/w - 1, 2*22.5/h - 1, 1])
    found = 0
    for m, o in zip(moved.matrices(None, n, h, w), out):
        u, v, _ = np.linalg.inv(m) @ place; u, v = (u+1)*w/2, (v+1)*h/2
        if not (6 < u < w-6 and 6 < v < h-6): continue
        ys, xs = torch.meshgrid(torch.arange(h)+.5, torch.arange(w)+.5, indexing='ij')
        assert abs(float((xs*o).sum()/o.sum()) - u) < .3 and abs(float((ys*o).sum()/o.sum()) - v) < .3
        found += 1
    assert found > 40

@pytest.mark.parametrize('policy', [TrivialAugmentWide(pad_mode='zeros'), RandAugment(2, 20, pad_mode='zeros')], ids=['trivial', 'rand'])
def test_masks_and_points_follow(policy):
    n, h, w = 128, 60, 90
    y, x = (torch.arange(h)+.5)[:, None], torch.arange(w)+.5
    disc = (((x-55)**2 + (y-25)**2) < 64).repeat(n, 1, 1)
    fields = tv_tensors.Image(disc[:, None].float()), tv_tensors.Mask(disc.to(torch.uint8)), torch.tensor([2*55/w-1, 2*25/h-1]).repeat(n, 1, 1).as_subclass(Points)
    image, mask, points = apply_batch_tfms([policy.expand(stream(2, 'batch'), n)[0]], fields, stream(0))
    image, mask, points = image.as_subclass(torch.Tensor)[:, 0], mask.as_subclass(torch.Tensor), points.as_subclass(torch.Tensor)[:, 0]
    assert mask.dtype == torch.uint8 and ((image > .5) != (mask > 0)).flatten(1).sum(1).max() <= 10      # at the rim, of about 200; a shift by one pixel would be 30
    moved = 0
    for m, (u, v) in zip(mask, (points+1)*torch.tensor([w/2, h/2])):
        if not (12 < u < w-12 and 12 < v < h-12): continue
        assert abs((m*x).sum()/m.sum() - u) < .5 and abs((m*y).sum()/m.sum() - v) < .5
        moved += bool(abs(u-55) + abs(v-25) > 3)
    assert moved > 15

def test_whole_pixels_are_whole_at_any_width():
    "150/331 of 331 pixels, at 11/30 of the scale, is 55 and not 54.999…"
    moved = forced(RandAugment(), 'TranslateX', 11/30)[0]
    assert np.isclose(moved.matrices(None, 1, 10, 331)[0, 0, 2], -2*55/331)

def test_geometry_is_one_resample_with_the_rest():
    x = smooth(n=40, h=48, w=48)
    got = apply([Flip(1.), TrivialAugmentWide(pad_mode='zeros')], x)
    moved, changed = TrivialAugmentWide(pad_mode='zeros').expand(stream(0, 'batch'), 40)
    assert torch.equal(got, apply([Flip(1.), moved, changed], x))
    still = ~np.isin(moved.op[0], _MOVES) & (moved.op[0] == 'Identity')
    assert still.any() and torch.equal(got[still], x[still].float().div(255).flip(-1))

def test_the_order_in_the_list_does_not_hide_a_policy():
    x = noise(64, h=48, w=48)
    for tfms in ([Rotate(), TrivialAugmentWide()], [TrivialAugmentWide(), Rotate()]): assert not torch.equal(apply(tfms, x), apply([Rotate()], x))

# ---- as part of a list -------------------------------------------------------------------------------------------------
def test_validation_is_left_alone_or_resized():
    x = noise()
    image = tv_tensors.Image(x)
    assert apply_batch_tfms([TrivialAugmentWide()], (image,), None, train=False)[0] is image
    for train in (True, False): assert apply([RandAugment(size=(12, 18))], x, train=train).shape[-2:] == (12, 18)

def test_settings_of_the_resample_are_shared():
    assert isinstance(TrivialAugmentWide(), GeometricTfm)
    check_batch_tfms([Rotate(pad_mode='zeros'), TrivialAugmentWide(pad_mode='zeros')])
    with pytest.raises(DataError, match='pad_mode'): check_batch_tfms([Rotate(pad_mode='border'), TrivialAugmentWide(pad_mode='zeros')])
    with pytest.raises(DataError, match='TrivialAugmentWide.*size'): TrivialAugmentWide(size='big')

@pytest.mark.parametrize('make, says', [(lambda: RandAugment(num_ops=-1), 'num_ops'), (lambda: RandAugment(magnitude=31), '0 to 30'), (lambda: RandAugment(magnitude=-1), 'magnitude'),
    (lambda: RandAugment(magnitude=4.5), 'magnitude'), (lambda: TrivialAugmentWide(1), 'num_magnitude_bins'), (lambda: TrivialAugmentWide(pad_mode='mirror'), 'mirror')])
def test_what_cannot_work_is_refused(make, says):
    with pytest.raises(DataError, match=says): make()

def test_plain_data():
    for t in POLICIES: assert pickle.loads(pickle.dumps(t)) == t and hash(t) is not None
    assert repr(RandAugment(3)) == 'RandAugment(num_ops=3, magnitude=9, num_magnitude_bins=31)' and repr(TrivialAugmentWide(pad_mode='zeros')).startswith("TrivialAugmentWide(pad_mode='zeros'")
