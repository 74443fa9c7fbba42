"""Notebook chores that nbdev leaves to others: pairing with scripts, running with outputs kept, the README, the checks of CI.

    python tools/nb.py pair   [NOTEBOOK ...]   write a percent script beside each notebook, to edit in any editor
    python tools/nb.py sync   SCRIPT ...       bring scripts back into their notebooks (outputs of unchanged cells stay)
    python tools/nb.py export [NOTEBOOK ...]   export to blocks/; without names, all of them, cleaned and indexed
    python tools/nb.py run    [NOTEBOOK ...]   execute in place and keep the outputs, then clean
    python tools/nb.py readme                  render nbs/index.ipynb to README.md
    python tools/nb.py check                   fail when modules, README or notebooks are not what export, readme and clean make of them
    python tools/nb.py test   [NOTEBOOK ...]   execute without saving; fail on a failing cell, and on outputs that run would add or drop
"""
import argparse, os, re, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, BIN = ROOT/'nbs', Path(sys.executable).parent
MACHINE = re.compile(rf'{re.escape(str(ROOT))}\S*|(?<![\w.])/(?:home|Users|root|tmp)/\S+|\b0x[0-9a-f]{{8,}}')
ANSI = re.compile(r'\x1b\[[0-9;]*m')

def notebooks(names):
    "The notebooks named, or all of them in reading order"
    return [Path(n).resolve() for n in names] or sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def place(path): return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path

def jupytext(*args): subprocess.run([sys.executable, '-m', 'jupytext', '--quiet', *map(str, args)], check=True)

def nbdev(command, *args, root=ROOT): subprocess.run([BIN/f'nbdev_{command}', *args], cwd=root, check=True)

def clean(nb): nbdev('clean', '--fname', nb)

# Editing

def pair(names):
    for nb in notebooks(names):
        py = nb.with_suffix('.py')
        if py.exists() and py.stat().st_mtime > nb.stat().st_mtime:
            print(f'{place(py)} is newer than its notebook and stays as it is: sync it, or delete it and pair again'); continue
        jupytext('--to', 'py:percent', '--opt', 'comment_magics=false', nb)

def sync(names):
    for py in map(Path, names):
        nb = py.with_suffix('.ipynb')
        jupytext('--to', 'ipynb', *(['--update'] if nb.exists() else []), '--set-kernel', 'python3', '--update-metadata', '{"jupytext": null}', py)
        clean(nb)

def export(names):
    if not names: nbdev('export'); nbdev('clean'); return
    from nbdev.export import nb_export
    for nb in notebooks(names): nb_export(nb, lib_path=ROOT/'blocks')

def readme(names, root=ROOT):
    "The front page: prose, code, outputs; its pictures go to nbs/images"
    from render import render_readme
    render_readme(root/'nbs/index.ipynb', root/'README.md')

# Running. A kernel for each notebook costs more than `nbdev_test`, which can run them all in one process. It is worth it: no notebook
# sees what another one set or left in memory, and what is compared here is what a reader gets in Jupyter.

def merged(outputs):
    "`outputs` with printed text that arrived in pieces put together: where it is cut depends on the moment"
    res = []
    for o in outputs:
        if res and o.output_type == res[-1].output_type == 'stream' and o.name == res[-1].name: res[-1].text += o.text
        else: res.append(o)
    return res

def execute(nb, kernel):
    "Run every cell of `nb` in a fresh kernel whose folder is the notebook's; returns the notebook as it was and as it is then"
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config
    old, new = nbformat.read(nb, 4), nbformat.read(nb, 4)
    for c in new.cells:
        if c.cell_type == 'code' and re.search(r'^#\|\s*eval:\s*false', c.source, re.M): c.metadata.tags, c.outputs = ['skip-execution'], []
    with tempfile.TemporaryDirectory() as tmp:                           # sockets in a folder of one's own: TCP ports get lost to the kernel next door
        sockets = {'transport': 'ipc', 'ip': f'{tmp}/kernel'} if os.name == 'posix' else {}
        NotebookClient(new, timeout=600, kernel_name=kernel, record_timing=False, store_widget_state=False, config=Config(KernelManager=sockets),
                       resources={'metadata': {'path': str(nb.parent)}}).execute()
    for c in new.cells:
        if c.cell_type == 'code': c.outputs = merged(c.outputs)
    return old, new

def shows(cell):
    "Does code `cell` have outputs that a reader is to see?"
    return any(o.get('name') != 'stderr' for o in cell.outputs)

def each(names, then):
    "Execute notebooks, as many at once as there are cores, and call `then(nb, old, new)`, which says what is wrong; fail after the last, not the first"
    from kernels import forked_kernels
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    os.environ.setdefault('OMP_NUM_THREADS', '1')                        # notebooks run side by side: threads of each for all cores would wait for one another
    os.environ.update(MPLBACKEND='module://matplotlib_inline.backend_inline', PYDEVD_DISABLE_FILE_VALIDATION='1', PYTHONWARNINGS='ignore:IProgress not found')
    def one(nb):
        start = time.time()
        try: problem = then(nb, *execute(nb, kernel))
        except (CellExecutionError, DeadKernelError, RuntimeError, TimeoutError) as e: problem = ANSI.sub('', str(e))
        print(f'{place(nb)}:', f'FAILED\n{problem}' if problem else f'ran in {time.time()-start:.0f} s', flush=True)
        return problem
    books = notebooks(names)
    with forked_kernels() as kernel, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool: failed = [nb for nb, problem in zip(books, pool.map(one, books), strict=True) if problem]
    if failed: sys.exit(f"{len(failed)} failed: {', '.join(str(place(nb)) for nb in failed)}")

def run(names):
    def save(nb, old, new):
        import nbformat
        nbformat.write(new, nb); clean(nb)
    each(names, save)

def test(names):
    def compare(nb, old, new):
        differ = [a.source for a, b in zip(old.cells, new.cells, strict=True) if a.cell_type == 'code' and shows(a) != shows(b)]
        if differ: return f'The outputs in the notebook are not those of its code (mend: tools/nb.py run {place(nb)}). First such cell:\n{differ[0]}'
    each(names, compare)

# Checking

def files(root):
    "What the export, the cleaning and the README make or change below `root`, as name -> content"
    paths = [root/'README.md', *(root/'blocks').rglob('*.py'), *(root/'nbs').rglob('*.ipynb'), *(root/'nbs/images').glob('readme_*.png')]
    return {str(p.relative_to(root)): p.read_bytes() for p in paths if p.exists()}

def faults(nb):
    "What a reader should not meet in the outputs of `nb`"
    import nbformat
    cells = [c for c in nbformat.read(nb, 4).cells if c.cell_type == 'code' and c.source.strip()]
    if cells and not any(map(shows, cells)): yield 'has no output: run it'
    for o in (o for c in cells for o in c.outputs):
        text = o.get('text') or '\n'.join(str(v) for k, v in o.get('data', {}).items() if k.startswith('text/'))
        if o.output_type == 'error' or o.get('name') == 'stderr': yield f'holds a warning or an error: {(text or o.get("evalue", "")).strip()[:200]}'
        for m in MACHINE.findall(text): yield f'shows a path or an address of one machine: {m}'

def check(names):
    "Made in a copy, so that a failing check changes nothing, works in a dirty tree, and needs no git"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)
        for f in ('settings.ini', 'README.md'):
            if (ROOT/f).exists(): shutil.copy(ROOT/f, copy)
        for d in ('nbs', 'blocks'): shutil.copytree(ROOT/d, copy/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'models'))
        before = files(copy)
        for py in (copy/'blocks').rglob('*.py'):                         # a module whose notebook is gone must not survive
            if 'AUTOGENERATED! DO NOT EDIT!' in py.read_text(): py.unlink()
        nbdev('export', root=copy); nbdev('clean', root=copy)
        if (copy/'nbs/index.ipynb').exists(): readme([], copy)
        after = files(copy)
    problems = [f'{f}: not what the notebooks make of it' for f in sorted(before | after) if before.get(f) != after.get(f)]
    if problems: problems.append('  mend: make export, then look at git diff')
    problems += [f'{place(nb)}: {fault}' for nb in notebooks([]) for fault in faults(nb)]
    if problems: sys.exit('\n'.join(problems))
    print(f'{len(notebooks([]))} notebooks, their modules and the README agree')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('verb', choices=['pair', 'sync', 'export', 'run', 'readme', 'check', 'test']); p.add_argument('names', nargs='*')
    args = p.parse_args()
    args.names = [str(Path(n).resolve()) for n in args.names]
    os.chdir(ROOT)
    globals()[args.verb](args.names)
