"Lower precision changes how fast a step is, not what it computes."
import pytest
import torch
from torch import nn

from blocks.train.tricks import native_bf16, training_precision

cpu = torch.device('cpu')

def close(a, b, tol=3e-2): return float((a - b).norm()/b.norm().clamp_min(1e-8)) < tol

def gradients(conv, x, precision):
    conv, x = conv.requires_grad_(True), x.clone().requires_grad_(True)
    conv.zero_grad()
    with training_precision(cpu, precision): out = conv(x)
    torch.sin(out.float()).sum().backward()
    return [out.detach().float(), x.grad, *(p.grad.clone() for p in conv.parameters())], out.dtype

@pytest.mark.parametrize('kw', [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=5, stride=(2, 1), padding=(2, 1)), dict(kernel_size=3, padding='same'), dict(kernel_size=5, padding=2), dict(kernel_size=7, padding=3, stride=2), dict(kernel_size=(3, 7), padding=(0, 3)), dict(kernel_size=(1, 5), padding=(2, 2)),
                                dict(kernel_size=3, padding=2, dilation=2), dict(kernel_size=3, bias=False), dict(kernel_size=3, padding=1, padding_mode='reflect')], ids=str)
@pytest.mark.parametrize('size', [12, 24, 7])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_depthwise_gradients_are_those_of_32_bits(kw, size, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, groups=8, **kw).to(memory_format=layout)
    x = torch.randn(3, 8, size, size).to(memory_format=layout)
    want, _ = gradients(conv, x, 'fp32')
    got, dtype = gradients(conv, x, 'bf16')
    assert dtype == torch.bfloat16 and all(g.dtype == torch.float32 and g.shape == w.shape and close(g, w) for g, w in zip(got, want))

@pytest.mark.parametrize('conv', [nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(1, 1, 3), nn.Conv2d(8, 8, 1)], ids=str)
def test_other_convolutions_are_left_alone(conv):
    x = torch.randn(2, conv.in_channels, 9, 9)
    assert all(close(g, w) for g, w in zip(gradients(conv, x, 'bf16')[0], gradients(conv, x, 'fp32')[0]))

def test_a_frozen_depthwise_layer_passes_gradients_on():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 4, 3, groups=4), torch.randn(2, 4, 8, 8)
    def grad(precision):
        conv.requires_grad_(False)
        y = x.clone().requires_grad_(True)
        with training_precision(cpu, precision): out = conv(y)
        out.float().pow(2).sum().backward()
        return y.grad
    assert close(grad('bf16'), grad('fp32')) and conv.weight.grad is None

def test_nothing_is_left_behind():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    with pytest.raises(ZeroDivisionError):
        with training_precision(cpu, 'bf16'): 1/0
    with training_precision(cpu, 'bf16'): assert conv(torch.ones(1, 4, 8, 8)).dtype == torch.bfloat16
    assert conv(torch.ones(1, 4, 8, 8)).dtype == torch.float32 and not torch.is_autocast_enabled('cpu')

def test_a_context_that_is_not_entered_changes_nothing():
    context = training_precision(cpu, 'bf16')
    try: assert not torch.is_autocast_enabled('cpu')
    finally:
        if hasattr(context, 'close'): context.close()

def test_auto_follows_the_hardware(monkeypatch):
    import blocks.train.tricks as module
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, 'native_bf16', lambda device, native=native: native)
        with training_precision(cpu): assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    with training_precision(cpu, 'fp32'): assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32

def test_the_answer_for_a_device_is_yes_or_no(): assert native_bf16(cpu) in (True, False) and native_bf16(torch.device('mps')) is False
