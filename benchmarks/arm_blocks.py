"""blocks: as it comes; strict (32 bits, every JPEG decoded in full, nothing kept); and with its cache in memory, for the epochs after the first."""
import gc, tempfile
from contextlib import nullcontext
from pathlib import Path
from common import DATA, NotHere, calls, cold_import, init_head, main, rate, read_set, resident, spread, stats, timed, weights

def strict(spec): return spec['arm'] == 'blocks_strict'

def asked(f, *args, **kw):
    "`f(*args, **kw)`; an argument that this version does not know yet is said"
    try: return f(*args, **kw)
    except TypeError as e:
        if 'unexpected keyword' not in str(e): raise
        raise NotHere(f'not in this version: {e}') from e

def dataloaders(spec, item_tfms, batch_tfms=None):
    from blocks import CategoryBlock, DataBlock, ImageBlock, IndexSplitter
    files, labels, n = read_set(spec)
    image = asked(ImageBlock, draft=False) if strict(spec) else ImageBlock
    block = DataBlock(blocks=(image, CategoryBlock), get_x=lambda i: files[i], get_y=lambda i: labels[i], splitter=IndexSplitter(range(n, len(files))), item_tfms=item_tfms, batch_tfms=batch_tfms)
    cache = dict(cache_gb=4) if spec['arm'] == 'blocks_cached' else {}
    return asked(block.dataloaders, list(range(len(files))), bs=spec['bs'], seed=spec['seed'], **cache)

def presized(spec, *more):
    "Loaders of the solar cells: to `presize` when read, augmented to `size` as a batch"
    from blocks import Resize, aug_transforms
    return dataloaders(spec, Resize(spec['presize']), [*aug_transforms(size=spec['size']), *more])

def whole(spec):
    "Loaders of the solar cells for prediction, at `size`"
    from blocks import Resize
    return dataloaders(spec, Resize(spec['size']))

def learner(dls, spec):
    "A new head on the body that all arms start from, which `weights=` makes a pretrained one; it is normalised in the model"
    from blocks import accuracy, cnn_learner
    learn = cnn_learner(dls, spec['arch'], weights=weights(spec['arch']), metrics=accuracy, precision='fp32' if strict(spec) else 'auto', path=DATA)
    init_head(learn.model[1], spec['seed'])
    return learn

# works

def load(spec):
    from blocks import Flip, Normalize, RandomResizedCrop
    norm = Normalize.from_stats(*stats('resnet18'))
    dls = presized(spec, norm) if spec['set'] == 'png' else dataloaders(spec, RandomResizedCrop(spec['size']), [Flip(), norm])
    return rate(lambda: dls.train, spec['epochs'])

def fine_tune(spec):
    from blocks import Callback, set_seed
    import torch
    class Losses(Callback):
        "Keeps the mean training loss of each epoch"
        def before_train(self): self.seen = []
        def after_loss(self):
            if self.learn.training: self.seen.append(self.learn.loss.detach())
        def after_train(self): kept.append(float(torch.stack(self.seen).mean()))
    set_seed(spec['seed'])
    kept, learn = [], learner(presized(spec), spec)
    seconds, _ = timed(lambda: learn.fine_tune(2, cbs=Losses()))
    return dict(seconds=seconds, valid_loss=learn.recorder.last('valid_loss'), accuracy=learn.recorder.last('accuracy'), train_losses=kept)

def predict(spec):
    from blocks import load_learner
    import numpy as np, torch
    from PIL import Image
    files, _, _ = read_set(spec)
    with tempfile.TemporaryDirectory() as folder: predictor = load_learner(learner(whole(spec), spec).export(Path(folder)/'export.pkl'))
    side = spec['size']
    def bare():
        "The same file through the same model, without a library between"
        with Image.open(files[0]) as im: a = np.asarray(im.resize((side, side), Image.Resampling.BILINEAR).convert('RGB'))
        with torch.inference_mode(): return predictor.model(torch.from_numpy(a.copy()).permute(2, 0, 1)[None].float().div_(255)).softmax(1)
    ours, by_hand = calls(lambda: predictor.predict(files[0]), bare, n=spec['n'])
    return dict(**spread(ours), over_ms=spread(ours)['ms'] - spread(by_hand)['ms'])

def get_preds(spec):
    dls, (files, _, _) = whole(spec), read_set(spec)
    learn = learner(dls, spec)
    seconds, (probs, *_) = timed(lambda: learn.get_preds(dl=dls.test_dl(files)))
    return dict(img_s=len(probs)/seconds)

def build(spec):
    from blocks import CategoryBlock, DataBlock, ImageBlock, RandomSplitter, Resize, aug_transforms, get_image_files, parent_label
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=42), item_tfms=Resize(32), batch_tfms=aug_transforms())
    def run():
        dls = block.dataloaders(DATA/'many'/'images', bs=64)
        dls.one_batch()
        return len(dls.train_ds) + len(dls.valid_ds)
    seconds, n = timed(run)
    return dict(seconds=seconds, n=n)

def imports(spec): return dict(seconds=cold_import('from blocks import *', spec['n']))

def loop(spec):
    "What `fit` with a loader reaches of the bare step on ready tensors, in turn; and what the loop adds to a batch, with a model that takes next to no time"
    return dict(share=_share_of_bare(spec), overhead_ms=_overhead(spec))

def _share_of_bare(spec):
    import statistics
    from time import perf_counter
    from blocks import Callback
    class Clock(Callback):
        def before_train(self): self.start = perf_counter()
        def after_train(self): self.seconds = perf_counter() - self.start
    dls, clock = presized(spec), Clock()
    learn = learner(dls, spec)
    learn.unfreeze()
    learn.fit(1, 1e-4, cbs=clock)                                        # makes the optimizer, warms everything
    ready = [tuple(o.clone() for o in dls.one_batch())]*len(dls.train)
    ratios = []
    for _ in range(spec['n']):
        learn.fit(1, 1e-4, cbs=clock)
        ratios.append(timed(lambda: _bare_epoch(learn.model, learn.opt, ready))[0]/clock.seconds)
    return statistics.median(ratios)

def _bare_epoch(model, opt, batches, short=True):
    "Steps on ready tensors, in 16 bits where blocks would train in them"
    import torch
    from blocks.train.tricks import native_bf16
    device = torch.device('cpu')
    model.train()
    for x, y in batches:
        with torch.autocast('cpu', torch.bfloat16) if short and native_bf16(device) else nullcontext(): pred = model(x)
        torch.nn.functional.cross_entropy(pred.float(), y).backward()
        opt.step()
        opt.zero_grad()

def _overhead(spec):
    import statistics
    from dataclasses import replace
    from blocks import Learner, Loader
    from torch import nn
    class Ready(Loader):
        "The same batch again and again"
        def next_pass(self, start=0, share=None): return iter([batch]*(len(self) - start))
    dls = presized({**spec, 'limit': 640, 'bs': 4})
    batch = tuple(o.clone() for o in dls.one_batch())
    ready = Ready(dls.train.samples, bs=4, shuffle=True, drop_last=True)
    dls = replace(dls, train=ready, valid=dls.valid.new(samples=dls.valid.samples.new(fields=tuple(o[:0] for o in dls.valid.samples.fields))))
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), precision='fp32')
    learn.fit(1)
    ms = []
    for _ in range(spec['n']):
        fit, bare = timed(lambda: learn.fit(1))[0], timed(lambda: _bare_epoch(learn.model, learn.opt, [batch]*len(ready), short=False))[0]
        ms.append((fit - bare)/len(ready)*1000)
    return statistics.median(ms)

def limits(spec):
    "Parts of the work by themselves, which bound the whole: decoding in one thread for each core with nothing else, one image through the model, and the import of PyTorch"
    import os
    from random import Random
    import simplejpeg
    from PIL import Image
    from blocks import RandomResizedCrop
    from blocks.data.ahead import reading_threads
    from blocks.data.image import open_image, read_image
    def png(file): open_image(file, whole=True).load()
    def jpeg(file): simplejpeg.decode_jpeg(Path(file).read_bytes())
    def eighth(file):
        "What a decoder cannot leave out: the whole stream is read, and of each block of 8 × 8 pixels the mean is kept"
        with Image.open(file) as im: im.draft('RGB', (1, 1)); im.load()
    def crop(file):
        "The same, with as many pixels as the decoder can give for the random crop that is asked for"
        with open_image(file) as im: read_image(im, random_crop.draw(*im.size, Random(Path(file).name)), resample=lambda pixels, size: pixels)
    random_crop = RandomResizedCrop(224)
    def decoded(set, f, limit=450):
        files = read_set({**spec, 'set': set, 'limit': limit})[0]
        with reading_threads(os.cpu_count()) as pool: return len(files)/min(timed(lambda: list(pool.map(f, files)))[0] for _ in range(3))
    forward = Bare(spec).forward
    return dict(png_s=decoded('png', png), jpeg_s=decoded('jpeg', jpeg), jpeg12_s=decoded('12mp', eighth, 24), jpeg12_crop_s=decoded('12mp', crop, 24), single_ms=forward('fp32', 1), import_s=cold_import('import torch, torchvision', 3))

class Bare:
    "A model on a batch that is ready: milliseconds of its passes"
    def __init__(self, spec):
        import torch
        dls = whole(spec)
        self.learn, self.n = learner(dls, spec), spec['n']
        self.x, self.y = dls.one_batch()
        self.model = self.learn.model.to(memory_format=torch.channels_last)

    def forward(self, precision, images):
        "A forward pass over so many of the pictures"
        import torch
        from blocks.train.tricks import model_precision
        self.model.eval()
        def run():
            with torch.inference_mode(), model_precision(self.learn.device, precision): self.model(self.x[:images])
        return _ms(run, self.n)

    def step(self, precision, thaw):
        "A step of training after `thaw`, a method of the learner that says which layers learn"
        import torch
        from blocks.train.tricks import model_precision
        thaw(); self.learn.create_opt(); self.model.train()
        def run():
            with model_precision(self.learn.device, precision): pred = self.model(self.x)
            torch.nn.functional.cross_entropy(pred.float(), self.y).backward()
            self.learn.opt.step(); self.learn.opt.zero_grad()
        return _ms(run, self.n)

def _ms(f, n):
    "Median milliseconds of `f()`, with memory kept as in `fit` and `get_preds`"
    import statistics
    from blocks.data.pages import kept_pages
    with kept_pages(): return statistics.median(calls(f, n=n)[0])

def model(spec):
    "Images per second of a model by itself, in 16 bits where blocks uses them, and in 32"
    o = Bare(spec)
    images = len(o.x)
    ms = dict(forward_s=o.forward('auto', images), forward_fp32_s=o.forward('fp32', images), frozen_s=o.step('auto', o.learn.freeze), step_s=o.step('auto', o.learn.unfreeze), step_fp32_s=o.step('fp32', o.learn.unfreeze))
    return {k: images*1000/v for k, v in ms.items()}

def million(spec):
    "Listing, labels and split of a million files; where links are slow to make, of the hundred thousand ten times over"
    from blocks import CategoryBlock, DataBlock, ImageBlock, RandomSplitter, get_image_files, parent_label
    real = (DATA/'million'/'done').exists() and not spec.get('quick')
    root = DATA/('million' if real else 'many')/'images'
    times = 1 if real else spec['n']//100_000
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=lambda path: list(get_image_files(path))*times, get_y=parent_label, splitter=RandomSplitter(seed=42))
    if real: block = block.new(get_items=get_image_files)
    gc.collect()
    before = resident()
    seconds, dsets = timed(lambda: block.datasets(root))
    gc.collect()
    return dict(seconds=seconds, n=len(dsets), bytes_item=None if before is None else (resident() - before)/len(dsets), files='a million files in ten folders' if real else f'a hundred thousand files, listed as if there were {times} times as many')

if __name__ == '__main__': main(dict(loader=load, fine_tune=fine_tune, predict=predict, get_preds=get_preds, build=build, imports=imports, loop=loop, million=million, limits=limits, model=model))
