"Activation checkpointing computes the same with less, and leaves nothing behind; the batch size that is found fits"
import copy, gc
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from blocks.core import TrainingError, set_seed
from blocks.model.head import create_vision_model
from blocks.train import memory
from blocks.train.callback import Callback
from blocks.train.learner import Learner
from blocks.train.memory import ActivationCheckpointing, _available, _cgroup_room, _regions, _worth, find_batch_size

def state(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}
def model_of(arch, seed=0, **kw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_vision_model(arch, 2, pretrained=False, **kw)

def saved_bytes(step, model):
    "What `step` keeps for its way back, counted apart from the module under test"
    own, kept = {t.data_ptr() for t in model.parameters()}, {}
    def pack(t):
        if t.data_ptr() not in own: kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): held = step()
    del held
    return sum(kept.values())

class Kept(Callback):
    "The bytes that the last training batch keeps, and the mark that a forward pass leaves in the model"
    order = 80    # before `ActivationCheckpointing` places its regions
    def before_batch(self):
        if not self.learn.training: return
        self.own, self.kept = {t.untyped_storage().data_ptr() for t in self.learn.model.parameters()}, {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t); self.hooks.__enter__()
    def pack(self, t):
        if t.untyped_storage().data_ptr() not in self.own: self.kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    def after_loss(self):
        if self.learn.training: self.hooks.__exit__(); self.bytes = sum(self.kept.values())

def trained(dls, model, *cbs, n=1, precision='fp32', **kw):
    set_seed(1)
    learn, kept = Learner(dls.new(), model, opt_func='sgd', precision=precision, **kw), Kept()
    with learn.no_bar(): learn.fit(n, 1e-2, cbs=[kept, *cbs])
    return learn, kept.bytes

def few(dls, n, **changes):
    "Loaders over `n` training items and four for validation"
    dls = dls.new(**changes)
    for name, k in (('train', n), ('valid', 4)):
        dl = getattr(dls, name)
        setattr(dls, name, dl.new(samples=dl.samples.new(fields=tuple(f[:k] for f in dl.samples.fields)), bs=min(dl.bs, n)))
    return dls

def as_without(dls, model, **kw):
    "(bytes kept without, bytes kept with), after it was seen that weights and statistics are the same"
    (a, much), (b, little) = trained(dls, copy.deepcopy(model), **kw), trained(dls, copy.deepcopy(model), ActivationCheckpointing(), **kw)
    a, b, start = state(a.model), state(b.model), state(model)
    assert a.keys() == b.keys() == start.keys()
    for k in a: torch.testing.assert_close(b[k], a[k], rtol=0, atol=1e-6)
    assert any(not torch.equal(a[k], start[k]) for k in a)
    return much, little

# ---- the same, with less -----------------------------------------------------------------------------------------
@pytest.mark.parametrize('arch', ['resnet18', pytest.param('resnet34', marks=pytest.mark.slow)])
def test_less_than_half_is_kept_and_all_comes_out_the_same(dls, arch):
    much, little = as_without(few(dls, 4, size=128, bs=2), model_of(arch))
    assert little < much/2

@pytest.mark.parametrize('arch', ['test_efficientnet', 'test_convnext', 'test_resnet', pytest.param('densenet121', marks=pytest.mark.slow), pytest.param('mobilenet_v2', marks=pytest.mark.slow)])
def test_other_architectures(dls, arch):
    "With dropout or stochastic depth in some of them: the random numbers are the same"
    much, little = as_without(few(dls, 12, size=32, bs=6), model_of(arch))
    assert little < .7*much

@pytest.mark.parametrize('arch', ['test_efficientnet', pytest.param('mobilenet_v2', marks=pytest.mark.slow)])
def test_depthwise_convolutions_in_16_bits(dls, arch, monkeypatch):
    from blocks.train import conv
    passes, real = [], conv._Depthwise.forward
    monkeypatch.setattr(conv._Depthwise, 'forward', staticmethod(lambda *args: passes.append(1) or real(*args)))
    dls = few(dls, 12, size=32, bs=6)
    trained(dls, model_of(arch), precision='bf16')
    once, passes[:] = len(passes), []
    as_without(dls, model_of(arch), precision='bf16')
    assert once and len(passes) == 3*once                                 # as it is, and twice with regions

def test_dropout_draws_the_same_numbers_when_it_is_computed_again(dls):
    class Block(nn.Module):
        def __init__(self, i): super().__init__(); self.a, self.b, self.drop = nn.Conv2d(i, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(.5)
        def forward(self, x): return self.drop(torch.sin(self.b(self.drop(torch.sin(self.a(x))))))
    torch.manual_seed(0)
    much, little = as_without(dls, nn.Sequential(Block(3), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)), n=2)
    assert little < much/2

def test_modules_of_ones_own(dls):
    model, ran = model_of('test_resnet'), []
    layer = model[0].layer2
    layer.register_forward_pre_hook(lambda m, args: ran.append('layer') if m.training else None)
    layer[0].register_forward_pre_hook(lambda m, args: ran.append('block') if m.training else None)
    trained(dls, model, ActivationCheckpointing(lambda m: [layer[0], layer, layer]))        # what is inside of another, or twice, counts once
    steps = len(dls.train)
    assert ran.count('layer') == steps and ran.count('block') == 2*steps

def test_a_function_mode_is_there_again_when_a_region_is():
    from torch.overrides import TorchFunctionMode
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return 2*out if func is torch.conv2d else out
    conv, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)), torch.rand(2, 3, 8, 8)
    grads = []
    for forward in (conv.forward, ActivationCheckpointing._again(conv.forward, [conv])):
        with Doubled(): out = forward(x)
        out.square().sum().backward()
        grads.append([p.grad.clone() for p in conv.parameters()]); conv.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads))

# ---- which regions -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('arch, kind, n', [('resnet34', 'BasicBlock', 16), ('efficientnet_b0', 'MBConv', 16), ('squeezenet1_1', 'Fire', 8), ('regnet_y_400mf', 'ResBottleneckBlock', 16),
                                           ('convnext_atto', 'ConvNeXtBlock', 12), ('efficientnet_lite0', 'InvertedResidual', 15), ('resnet26', 'Bottleneck', 8)])
def test_the_blocks_of_an_architecture_are_found(arch, kind, n):
    blocks = [type(m).__name__ for m, runs in _regions(model_of(arch)) if runs is None]
    assert blocks.count(kind) == n and len(set(blocks)) <= 2

def test_runs_of_layers_end_at_a_pooling_or_a_stride():
    conv = lambda stride: nn.Conv2d(4, 4, 3, stride)
    seq = nn.Sequential(conv(1), nn.ReLU(), conv(1), nn.MaxPool2d(2), conv(1), nn.ReLU(), conv(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    (found, runs), = _regions(seq)
    assert found is seq and [len(r) for r in runs] == [4, 2, 3, 2] and [_worth(r) for r in runs] == [True, True, True, False]

def test_a_model_without_blocks_is_refused_before_the_training(dls):
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 2)))
    with pytest.raises(TrainingError, match='modules='): learn.fit(1, cbs=ActivationCheckpointing())

# ---- nothing stays -----------------------------------------------------------------------------------------------
def placed(model): return [m for m in model.modules() if 'forward' in vars(m)]

class Look(Callback):
    "Notes at which events something is placed in the model; may stop the fit"
    order = 99
    def __init__(self, stop=None):
        self.seen, self.stop = {}, stop
        for event in ('before_batch', 'after_pred', 'before_backward', 'before_step', 'after_batch', 'before_validate', 'after_epoch', 'after_fit'): setattr(self, event, lambda event=event: self.look(event))
    def look(self, event):
        self.seen[event, self.learn.training] = len(placed(self.learn.model))
        if event == self.stop: raise KeyboardInterrupt

def test_the_model_is_as_it_was_but_while_it_computes_a_training_batch(dls):
    look = Look()
    learn, _ = trained(dls, model_of('test_resnet'), ActivationCheckpointing(), look)
    there = {k for k, n in look.seen.items() if n}
    assert there == {('before_batch', True)} and ('before_batch', False) in look.seen and not placed(learn.model)

def test_the_model_is_as_it_was_after_errors_and_an_interrupt(dls):
    learn = Learner(dls.new(), model_of('test_resnet'), precision='fp32')
    block = learn.model[0].layer1[0]
    own = block.forward = block.forward     # somebody's own replacement
    for cb in (Look('before_batch'), Look('before_backward')):
        with pytest.raises(KeyboardInterrupt), learn.no_bar(): learn.fit(1, cbs=[ActivationCheckpointing(), cb])
        assert placed(learn.model) == [block] and block.forward is own
    hook = learn.model[0].layer4.register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError), learn.no_bar(): learn.fit(1, cbs=ActivationCheckpointing())
    hook.remove()
    assert placed(learn.model) == [block]

def test_an_export_in_the_middle_of_training(dls, tmp_path):
    class Export(Callback):
        order = 95
        def before_batch(self):
            if self.learn.training and not self.learn.iter: self.learn.export('model.pkl')
    from blocks.infer.file import load_learner
    learn, _ = trained(dls, model_of('test_resnet'), ActivationCheckpointing(), Export(), path=tmp_path)
    assert not placed(load_learner(tmp_path/'model.pkl').model)

def test_statistics_are_updated_once_and_those_that_stay_stay(dls):
    model = model_of('test_resnet')
    trained(dls, model, ActivationCheckpointing(), n=2)
    assert {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {2*len(dls.train)}
    kept = model_of('test_resnet')
    before = state(kept)
    trained(dls, kept, ActivationCheckpointing(), train_bn=False)
    assert all(torch.equal(before[k], v) for k, v in state(kept[0]).items() for k in [f'0.{k}'] if 'running' in k)

# ---- the batch size ----------------------------------------------------------------------------------------------
class Live(TorchDispatchMode):
    "The largest sum of the memory of all tensors that were alive at once"
    def __init__(self): super().__init__(); self.alive, self.peak = {}, 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes(): s = t.untyped_storage(); self.alive.setdefault(s._cdata, (StorageWeakRef(s), s.nbytes()))
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out

def step(learn, n):
    batch = learn.dls.train.new(bs=n, shuffle=False, num_workers=0).one_batch()
    return learn.loss_func(learn.model.train()(batch[0]), *batch[1:])

def snapshot(learn):
    gen = torch.get_rng_state()
    opt = None if learn.opt is None else copy.deepcopy(learn.opt.state_dict())
    modes = [m.training for m in learn.model.modules()]
    return state(learn.model), gen, opt, [p.requires_grad for p in learn.model.parameters()], [p.grad for p in learn.model.parameters()], modes, learn.passes, learn.dls.train.epoch, learn.opt, learn.loss

def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a is b or a == b

def test_what_is_kept_stays_below_the_limit_and_for_twice_the_items_does_not(dls):
    learn = Learner(dls.new(size=64), model_of('test_resnet'), precision='fp32')
    weights = sum(4*p.numel() for p in learn.model.parameters())
    kept = {n: saved_bytes(lambda n=n: step(learn, n), learn.model) for n in (4, 8, 16, 32)}
    assert abs(kept[32] - 2*kept[16]) < .01*kept[32]
    for n in (4, 8, 16):
        for limit in (3*weights + 1.01*kept[n], 3*weights + .99*kept[2*n]):
            assert find_batch_size(learn, limit=limit) == n, (n, limit)
            assert kept[n] + 3*weights < limit < kept[2*n] + 3*weights

def test_the_peak_of_a_step_is_within_what_is_counted(dls):
    learn = Learner(dls.new(size=64), model_of('test_resnet'), precision='fp32')
    weights = sum(4*p.numel() for p in learn.model.parameters())
    loss = step(learn, 16); loss.backward(); learn.model.zero_grad(); del loss
    gc.collect()
    with Live() as live: step(learn, 16).backward()
    assert .5 < live.peak/(saved_bytes(lambda: step(learn, 16), learn.model) + weights) < 1.05

def test_nothing_of_the_learner_changes(dls):
    learn = Learner(dls.new(size=32), model_of('test_resnet', ps=.5), precision='fp32')
    learn.freeze()
    before = snapshot(learn)
    find_batch_size(learn, limit=2**30)
    assert equal(before, snapshot(learn))
    with learn.no_bar(): learn.fit(1)
    before, records = snapshot(learn), list(learn.recorder.losses)
    find_batch_size(learn, limit=2**30)
    assert equal(before, snapshot(learn)) and learn.recorder.losses == records

def test_a_training_goes_on_as_without(dls):
    made = []
    for look in (False, True):
        set_seed(1); learn = Learner(dls.new(size=32), model_of('test_resnet', ps=.5), precision='fp32')
        if look: find_batch_size(learn, limit=2**30)
        with learn.no_bar(): learn.fit(1)
        made.append((state(learn.model), learn.recorder.losses))
    assert equal(*made)

def test_frozen_layers_count_as_if_they_learned(dls):
    learn = Learner(dls.new(size=64), model_of('test_resnet'), precision='fp32')
    weights = sum(4*p.numel() for p in learn.model.parameters())
    limit = 3*weights + .99*saved_bytes(lambda: step(learn, 16), learn.model)
    learn.model[0].requires_grad_(False)
    assert find_batch_size(learn, limit=limit) == 8

def test_16_bits_make_room_for_more(dls):
    fp32, bf16 = (memory._step_bytes(Learner(dls.new(size=64), model_of('test_resnet'), precision=p))[0] for p in ('fp32', 'bf16'))
    assert .4 < bf16/fp32 < .65

@pytest.mark.parametrize('n, found', [(2, 2), (3, 2), (5, 4), (31, 16), (36, 32)])
def test_not_more_than_there_are_items(dls, tiny, n, found):
    dls = dls.new()
    dls.train = dls.train.new(samples=dls.train.samples.new(fields=tuple(f[:n] for f in dls.train.samples.fields)), bs=2)
    assert find_batch_size(Learner(dls, tiny(), precision='fp32'), limit=2**34) == found

def test_not_more_than_512(dls, tiny):
    dls = dls.new()
    class Many:
        def __init__(self, f): self.f = f
        def __len__(self): return 5000
        def __getitem__(self, i): return self.f[i % len(self.f)]
    dls.train = dls.train.new(samples=dls.train.samples.new(fields=tuple(map(Many, dls.train.samples.fields))))
    assert find_batch_size(Learner(dls, tiny(), precision='fp32'), limit=2**34) == 512

def test_too_little_for_two_items_names_the_need(dls, tiny):
    learn = Learner(dls.new(size=64), model_of('test_resnet'), precision='fp32')
    before = snapshot(learn)
    with pytest.raises(TrainingError, match=r'2 items needs about \d+ MiB, and there is room for 1 MiB'): find_batch_size(learn, limit=2**20)
    assert equal(before, snapshot(learn))
    dls = dls.new()
    dls.train = dls.train.new(samples=dls.train.samples.new(fields=tuple(f[:1] for f in dls.train.samples.fields)), bs=1)
    with pytest.raises(TrainingError, match='at least two'): find_batch_size(Learner(dls, tiny()))

def test_the_share_of_the_free_memory(dls, monkeypatch):
    learn = Learner(dls.new(size=64), model_of('test_resnet'), precision='fp32')
    need = 3*sum(4*p.numel() for p in learn.model.parameters()) + 1.01*saved_bytes(lambda: step(learn, 8), learn.model)
    monkeypatch.setattr(memory, '_free_memory', lambda device: need/.8)
    assert find_batch_size(learn) == 8 and find_batch_size(learn, share=.79) == 4

def test_a_step_that_does_not_fit_in_fact_is_halved(dls, tiny, monkeypatch):
    learn, tried, real = Learner(dls.new(), tiny(), precision='fp32'), [], memory._batch_loss
    def loss(learn, n):
        tried.append(n)
        if n > 8: raise torch.OutOfMemoryError('full')
        return real(learn, n)
    monkeypatch.setattr(memory, '_batch_loss', loss)
    assert memory._confirmed(learn, 32) == 8 and tried == [32, 16, 8] and all(p.grad is None for p in learn.model.parameters())
    monkeypatch.setattr(memory, '_batch_loss', lambda learn, n: (_ for _ in ()).throw(torch.OutOfMemoryError('full')))
    with pytest.raises(torch.OutOfMemoryError): memory._confirmed(learn, 4)

# ---- how much is free --------------------------------------------------------------------------------------------
def test_free_memory_of_this_machine():
    if not Path('/proc/meminfo').exists(): pytest.skip('not Linux')
    assert 0 < memory._free_memory(torch.device('cpu')) < 1.2*_available()

def write(root, files):
    for name, text in files.items(): (root/name).parent.mkdir(parents=True, exist_ok=True); (root/name).write_text(text)

def test_limits_of_control_groups(tmp_path):
    write(tmp_path, {'own': '0::/user/job\n', 'memory.max': 'max\n', 'memory.current': '7\n', 'user/memory.max': '1000\n', 'user/memory.current': '900\n', 'user/memory.stat': 'anon 1\ninactive_file 50\n',
                     'user/job/memory.max': '500\n', 'user/job/memory.current': '100\n'})
    assert sorted(_cgroup_room(tmp_path, tmp_path/'own')) == [150, 400]
    write(tmp_path/'v1', {'own': '12:cpu,memory:/docker/x\n3:cpuset:/docker/x\n', 'memory/memory.limit_in_bytes': '1000\n', 'memory/memory.usage_in_bytes': '300\n', 'memory/memory.stat': 'total_inactive_file 10\n'})
    assert list(_cgroup_room(tmp_path/'v1', tmp_path/'v1'/'own')) == [710]
    assert list(_cgroup_room(tmp_path, tmp_path/'nowhere')) == []

def test_systems_that_say_less(tmp_path, monkeypatch):
    write(tmp_path, {'meminfo': 'MemTotal: 100 kB\nMemAvailable:   64 kB\n'})
    assert _available(tmp_path/'meminfo') == 65536
    monkeypatch.setattr(memory.os, 'sysconf', lambda name: {'SC_PHYS_PAGES': 10, 'SC_PAGE_SIZE': 4096}[name])
    assert _available(tmp_path/'nowhere') == 5*4096
    monkeypatch.delattr(memory.os, 'sysconf')
    assert _available(tmp_path/'nowhere') is None
    monkeypatch.setattr(memory, '_available', lambda: None)
    with pytest.raises(TrainingError, match='limit='): memory._free_memory(torch.device('cpu'))
