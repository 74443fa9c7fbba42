"Batch transforms: what must hold for every draw, every layout, every bad value"
import json
import pickle
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision import transforms as v1
from torchvision.transforms import v2

from blocks.core import DataError, stream
from blocks.data import augment as A
from blocks.data.augment import (
    Brightness,
    Contrast,
    Dihedral,
    Flip,
    GeometricTfm,
    Hue,
    Normalize,
    PixelTfm,
    RandomErasing,
    RandomResizedCropGPU,
    Rotate,
    Saturation,
    Warp,
    Zoom,
    apply_batch_tfms,
    aug_transforms,
    check_batch_tfms,
    cifar_stats,
    imagenet_stats,
    mnist_stats,
)
from blocks.data.place import Boxes, Points
from blocks.data.policy import RandAugment, TrivialAugmentWide
from blocks.data.sound_mask import TimeMask

EVERY = [Flip(), Dihedral(), Rotate(), Zoom(), Warp(), RandomResizedCropGPU(24), Brightness(), Contrast(), Saturation(), Hue(), RandomErasing()]

def noise(n=8, c=3, h=21, w=17, seed=0, dtype=torch.uint8):
    "Random pixels: nothing survives a resample unnoticed"
    x = torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    x = x if dtype == torch.uint8 else x.to(dtype)/255
    return tv_tensors.Image(x.contiguous(memory_format=torch.channels_last))

def smooth(n=1, h=64, w=64, seed=0):
    x = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return tv_tensors.Image(F.interpolate(x, size=(h, w), mode='bicubic', align_corners=False).clamp(0, 1))

def unit(x): return x.as_subclass(torch.Tensor).float()/255
def plain(x): return unit(x) if isinstance(x, tv_tensors.Image) and x.dtype == torch.uint8 else x.as_subclass(torch.Tensor)      # flips alone leave bytes as they are
def apply(tfms, x, seed=0, **kw): return apply_batch_tfms(tfms, (x,), stream(seed, 'batch'), **kw)[0]

# ---- what is exact ----------------------------------------------------------------------------------------------
def test_flip_is_exact_and_leaves_its_input():
    x = noise(); before = x.clone(); out = apply([Flip(p=1.)], x)
    assert torch.equal(plain(out), unit(x).flip(-1)) and torch.equal(x, before)

def test_two_flips_are_the_identity():
    x = noise(); assert torch.equal(plain(apply([Flip(p=1.), Flip(p=1.)], x)), unit(x))

def test_dihedral_on_squares_is_one_of_eight_exactly():
    x = noise(64, h=15, w=15); out = plain(apply([Dihedral(p=1.)], x))
    ways = torch.stack([t for f in (unit(x), unit(x).flip(-1)) for k in range(4) for t in [f.rot90(k, (-2, -1))]])
    hits = (ways == out).flatten(2).all(-1)                                                     # (8, 64)
    assert hits.any(0).all() and hits.any(1).all()                                              # each image is one of them, each of them occurs

def test_images_that_drew_nothing_come_back_bit_for_bit():
    x = noise(64)
    for t in (Rotate(30), Zoom(1.2, 1.5), Warp(p=.3), Brightness(.5), Contrast(.5), Saturation(.5), Hue(.3), RandomErasing()):
        same = (plain(apply([t], x)) == unit(x)).flatten(1).all(1)
        assert 0 < same.sum() < 64, t

def test_p_0_is_the_identity():
    x = noise()
    tfms = [Flip(0.), Dihedral(0.), Rotate(p=0.), Zoom(p=0.), Warp(p=0.), Brightness(p=0.), Contrast(p=0.), Saturation(p=0.), Hue(p=0.), RandomErasing(p=0.)]
    assert torch.equal(plain(apply(tfms, x)), unit(x))

def test_share_of_changed_images_is_p():
    x = noise(2000, 1, 4, 4); changed = (plain(apply([Flip(.3)], x)) != unit(x)).flatten(1).any(1).float().mean()
    assert abs(changed - .3) < .05

# ---- geometry ---------------------------------------------------------------------------------------------------
def test_composition_is_the_sequence():
    x, tfms = smooth(4), [Rotate(20, p=1.), Zoom(1.1, 1.4, p=1.), Warp(.2, p=1.), Flip(p=1.)]
    rng, steps = stream(0, 'batch'), x
    for t in tfms: steps = apply_batch_tfms([t], (steps,), rng)[0]
    assert (plain(apply(tfms, x)) - plain(steps))[..., 12:-12, 12:-12].abs().max() < .03

@dataclass(frozen=True, repr=False)
class By(GeometricTfm):
    "A rotation by exactly `deg`"
    deg: float = 90.
    def matrices(self, rng, n, h, w):
        m = np.eye(3)[None].repeat(n, 0); c, s = np.cos(np.deg2rad(self.deg)), np.sin(np.deg2rad(self.deg))
        m[:, :2, :2] = [[c, s*h/w], [-s*w/h, c]]
        return m

def test_rotation_has_the_stated_angles(monkeypatch):
    x = noise(h=20, w=20)
    assert (plain(apply([By(deg=90.)], x)) - unit(x).rot90(-1, (-2, -1))).abs().max() < 1e-3
    monkeypatch.setattr(Rotate, '_uniform', lambda self, rng, n, low, high, neutral: np.full(n, high))
    assert (plain(apply([Rotate(90)], x)) - plain(apply([By(deg=90.)], x))).abs().max() < 1e-5
    assert (plain(apply([Rotate(25)], x)) - plain(apply([By(deg=25.)], x))).abs().max() < 1e-5

@pytest.mark.parametrize('angle', [30, 45, 80])
def test_rotation_does_not_shear_an_image_that_is_not_square(angle, monkeypatch):
    h, w = 60, 100
    yy, xx = np.mgrid[:h, :w]; disc = ((yy-29.5)**2 + (xx-49.5)**2 < 20**2)*255
    x = tv_tensors.Image(torch.as_tensor(disc, dtype=torch.uint8)[None, None].repeat(1, 3, 1, 1))
    monkeypatch.setattr(Rotate, '_uniform', lambda self, rng, n, low, high, neutral: np.full(n, high))
    out = plain(apply([Rotate(angle, pad_mode='zeros')], x))
    assert (out - unit(x)).abs().mean() < .01                                                    # a disc stays the same disc

def test_quarter_turns_of_images_that_are_not_square_are_turns_in_pixels():
    x = smooth(16, 24, 40); out = plain(apply([Dihedral(p=1., pad_mode='zeros')], x)); mid = plain(x)[..., 8:32]
    assert out.shape == x.shape
    ways = [t for f in (mid, mid.flip(-1)) for k in (1, 3) for t in [f.rot90(k, (-2, -1))]] + [mid, mid.flip(-1), mid.flip(-2), mid.flip(-1, -2)]
    assert (torch.stack([(o - out[..., 8:32]).abs().flatten(1).amax(1) for o in ways]).amin(0) < 1e-4).all()

def test_zoom_stays_inside_and_has_its_factor():
    m = Zoom(1.2, 1.5, p=1.).matrices(stream(0), 500, 10, 10)
    assert (1/m[:, 0, 0]).min() >= 1.2 and (1/m[:, 0, 0]).max() <= 1.5 and (m[:, 0, 0] == m[:, 1, 1]).all()
    assert (abs(m[:, :2, 2]).T + m[:, 0, 0]).max() <= 1 + 1e-12 and np.ptp(m[:, 0, 2]) > .2

@pytest.mark.parametrize('magnitude', [.2, .5, .99])
def test_warp_never_reaches_the_horizon(magnitude):
    m = Warp(magnitude, p=1.).matrices(stream(1), 5000, 32, 32)
    assert (1 - abs(m[:, 2, 0]) - abs(m[:, 2, 1])).min() >= .2 - 1e-9
    out = plain(apply([Warp(magnitude, p=1.), Rotate(45, p=1.), Zoom(.5, .5, p=1.)], noise(64)))
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1

def test_warp_moves_the_corners_by_its_draw():
    m = Warp(.3, p=1.).matrices(stream(1), 200, 32, 32)
    corners = np.array([[x, y, 1] for x in (-1, 1) for y in (-1, 1)])@m.transpose(0, 2, 1)
    moved = abs(corners[..., :2]/corners[..., 2:] - np.array([[x, y] for x in (-1, 1) for y in (-1, 1)]))
    assert .25 < moved.max() <= .3 + 1e-9 and np.ptp(moved, axis=1).max() < 1e-9

@pytest.mark.parametrize('mode,edge', [('zeros', 0.), ('border', 1.)])
def test_pad_mode_fills_what_lies_outside(mode, edge):
    x = tv_tensors.Image(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8))
    assert (plain(apply([Flip(), Zoom(.5, .5, p=1., pad_mode=mode)], x)).amin((1, 2, 3)) == edge).all()

def test_shrinking_averages():
    checks = tv_tensors.Image((torch.arange(64)[:, None] + torch.arange(64) & 1).mul(255).to(torch.uint8)[None, None].repeat(2, 3, 1, 1))
    out = plain(apply(aug_transforms(size=12, p_lighting=0.), checks))
    assert out.shape[-2:] == (12, 12) and (out - .5).abs().max() < .2

def test_a_close_crop_is_not_averaged_before_it_is_enlarged():
    m = np.stack([np.eye(3), np.diag([.5, .5, 1.]), np.diag([.25, .25, 1.]), np.diag([.1, .1, 1.])])
    assert A._reduction(m, (64, 64), (16, 16)).tolist() == [4, 2, 1, 1]

def test_an_image_does_not_depend_on_its_neighbours():
    x = noise(12, h=60, w=60); g = A._draw_geometry([RandomResizedCropGPU(16, min_scale=.05), Rotate(p=.5)], stream(0), 12, (60, 60))
    alone = [A._resample(tv_tensors.Image(x[i:i+1]), A._Geometry(g.matrix[i:i+1], g.size, g.mode, g.pad_mode)) for i in range(12)]
    assert torch.equal(torch.cat([plain(o) for o in alone]), plain(A._resample(x, g)))

def test_crop_stays_inside_with_its_area_and_ratio():
    h, w = 40, 60; m = RandomResizedCropGPU(24, min_scale=.2).matrices(stream(0), 2000, h, w)
    sx, sy = m[:, 0, 0], m[:, 1, 1]
    assert (sx + abs(m[:, 0, 2])).max() <= 1 + 1e-9 and (sy + abs(m[:, 1, 2])).max() <= 1 + 1e-9
    assert .2 - 1e-9 <= (sx*sy).min() < .25 and (sx*w/(sy*h)).min() >= .75 - 1e-9 and (sx*w/(sy*h)).max() <= 4/3 + 1e-9
    assert np.ptp(sx) > .3

def test_train_and_valid_crops_agree_on_proportions():
    h, w = 40, 80; x = tv_tensors.Image((torch.arange(w).expand(2, 3, h, w)*3).to(torch.uint8))
    tfms = aug_transforms(size=20, min_scale=.5, do_flip=False, max_rotate=0, max_zoom=1, max_warp=0, p_lighting=0.)
    train, valid = apply(tfms, x), apply(tfms, x, train=False)
    assert train.shape == valid.shape == (2, 3, 20, 20)
    slope = plain(valid)[0, 0, 0].diff()[2:-2].mean()*255                                       # the middle 40 columns at half the size: 2 columns, 6 grey values
    assert abs(slope - 6) < .1

def test_one_resample_has_one_size_and_one_padding():
    for name, a, b in (('size', 32, 48), ('pad_mode', 'zeros', 'border'), ('mode', 'nearest', 'bicubic')):
        with pytest.raises(DataError, match=f'{name}='): check_batch_tfms([Rotate(**{name: a}), Flip(), Zoom(**{name: b})])
    assert apply([Rotate(size=32), Zoom(size=(32, 32))], noise()).shape[-2:] == (32, 32)

# ---- light ------------------------------------------------------------------------------------------------------
def test_light_is_the_steps_on_the_logits():
    x, tfms = noise(16, dtype=torch.float32), [Brightness(.4, p=1.), Contrast(.4, p=1.), Saturation(.4, p=1.), Brightness(.3, p=1.), Contrast(.3, p=1.)]
    x = tv_tensors.Image(plain(x).clamp(.01, .99))
    rng, steps = stream(0, 'batch'), x
    for t in tfms: steps = apply_batch_tfms([t], (steps,), rng)[0]
    assert (plain(apply(tfms, x)) - plain(steps)).abs().max() < 1e-4

def test_brightness_and_contrast_have_their_ranges():
    x = tv_tensors.Image(torch.full((3000, 1, 1, 1), .5))
    grey = plain(apply([Brightness(.4, p=1.)], x)).flatten()
    assert .3 <= grey.min() < .31 and .69 < grey.max() <= .7
    x = tv_tensors.Image(torch.full((3000, 1, 1, 1), .75)); factor = torch.logit(plain(apply([Contrast(.4, p=1.)], x)).flatten())/np.log(3)
    assert .599 < factor.min() < .62 and 1.6 < factor.max() < 1.668

def test_saturation_keeps_grey_grey_and_brightens_nothing():
    g = noise(8, 1).repeat(1, 3, 1, 1); x = tv_tensors.Image(g)
    assert (plain(apply([Saturation(.9, p=1.)], x)) - unit(x)).abs().max() < 1e-5

def test_hue_turns_the_circle():
    red = tv_tensors.Image(torch.tensor([.8, .2, .2]).view(1, 3, 1, 1).repeat(3, 1, 2, 2))
    out = A._turn_hue(plain(red), torch.tensor([1/3, 2/3, 1.]))[:, :, 0, 0]
    assert torch.allclose(out, torch.tensor([[.2, .8, .2], [.2, .2, .8], [.8, .2, .2]]), atol=1e-5)
    x = plain(noise(8, dtype=torch.float32)); there = A._turn_hue(x, torch.full((8,), .3))
    assert torch.allclose(A._turn_hue(there, torch.full((8,), -.3)), x, atol=1e-4)
    assert torch.allclose(there.amax(1), x.amax(1)) and torch.allclose(there.amin(1), x.amin(1), atol=1e-6)

@pytest.mark.parametrize('channels', [1, 2, 4])
def test_without_colour_there_is_no_hue(channels):
    x = noise(8, channels)
    assert torch.equal(plain(apply([Saturation(.5, p=1.), Hue(p=1.)], x)), unit(x))
    assert apply(EVERY, x).shape == (8, channels, 24, 24)

def test_black_and_white_stay_in_range():
    x = tv_tensors.Image(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).repeat(64, 3, 2, 1))
    out = plain(apply([Brightness(.9, p=1.), Contrast(.9, p=1.), Saturation(.9, p=1.), Hue(p=1.)], x))
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1

# ---- erasing ----------------------------------------------------------------------------------------------------
def test_erasing_has_its_area_and_count():
    boxes = RandomErasing(p=1., sl=.1, sh=.2).boxes(stream(0), 300, 50, 80)
    areas = np.array([(r.stop-r.start)*(c.stop-c.start)/4000 for _, r, c in boxes])
    assert len(boxes) == 300 and areas.max() < .22 and np.median(areas) > .1 and all(0 <= r.start and r.stop <= 50 and 0 <= c.start and c.stop <= 80 for _, r, c in boxes)
    counts = np.bincount([i for i, *_ in RandomErasing(p=1., max_count=3).boxes(stream(0), 300, 50, 80)])
    assert set(counts) == {1, 2, 3}

def test_erasing_leaves_the_callers_own_batch():
    x = noise(dtype=torch.float32); before = x.clone(); out = apply([RandomErasing(p=1.)], x)
    assert torch.equal(x, before) and not torch.equal(plain(out), plain(x))

# ---- applying ---------------------------------------------------------------------------------------------------
def test_labels_and_other_fields_pass_untouched():
    y, mask, text = torch.arange(8), torch.rand(8, 3, 21, 17), ['a']*8
    x, *rest = apply_batch_tfms(aug_transforms(), (noise(), y, mask, text), stream(0))
    assert rest[0] is y and rest[1] is mask and rest[2] is text and isinstance(x, tv_tensors.Image)
    assert apply_batch_tfms(aug_transforms(), (y, text), stream(0)) == (y, text)

class Dark(PixelTfm):
    def apply(self, x, rng): return x*0

def test_what_changes_pixels_in_place_leaves_places_alone():
    places = tv_tensors.Mask(torch.ones(8, 21, 17, dtype=torch.uint8)), torch.zeros(8, 2, 2).as_subclass(Points), torch.zeros(8, 1, 5).as_subclass(Boxes)
    x, *rest = apply_batch_tfms([Brightness(p=1.), Hue(p=1.), Dark(), lambda x: 1 - x, v2.ColorJitter(.3), RandomErasing(1.)], (noise(), *places), stream(0))
    assert all(a is b for a, b in zip(rest, places))
    x, *rest = apply_batch_tfms(aug_transforms(), (noise(), *places), None, train=False)
    assert all(a is b for a, b in zip(rest, places))                                             # validation without a size

def test_masks_follow_the_eight_turns_as_images_do():
    x = noise(64, 1, 15, 15); out, mask = apply_batch_tfms([Dihedral(1.)], (x, tv_tensors.Mask(x.as_subclass(torch.Tensor)[:, 0])), stream(0))
    assert torch.equal(unit(mask), plain(out)[:, 0]) and mask.dtype == torch.uint8

@pytest.mark.parametrize('pad_mode', ['zeros', 'border', 'reflection'])
@pytest.mark.parametrize('mode', ['nearest', 'bilinear'])
def test_a_mask_is_resampled_where_its_image_is(pad_mode, mode):
    x = tv_tensors.Image((smooth(16, 40, 56)[:, :1] > .5).float())
    tfms = [Rotate(60, 1., pad_mode=pad_mode, mode=mode), Zoom(.5, .8, 1.), Warp(.3, 1.)]
    out, mask = apply_batch_tfms(tfms, (x, tv_tensors.Mask(plain(x)[:, 0].long())), stream(0))
    same = (plain(mask) == (plain(out)[:, 0] > .5)).float().mean()
    assert same == 1 if mode == 'nearest' else same > .98

def test_two_images_of_a_sample_move_together():
    x = noise(); a, b = apply_batch_tfms([*EVERY[:-1]], (x, tv_tensors.Image(x.clone())), stream(0)); assert torch.equal(a, b)

def test_output_kind():
    out = apply(EVERY, noise(dtype=torch.float16))
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last) and out.min() >= 0 and out.max() <= 1

@pytest.mark.parametrize('tfms', [None, [], [Normalize(*imagenet_stats)]])
def test_nothing_to_do_is_nothing_done(tfms):
    x = noise(); assert apply(tfms, x) is x and x.dtype == torch.uint8

def test_valid_is_left_alone_or_resized():
    x = noise(h=40, w=40); called = []
    tfms = [*EVERY[:5], *EVERY[6:], called.append]
    assert apply_batch_tfms(tfms, (x,), None, train=False)[0] is x and not called
    out = apply_batch_tfms(aug_transforms(size=(10, 20)), (x,), None, train=False)[0]
    assert out.shape == (8, 3, 10, 20) and out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert (plain(out) - F.interpolate(unit(x), size=(10, 20), mode='bilinear', antialias=True)).abs().max() < 1e-6
    assert apply_batch_tfms(aug_transforms(size=40), (x,), None, train=False)[0] is x

def test_size_works_when_nothing_else_is_geometric():
    tfms = aug_transforms(do_flip=False, max_rotate=0, max_zoom=1., max_warp=0, size=12)
    assert apply(tfms, noise()).shape[-1] == 12 == apply(tfms, noise(), train=False).shape[-1]

def test_draws_depend_on_the_generator_alone():
    x = noise(); nchw = tv_tensors.Image(plain(x).contiguous()); floats = tv_tensors.Image(unit(x))
    state, np_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    outs = [plain(apply(EVERY, o)) for o in (x, x, nchw, floats)]
    assert torch.equal(state, torch.get_rng_state()) and (np_state == np.random.get_state()[1]).all()
    assert all((outs[0] - o).abs().max() < 1e-5 for o in outs[1:]) and torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], plain(apply(EVERY, x, seed=1)))

def test_every_image_has_its_own_draw_unless_batch_is_asked_for():
    x = tv_tensors.Image(noise(1).repeat(16, 1, 1, 1)); kw = dict(p_affine=1., p_lighting=1., size=20, min_scale=.5)
    assert len({plain(o).numpy().tobytes() for o in apply(aug_transforms(**kw), x)}) == 16
    assert len({plain(o).numpy().tobytes() for o in apply(aug_transforms(batch=True, **kw), x)}) == 1

def test_the_device_is_never_waited_for():
    "A meta tensor has no values: whatever reads one from the batch fails"
    x = tv_tensors.Image(torch.empty(8, 3, 40, 40, dtype=torch.uint8, device='meta'))
    assert apply(EVERY, x).shape == (8, 3, 24, 24) and apply(aug_transforms(), x).device.type == 'meta'
    assert apply([Flip(), Dihedral()], x).shape == x.shape

def test_ones_own_transforms():
    seen = []
    def negative(x): seen.append((type(x), x.dtype, float(x.max()) <= 1)); return 1 - x
    x = noise(); out = apply([negative, Flip(p=1.)], x)
    assert seen == [(tv_tensors.Image, torch.float32, True)] and isinstance(out, tv_tensors.Image)
    assert torch.equal(plain(out), 1 - unit(x).flip(-1))                                         # after ours, wherever it stands in the list
    assert apply([v2.RandomVerticalFlip(p=1.)], x).equal(unit(x).flip(-2))
    for bad in (lambda x: None, lambda x: x.mean(), lambda x: x[:3]):
        with pytest.raises(DataError, match='8 images'): apply([bad], x)

def test_torchvision_draws_from_the_generator_of_the_batch_and_alike_for_all_images():
    tfms, x = [v2.RandomHorizontalFlip(), v2.ColorJitter(.5, .5), v2.RandomVerticalFlip()], noise()
    before = torch.random.get_rng_state()
    draws = [apply_batch_tfms(tfms, (x, tv_tensors.Image(x.clone())), stream(s)) for s in range(8)]
    assert torch.equal(before, torch.random.get_rng_state()) and all(torch.equal(a, b) for a, b in draws)
    assert torch.equal(apply_batch_tfms(tfms, (x,), stream(0))[0], draws[0][0]) and len({float(a[0, 0, 0, 0]) for a, _ in draws}) > 4
    together = lambda own: apply_batch_tfms([own, RandomErasing(1.)], (x,), stream(0))[0]
    assert (together(lambda x: x) != together(lambda x: x + 0.)).sum() == 0                      # what follows draws the same

@pytest.mark.parametrize('place', [tv_tensors.Mask(torch.ones(8, 21, 17, dtype=torch.uint8)), torch.zeros(8, 2, 2).as_subclass(Points), torch.zeros(8, 1, 5).as_subclass(Boxes)], ids=lambda o: type(o).__name__)
def test_what_would_leave_places_behind_is_refused(place):
    for tfm in (v2.RandomHorizontalFlip(), v2.Compose([v2.GaussianBlur(3), v2.RandomRotation(9)]), v2.RandomApply([v2.CenterCrop(8)]), v1.RandomAffine(9)):
        with pytest.raises(DataError, match='behind'): apply_batch_tfms([tfm], (noise(), place), stream(0))
    if isinstance(place, tv_tensors.Mask):
        with pytest.raises(DataError, match='size'): apply_batch_tfms([lambda x: x[..., ::2]], (noise(), place), stream(0))

def test_a_single_image_is_not_a_batch():
    with pytest.raises(DataError, match='batch of images'): apply(aug_transforms(), noise()[0].as_subclass(tv_tensors.Image))

def test_lists_may_hold_lists():
    tfms = check_batch_tfms([aug_transforms(), None, (Hue(), [Normalize(*cifar_stats)])])
    assert [type(t) for t in tfms] == [Flip, Warp, Rotate, Zoom, Brightness, Contrast, Hue, Normalize]
    assert check_batch_tfms(Flip()) == [Flip()] and check_batch_tfms(None) == []

@pytest.mark.parametrize('bad', ['flip', 3, Flip, v2.RandomHorizontalFlip, v2.Normalize([.5], [.5])])
def test_what_is_no_batch_transform_is_refused(bad):
    with pytest.raises(DataError, match='batch_tfms'): check_batch_tfms([bad])

# ---- fields -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name,make', [
    ('p', lambda: Flip(p=1.1)), ('p', lambda: Hue(p=-.1)), ('p', lambda: RandomErasing(p='often')), ('p', lambda: Dihedral(p=float('nan'))),
    ('max_deg', lambda: Rotate(-1)), ('min_zoom', lambda: Zoom(0)), ('max_zoom', lambda: Zoom(1.2, 1.1)), ('magnitude', lambda: Warp(1.)),
    ('max_lighting', lambda: Brightness(-.2)), ('max_lighting', lambda: Contrast(1.)), ('max_hue', lambda: Hue(.6)),
    ('pad_mode', lambda: Rotate(pad_mode='reflect')), ('mode', lambda: Zoom(mode='cubic')), ('size', lambda: Flip(size=0)), ('size', lambda: Flip(size=(3, 4, 5))),
    ('size', lambda: Flip(size=2.5)), ('size', lambda: RandomResizedCropGPU(None)), ('ratio', lambda: RandomResizedCropGPU(8, ratio=(2, 1))),
    ('min_scale', lambda: RandomResizedCropGPU(8, min_scale=0)), ('min_scale', lambda: aug_transforms(min_scale=.5)), ('sh', lambda: RandomErasing(sl=.4, sh=.3)),
    ('max_count', lambda: RandomErasing(max_count=0)), ('std', lambda: Normalize([.5], [0.])), ('mean', lambda: Normalize([.5]*3, [.2])), ('mean', lambda: Normalize([120.], [50.]))])
def test_a_bad_value_is_refused_by_name(name, make):
    with pytest.raises(DataError, match=f'{name}='): make()

def test_misspelt_field(): pytest.raises(TypeError, Flip, probability=.5)

@pytest.mark.parametrize('t', [*EVERY, Flip(size=[8, 9]), Normalize.from_stats(*mnist_stats), Normalize(torch.tensor([.5, .4]), np.array([.2, .3]))], ids=repr)
def test_plain_data_there_and_back(t):
    assert type(t)(**json.loads(json.dumps(asdict(t)))) == t == pickle.loads(pickle.dumps(t)) and hash(t) == hash(type(t)(**asdict(t)))
    assert eval(repr(t)) == t

def test_aug_transforms_are_fastais():
    assert aug_transforms() == [Flip(.5), Warp(.2, .75), Rotate(10., .75), Zoom(1., 1.1, .75), Brightness(.2, .75), Contrast(.2, .75)]
    assert aug_transforms(2, flip_vert=True, p_affine=.5, p_lighting=1., pad_mode='zeros', xtra_tfms=[Hue()]) == [
        Dihedral(.5, pad_mode='zeros'), Warp(.4, .5, pad_mode='zeros'), Rotate(20., .5, pad_mode='zeros'), Zoom(1., 1.1, .5, pad_mode='zeros'), Brightness(.4, 1.), Contrast(.4, 1.), Hue()]
    assert aug_transforms(0, do_flip=False, max_zoom=1.) == []

def test_forgotten_parentheses_are_told_when_the_template_is_made():
    from blocks import DataBlock
    with pytest.raises(DataError, match=r'aug_transforms\(\)'): DataBlock(batch_tfms=aug_transforms)

# ---- a part of a batch ------------------------------------------------------------------------------------------
def halves(tfms, fields, cuts, seed=0):
    "The fields after `tfms`, applied to their parts between the `cuts` one by one"
    total = len(fields[0])
    parts = [apply_batch_tfms(tfms, tuple(f[a:b].as_subclass(type(f)) for f in fields), stream(seed, 'batch'), rows=(a, total)) for a, b in zip(cuts, cuts[1:])]
    return [torch.cat([plain(o) for o in p]) for p in zip(*parts)]

@pytest.mark.parametrize('tfms', [
    *[[t] for t in EVERY], aug_transforms(mult=2, flip_vert=True, batch=True), [TrivialAugmentWide()], [RandAugment(batch=True)], [TimeMask()],
    [RandomErasing(p=.8, max_count=3), RandAugment(), Hue(), TimeMask(), Flip(size=(16, 20))],
    [v2.GaussianNoise(), v2.ColorJitter(.5), v2.Resize((9, 9)), TimeMask()]], ids=lambda t: '+'.join(type(o).__name__ for o in t)[:40])
@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
def test_rows_of_a_batch_get_what_the_whole_batch_gets(tfms, layout):
    x = noise(9).contiguous(memory_format=layout).as_subclass(tv_tensors.Image)
    whole = plain(apply(tfms, x))
    for cuts in ((0, 5, 9), (0, 1, 2, 9)):
        out, = halves(tfms, (x,), cuts)
        assert out.shape == whole.shape and torch.equal(out, whole)
    if not all(getattr(t, 'batch', False) for t in tfms):
        wrong = torch.cat([plain(apply(tfms, x[a:b].as_subclass(tv_tensors.Image))) for a, b in ((0, 5), (5, 9))])
        assert (wrong - whole).abs().max() > 1e-3                                               # without rows, the second part is another

def test_parts_that_share_their_draws_draw_once_and_get_what_the_whole_batch_gets():
    x, tfms, asked = noise(9), aug_transforms(mult=2, flip_vert=True, size=(16, 20)), []
    draws = A.BatchDraws(lambda: asked.append(1) or stream(0, 'batch'))
    parts = [plain(apply_batch_tfms(tfms, (x[a:b].as_subclass(tv_tensors.Image),), draws, rows=(a, 9))[0]) for a, b in ((5, 9), (0, 2), (2, 5))]
    whole, = apply_batch_tfms(tfms, (x,), stream(0, 'batch'))
    assert torch.equal(torch.cat([parts[1], parts[2], parts[0]]), plain(whole)) and asked == [1]

def test_rows_hold_for_all_fields():
    x, mask = noise(6), tv_tensors.Mask(torch.arange(6*21*17).reshape(6, 21, 17) % 7)
    points = (torch.rand(6, 4, 2, generator=torch.Generator().manual_seed(0))*2 - 1).as_subclass(Points)
    boxes = torch.cat([plain(points)[:, :2] - .1, plain(points)[:, :2] + .1, torch.ones(6, 2, 1)], -1).as_subclass(Boxes)
    tfms, fields = [*aug_transforms(flip_vert=True, p_affine=1.), RandomErasing(), negative_noise], (x, mask, points, boxes, tv_tensors.Image(plain(x).flip(0)))
    for one, both in zip(apply_batch_tfms(tfms, fields, stream(0, 'batch')), halves(tfms, fields, (0, 2, 6))): assert torch.allclose(plain(one).float(), both.float(), atol=1e-5)

def negative_noise(x): return 1 - x*torch.rand(len(x), 1, 1, 1)

def test_all_rows_is_the_same_bit_for_bit_and_validation_has_none():
    x, tfms = noise(), [*aug_transforms(mult=2), RandomErasing(), TrivialAugmentWide(), negative_noise]
    assert torch.equal(plain(apply(tfms, x)), plain(apply(tfms, x, rows=(0, 8))))
    assert apply(tfms, x, rows=(4, 30), train=False) is x

@pytest.mark.parametrize('few', [1, 5*61*61*3, 10**9])
def test_how_many_images_are_worked_on_together_changes_no_bit(few, monkeypatch):
    x, tfms = noise(13, h=61, w=61), [*aug_transforms(mult=2, flip_vert=True), Saturation(p=.5), Hue(p=.5)]
    for t in (tfms, tfms[-4:], [Brightness(p=.5), Contrast(p=.5)], [RandomResizedCropGPU(30)]):
        before = apply(t, x)
        with monkeypatch.context() as m: m.setattr(A, '_IN_CACHE', few); assert torch.equal(apply(t, x), before)

def test_a_cpu_works_on_few_images_at_once_and_a_gpu_on_all():
    rows, threads = np.array([0, 1, 2, 3, 4, 5, 8, 9]), torch.get_num_threads()
    pixels, one = A._IN_CACHE//2, 10*A._IN_CACHE
    cover = lambda numbers: [(g.start, g.stop) for g in A._groups(rows, torch.empty(0), numbers)]
    assert sum((list(range(*g)) for g in cover(pixels)), []) == rows.tolist() and max(b - a for a, b in cover(pixels)) <= 2*threads
    assert max(b - a for a, b in cover(one)) <= threads and len(cover(1)) == 2
    whole, = A._groups(rows[:6], torch.empty(0, device='meta'), one); some, = A._groups(rows, torch.empty(0, device='meta'), one)
    assert whole == slice(0, 6) and some.shape == (8,) and not list(A._groups(rows[:0], torch.empty(0), one))

def test_all_at_once_as_on_a_gpu_gives_the_same_pictures(monkeypatch):
    x, outs = noise(13, h=61, w=61), []
    tfms = [*aug_transforms(mult=2, flip_vert=True), Saturation(p=.5), Hue(p=.5), RandomErasing()]
    light, groups = A._light_kinds, A._groups
    outs.append(plain(apply(tfms, x)))
    monkeypatch.setattr(A, '_light_kinds', lambda drawn, together: light(drawn, True))
    monkeypatch.setattr(A, '_groups', lambda rows, like, numbers: [o if isinstance(o, slice) else torch.as_tensor(rows) for o in groups(rows, torch.empty(0, device='meta'), numbers)])
    outs.append(plain(apply(tfms, x)))
    assert (outs[0] - outs[1]).abs().max() < 1e-4

def test_places_outside_and_inside_agree_with_and_without_a_perspective():
    m = np.stack([A._matrices(.9, .2, .05, -.1, .8, -.1)[0]]*2); bent = m.copy(); bent[1, 2, 0] = 1e-9       # a hair of it in another image of the batch
    a, b = (A._grid(*A._sight(o, (20, 30), torch.empty(0))) for o in (m, bent))
    assert a.shape == (2, 20, 30, 2) and torch.equal(a[0], b[0])
    x, y = (torch.arange(30)*2 + 1)/30 - 1, (torch.arange(20)*2 + 1)/20 - 1
    assert torch.allclose(a[0, :, :, 0], .9*x + .2*y[:, None] + .05, atol=1e-6) and torch.allclose(a[0, :, :, 1], -.1*x + .8*y[:, None] - .1, atol=1e-6)

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
@pytest.mark.parametrize('tfms', [[Flip()], [Brightness(), Hue(p=.5)], aug_transforms(), [Flip(0.), RandomErasing(1.)], [Contrast(0.), RandomErasing(1.)]], ids=str)
def test_no_way_writes_into_the_callers_batch(tfms, dtype):
    x = noise(dtype=dtype); before = x.clone(); out = apply(tfms, x)
    assert torch.equal(before, x); plain(out).zero_(); assert torch.equal(before, x)

@pytest.mark.parametrize('rows', [(0, 7), (1, 8), (-1, 9)])
def test_rows_that_do_not_fit(rows):
    with pytest.raises(DataError, match='rows='): apply([Flip()], noise(8), rows=rows)

# ---- grey batches: the channels are one in memory --------------------------------------------------------------
@pytest.mark.parametrize('tfms', [aug_transforms(), aug_transforms(size=14, flip_vert=True), [Flip(p=.5)], [Brightness()], [Saturation(p=1.), Hue(p=1.), Contrast()], [RandomErasing(p=1.)], [Flip(), RandomErasing(p=1.)],
                                  [RandAugment()], [v2.GaussianNoise()], [lambda x: x.mul_(.5)], [Rotate(20, p=1.), lambda x: x.mul_(.5)]], ids=lambda t: '+'.join(type(o).__name__ for o in t))
@pytest.mark.parametrize('train', [True, False])
def test_a_grey_batch_gets_what_its_three_channels_would_get(tfms, train):
    one = noise(7, c=1)
    grey, full = tv_tensors.Image(one.expand(-1, 3, -1, -1)), tv_tensors.Image(one.expand(-1, 3, -1, -1).clone(memory_format=torch.channels_last))
    before = one.clone()
    a, b = (plain(apply_batch_tfms(tfms, (x,), stream(2), train)[0]).float() for x in (grey, full))
    assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5) and torch.equal(one, before)
