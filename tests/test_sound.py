"Sounds: every way to give one, the picture against its formula, windows that depend on seed, epoch and item alone, and words of voices never heard"
import io
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import matplotlib
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import tv_tensors

from blocks import CategoryBlock, DataBlock, FuncSplitter, Normalize, Resize, get_files
from blocks.core import DataError, ItemError, MissingExtraError, stream
from blocks.data.augment import apply_batch_tfms
from blocks.data.frame import FrameDraw
from blocks.data.loader import Loader, Samples
from blocks.data.sound import SpectrogramBlock, _hz, _mel, _mel_filters
from blocks.data.sound_mask import FrequencyMask, TimeMask
from blocks.infer.file import from_spec, to_spec

RATE = 16000

def tone(hz=1000., seconds=1., rate=RATE, volume=.5): return (volume*np.sin(2*np.pi*hz*np.arange(round(seconds*rate))/rate)).astype(np.float32)
def noise(n=RATE, seed=0): return (np.random.default_rng(seed).standard_normal(n)/8).astype(np.float32)
def click(at, seconds, rate=RATE): a = np.zeros(round(seconds*rate), np.float32); a[round(at*rate)] = 1; return a
def drawn(i=0, geometries=()): return FrameDraw(geometries, lambda: stream(0, 'frame', 0, i))

def wav(path, a, rate=RATE, **kw): soundfile.write(path, a, rate, **kw); return path


# The picture

def by_hand(a, b):
    "The definition, one window after the other, in NumPy"
    k, n = np.arange(b.n_fft), b.n_fft
    window = np.where((k >= (n-b.win_length)//2) & (k < (n-b.win_length)//2 + b.win_length), .5-.5*np.cos(2*np.pi*(k-(n-b.win_length)//2)/b.win_length), 0)
    padded = np.pad(a.astype(float), n)
    power = np.stack([abs(np.fft.rfft(window*padded[n//2 + i*b.hop_length:][:n]))**2 for i in range(len(a)//b.hop_length)], 1)
    edges = _hz(np.linspace(_mel(b.f_min), _mel(b.f_max), b.n_mels+2))
    mel = np.stack([np.interp(np.arange(n//2+1)*b.sample_rate/n, edges[i:i+3], [0, 1, 0]) for i in range(b.n_mels)]) @ power
    db = 10*np.log10(np.maximum(mel, 1e-30)/mel.max())
    return np.clip(db/b.top_db + 1, 0, 1)*255

@pytest.mark.parametrize('kw', [{}, dict(n_fft=1024, win_length=400, n_mels=80, f_min=50, f_max=7000), dict(sample_rate=8000, win_length=200, n_fft=250, hop_length=100, n_mels=20, top_db=50)])
def test_the_picture_is_its_definition(kw):
    b = SpectrogramBlock(**kw)
    a = noise(9000)*np.exp(-np.linspace(0, 6, 9000)).astype(np.float32) + tone(700, 9000/RATE)
    got, want = b.spectrogram(a), by_hand(a, b)
    assert got.dtype == np.uint8 and got.shape == want.shape == (b.n_mels, 9000//b.hop_length)
    assert abs(got-want).max() <= .51

def test_the_rows_share_every_frequency_between_them():
    f = _mel_filters(16000, 1024, 40, 100., 7000.).numpy()
    hz, edges = np.arange(513)*16000/1024, _hz(np.linspace(_mel(100), _mel(7000), 42))
    inside = (hz >= edges[1]) & (hz <= edges[-2])
    assert np.allclose(f.sum(0)[inside], 1, atol=1e-5) and f.min() == 0 and f[:, (hz <= 100) | (hz >= 7000)].max() < 1e-6
    assert np.allclose(_hz(_mel(hz)), hz) and (np.diff(_mel(hz)) > 0).all() and float(_mel(1000)) == 15 and float(_mel(6400)) == pytest.approx(42)

@pytest.mark.parametrize('rate', [8000, 16000, 44100])
def test_a_tone_lights_its_row(rate):
    b = SpectrogramBlock(rate, duration=.5)
    centres = _hz(np.linspace(_mel(0), _mel(rate/2), b.n_mels+2))[1:-1]
    for row in range(4, b.n_mels, 7):
        seen = b.read(tone(centres[row], .5, rate))[0].float().mean(1)
        assert seen.argmax() == row and all(seen[o] < 60 for o in (row-15, row+15) if 0 <= o < b.n_mels)

def test_decibels():
    b = SpectrogramBlock(duration=1., top_db=60)
    for down in (6, 20, 40):
        a = b.read(np.concatenate([tone(seconds=.5), tone(seconds=.5)*10**(-down/20)]))[0].float().amax(0)
        assert a[20] == 255 and (255-a[80])/255*60 == pytest.approx(down, abs=.25)
    assert torch.equal(b.read(noise()), b.read(noise()/4))

def test_full_scale_is_zero_decibels_and_nothing_is_heard_100_below():
    b, quiet = SpectrogramBlock(duration=1.), lambda db: tone(1000, volume=10**(db/20))
    assert b.read(quiet(-97)).max() == 255 and b.read(quiet(-104)).max() == 0

@pytest.mark.parametrize('a', [np.zeros(16000, np.float32), np.zeros(1, np.int16), np.full(16000, 3e-7, np.float32), np.zeros((500, 2))])
def test_silence_is_black(a):
    x = SpectrogramBlock(duration=1.).read(a)
    assert x.shape == (1, 64, 100) and x.max() == 0

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30000), rate=st.sampled_from([4000, 11025, 16000, 22050, 48000]), channels=st.integers(1, 3), duration=st.floats(.02, 1.5), to=st.sampled_from([8000, 16000]),
       train=st.booleans(), seed=st.integers(0, 99))
def test_every_sound_gives_the_one_shape(n, rate, channels, duration, to, train, seed):
    b = SpectrogramBlock(to, n_mels=24, duration=duration)
    x = b.read((np.random.default_rng(seed).uniform(-1, 1, (n, channels)), rate), drawn(seed) if train else FrameDraw(()))
    assert type(x) is tv_tensors.Image and x.dtype == torch.uint8 and x.shape == (1, 24, b.frames) == (1, *b.size(None)[::-1])
    assert len(b.samples((noise(n), rate))) == round(duration*to)
    if n/rate*to > 200: assert x.max() == 255                            # noise of some length is loud somewhere


# Every way to give a sound

class Remote:
    def __init__(self, data): self.data = data
    def read_bytes(self): return self.data
    def __fspath__(self): return 'a member of an archive, not a file'

def test_the_same_from_whatever_people_have(tmp_path):
    b, a = SpectrogramBlock(duration=1.), np.round(noise()*32768).clip(-32768, 32767)
    x, i16 = (a/32768).astype(np.float32), a.astype(np.int16)
    want = b.read(x)
    path, flac = wav(tmp_path/'a.wav', i16), wav(tmp_path/'a.flac', i16)
    data = path.read_bytes()
    other = noise(seed=1); stereo = np.stack([x+other, x-other], 1)
    with open(path, 'rb') as f:
        for raw in (path, str(path), flac, data, bytearray(data), memoryview(data), io.BytesIO(data), f, Remote(data), i16, i16.astype(np.int32)*65536, x.astype(np.float64), x[:, None],
                    stereo, torch.from_numpy(x), torch.from_numpy(i16), torch.from_numpy(stereo.T.copy()), (x, RATE), (stereo, float(RATE)), (torch.from_numpy(x)[None], np.int64(RATE)),
                    wav(tmp_path/'stereo.wav', stereo, subtype='FLOAT')):
            b.verify(raw, whole=True); assert b.size(raw) == (100, 64)
            for _ in range(2): assert (b.read(raw).int()-want.int()).abs().max() <= 1, raw         # a file object can be read again

def test_one_rate_for_all(tmp_path):
    b = SpectrogramBlock(duration=1., f_max=3800)
    want = b.read(tone(2000)).int()
    for rate in (8000, 11025, 44100, 48000):
        x = b.read(wav(tmp_path/f'{rate}.flac', tone(2000, rate=rate), rate)).int()
        assert (x-want)[:, :, 3:-3][want[:, :, 3:-3] > 60].abs().float().mean() < 3
    assert b.read((tone(2000, .5), 8000)).argmax(1).float().median() != want.argmax(1).float().median()        # the rate counts

def test_only_the_window_is_decoded(tmp_path, monkeypatch):
    path, read, counts = wav(tmp_path/'long.flac', noise(60*RATE)), soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, 'read', lambda self, n, **kw: counts.append(n) or read(self, n, **kw))
    b = SpectrogramBlock(8000, duration=2.)
    b.verify(path); assert counts == []
    b.read(path); b.read(path, drawn()); assert counts == [2*RATE]*2
    counts.clear(); b.verify(path, whole=True); assert sum(counts) == 60*RATE

def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'soundfile', None)
    b = SpectrogramBlock(duration=1.)
    with pytest.raises(MissingExtraError, match=r"blocks\[audio\]"): b.read(b'RIFF')
    assert b.read(tone()).max() == 255                                                    # numbers need no library

def test_import_is_light():
    code = "import sys, blocks.data.sound, blocks.data.sound_mask; print([m for m in ('soundfile', 'scipy.signal', 'matplotlib', 'pandas', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# What cannot be used

def _broken(folder):
    "(raw, what the error says, whether a quick look finds it)"
    flac = wav(folder/'whole.flac', noise(3*RATE)).read_bytes()
    (folder/'half.flac').write_bytes(flac[:len(flac)//2]); (folder/'text.wav').write_text('no sound at all'); (folder/'none.wav').write_bytes(b'')
    nan = noise(); nan[500] = np.nan
    return [(folder/'text.wav', 'not a sound', True), (folder/'none.wav', 'not a sound', True), (b'', 'not a sound', True), (wav(folder/'empty.wav', noise(0)), 'empty', True),
            (np.zeros((0, 2)), 'empty', True), (folder/'half.flac', 'breaks off|lost sync', False), (wav(folder/'nan.wav', nan, subtype='FLOAT'), 'NaN', False), (nan, 'NaN', False),
            (np.full(99, np.inf), 'infinite', False), (np.zeros((2, 16000)), r'shape \(2, 16000\)', True), (torch.zeros(16000, 2), 'shape', True), (np.zeros((9, 9, 2)), 'shape', True),
            (np.array(1.), 'shape', True), (np.zeros(9, np.uint8), 'uint8', True), (np.zeros(9, complex), 'complex', True), ((tone(), 0), 'sample rate=0', True),
            ((tone(), 22050.5), 'sample rate', True), ((tone(), None), 'sample rate', True), (7, 'int', True), (None, 'NoneType', True), ((tone(), RATE, 1), 'tuple', True)]

def test_what_cannot_be_used_says_why(tmp_path):
    b = SpectrogramBlock(duration=3.)
    for raw, says, quick in _broken(tmp_path):
        for use in (lambda: b.verify(raw, whole=True), lambda: b.read(raw), *([lambda: b.verify(raw)] if quick else [])):
            with pytest.raises(DataError, match=says): use()
        if not quick: b.verify(raw)
    for use in (b.read, b.verify):
        with pytest.raises(FileNotFoundError): use(tmp_path/'gone.wav')

def test_a_file_that_ends_before_its_header_says(tmp_path, monkeypatch):
    "As MP3 files do that were cut"
    b, path, read = SpectrogramBlock(duration=1.), wav(tmp_path/'a.wav', noise()), soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, 'read', lambda self, n, **kw: read(self, n//2, **kw))
    for use in (b.read, lambda raw: b.verify(raw, whole=True)):
        with pytest.raises(DataError, match='breaks off: 16000 samples were announced, and it ends after 8000'): use(path)

def test_a_file_is_closed_again(tmp_path):
    path, b = wav(tmp_path/'a.wav', tone()), SpectrogramBlock(duration=1.)
    before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else pytest.skip('needs /proc')
    for _ in range(5): b.read(path); b.verify(path, True)
    with pytest.raises(DataError): b.read(wav(tmp_path/'b.wav', np.full(9, np.nan), subtype='FLOAT'))
    assert len(os.listdir('/proc/self/fd')) <= before

@pytest.mark.parametrize('bad, says', [(dict(n_mels=300), 'too many'), (dict(n_mels=0), 'n_mels=0'), (dict(win_length=600, n_fft=512), 'more than n_fft'), (dict(f_max=8001), 'half of sample_rate'),
                                       (dict(f_min=500, f_max=500), 'f_min'), (dict(f_min=-1), 'f_min'), (dict(duration=.001), 'one hop'), (dict(duration=float('nan')), 'duration'), (dict(top_db=0), 'top_db'),
                                       (dict(sample_rate=0), 'sample_rate'), (dict(sample_rate=True), 'sample_rate'), (dict(hop_length=0), 'hop_length'), (dict(n_fft=512.5), 'n_fft')])
def test_fields_that_cannot_work(bad, says):
    with pytest.raises(DataError, match=says): SpectrogramBlock(**bad)
    with pytest.raises(TypeError): SpectrogramBlock(mode='RGB')


# The window

def at(x):
    "Where in a picture of a click it lies, as a share"
    light = x[0].float().sum(0)
    return ((light*(torch.arange(len(light))+.5)).sum()/light.sum()/len(light)).item()

def test_validation_sees_the_middle():
    b = SpectrogramBlock(duration=1.)
    for raw in (click(2.5, 5), click(.25, .5), (click(1., 2., 44100), 44100)):
        assert len(b.samples(raw)) == 16000 and abs(abs(b.samples(raw)).argmax() - 8000) <= 2
        for frame in (None, FrameDraw(())): assert at(b.read(raw, frame)) == pytest.approx(.5, abs=.02)
    assert b.read(click(1.9, 5)).max() == 0

def test_training_sees_all_of_a_clip_at_random():
    b, saw = SpectrogramBlock(duration=1.), np.concatenate([tone(hz, .5) for hz in (300, 600, 1200, 2400, 4800)])
    rows = [int(replace(b, duration=.4).read(saw, drawn(i))[0].float().mean(1).argmax()) for i in range(40)]
    assert len(set(rows)) >= 5
    places = [at(b.read(click(.05, .1), drawn(i))) for i in range(60)]                  # a short clip lies anywhere in the silence, and never leaves it
    assert min(places) < .2 and max(places) > .8 and abs(np.mean(places)-.5) < .12
    assert torch.equal(b.read(saw, drawn(3)), b.read(saw, drawn(3)))

def test_the_window_is_no_draw_of_the_frame():
    "A crop of the picture must not be at the left whenever the window is"
    b = SpectrogramBlock(duration=1., n_mels=50)
    window = [at(b.read(click(.01, .02), drawn(i))) for i in range(40)]
    crop = [drawn(i, [Resize(50)])(100, 50).box[0] for i in range(40)]
    assert abs(np.corrcoef(window, crop)[0, 1]) < .4

def test_item_transforms_see_a_picture():
    b, x = SpectrogramBlock(duration=1.), tone(4000)
    squished = b.read(x, FrameDraw([Resize((32, 48), 'squish')]))
    assert squished.shape == (1, 32, 48) and abs(squished[0].float().mean(1).argmax() - b.read(x)[0].float().mean(1).argmax()/2) <= 1
    crop = FrameDraw([Resize(64)])
    assert torch.equal(b.read(noise(), crop), b.read(noise())[..., 18:82]) and crop.first[0] == (100, 64)


# The road

@pytest.fixture(scope='module')
def notes(tmp_path_factory):
    "60 files of low and high tones, of several rates and lengths"
    folder, rng = tmp_path_factory.mktemp('notes'), np.random.default_rng(0)
    for i in range(60):
        name, rate = ('low', 'high')[i % 2], (8000, 16000, 22050)[i % 3]
        hz = rng.uniform(*dict(low=(200, 500), high=(1500, 3000))[name])
        wav(folder/f'{name}_{i:02d}.{("wav", "flac")[i % 2]}', tone(hz, rng.uniform(.3, 1.5), rate), rate)
    return folder

def label(path): return path.name.split('_')[0]

def template(**kw):
    return DataBlock(**dict(dict(blocks=(SpectrogramBlock(8000, duration=.5, n_mels=24), CategoryBlock), get_items=lambda p: get_files(p, ['.wav', '.flac']), get_y=label,
                                 splitter=FuncSplitter(lambda p: int(p.stem[-2:]) >= 40)), **kw))

def test_loaders(notes):
    dls = template(batch_tfms=[TimeMask(), FrequencyMask(), Normalize((.3,), (.2,))]).dataloaders(notes, bs=8, num_workers=2, device='cpu', seed=1)
    x, y = dls.one_batch()
    assert type(x) is torch.Tensor and x.shape == (8, 1, 24, 50) and x.dtype == torch.float32 and dls.vocab == ['high', 'low'] and dls.blocks[0].channels == 1
    assert x.min() == pytest.approx(-1.5, abs=1e-5) and x.max() == pytest.approx(3.5, abs=1e-5)
    again = [b[0] for b in dls.new(num_workers=0).train]
    assert all(torch.equal(a, b[0]) for a, b in zip(again, dls.train)) and not torch.equal(again[0], next(iter(dls.train))[0])
    sized = dls.new(item_tfms=Resize((16, 32), 'squish'))
    assert sized.one_batch()[0].shape == (8, 1, 16, 32)

def test_processes_and_threads_read_the_same(notes):
    files = get_files(notes)[:12]
    samples = Samples((files,), (SpectrogramBlock(8000, duration=.5, n_mels=24),), train=True, seed=3)
    here = torch.cat([x for x, in Loader(samples, 4, num_workers=0, device='cpu')])
    assert torch.equal(here, torch.cat([x for x, in Loader(samples, 4, num_workers=2, device='cpu')]))
    samples.draws_globally = True                                                         # what a transform that draws globally asks for: processes
    assert torch.equal(here, torch.cat([x for x, in Loader(samples, 4, num_workers=2, device='cpu')]))

def test_a_bad_file_is_named_or_left_out(notes, tmp_path):
    folder = shutil.copytree(notes, tmp_path/'notes')
    (folder/'low_99.wav').write_text('no sound')
    with pytest.raises(ItemError, match=r'SpectrogramBlock.read failed for item .*low_99\.wav.*not a sound'): template().dataloaders(folder, bs=8, device='cpu')
    with pytest.warns(UserWarning, match='left out'): dls = template().dataloaders(folder, bs=8, device='cpu', on_bad='skip')
    assert [p.name for p in dls.bad_items] == ['low_99.wav'] and len(dls.train_ds) + len(dls.valid_ds) == 60

def test_cnn_learner_takes_one_channel(notes):
    from blocks import cnn_learner
    dls = template().dataloaders(notes, bs=4, num_workers=0, device='cpu')
    learn = cnn_learner(dls, 'resnet18', pretrained=False)
    assert learn.model.eval()(dls.one_batch()[0]).shape == (4, 2)

def test_fields_are_all_that_is_saved():
    b = SpectrogramBlock(22050, n_mels=48, f_min=40., duration=3., mean=(.4,), std=(.2,))
    assert (b.win_length, b.hop_length, b.n_fft, b.f_max, b.frames) == (551, 220, 1024, 11025, 300)
    assert SpectrogramBlock(**asdict(b)) == b == pickle.loads(pickle.dumps(b)) == from_spec(to_spec(b), dict(SpectrogramBlock=SpectrogramBlock))
    x = b.collate([b.read(tone())]); plain = replace(b, mean=None, std=None)
    assert torch.allclose(b.prepare(x)*.2 + .4, plain.prepare(x), atol=1e-6) and np.allclose(b.decode(b.prepare(x)[0]), x[0, 0].numpy()/255, atol=1e-5)

def test_axes_say_seconds_and_hertz():
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    b = SpectrogramBlock(duration=2.)
    fig, ax = plt.subplots(figsize=(4, 3)); b.show(b.prepare(b.collate([b.read(tone(4000, 2.))]))[0], ax, 'a tone')
    ticks = {t.get_text(): y for t, y in zip(ax.get_yticklabels(), ax.get_yticks())}
    row = b.read(tone(4000, 2.))[0].float().mean(1).argmax()
    assert abs(ticks['4000'] - row) <= .6 and (np.diff(ax.get_yticks()) <= -6).all() and '8000' in ticks and ax.get_ylim() == (-.5, 63.5)
    assert ax.get_xlim() == pytest.approx((-.005, 1.995)) and (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ('seconds', 'Hz', 'a tone') and ax.axison
    b.show(b.read(tone(), FrameDraw([Resize(32, 'squish')])).numpy()[0], ax)
    assert not len(ax.get_xticks()) and not len(ax.get_yticks())                          # nothing is claimed about a picture that was cut or squished
    narrow = SpectrogramBlock(f_min=300., f_max=400., n_fft=4096, n_mels=8)
    narrow.show(narrow.read(tone(350)).numpy()[0], ax)                                    # no round frequency lies in it
    plt.close(fig)


# Masks

FULL = tv_tensors.Image(torch.full((300, 1, 20, 40), 255, dtype=torch.uint8))
def masked(tfm, x=FULL, seed=0): return apply_batch_tfms([tfm], (x,), stream(seed))[0].as_subclass(torch.Tensor)

@pytest.mark.parametrize('cls, dim, side', [(TimeMask, -1, 40), (FrequencyMask, -2, 20)])
@pytest.mark.parametrize('share, count', [(.2, 2), (.5, 1), (1., 3), (.3, 1), (0., 2)])
def test_masks(cls, dim, side, share, count):
    x = masked(cls(share, count))
    other = -3-dim
    assert torch.equal(x.amin(other), x.amax(other)) and set(x.unique().tolist()) <= {0., 1.}     # whole columns, or whole rows
    off = (x.amin(other)[:, 0] == 0)
    assert off.sum(1).max() <= count*round(share*side) and (off.int().diff(dim=1) == 1).sum(1).max() <= count
    if count == 1: assert off.sum(1).min() == 0 and off.sum(1).max() == round(share*side)
    if count == 1: assert off.any(0).all() and len({tuple(o.tolist()) for o in off}) > 20         # every place is reached, and each picture has its own draw

def test_masks_depend_on_the_generator_alone():
    t = TimeMask(.5, 2)
    assert torch.equal(masked(t), masked(t)) and not torch.equal(masked(t), masked(t, seed=1))
    x = torch.rand(5, 3, 8, 9); keep = x.clone()
    out = t.apply(x, stream(1)); assert torch.equal(x, keep) and out.shape == x.shape and torch.equal(out[out != 0], x[out != 0])
    assert masked(TimeMask(p=0.)).min() == 1 and .4 < (masked(TimeMask(1., 9, p=.5)).amin((1, 2, 3)) == 0).float().mean() < .6
    assert torch.equal(masked(TimeMask(.2), tv_tensors.Image(FULL[..., :1])), torch.ones(300, 1, 20, 1))            # nothing to take a fifth of
    mask = tv_tensors.Mask(torch.ones(300, 20, 40)); assert apply_batch_tfms([t], (FULL, mask), stream(0))[1] is mask
    assert apply_batch_tfms([t], (FULL,), None, train=False)[0] is FULL

@pytest.mark.parametrize('bad', [dict(max_share=-.1), dict(max_share=1.1), dict(max_share='a'), dict(count=0), dict(count=1.5), dict(p=2)])
@pytest.mark.parametrize('cls', [TimeMask, FrequencyMask])
def test_masks_that_cannot_work(cls, bad):
    with pytest.raises(DataError, match=f'{cls.__name__}.*{next(iter(bad))}'): cls(**bad)


# It learns

def small_cnn(n_out):
    conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv(1, 16), conv(16, 32), conv(32, 64), conv(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, n_out))

def test_low_and_high_notes(notes):
    from blocks import Learner
    dls = template().dataloaders(notes, bs=10, num_workers=0, device='cpu', seed=0)
    with torch.random.fork_rng(devices=[]): torch.manual_seed(0); model = small_cnn(2)
    learn = Learner(dls, model)
    learn.fit_one_cycle(4, 1e-2)
    probs, y = learn.get_preds()
    assert (probs.argmax(1) == y).float().mean() > .9
    assert learn.predict((tone(300), RATE))[0] == 'low' and learn.predict((tone(2500, rate=44100), 44100))[0] == 'high'

WORDS = 'yes no up down left right on off stop go'.split()
HEARD = [accent+shape for accent in ('en-us', 'en-gb', 'en-gb-scotland', 'en-029') for shape in ('', '+f1', '+f2', '+f3', '+m1', '+m2', '+m3', '+m7')]
NEVER_HEARD = [accent+shape for accent in ('en-us', 'en-gb-x-gbclan') for shape in ('+f4', '+f5', '+m4', '+m5', '+m6')]    # throats all new, and one accent

def speak(folder):
    "Each voice says each word, at a speed and a pitch of its own; file names are word_voice.wav"
    for k, voice in enumerate([*HEARD, *NEVER_HEARD]):
        for w, word in enumerate(WORDS):
            rng = stream(0, 'speak', k, w)
            speed, pitch = rng.integers(110, 200), rng.integers(25, 75)
            subprocess.run(['espeak-ng', '-v', voice, '-s', str(speed), '-p', str(pitch), '-w', str(folder/f'{word}_{voice}.wav'), word], check=True)

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('espeak-ng') and not os.environ.get('BLOCKS_SPEECH'), reason='the speech synthesiser espeak-ng is not installed (apt install espeak-ng)')
def test_words_of_held_out_voices(tmp_path):
    from blocks import Learner, accuracy
    speak(tmp_path)
    block = DataBlock(blocks=(SpectrogramBlock(n_mels=40, hop_length=200, duration=1.), CategoryBlock), get_items=lambda p: get_files(p, '.wav'), get_y=label,
                      splitter=FuncSplitter(lambda p: p.stem.split('_')[1] in NEVER_HEARD), batch_tfms=[TimeMask(), FrequencyMask()])
    dls = block.dataloaders(tmp_path, bs=32, num_workers=1, device='cpu', seed=0)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (320, 100) and dls.vocab == sorted(WORDS)
    with torch.random.fork_rng(devices=[]): torch.manual_seed(0); model = small_cnn(len(WORDS))
    learn = Learner(dls, model, metrics=accuracy)
    learn.fit_one_cycle(14, 1e-2)
    probs, y = learn.get_preds()
    right = (probs.argmax(1) == y).float().mean().item()
    print(f'\n{right:.1%} of {len(y)} words by {len(NEVER_HEARD)} voices never heard in training')
    assert right >= .9
