"""Measure blocks and its peers in turn, and write RESULTS.md, results.json and results.png beside this file.

    make bench                              everything, about two hours on two cores
    make bench ONLY=loader ROUNDS=5         the works whose names begin so; results of others are kept
    make bench QUICK=1                      a smoke run: few files, one round; written under benchmarks/.data/quick
"""
import argparse, hashlib, json, os, platform, signal, subprocess, sys, threading, time
from contextlib import nullcontext
from datetime import date
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
import data, report
from works import chosen

LIMIT = 3600    # seconds after which a single measurement is given up

# the environment of the peers

SAME = 'torch', 'torchvision', 'pillow', 'numpy'     # in both environments in the same versions
LISTED = *SAME, 'blocks', 'fastai', 'fastcore', 'lightning', 'timm'

def wanted():
    "What the peers' environment has to hold, as lines of a requirements file"
    public = lambda version: version.partition('+')[0]                   # 2.14.1+cpu is not in every index, and 2.14.1 means it too
    return [*(f'{name}=={public(metadata.version(name))}' for name in SAME), *(line for line in (HERE/'requirements.txt').read_text().splitlines() if line.strip() and not line.startswith('#'))]

def peers_python(folder=ROOT/'.venv-peers'):
    "The Python of the peers' environment, which is made where it is missing or out of date"
    python, stamp, lines = folder/'bin'/'python', folder/'.stamp', wanted()
    key = hashlib.sha256('\n'.join(lines).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == key: return python
    print(f'Installing the peers into {folder.name}: a few minutes, once', flush=True)
    if not python.exists(): subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    (folder/'.gitignore').write_text('*\n')
    subprocess.run([python, '-m', 'pip', 'install', '-q', *lines], check=True)
    stamp.write_text(key)
    return python

def versions(python):
    "Versions of Python and of the libraries in an environment"
    code = f'''
import json, platform
from importlib import metadata
out = dict(Python=platform.python_version())
for name in {LISTED!r}:
    try: out[name] = metadata.version(name)
    except metadata.PackageNotFoundError: pass
print(json.dumps(out))'''
    return json.loads(subprocess.run([python, '-I', '-c', code], check=True, capture_output=True, text=True).stdout)

# the machine

def machine():
    "What the figures depend on"
    info = _fields('/proc/cpuinfo')
    flags = info.get('flags', '').split()
    kilobytes = _fields('/proc/meminfo').get('MemTotal', '').split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return {'processor': info.get('model name') or platform.processor() or platform.machine(), 'cores': str(cores), 'memory': f'{int(kilobytes[0])/2**20:.0f} GB' if kilobytes else 'unknown',
            'instructions': ', '.join(o for o in ('avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_bf16', 'amx_int8') if o in flags) or 'not listed',
            'system': f'{platform.system()} {platform.release()}', 'day': str(date.today())}

def _fields(path):
    "`name : value` lines of a file in /proc, the first of each name"
    try: lines = Path(path).read_text().splitlines()
    except OSError: return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(':') for line in reversed(lines))}

# the memory of a process with its children, seen from here

def family(pid):
    "`pid` and all that descend from it"
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        try: todo += [int(o) for t in os.listdir(f'/proc/{found[-1]}/task') for o in Path(f'/proc/{found[-1]}/task/{t}/children').read_text().split()]
        except OSError: pass                                             # it has just ended
    return found

def held(pid):
    "Bytes that `pid` holds, shared pages by their share (PSS), or where the kernel does not say that, resident ones; 0 when it has ended"
    try:
        text = Path(f'/proc/{pid}/smaps_rollup').read_text()
        return next(int(line.split()[1])*1024 for line in text.splitlines() if line.startswith('Pss:'))
    except (OSError, StopIteration): pass
    try: return int(Path(f'/proc/{pid}/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')
    except (OSError, IndexError): return 0

class Peak:
    "The largest sum over a process and its children while it runs, looked at once a second; None where there is no /proc"
    def __init__(self, pid): self.pid, self.bytes, self.done = pid, 0, threading.Event()
    def __enter__(self):
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self
    def __exit__(self, *_): self.done.set(); self.thread.join()
    def _watch(self):
        while not self.done.wait(1): self.bytes = max(self.bytes, sum(map(held, family(self.pid))))
    @property
    def mb(self): return self.bytes/1e6 or None

# measuring

def script(arm): return HERE/f"arm_{arm.split('_')[0]}.py"

def measure(python, arm, kind, spec, timeout=LIMIT, watch=True):
    "The figures of one process: a dict, with the key `failed` and its last words where it did not end well; to `watch` its memory takes some milliseconds of a core every second"
    process = subprocess.Popen([python, script(arm), kind, json.dumps(dict(arm=arm, **spec))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors='replace', cwd=HERE, start_new_session=True)
    with Peak(process.pid) if watch else nullcontext() as peak:
        try: out, err = process.communicate(timeout=timeout)
        except BaseException as e:
            for pid in reversed(family(process.pid)): _end(pid)
            process.communicate()
            if isinstance(e, subprocess.TimeoutExpired): return dict(failed=f'not done after {timeout} s')
            raise
    got = answer(out) if process.returncode == 0 else None
    if got is None: return dict(failed=last_words(err) or f'ended with code {process.returncode}')
    return got if 'na' in got or not watch or not peak.mb else dict(got, peak_mb=peak.mb)

def _end(pid):
    try: os.kill(pid, 9)
    except ProcessLookupError: pass

def answer(text):
    "The JSON in the last line of what an arm printed; None where there is none"
    try: return json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError): return None

def last_words(text): return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), '')

def turns(work, n_rounds):
    "(round, arm) in the order of measuring: another arm starts each round, and some run in the first alone"
    for r in range(n_rounds):
        arms = list(work.all_arms if r == 0 else work.arms)
        yield from ((r, a) for a in arms[r % len(arms):] + arms[:r % len(arms)])

def run_work(name, work, pythons, rounds, quick, say=print):
    "All rounds of one work: arm → a list with a dict for each round, None where it did not run"
    n_rounds = rounds or (1 if quick else work.rounds)
    runs = {arm: [None]*n_rounds for arm in work.all_arms}
    for r, arm in turns(work, n_rounds):
        if any(o and 'na' in o for o in runs[arm]): continue             # it will not be there in the next round either
        start = time.perf_counter()
        runs[arm][r] = got = measure(pythons['blocks' if arm.startswith('blocks') else 'peers'], arm, work.kind, work.spec_of(quick) | dict(seed=r), watch='peak_mb' in work.shows)
        told = ', '.join(f'{k} {v:.4g}' if isinstance(v, (int, float)) else f'{k}: {v}' for k, v in got.items() if k != 'train_losses')
        say(f'{name}, round {r+1} of {n_rounds}, {arm} ({time.perf_counter()-start:.0f} s): {told}', flush=True)
    return dict(rounds=n_rounds, quick=quick, of=state(), runs=runs)

def state():
    "The commit that is measured and today's date, for works that are measured again by themselves; without git, the date alone"
    try: commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): commit = ''
    return f'{commit}, {date.today()}' if commit else str(date.today())

def warm(folder=data.DATA):
    "Read every file once, so that all arms find them in memory"
    for name in ('png', *data.COMPOSED):
        for file in json.loads((folder/f'{name}.json').read_text())['files']: Path(file).read_bytes()

# results

def merge(old, new):
    "`new` results over `old` ones: works that were not measured again stay, if they come from the same machine and the same libraries"
    place = lambda o: ({k: v for k, v in o.get('machine', {}).items() if k != 'day'}, o.get('versions'))
    return dict(new, works={**(old.get('works', {}) if place(old) == place(new) else {}), **new['works']})

def write(results, folder):
    "results.json, RESULTS.md and results.png"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'results.json').write_text(json.dumps(results, indent=1) + '\n')
    (folder/'RESULTS.md').write_text(report.page(results))
    report.plot(results['works'], folder/'results.png')

def parse(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', help='works, or beginnings of their names, separated by commas')
    p.add_argument('--rounds', type=int, help='rounds of each work, in place of its own number')
    p.add_argument('--quick', action='store_true', help='a smoke run: few files, one round')
    p.add_argument('--peers', type=Path, help="Python of an environment that has the peers; without it .venv-peers is made")
    p.add_argument('--report', action='store_true', help='measure nothing: write the page and the plot again from results.json')
    return p.parse_args(args)

def main(args=None):
    args = parse(args)
    works, folder = chosen(args.only, args.quick), HERE/'.data'/'quick' if args.quick else HERE
    old = json.loads((folder/'results.json').read_text()) if (folder/'results.json').exists() else {}
    if args.report: return write(old, folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('ended from outside'))       # so that the process being measured is ended too
    pythons = dict(blocks=sys.executable, peers=str(args.peers or peers_python()))
    subprocess.run([sys.executable, HERE/'data.py', *(['--small'] if args.quick else [])], check=True)      # a process of its own, so that this one stays small
    warm()
    results = dict(machine=machine(), versions={k: versions(python) for k, python in pythons.items()}, works={})
    for name, work in works.items():
        results['works'][name] = run_work(name, work, pythons, args.rounds, args.quick)
        write(merge(old, results), folder)                               # what was measured so far survives an interruption
    print(report.summary(merge(old, results)['works']), f'See {folder.relative_to(ROOT)}/RESULTS.md', sep='\n')

if __name__ == '__main__': main()
