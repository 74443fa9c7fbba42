"Every verb of `World` in each of several processes, compared with what one process gives; started by tests/test_distributed.py, which reads the results"
import json
import os
import sys
import traceback
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

from blocks.core import TrainingError
from blocks.data.place import Boxes
from blocks.train.distributed import World, this_world
from blocks.train.tricks import model_precision

dist.init_process_group('gloo', timeout=timedelta(seconds=40))      # the user's own group; this_world() has to take it
world, alone, checks = this_world(), World(), {}

def check(f): checks[f.__name__] = f

def raises(f, *words):
    try: f()
    except TrainingError as e: assert all(w in str(e) for w in words), e
    else: raise AssertionError('nothing was raised')

def same_everywhere(t):
    "Are the tensors equal in all processes, to the last bit?"
    parts = world.exchange(t.detach())
    return all(torch.equal(parts[0], p) for p in parts)

def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

# ---- shares and exchange ----------------------------------------------------------------------------------------
@check
def the_group_of_the_user_is_taken(): assert (world.rank, world.size) == (int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])) and world.first == (os.environ['RANK'] == '0')

@check
def gather_joins_parts_in_order():
    for n in (1, 2, 3, 7, 8):
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool):
            whole = (noise(n, 3, 2)*9).to(dtype)
            got = world.gather(world.part(whole), n)
            assert got.dtype == dtype and torch.equal(got, whole), (n, dtype)
    flat = torch.arange(5)
    assert torch.equal(world.gather(world.part(flat), 5), flat)

@check
def gather_keeps_the_structure_and_the_kind():
    a, b = noise(5, 2), torch.arange(20.).reshape(4, 1, 5).repeat(2, 1, 1)[:5].as_subclass(Boxes)
    (x, (y, none)), d = world.gather((world.part(a), [world.part(b).as_subclass(Boxes), None]), 5), world.gather({'out': world.part(a)}, 5)
    assert torch.equal(x, a) and type(y) is Boxes and torch.equal(y.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor)) and none is None and torch.equal(d['out'], a)
    assert not world.gather(world.part(a.requires_grad_()), 5).requires_grad

@check
def lists_of_different_length_are_filled_up_with_nothing():
    mine = torch.ones(2, 1 + 2*world.rank, 5)*world.rank
    got = world.gather(mine, 2*world.size)
    assert got.shape == (2*world.size, 2*world.size - 1, 5)
    for r in range(world.size): assert (got[2*r:2*r+2, :1+2*r] == r).all() and (got[2*r:2*r+2, 1+2*r:] == -1).all()
    raises(lambda: world.gather(mine.to(torch.uint8), 2*world.size), 'uint8')

@check
def what_cannot_be_joined_is_an_error_in_all_processes():
    raises(lambda: world.gather(torch.ones(2, 3, 4 + world.rank), 2*world.size), 'shapes')
    raises(lambda: world.gather(torch.ones(2), 5), '5 items')
    raises(lambda: world.gather(torch.ones(2) if world.first else torch.ones(2, 2), 4), 'shapes')
    raises(lambda: world.gather(torch.tensor(1.), 4), 'shapes')

@check
def agree_takes_the_value_of_the_first():
    assert world.agree(('a', world.rank)) == ('a', 0) and alone.agree(3) == 3
    world.check_same('numbers', 7)
    raises(lambda: world.check_same('items', 10 + world.rank), 'items', '10 in process 0', '11 in process 1')

@check
def once_runs_in_the_first_process_and_fails_in_all():
    ran = []
    assert world.once(lambda: ran.append(world.rank) or Path('a/b')) == Path('a/b') and ran == ([0] if world.first else [])
    try: world.once(lambda: 1/0)
    except ZeroDivisionError: assert world.first
    except TrainingError as e: assert not world.first and 'ZeroDivisionError' in str(e)
    else: raise AssertionError('nothing was raised')
    world.barrier()

@check
def broadcast_gives_the_weights_and_buffers_of_the_first():
    torch.manual_seed(world.rank)
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    m[1].running_mean += world.rank; m[1].num_batches_tracked += world.rank
    first = nn.Conv2d(3, 4, 3)
    if world.first: first.load_state_dict(m[0].state_dict())
    world.broadcast(m)
    assert all(same_everywhere(v) for v in m.state_dict().values()) and m[1].num_batches_tracked == 0 and m[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not world.first or torch.equal(m[0].weight, first.weight)
    raises(lambda: world.broadcast(nn.Linear(3, 2 + world.rank)), 'weights')

# ---- loss -------------------------------------------------------------------------------------------------------
@check
def the_loss_and_its_gradient_are_those_of_the_whole_batch():
    for n in (1, 2, 5, 8):
        x, w, v = noise(n, 3), noise(3, seed=1).requires_grad_(), noise(3, seed=1).requires_grad_()
        mine = world.part(x)
        loss, one = world.loss((mine@w).square().mean(), len(mine), n), alone.loss((x@v).square().mean(), n, n)
        loss.backward(); one.backward()
        assert torch.allclose(loss, one, rtol=1e-6) and same_everywhere(loss) and loss.dtype == one.dtype
        assert torch.allclose(world.exchange(w.grad).mean(0), v.grad, rtol=1e-5, atol=1e-6), n

@check
def a_loss_that_is_not_finite_is_so_in_all():
    assert world.loss(torch.tensor(float('nan') if world.first else 1.), 2, 2*world.size).isnan()

# ---- training ---------------------------------------------------------------------------------------------------
class Net(nn.Module):
    "All that makes a part of a batch different from the batch"
    def __init__(self, checkpointed=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout2d(.3))
        self.deep = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6, affine=False, track_running_stats=False), nn.Dropout(.2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))
        self.never, self.frozen, self.checkpointed = nn.Linear(2, 2), nn.Conv2d(6, 6, 1), checkpointed
        self.frozen.requires_grad_(False)
    def forward(self, x):
        x = checkpoint(self.body, x, use_reentrant=False, context_fn=self.again) if self.checkpointed else self.body(x)
        x = x + stochastic_depth(self.deep(self.frozen(x)), .4, 'row', self.training)
        return self.head(x)

def again(world, n): return nullcontext(), world.as_one(n)

def train(world, batches, backwards=1, **kw):
    "The weights after a hand-written loop, and its losses"
    torch.manual_seed(0)
    model, losses = Net(**kw).to(memory_format=torch.channels_last), []
    world.broadcast(model)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1, momentum=.9, weight_decay=.01)
    for epoch in range(2):
        run = world.wrap(model)
        for step, (x, y) in enumerate(batches):
            mine, target = world.part(x).contiguous(memory_format=torch.channels_last), world.part(y)
            model.again = partial(again, world, len(x))
            with world.as_one(len(x)): out = run(mine)
            loss = world.loss(F.cross_entropy(out, target), len(mine), len(x))
            (loss/backwards).backward()
            losses.append(loss.item())
            if (step + 1) % backwards == 0: opt.step(); opt.zero_grad()
    return model, losses

def data(*sizes): return [(noise(n, 3, 6, 5, seed=n)*2 + 1, torch.arange(n) % 2) for n in sizes]

def compare(batches, **kw):
    (ours, curve), (one, expected) = train(world, batches, **kw), train(alone, batches, **kw)
    assert torch.allclose(torch.tensor(curve), torch.tensor(expected), rtol=1e-4, atol=1e-6), (curve, expected)
    for (k, a), b in zip(ours.state_dict().items(), one.state_dict().values()):
        assert same_everywhere(a), k
        assert torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5), (k, a, b)
    assert ours.never.weight.grad is None and curve[0] != curve[-1]

@check
def a_loop_learns_the_same(): compare(data(7, 8, 5, 2))
@check
def gradients_add_up_over_several_batches(): compare(data(7, 8, 5, 4), backwards=2)
@check
def checkpointed_layers_are_computed_again_with_the_same_statistics_and_draws(): compare(data(7, 8), checkpointed=True)

@check
def fewer_items_than_processes():
    x, ours, one = noise(world.size - 1, 3, 4, 4), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    run = world.wrap(ours)
    with world.as_one(len(x)): out = run(world.part(x))
    assert torch.equal(out, one(x)) and torch.equal(ours.running_var, one.running_var)           # nothing is counted twice
    world.loss(out.square().mean(), len(x), len(x)).backward(); one(x).square().mean().backward()
    assert torch.allclose(ours.bias.grad, one.bias.grad)

@check
def statistics_are_of_all_items_and_equal_in_all_processes():
    for shape in ((5, 4), (5, 4, 3, 7), (world.size, 4)):
        x, ours, one = noise(*shape)*3 + 50, nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        f = lambda bn, x: F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, True, .3, 1e-5)
        with world.as_one(len(x)): out = f(ours, world.part(x))
        assert torch.allclose(out, world.part(f(one, x)), atol=1e-4)
        for a, b in ((ours.running_mean, one.running_mean), (ours.running_var, one.running_var)): assert torch.allclose(a, b, rtol=1e-5) and same_everywhere(a)
    bn = nn.BatchNorm1d(4).eval()
    with world.as_one(5): assert torch.equal(bn(world.part(noise(5, 4))), world.part(bn(noise(5, 4))))

@check
def sixteen_bits_and_depthwise_convolutions():
    outs = []
    for w in (world, alone):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)), w.part(noise(6, 3, 12, 12))
        run = w.wrap(net)
        for order in (0, 1):
            contexts = [model_precision(torch.device('cpu'), 'bf16'), w.as_one(6)]
            with contexts[order], contexts[1-order]: out = run(x)
            assert out.dtype == torch.bfloat16
            w.loss(out.float().square().mul(torch.linspace(0, 1, 100).reshape(10, 10)[:8, :8]).mean(), len(x), 6).backward()
        outs.append((w.gather(out, 6).float(), *(p.grad for p in net.parameters()), net[1].running_var))
    for a, b in zip(*outs): assert a.dtype == torch.float32 and (a - b).abs().max() < .03*b.abs().max() + 1e-3

@check
def a_batch_that_is_cancelled_does_not_hold_up_the_next():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), noise(4, 3)
    run = world.wrap(model)
    run(world.part(x))                                                                          # no backward
    for _ in range(2): model.zero_grad(); world.loss(run(world.part(x)).mean(), 4//world.size, 4).backward()
    assert torch.allclose(model.weight.grad[0], x.mean(0), atol=1e-6)

@check
def parameters_that_only_one_process_uses():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(2)])
    model.forward = lambda i: model[i](torch.ones(1, 1)).sum()
    run = world.wrap(model)
    run(0 if world.first else 1).backward()
    assert model[0].weight.grad.item() == 1/world.size and model[1].weight.grad.item() == 1 - 1/world.size

@check
def a_model_of_which_nothing_learns_is_called_as_it_is():
    model = nn.Linear(2, 2).requires_grad_(False)
    assert world.wrap(model) is model and alone.wrap(nn.Linear(2, 2)).weight is not None

@check
def layers_without_a_batch_draw_for_themselves():
    torch.manual_seed(world.rank)
    x = torch.ones(1000, 1)
    with world.as_one(4): out = F.dropout(x, .5)
    assert .4 < (out > 0).float().mean() < .6
    with world.as_one(2000): assert torch.equal(F.dropout(x, .5, False), x) and torch.equal(F.alpha_dropout(x, .5), x)

if __name__ == '__main__':
    results = {}
    for name, f in checks.items():
        try: f(); results[name] = None
        except Exception: results[name] = traceback.format_exc()
    Path(sys.argv[1], f'{world.rank}.json').write_text(json.dumps(results))
    dist.destroy_process_group()
