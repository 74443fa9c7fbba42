"""What all arms share: which files, which weights, which head, how time is taken, and what is printed at the end."""
import json, os, statistics, sys, time
from pathlib import Path

DATA = Path(__file__).resolve().parent/'.data'

class NotHere(Exception): "This arm has nothing for this work; the text says why"

def main(
    works,    # name of a kind of work → function (spec) that returns a dict of figures
):
    "Do the work named in the first argument with the settings in the second, as JSON, and print the figures as one JSON line"
    kind, spec = sys.argv[1], json.loads(sys.argv[2])
    try:
        if kind not in works: raise NotHere('has nothing of this kind')
        out = works[kind](spec)
    except NotHere as e: out = dict(na=str(e))
    print('\n' + json.dumps(out), flush=True)

# the data

def read_set(spec):
    """(files, labels, number of them that are for training), training first; the same for every arm.

    `limit` keeps so many of both splits together, in their proportion; `repeat` gives the training files several times in an epoch."""
    o = json.loads((DATA/f"{spec['set']}.json").read_text())
    train, valid = o['train'], o['valid']
    if limit := spec.get('limit'):
        share = min(1, limit/(len(train) + len(valid)))
        train, valid = train[:round(len(train)*share)], valid[:round(len(valid)*share)]
    train = train*spec.get('repeat', 1)
    order = train + valid
    return [o['files'][i] for i in order], [o['labels'][i] for i in order], len(train)

def stats(arch): return json.loads((DATA/'stats.json').read_text())[arch]
def weights(arch): return DATA/f'{arch}.pt'

# models

def init_head(head, seed):
    "The same first weights for the linear layers of every arm's head (He et al. 2015), in place"
    import torch
    rng = torch.Generator().manual_seed(seed)
    linears = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for m in linears: m.weight.copy_(torch.randn(m.weight.shape, generator=rng)*(2/m.in_features)**.5)
    assert len(linears) == 2, 'the head of all arms has two linear layers'

# time

def rate(batches, epochs):
    "Images per second over `epochs` passes of `batches`, a function that starts a pass; a pass before them is not counted: it starts workers and fills caches"
    def one():
        n = 0
        for x, *_ in batches():
            assert str(x.dtype) == 'torch.float32' and x.shape[1] == 3, 'a batch is ready for the model'
            n += len(x)
        return n
    one()
    start = time.perf_counter()
    n = sum(one() for _ in range(epochs))
    return dict(img_s=n/(time.perf_counter() - start))

def timed(f):
    "Seconds that `f()` takes, and what it returns"
    start = time.perf_counter()
    out = f()
    return time.perf_counter() - start, out

def calls(*fs, n):
    "Milliseconds of each of `n` calls of each function, called in turn, after some that do not count"
    for f in fs:
        for _ in range(5): f()
    ms = [[] for _ in fs]
    for _ in range(n):
        for f, o in zip(fs, ms): o.append(timed(f)[0]*1000)
    return ms

def spread(ms):
    "Median and 99th percentile of a list of milliseconds"
    p99 = statistics.quantiles(ms, n=100, method='inclusive')[98]
    return dict(ms=statistics.median(ms), p99_ms=p99, p99_over_median=p99/statistics.median(ms))

def resident():
    "Bytes of memory that this process holds, where /proc says it"
    try: return int(Path('/proc/self/statm').read_text().split()[1])*4096
    except OSError: return None

def cold_import(statement, n):
    "Seconds that a fresh interpreter takes for `statement`, start and end of it included: the median of `n`, after one that compiles what is not compiled yet, as an installer does"
    import subprocess
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'}
    run = lambda: subprocess.run([sys.executable, '-c', statement], check=True, capture_output=True, env=env)
    run()
    return statistics.median(timed(run)[0] for _ in range(n))
