import gc
import multiprocessing
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from blocks import (Block, CategoryBlock, DataBlock, DataError, DeviceError, Flip, ImageBlock, ItemError, Loader, RandomResizedCrop, RandomSplitter, Resize, Samples,
                    aug_transforms, get_image_files, parent_label)
from blocks.data.loader import is_random

JITTER = [v2.ColorJitter(.4, .4), v2.RandomHorizontalFlip()]

class Noise:
    "A user's own transform that draws from all three global generators, for train unless `split_idx` says otherwise"
    def __init__(self, split_idx=0): self.split_idx = split_idx
    def __call__(self, x): return (x.float() + random.random()*9 + np.random.rand()*9 + torch.rand(())*9).clamp(0, 255).to(torch.uint8)

class Invert:
    "A user's own transform that may say for which split it is"
    def __init__(self, split_idx=None): self.split_idx = split_idx
    def __call__(self, x): return 255 - x

class Fails:
    def __call__(self, x): raise KeyError('weights')

@dataclass(frozen=True)
class Number(Block):
    "Raw numbers as tensors; notes what is read, and by which thread"
    log: object = None
    def read(self, raw, frame):
        if self.log is not None: self.log.append((raw, threading.current_thread().name))
        return torch.tensor(raw)

def numbers(n, log=None, **kw): return Loader(Samples((list(range(n)),), (Number(log),)), device='cpu', **kw)

CROP = RandomResizedCrop(16, min_scale=.3)

def build(root, tfms=(), geometry=CROP, num_workers=0, seed=7, bs=8, batch_tfms=None, **kw):
    block = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=[geometry, *tfms], batch_tfms=batch_tfms)
    return block.dataloaders(root, bs=bs, num_workers=num_workers, seed=seed, device='cpu', **kw)

def same(a, b):
    "Are two sequences of batches equal to the last bit?"
    a, b = list(a), list(b)
    return len(a) == len(b) > 0 and all(torch.equal(s, t) for x, y in zip(a, b) for s, t in zip(x, y))

def readers(): return [t for t in threading.enumerate() if t.name.startswith('blocks-read')]

def generators(): return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.random.get_rng_state().tolist()

def by_pixels(tfms, train): return Samples(([Image.new('RGB', (8, 8), (10, 20, 30))], ['a']), (ImageBlock(), CategoryBlock(vocab='ab')), (), tuple(tfms), train=train)[0][0][:, 0, 0].tolist()

def cut(path):
    "Cut the end off a PNG so that its header is still good"
    path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])

# --- the same numbers
@pytest.mark.parametrize('tfms', [[], JITTER, [Noise()]], ids=['threads', 'processes', 'own'])
def test_the_same_batches_whatever_the_workers(two_class, tfms):
    kw = dict(tfms=tfms, batch_tfms=aug_transforms(p_affine=1.))
    here, others = build(two_class, **kw), build(two_class, num_workers=2, **kw)
    for _ in range(2): assert same(here.train, others.train) and same(here.valid, others.valid)

@pytest.mark.parametrize('bs', [1, 5, 36])
@pytest.mark.parametrize('workers', [1, 3, 7])
def test_threads_keep_the_order_for_every_batch_size(bs, workers):
    got = torch.cat([x for x, in numbers(36, bs=bs, num_workers=workers)])
    assert got.tolist() == list(range(36))

def test_epochs_differ_and_every_item_comes_once_in_each(two_class):
    dls = build(two_class)
    first, second = list(dls.train), list(dls.train)
    assert not same(first, second)
    log = []
    dl = numbers(20, log, bs=4, shuffle=True, num_workers=0)
    a, b = (torch.cat([x for x, in dl]).tolist() for _ in range(2))
    assert a != b and sorted(a) == sorted(b) == list(range(20))

def test_another_seed_gives_another_order_and_other_crops(two_class):
    one, two = build(two_class, seed=1), build(two_class, seed=2)
    assert one.train.order(0).tolist() != two.train.order(0).tolist()
    assert not torch.equal(one.train_ds[0][0], two.train_ds[0][0])

def test_a_crop_depends_on_epoch_and_item_alone(two_class):
    s = build(two_class).train_ds
    assert torch.equal(s.read(3, 5)[0], s.read(3, 5)[0]) and not torch.equal(s.read(3, 5)[0], s.read(3, 6)[0])
    assert torch.equal(s[-1][0], s[len(s)-1][0])

@pytest.mark.parametrize('tfms,workers', [([], 0), ([], 2), (JITTER, 0), (JITTER, 2)])
def test_an_epoch_broken_off_does_not_change_the_next(two_class, tfms, workers):
    whole, broken = build(two_class, tfms), build(two_class, tfms, num_workers=workers)
    list(whole.train)
    list(islice(broken.train, 2))
    assert same(whole.train, broken.train)

def test_looking_does_not_change_what_training_sees(two_class):
    plain, looked = build(two_class), build(two_class)
    looked.one_batch(); looked.train.one_batch(); looked.valid.one_batch(); looked.show_batch(max_n=2); looked.show_batch(max_n=2, unique=True); looked.show_batch(max_n=1, train=False)
    assert same(plain.train, looked.train)
    looked.one_batch()
    assert same(plain.train, looked.train) and same(plain.valid, looked.valid)

def test_one_batch_is_the_first_of_the_next_epoch(two_class):
    dls = build(two_class)
    list(dls.train)
    seen = dls.train.one_batch()
    assert same([seen], islice(dls.train, 1))

def test_validation_is_the_same_each_time(two_class):
    dls = build(two_class, JITTER, batch_tfms=aug_transforms())
    assert same(dls.valid, dls.valid)

def test_two_passes_at_once_do_not_disturb_each_other():
    dl, alone = (numbers(12, bs=4, shuffle=True, num_workers=2) for _ in range(2))
    a, b = zip(*zip(dl, dl))
    assert same(a, alone) and same(b, alone)

def test_a_new_seed_for_loaders_is_a_new_seed_for_crops_too(two_class):
    assert same(build(two_class, seed=1).new(seed=2).train, build(two_class, seed=2).train)

# --- nothing is left behind
@pytest.mark.parametrize('tfms', [[], JITTER, [Noise()]], ids=['plain', 'torchvision', 'own'])
@pytest.mark.parametrize('workers', [0, 2])
def test_the_global_generators_are_untouched(two_class, tfms, workers):
    before = generators()
    dls = build(two_class, tfms, num_workers=workers, batch_tfms=aug_transforms(), seed=None)
    list(dls.train); list(islice(dls.train, 1)); dls.one_batch(); dls.train_ds[0]; dls.show_batch(max_n=2); dls.show_batch(max_n=2, unique=True)
    assert generators() == before

def test_the_global_generators_are_given_back_after_an_error(two_class):
    before = generators()
    with pytest.raises(ItemError): build(two_class, [Noise(), Fails()]).train.one_batch()
    assert generators() == before

def test_no_thread_outlives_its_pass():
    dl = numbers(40, bs=4, num_workers=3)
    it = iter(dl)
    next(it)
    assert readers()                                                    # so that the check below means something
    it.close()
    assert not readers()
    for _ in dl: break
    gc.collect()
    assert not readers()
    list(dl); dl.one_batch()
    assert not readers()

def test_no_thread_outlives_an_error():
    dl = Loader(Samples(([1, 2, 'x', *range(60)],), (Number(),)), bs=2, num_workers=2, device='cpu')
    with pytest.raises(ItemError): list(dl)
    assert not readers()

def test_no_process_outlives_a_pass_broken_off(two_class):
    dls = build(two_class, JITTER, num_workers=2, bs=4)
    it = iter(dls.train)
    next(it)
    assert multiprocessing.active_children()
    it.close()
    dls.one_batch()
    for _ in range(50):
        if not multiprocessing.active_children(): break
        time.sleep(.1)
    assert not multiprocessing.active_children()

def test_reading_ahead_is_bounded_for_a_slow_consumer():
    log = []
    it = iter(numbers(400, log, bs=4, num_workers=2))
    next(it)
    time.sleep(.2)                                                      # time enough to read everything
    assert 4 <= len(log) <= 3*4
    next(it); time.sleep(.1)
    assert len(log) <= 4*4
    it.close()

def test_one_batch_reads_one_batch():
    for workers in (0, 2):
        log = []
        numbers(400, log, bs=4, num_workers=workers).one_batch()
        assert sorted(o for o, _ in log) == [0, 1, 2, 3]

def test_threads_read_and_zero_workers_do_not():
    for workers, name in ((0, threading.current_thread().name), (2, 'blocks-read')):
        log = []
        list(numbers(8, log, bs=4, num_workers=workers))
        assert all(thread.startswith(name) for _, thread in log)

# --- faults
@pytest.mark.parametrize('tfms', [[], JITTER], ids=['threads', 'processes'])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_that_went_bad_is_named(two_class, tmp_path, tfms, workers):
    import shutil
    root = shutil.copytree(two_class, tmp_path/'d')
    dls = build(root, tfms, num_workers=workers)
    bad = dls.train_ds.fields[0][5]
    cut(bad)
    with pytest.raises(ItemError, match=bad.name) as e: list(dls.train.new(drop_last=False))
    assert e.value.stage == 'ImageBlock.read' and e.value.item == bad and 'on_bad' in str(e.value)
    bad.unlink()
    with pytest.raises(ItemError, match='check the path'): list(dls.train.new(drop_last=False))      # an epoch may leave out a few samples

@pytest.mark.parametrize('workers', [0, 2])
def test_a_failing_transform_names_stage_item_and_cause(two_class, workers):
    with pytest.raises(ItemError, match=r'item_tfms failed.*(cat|dog)_\d+\.png.*KeyError.*weights'): list(build(two_class, [Fails()], num_workers=workers).train)

@pytest.mark.parametrize('tfms', [[], [v2.RandomHorizontalFlip()]], ids=['threads', 'processes'])
@pytest.mark.parametrize('workers', [0, 2])
def test_pictures_of_different_sizes_say_what_to_add(tmp_path, tfms, workers):
    for i in range(8): Image.new('RGB', (16 + i, 16)).save(tmp_path/f'{i}.png')
    s = Samples((get_image_files(tmp_path), ['a']*8), (ImageBlock(), CategoryBlock(vocab='a')), (), tuple(tfms), train=True)
    with pytest.raises(DataError, match=r'Resize\(224\)') as e: list(Loader(s, bs=4, num_workers=workers, device='cpu'))
    assert 'worker process' not in str(e.value)                         # the same text as without processes
    assert not multiprocessing.active_children()                        # `e` holds the frames of the error, and they must not hold processes

def test_a_transform_that_gives_no_tensor_is_a_clear_error(two_class):
    with pytest.raises(DataError, match='ToPILImage|tensor'): build(two_class, [v2.ToPILImage()]).one_batch()

@pytest.mark.parametrize('kw,match', [(dict(bs=0), 'bs=0'), (dict(bs=2.5), r'bs=2\.5'), (dict(num_workers=-1), 'num_workers=-1')])
def test_sizes_and_workers_are_checked(kw, match):
    with pytest.raises(DataError, match=match): numbers(4, **kw)

def test_a_numpy_integer_is_a_batch_size():
    assert len(numbers(10, bs=np.int64(4))) == 3

def test_a_device_that_is_not_there():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(DeviceError, match='cuda'): Loader(Samples(([1],), (Number(),)), device='cuda')

def test_no_batch_to_look_at_is_said():
    with pytest.raises(DataError, match='0 samples'): numbers(0).one_batch()
    with pytest.raises(DataError, match='drop_last'): numbers(3, bs=4, drop_last=True).one_batch()

# --- batches
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('n,bs,drop_last,sizes', [(10, 4, False, [4, 4, 2]), (10, 4, True, [4, 4]), (8, 4, True, [4, 4]), (3, 4, False, [3]), (3, 4, True, []), (0, 4, False, [])])
def test_lengths(n, bs, drop_last, sizes, workers):
    dl = numbers(n, bs=bs, drop_last=drop_last, num_workers=workers)
    assert [len(x) for x, in dl] == sizes and len(dl) == len(sizes)

@pytest.mark.parametrize('tfms', [[], JITTER], ids=['threads', 'processes'])
@pytest.mark.parametrize('workers', [0, 2])
def test_bytes_and_channels_last_until_the_model(two_class, tfms, workers, monkeypatch):
    dls, seen = build(two_class, tfms, num_workers=workers), []
    augmented = Loader._augmented
    monkeypatch.setattr(Loader, '_augmented', lambda self, fields, *a: seen.append(fields) or augmented(self, fields, *a))
    x, y = next(iter(dls.train))
    raw = seen[0][0]
    assert isinstance(raw, tv_tensors.Image) and raw.dtype == torch.uint8 and raw.is_contiguous(memory_format=torch.channels_last)
    assert type(x) is type(y) is torch.Tensor and x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= x.min() and x.max() <= 1 and y.dtype == torch.int64 and y.shape == (8,)

def test_a_device_other_than_the_cpu_gets_the_batches(two_class):
    dls = build(two_class, batch_tfms=[Flip(), *aug_transforms()], bs=8).to('meta')
    x, y = next(iter(dls.train))
    assert x.device.type == y.device.type == 'meta' and x.shape == (8, 3, 16, 16)
    assert next(iter(dls.valid))[0].device.type == 'meta'

# --- which transforms apply
def test_random_transforms_act_on_train_alone():
    invert_always = v2.RandomInvert(p=1.)
    assert by_pixels([invert_always], train=True) == [245, 235, 225] and by_pixels([invert_always], train=False) == [10, 20, 30]
    assert by_pixels([v2.RandomApply([v2.RandomInvert(1.)], p=1.)], train=False) == [10, 20, 30]

def test_deterministic_transforms_act_on_both():
    for tfm in (v2.Grayscale(3), v2.Compose([v2.Grayscale(3)])): assert by_pixels([tfm], True) == by_pixels([tfm], False) != [10, 20, 30]

def test_the_deterministic_part_of_a_compose_acts_on_valid_too():
    both = v2.Compose([v2.Grayscale(3), v2.RandomInvert(1.)])
    assert by_pixels([both], False) == by_pixels([v2.Grayscale(3)], False)

def test_a_function_acts_on_both_and_may_choose_by_split_idx():
    assert by_pixels([Invert()], True) == by_pixels([Invert()], False) == [245, 235, 225]
    assert by_pixels([Invert(0)], True) == [245, 235, 225] and by_pixels([Invert(0)], False) == [10, 20, 30]
    assert by_pixels([Invert(1)], True) == [10, 20, 30] and by_pixels([Invert(1)], False) == [245, 235, 225]

def test_training_items_as_validation_sees_them_keep_its_transforms(two_class):
    block = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=lambda o: (list(range(1, len(o))), [0]), item_tfms=[Resize(16), Invert(1), *JITTER])
    dls = block.dataloaders(two_class, bs=8, num_workers=0, device='cpu')
    samples = dls.train.in_order().samples
    assert torch.equal(samples[0][0], dls.valid_ds.new(fields=dls.train_ds.fields)[0][0])
    assert not samples.draws_globally

def test_what_is_random():
    assert all(is_random(t) for t in (*JITTER, v2.TrivialAugmentWide(), v2.RandomErasing(), v2.Compose([v2.ToImage(), v2.RandomCrop(4)])))
    assert not any(is_random(t) for t in (v2.Grayscale(), v2.ToImage(), v2.CenterCrop(4), v2.Compose([v2.ToImage()])))
    assert is_random(Invert()) is None

def test_every_random_transform_of_torchvision_is_known():
    "Every class with a method that draws is found by its name; MixUp and CutMix are for batches"
    draws = {'rand', 'randint', 'randperm', 'randn', 'uniform_', 'multinomial', 'bernoulli_', 'gaussian_noise'}
    methods = lambda c: [f.__code__ for f in vars(c).values() if hasattr(f, '__code__')]
    drawing = [n for n, c in vars(v2).items() if isinstance(c, type) and issubclass(c, v2.Transform) and n not in ('MixUp', 'CutMix') and any(draws & set(f.co_names) for f in methods(c))]
    assert {'ColorJitter', 'GaussianNoise', 'JPEG', 'RandAugment', 'ElasticTransform', 'GaussianBlur'} <= set(drawing)
    missed = [n for n in drawing if not is_random(object.__new__(getattr(v2, n)))]
    assert not missed

def test_a_users_subclass_of_a_random_transform_is_random():
    class Mine(v2.RandomInvert): pass
    assert by_pixels([Mine(1.)], False) == [10, 20, 30] and by_pixels([Mine(1.)], True) == [245, 235, 225]

def test_a_lambda_of_torchvision_may_draw(two_class):
    tfm = [v2.Lambda(Noise(), tv_tensors.Image)]
    before = generators()
    assert same(build(two_class, tfm).train, build(two_class, tfm).train) and generators() == before

def test_a_transform_of_the_first_version_works_too(two_class):
    from torchvision import transforms
    dls = build(two_class, [transforms.ColorJitter(.4)], num_workers=2)
    assert same(dls.train, build(two_class, [transforms.ColorJitter(.4)]).train)

def test_float_pictures_from_an_item_transform_are_not_scaled_again(two_class):
    x = build(two_class, [v2.ToDtype(torch.float32, scale=True)], Resize(16)).valid.one_batch()[0]
    assert torch.allclose(x, build(two_class, geometry=Resize(16)).valid.one_batch()[0], atol=1e-6)

# --- samples by themselves
@pytest.mark.parametrize('tfms', [[], JITTER, [Noise()]], ids=['plain', 'torchvision', 'own'])
def test_samples_and_loaders_survive_pickling(two_class, tfms):
    dls = build(two_class, tfms)
    copy = pickle.loads(pickle.dumps(dls))
    assert torch.equal(copy.train_ds[3][0], dls.train_ds[3][0]) and same(copy.train, dls.train)

def test_an_item_error_survives_pickling():
    e = pickle.loads(pickle.dumps(ItemError('get_y', 'a.png', 'no label', 'give one')))
    assert str(e) == str(ItemError('get_y', 'a.png', 'no label', 'give one')) and e.item == 'a.png'

def test_samples_are_a_dataset_of_torch(two_class):
    s = build(two_class).train_ds
    x, y = next(iter(torch.utils.data.DataLoader(s, batch_size=4, collate_fn=s.collate)))
    assert x.shape == (4, 3, 16, 16) and x.dtype == torch.uint8 and y.shape == (4,)

def test_an_index_outside_is_an_index_error(two_class):
    s = build(two_class).train_ds
    for i in (len(s), -len(s)-1):
        with pytest.raises(IndexError): s[i]

def test_two_fields_get_the_same_draw():
    im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    s = Samples(([im], [im]), (ImageBlock(), ImageBlock()), (RandomResizedCrop(16),), tuple(JITTER), train=True)
    for epoch in range(4): assert torch.equal(*s.read(0, epoch))

@pytest.mark.slow
def test_processes_that_are_spawned_read_the_same(two_class, tmp_path):
    script = tmp_path/'main.py'
    script.write_text(textwrap.dedent(f'''
        import torch
        from torchvision.transforms import v2
        from blocks import *
        def build(workers):
            block = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=[RandomResizedCrop(16), v2.ColorJitter(.4)])
            return block.dataloaders({str(two_class)!r}, bs=8, num_workers=workers, seed=3, device='cpu')
        if __name__ == '__main__':
            torch.multiprocessing.set_start_method('spawn')
            for a, b in zip(build(0).train, build(2).train): assert all(torch.equal(s, t) for s, t in zip(a, b))
            print('same')
    '''))
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert out.stdout.strip() == 'same', out.stderr[-2000:]
