"""What a user gets by importing."""
import importlib
import pkgutil
import subprocess
import sys

import blocks


def python(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()

def test_every_name_is_there_and_comes_from_its_module():
    assert len(blocks.__all__) == len(set(blocks.__all__)) <= 230
    for name in blocks.__all__: assert getattr(blocks, name) is not None, name

def test_star_import_gives_the_names_that_users_of_fastai_expect():
    scope = {}
    exec('from blocks import *', scope)
    assert {'Path', 'L', 'resnet18', 'resnet152', 'DataBlock', 'cnn_learner', 'load_learner', 'aug_transforms'} <= set(scope)
    assert not {'torch', 'np', 'pd', 'plt', 'importlib'} & set(scope)

def test_an_unknown_name_is_an_attribute_error():
    try: blocks.no_such_name
    except AttributeError as e: assert 'no_such_name' in str(e)
    else: raise AssertionError

def test_import_alone_is_lazy():
    heavy = python("import sys, blocks; print([m for m in ('torch', 'torchvision', 'pandas', 'sklearn', 'matplotlib', 'timm') if m in sys.modules])")
    assert heavy == '[]'

def test_star_import_leaves_out_what_only_some_use():
    heavy = python("import sys\nfrom blocks import *\nprint([m for m in ('pandas', 'sklearn', 'matplotlib', 'timm', 'torchmetrics', 'IPython') if m in sys.modules])")
    assert heavy == '[]'

def test_importing_and_building_touch_no_global_random_state():
    assert python('''
import random, numpy as np, torch
before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
from blocks import *
RandomSplitter(.2)(list(range(50))); RandomSplitter(.2, seed=3)(list(range(50)))
assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1] and torch.equal(torch.get_rng_state(), before[2])
print('ok')''') == 'ok'

def test_every_module_lists_only_names_it_defines():
    names = [m.name for m in pkgutil.walk_packages(blocks.__path__, 'blocks.') if not m.ispkg and not m.name.endswith('_modidx')]
    assert len(names) > 30
    for name in names:
        module = importlib.import_module(name)
        for o in module.__all__: assert hasattr(module, o), (name, o)
