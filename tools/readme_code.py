"""Does the code of README.md work? Runs it as a reader would: block after block, in one fresh process, in an empty folder.

    python tools/readme_code.py [FILE]

A ```python block after the line `<!-- not run -->` is only compiled. Of ```bash blocks, the targets of `make` must exist and `blocks … --help` must answer;
links to files must lead to one.
"""
import os, re, shlex, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r'(<!-- not run -->\s*)?^```(\w+)[^\n]*\n(.*?)^```', re.M | re.S)

def blocks(text):
    "Each fenced block of `text`: its language, its code set at the line it has in the page, and whether it is to be run"
    for m in BLOCK.finditer(text): yield m[2], '\n'*text.count('\n', 0, m.start(3)) + m[3], not m[1]

def check_shell(code, targets):
    "What is wrong with the `make` and `blocks` lines of a shell block"
    for line in code.split('\n'):
        words = shlex.split(line, comments=True)
        if words[:1] == ['make']: yield from (f'README: `{line.strip()}`: the Makefile has no such target' for w in words[1:2] if w not in targets)
        if words[:1] == ['blocks']:
            command = [Path(sys.executable).parent/'blocks', *words[1:2], '--help']
            if subprocess.run(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL).returncode: yield f'README: `{line.strip()}`: no such command'

def main(page):
    text, problems = page.read_text(encoding='utf-8'), []
    targets = re.findall(r'^([\w-]+):(?!=)', (ROOT/'Makefile').read_text(), re.M)
    program, n = [], 0
    for lang, code, run in blocks(text):
        if lang in ('bash', 'sh', 'shell', 'console'): problems += check_shell(code, targets)
        if lang != 'python': continue
        compile(code, page.name, 'exec')
        if run: program.append(code); n += 1
    links = re.findall(r'\]\(([^)#\s]+)', re.sub(r'^```.*?^```|`[^`\n]+`', '', text, flags=re.M | re.S))
    problems += [f'README: the link to {p} leads nowhere' for p in links if not re.match('[a-z]+:', p) and not (page.parent/p).exists()]
    if problems: sys.exit('\n'.join(problems))
    lines = ['']*(text.count('\n') + 1)
    for code in program:
        for i, line in enumerate(code.split('\n')): lines[i] = lines[i] or line
    with tempfile.TemporaryDirectory() as tmp:                           # line numbers of the script are those of the page, so a traceback points there
        script = Path(tmp)/'readme.py'; script.write_text('\n'.join(lines), encoding='utf-8')
        work = Path(tmp)/'work'; work.mkdir()
        done = subprocess.run([sys.executable, script], cwd=work, stdin=subprocess.DEVNULL, env={**os.environ, 'MPLBACKEND': 'Agg'})
    if done.returncode: sys.exit(f'{page.name}: its code failed; the line numbers above are those of {page.name}')
    print(f'{page.name}: {n} blocks of Python ran')

if __name__ == '__main__': main(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT/'README.md')
