"Lower precision changes how fast a step is, not what it computes."
import pytest
import torch
from torch import nn

from blocks.train.tricks import native_bf16, model_precision

cpu = torch.device('cpu')

def close(a, b, tol=3e-2): return float((a - b).norm()/b.norm().clamp_min(1e-8)) < tol

def test_nothing_is_left_behind():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    with pytest.raises(ZeroDivisionError):
        with model_precision(cpu, 'bf16'): 1/0
    with model_precision(cpu, 'bf16'): assert conv(torch.ones(1, 4, 8, 8)).dtype == torch.bfloat16
    assert conv(torch.ones(1, 4, 8, 8)).dtype == torch.float32 and not torch.is_autocast_enabled('cpu')

def test_a_context_that_is_not_entered_changes_nothing():
    context = model_precision(cpu, 'bf16')
    try: assert not torch.is_autocast_enabled('cpu')
    finally:
        if hasattr(context, 'close'): context.close()

def test_auto_follows_the_hardware(monkeypatch):
    import blocks.train.tricks as module
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, 'native_bf16', lambda device, native=native: native)
        with model_precision(cpu): assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    with model_precision(cpu, 'fp32'): assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32

def test_the_answer_for_a_device_is_yes_or_no(): assert native_bf16(cpu) in (True, False) and native_bf16(torch.device('mps')) is False
