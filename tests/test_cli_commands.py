"The commands train, predict, evaluate, export, inspect, bench and serve: what they write, print and refuse."
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from blocks import DataError, RegressionBlock, load_learner
from blocks.app import cli
from blocks.app.settings import Settings
from blocks.app.tables import read_table
from blocks.app.training import training_table
from blocks.train.callback import Callback

SMALL = '--arch shufflenet_v2_x0_5 --no-pretrained --epochs 1 --size 32 --bs 8 --device cpu --workers 0'.split()


def run(capsys, *argv):
    "(exit code, stdout, stderr) of a command; never a traceback"
    try: code = cli.main([str(o) for o in argv])
    except SystemExit as e: code = e.code
    said = capsys.readouterr()
    assert 'Traceback' not in said.err
    return code, said.out, said.err

def one_json(capsys, *argv, code=0):
    "The document that a command prints with --json; nothing else may be there"
    done, out, err = run(capsys, *argv, '--json')
    assert done == code, err
    return json.loads(out, parse_constant=lambda o: pytest.fail(f'{o} is not JSON'))

@pytest.fixture(scope='module')
def trained(two_class, tmp_path_factory):
    "A finished run on the two classes, with a table of them"
    out = tmp_path_factory.mktemp('runs')/'run'
    assert cli.main(['train', str(two_class), *SMALL, '--out', str(out)]) == 0
    return out

@pytest.fixture
def table(two_class, tmp_path):
    "Files without their ending, in an order of their own, with numbers and labels"
    rows = [(f'{k}/{k}_{i:d}', k, f'{k};small' if i % 2 else k, .5*i, i < 2) for i in (3, 0, 7, 1, 2) for k in ('dog', 'cat')]
    pd.DataFrame(rows, columns=['image', 'kind', 'labels', 'number', 'held']).to_csv(tmp_path/'t.csv', index=False)
    return tmp_path/'t.csv'

# --- train

def test_a_run_has_all_its_files(trained):
    assert {o.name for o in trained.iterdir()} == {'export.pkl', 'history.csv', 'config.json', 'metrics.json', 'confusion_matrix.png'}
    facts = json.loads((trained/'metrics.json').read_text())
    assert facts['classes'] == ['cat', 'dog'] and facts['items'] == dict(train=39, valid=9) and 0 <= facts['metrics']['accuracy'] <= 1
    history = pd.read_csv(trained/'history.csv')
    assert len(history) == 1 and history.accuracy[0] == pytest.approx(facts['metrics']['accuracy']) and Image.open(trained/'confusion_matrix.png').width > 200

def test_a_config_gives_the_same_run_and_options_go_before_it(trained, tmp_path, capsys):
    code, out, err = run(capsys, 'train', '--config', trained/'config.json', '--out', tmp_path/'again', '--json')
    facts = json.loads(out)
    assert code == 0 and 'valid_loss' in err                             # the table of epochs makes room for the document
    assert facts['metrics'] == json.loads((trained/'metrics.json').read_text())['metrics'] and (tmp_path/'again'/'config.json').read_text() == (trained/'config.json').read_text()
    one_json(capsys, 'train', '--config', trained/'config.json', '--size', 24, '--metrics', 'error_rate,F1Score', '--strategy', 'fine_tune', '--out', tmp_path/'other')
    config = json.loads((tmp_path/'other'/'config.json').read_text())
    assert config['size'] == 24 and config['arch'] == 'shufflenet_v2_x0_5'
    history = pd.read_csv(tmp_path/'other'/'history.csv')
    assert {'error_rate', 'f1_score'} <= set(history) and len(history) == 2            # the head alone, then everything

@pytest.mark.skipif(sys.version_info < (3, 11), reason='TOML needs Python 3.11')
def test_toml(tmp_path, two_class, capsys):
    (tmp_path/'c.toml').write_text(f'path = "{two_class}"\narch = "nothing_of_that_name"\nvalid-pct = 0.5\n')
    code, _, err = run(capsys, 'train', '--config', tmp_path/'c.toml', '--out', tmp_path/'o')
    assert code == 1 and 'nothing_of_that_name' in err and not (tmp_path/'o').exists()

@pytest.mark.parametrize('text,said', [('{"epoch": 3}', "did you mean 'epochs'"), ('{"epochs": "3"}', 'a whole number'), ('{"epochs": true}', 'a whole number'), ('{"epochs": 0}', 'from 1'), ('{"lr": "x"}', 'a number'),
                                       ('{"strategy": "x"}', 'one_cycle'), ('{"valid_pct": 1.5}', 'below 1'), ('[]', 'list'), ('{', 'cannot be read'), (None, 'cannot be read')])
def test_a_config_that_is_wrong(two_class, tmp_path, capsys, text, said):
    if text is not None: (tmp_path/'c.json').write_text(text)
    code, out, err = run(capsys, 'train', two_class, '--config', tmp_path/'c.json', '--out', tmp_path/'o')
    assert code == 1 and said in err and len(err.splitlines()) == 1 and not out and not (tmp_path/'o').exists()

def test_every_setting_is_an_option():
    train = next(a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices['train']
    options = {a.dest: a for a in train._actions}
    assert {f.name for f in fields(Settings)} <= set(options) and all(options[f.name].default is argparse.SUPPRESS for f in fields(Settings))

def test_a_finished_run_is_not_overwritten(trained, two_class, tmp_path, capsys):
    before = (trained/'export.pkl').read_bytes()
    code, _, err = run(capsys, 'train', two_class, *SMALL, '--out', trained)
    assert code == 1 and '--force' in err and (trained/'export.pkl').read_bytes() == before
    code, _, err = run(capsys, 'train', '--resume', '--out', trained)
    assert code == 1 and 'finished' in err
    (tmp_path/'o').mkdir(); (tmp_path/'o'/'history.csv').write_text('mine')
    assert run(capsys, 'train', two_class, *SMALL, '--out', tmp_path/'o')[0] == 1 and (tmp_path/'o'/'history.csv').read_text() == 'mine'

def test_force_destroys_nothing_before_there_is_something_better(trained, two_class, tmp_path, capsys, monkeypatch):
    from blocks.app import training
    out = tmp_path/'o'
    shutil.copytree(trained, out)
    kept = {n: (out/n).read_bytes() for n in ('export.pkl', 'metrics.json', 'confusion_matrix.png', 'history.csv', 'config.json')}
    (tmp_path/'c.json').write_text('{"lr": -1}')
    for rate, code in ((('--lr', -1), 2), (('--lr', 'nan'), 2), (('--config', tmp_path/'c.json'), 1)):
        done, _, err = run(capsys, 'train', two_class, *SMALL, *rate, '--out', out, '--force')
        assert done == code and 'above 0' in err and {n: (out/n).read_bytes() for n in kept} == kept
    def fails(*_): raise DataError('in the middle')
    monkeypatch.setattr(training, '_train', fails)
    assert run(capsys, 'train', two_class, *SMALL, '--out', out, '--force')[0] == 1 and (out/'export.pkl').read_bytes() == kept['export.pkl'] and (out/'metrics.json').read_bytes() == kept['metrics.json']
    monkeypatch.undo()
    code, said, err = run(capsys, 'train', two_class, *SMALL, '--seed', 7, '--out', out, '--force')
    assert code == 0 and 'valid_loss' in said and 'valid_loss' not in err and (out/'export.pkl').read_bytes() != kept['export.pkl'] and len(pd.read_csv(out/'history.csv')) == 1

def test_the_place_of_a_run_is_refused_before_torch_is_imported(trained, two_class):
    code = 'import sys; from blocks.app.cli import main; print(main(sys.argv[1:]), "torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code, 'train', str(two_class), '--out', str(trained)], capture_output=True, text=True)
    assert done.stdout.split() == ['1', 'False'] and '--force' in done.stderr

def test_a_config_means_the_same_in_every_folder(two_class, table, tmp_path, capsys, monkeypatch):
    (tmp_path/'data').symlink_to(two_class); (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(capsys, 'train', 'data', *SMALL, '--bs', 4, '--csv', 't.csv', '--suff', '.png', '--label-col', 'kind', '--valid-col', 'held', '--out', 'a')[0] == 0
    assert run(capsys, 'train', 'data/cat', *SMALL[:-2], '--valid', 'data/dog', '--out', 'b')[0] == 1            # no labels, but the settings were read
    s = Settings(path='data', valid='elsewhere').absolute()
    assert (s.path, s.valid, Settings(path='data', valid='cat').absolute().valid, s.csv, s.weights) == (str(tmp_path/'data'), str(tmp_path/'elsewhere'), 'cat', None, None)
    monkeypatch.chdir(tmp_path/'elsewhere')
    assert one_json(capsys, 'train', '--config', '../a/config.json', '--out', 'c')['items'] == dict(train=6, valid=4)

def test_a_table_of_files_that_are_not_there(two_class, tmp_path, capsys):
    (tmp_path/'t.csv').write_text('f,l\n' + '\n'.join(f'gone{i}.png,{"ab"[i % 2]}' for i in range(20)))
    code, _, err = run(capsys, 'train', two_class, *SMALL, '--csv', tmp_path/'t.csv', '--out', tmp_path/'o')
    assert code == 1 and all(o in err for o in ('gone', 'PATH', '--folder', '--suff')) and 'get_x' not in err

def test_split_folders_and_a_folder_for_validation(two_class, tmp_path, capsys):
    for split, part in (('train', range(16)), ('val', range(16, 20)), ('test', range(20, 24))):
        for k in ('cat', 'dog'):
            (tmp_path/'d'/split/k).mkdir(parents=True)
            for i in part: (tmp_path/'d'/split/k/f'{i}.png').symlink_to(two_class/k/f'{k}_{i}.png')
    assert one_json(capsys, 'train', tmp_path/'d', *SMALL, '--out', tmp_path/'a')['items'] == dict(train=32, valid=8)
    for path, valid in ((tmp_path/'d', 'test'), (tmp_path/'d'/'train', str(tmp_path/'d'/'test'))):
        table = training_table(Settings(path=str(path), valid=valid))
        assert {k: table.splits.count(k) for k in table.splits} == dict(train=32, valid=8) and all(('test' in o.parts) == (split == 'valid') for o, split in zip(table.items, table.splits))
    code, _, err = run(capsys, 'evaluate', tmp_path/'a'/'export.pkl', tmp_path/'d')
    assert code == 1 and f"such as {str(tmp_path/'d'/'test')!r}" in err
    assert one_json(capsys, 'evaluate', tmp_path/'a'/'export.pkl', tmp_path/'d'/'test')['items'] == 8

def test_tables_of_several_labels_and_of_numbers(two_class, table, tmp_path, capsys):
    common = ('train', two_class, *SMALL, '--bs', 4, '--csv', table, '--suff', '.png', '--valid-col', 'held')
    facts = one_json(capsys, *common, '--label-col', 'labels', '--label-delim', ';', '--out', tmp_path/'multi')
    assert facts['classes'] == ['cat', 'dog', 'small'] and facts['items'] == dict(train=6, valid=4) and {'accuracy_multi', 'f1_score'} <= set(facts['metrics'])
    scores = one_json(capsys, 'evaluate', tmp_path/'multi'/'export.pkl', two_class, '--csv', table, '--suff', '.png', '--label-col', 'labels', '--label-delim', ';', '--valid-col', 'held')
    assert scores['items'] == 4 and set(scores['classes']) == {'cat', 'dog', 'small'} and 0 <= scores['macro']['f1-score'] <= 1
    facts = one_json(capsys, *common, '--label-col', 'number', '--regression', '--out', tmp_path/'number')
    assert not facts['classes'] and facts['metrics']['rmse'] >= facts['metrics']['mae'] > 0 and not (tmp_path/'number'/'confusion_matrix.png').exists()
    scores = one_json(capsys, 'evaluate', tmp_path/'number'/'export.pkl', two_class, '--csv', table, '--suff', '.png', '--label-col', 'number', '--valid-col', 'held', '--out', tmp_path/'s')
    said = pd.read_csv(tmp_path/'s'/'predictions.csv')
    assert scores['mae'] == pytest.approx((said.actual - said.prediction).abs().mean(), abs=1e-5)
    assert run(capsys, *common, '--label-col', 'kind', '--regression', '--out', tmp_path/'x')[2].count('not a number') == 1

class _Asks(Callback):
    def before_batch(self):
        if self.learn.training and self.learn.epoch == 1: os.kill(os.getpid(), signal.SIGINT)

def test_ctrl_c_keeps_what_was_trained(two_class, tmp_path, capsys, monkeypatch):
    from blocks.app import training
    whole = one_json(capsys, 'train', two_class, *SMALL, '--epochs', 2, '--out', tmp_path/'whole')
    (tmp_path/'cut').mkdir(); (tmp_path/'cut'/'export.pkl').write_text('of a run before')
    made = training.make_learner
    monkeypatch.setattr(training, 'make_learner', lambda *args: made(*args).add_cbs(_Asks()))
    code, _, err = run(capsys, 'train', two_class, *SMALL, '--epochs', 2, '--out', tmp_path/'cut', '--force')
    assert code == 130 and f"--resume --out {tmp_path/'cut'}" in err and (tmp_path/'cut'/'checkpoint.pth').is_file() and (tmp_path/'cut'/'export.pkl').read_text() == 'of a run before'
    monkeypatch.undo()
    code, _, err = run(capsys, 'train', two_class, *SMALL, '--out', tmp_path/'cut')
    assert code == 1 and '--resume' in err                                # what was trained is not overwritten by accident
    assert run(capsys, 'train', '--resume', '--epochs', 5, '--out', tmp_path/'cut')[0] == 2
    again = one_json(capsys, 'train', '--resume', '--out', tmp_path/'cut')
    assert again['metrics'] == whole['metrics'] and not (tmp_path/'cut'/'checkpoint.pth').exists()
    a, b = (load_learner(tmp_path/o/'export.pkl').model.state_dict() for o in ('whole', 'cut'))
    assert all((a[k] == b[k]).all() for k in a) and len(pd.read_csv(tmp_path/'cut'/'history.csv')) == 2

@pytest.mark.parametrize('argv,code,said', [
    ([], 2, '--out'), (['--out', 'o'], 2, 'PATH'), (['DATA', '--out', 'o', '--nonsense'], 2, 'nonsense'), (['DATA', '--out', 'o', '--epochs', '0'], 2, 'epochs'), (['DATA', '--out', 'o', '--strategy', 'x'], 2, 'strategy'),
    (['DATA', '--out', 'o', '--weights', 'w', '--no-pretrained'], 2, 'not allowed'), (['DATA', '--out', 'o', '--arch', 'resnet3'], 1, 'resnet34'), (['nowhere', '--out', 'o'], 1, 'no folder'), (['EMPTY', '--out', 'o'], 1, 'no image'),
    (['DATA/cat', '--out', 'o'], 1, 'no label'), (['DATA', '--out', 'FILE/o'], 1, 'cannot be written'), (['DATA', '--out', 'FILE'], 1, 'cannot be written'), (['DATA', '--out', 'o', '--metrics', 'acc'], 1, 'accuracy'),
    (['DATA', '--out', 'o', '--device', 'tpu9'], 1, 'device'), (['DATA', '--out', 'o', '--csv', 'no.csv'], 1, 'no table'), (['DATA', '--out', 'o', '--label-delim', ';'], 1, 'csv'), (['--resume', '--out', 'o'], 1, 'nothing to resume'),
    (['DATA', '--out', 'o', '--weights', 'no.pth', '--arch', 'resnet18', '--bs', '8'], 1, 'no.pth')])
def test_wrong_use_of_train(two_class, tmp_path, capsys, monkeypatch, argv, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'FILE').write_text(''); (tmp_path/'EMPTY').mkdir(); (tmp_path/'DATA').symlink_to(two_class)
    done, out, err = run(capsys, 'train', *argv)
    assert done == code and said in err and not out.startswith('{')
    if code == 1: assert err.count('\n') == 1 and err.startswith('blocks: error: ')

# --- predict

def test_a_submission_has_the_rows_and_columns_of_the_competition(trained, two_class, table, tmp_path, capsys):
    rows = table.read_text().splitlines(); rows.insert(3, 'gone/1,x,x,0,False')
    (tmp_path/'test.csv').write_text('\n'.join(rows))
    common = ('predict', trained/'export.pkl', two_class, '--csv', tmp_path/'test.csv', '--suff', '.png', '--device', 'cpu')
    code, _, err = run(capsys, *common, '--out', tmp_path/'sub'/'s.csv', '--columns', 'id=image_id,prediction=label')
    made = pd.read_csv(tmp_path/'sub'/'s.csv')
    assert code == 3 and 'gone/1' in err and list(made.columns) == ['image_id', 'label'] and list(made.image_id) == [o.split(',')[0] for o in rows[1:]]
    assert made.label.isna().tolist() == [i == 2 for i in range(len(made))]
    p = load_learner(trained/'export.pkl')
    assert [p.predict(two_class/f'{o}.png')[0] for o in made.image_id.drop(2)] == made.label.drop(2).tolist()
    run(capsys, *common, '--out', tmp_path/'all.csv')
    assert list(pd.read_csv(tmp_path/'all.csv').columns)[:5] == ['image', 'prediction', 'probability', 'p(cat)', 'p(dog)']
    code, _, err = run(capsys, *common, '--out', tmp_path/'no.csv', '--columns', 'id,nonsense')
    assert code == 2 and 'nonsense' in err and 'p(cat)' in err and not (tmp_path/'no.csv').exists()

def test_files_folders_and_bad_ones(trained, two_class, tmp_path, capsys):
    (tmp_path/'bad.png').write_text('not an image')
    code, out, err = run(capsys, 'predict', trained/'export.pkl', two_class/'cat'/'cat_0.png', tmp_path/'bad.png', '--device', 'cpu', two_class/'dog', tmp_path/'nothing.png')
    assert code == 3 and len(out.splitlines()) == 1 + 24 + 3 and 'cat_0.png' in out and len(err.splitlines()) == 2 and 'bad.png' in err and 'nothing.png' in err
    made = one_json(capsys, 'predict', trained/'export.pkl', tmp_path/'bad.png', two_class/'dog', '--topk', 1, code=3)
    assert len(made['predictions']) == 25 and made['failed'] == 1 and 'error' in made['predictions'][0] and [len(o['top']) for o in made['predictions'][1:]] == [1]*24
    assert all(o['item'].endswith(f'{name}.png') for o, name in zip(made['predictions'][1:], sorted(f'dog_{i}' for i in range(24))))
    assert one_json(capsys, 'predict', trained/'export.pkl', tmp_path/'bad.png', code=3)['failed'] == 1           # also when it is all there is

def test_unsure_answers_views_and_the_plot(trained, two_class, tmp_path, capsys):
    made = one_json(capsys, 'predict', trained/'export.pkl', two_class/'cat', '--threshold', '.999999', '--plot', tmp_path/'p'/'counts.png')
    assert {o['label'] for o in made['predictions']} == {'unknown'} and Image.open(tmp_path/'p'/'counts.png').width > 200
    assert len(one_json(capsys, 'predict', trained/'export.pkl', two_class/'cat', '--reject', '.05')['predictions']) == 24
    out = run(capsys, 'predict', trained/'export.pkl', two_class/'cat', '--threshold', '.999999', '--topk', 2)[1]
    assert len(out.splitlines()) == 24 and all('\tunknown, ' in o and 'cat' in o.split('\t')[1] and 'dog' in o.split('\t')[1] for o in out.splitlines())
    plain, seen = (one_json(capsys, 'predict', trained/'export.pkl', two_class/'cat'/'cat_1.png', *more)['predictions'][0]['probability'] for more in ((), ('--tta', 3)))
    assert plain != seen

@pytest.mark.parametrize('option', ['--topk', '--plot'])
def test_what_is_about_classes_is_refused_before_predicting(trained, two_class, capsys, tmp_path, monkeypatch, option):
    from blocks.app import predicting
    class Number: target = RegressionBlock()
    monkeypatch.setattr(predicting, 'open_model', lambda *_: Number())                   # it cannot even predict
    code, out, err = run(capsys, 'predict', 'n.pkl', two_class/'cat', option, *([3] if option == '--topk' else [tmp_path/'c.png']))
    assert code == 2 and option in err and 'number' in err and not out

@pytest.mark.parametrize('argv,code,said', [
    (['predict', 'no.pkl', 'DATA', '--plot', 'x.nonsense'], 1, '.png'), (['predict', 'EXPORT', 'DATA', '--topk', '2', '--out', 'o.csv'], 2, '--json'), (['predict', 'EXPORT', 'DATA', '--topk', 'abc'], 2, "a whole number from 1, and not 'abc'"), (['predict', 'EXPORT', 'DATA', '--threshold', 'abc'], 2, 'below 1'),
    (['serve', 'm.onnx', '--port', '0'], 1, 'OnnxPredictor'), (['inspect', 'm.onnx'], 1, 'OnnxPredictor'), (['export', 'm.onnx', '--program', 'm.pt2'], 1, 'OnnxPredictor'), (['serve', 'EXPORT', '--port', '70000'], 1, '--port'),
    (['predict'], 2, 'EXPORT'), (['predict', 'EXPORT'], 2, 'give pictures'), (['predict', 'no.pkl', 'DATA'], 1, 'no file'), (['predict', 'FILE', 'DATA'], 1, 'FILE'), (['predict', 'EXPORT', 'EMPTY'], 1, 'no image'),
    (['predict', 'EXPORT', 'DATA', '--out', 'EMPTY'], 1, 'is a folder'), (['predict', 'EXPORT', 'DATA', '--out', 'FILE/x.csv'], 1, 'cannot be written'), (['predict', 'EXPORT', 'DATA', '--threshold', '2'], 2, 'threshold'),
    (['predict', 'EXPORT', 'DATA', '--threshold', '.5', '--reject', '.1'], 2, 'not allowed'), (['predict', 'EXPORT', 'a', 'b', '--csv', 't.csv'], 2, 'one folder'), (['predict', 'EXPORT', 'DATA', '--plot', 'x.nonsense'], 1, 'x.nonsense'), (['predict', 'EXPORT', 'DATA', '--columns', 'id'], 2, '--out'),
    (['evaluate'], 2, 'EXPORT'), (['evaluate', 'no.pkl', 'DATA'], 1, 'no file'), (['evaluate', 'EXPORT', 'nowhere'], 1, 'no folder'), (['evaluate', 'EXPORT', 'DATA', '--out', 'FILE'], 1, 'cannot be written'), (['evaluate', 'EXPORT', 'DATA/cat'], 1, 'no label'),
    (['export', 'EXPORT'], 2, 'required'), (['export', 'no.pkl', '--onnx', 'x.onnx'], 1, 'no file'), (['export', 'EXPORT', '--safetensors', 'x.pkl'], 1, '.safetensors'), (['export', 'EXPORT', '--safetensors', 'x.safetensors', '--int8'], 2, '--int8'),
    (['inspect', 'no.pkl'], 1, 'no.pkl'), (['inspect', 'FILE'], 1, 'FILE'), (['bench', 'EXPORT', 'nowhere'], 1, 'no folder'), (['bench', 'EXPORT', '--n', '0'], 2, '--n'), (['serve', 'no.pkl', '--port', '0'], 1, 'no.pkl'), (['serve', 'EXPORT', '--max-mb', '0'], 2, 'max-mb')])
def test_wrong_use_of_an_export(trained, two_class, tmp_path, capsys, monkeypatch, argv, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'FILE').write_text(''); (tmp_path/'EMPTY').mkdir(); (tmp_path/'DATA').symlink_to(two_class); (tmp_path/'EXPORT').symlink_to(trained/'export.pkl')
    done, out, err = run(capsys, *argv)
    assert done == code and said in err
    if code == 1: assert err.count('\n') == 1 and err.startswith('blocks: error: ')

def test_an_error_is_json_too(capsys, tmp_path):
    assert 'no file' in one_json(capsys, 'predict', tmp_path/'no.pkl', tmp_path/'a.png', code=1)['error']

# --- evaluate, export, inspect, bench, serve

def test_scores_are_those_of_the_answers(trained, two_class, tmp_path, capsys):
    scores = one_json(capsys, 'evaluate', trained/'export.pkl', two_class, '--out', tmp_path/'s')
    said = pd.read_csv(tmp_path/'s'/'predictions.csv')
    assert scores['accuracy'] == pytest.approx((said.actual == said.prediction).mean()) and scores['items'] == 48 and json.loads((tmp_path/'s'/'metrics.json').read_text()) == scores
    assert scores['confusion_matrix'] == pd.crosstab(said.actual, said.prediction).reindex(index=['cat', 'dog'], columns=['cat', 'dog'], fill_value=0).to_numpy().tolist()
    assert set(scores['classes']['cat']) == {'precision', 'recall', 'f1-score', 'support'} and type(scores['classes']['cat']['support']) is int and (tmp_path/'s'/'confusion_matrix.png').is_file()
    out = run(capsys, 'evaluate', trained/'export.pkl', two_class)[1]
    assert f"accuracy {scores['accuracy']:.4f}" in out and 'precision' in out

def test_a_label_that_the_model_does_not_know_is_named(trained, two_class, tmp_path, capsys):
    rows = ['file,kind', 'cat/cat_1.png,cat', 'dog/dog_1.png,wolf', 'dog/dog_2.png,wolf']
    (tmp_path/'t.csv').write_text('\n'.join(rows))
    code, _, err = run(capsys, 'evaluate', trained/'export.pkl', two_class, '--csv', tmp_path/'t.csv')
    assert code == 1 and "'wolf'" in err and 'dog/dog_1.png' in err and "'cat', 'dog'" in err and '2 times' in err
    (tmp_path/'t.csv').write_text('\n'.join([*rows[:2], 'none.png,dog']))
    scores = one_json(capsys, 'evaluate', trained/'export.pkl', two_class, '--csv', tmp_path/'t.csv', code=3)
    assert scores['items'] == 1 and scores['failed'] == 1

def test_safetensors_give_the_same_answers(trained, two_class, tmp_path, capsys):
    made = one_json(capsys, 'export', trained/'export.pkl', '--safetensors', tmp_path/'m.safetensors', '--check', two_class/'cat')
    assert made['parity']['pictures'] == made['parity']['same_answers'] == 24 and made['parity']['largest_difference'] < 1e-6 and made['bytes'] == (tmp_path/'m.safetensors').stat().st_size
    assert load_learner(tmp_path/'m.safetensors').vocab == ['cat', 'dog']

@pytest.mark.slow
def test_onnx(trained, two_class, tmp_path, capsys):
    made = one_json(capsys, 'export', trained/'export.pkl', '--onnx', tmp_path/'m.onnx', '--check', two_class/'cat')
    assert made['parity']['largest_difference'] < 1e-3
    a, b = (one_json(capsys, 'predict', file, two_class/'dog')['predictions'] for file in (trained/'export.pkl', tmp_path/'m.onnx'))
    assert [o['label'] for o in a] == [o['label'] for o in b] and np.allclose([o['probability'] for o in a], [o['probability'] for o in b], atol=1e-3)
    times = one_json(capsys, 'bench', trained/'export.pkl', '--n', 4, '--onnx', tmp_path/'m.onnx', '--device', 'cpu')
    assert times['onnx']['predict']['p99_ms'] >= times['onnx']['predict']['median_ms'] > 0
    assert run(capsys, 'predict', tmp_path/'m.onnx', two_class/'dog', '--tta', 2)[0] == 1
    assert one_json(capsys, 'evaluate', tmp_path/'m.onnx', two_class)['items'] == 48

def test_inspect_builds_nothing(trained, capsys, monkeypatch):
    from torch import nn
    monkeypatch.setattr(nn.Module, '__init__', lambda *_, **__: pytest.fail('something was built'))
    facts = one_json(capsys, 'inspect', trained/'export.pkl')
    assert facts['classes'] == ['cat', 'dog'] and facts['architecture'] == 'shufflenet_v2_x0_5'
    code, out, _ = run(capsys, 'inspect', trained/'export.pkl')
    assert code == 0 and 'cat, dog' in out
    assert run(capsys, 'inspect', trained/'export.pkl', '--card')[1].startswith('#')

def test_times_of_real_and_of_rendered_pictures(trained, two_class, capsys):
    for argv, said in ((('--n', 5), 'rendered'), ((two_class/'cat', '--n', 30), '24 pictures of')):
        times = one_json(capsys, 'bench', trained/'export.pkl', '--device', 'cpu', *argv)
        assert said in times['pictures'] and times['export']['batch']['pictures_per_second'] > 0
        assert all(0 < times['export'][k]['median_ms'] <= times['export'][k]['p99_ms'] for k in ('predict', 'read', 'model'))
    out = run(capsys, 'bench', trained/'export.pkl', '--n', 2, '--device', 'cpu')[1]
    assert 'median' in out and '99 %' in out and 'pictures/s' in out

def test_serve_is_called_with_the_limits_that_were_given(monkeypatch, capsys):
    from blocks.app import serve
    called = {}
    monkeypatch.setattr(serve, 'serve', lambda path, **kw: called.update(path=path, **kw))
    assert run(capsys, 'serve', 'e.pkl', '--port', 0, '--max-mb', 3, '--max-files', 2, '--wait-ms', 0, '--detector', 'cascade')[0] == 0
    limits = called.pop('limits')
    assert called == dict(path='e.pkl', host='127.0.0.1', port=0, detector='cascade', device=None) and (limits.max_bytes, limits.max_files, limits.queue, limits.wait_ms) == (3*2**20, 2, 64, 0)

# --- tables

@pytest.mark.parametrize('text,delim,want', [('id\na b\nc\n', None, (['a b', 'c'], None)), ('f,l\na,NA\nb,007\n', None, (['a', 'b'], ['NA', '007'])), ('f;l\na;x, y\nb;\n', ',', (['a', 'b'], [['x', 'y'], []])),
                                             ('\ufefff,l\na,x\nb,\n', None, (['a', 'b'], ['x', None])), ('f l\na x\n', None, (['a'], ['x']))])
def test_cells_stay_as_they_are(tmp_path, text, delim, want):
    (tmp_path/'t.csv').write_text(text, encoding='utf-8')
    t = read_table(tmp_path, 't.csv', label_col=None if want[1] is None else '1', label_delim=delim)
    assert (t.names, t.labels) == want and [o.parent for o in t.items] == [tmp_path]*len(t)

# --- processes

def test_the_installed_command_in_a_pipe(trained, two_class, tmp_path):
    code = 'import sys; from blocks.app.cli import main; sys.exit(main())'
    cmd = [sys.executable, '-c', code, 'predict', trained/'export.pkl', two_class/'cat', '--json', '--device', 'cpu']
    done = subprocess.run(cmd, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and len(json.loads(done.stdout)['predictions']) == 24 and not done.stderr

def test_help_is_quick_and_imports_no_torch():
    code = '''import sys
from blocks.app.cli import main
for argv in (["--help"], *[[c, "--help"] for c in "train predict evaluate audit serve export inspect bench demo".split()]):
    try: main(argv)
    except SystemExit as e: assert e.code == 0
print([m for m in ("torch", "torchvision", "pandas", "matplotlib", "sklearn", "fastapi") if m in sys.modules])'''
    start = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == '[]' and done.stdout.count('exit code:') == 10 and time.perf_counter() - start < 10
