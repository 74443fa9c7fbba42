"The command in a terminal: exit codes, and errors without a traceback."
import io
import subprocess
import sys

import pytest

import blocks
from blocks import DataError
from blocks.app import cli, demo


def code(argv):
    "The exit code, whichever way it comes"
    try: return cli.main(argv)
    except SystemExit as e: return e.code

def test_version_and_help_are_zero(capsys):
    assert code(['--version']) == 0 and capsys.readouterr().out.strip() == f'blocks {blocks.__version__}'
    assert code(['--help']) == 0 and 'demo' in capsys.readouterr().out
    assert code(['demo', '--help']) == 0 and 'blocks-demo' in capsys.readouterr().out

@pytest.mark.parametrize('argv', [[], ['nonsense'], ['demo', '--nonsense'], ['demo', '--out']])
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
