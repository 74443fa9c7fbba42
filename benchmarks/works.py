"""The rows of the table: what is measured, by whom, how often, and what is aimed at."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Metric:
    title: str
    higher: bool = False     # is more better?
    digits: int = 1

METRICS = dict(img_s=Metric('images/s', True), seconds=Metric('s', digits=2), ms=Metric('ms, median', digits=2), p99_ms=Metric('ms, p99', digits=2), over_ms=Metric('ms over decode + forward', digits=2),
               peak_mb=Metric('MB at the peak', digits=0), valid_loss=Metric('validation loss', digits=3), accuracy=Metric('accuracy', True, 3), share=Metric('share of the bare step', True, 3),
               overhead_ms=Metric('ms added to a batch', digits=3), bytes_item=Metric('bytes an item', digits=0), p99_over_median=Metric('p99 / median', digits=2), png_s=Metric('PNG decoded/s', True, 0), jpeg_s=Metric('JPEG decoded/s', True, 0), forward_s=Metric('images/s, forward', True, 0),
               forward_fp32_s=Metric('forward in 32 bits', True, 0), single_ms=Metric('ms, one image in 32 bits', digits=1),
               jpeg12_s=Metric('12 MP JPEG read to an eighth/s', True, 1), jpeg12_crop_s=Metric('read for a random crop/s', True, 1), frozen_s=Metric('in steps, body frozen', True, 0), step_s=Metric('in steps of all layers', True, 0), step_fp32_s=Metric('these in 32 bits', True, 0), import_s=Metric('s, import torch and torchvision', digits=2))

@dataclass(frozen=True)
class Goal:
    """An aim. `kind` says what is compared with `target`:

    faster: how many times better blocks is than the peer, at least; share: blocks' figure as a share of the peer's, at most;
    most, least: blocks' figure itself; as_good: the difference from the peer, whose interval must reach 0 or the better side."""
    metric: str
    kind: str
    target: float
    peer: str = None
    arm: str = 'blocks'

@dataclass(frozen=True)
class Work:
    title: str
    kind: str            # what the arms' scripts call it
    spec: dict           # its settings, the same for all arms
    quick: dict          # those that differ in a smoke run
    rounds: int = 3
    arms: tuple = ('blocks', 'fastai', 'hand')
    once: tuple = ()     # arms that run in the first round alone, to save time: orientation, not part of a target
    shows: tuple = ()    # the metrics of its table, in order
    goals: tuple = ()
    full_only: bool = False
    parts: object = None # function: (figures of `limits`, of `model_*` by name of the model) → name of each part that cannot be left out → what it takes by itself, in the unit of `cost`
    why: str = ''        # what keeps blocks from an aim, said where one is missed

    @property
    def all_arms(self): return (*self.arms, *self.once)
    def spec_of(self, quick): return self.spec | (self.quick if quick else {}) | dict(quick=quick)

def of_fine_tune(n, arch, train=2, frozen=1, share=.8):
    "`parts` of `fine_tune` over `n` pictures"
    return lambda o, models: {'decoding': n*(train + frozen)/o['png_s'], 'steps with the body frozen': n*share*frozen/models[arch]['frozen_s'], 'steps of all layers': n*share*train/models[arch]['step_s'],
                              'validation': n*(1 - share)*(train + frozen)/models[arch]['forward_s']}

def faster(metric, arm='blocks', **peers): return tuple(Goal(metric, 'faster', target, peer, arm) for peer, target in peers.items())

LOADER = dict(kind='loader', rounds=3, arms=('blocks', 'blocks_strict', 'blocks_cached', 'fastai', 'hand', 'timm'), once=('lightning',), shows=('img_s', 'peak_mb'))
CELLS = dict(set='png', presize=160, size=128, bs=64)

def loader(title, spec, quick, fastai, hand, **more):
    return Work(title, spec=spec, quick=quick, **more, goals=faster('img_s', fastai=fastai, hand=hand) + faster('img_s', 'blocks_cached', fastai=5, hand=3), **LOADER)

def fine_tune(title, arch, fastai, hand, n, once=(), why='', **more):
    goals = (*faster('seconds', fastai=fastai, hand=hand), Goal('accuracy', 'as_good', 0, 'fastai'), Goal('accuracy', 'as_good', 0, 'hand'), Goal('peak_mb', 'share', .7, 'fastai'), Goal('peak_mb', 'share', 1, 'hand'))
    return Work(title, 'fine_tune', dict(**CELLS, arch=arch, **more), dict(limit=96, bs=16, presize=80, size=64), once=once, shows=('seconds', 'peak_mb', 'valid_loss', 'accuracy'), goals=goals, parts=of_fine_tune(n, arch), why=why)

def bare_model(title, arch): return Work(f'{title} by itself, on 64 ready pictures of 128 px', 'model', dict(**CELLS, arch=arch, n=9), dict(limit=128, n=1), 2, arms=('blocks',), shows=('forward_s', 'forward_fp32_s', 'frozen_s', 'step_s', 'step_fp32_s'))

ARITHMETIC = "The model's arithmetic is the bound. The peers do it in 32 bits and blocks in 16 where the processor has instructions for them, and how much faster that is depends on the processor: the last tables have it."
STREAM = """A JPEG is one stream of codes of variable length, of which no part can be read before what precedes it; the peers decode all of it to pixels, blocks to as small a size as the crop allows (of half the crops a quarter of each side, else a half or all), whole, since the decoders at hand cannot leave out what lies beside it.
Ending at the lower edge of the crop would save a seventh of the stream on average, and a file that is damaged below it would go unnoticed."""
SINGLE = "The model's pass over one image in 32 bits is nearly all of the time, and it is the same operation for all arms. With weights packed beforehand for the processor it took three quarters of that, but small models took longer, and the aim would still be missed."

WORKS = dict(
    loader_png=loader('Loader: grey PNG of 300 px as RGB, to 160, augmented to 128', dict(**CELLS, limit=1400, epochs=2), dict(limit=176, epochs=1), 2.5, 1.4),
    loader_jpeg=loader('Loader: JPEG of 500 × 375, random crop to 224, flip, normalise', dict(set='jpeg', size=224, bs=64, epochs=2, repeat=2), dict(limit=176, epochs=1, repeat=1), 2.5, 1.2),
    loader_12mp=loader('Loader: JPEG of 12 megapixels, random crop to 224, flip, normalise', dict(set='12mp', size=224, bs=6, epochs=2, repeat=2), dict(epochs=1, repeat=1), 3.5, 3,
                       parts=lambda o, models: {'reading the stream': 1000/o['jpeg12_s'], 'the pixels for the crop': 1000/o['jpeg12_crop_s'] - 1000/o['jpeg12_s']}, why=STREAM),
    fine_tune_resnet18=fine_tune('fine_tune(2), ResNet-18, 128 px, 2,624 solar cells', 'resnet18', 2.5, 2.3, 2624, why=ARITHMETIC),
    fine_tune_resnet50=fine_tune('fine_tune(2), ResNet-50, 128 px, 2,624 solar cells', 'resnet50', 2.5, 2.3, 2624, why=ARITHMETIC),
    fine_tune_lite0=fine_tune('fine_tune(2), EfficientNet-Lite0 with ImageNet weights, 128 px, 1,312 of the solar cells', 'tf_efficientnet_lite0', 1.8, 1.6, 1312, once=('blocks_strict', 'lightning', 'timm'), limit=1312),
    predict=Work('predict: one PNG of 300 px, ResNet-18, 128 px', 'predict', dict(**CELLS, arch='resnet18', n=300), dict(n=20), 5, shows=('ms', 'p99_ms', 'over_ms'), parts=lambda o, models: {'the forward pass of one image': o['single_ms']}, why=SINGLE,
                 goals=(*faster('ms', fastai=5), Goal('over_ms', 'most', 1), Goal('p99_over_median', 'most', 2))),
    get_preds=Work('get_preds: 2,624 files, ResNet-18, 128 px', 'get_preds', dict(**CELLS, arch='resnet18'), dict(limit=128), once=('blocks_strict', 'lightning', 'timm'), shows=('img_s', 'peak_mb'), goals=faster('img_s', fastai=3, hand=1.5),
                   parts=lambda o, models: {'decoding': 1000/o['png_s'], 'the forward pass': 1000/models['resnet18']['forward_s']}, why=ARITHMETIC),
    build=Work('Loaders over 100,000 files, and the first batch', 'build', {}, {}, 5, arms=('blocks', 'fastai'), shows=('seconds', 'peak_mb'), goals=faster('seconds', fastai=1.5)),
    imports=Work('Import: from blocks import *, from fastai.vision.all import *', 'imports', dict(n=1), {}, 9, arms=('blocks', 'fastai'), shows=('seconds',), goals=(Goal('seconds', 'share', .65, 'fastai'),), parts=lambda o, models: {'import of torch and torchvision': o['import_s']}),
    loop=Work('The loop: fit with a loader against the bare step on ready tensors, ResNet-18', 'loop', dict(**CELLS, arch='resnet18', limit=700, n=3), dict(limit=96, bs=16, n=1), 2, arms=('blocks',), shows=('share', 'overhead_ms'),
              goals=(Goal('share', 'least', .9), Goal('overhead_ms', 'most', 1))),
    million=Work('A million items: listing, labels and split', 'million', dict(n=1_000_000), dict(n=200_000), 1, arms=('blocks',), shows=('seconds', 'bytes_item', 'peak_mb'), full_only=True,
                 goals=(Goal('seconds', 'most', 60), Goal('bytes_item', 'most', 200))),
    limits=Work('What bounds them: decoding alone, one thread a core; one image through ResNet-18; the import of PyTorch', 'limits', dict(**CELLS, arch='resnet18', n=15), dict(limit=128, n=3), 3, arms=('blocks',), shows=('png_s', 'jpeg_s', 'jpeg12_s', 'jpeg12_crop_s', 'single_ms', 'import_s')),
    model_resnet18=bare_model('ResNet-18', 'resnet18'),
    model_resnet50=bare_model('ResNet-50', 'resnet50'),
    model_lite0=bare_model('EfficientNet-Lite0', 'tf_efficientnet_lite0'))

def chosen(only, quick):
    "The works that `only` names, as whole names or their beginnings separated by commas; all of them without it"
    names = [o.strip() for o in (only or '').split(',') if o.strip()]
    if wrong := [o for o in names if not any(w.startswith(o) for w in WORKS)]: raise SystemExit(f"no work is called {', '.join(wrong)}; there are {', '.join(WORKS)}")
    return {name: w for name, w in WORKS.items() if (any(name.startswith(o) for o in names) if names else not (quick and w.full_only))}
