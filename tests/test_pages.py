import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from blocks import Callback, Learner
from blocks.core import TrainingError
from blocks.data import pages
from blocks.data.pages import kept_pages

glibc = pytest.mark.skipif(pages._keeper.lib is None, reason='acts with glibc alone')

FRESH = """if True:
    import resource, torch
    from blocks.data.pages import kept_pages
    def faults(n=6):
        for _ in range(12): torch.ones(10_000_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(n): torch.ones(10_000_000)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)*resource.getpagesize()/40e6
    before = faults()
    with kept_pages(): inside = faults()
    print(before, inside)
"""

def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e6

@pytest.fixture
def watched():
    "How many want memory to be kept, read by the test; nobody may be left at its end"
    assert pages._keeper.n == 0
    yield lambda: pages._keeper.n
    assert pages._keeper.n == 0

@glibc
def test_freed_memory_is_used_again_instead_of_asked_for_anew():
    before, inside = map(float, subprocess.run([sys.executable, '-c', FRESH], check=True, capture_output=True, text=True).stdout.split())
    assert before > 4 and inside < 3                                     # of six blocks

@glibc
def test_it_goes_back_to_the_system_at_the_end(watched):
    with kept_pages():
        blocks = [torch.ones(10_000_000) for _ in range(5)]
        del blocks
        inside = resident()
    assert inside - resident() > 100

def test_the_last_to_leave_ends_it_among_contexts_and_threads(watched):
    entered, leave = threading.Event(), threading.Event()
    def other():
        with kept_pages(): entered.set(); leave.wait(20)
    thread = threading.Thread(target=other, daemon=True)
    with kept_pages(), kept_pages():
        thread.start(); entered.wait()
        assert watched() == 3
    assert watched() == 1
    leave.set(); thread.join()

def test_an_error_ends_it(watched):
    with pytest.raises(ZeroDivisionError), kept_pages(): 1/0

def test_a_pass_keeps_memory_until_it_ends_or_is_dropped(dls, watched):
    batches = iter(dls.train)
    next(batches)
    assert watched() == 1
    batches.close()
    assert watched() == 0
    for _ in dls.valid: assert watched() == 1

def test_fit_keeps_it_over_all_epochs_and_lets_go_after_an_error(dls, watched):
    class Between(Callback):
        def before_epoch(self): seen.append(watched())
        def after_epoch(self): seen.append(watched())
    class Broken(Callback):
        def after_loss(self): raise ValueError('no more')
    seen, learn = [], Learner(dls, torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2)))
    learn.fit(2, 1e-3, cbs=Between())
    assert seen == [1]*4 and watched() == 0
    try: learn.fit(1, 1e-3, cbs=Broken())
    except (ValueError, TrainingError): pass
    else: pytest.fail('the error of the callback was lost')

@pytest.mark.parametrize('name, value', [('MALLOC_MMAP_MAX_', '10'), ('GLIBC_TUNABLES', 'glibc.malloc.trim_threshold=1000000'), ('MALLOC_TRIM_THRESHOLD_', '1000000')])
def test_settings_of_the_environment_stay(name, value):
    code = 'from blocks.data import pages; assert pages._keeper.lib is None\nwith pages.kept_pages(): assert pages._keeper.n == 1\nassert pages._keeper.n == 0'
    subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | {name: value})

def test_it_does_nothing_with_another_c_library(monkeypatch, watched):
    monkeypatch.setattr(pages.ctypes, 'CDLL', lambda _: object())
    assert pages.sys.platform != 'linux' or pages._glibc() is None
    monkeypatch.setattr(pages.sys, 'platform', 'darwin')
    assert pages._glibc() is None
    monkeypatch.setattr(pages._keeper, 'lib', None)
    with kept_pages(): assert watched() == 1
