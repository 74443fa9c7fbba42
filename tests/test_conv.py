"Convolutions in 16 bits on a CPU: other ways to the same numbers."
import pytest
import torch
from torch import nn

from blocks.train import conv as module
from blocks.train.conv import short_convs
from blocks.train.tricks import model_precision

cpu = torch.device('cpu')

@pytest.fixture(autouse=True)
def tiles(monkeypatch): monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: True)

def close(a, b, tol=3e-2): return float((a - b).norm()/b.norm().clamp_min(1e-8)) < tol

def gradients(conv, x, precision, wants_x=True):
    x = x.clone().requires_grad_(wants_x)
    conv.zero_grad()
    with model_precision(cpu, precision): out = conv(x)
    torch.sin(out.float()).sum().backward()
    return [out.detach().float(), *([x.grad] if wants_x else []), *(p.grad.clone() for p in conv.parameters() if p.requires_grad)], out.dtype

def same(conv, x, **kw):
    (want, _), (got, dtype) = gradients(conv, x, 'fp32', **kw), gradients(conv, x, 'bf16', **kw)
    assert dtype == torch.bfloat16 and all(g.dtype == torch.float32 and g.shape == w.shape and close(g, w) for g, w in zip(got, want, strict=True))

@pytest.fixture
def taken(monkeypatch):
    "Which ways were taken"
    ways = []
    for name in ('_Product', '_Depthwise'):
        way = getattr(module, name)
        monkeypatch.setattr(way, 'forward', staticmethod(lambda ctx, *args, name=name, real=way.forward: ways.append((name, args[-1]) if name == '_Product' else name) or real(ctx, *args)))
    return ways

@pytest.mark.parametrize('kw', [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=5, stride=(2, 1), padding=(2, 1)), dict(kernel_size=3, padding='same'), dict(kernel_size=5, padding=2), dict(kernel_size=7, padding=3, stride=2), dict(kernel_size=(3, 7), padding=(0, 3)), dict(kernel_size=(1, 5), padding=(2, 2)),
                                dict(kernel_size=3, padding=2, dilation=2), dict(kernel_size=3, bias=False), dict(kernel_size=3, padding=1, padding_mode='reflect')], ids=str)
@pytest.mark.parametrize('size', [12, 24, 7])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_depthwise_gradients_are_those_of_32_bits(kw, size, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, groups=8, **kw).to(memory_format=layout)
    same(conv, torch.randn(3, 8, size, size).to(memory_format=layout))

@pytest.mark.parametrize('kw', [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=3, stride=2), dict(kernel_size=5, stride=(2, 1), padding=(2, 1)), dict(kernel_size=(1, 5), padding=(2, 2)), dict(kernel_size=7, padding=3, stride=3),
                                dict(kernel_size=1), dict(kernel_size=1, stride=2, bias=False), dict(kernel_size=1, padding=1), dict(kernel_size=2, stride=3), dict(kernel_size=3, padding='same'), dict(kernel_size=3, padding=1, padding_mode='circular')], ids=str)
@pytest.mark.parametrize('size', [(4, 4), (7, 6), (8, 8), (16, 9)], ids=str)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_products_are_those_of_32_bits(kw, size, layout, monkeypatch):
    torch.manual_seed(0)
    if kw['kernel_size'] == 7 and min(size) < 4: return
    conv = nn.Conv2d(16, 24, **kw).to(memory_format=layout)
    same(conv, torch.randn(3, 16, *size).to(memory_format=layout))

def test_the_way_depends_on_the_shape(taken):
    def way(conv, size, batch=2):
        taken.clear()
        with model_precision(cpu, 'bf16'): conv(torch.randn(batch, conv.in_channels, size, size))
        return taken[0] if taken else None
    three, one, strided = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, 2, 1)
    assert [way(three, n) for n in (4, 6, 8, 9)] == [('_Product', True), ('_Product', True), ('_Product', False), None]
    assert [way(strided, n) for n in (8, 16, 18)] == [('_Product', True), ('_Product', False), None]
    assert [way(one, n) for n in (1, 16, 17)] == [('_Product', True), ('_Product', True), None]
    with torch.no_grad(): assert way(three, 4) is None
    three.requires_grad_(False)
    assert way(three, 4) is None
    assert way(nn.Conv2d(16, 16, 3, groups=16), 8) == '_Depthwise' and way(nn.Conv2d(16, 8, 3, groups=8), 4) is None and way(nn.Conv2d(16, 8, 3, dilation=2), 6) is None
    assert way(nn.Conv2d(16, 8, 3), 3, batch=0) == ('_Product', True)                    # an empty batch is one too

def test_processors_without_tiles_multiply_as_pytorch_does(taken, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    with model_precision(cpu, 'bf16'):
        nn.Conv2d(16, 8, 1)(torch.randn(2, 16, 4, 4))
        assert not taken
        nn.Conv2d(8, 8, 3, groups=8)(torch.randn(2, 8, 4, 4))
        assert taken == ['_Depthwise']

@pytest.mark.parametrize('conv, size', [(nn.Conv2d(8, 16, 3, groups=8), 9), (nn.Conv2d(8, 8, 3, groups=4), 4), (nn.Conv2d(1, 1, 3), 20), (nn.Conv2d(8, 8, 3, dilation=2), 7), (nn.Conv2d(8, 8, 3), 40)], ids=str)
def test_other_convolutions_are_left_alone(conv, size):
    x = torch.randn(2, conv.in_channels, size, size)
    with short_convs(), torch.autocast('cpu', torch.bfloat16): got = conv(x)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(got, conv(x))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_outside_of_autocast_nothing_is_shortened(dtype):
    conv, x = nn.Conv2d(8, 8, 3, groups=8).to(dtype), torch.randn(2, 8, 5, 5, dtype=dtype)
    want = conv(x)
    with short_convs(): assert torch.equal(conv(x), want) and conv(x).dtype == dtype
    with short_convs(), torch.autocast('cpu', torch.float16): assert conv(x).dtype != torch.bfloat16

@pytest.mark.parametrize('conv', [nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 3, 2, 1)], ids=str)
def test_a_frozen_layer_passes_gradients_on(conv):
    torch.manual_seed(0)
    conv.requires_grad_(False)
    x = torch.randn(2, 4, 8, 8)
    same(conv, x)
    assert conv.weight.grad is None

def test_a_first_layer_needs_no_gradient_of_its_input():
    torch.manual_seed(0)
    same(nn.Conv2d(3, 8, 3, 2, 1), torch.randn(2, 3, 12, 12), wants_x=False)

def test_pictures_without_a_batch_dimension_and_empty_maps_are_pytorchs():
    conv = nn.Conv2d(8, 4, 3)
    with model_precision(cpu, 'bf16'):
        assert conv(torch.randn(8, 5, 5)).shape == (4, 3, 3)
        with pytest.raises(RuntimeError, match='[Kk]ernel size'): conv(torch.randn(2, 8, 2, 2))

def test_a_network_learns_the_same(monkeypatch):
    from torchvision.models import resnet18
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8) % 2
    def losses(precision):
        torch.manual_seed(0)
        model, out = resnet18(num_classes=2).to(memory_format=torch.channels_last), []
        opt = torch.optim.SGD(model.parameters(), .01)
        for _ in range(3):
            with model_precision(cpu, precision): loss = nn.functional.cross_entropy(model(x).float(), y)
            loss.backward(); opt.step(); opt.zero_grad()
            out.append(float(loss.detach()))
        return out
    assert losses('bf16') == pytest.approx(losses('fp32'), abs=.08)
