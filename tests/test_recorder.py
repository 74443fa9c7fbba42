"Records and progress: the same numbers whatever happens, and a screen that stays clean."
import io
import re

import pandas as pd
import pytest
import torch
from torch import nn

from blocks import (Callback, CancelEpochException, EarlyStoppingCallback, Learner, accuracy)
from blocks.train import recorder as module
from blocks.train.recorder import NotebookScreen, PlainScreen, TerminalScreen, make_screen


class Terminal(io.StringIO):
    "A stream that says that it is a terminal"
    def isatty(self): return True
    def shown(self):
        "The lines that a person sees: carriage return and clear-line obeyed"
        lines = ['']
        for part in re.split(r'(\r\x1b\[K|\n)', self.getvalue()):
            if part == '\n': lines.append('')
            elif part == '\r\x1b[K': lines[-1] = ''
            else: lines[-1] += part
        return lines

@pytest.fixture
def learn(dls, tiny, tmp_path): return Learner(dls, tiny(), metrics=accuracy, path=tmp_path)

class Stop(Callback):
    def __init__(self, epoch, step, e=KeyboardInterrupt): self.at, self.e = (epoch, step), e
    def before_batch(self):
        if self.learn.training and (self.learn.epoch, self.learn.iter) == self.at: raise self.e

# --- records
def test_the_table_as_data(learn):
    with learn.no_bar(): learn.fit(2)
    df = learn.recorder.to_df()
    assert list(df.columns) == list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    assert df.epoch.tolist() == [0, 1] and df.valid_loss.tolist() == [v[1] for v in learn.recorder.values] and (df.time > 0).all() and isinstance(df, pd.DataFrame)

def test_the_training_loss_is_the_mean_over_the_epochs_steps(learn):
    with learn.no_bar(): learn.fit(2)
    losses = learn.recorder.losses
    assert len(losses) == len(learn.recorder.lrs) == len(learn.recorder.moms) == 8
    for k in (0, 1): assert learn.recorder.values[k][0] == pytest.approx(sum(losses[4*k:4*k+4])/4)

def test_unequal_batches_weigh_by_their_items(two_class, tiny):
    from blocks import DataBlock, RandomSplitter, Resize, get_image_files, parent_label
    dls = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(16)).dataloaders(two_class, bs=7, val_bs=7, num_workers=0, device='cpu', drop_last=False)
    learn = Learner(dls, tiny(), metrics=accuracy)
    with learn.no_bar(): learn.fit(1)
    losses = torch.tensor(learn.recorder.losses)
    assert learn.recorder.values[0][0] == pytest.approx(float((losses*torch.tensor([7., 7, 7, 7, 7, 1])).sum()/36))

def test_two_metrics_of_one_name_have_two_columns(dls, tiny):
    learn = Learner(dls, tiny(), metrics=[accuracy, accuracy])
    with learn.no_bar(): learn.fit(1)
    assert list(learn.recorder.to_df().columns)[3:5] == ['accuracy', 'accuracy_2']

def test_a_new_fit_records_anew_and_validate_leaves_the_records(learn):
    with learn.no_bar():
        learn.fit(2)
        values, losses = list(learn.recorder.values), list(learn.recorder.losses)
        learn.validate(); learn.validate(ds_idx=0); learn.get_preds()
        assert list(learn.recorder.values) == values and learn.recorder.losses == losses
        learn.fit(1)
    assert len(learn.recorder.values) == 1 and len(learn.recorder.losses) == 4

def test_an_interrupt_keeps_what_was_recorded(learn):
    with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Stop(2, 3))
    assert len(learn.recorder.values) == 2 and len(learn.recorder.losses) == 11 and len(learn.recorder.to_df()) == 2

def test_validation_losses_are_drawn_at_the_steps_at_which_they_were_measured(learn):
    with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Stop(2, 3))
    ax = learn.recorder.plot_loss(skip_start=0)
    assert list(ax.lines[0].get_xdata()) == list(range(11)) and list(ax.lines[1].get_xdata()) == [3, 7]

def test_plots_without_anything_to_draw(learn):
    learn.recorder.plot_loss(); learn.recorder.plot_sched()
    learn.opt_func = torch.optim.Adagrad                                 # has no momentum
    with learn.no_bar(): learn.fit(1)
    learn.recorder.plot_loss(); learn.recorder.plot_sched()

# --- what is printed
def test_not_a_terminal_gets_plain_lines(learn, capsys):
    learn.fit(2)
    out, err = capsys.readouterr()
    head, *rows = out.splitlines()
    assert head.split() == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'] and [r.split()[0] for r in rows] == ['0', '1'] and not err
    assert not set('\r\x1b▕█') & set(out) and [r.index(r.split()[1]) for r in rows] == [head.index('train_loss')]*2

def test_nothing_is_printed_without_a_bar_nor_by_predicting(learn, capsys, two_class):
    files = sorted(two_class.rglob('*.png'))[:3]
    learn.predict(files[0]); learn.predict_batch(files); learn.get_preds(); learn.validate()
    with learn.no_bar(): learn.fit(1)
    assert capsys.readouterr() == ('', '')

def test_a_terminal_ends_with_the_table_alone(learn, monkeypatch):
    t = Terminal()
    monkeypatch.setattr('sys.stdout', t)
    monkeypatch.setattr(module.ProgressCallback, 'refresh', 0.)
    learn.fit(2); learn.validate(); learn.get_preds()
    assert 'epoch 1/2 train' in t.getvalue() and 'epoch 2/2 valid' in t.getvalue() and 'predict' in t.getvalue()
    lines = t.shown()
    assert [line.split()[0] for line in lines if line] == ['epoch', '0', '1'] and lines[-1] == ''

def test_a_terminal_is_clean_after_an_interrupt(learn, monkeypatch):
    t = Terminal()
    monkeypatch.setattr('sys.stdout', t)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Stop(1, 2))
    assert t.shown()[-1] == '' and [line.split()[0] for line in t.shown() if line] == ['epoch', '0']

@pytest.mark.parametrize('terminal', [False, True])
def test_the_last_epoch_has_a_row_also_when_stopped_early(learn, monkeypatch, terminal):
    t = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr('sys.stdout', t)
    learn.fit(5, cbs=EarlyStoppingCallback(patience=2, comp=lambda new, best: False))       # nothing is ever better
    lines = t.shown() if terminal else t.getvalue().splitlines()
    assert [line.split()[0] for line in lines if line] == ['epoch', '0', '1', 'No']

class Look(Callback):
    def __init__(self, do): self.do = do
    def after_epoch(self): self.do(self.learn)

@pytest.mark.parametrize('do', [lambda l: l.get_preds(), lambda l: l.validate(ds_idx=0)])
def test_the_table_goes_on_when_a_callback_predicts_or_validates(learn, capsys, do):
    learn.fit_one_cycle(2, cbs=Look(do))
    assert [line.split()[:1] for line in capsys.readouterr().out.splitlines()] == [['epoch'], ['0'], ['1']]

def test_a_cancelled_epoch_has_blanks(learn, capsys):
    learn.fit(1, cbs=Stop(0, 0, CancelEpochException))
    assert capsys.readouterr().out.splitlines()[1].split() == ['0', '00:00']

# --- notebooks
class Shown:
    "Stands for `IPython.display.display`: keeps what each display shows now"
    def __init__(self): self.outputs = []
    def __call__(self, html, display_id=None):
        self.outputs.append(html.data)
        n, outputs = len(self.outputs) - 1, self.outputs
        class Handle:
            def update(self, html): outputs[n] = html.data
        return Handle()

@pytest.fixture
def notebook(monkeypatch):
    import IPython.display
    shown = Shown()
    monkeypatch.setattr(IPython.display, 'display', shown)
    monkeypatch.setattr(module, '_in_notebook', lambda: True)
    monkeypatch.setattr(module.ProgressCallback, 'refresh', 0.)
    return shown

def test_a_notebook_has_one_table_that_ends_without_a_bar(learn, notebook, capsys):
    learn.fit(2)
    html, = notebook.outputs
    assert html.count('<table>') == 1 and html.count('<tr>') == 3 and '<progress' not in html and capsys.readouterr().out == ''

def test_a_notebook_is_clean_after_an_interrupt_and_after_validation(learn, notebook):
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Stop(1, 2))
    learn.validate(); learn.get_preds()
    assert not any('<progress' in o for o in notebook.outputs) and sum('<table' in o for o in notebook.outputs) == 1

def test_the_bar_is_under_the_table_while_an_epoch_runs(learn, notebook):
    seen = []
    learn.fit(1, cbs=type('See', (Callback,), dict(order=90, after_batch=lambda self: seen.append(notebook.outputs[0])))())
    assert len(seen) == 6 and all(o.count('<progress') == 1 for o in seen) and 'max="4"' in seen[0] and 'max="2"' in seen[-1]

def test_screens_fit_where_the_output_goes(notebook, monkeypatch):
    assert isinstance(make_screen(), NotebookScreen) and type(make_screen(io.StringIO())) is PlainScreen and type(make_screen(Terminal())) is TerminalScreen

def test_a_loader_without_batches_in_validation_gives_blanks(dls, tiny, capsys):
    dls.valid = dls.valid.new(samples=dls.valid.samples.new(fields=([], [])))
    learn = Learner(dls, nn.Sequential(tiny()), metrics=accuracy)
    learn.fit(1)
    assert list(learn.recorder.values[0][1:]) == [None, None] and len(capsys.readouterr().out.splitlines()) == 2
