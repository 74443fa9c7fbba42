import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import elpv_dataset
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from blocks import (BBoxBlock, CategoryBlock, CropPad, ExportError, Flip, ImageBlock, MaskBlock, MultiCategoryBlock, PointBlock, Predictor, RandomCrop, RandomResizedCrop, RandomResizedCropGPU,
                    RatioResize, RegressionBlock, Resize)
from blocks.core import set_seed
from blocks.data.frame import PAD_MODES, FrameDraw, Geometry
from blocks.data.image import read_image
from blocks.infer import onnx as module
from blocks.infer.onnx import _Graph, _on_cpu, _pixels, _seen, to_onnx, to_program
from blocks.infer.runtime import OnnxPredictor
from blocks.model.head import create_vision_model
from blocks.model.unet import DynamicUnet

CELLS = sorted((Path(elpv_dataset.__file__).parent/'data'/'images').glob('*.png'))[:200]
AS_IT_IS = (RatioResize(40),)    # no geometry in the graph: it is exported in a fraction of the time


def tiny(n, channels=3, seed=0):
    "A network with BatchNorm whose statistics are not trivial"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n))
        for _ in range(20): model(torch.rand(8, channels, 16, 16)*2 - .3)
        model[-1].weight.data *= 3                                            # answers of every kind, not all near the middle
    return model.eval()

def predictor(model, target, geometries=AS_IT_IS, image=None, **kw): return Predictor(model, (image or ImageBlock(), target), geometries=geometries, device='cpu', **kw)

def classes(**kw): return predictor(tiny(2, kw.get('image', ImageBlock()).channels), CategoryBlock(vocab=['a', 'b']), **kw)

def same(fast, p, items, limit=1e-3):
    "The two predictors agree on every item, one by one and in batches; returns the largest difference"
    many, want = fast.predict_batch(items, bs=7), list(p.predict_batch(items))
    apart = max(float(abs(np.asarray(got[2]) - w[2].numpy()).max()) for got, w in zip(many, want))
    want[0] = p.predict(items[0])
    assert apart <= limit, apart
    for got, w in zip([*many, fast.predict(items[0])], [*want, want[0]]):
        assert np.asarray(got[2]).dtype == np.float32 and np.shape(got[2]) == tuple(w[2].shape) and (np.asarray(got[1]) == w[1].numpy()).all() if p.target.answer == 'category' else True
        assert got[0] == w[0] if p.target.answer in ('category', 'multi') else np.allclose(got[0], w[0], atol=1e-5)
    return apart

# --- the geometry, against Pillow and Frame
def geometry(data):
    size, pad = (data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))), data.draw(st.sampled_from(PAD_MODES))
    return data.draw(st.sampled_from([Resize(size), Resize(size, 'squish'), Resize(size, 'pad', pad), RandomResizedCrop(size), CropPad(size, pad), RandomCrop(size, pad)]))

@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 150), st.integers(1, 150))
def test_what_the_graph_sees_is_what_pillow_gives_to_the_pixel(data, h, w):
    gs = [geometry(data)]
    if data.draw(st.booleans()): gs = [data.draw(st.sampled_from([RatioResize(50), geometry(data)])), *gs]
    a = np.random.default_rng(h*w).integers(0, 256, (h, w, 3), dtype=np.uint8)
    frame = FrameDraw(gs)(w, h)
    want = a if frame.size == (h, w) else read_image(Image.fromarray(a), frame)
    assert (_seen(torch.from_numpy(a).permute(2, 0, 1)[None], gs)[0].permute(1, 2, 0).numpy() == want).all()

# --- a real network, with all of the geometry in the graph
@pytest.fixture(scope='module')
def cells():
    "A ResNet-18 that has seen solar cells"
    set_seed(1)
    model = create_vision_model('resnet18', 3, pretrained=False)
    p = predictor(model, CategoryBlock(vocab=['crack', 7, 'ok'], temperature=1.5), (Resize((32, 48)),), info=dict(metrics=dict(accuracy=.9, odd=float('nan')), classes=['crack', 7, 'ok'], epochs=3))
    model.train()
    with torch.no_grad():
        for i in range(0, 64, 32): model(p._prepare([p.read_item(f) for f in CELLS[i:i+32]])[0])
    model.eval()
    return p

@pytest.fixture(scope='module')
def exported(cells, tmp_path_factory): return to_onnx(cells, tmp_path_factory.mktemp('onnx')/'cells.onnx', check=CELLS[:4])

@pytest.fixture(scope='module')
def fast(exported): return OnnxPredictor(exported)

def test_it_agrees_on_200_real_images(cells, fast):
    assert len(CELLS) == 200 and same(fast, cells, CELLS) < 1e-4

def test_whole_pictures_are_resized_inside(cells, fast):
    want = cells.predict_batch(CELLS).probs.numpy()
    assert abs(fast.run(np.stack([_pixels(cells, f) for f in CELLS])) - want).max() < 1e-4
    for w, h in ((48, 32), (31, 200), (200, 31), (1, 1), (5, 400), (49, 32)):
        a = np.random.default_rng(w).integers(0, 256, (h, w, 3), dtype=np.uint8)
        assert abs(fast.run(a.transpose(2, 0, 1)[None]) - cells.predict(a)[2].numpy()).max() < 1e-4, (w, h)

def test_any_number_of_pictures(fast):
    x = np.stack([fast.read_item(f)[0] for f in CELLS[:9]])
    want = fast.run(x)
    for n in (1, 2, 5, 9): assert abs(fast.run(x[:n]) - want[:n]).max() < 1e-6
    assert fast.run(x[:0]).shape == (0, 3)

def test_the_file_says_what_it_is(exported, cells):
    model = onnx.load(exported)
    facts = json.loads({o.key: o.value for o in model.metadata_props}['blocks'])
    assert facts['target'] == dict(answer='category', vocab=['crack', 7, 'ok'], threshold=0., confidences=None) and facts['mode'] == 'RGB' and facts['input'] == dict(resizes=True, size=[32, 48])
    assert facts['geometries'] == [dict(kind='Resize', fields=dict(size=[32, 48], method='crop', pad_mode='reflection'))]
    assert facts['info']['metrics'] == dict(accuracy=.9, odd=None) and facts['info']['epochs'] == 3
    (given,), (made,) = model.graph.input, model.graph.output
    assert given.name == 'image' and [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ['batch', 3, 'height', 'width'] and made.name == 'probabilities'
    assert all(o.version >= 18 for o in model.opset_import if not o.domain)
    onnx.checker.check_model(model)

def test_it_says_nothing_of_the_machine_it_was_made_on(exported):
    data = exported.read_bytes()
    assert os.fsencode(Path(torch.__file__).parent) not in data and os.fsencode(Path(module.__file__).parent) not in data and b'File "/' not in data and b'stack_trace' not in data

@pytest.mark.slow
def test_grey_pictures_a_chain_of_geometries_and_not_a_word(tmp_path, capfd, recwarn):
    p = classes(image=ImageBlock('L'), geometries=(RatioResize(50), CropPad(48)))
    path = to_onnx(p, tmp_path/'a.onnx')
    onnxruntime.InferenceSession(path)                                         # nor does anybody hear anything who loads it without this library
    assert capfd.readouterr() == ('', '') and not recwarn.list and [o.name for o in tmp_path.iterdir()] == ['a.onnx']
    fast = OnnxPredictor(path)
    assert fast.shape == ('batch', 1, 'height', 'width')
    same(fast, p, CELLS[:10])
    assert abs(fast.run(np.stack([_pixels(p, f) for f in CELLS[:3]])) - p.predict_batch(CELLS[:3]).probs.numpy()).max() < 1e-4

# --- kinds of targets
def test_several_labels(tmp_path):
    p = predictor(tiny(3), MultiCategoryBlock(vocab=['a', 'b', 'c'], thresh=.4, temperature=2.), AS_IT_IS)
    same(OnnxPredictor(to_onnx(p, tmp_path/'a.onnx', check=CELLS[:3])), p, CELLS[:20])

def test_numbers(tmp_path):
    p = predictor(tiny(1), RegressionBlock(n_out=1), AS_IT_IS, ImageBlock(mean=(.5, .4, .3), std=(.2, .3, .2)))
    fast = OnnxPredictor(to_onnx(p, tmp_path/'a.onnx', check=CELLS[:3]))
    same(fast, p, CELLS[:20])
    assert fast.session.get_outputs()[0].name == 'values' and type(fast.predict(CELLS[0])[0]) is float

def test_masks(tmp_path):
    set_seed(0)
    body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()))
    model = DynamicUnet(body, 3, img_size=(32, 32)).eval()
    p = predictor(model, MaskBlock(('sky', 'sea', 'sand')), (Resize((32, 48)),), ImageBlock('YCbCr'))
    fast = OnnxPredictor(to_onnx(p, tmp_path/'a.onnx', check=CELLS[:2]))
    got, want = fast.predict_batch(CELLS[:5]), p.predict_batch(CELLS[:5])
    assert fast.shape == ('batch', 3, 32, 48) and abs(got.probs - want.probs.numpy()).max() < 1e-4 and got.probs.shape == (5, 3, 32, 48)
    assert all((a == b).all() for a, b in zip(got.labels, want.labels)) and got.to_dicts() == want.to_dicts()

def test_points_come_back_in_pixels_of_the_picture(tmp_path):
    p = predictor(tiny(6), PointBlock(n_points=3), (Resize((40, 48), 'pad', 'zeros'),), ImageBlock('YCbCr'), tfms=(v2.CenterCrop(36),))
    fast = OnnxPredictor(to_onnx(p, tmp_path/'a.onnx', check=CELLS[:3]))
    same(fast, p, CELLS[:10])
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 171, 3), dtype=np.uint8))
    for a, b in zip(fast.predict_batch([CELLS[0], wide]).to_dicts(), p.predict_batch([CELLS[0], wide]).to_dicts()):
        assert a['kind'] == 'points' and np.allclose(a['points'], b['points'], atol=.02)

# --- inputs
@pytest.mark.slow
def test_item_and_batch_transforms_are_inside(tmp_path):
    p = classes(image=ImageBlock('YCbCr'), geometries=(Resize(64),), tfms=(v2.Grayscale(3), v2.RandomHorizontalFlip()), batch_tfms=(RandomResizedCropGPU((40, 36), valid_scale=.8), Flip()))
    same(OnnxPredictor(to_onnx(p, tmp_path/'a.onnx', check=CELLS[:3])), p, CELLS[:10])
    plain = replace(p, tfms=(), batch_tfms=())
    assert abs(plain.predict(CELLS[0])[2] - p.predict(CELLS[0])[2]).max() > 1e-3      # they matter

# --- a program of PyTorch
@pytest.mark.slow
def test_a_program_for_pytorch(tmp_path):
    p = classes(geometries=(RandomResizedCrop(32),))
    path = to_program(p, tmp_path/'a.pt2', check=CELLS[:3])
    extra = {'blocks.json': ''}
    module = torch.export.load(path, extra_files=extra).module()
    want = p.predict_batch(CELLS[:5]).probs
    assert torch.allclose(module(torch.from_numpy(np.stack([_pixels(p, f) for f in CELLS[:5]]))), want, atol=1e-5)
    framed = torch.stack([p.read_item(f)[0] for f in CELLS[:5]]).as_subclass(torch.Tensor)
    assert torch.allclose(module(framed), want, atol=1e-5) and torch.allclose(module(framed[:1]), want[:1], atol=1e-5)
    assert json.loads(extra['blocks.json'])['target']['vocab'] == ['a', 'b'] and [o.name for o in tmp_path.iterdir()] == ['a.pt2']

# --- what is refused
class Chance(nn.Module):
    "Says something else each time"
    def __init__(self): super().__init__(); self.net = tiny(2)
    def forward(self, x): return self.net(x) + torch.rand(2)

@pytest.mark.parametrize('export,name', [(to_onnx, 'a.onnx'), (to_program, 'a.pt2')])
def test_an_export_that_answers_otherwise_is_refused(tmp_path, export, name):
    (tmp_path/name).write_text('old')
    with pytest.raises(ExportError, match=rf'{name} is not written: .*differ by 0\.\d+ from those of predict, and the limit is 0.001'): export(predictor(Chance(), CategoryBlock(vocab=['a', 'b']), AS_IT_IS), tmp_path/name)
    assert (tmp_path/name).read_text() == 'old' and [o.name for o in tmp_path.iterdir()] == [name]

def test_a_small_difference_is_found_in_each_way_in(tmp_path, monkeypatch):
    p = classes(geometries=(Resize(32),))
    monkeypatch.setattr(_Graph, 'traced', lambda self: None)
    run = lambda images: p.predict_batch([o.transpose(1, 2, 0) for o in images]).probs.numpy()
    graph, read, pictures = _Graph(_on_cpu(p)), lambda o: p.read_item(o)[0].numpy(), CELLS[:3]
    module._prove(p, run, read, pictures, graph, 'a')
    for way, wrong in (('read through the frame', lambda o: len(o) == 1 and o.shape[-1] == 32), ('in one batch', lambda o: len(o) > 1), ('resized in the graph', lambda o: o.shape[-1] != 32)):
        for by in (2e-3, np.nan):
            with pytest.raises(ExportError, match=f'on picture 0 \\(cell0001.png\\), .*{way}, its probabilities'): module._prove(p, lambda o: run(o) + (by if wrong(o) else 0)*np.eye(1, 2)*(np.arange(len(o)) < 1)[:, None], read, pictures, graph, 'a')
        module._prove(p, lambda o: run(o) + (5e-4 if wrong(o) else 0), read, pictures, graph, 'a')

class Own(Resize):
    "A geometry of one's own"

@dataclass(frozen=True)
class Half(Geometry):
    def draw(self, width, height, rng=None): return Resize(16).draw(width, height)

@pytest.mark.parametrize('p,said', [
    (lambda: predictor(tiny(2), BBoxBlock(vocab=['a'])), 'BBoxBlock gives boxes'),
    (lambda: Predictor(tiny(2), (ImageBlock(), ImageBlock(), CategoryBlock(vocab=['a', 'b'])), n_inp=2, device='cpu'), 'models of one picture'),
    (lambda: classes(tfms=(len,)), 'transform len is code of your own'),
    (lambda: classes(geometries=(Half(),)), 'transform Half is code of your own'),
    (lambda: classes(geometries=(), batch_tfms=(RandomResizedCropGPU(16),)), 'item_tfms=Resize'),
    (lambda: predictor(tiny(2), CategoryBlock(vocab=['a', b'b'])), r"class b'b' is a bytes")])
def test_what_a_graph_cannot_hold_is_refused_at_once(tmp_path, p, said):
    with pytest.raises(ExportError, match=said): to_onnx(p(), tmp_path/'a.onnx')
    assert not list(tmp_path.iterdir())

class Branches(nn.Module):
    def forward(self, x): return tiny(2)(x) if x.sum() > 0 else x.mean((2, 3))[:, :2]

def test_a_model_that_cannot_be_traced_is_refused_in_words(tmp_path):
    with pytest.raises(ExportError, match='cannot be exported, PyTorch cannot trace it'): to_onnx(predictor(Branches(), CategoryBlock(vocab=['a', 'b']), AS_IT_IS), tmp_path/'a.onnx')

def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ExportError, match='is a folder'): to_onnx(classes(geometries=AS_IT_IS), tmp_path)

def test_no_pictures_prove_nothing(tmp_path):
    with pytest.raises(ExportError, match='holds no picture'): to_onnx(classes(geometries=AS_IT_IS), tmp_path/'a.onnx', check=[])

@pytest.mark.slow
def test_the_predictor_stays_as_it_was(tmp_path):
    model = tiny(2).to(memory_format=torch.channels_last)
    p = predictor(model, CategoryBlock(vocab=['a', 'b']), AS_IT_IS)
    before, want = model[0].weight.data_ptr(), p.predict(CELLS[0])[2]
    to_onnx(p, tmp_path/'a.onnx')
    assert model[0].weight.data_ptr() == before and model[0].weight.requires_grad and model[0].weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(p.predict(CELLS[0])[2], want)

# --- 8 bits
def test_8_bits_say_what_they_change(tmp_path, capsys):
    wide = nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 2)).eval()
    p = predictor(wide, CategoryBlock(vocab=['a', 'b']), AS_IT_IS)
    path = to_onnx(p, tmp_path/'a.onnx', check=CELLS[:10], int8=True)
    line, change = capsys.readouterr().out, OnnxPredictor(path).info['int8']
    assert line.startswith('int8: ') and 'on 10 pictures the probabilities change by up to' in line and line.count('\n') == 1
    apart = np.stack([abs(OnnxPredictor(path).predict(f)[2] - p.predict(f)[2].numpy()) for f in CELLS[:10]])
    assert change['pictures'] == 10 and 0 < change['mean'] <= change['largest'] < .2 and np.isclose(apart.max(), change['largest'], atol=1e-5) and 0 <= change['changed'] <= 1
    assert path.stat().st_size < 150_000 < sum(o.numel()*4 for o in wide.parameters()) and 'ConvInteger' in {n.op_type for n in onnx.load(path).graph.node}
