import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch

from blocks.data.ahead import SideStream, in_order, reading_threads


THREE = """if True:
    import threading, torch
    from blocks.data.ahead import reading_threads
    torch.set_num_threads(3)
    with reading_threads(4) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(40))) == {1}
        assert torch.get_num_threads() == 3
        seen = []
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads())); other.start(); other.join()
        assert seen == [3]
    assert torch.get_num_threads() == 3
"""

def test_reading_threads_compute_alone_and_leave_the_others_as_they_were():
    "In a process of its own, since the number of threads belongs to the whole of it"
    subprocess.run([sys.executable, '-c', THREE], check=True)

def test_all_threads_of_the_pool_are_there_from_the_start():
    with reading_threads(3) as pool:
        names = {t.name for t in threading.enumerate() if t.name.startswith('blocks-read')}
        assert len(names) == 3 and len(set(pool.map(lambda _: threading.current_thread().name, range(100))) - names) == 0

def test_jobs_are_asked_for_only_two_ahead_and_come_in_order():
    asked = []
    def jobs():
        for k in range(6): asked.append(k); yield [lambda k=k: k, lambda k=k: -k]
    with reading_threads(2) as pool:
        results = in_order(pool, jobs())
        assert next(results) == [0, 0] and asked == [0, 1, 2]
        assert list(results) == [[k, -k] for k in range(1, 6)]

def test_an_error_in_a_piece_reaches_the_caller_and_ends_the_threads():
    def bad(): raise ValueError('piece 3')
    with pytest.raises(ValueError, match='piece 3'):
        with reading_threads(2) as pool: list(in_order(pool, [[lambda: 1], [lambda: 2, bad], [lambda: 3]]))
    assert not [t for t in threading.enumerate() if t.name.startswith('blocks-read')]

def test_work_that_has_not_begun_is_dropped_when_the_caller_stops():
    done, go = [], threading.Event()
    def piece(k): go.wait(); done.append(k)
    with reading_threads(1) as pool:
        for k in range(50): pool.submit(piece, k)
        go.set()
    assert len(done) < 50

class Recorded:
    "A stream, or a tensor, that writes down what is asked of it"
    def __init__(self, name, log): self.name, self.log = name, log
    def wait_stream(self, other): self.log.append(f'{self.name} waits for {other.name}')

def test_the_model_waits_for_the_side_stream_and_keeps_its_memory(monkeypatch):
    log = []
    main, side = Recorded('main', log), Recorded('side', log)
    class Batch(torch.Tensor):
        def record_stream(self, s): log.append(f'batch kept for {s.name}')
    @contextmanager
    def stream(s): log.append(f'enter {s.name}'); yield; log.append(f'leave {s.name}')
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: side)
    monkeypatch.setattr(torch.cuda, 'stream', stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: main)
    out = SideStream(torch.device('cuda')).run(lambda: (log.append('work'), (torch.zeros(1).as_subclass(Batch),))[1])
    assert len(out) == 1 and log == ['enter side', 'work', 'leave side', 'main waits for side', 'batch kept for main']

def test_passes_that_end_at_once_leave_no_thread_behind():
    "Hundreds of short passes: a thread that comes late still ends"
    for n in range(300):
        with reading_threads(1 + n % 4) as pool:
            if n % 2: assert list(in_order(pool, [[lambda: n]]*2)) == [[n]]*2
    assert not [t for t in threading.enumerate() if t.name.startswith('blocks-read')]
