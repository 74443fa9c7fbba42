"Records and progress: the same numbers whatever happens, and a screen that stays clean."
import io
import re

import pandas as pd
import pytest
import torch
from torch import nn

from blocks import (Callback, CancelEpochException, CancelValidException, EarlyStoppingCallback, Learner, TrainingError, accuracy, error_rate)
from blocks.train import recorder as module
from blocks.train.checkpoint import CheckpointCallback
from blocks.train.recorder import NotebookScreen, PlainScreen, SilentScreen, TerminalScreen, make_screen


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

@pytest.fixture
def two_groups(dls, tiny):
    "A learner whose body and head are two layer groups"
    return Learner(dls, tiny(), metrics=[accuracy, error_rate], splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])

def test_the_rates_of_all_layer_groups_are_recorded_and_drawn(two_groups):
    with two_groups.no_bar(): two_groups.fit_one_cycle(2, slice(1e-4, 1e-2))
    r = two_groups.recorder
    assert all(len(o) == 2 and o[0] == pytest.approx(o[1]/100) and o[1] == lr for o, lr in zip(r.rates, r.lrs)) and len(r.rates) == len(r.lrs) == 8
    ax = r.plot_lr()
    assert [list(line.get_ydata()) for line in ax.lines] == [[o[0] for o in r.rates], r.lrs] and ax.get_yscale() == 'log'
    with two_groups.no_bar(): two_groups.fit(1, 1e-2)
    assert len(r.plot_lr().lines) == 1                                   # they do not differ

def test_plots_give_their_axes_and_draw_on_axes_of_the_caller(learn):
    import matplotlib.pyplot as plt
    with learn.no_bar(): learn.fit(1)
    _, ax = plt.subplots()
    assert learn.recorder.plot_loss(ax=ax) is ax and learn.recorder.plot_lr(ax=ax) is ax and len(learn.recorder.plot_sched()) == 2 and len(learn.recorder.plot_metrics()) == 1
    plt.close('all')

def test_the_best_epoch_is_the_lowest_of_errors_and_the_highest_of_the_rest(two_groups):
    r = two_groups.recorder
    r.values = module.L([[.9, .5, .6, .4], [.8, .3, .9, .1], [.7, None, .9, .1], [.6, float('nan'), .2, .8]])
    marked = {ax.get_title().split(':')[0]: ax.lines[1].get_xydata().tolist() for ax in r.plot_metrics(['train_loss', 'valid_loss', 'accuracy', 'error_rate'])}
    assert marked == dict(train_loss=[[3, .6]], valid_loss=[[1, .3]], accuracy=[[1, .9]], error_rate=[[1, .1]])
    assert [ax.get_title().split(':')[0] for ax in r.plot_metrics()] == ['accuracy', 'error_rate'] and len(r.plot_metrics('valid_loss')) == 1

def test_plot_metrics_without_metrics_or_values_and_with_a_wrong_name(dls, tiny):
    learn = Learner(dls, tiny())
    assert [ax.get_title() for ax in learn.recorder.plot_metrics()] == ['valid_loss']                    # nothing has been recorded
    with pytest.raises(TrainingError, match="no column 'accuracy'.*train_loss, valid_loss"): learn.recorder.plot_metrics('accuracy')

def test_the_smoothed_loss_is_a_running_mean_beside_the_losses(learn):
    learn.recorder.losses = [4., 2., 1.]
    pale, smooth = learn.recorder.plot_loss(skip_start=0, smooth=.5).lines
    assert list(pale.get_ydata()) == [4, 2, 1] and list(smooth.get_ydata()) == pytest.approx([4, (2*2 + 4)/3, (4*1 + 2*2 + 4)/7])
    assert list(learn.recorder.plot_loss(skip_start=0).lines[0].get_ydata()) == [4, 2, 1]
    with pytest.raises(TrainingError, match='below 1'): learn.recorder.plot_loss(smooth=1.)

def test_log_axes_and_lines_at_the_ends_of_epochs(learn):
    with learn.no_bar(): learn.fit(2)
    ax = learn.recorder.plot_loss(skip_start=0, with_valid=False, log=True, show_epochs=True)
    assert ax.get_xscale() == ax.get_yscale() == 'log' and [line.get_xdata()[0] for line in ax.lines[1:]] == [3, 7]

def test_an_epoch_without_validation_leaves_a_gap_in_the_plot_and_in_the_data(learn):
    class Skip(Callback):
        def before_validate(self):
            if self.learn.epoch == 1: raise CancelValidException()
    with learn.no_bar(): learn.fit(3, cbs=Skip())
    df = learn.recorder.to_df()
    assert df.valid_loss.isna().tolist() == df.accuracy.isna().tolist() == [False, True, False] and df.dtypes.astype(str).tolist() == ['int64'] + ['float64']*4
    assert list(learn.recorder.plot_loss(skip_start=0).lines[1].get_xdata()) == [3, 11]

def test_data_without_any_value_are_still_numbers(dls, tiny):
    dls.valid = dls.valid.new(samples=dls.valid.samples.new(fields=([], [])))
    learn = Learner(dls, tiny(), metrics=accuracy)
    assert len(learn.recorder.to_df()) == 0
    with learn.no_bar(): learn.fit(1, cbs=Stop(0, 0, CancelEpochException))
    assert learn.recorder.to_df().iloc[:, 1:-1].isna().all(axis=None) and learn.recorder.to_df().dtypes.astype(str).tolist() == ['int64'] + ['float64']*4

def test_a_recorder_shows_as_its_table(learn):
    with learn.no_bar(): learn.fit(2)
    text = learn.recorder._repr_html_()
    assert text.count('<tr>') == 3 and all(f'>{c}<' in text for row in [learn.recorder.metric_names, *learn.recorder.rows()] for c in row)

# --- interrupted and resumed
def records(r): return [list(map(list, r.values)), r.losses, r.lrs, r.moms, r.rates, r.steps]

@pytest.mark.parametrize('every, at', [('epoch', (1, 1)), (3, (1, 3)), (3, (2, 2)), (4, (2, 3)), (2, (0, 3))])
def test_a_resumed_fit_has_the_records_of_one_that_was_not_interrupted(two_class, tiny, tmp_path, every, at):
    from blocks import DataBlock, RandomSplitter, Resize, get_image_files, parent_label
    def make():
        block = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(16))
        dls = block.dataloaders(two_class, bs=7, num_workers=0, seed=1, device='cpu', drop_last=False)       # the last batch has another size
        return Learner(dls, tiny(), metrics=accuracy, path=tmp_path)
    whole, broken, resumed = make(), make(), make()
    with whole.no_bar(): whole.fit_one_cycle(3)
    with broken.no_bar(), pytest.raises(KeyboardInterrupt): broken.fit_one_cycle(3, cbs=[CheckpointCallback(every=every), Stop(*at)])
    with resumed.no_bar(): resumed.resume(cbs=CheckpointCallback(every=every))
    assert records(resumed.recorder) == records(whole.recorder) and len(resumed.recorder.times) == 3

def test_the_state_is_plain_and_survives_a_file_that_is_read_safely(two_groups, tmp_path):
    with two_groups.no_bar(), pytest.raises(KeyboardInterrupt): two_groups.fit(2, cbs=Stop(1, 2))
    r = two_groups.recorder
    torch.save(r.state_dict(), tmp_path/'state'); before = records(r)
    r.before_fit()
    assert not r.losses and not r.values
    r.load_state_dict(torch.load(tmp_path/'state', weights_only=True))
    assert records(r) == before and r._items == [8, 8]                                            # of the epoch that was broken off

def test_times_add_up_over_an_interruption(learn, monkeypatch):
    now = [100.]
    monkeypatch.setattr(module.time, 'perf_counter', lambda: now[0])
    r = learn.recorder
    r.before_fit(); now[0] += 5; r.after_epoch(); now[0] += 2
    state = r.state_dict()
    now[0] += 1000                                                                                # nobody trains meanwhile
    r.before_fit(); r.load_state_dict(state); now[0] += 1; r.after_epoch()
    assert r.times == [5, 3]

def test_the_state_does_not_change_with_what_comes_after(learn):
    with learn.no_bar():
        learn.fit(1)
        state = learn.recorder.state_dict(); kept = [len(state[k]) for k in ('losses', 'values', 'times')]
        learn.recorder.load_state_dict(state); learn.recorder.after_epoch(); learn.recorder.losses.append(0.)
    assert [len(state[k]) for k in ('losses', 'values', 'times')] == kept

def test_a_table_of_other_columns_is_refused(learn, dls, tiny):
    other = Learner(dls, tiny(), metrics=[error_rate])
    with pytest.raises(TrainingError, match='accuracy.*error_rate'): other.recorder.load_state_dict(learn.recorder.state_dict())

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

def test_what_is_said_stands_between_the_rows_of_text():
    out = io.StringIO(); play(make_screen(out))
    assert out.getvalue().splitlines() == ['a         b', '0         1', 'lower rate', '1         2', 'stopped']

def test_what_is_said_on_a_terminal_takes_the_bar_away_first():
    t = Terminal(); play(make_screen(t))
    assert t.shown() == ['a         b', '0         1', 'lower rate', '1         2', 'stopped', ''] and '2/9' in t.getvalue()

def play(screen):
    screen.begin(['a', 'b']); screen.row(['0', '1']); screen.bar(2, 9, 'train'); screen.say('lower rate'); screen.bar(3, 9, 'train'); screen.row(['1', '2']); screen.say('stopped'); screen.end()

def test_other_processes_are_silent(learn, capsys, monkeypatch):
    monkeypatch.setattr(type(learn.world), 'first', False, raising=False)
    screens = []
    learn.fit(1, cbs=type('Say', (Callback,), dict(order=56, after_epoch=lambda self: screens.append(self.learn.progress.screen) or screens[0].say('hello')))())
    learn.validate()
    assert capsys.readouterr() == ('', '') and type(screens[0]) is SilentScreen

def test_every_screen_has_every_verb():
    verbs = [k for k in vars(SilentScreen) if not k.startswith('_')]
    assert sorted(verbs) == ['bar', 'begin', 'end', 'row', 'say'] and all(issubclass(c, SilentScreen) for c in (PlainScreen, TerminalScreen, NotebookScreen))
    play(SilentScreen())

def test_a_fit_says_its_lines_in_its_own_table(learn, notebook):
    class Say(Callback):
        order = 56
        def after_epoch(self): self.learn.say(f'<said> {self.learn.epoch}')
    learn.fit(2, cbs=Say()); learn.fit(1, cbs=Say())
    first, second = notebook.outputs
    assert [o.count('&lt;said&gt;') for o in (first, second)] == [2, 1] and '<said>' not in first
    assert first.index('said&gt; 0') < first.index('>1<') < first.index('said&gt; 1') and '<progress' not in first

def test_what_is_said_before_a_table_is_not_put_into_the_one_before(learn, notebook, capsys):
    class Say(Callback):
        def before_fit(self): self.learn.say('early')                    # the screen of this fit is not there yet
    learn.fit(1); learn.fit(1, cbs=Say())
    assert not any('early' in o for o in notebook.outputs) and capsys.readouterr().out == 'early\n'

def test_the_bar_goes_on_below_what_was_said(notebook):
    s = NotebookScreen(); s.begin(['a']); s.bar(1, 9, 'train'); s.say('one\ntwo')
    html, = notebook.outputs
    assert 'one<br>two' in html and html.index('one') < html.index('<progress')

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
