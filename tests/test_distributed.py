"Several processes: what they exchange, what they compute together, and a script that does not know of them"
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth

from blocks.train import distributed as D
from blocks.train.distributed import World, this_world

SCRIPTS = Path(__file__).parent/'distributed'

def start(script, *args, processes=2, **env):
    "A script in its own process, or under torchrun with a free port"
    run = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)] if processes else []
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')} | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', **env)
    return subprocess.Popen([sys.executable, *run, str(SCRIPTS/script), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

def finished(process, seconds=150):
    try: out, err = process.communicate(timeout=seconds)
    finally: process.kill()
    return process.returncode, out, err

# ---- in this process --------------------------------------------------------------------------------------------
@pytest.mark.parametrize('size', [1, 2, 3, 8])
def test_parts_are_consecutive_share_all_and_differ_by_one_at_most(size):
    for n in range(1, 40):
        parts = [World(r, size).part(range(n)) for r in range(size)]
        if n < size: assert all(list(p) == list(range(n)) for p in parts)
        else: assert [list(p) for p in parts] == [list(p) for p in np.array_split(range(n), size)]

def test_alone_nothing_is_done(monkeypatch):
    for k in ('RANK', 'WORLD_SIZE'): monkeypatch.delenv(k, raising=False)
    w, model, x = this_world(), nn.BatchNorm1d(2), torch.randn(3, 2)
    assert (w.rank, w.size, w.first) == (0, 1, True) and w.wrap(model) is model and w.gather([x], 3)[0] is x and w.loss(x, 3, 3) is x and w.agree(x) is x
    with w.as_one(3): assert torch.equal(model(x), nn.BatchNorm1d(2)(x))
    with pytest.raises(ZeroDivisionError): w.once(lambda: 1/0)
    w.barrier(); w.broadcast(model); w.check_same('x', 1)

def test_one_process_of_torchrun_is_alone(monkeypatch):
    for k, v in dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='nowhere', MASTER_PORT='1').items(): monkeypatch.setenv(k, v)
    assert this_world().size == 1

def test_a_size_without_an_address_is_not_torchrun(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4'); monkeypatch.delenv('MASTER_ADDR', raising=False)
    assert this_world().size == 1

DRAWS = dict(dropout=lambda x: F.dropout(x, .4), dropout_inplace=lambda x: F.dropout(x.clone(), .4, True, True), dropout1d=lambda x: F.dropout1d(x.flatten(2), .4), dropout2d=nn.Dropout2d(.4),
             alpha=nn.AlphaDropout(.3), depth=lambda x: stochastic_depth(x, .4, 'row'))
@pytest.mark.parametrize('draw', DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
def test_parts_draw_what_the_whole_draws(draw, layout):
    x, parts = torch.randn(9, 4, 5, 6).contiguous(memory_format=layout).requires_grad_(), []
    torch.manual_seed(0); whole = draw(x); after = torch.get_rng_state()
    for start, stop in ((0, 4), (4, 9)):
        torch.manual_seed(0)
        with D._AsOne(None, start, stop, 9): parts.append(draw(x[start:stop]))
        assert torch.equal(torch.get_rng_state(), after)                                        # the processes stay in step
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(whole, x.reshape(whole.shape))
    for p in (whole, torch.cat(parts)): p.square().sum().backward()
    assert torch.isfinite(x.grad).all()

class Two:
    "A world of two processes, of which the other one has the same values: statistics stay, sums double"
    def exchange(self, t): return torch.stack([t, t])

def test_the_gradient_through_whole_statistics():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 2), 3, 3))
    class Alone:
        def exchange(self, t): return t[None]
    assert torch.autograd.gradcheck(lambda *a: D._whole_norm(Alone(), a[0], None, None, *a[1:], True), (x, w, b))
    assert torch.autograd.gradcheck(lambda x: D._whole_norm(Alone(), x, None, None, training=True), (x,))

def test_a_value_more_counts_for_the_unbiased_variance():
    x, (ours, twice) = torch.randn(3, 2), [(torch.zeros(2), torch.ones(2)) for _ in '12']
    D._whole_norm(Two(), x, *ours, training=True, momentum=.5); F.batch_norm(torch.cat([x, x]), *twice, training=True, momentum=.5)
    for a, b in zip(ours, twice): assert torch.allclose(a, b)

# ---- in several processes ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_every_verb_in_two_processes(tmp_path):
    code, out, err = finished(start('verbs.py', tmp_path))
    assert code == 0, err[-3000:]
    results = [json.loads((tmp_path/f'{r}.json').read_text()) for r in (0, 1)]
    failed = {f'{name} in process {r}': text for r, res in enumerate(results) for name, text in res.items() if text}
    assert len(results[0]) >= 20 and not failed, '\n\n'.join(f'{k}\n{v}' for k, v in failed.items())
    assert 'arning' not in err, err[-3000:]

@pytest.mark.slow
def test_the_same_script_learns_the_same_in_two_processes(tmp_path):
    for name in ('one', 'two'): (tmp_path/name).mkdir()
    running = start('train.py', tmp_path/'one', processes=0), start('train.py', tmp_path/'two')
    (code_1, out_1, err_1), (code_2, out_2, err_2) = map(finished, running)
    assert code_1 == 0, err_1[-3000:]
    assert code_2 == 0, err_2[-3000:]
    one, first, second = (torch.load(tmp_path/f, weights_only=False) for f in ('one/result_0.pt', 'two/result_0.pt', 'two/result_1.pt'))
    for name, rtol in (('resnet18', 1e-2), ('adam', 1e-4), ('accumulation', 1e-4), ('mixed', 1e-4)):              # rounding grows with each step, most with many layers and ReLU
        a, b, c = one[name], first[name], second[name]
        assert all(torch.equal(x, y) for x, y in zip(b['weights'].values(), c['weights'].values())) and (b['losses'], b['table']) == (c['losses'], c['table']), name
        assert len(a['losses']) == len(b['losses']) and len(a['table']) == len(b['table']) == 2, name   # early stopping came in the same epoch
        np.testing.assert_allclose(b['losses'][:2], a['losses'][:2], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(b['losses'], a['losses'], rtol=rtol, err_msg=name)
        np.testing.assert_allclose(b['table'], a['table'], rtol=rtol, err_msg=name)
    assert torch.equal(first['preds'], second['preds']) and torch.allclose(first['preds'], one['preds'], atol=1e-2)
    np.testing.assert_allclose(first['validate'], one['validate'], rtol=1e-2)
    assert out_2.count('train_loss') == out_1.count('train_loss') == 1 and len(out_2.splitlines()) == len(out_1.splitlines())      # one table
    assert sorted(f.name for f in (tmp_path/'one').rglob('*.p*')) == [f for f in sorted(f.name for f in (tmp_path/'two').rglob('*.p*')) if f != 'result_1.pt']
    from blocks import load_learner
    from PIL import Image
    probs = [load_learner(tmp_path/k/'model.pkl', device='cpu').predict(Image.new('RGB', (64, 64), (200, 40, 90)))[2] for k in ('one', 'two')]
    assert torch.allclose(*(torch.as_tensor(p) for p in probs), atol=1e-2)

@pytest.mark.slow
def test_a_process_that_fails_ends_the_run():
    begin = time.monotonic()
    code, out, err = finished(start('fails.py'), 100)
    assert code != 0 and 'on purpose' in err and 'never reached' not in out and time.monotonic() - begin < 90
