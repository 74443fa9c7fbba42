"""fastai with its own defaults: as many workers as cores, its transforms, its vision_learner and its recipes."""
from common import DATA, calls, cold_import, init_head, main, rate, read_set, spread, stats, timed, weights

def dataloaders(spec, item_tfms, batch_tfms):
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter
    files, labels, n = read_set(spec)
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_x=lambda i: files[i], get_y=lambda i: labels[i], splitter=IndexSplitter(range(n, len(files))), item_tfms=item_tfms, batch_tfms=batch_tfms)
    return block.dataloaders(list(range(len(files))), bs=spec['bs'])

def presized(spec, arch='resnet18'):
    "Loaders of the solar cells: to `presize` when read, augmented to `size` as a batch"
    from fastai.vision.all import Normalize, Resize, aug_transforms
    return dataloaders(spec, Resize(spec['presize']), [*aug_transforms(size=spec['size']), Normalize.from_stats(*stats(arch))])

def whole(spec):
    "Loaders of the solar cells for prediction, at `size`"
    from fastai.vision.all import Normalize, Resize
    return dataloaders(spec, Resize(spec['size']), [Normalize.from_stats(*stats(spec['arch']))])

def learner(dls, arch, seed=0):
    import torch, torchvision
    from fastai.vision.all import accuracy, vision_learner
    resnet = arch.startswith('resnet')
    learn = vision_learner(dls, getattr(torchvision.models, arch) if resnet else arch, pretrained=False, normalize=False, metrics=accuracy, path=DATA)      # normalised in `batch_tfms`
    state = torch.load(weights(arch))
    if resnet:
        model = getattr(torchvision.models, arch)()
        model.load_state_dict(state)
        learn.model[0].load_state_dict(torch.nn.Sequential(*list(model.children())[:-2]).state_dict())
    else: learn.model[0].model.load_state_dict(state)
    init_head(learn.model[1], seed)
    return learn

def load(spec):
    from fastai.vision.all import Flip, Normalize, RandomResizedCrop, imagenet_stats
    dls = presized(spec) if spec['set'] == 'png' else dataloaders(spec, RandomResizedCrop(spec['size']), [Flip(), Normalize.from_stats(*imagenet_stats)])
    return rate(lambda: dls.train, spec['epochs'])

def fine_tune(spec):
    from fastai.vision.all import set_seed
    set_seed(spec['seed'])
    dls = presized(spec, spec['arch'])
    learn = learner(dls, spec['arch'], spec['seed'])
    losses = []
    learn.add_cb(_losses(losses))
    seconds, _ = timed(lambda: learn.fine_tune(2))
    _, loss, acc = learn.recorder.values[-1]
    return dict(seconds=seconds, valid_loss=loss, accuracy=acc, train_losses=losses)

def _losses(kept):
    "A callback that keeps the mean training loss of each epoch (the recorder's own is a running mean)"
    import torch
    from fastai.callback.core import Callback
    class Losses(Callback):
        def before_train(self): self.seen = []
        def after_batch(self):
            if self.training: self.seen.append(self.loss.detach())
        def after_train(self): kept.append(float(torch.stack(self.seen).mean()))
    return Losses()

def predict(spec):
    learn, file = learner(whole(spec), spec['arch']), 0                  # the items are numbers, and `get_x` gives the file
    def one():
        with learn.no_bar(), learn.no_logging(): return learn.predict(file)
    return spread(calls(one, n=spec['n'])[0])

def get_preds(spec):
    dls = whole(spec)
    learn = learner(dls, spec['arch'])
    items = list(range(len(dls.train_ds) + len(dls.valid_ds)))
    seconds, (probs, _) = timed(lambda: learn.get_preds(dl=dls.test_dl(items)))
    return dict(img_s=len(probs)/seconds)

def build(spec):
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, RandomSplitter, Resize, aug_transforms, get_image_files, parent_label
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=42), item_tfms=Resize(32), batch_tfms=aug_transforms())
    def run():
        dls = block.dataloaders(DATA/'many'/'images', bs=64)
        dls.one_batch()
        return len(dls.train_ds) + len(dls.valid_ds)
    seconds, n = timed(run)
    return dict(seconds=seconds, n=n)

def imports(spec): return dict(seconds=cold_import('from fastai.vision.all import *', spec['n']))

if __name__ == '__main__': main(dict(loader=load, fine_tune=fine_tune, predict=predict, get_preds=get_preds, build=build, imports=imports))
