import pickle

import numpy as np
import pytest
import torch

from blocks import core


def test_streams_with_different_addresses_are_different():
    seen = {tuple(core.stream(*a).integers(2**62, size=2)) for a in [(0,), (1,), (0, 0), (0, 'frame', 0, 1), (0, 'frame', 1, 0), (0, 'batch', 0, 1), (-1, 'frame', 0, 1), (2**64, 'x')]}
    assert len(seen) == 8

def test_a_stream_depends_on_its_address_alone():
    a = core.stream(5, 'item', 2, 9).random(3)
    core.stream(5, 'item', 2, 8).random(100); np.random.rand(7)
    assert (core.stream(5, 'item', 2, 9).random(3) == a).all()

def test_without_a_seed_every_process_draws_the_same():
    import subprocess
    import sys
    code = 'from blocks import RandomSplitter; print(list(RandomSplitter(.3)(range(20))[1]))'
    first, second = (subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second and len(eval(first)) == 6

def test_set_seed_is_what_current_seed_says():
    state, before = torch.get_rng_state(), core.current_seed()
    core.set_seed(123)
    assert core.current_seed() == 123
    a = torch.rand(1), np.random.rand()
    core.set_seed(123)
    assert (torch.rand(1), np.random.rand()) == a
    core.set_seed(before)
    torch.set_rng_state(state)

@pytest.mark.parametrize('device', ['cuda:7', 'nonsense', 3.5])
def test_a_device_that_is_not_there_is_a_device_error(device):
    with pytest.raises(core.DeviceError, match='device'): core.resolve_device(device)

def test_item_error_says_stage_item_and_mend_and_survives_pickle():
    e = pickle.loads(pickle.dumps(core.ItemError('reading', 'a.png', 'broken', 'remove it')))
    assert all(o in str(e) for o in ('reading', 'a.png', 'broken', 'remove it')) and isinstance(e, core.BlocksError)

def test_a_long_item_is_shortened_in_the_error():
    assert len(str(core.ItemError('reading', np.zeros(100_000), 'broken'))) < 400

def test_require_names_the_extra_and_keeps_other_import_errors(tmp_path, monkeypatch):
    with pytest.raises(core.MissingExtraError, match=r'blocks\[audio\]'): core.require('no_such_module_here', 'audio')
    (tmp_path/'broken_module_x.py').write_text('import another_missing_module')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match='another_missing_module'): core.require('broken_module_x', 'audio')

@pytest.mark.parametrize('env,there,index', [({}, 4, 1), (dict(LOCAL_RANK='2', WORLD_SIZE='4'), 4, 2), (dict(LOCAL_RANK='2', WORLD_SIZE='4'), 1, 1), (dict(LOCAL_RANK='0', WORLD_SIZE='1'), 4, 1)])
def test_under_torchrun_each_process_takes_the_device_of_its_number(env, there, index, monkeypatch):
    for k in ('LOCAL_RANK', 'WORLD_SIZE'): monkeypatch.delenv(k, raising=False)
    for k, v in env.items(): monkeypatch.setenv(k, v)
    for k, v in dict(is_available=True, device_count=there, current_device=1).items(): monkeypatch.setattr(torch.cuda, k, lambda v=v: v)
    assert core.default_device() == torch.device('cuda', index)
    assert core.resolve_device('cuda') == (torch.device('cuda') if index == 1 and env.get('WORLD_SIZE') != '4' else torch.device('cuda', index))

def test_more_processes_than_devices_is_a_device_error(monkeypatch):
    for k, v in dict(LOCAL_RANK='3', WORLD_SIZE='4').items(): monkeypatch.setenv(k, v)
    for k, v in dict(is_available=True, device_count=2).items(): monkeypatch.setattr(torch.cuda, k, lambda v=v: v)
    with pytest.raises(core.DeviceError, match='nproc_per_node 2'): core.default_device()

def test_mps_is_not_shared_between_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False); monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    assert core.default_device().type == 'mps'
    for k, v in dict(LOCAL_RANK='0', WORLD_SIZE='2').items(): monkeypatch.setenv(k, v)
    assert core.default_device().type == 'cpu'
