"U-Nets: where the skip connections are, sizes, threads, copies, the spec, the exported file"
import copy
import io
import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from blocks.core import DataError, ExportError, WeightsError
from blocks.data.block import ImageBlock
from blocks.data.datablock import DataBlock
from blocks.data.place import MaskBlock
from blocks.model.arch import create_body
from blocks.model.head import build_vision_model, create_vision_model, param_groups
from blocks.model.unet import DynamicUnet, PixelShuffle_ICNR, SelfAttention, _find_skips, create_unet_model, icnr_init
from blocks.train.vision import unet_learner


def layer(n_in, n_out, stride=2): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1), nn.BatchNorm2d(n_out), nn.ReLU())
def small(n_in=3): return nn.Sequential(layer(n_in, 6), layer(6, 8), layer(8, 12))
def unet(n_out=2, **kw):
    torch.manual_seed(0)
    return DynamicUnet(small(), n_out, **kw).eval()
def run(model, *shape):
    with torch.no_grad(): return model(torch.rand(*shape, device=next(model.parameters()).device))
META = torch.device('meta')                                              # shapes without numbers: quick
def shape_of(arch, *shape, **kw):
    with META: return tuple(run(create_unet_model(arch, 3, pretrained=False, n_in=shape[1], **kw).eval(), *shape).shape)

# ---- pixel shuffle --------------------------------------------------------------------------------------------
@pytest.mark.parametrize('scale', [2, 3])
def test_icnr_starts_as_a_repetition_of_pixels(scale):
    m = PixelShuffle_ICNR(6, 5, scale=scale); out = run(m, 2, 6, 4, 3)
    assert out.shape == (2, 5, 4*scale, 3*scale) and out.std() > 0
    assert torch.equal(out, out[..., ::scale, ::scale].repeat_interleave(scale, 2).repeat_interleave(scale, 3))
def test_icnr_weights_are_drawn_as_the_init_says():
    w = icnr_init(torch.empty(4*512, 64, 1, 1)); assert w.shape == (2048, 64, 1, 1) and abs(w.std()/(2/64)**.5 - 1) < .05
    with pytest.raises(DataError, match='multiple of 4'): icnr_init(torch.empty(6, 2, 1, 1))
def test_blur_keeps_size_and_evens_out():
    torch.manual_seed(0); plain = PixelShuffle_ICNR(4, 4); torch.manual_seed(0); soft = PixelShuffle_ICNR(4, 4, blur=True); x = torch.rand(1, 4, 5, 5)
    with torch.no_grad(): a, b = plain(x), soft(x)
    assert a.shape == b.shape and b.diff(dim=-1).abs().max() < a.diff(dim=-1).abs().max()
    assert torch.allclose(b[..., 1:, 1:], (a[..., 1:, 1:] + a[..., :-1, 1:] + a[..., 1:, :-1] + a[..., :-1, :-1])/4, atol=1e-6)

# ---- skips ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('arch, names, channels, n_up', [
    ('resnet18', ['6', '5', '4', '2'], [256, 128, 64, 64], 1), ('resnet50', ['6', '5', '4', '2'], [1024, 512, 256, 64], 1),
    ('densenet121', ['0.denseblock3', '0.denseblock2', '0.denseblock1', '0.relu0'], [1024, 512, 256, 64], 1),
    ('vgg11_bn', ['0.27', '0.20', '0.13', '0.6', '0.2'], [512, 512, 256, 128, 64], 0), ('mobilenet_v2', ['0.13', '0.6', '0.3', '0.1'], [96, 32, 24, 16], 1),
    ('tf_efficientnet_lite0', ['blocks.4', 'blocks.2', 'blocks.1', 'blocks.0'], [112, 40, 24, 16], 1), ('convnext_tiny', ['0.5', '0.3', '0.1'], [384, 192, 96], 2),
    ('resnet18.a1_in1k', ['layer3', 'layer2', 'layer1', 'act1'], [256, 128, 64, 64], 1)])
def test_skips_are_the_last_maps_before_the_size_changes(arch, names, channels, n_up):
    with META: assert _find_skips(create_body(arch), 3)[::2] == (list(zip(names, channels)), n_up)
def test_looking_changes_nothing():
    body = small(); body[1].eval(); before = {k: v.clone() for k, v in body.state_dict().items()}; rng = torch.get_rng_state()
    _find_skips(body, 3)
    assert [m.training for m in body] == [True, False, True] and all(torch.equal(before[k], v) for k, v in body.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks for m in body.modules())
def test_a_part_that_is_used_twice_hands_nothing_over():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a, self.act, self.b, self.c = nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        def forward(self, x): return self.c(self.act(self.b(self.act(self.a(x)))))
    assert [name for name, _ in _find_skips(Twice(), 3)[0]] == ['b', 'a'] and run(DynamicUnet(Twice(), 2).eval(), 1, 3, 33, 40).shape == (1, 2, 33, 40)
def test_an_encoder_without_maps_between():
    with pytest.raises(DataError, match='64×64 to 4×4'): DynamicUnet(nn.Conv2d(3, 8, 16, 16), 2)
    with pytest.raises(DataError, match='none between'): create_unet_model('swin_t', 2, pretrained=False)
    with pytest.raises(DataError, match='no feature map'): DynamicUnet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), 2)
    with pytest.raises(DataError, match='3 channels'): DynamicUnet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(5, 4, 3)), 2)
def test_the_decoder_sees_each_map_and_the_picture():
    m, got = unet(), []; x = torch.rand(1, 3, 32, 32); m[1].register_forward_pre_hook(lambda mod, args: got.append(args)); want = m(x)
    (features, maps, image), a = got[0], m[0][0](x)
    assert torch.equal(maps[1], a) and torch.equal(maps[0], m[0][1](a)) and torch.equal(features, m[0](x)) and image is x
    for changed in ((features+1, maps, image), (features, [maps[0]+1, maps[1]], image), (features, [maps[0], maps[1]+1], image), (features, maps, image+1)): assert not torch.allclose(m[1](*changed), want)

# ---- the model ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('size', [(64, 64), (33, 47), (20, 90), (8, 8)])
@pytest.mark.parametrize('kw', [{}, dict(self_attention=True, blur=True), dict(blur=True, blur_final=False, bottle=True), dict(last_cross=False)])
def test_the_output_has_the_size_of_the_input(size, kw): assert run(unet(3, **kw), 2, 3, *size).shape == (2, 3, *size)
@pytest.mark.parametrize('arch', ['resnet18', 'vgg11_bn', 'mobilenet_v2', 'tf_efficientnet_lite0', *(pytest.param(o, marks=pytest.mark.slow) for o in ('resnet34', 'resnet50', 'densenet121', 'convnext_tiny', 'inception_v3', 'resnetv2_50'))])
def test_architectures(arch): assert shape_of(arch, 2, 3, 97, 128) == (2, 3, 97, 128)
@pytest.mark.parametrize('kw', [dict(n_in=1), dict(n_in=4, cut=6), dict(n_in=2, img_size=(64, 96))])
def test_channels_and_cuts(kw): n = kw.pop('n_in'); assert shape_of('resnet18', 1, n, 47, 64, **kw) == (1, 3, 47, 64)
def test_widths_are_fastais():
    with META: m, bare, att = (create_unet_model('resnet18', 5, pretrained=False, **kw)[1] for kw in ({}, dict(last_cross=False), dict(self_attention=True)))
    assert [(u.shuf[0].out_channels//4, u.nf) for u in m.ups] == [(256, 512), (256, 384), (192, 256), (128, 96)] and m.out[0].in_channels == 99 and m.middle[2][0].out_channels == 1024
    assert bare.out[0].in_channels == 96 and [isinstance(u.convs[-1], SelfAttention) for u in att.ups] == [False, True, False, False]
def test_range_of_values():
    out = run(unet(1, y_range=(-1, 3)), 4, 3, 16, 16); assert -1 < out.min() and out.max() < 3
def test_attention_begins_without_effect_and_learns():
    m = SelfAttention(16); x = torch.rand(2, 16, 5, 4); assert torch.equal(m(x), x)
    m.gamma.data += 1; q, k, v = (c(x).flatten(2) for c in (m.query, m.key, m.value)); w = torch.softmax(q.transpose(1, 2)@k, -1)
    assert torch.allclose(m(x), x + (v@w.transpose(1, 2)).reshape(x.shape), atol=1e-5)
def test_gradients_reach_every_parameter():
    m = unet(self_attention=True).train(); m(torch.rand(2, 3, 32, 32)).square().sum().backward(); gamma = next(o for o in m.modules() if isinstance(o, SelfAttention)).gamma
    assert gamma.grad.abs() > 0 and [n for n, p in m.named_parameters() if p.grad is None] == []
def test_the_same_seed_makes_the_same_model():
    a, b = unet(), unet(); assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
def test_normalises_with_the_statistics_of_the_weights(tmp_path):
    torch.save(small().state_dict(), tmp_path/'w.pth'); m = create_unet_model(small, 2, weights=tmp_path/'w.pth').eval(); x = torch.rand(1, 3, 16, 16)
    plain = create_unet_model(small, 2, weights=tmp_path/'w.pth', normalize=False).eval(); plain.load_state_dict({k: v for k, v in m.state_dict().items() if k not in ('mean', 'std')})
    assert plain.mean is None and torch.allclose(m(x), plain((x - m.mean)/m.std), atol=1e-4) and m.mean.flatten().tolist() == pytest.approx([.485, .456, .406])
    with pytest.raises(DataError, match='3 channels'): m(x[:, :1])
@pytest.mark.parametrize('kw, text', [(dict(n_out=0), 'n_out'), (dict(y_range=(3, 1)), 'low < high'), (dict(n_in=0), 'n_in'), (dict(arch='resnet19'), 'resnet18')])
def test_mistakes(kw, text):
    with pytest.raises(DataError, match=text): create_unet_model(**dict(dict(arch='resnet18', n_out=2, pretrained=False), **kw))
    with pytest.raises(TypeError, match='dropout'): create_unet_model('resnet18', 2, pretrained=False, dropout=.5)

# ---- one model, many users ------------------------------------------------------------------------------------
def test_threads_do_not_see_each_others_maps():
    m, wrong = unet(), []; xs = [torch.rand(1, 3, 16 + 8*i, 24) for i in range(4)]
    with torch.no_grad(): want = [m(x) for x in xs]
    def work(i):
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(m(xs[i]), want[i]): wrong.append(i)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong
def test_copies_stand_alone():
    m = unet(); x = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        want = m(x)
        for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            assert torch.equal(other(x), want)
            for p in other.parameters(): p.zero_()
        assert torch.equal(m(x), want)
def test_nothing_is_kept_when_the_body_runs_alone_or_fails():
    from blocks.model.unet import _KEPT
    m = unet(); m[0](torch.rand(1, 3, 16, 16)); assert _KEPT.get() is None
    with pytest.raises(RuntimeError): m(torch.rand(1, 5, 16, 16))
    assert _KEPT.get() is None and sum(len(o._forward_hooks) for o in m.modules()) == 2 and [len(o._forward_hooks) for o in DynamicUnet(m[0], 2)._skip_modules()] == [1, 1]
def test_an_exported_graph_is_the_same_network():
    m = unet(); x = torch.rand(1, 3, 32, 32)
    with torch.no_grad(): assert torch.allclose(torch.export.export(m, (x,)).module()(x), m(x), atol=1e-5)

# ---- groups and spec ------------------------------------------------------------------------------------------
def test_groups_are_early_body_late_body_decoder():
    with META: m = create_unet_model('resnet18', 2, pretrained=False)
    ids = [{id(p) for p in g} for g in param_groups(m)]
    assert ids == [{id(p) for p in o.parameters()} for o in (m[0][:6], m[0][6:], m[1])]
@pytest.mark.parametrize('kw', [{}, dict(self_attention=True, blur=True, blur_final=False, bottle=True, y_range=(0, 5)), dict(last_cross=False, n_in=1, img_size=(96, 64))])
def test_spec_rebuilds_the_model(kw):
    m = create_unet_model('resnet18', 2, pretrained=False, **dict(dict(cut=6), **kw)).eval(); spec = json.loads(json.dumps(m.spec)); rng = torch.get_rng_state()
    buf = io.BytesIO(); torch.save(m.spec, buf); buf.seek(0); assert torch.load(buf, weights_only=True) == m.spec == spec and spec['custom'] == []
    back = build_vision_model(spec).eval(); assert torch.equal(rng, torch.get_rng_state()) and back.spec == spec and repr(back) == repr(m)
    back.load_state_dict(m.state_dict()); x = torch.rand(1, kw.get('n_in', 3), 50, 40)
    with torch.no_grad(): assert torch.equal(back(x), m(x))
def test_what_is_code_is_named():
    m = create_unet_model(small, 2, pretrained=False); assert m.spec['custom'] == ['arch']
    with pytest.raises(ExportError, match='arch=…'): build_vision_model(m.spec)
    build_vision_model(m.spec, arch=small).load_state_dict(m.state_dict())
def test_a_file_of_a_unet_gives_its_body_to_a_classifier(tmp_path):
    m = create_unet_model('resnet18', 2, pretrained=False, cut=6); torch.save(m.state_dict(), tmp_path/'w.pth')
    assert torch.equal(create_vision_model('resnet18', 3, cut=6, weights=tmp_path/'w.pth')[0][4][0].conv1.weight, m[0][4][0].conv1.weight)

# ---- the learner ----------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Twelve grey-blue pictures, 40×32, with a bright rectangle, and its mask"
    root, rng = tmp_path_factory.mktemp('seg'), np.random.default_rng(0)
    for i in range(12):
        a, m = rng.integers(0, 60, (32, 40, 3), dtype=np.uint8), np.zeros((32, 40), np.uint8)
        y, x = rng.integers(2, 16, 2); m[y:y+12, x:x+16] = 1; a[m == 1] += 150
        for part, o in (('im', a), ('lab', m)): (root/part).mkdir(exist_ok=True); Image.fromarray(o).save(root/part/f'{i}.png')
    return root
def loaders(folder, target=None, **kw):
    block = DataBlock(blocks=(ImageBlock, target or MaskBlock(codes=['out', 'in'])), get_items=lambda p: sorted((p/'im').iterdir()), get_y=lambda p: p.parent.parent/'lab'/p.name, **kw)
    return block.dataloaders(folder, bs=4, num_workers=0, seed=1, device='cpu')

def test_learns_a_rectangle_exports_and_loads_in_a_fresh_process(folder, tmp_path):
    torch.manual_seed(0); learn = unet_learner(loaders(folder), 'resnet18', pretrained=False, cut=5)
    with learn.no_bar(): before = learn.validate()[0]; learn.fit_one_cycle(8, 1e-2); assert learn.validate()[0] < before/2
    path, item = learn.export(tmp_path/'u.pkl'), folder/'im'/'3.png'; mask, tensor, probs = learn.predict(item)
    assert mask.shape == (32, 40) and isinstance(mask, np.ndarray) and tensor.shape == (32, 40) and probs.shape == (2, 32, 40) and torch.allclose(probs.sum(0), torch.ones(32, 40))
    assert (mask == np.array(Image.open(folder/'lab'/'3.png'))).mean() > .9
    code = f"import numpy as np, torch; from blocks.infer.file import load_learner; m, t, p = load_learner({str(path)!r}).predict({str(item)!r}); np.savez({str(tmp_path/'r.npz')!r}, m=m, t=t.numpy(), p=p.numpy())"
    subprocess.run([sys.executable, '-c', code], check=True)
    got = np.load(tmp_path/'r.npz'); assert np.array_equal(got['m'], mask) and np.array_equal(got['t'], tensor.numpy()) and np.allclose(got['p'], probs.numpy(), atol=1e-5)

def test_frozen_with_weights_and_its_statistics_stay(folder, tmp_path):
    torch.save(small().state_dict(), tmp_path/'w.pth'); learn = unet_learner(loaders(folder), small, weights=tmp_path/'w.pth')
    assert [g[0].requires_grad for g in learn.splitter(learn.model)] == [False, False, True] and learn.model.mean is not None
    body, head = ({k: v.clone() for k, v in learn.model[i].state_dict().items()} for i in (0, 1))
    with learn.no_bar(): learn.fit(1)
    assert all(torch.equal(v, body[k]) for k, v in learn.model[0].state_dict().items() if 'num_batches' not in k) and all(not torch.equal(v, head[k]) for k, v in learn.model[1].state_dict().items() if 'running' in k)
    assert learn.model[1].middle[2][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert unet_learner(loaders(folder), small, pretrained=False).model.mean is None
    with pytest.raises(WeightsError, match='none.pth'): unet_learner(loaders(folder), small, weights=tmp_path/'none.pth')

def test_training_is_repeatable(folder):
    def train():
        torch.manual_seed(3); learn = unet_learner(loaders(folder), small, pretrained=False, self_attention=True, blur=True)
        with learn.no_bar(): learn.fit(1)
        return learn.model.state_dict()
    a, b = train(), train(); assert all(torch.equal(a[k], b[k]) for k in a)
