"""Kernels that start at once: one process imports what nearly every notebook imports, and each kernel is a fork of it.

    with forked_kernels() as name: NotebookClient(…, kernel_name=name)

A kernel is still a process of its own, and no notebook sees what another one did; only the seconds that `import torch` takes are spent once.
Where there is no fork (Windows), or where it is not safe (macOS), the name is that of the ordinary kernel.
"""
import json, os, signal, socket, subprocess, sys, tempfile
from contextlib import contextmanager
from pathlib import Path

PRELOADED = 'numpy pandas sklearn.metrics matplotlib.figure matplotlib.font_manager torch torchvision.transforms.v2 torchvision.models ipykernel.kernelapp'

@contextmanager
def forked_kernels():
    "The name of a kernel, as long as the context lasts"
    if sys.platform != 'linux': yield 'python3'; return
    with tempfile.TemporaryDirectory() as d:
        spec, path = Path(d)/'kernels/forked', os.environ.get('JUPYTER_PATH')
        spec.mkdir(parents=True)
        (spec/'kernel.json').write_text(json.dumps(dict(argv=[sys.executable, '-S', __file__, 'ask', f'{d}/socket', '{connection_file}'], display_name='forked', language='python')))
        parent = subprocess.Popen([sys.executable, __file__, 'serve', f'{d}/socket'], start_new_session=True, stdout=subprocess.PIPE)
        try:
            if not parent.stdout.readline(): raise RuntimeError('the process that forks kernels did not start')
            os.environ['JUPYTER_PATH'] = d + (os.pathsep + path if path else '')
            yield 'forked'
        finally:
            os.killpg(parent.pid, signal.SIGKILL); parent.wait()
            os.environ.pop('JUPYTER_PATH', None)
            if path: os.environ['JUPYTER_PATH'] = path

def serve(path):
    "Import, then fork a kernel for each who asks"
    import importlib
    for name in PRELOADED.split(): importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)                        # children that end are not waited for
    server = socket.socket(socket.AF_UNIX)
    server.bind(path); server.listen(64)
    print('ready', flush=True)
    while True:
        ask, _ = server.accept()
        if os.fork(): ask.close(); continue
        server.close()
        return run_kernel(ask, json.loads(ask.makefile().readline()))

def run_kernel(ask, what):
    "Be the kernel; `ask` is closed by its end, which tells who asked"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear(); os.environ.update(what['env']); os.environ['JPY_PARENT_PID'] = str(os.getppid())
    os.chdir(what['cwd'])
    sys.path[0] = ''                                                     # as for a kernel that is started in the notebook's folder
    os.set_inheritable(ask.fileno(), False)                              # nor do the kernel's own children keep it open
    ask.sendall(f'{os.getpid()}\n'.encode())
    from ipykernel.kernelapp import launch_new_instance
    sys.argv = ['ipykernel_launcher', '-f', what['file']]
    launch_new_instance()

def ask(path, file):
    "Have a kernel forked, pass signals on to it, and last as long as it"
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.sendall((json.dumps(dict(file=file, cwd=os.getcwd(), env=dict(os.environ))) + '\n').encode())
    answer = client.makefile()
    pid = int(answer.readline())
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda number, frame: os.kill(pid, number))
    answer.read()

if __name__ == '__main__': dict(serve=serve, ask=ask)[sys.argv[1]](*sys.argv[2:])
