"Optimizers by name, their groups, and Ranger step by step"
from copy import deepcopy
import pytest, torch
from torch import nn
from blocks.core import TrainingError
from blocks.train.optimizer import Ranger, default_opt, is_norm, make_optimizer

def model(): torch.manual_seed(0); return nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU()), nn.Linear(6, 2))
def groups(m): return [list(o.parameters()) for o in m]
def step(m, opt, x):
    m(x).square().mean().backward()
    opt.step(); opt.zero_grad()

@pytest.mark.parametrize('name', ['adadelta', 'adafactor', 'adagrad', 'adam', 'adamax', 'adamw', 'asgd', 'nadam', 'radam', 'rmsprop', 'rprop', 'sgd', 'ranger', 'AdamW', 'Ranger'])
def test_every_name_makes_an_optimizer_that_learns(name):
    m, x = model(), torch.randn(8, 4)
    opt = make_optimizer(m, groups(m), name, [1e-3, 1e-2], 0., False)
    before = m(x).square().mean().item()
    for _ in range(12): step(m, opt, x)
    assert type(opt).__name__.lower() == name.lower() and m(x).square().mean().item() < before
    assert [g['lr'] for g in opt.param_groups] == [1e-3, 1e-3, 1e-2, 1e-2]

@pytest.mark.parametrize('name,words', [('lbfgs', 'several times'), ('sparseadam', 'sparse'), ('adamm', 'adamw.*ranger'), ('optimizer', 'no such|adamw')])
def test_a_name_that_cannot_be_used_is_said(name, words):
    m = model()
    with pytest.raises(TrainingError, match=f'(?s){words}'): make_optimizer(m, groups(m), name, [1e-3, 1e-3], 0., False)

@pytest.mark.parametrize('spare', [True, False])
def test_decay_spares_norms_and_biases_unless_asked(spare):
    m = model()
    opt = make_optimizer(m, groups(m), default_opt, [1e-3, 1e-2], .1, not spare)
    decayed = {id(p) for g in opt.param_groups if g['weight_decay'] for p in g['params']}
    want = {id(p) for k, p in m.named_parameters() if not spare or p.ndim > 1}
    assert decayed == want and is_norm(m[0][1]) and not is_norm(m[1])

def test_ranger_is_radam_that_looks_back_every_k_steps():
    x, k, alpha = torch.randn(8, 4), 3, .3
    a, b = model(), model()
    ours = Ranger(a.parameters(), 1e-2, k=k, alpha=alpha)
    fast = torch.optim.RAdam(b.parameters(), 1e-2, betas=(.95, .99), eps=1e-6, weight_decay=.01, decoupled_weight_decay=True)
    slow = [p.detach().clone() for p in b.parameters()]
    for i in range(1, 11):
        step(a, ours, x); step(b, fast, x)
        if i % k == 0:
            with torch.no_grad():
                for s, p in zip(slow, b.parameters()): s += alpha*(p - s); p.copy_(s)
        assert all(torch.allclose(p, q, rtol=0, atol=1e-6) for p, q in zip(a.parameters(), b.parameters())), i

def test_ranger_goes_on_from_its_state():
    x, a, b = torch.randn(8, 4), model(), model()
    first, second = Ranger(a.parameters(), 1e-2), Ranger(b.parameters(), 1e-2)
    for _ in range(4): step(a, first, x)
    b.load_state_dict(a.state_dict()); second.load_state_dict(deepcopy(first.state_dict()))
    for _ in range(4): step(a, first, x); step(b, second, x)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def test_ranger_leaves_frozen_weights_and_begins_with_them_when_they_thaw():
    m, x = model(), torch.randn(8, 4)
    for p in m[0].parameters(): p.requires_grad_(False)
    before = [p.clone() for p in m[0].parameters()]
    opt = Ranger(m.parameters(), 1e-2)
    for _ in range(7): step(m, opt, x)
    assert all(torch.equal(p, q) for p, q in zip(m[0].parameters(), before))
    for p in m[0].parameters(): p.requires_grad_(True)
    for _ in range(6): step(m, opt, x)
    assert not torch.equal(m[0][0].weight, before[0]) and all(bool(torch.isfinite(p).all()) for p in m.parameters())

@pytest.mark.parametrize('kw', [dict(k=0), dict(k=2.5), dict(alpha=0.), dict(alpha=1.5)])
def test_ranger_says_what_cannot_be(kw):
    with pytest.raises(TrainingError, match='Ranger'): Ranger(model().parameters(), 1e-2, **kw)
