"""The rows of the table: what is measured, by whom, how often, and what is aimed at."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Metric:
    title: str
    higher: bool = False     # is more better?
    digits: int = 1

METRICS = dict(img_s=Metric('images/s', True), seconds=Metric('s', digits=2), ms=Metric('ms, median', digits=2), p99_ms=Metric('ms, p99', digits=2), over_ms=Metric('ms over decode + forward', digits=2),
               peak_mb=Metric('MB at the peak', digits=0), valid_loss=Metric('validation loss', digits=3), accuracy=Metric('accuracy', True, 3), share=Metric('share of the bare step', True, 3),
               overhead_ms=Metric('ms added to a batch', digits=3), bytes_item=Metric('bytes an item', digits=0), p99_over_median=Metric('p99 / median', digits=2), png_s=Metric('PNG decoded/s', True, 0), jpeg_s=Metric('JPEG decoded/s', True, 0), forward_s=Metric('images/s through ResNet-18', True, 0),
               forward_fp32_s=Metric('the same in 32 bits', True, 0), single_ms=Metric('ms, one image in 32 bits', digits=1),
               jpeg12_s=Metric('12 MP JPEG read to an eighth/s', True, 1), frozen_s=Metric('images/s in steps, body frozen', True, 0), step_s=Metric('all layers', True, 0), step_fp32_s=Metric('all layers in 32 bits', True, 0), import_s=Metric('s, import torch and torchvision', digits=2))

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
    best: object = None  # function: the figures of `limits` → what blocks could reach at best in the first metric that is shown

    @property
    def all_arms(self): return (*self.arms, *self.once)
    def spec_of(self, quick): return self.spec | (self.quick if quick else {}) | dict(quick=quick)

def of_parts(n, train=2, frozen=1, share=.8):
    "`best` of `fine_tune` over `n` pictures: decoding, steps and validation, one after the other on all cores, and nothing else"
    return lambda o: n*((train + frozen)/o['png_s'] + share*(frozen/o['frozen_s'] + train/o['step_s']) + (1 - share)*(train + frozen)/o['forward_s'])

def faster(metric, arm='blocks', **peers): return tuple(Goal(metric, 'faster', target, peer, arm) for peer, target in peers.items())

LOADER = dict(kind='loader', rounds=3, arms=('blocks', 'blocks_strict', 'blocks_cached', 'fastai', 'hand', 'timm'), once=('lightning',), shows=('img_s', 'peak_mb'))
CELLS = dict(set='png', presize=160, size=128, bs=64)

def loader(title, spec, quick, fastai, hand, best=None):
    return Work(title, spec=spec, best=best, quick=quick, goals=faster('img_s', fastai=fastai, hand=hand) + faster('img_s', 'blocks_cached', fastai=5, hand=3), **LOADER)

def fine_tune(title, arch, fastai, hand, once=('blocks_strict', 'lightning', 'timm'), best=None, **more):
    goals = (*faster('seconds', fastai=fastai, hand=hand), Goal('accuracy', 'as_good', 0, 'fastai'), Goal('accuracy', 'as_good', 0, 'hand'), Goal('peak_mb', 'share', .7, 'fastai'), Goal('peak_mb', 'share', 1, 'hand'))
    return Work(title, 'fine_tune', dict(**CELLS, arch=arch, **more), dict(limit=96, bs=16, presize=80, size=64), once=once, shows=('seconds', 'peak_mb', 'valid_loss', 'accuracy'), goals=goals, best=best)

WORKS = dict(
    loader_png=loader('Loader: grey PNG of 300 px as RGB, to 160, augmented to 128', dict(**CELLS, limit=1400, epochs=2), dict(limit=176, epochs=1), 2.5, 1.4),
    loader_jpeg=loader('Loader: JPEG of 500 × 375, random crop to 224, flip, normalise', dict(set='jpeg', size=224, bs=64, epochs=2, repeat=2), dict(limit=176, epochs=1, repeat=1), 2.5, 1.2),
    loader_12mp=loader('Loader: JPEG of 12 megapixels, random crop to 224, flip, normalise', dict(set='12mp', size=224, bs=6, epochs=2, repeat=2), dict(epochs=1, repeat=1), 3.5, 3, lambda o: o['jpeg12_s']),
    fine_tune_resnet18=fine_tune('fine_tune(2), ResNet-18, 128 px, 2,624 solar cells', 'resnet18', 2.5, 2.3, once=(), best=of_parts(2624)),
    fine_tune_resnet50=fine_tune('fine_tune(2), ResNet-50, 128 px, 336 of the solar cells', 'resnet50', 2.5, 2.3, limit=336),
    fine_tune_lite0=fine_tune('fine_tune(2), EfficientNet-Lite0 with ImageNet weights, 128 px, 1,312 of the solar cells', 'tf_efficientnet_lite0', 1.8, 1.6, limit=1312, once=()),
    predict=Work('predict: one PNG of 300 px, ResNet-18, 128 px', 'predict', dict(**CELLS, arch='resnet18', n=300), dict(n=20), 5, shows=('ms', 'p99_ms', 'over_ms'), best=lambda o: o['single_ms'],
                 goals=(*faster('ms', fastai=5), Goal('over_ms', 'most', 1), Goal('p99_over_median', 'most', 2))),
    get_preds=Work('get_preds: 2,624 files, ResNet-18, 128 px', 'get_preds', dict(**CELLS, arch='resnet18'), dict(limit=128), once=('blocks_strict', 'lightning', 'timm'), shows=('img_s', 'peak_mb'), goals=faster('img_s', fastai=3, hand=1.5),
                   best=lambda o: 1/(1/o['png_s'] + 1/o['forward_s'])),
    build=Work('Loaders over 100,000 files, and the first batch', 'build', {}, {}, 5, arms=('blocks', 'fastai'), shows=('seconds', 'peak_mb'), goals=faster('seconds', fastai=1.5)),
    imports=Work('Import: from blocks import *, from fastai.vision.all import *', 'imports', dict(n=1), {}, 9, arms=('blocks', 'fastai'), shows=('seconds',), goals=(Goal('seconds', 'share', .65, 'fastai'),), best=lambda o: o['import_s']),
    loop=Work('The loop: fit with a loader against the bare step on ready tensors, ResNet-18', 'loop', dict(**CELLS, arch='resnet18', limit=700, n=3), dict(limit=96, bs=16, n=1), 2, arms=('blocks',), shows=('share', 'overhead_ms'),
              goals=(Goal('share', 'least', .9), Goal('overhead_ms', 'most', 1))),
    million=Work('A million items: listing, labels and split', 'million', dict(n=1_000_000), dict(n=200_000), 1, arms=('blocks',), shows=('seconds', 'bytes_item', 'peak_mb'), full_only=True,
                 goals=(Goal('seconds', 'most', 60), Goal('bytes_item', 'most', 200))),
    limits=Work('What bounds them: decoding alone, one thread a core; ResNet-18 alone, on 64 ready pictures of 128 px; and PyTorch', 'limits', dict(**CELLS, arch='resnet18'), dict(limit=128), 1, arms=('blocks',),
                shows=('png_s', 'jpeg_s', 'jpeg12_s', 'forward_s', 'forward_fp32_s', 'single_ms', 'frozen_s', 'step_s', 'step_fp32_s', 'import_s')))

def chosen(only, quick):
    "The works that `only` names, as whole names or their beginnings separated by commas; all of them without it"
    names = [o.strip() for o in (only or '').split(',') if o.strip()]
    if wrong := [o for o in names if not any(w.startswith(o) for w in WORKS)]: raise SystemExit(f"no work is called {', '.join(wrong)}; there are {', '.join(WORKS)}")
    return {name: w for name, w in WORKS.items() if (any(name.startswith(o) for o in names) if names else not (quick and w.full_only))}
