"The command in a terminal: exit codes, and errors without a traceback."
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import blocks
from blocks import DataError
from blocks.app import cli, demo
from blocks.app.tables import read_folder


def code(argv):
    "The exit code, whichever way it comes"
    try: return cli.main(argv)
    except SystemExit as e: return e.code

def test_version_and_help_are_zero(capsys):
    assert code(['--version']) == 0 and capsys.readouterr().out.strip() == f'blocks {blocks.__version__}'
    assert code(['--help']) == 0 and 'demo' in capsys.readouterr().out
    assert code(['demo', '--help']) == 0 and 'blocks-demo' in capsys.readouterr().out
    assert code(['audit', '--help']) == 0 and 'exit code' in capsys.readouterr().out

@pytest.mark.parametrize('argv', [[], ['nonsense'], ['demo', '--nonsense'], ['demo', '--out'], ['audit'], ['audit', '.', '--workers', '0'], ['audit', '.', '--workers', 'x']])
def test_wrong_use_is_two(argv, capsys):
    assert code(argv) == 2 and 'usage' in capsys.readouterr().err

@pytest.mark.parametrize('error,want,said', [(DataError('no such data'), 1, 'error: no such data'), (KeyboardInterrupt(), 130, 'interrupted'), (None, 0, '')])
def test_what_happened_is_in_the_exit_code(monkeypatch, capsys, error, want, said):
    def demo(args):
        if error is not None: raise error
    monkeypatch.setattr(cli, '_demo', demo)
    assert code(['demo']) == want
    out, err = capsys.readouterr()
    assert said in err and not out and 'Traceback' not in err

def test_other_errors_are_not_hidden(monkeypatch):
    def demo(args): raise ZeroDivisionError
    monkeypatch.setattr(cli, '_demo', demo)
    with pytest.raises(ZeroDivisionError): cli.main(['demo'])

def test_a_missing_extra_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'elpv_dataset', None)                # as if it were not installed
    assert code(['demo', '--out', str(tmp_path/'d')]) == 1 and "pip install 'blocks[demo]'" in capsys.readouterr().err

def test_a_file_in_the_place_of_the_folder_is_a_clear_error(tmp_path, capsys):
    (tmp_path/'f').write_text('')
    assert code(['demo', '--out', str(tmp_path/'f')]) == 1 and 'error:' in capsys.readouterr().err

def test_the_command_is_installed_and_quick_to_say_no():
    out = subprocess.run([sys.executable, '-c', 'import sys\nfrom blocks.app.cli import main\ntry: main(["nonsense"])\nexcept SystemExit as e: print(e.code, [m for m in ("torch", "pandas", "matplotlib") if m in sys.modules])'],
                         capture_output=True, text=True)
    assert out.stdout.strip() == '2 []'

# --- audit
@pytest.fixture
def folder(tmp_path):
    "Five different pictures of each of two classes in train, and as many in valid"
    rng = np.random.default_rng(0)
    for split in ('train', 'valid'):
        for name in ('cat', 'dog'):
            (tmp_path/'data'/split/name).mkdir(parents=True)
            for i in range(5): Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48), 3).save(tmp_path/'data'/split/name/f'{name}{i}.png')
    return tmp_path/'data'

def audit(capsys, *args):
    "Exit code, and what was printed"
    done = code(['audit', *map(str, args)]); said = capsys.readouterr()
    assert 'Traceback' not in said.err
    return done, said.out + said.err

def test_a_clean_folder_is_zero(folder, capsys, tmp_path):
    assert audit(capsys, folder, '--out', tmp_path/'o')[0] == 0
    assert len(pd.read_csv(tmp_path/'o'/'audit.csv')) == 0 and not (tmp_path/'o'/'audit.png').exists()

def test_what_was_found_is_three_printed_and_written(folder, capsys, tmp_path):
    shutil.copy(folder/'train/cat/cat0.png', folder/'valid/dog/x.png'); (folder/'train/dog/bad.jpg').write_text('no')
    done, said = audit(capsys, folder, '--out', tmp_path/'a'/'b', '--workers', 2)
    assert done == 3 and all(o in said for o in ('22 items', 'leak', 'unreadable', 'conflicting labels', 'audit.png'))
    table = pd.read_csv(tmp_path/'a'/'b'/'audit.csv'); leak = table[table.problem == 'leak']
    assert list(leak.split) == ['train', 'valid'] and list(leak.label) == ['cat', 'dog'] and Image.open(tmp_path/'a'/'b'/'audit.png').width > 300
    done, said = audit(capsys, folder, '--json')
    data = json.loads(said)
    assert done == 3 and data['items'] == 22 and data['problems']['leak'] == 2 and len(data['findings']) == sum(data['problems'].values()) and {'problem', 'item', 'group'} <= set(data['findings'][0])

def test_folders_without_splits_or_classes(folder):
    one, none, both = map(read_folder, (folder/'train', folder/'train'/'cat', folder))
    assert one.labels == ['cat']*5 + ['dog']*5 and one.splits is None and none.labels is none.splits is None
    assert both.labels == (['cat']*5 + ['dog']*5)*2 and both.splits == ['train']*10 + ['valid']*10 and len(both) == 20

@pytest.mark.parametrize('sep,header', [(',', True), (';', True), ('\t', False), ('  ', False)])
def test_tables(folder, capsys, tmp_path, sep, header):
    rows = [(f'train/{n}/{n}{i}.png', n, 'False') for n in ('cat', 'dog') for i in range(5)] + [('train/cat/cat0.png', 'dog', 'True')]
    (tmp_path/'t.csv').write_text('\n'.join(sep.join(r) for r in ([('file', 'kind', 'held')] if header else []) + rows) + '\n')
    cols = ('--fn-col', 'file', '--label-col', 'kind', '--split-col', 'held') if header else ('--no-header', '--label-col', 1, '--split-col', 2)
    done, said = audit(capsys, folder, '--csv', tmp_path/'t.csv', *cols, '--json')
    assert done == 3 and json.loads(said)['problems'] == {'leak': 2, 'conflicting labels': 2, 'exact duplicate': 2, 'missing in split': 1}
    shutil.move(tmp_path/'t.csv', folder/'t.csv')                         # found beside the images, too
    assert audit(capsys, folder, '--csv', 't.csv', *cols)[0] == 3

@pytest.mark.parametrize('make,said', [
    (lambda p: [p/'nowhere'], 'no folder'), (lambda p: [p/'t.csv'], 'is a file'), (lambda p: [p/'none'], 'no image'), (lambda p: [p, '--csv', 'no.csv'], 'no table'),
    (lambda p: [p, '--csv', 't.csv', '--fn-col', 'x'], "'a', 'b'"), (lambda p: [p, '--csv', 't.csv', '--fn-col', '2'], 'no column'), (lambda p: [p, '--csv', 'empty.csv'], 'empty.csv'), (lambda p: [p, '--out', p/'t.csv'], 'cannot be written')])
def test_errors_of_the_user_are_one(folder, capsys, make, said):
    (folder/'none').mkdir(); (folder/'t.csv').write_text('a,b\n1,2\n'); (folder/'empty.csv').write_text('')
    done, text = audit(capsys, *make(folder))
    assert done == 1 and 'error:' in text and said in text

# --- the script that goes with the demo
class Fake:
    def predict(self, file): return 'ok', 1, [.25, .75]

def run_predict(monkeypatch, capsys, tmp_path, args=(), stdin=''):
    monkeypatch.setattr(blocks, 'load_learner', lambda path: Fake(), raising=False)
    monkeypatch.setattr(sys, 'argv', ['predict.py', *args]); monkeypatch.setattr(sys, 'stdin', io.StringIO(stdin))
    exec(compile(demo.PREDICT, 'predict.py', 'exec'), {'__file__': str(tmp_path/'predict.py'), '__name__': '__main__'})
    return [line.split('\t') for line in capsys.readouterr().out.splitlines()]

@pytest.mark.parametrize('args,stdin', [(['a.png', 'b c.png'], ''), ([], 'a.png\nb c.png'), ([], 'a.png\nb c.png\n')])
def test_predicting_files_from_arguments_or_from_a_pipe(monkeypatch, capsys, tmp_path, args, stdin):
    assert run_predict(monkeypatch, capsys, tmp_path, args, stdin) == [['ok', '0.7500', 'a.png'], ['ok', '0.7500', 'b c.png']]

def test_a_script_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'PREDICT', 'import sys; sys.exit("there is no export.pkl")')
    with pytest.raises(RuntimeError, match='no export.pkl'): demo.predict_elsewhere(tmp_path, ['a.png'])
