"""From raw figures to ratios with intervals, a Markdown page and a plot."""
import statistics
import numpy as np
from works import METRICS, WORKS

ARMS = dict(blocks='blocks', blocks_strict='blocks, strict', blocks_cached='blocks, RAM cache', fastai='fastai', hand='by hand', lightning='Lightning', timm='timm')

# arithmetic

def figures(runs, arm, metric):
    "The values of `metric` by round; None where the arm did not run, failed, or does not give it"
    return [r.get(metric) if r else None for r in runs.get(arm, [])]

def median(values):
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None

def paired(ours, theirs, f):
    "`f(ours, theirs)` of each round in which both have a value"
    return [f(a, b) for a, b in zip(ours, theirs) if a is not None and b is not None]

def interval(values, centre=np.median, n=4000, seed=0):
    "(centre, low, high): that of `values`, and between which 95 % of its bootstrap samples lie; of a single value nothing is known about the spread"
    values = np.asarray(values, float)
    if not len(values): return None
    middle = float(centre(values))
    if len(values) == 1: return middle, None, None
    samples = np.random.default_rng(seed).choice(values, (n, len(values)))
    low, high = np.quantile(centre(samples, axis=1), (.025, .975))
    return middle, float(low), float(high)

def ratio(runs, goal):
    "(ratio or difference, low, high) of blocks to the peer of `goal`, or blocks' own figure; None where it is missing"
    ours = figures(runs, goal.arm, goal.metric)
    if goal.peer is None: return interval([v for v in ours if v is not None])
    theirs = figures(runs, goal.peer, goal.metric)
    if goal.kind == 'as_good': return interval(paired(ours, theirs, lambda a, b: a - b), np.mean)
    higher = METRICS[goal.metric].higher
    return interval(paired(ours, theirs, lambda a, b: b/a if goal.kind == 'faster' and not higher else a/b))

def met(goal, got):
    "Is the target met? None where nothing was measured"
    if got is None: return None
    middle, _, high = got
    if goal.kind in ('faster', 'least'): return middle >= goal.target
    if goal.kind == 'as_good': return (middle if high is None else high) >= goal.target
    return middle <= goal.target

# Markdown

def number(v, digits=2): return '–' if v is None else f'{v:,.{digits}f}'

def table(head, rows):
    "A Markdown table; all columns but the first and the last are to the right"
    line = lambda cells: '| ' + ' | '.join(str(c).replace('|', '\\|').replace('\n', ' ') for c in cells) + ' |'
    return '\n'.join([line(head), '|---|' + '---:|'*(len(head) - 2) + '---|', *map(line, rows)])

def span(got, digits=2):
    if got is None: return '–'
    middle, low, high = got
    return number(middle, digits) + (f' [{number(low, digits)}, {number(high, digits)}]' if low is not None else '')

def wording(goal):
    "(what is compared, the aim) in words"
    name, m, peer = ARMS[goal.arm], METRICS[goal.metric], goal.peer and ARMS[goal.peer]
    what = {'faster': f'{name}: times as fast as {peer}', 'share': f'{name}: {m.title}, share of {peer}', 'as_good': f'{name}: {m.title}, difference from {peer}'}.get(goal.kind, f'{name}: {m.title}')
    aim = {'faster': f'≥ {goal.target:g}×', 'least': f'≥ {goal.target:g}', 'as_good': 'not lower'}.get(goal.kind, f'≤ {goal.target:g}')
    return what, aim

def verdict(goal, got, runs):
    ok = met(goal, got)
    return {True: 'met', False: '**not met**', None: _missing(runs, goal.arm) or _missing(runs, goal.peer) or 'not measured'}[ok]

def _missing(runs, arm):
    "Why `arm` has no figures"
    return next((('failed' if 'failed' in r else 'not in this version') for r in runs.get(arm, []) if r and ('failed' in r or 'na' in r)), None)

def arm_row(runs, arm, work):
    "A row of a work's table: the median of each metric (of losses and accuracies the mean), or why there is none"
    told = next((o for o in runs.get(arm, []) if o and ('na' in o or 'failed' in o)), None)
    got = [r for r in runs.get(arm, []) if r and 'na' not in r and 'failed' not in r]
    if not got: return [ARMS[arm], *['–']*len(work.shows), 'not run' if told is None else f"failed: {told['failed']}" if 'failed' in told else told['na']]
    values = [statistics.fmean(v) if m in ('valid_loss', 'accuracy') and (v := [o for o in figures(runs, arm, m) if o is not None]) else median(figures(runs, arm, m)) for m in work.shows]
    losses = [r['train_losses'] for r in got if r.get('train_losses')]
    note = 'training loss ' + ' → '.join(f'{statistics.fmean(o):.3f}' for o in zip(*losses)) if losses else got[0].get('files', '')
    return [ARMS[arm], *(number(v, METRICS[m].digits) for v, m in zip(values, work.shows)), f"{note}{', ' if note else ''}{len(got)} round{'s' if len(got) > 1 else ''}" + (f"; failed once or more: {told['failed']}" if told and 'failed' in told else '')]

def parts(name, works):
    "The parts of a work that cannot be left out, as `limits` and `model_*` have measured them by themselves → what each takes; None where that is not known, and for the few files of a smoke run"
    if works[name].get('quick'): return None
    def measured(o): return {m: v for m in WORKS[o].shows if o in works and (v := median(figures(works[o]['runs'], 'blocks', m)))}
    models = {w.spec['arch']: measured(o) for o, w in WORKS.items() if w.kind == 'model'}
    try: return WORKS[name].parts(measured('limits'), models) if WORKS[name].parts else None
    except KeyError: return None                                         # a part was not measured, or failed

def cost(name, value):
    "A figure in the first metric of a work as time: (value, unit); a rate becomes milliseconds an image"
    metric = WORKS[name].shows[0]
    return (1000/value, 'ms an image') if metric == 'img_s' else (value, metric if metric == 'ms' else 's')

def at_best(name, goal, works):
    "What `goal` would come to if blocks did nothing but the parts that it cannot leave out; None where that is not known"
    theirs = median(figures(works[name]['runs'], goal.peer, goal.metric)) if goal.peer else None
    needed = parts(name, works)
    if not needed or not theirs or goal.arm != 'blocks' or goal.metric != WORKS[name].shows[0]: return None
    best = cost(name, theirs)[0]/sum(needed.values())
    return best if goal.kind == 'faster' else 1/best

def profile(name, works):
    "The parts of a work and the whole, in a sentence, and what keeps it from an aim that it misses"
    needed, ours = parts(name, works), median(figures(works[name]['runs'], 'blocks', WORKS[name].shows[0]))
    if not needed or not ours: return []
    whole, unit = cost(name, ours)
    missed = any(met(g, ratio(works[name]['runs'], g)) is False for g in WORKS[name].goals if g.metric == WORKS[name].shows[0])
    each = ', '.join(f'{k} {number(v, 1)}' for k, v in needed.items())
    return [f"Parts by themselves, in {unit}: {each}; together {number(sum(needed.values()), 1)}, and {number(whole, 1)} were measured for the whole." + (f' {WORKS[name].why}'.rstrip().replace('\n', ' ') if missed else ''), '']

def section(name, works):
    "One work: its figures, and its aims"
    o = works[name]
    work, runs = WORKS[name], o['runs']
    lines = [f'## {work.title}', '', table(['', *(METRICS[m].title for m in work.shows), 'notes'], [arm_row(runs, a, work) for a in work.all_arms]), '']
    if o.get('of'): lines += [f"Measured: {o['of']}.", '']
    if work.goals: lines += [table(['aim', 'target', 'measured', 'at best', ''], [[*wording(g), span(got := ratio(runs, g), 3 if g.kind == 'as_good' else 2), number(at_best(name, g, works)), verdict(g, got, runs)] for g in work.goals]), '']
    lines += profile(name, works)
    return '\n'.join(lines)

def summary(works):
    counts = [met(g, ratio(o['runs'], g)) for name, o in works.items() for g in WORKS[name].goals]
    return f'{counts.count(True)} of {len(counts)} targets are met, {counts.count(False)} are not' + (f', {counts.count(None)} could not be measured.' if None in counts else '.')

HOW = """Each figure comes from a process of its own (`benchmarks/arm_*.py`), which does one piece of work and prints what it measured. In a round the arms take turns, and each round starts with another arm, so that a machine
that gets slower or faster does so for all. All files were read once before the first round, and the first pass of a loader is not counted. A number is the median over the rounds;
what is compared is taken within each round, blocks against the peer next to it, and the brackets hold 95 % of a bootstrap over the rounds. Losses and accuracies are means over the seeds, which are the rounds:
“not lower” is met unless even the upper end of the interval of the difference is below 0. Arms with one round are for orientation.
The peak of memory is that of a process with its children (proportional set size, once a second), from its start, libraries included.

The same for all arms: files, split, first weights of body and head, sizes, batch. ResNets start from random weights, made once, whose normalisation has seen 256 of the training pictures; they stand for
pretrained ones, since nothing is downloaded, and every arm treats them so by its defaults. Each library keeps its own defaults: blocks computes in bfloat16 where the hardware has it, reads a JPEG at a fraction of its size where that is enough, and uses threads;
“strict” is blocks in 32 bits with every JPEG read in full. The peers compute in 32 bits. “By hand” is a careful loop with torchvision's v2 transforms; Lightning has that loop's model and loaders.
Kinds of augmentation are the same (flip, rotation, zoom, perspective, brightness and contrast), but for timm, whose transforms have no rotation and no perspective outside of RandAugment.

“At best” is what a comparison would come to if blocks did nothing but what cannot be left out, as the last tables have it, one part after the other on all cores: decoding (of a large JPEG, at the sizes that its crops allow),
the model's arithmetic in the precision that is used, the import of PyTorch and torchvision. An aim beyond it cannot be met on this machine by a better loop or loader; close to it, what is left is theirs.
Parts are measured at another moment than the whole, and where a machine's speed varies by a tenth or two between them, a whole may take less than its parts."""

def page(results):
    "RESULTS.md"
    machine = table(['', ''], [[k, v] for k, v in results['machine'].items()])
    versions = results['versions']
    names = sorted({k for o in versions.values() for k in o}, key=str.lower)
    libraries = table(['', *versions], [[k, *(o.get(k, '–') for o in versions.values())] for k in names])
    smoke = ['', '**A smoke run, of few small files and one round: it shows that everything runs, and its figures say nothing.**'] if any(o['quick'] for o in results['works'].values()) else []
    parts = ['# Benchmarks', '', '<!-- Written by `make bench` from benchmarks/results.json -->', '', summary(results['works']), *smoke, '', '![Ratios](results.png)', '', '## How it was measured', '', HOW, '',
             '### Machine', '', machine, '', '### Versions', '', libraries, '', *(section(name, results['works']) for name in WORKS if name in results['works'])]
    return '\n'.join(parts).rstrip() + '\n'

# plot

def bars(works):
    "(label, colour key, ratio, low, high, target) for every aim that is a ratio to a peer"
    for name in WORKS:
        for g in WORKS[name].goals if name in works else ():
            got = ratio(works[name]['runs'], g) if g.kind == 'faster' else None
            if got: yield f"{name}{', cached' if g.arm == 'blocks_cached' else ''}", g.peer, *got, g.target

def plot(works, path):
    "A bar for each ratio to a peer, to the right of 1 where blocks is faster, its interval, and a mark at the target"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator
    rows = list(bars(works))
    if not rows: return
    colours = dict(fastai='#4878cf', hand='#d65f5f')
    fig, ax = plt.subplots(figsize=(8, 1 + .3*len(rows)), layout='constrained')
    for y, (_, peer, middle, low, high, target) in enumerate(rows):
        ax.barh(y, middle - 1, left=1, color=colours[peer], height=.7, zorder=2)
        if low is not None: ax.plot([low, high], [y, y], color='black', lw=1.2, zorder=3)
        ax.plot([target, target], [y - .45, y + .45], color='black', lw=2.5, zorder=4)
        ax.annotate(f'{middle:.2f}×', (max(middle, target, high or 0), y), (6, 0), textcoords='offset points', va='center', fontsize=8)
    ax.set_yticks(range(len(rows)), [f'{label} / {ARMS[peer]}' for label, peer, *_ in rows], fontsize=8)
    ax.axvline(1, color='grey', lw=1, zorder=1)
    ax.invert_yaxis()
    ends = [v for o in rows for v in o[2:] if v] + [1]
    ax.set(xlabel='times as fast as the peer; thin line: 95 % interval, thick mark: target', xscale='log', xlim=(min(ends)/1.15, max(ends)*1.5))
    ax.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    ax.xaxis.set_major_formatter('{x:g}')
    ax.xaxis.set_minor_locator(NullLocator())
    ax.spines[['top', 'right']].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
