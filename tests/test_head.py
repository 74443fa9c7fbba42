"Heads, the normalising model, its spec, and parameter groups"
import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blocks.core import DataError, ExportError
from blocks.model.head import (
    AdaptiveConcatPool2d,
    SigmoidRange,
    VisionModel,
    build_vision_model,
    create_head,
    create_vision_model,
    mlp_head,
    param_groups,
)

def small(width=8): return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 16, 3, 2, 1))
META = torch.device('meta')                                              # shapes without numbers: quick

def vision(arch=small, n_out=2, **kw): return create_vision_model(arch, n_out, pretrained=False, **kw)
def kinds(m): return [type(o).__name__ for o in m]
def linears(m): return [(o.in_features, o.out_features, o.bias is not None) for o in m.modules() if isinstance(o, nn.Linear)]

@pytest.fixture()
def weights(tmp_path): torch.save(small().state_dict(), tmp_path/'w.pth'); return tmp_path/'w.pth'

# ---- the head -------------------------------------------------------------------------------------------------
def test_concat_pool_is_max_then_mean():
    x = torch.randn(2, 3, 5, 7); assert torch.allclose(AdaptiveConcatPool2d()(x)[..., 0, 0], torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1))
    assert AdaptiveConcatPool2d((2, 1))(x).shape == (2, 6, 2, 1)
def test_head_as_fastai_makes_it():
    bn_last = ['BatchNorm1d', 'Dropout', 'Linear']
    assert kinds(create_head(8, 3)) == ['AdaptiveConcatPool2d', 'Flatten', *bn_last, 'ReLU', *bn_last]
    assert kinds(create_head(8, 3, lin_ftrs=[], bn_final=True, y_range=(0, 1))) == ['AdaptiveConcatPool2d', 'Flatten', *bn_last, 'BatchNorm1d', 'SigmoidRange']
    assert kinds(create_head(8, 3, pool=False, first_bn=False, ps=0)) == ['Linear', 'ReLU', 'BatchNorm1d', 'Linear']
    assert kinds(create_head(8, 3, concat_pool=False, lin_first=True)) == ['AdaptiveAvgPool2d', 'Flatten', 'Dropout', 'Linear', 'ReLU', 'BatchNorm1d', 'Dropout', 'Linear']
    assert linears(create_head(8, 3)) == [(16, 512, False), (512, 3, False)] and linears(create_head(8, 3, first_bn=False, lin_ftrs=[5])) == [(16, 5, True), (5, 3, False)]
    assert linears(create_head(8, 3, lin_first=True, concat_pool=False)) == [(8, 512, False), (512, 3, True)]
    assert create_head(8, 3, bn_final=True)[-1].momentum == .01
def test_dropouts():
    drops = lambda **kw: [m.p for m in create_head(8, 3, **kw) if isinstance(m, nn.Dropout)]
    assert drops() == [.25, .5] and drops(ps=.2, lin_ftrs=[9, 9]) == [.1, .1, .2] and drops(ps=[.1, .3]) == [.1, .3] and drops(lin_first=True) == [.25, .5]
    with pytest.raises(DataError, match='3 values.*2 linear'): create_head(8, 3, ps=[.1, .2, .3])
@pytest.mark.parametrize('flags', list(itertools.product([True, False], repeat=5)))
def test_every_head_runs(flags):
    kw = dict(zip(('pool', 'concat_pool', 'first_bn', 'bn_final', 'lin_first'), flags)); x = torch.randn(4, 8, 3, 3) if kw['pool'] else torch.randn(4, 8)
    out = create_head(8, 3, lin_ftrs=[6, 5], **kw)(x); assert out.shape == (4, 3); out.sum().backward()
def test_linear_layers_start_as_he_et_al():
    torch.manual_seed(0)
    for m in (create_head(512, 10), mlp_head()(1024, 10), create_head(512, 10, first_bn=False)):
        for lin in (o for o in m.modules() if isinstance(o, nn.Linear)):
            assert abs(lin.weight.std()/(2/lin.in_features)**.5 - 1) < .05 and lin.weight.abs().max() > 2.2*lin.weight.std()      # normal, not uniform
            assert lin.bias is None or not lin.bias.any()
def test_sigmoid_range(): assert torch.allclose(SigmoidRange(-1, 3)(torch.tensor([-100., 0, 100])), torch.tensor([-1., 1, 3]))
def test_mlp_head():
    h = mlp_head(hidden=[64, 32], ps=.3); m = h(8, 2)
    assert [o[1] for o in linears(m)] == [64, 32, 2] and [o.p for o in m if isinstance(o, nn.Dropout)] == [.3, .3] and m(torch.rand(2, 8, 3, 3)).shape == (2, 2)
    assert pickle.loads(pickle.dumps(h)) == h and linears(mlp_head(hidden=())(8, 2)) == [(8, 2, True)]

# ---- the model ------------------------------------------------------------------------------------------------
def test_normalises_with_the_statistics_of_the_weights(weights):
    m = create_vision_model(small, 2, weights=weights).eval(); x = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(o).view(1, 3, 1, 1) for o in ((.485, .456, .406), (.229, .224, .225)))
    assert torch.allclose(m(x), m[1](m[0]((x - mean)/std)), atol=1e-5) and {'mean', 'std'} < {*m.state_dict()} and len(m) == 2
    assert vision().mean is None and create_vision_model(small, 2, weights=weights, normalize=False).mean is None and 'mean' not in vision().state_dict()
    m = create_vision_model(small, 2, weights=weights, n_in=1); assert m.mean.flatten().tolist() == pytest.approx([.449]) and m.std.flatten().tolist() == pytest.approx([.226])
    assert create_vision_model(small, 2, weights=weights, n_in=4).mean.flatten().tolist() == pytest.approx([.485, .456, .406, .485])
def test_a_grey_batch_is_not_spread_over_three_channels(weights):
    with pytest.raises(DataError, match='3 channels'): create_vision_model(small, 2, weights=weights).eval()(torch.rand(2, 1, 16, 16))
def test_normalising_keeps_the_memory_layout(weights):
    m = create_vision_model(small, 2, weights=weights); x = torch.rand(2, 3, 8, 8)
    assert m._normalize(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last) and m._normalize(x).is_contiguous()
def test_behaves_as_a_sequential():
    m = vision(); assert isinstance(m[:1], nn.Sequential) and m[:1][0] is m[0] and m[-1] is m[1] and [n for n, _ in m.named_children()] == ['0', '1']
    c = copy.deepcopy(m).eval(); x = torch.rand(2, 3, 16, 16); assert torch.equal(c(x), m.eval()(x)) and c.spec == m.spec
def test_gradients_reach_the_image(weights):
    x = torch.rand(2, 3, 16, 16, requires_grad=True); create_vision_model(small, 2, weights=weights).eval()(x).sum().backward(); assert x.grad.abs().sum() > 0
@pytest.mark.parametrize('kw, text', [(dict(n_out=0), 'n_out'), (dict(n_out=2.), 'n_out'), (dict(ps=[.1]*3), 'ps='), (dict(y_range=(3, 1)), 'low < high'), (dict(n_in=0), 'n_in'),
                                      (dict(custom_head='x'), 'custom_head'), (dict(custom_head=lambda nf, n: 3), 'returned a int')])
def test_mistakes(kw, text):
    with pytest.raises(DataError, match=text): vision(**kw)
def test_unknown_argument():
    with pytest.raises(TypeError, match='dropout'): vision(dropout=.5)
def test_custom_heads():
    own = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)); w = own[2].weight.clone(); m = vision(custom_head=own)
    assert m[1] is own and torch.equal(own[2].weight, w)                                   # used as it is
    seen = []
    def factory(nf, n_out): seen.append((nf, n_out)); return own
    assert vision(custom_head=factory)[1] is own and seen == [(16, 2)]

# ---- the spec -------------------------------------------------------------------------------------------------
def plain(v): return all(plain(o) for o in (v.values() if isinstance(v, dict) else v)) if isinstance(v, (dict, list, tuple)) else v is None or type(v) in (str, int, float, bool)
@pytest.mark.parametrize('kw', [{}, dict(lin_ftrs=[32], ps=[.1, .2], y_range=(0, 5)), dict(custom_head=mlp_head([8])), dict(arch='resnet18', n_in=1, cut=6, lin_first=True, concat_pool=False),
                                dict(first_bn=False, bn_final=True), dict(arch='test_efficientnet')])
def test_spec_rebuilds_the_model(kw):
    m = vision(**dict(dict(arch='mobilenet_v3_small'), **kw)).eval(); assert plain(m.spec) and m.spec['custom'] == []
    buf = io.BytesIO(); torch.save(m.spec, buf); buf.seek(0); rng = torch.get_rng_state()
    back = build_vision_model(torch.load(buf, weights_only=True)).eval(); assert torch.equal(rng, torch.get_rng_state())
    back.load_state_dict(m.state_dict()); x = torch.rand(2, kw.get('n_in', 3), 64, 64)
    with torch.no_grad(): assert torch.equal(m(x), back(x))
    assert repr(back) == repr(m) and back.spec == m.spec
def test_spec_with_weights_needs_none_to_rebuild(tmp_path, monkeypatch):
    from torchvision.models import squeezenet1_1
    torch.save(squeezenet1_1().state_dict(), tmp_path/'w.pth'); m = create_vision_model('squeezenet1_1', 2, weights=tmp_path/'w.pth'); (tmp_path/'w.pth').unlink()
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *a, **k: pytest.fail('fetched weights'))
    back = build_vision_model(m.spec); back.load_state_dict(m.state_dict()); assert torch.equal(back.mean, m.mean)
def test_a_spec_of_the_first_files_still_builds():
    spec = dict(arch='squeezenet1_1', source='torchvision', n_in=3, n_out=2, cut=None, mean=[.485, .456, .406], std=[.229, .224, .225], custom=[],
                head={'create_head': dict(ps=.5, lin_ftrs=None, y_range=None, concat_pool=True, first_bn=True, bn_final=False, lin_first=False)})
    m = build_vision_model(spec); assert type(m) is VisionModel and kinds(m[1]) == kinds(create_head(512, 2)) and {k.split('.')[0] for k in m.state_dict()} == {'mean', 'std', '0', '1'}
def test_what_is_code_is_named():
    cut = lambda net: net[:2]; m = vision(cut=cut, custom_head=lambda nf, n: create_head(nf, n)); assert m.spec['custom'] == ['arch', 'cut', 'custom_head'] and plain(m.spec)
    with pytest.raises(ExportError, match='arch=…, custom_head=…'): build_vision_model(m.spec, cut=cut)
    back = build_vision_model(m.spec, arch=small, cut=cut, custom_head=lambda nf, n: create_head(nf, n)); back.load_state_dict(m.state_dict())
    with pytest.raises(TypeError, match='weights'): build_vision_model(m.spec, arch=small, cut=cut, custom_head=create_head, weights='x')
    with pytest.raises(ExportError, match='spec'): build_vision_model({'arch': 'resnet18'})

# ---- groups ---------------------------------------------------------------------------------------------------
def sizes(m): return [sum(p.numel() for p in g) for g in param_groups(m)]
def covered(m): return sorted(id(p) for g in param_groups(m) for p in g) == sorted(id(p) for p in m.parameters())
def ids(*modules): return {id(p) for m in modules for p in m.parameters()}
@pytest.mark.parametrize('arch', ['resnet18', 'resnet18.a1_in1k'])
def test_resnet_groups_are_fastais(arch):
    with META: m = vision(arch, 10)
    assert sizes(m) == [683_072, 10_493_440, 532_480] and covered(m)
def test_groups_split_where_the_rule_says():
    with META: m, v, d = vision('resnet50'), vision('vgg11_bn'), vision('densenet121')
    assert [{id(p) for p in g} for g in param_groups(m)] == [ids(m[0][:6]), ids(m[0][6:]), ids(m[1])]
    assert {id(p) for p in param_groups(d)[0]} == ids(d[0][0][:7])                 # before the second transition
    assert {id(p) for p in param_groups(v)[0]} == ids(v[0][0][:15])                   # four of eight convolutions
    m = vision('tf_efficientnet_lite0'); b = m[0]; assert {id(p) for p in param_groups(m)[0]} == ids(b.conv_stem, b.bn1, *b.blocks[:3])
@pytest.mark.parametrize('arch', ['mobilenet_v2', 'squeezenet1_1', 'shufflenet_v2_x0_5', 'swin_t', 'convnext_tiny', 'vgg16', 'googlenet'])
def test_groups_cover_each_parameter_once(arch):
    with META: m = vision(arch)
    assert len(param_groups(m)) == 3 and covered(m) and {id(p) for p in param_groups(m)[2]} == ids(m[1])
def test_odd_bodies():
    one = vision(lambda: nn.Conv2d(3, 8, 3)); assert len(param_groups(one)) == 2 and covered(one)
    class Own(nn.Module):
        "A parameter of its own, and a layer used twice"
        def __init__(self):
            super().__init__(); self.scale = nn.Parameter(torch.ones(1)); self.a = nn.Conv2d(3, 3, 3); self.b = nn.Conv2d(3, 8, 3); self.again = nn.ModuleList([self.a])
        def forward(self, x): return self.b(self.a(x*self.scale))
    m = vision(Own); groups = param_groups(m); assert covered(m) and len(groups) == 3 and any(p is m[0].scale for p in groups[0]) and all(p is not m[0].a.weight for p in groups[1])
    assert isinstance(m, VisionModel) and len(param_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == 1
def test_no_empty_groups(): assert len(param_groups(vision(custom_head=nn.AdaptiveAvgPool2d(1)))) == 2
def test_f_is_the_same_as_by_hand():
    m = create_head(4, 2).eval(); x = torch.rand(3, 4, 5, 5)
    pooled = torch.cat([F.adaptive_max_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1)], 1).flatten(1); want = m[8](m[6](m[5](m[4](m[2](pooled)))))
    assert torch.allclose(m(x), want, atol=1e-6)
