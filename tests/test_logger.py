"Loggers: nothing is lost or doubled, whatever happens to the fit, and only the first process writes."
import os
import sys
import types

import pandas as pd
import pytest
import torch

from blocks import Callback, CancelEpochException, Learner, MissingExtraError, SaveModelCallback, TrainingError, accuracy
from blocks.train import logger as module
from blocks.train.checkpoint import CheckpointCallback
from blocks.train.logger import CSVLogger, ShowGraphCallback, TensorBoardCallback, WandbCallback


@pytest.fixture
def make(two_class, tiny, tmp_path):
    "A function that makes the same learner again"
    from blocks import DataBlock, RandomSplitter, Resize, get_image_files, parent_label
    def new(metrics=accuracy):
        dls = DataBlock(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(16)).dataloaders(two_class, bs=8, num_workers=0, seed=1, device='cpu')
        learn = Learner(dls, tiny(), metrics=metrics, path=tmp_path)
        learn.remove_cbs(learn.progress)
        return learn
    return new

class Stop(Callback):
    def __init__(self, epoch, step, e=KeyboardInterrupt): self.at, self.e = (epoch, step), e
    def before_batch(self):
        if self.learn.training and (self.learn.epoch, self.learn.iter) == self.at: raise self.e

def interrupted(make, cb, every, at, resumed_cb, epochs=3):
    "A fit that is broken off and resumed in a new learner, which is given back"
    first, second = make(), make()
    with pytest.raises(KeyboardInterrupt): first.fit_one_cycle(epochs, cbs=[cb, CheckpointCallback(every=every), Stop(*at)])
    second.resume(cbs=[resumed_cb, CheckpointCallback(every=every)])
    return second

class Silent(Callback):
    "Makes this process one that is not the first"
    order = -100
    def __init__(self, monkeypatch): self.monkeypatch = monkeypatch
    def check(self): self.monkeypatch.setattr(type(self.learn.world), 'first', False, raising=False)

# --- CSV
def test_the_file_is_the_table(make):
    learn, log = make(), CSVLogger()
    learn.fit(2, cbs=log)
    assert log.read_log().equals(learn.recorder.to_df()) and log.file.name == 'history.csv' and len(log.file.read_text().splitlines()) == 3

def test_each_row_is_there_when_its_epoch_is_over(make):
    seen, log = [], CSVLogger('deep/er.csv')
    learn = make()
    learn.fit(3, cbs=[log, type('Look', (Callback,), dict(order=57, after_epoch=lambda self: seen.append(len(log.read_log()))))()])
    assert seen == [1, 2, 3]

def test_a_new_fit_begins_anew_or_goes_on_below(make):
    learn, log, more = make(), CSVLogger(), CSVLogger(append=True)
    learn.fit(2, cbs=log); learn.fit(1, cbs=log)
    assert log.read_log().epoch.tolist() == [0]
    learn.fit(2, cbs=more); learn.fit(1, cbs=CSVLogger(append=True))
    assert more.read_log().epoch.tolist() == [0, 0, 1, 0] and more.file.read_text().count('train_loss') == 1

def test_a_file_cut_short_is_gone_on_below(make):
    learn, log = make(), CSVLogger(append=True)
    log.learn = learn
    log.file.write_text('epoch,train_loss,valid_loss,accuracy,time\n0,1.0,2.0')
    learn.fit(1, cbs=log)
    assert log.read_log().epoch.tolist() == [0, 0]

def test_other_columns_are_refused_before_anything_is_touched(make):
    make().fit(1, cbs=CSVLogger())
    learn, log = make(metrics=None), CSVLogger(append=True)
    weights = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(TrainingError, match='accuracy.*give another fname'): learn.fit(1, cbs=log)
    log.learn = learn
    assert all(map(torch.equal, weights, learn.model.parameters())) and 'accuracy' in log.file.read_text()
    learn.fit(1, cbs=CSVLogger())                                        # without append, a new file
    assert log.read_log().columns.tolist() == ['epoch', 'train_loss', 'valid_loss', 'time']

def test_blanks_are_read_as_nan(make):
    learn, log = make(), CSVLogger()
    learn.fit(2, cbs=[log, Stop(0, 0, CancelEpochException)])
    assert log.read_log().train_loss.isna().tolist() == [True, False] and log.read_log().equals(learn.recorder.to_df())

def test_a_fit_that_fails_before_its_first_batch_leaves_the_file_of_the_one_before(make):
    learn, log = make(), CSVLogger()
    learn.fit(2, cbs=log)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[log, Stop(0, 0)])
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[CSVLogger(), type('Fail', (Callback,), dict(order=1, before_fit=lambda self: (_ for _ in ()).throw(KeyboardInterrupt())))()])
    assert len(log.read_log()) == 2

@pytest.mark.parametrize('append', [False, True])
@pytest.mark.parametrize('every, at', [('epoch', (1, 1)), (3, (2, 0)), (8, (2, 2))])
def test_after_a_resume_no_row_is_doubled_or_lost(make, append, every, at):
    if append: make().fit(1, cbs=CSVLogger())
    log = CSVLogger(append=append)
    learn = interrupted(make, CSVLogger(append=append), every, at, log)
    assert log.read_log().epoch.tolist() == [0]*append + [0, 1, 2]
    assert log.read_log()[int(append):].reset_index(drop=True).equals(learn.recorder.to_df())

def test_the_rows_before_a_resume_are_there_at_its_first_step(make):
    "also where the file is gone, so a second crash loses nothing either"
    log = CSVLogger()
    with pytest.raises(KeyboardInterrupt): make().fit(3, cbs=[log, CheckpointCallback(), Stop(2, 0)])
    log.file.unlink()
    seen, again = [], CSVLogger()
    make().resume(cbs=[again, CheckpointCallback(), type('Look', (Callback,), dict(order=57, after_batch=lambda self: seen.append(again.read_log().epoch.tolist())))()])
    assert seen[0] == [0, 1] and again.read_log().epoch.tolist() == [0, 1, 2]

# --- a plot that grows
def test_the_figure_stays_and_no_figure_leaks(make):
    import matplotlib.pyplot as plt
    before, graph, learn = plt.get_fignums(), ShowGraphCallback(), make()
    learn.fit(2, cbs=graph)
    first = graph.fig
    losses, smooth, valid = graph.ax.lines
    assert list(losses.get_ydata()) == learn.recorder.losses and list(valid.get_ydata()) == learn.recorder.column('valid_loss') and len(smooth.get_ydata()) == 8
    learn.fit(1, cbs=graph)
    assert graph.fig is not first and plt.get_fignums() == before and graph.ax.figure is graph.fig

def test_nothing_is_shown_but_in_a_notebook_where_one_picture_grows(make, monkeypatch, capsys):
    import IPython.display
    shown = []
    class Handle:
        def update(self, o): shown[-1].append(o)
    def display(o, display_id): shown.append([o]); return Handle()
    monkeypatch.setattr(IPython.display, 'display', display)
    make().fit(2, cbs=ShowGraphCallback())
    assert not shown and capsys.readouterr().out == ''
    monkeypatch.setattr(module, '_in_notebook', lambda: True)
    make().fit(3, cbs=ShowGraphCallback())
    assert [len(o) for o in shown] == [3] and len({o.data for o in shown[0]}) == 3 and shown[0][0].data.startswith(b'\x89PNG')
    make().fit(1, cbs=[ShowGraphCallback(), Silent(monkeypatch)])
    assert len(shown) == 1

# --- TensorBoard
def scalars(folder):
    "{name: {step: value}} as TensorBoard's own reader finds them; a step that is there twice fails"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder), size_guidance=dict(scalars=0)).Reload()
    found = {tag: [(o.step, o.value) for o in events.Scalars(tag)] for tag in events.Tags()['scalars']}
    assert all(len(dict(v)) == len(v) for v in found.values())
    return {k: dict(v) for k, v in found.items()}

def test_tensorboard_reads_back_what_the_recorder_has(make, tmp_path):
    learn = make()
    learn.fit_one_cycle(2, cbs=TensorBoardCallback(tmp_path/'board'))
    found, r = scalars(tmp_path/'board'), learn.recorder
    assert set(found) == {'train_loss', 'lr_0', 'valid_loss', 'accuracy'}
    assert list(found['train_loss'].values()) == r.losses and list(found['train_loss']) == list(range(1, 9)) and list(found['lr_0'].values()) == pytest.approx(r.lrs)
    assert list(found['valid_loss']) == r.steps and list(found['accuracy'].values()) == pytest.approx(r.column('accuracy'))

def test_steps_go_on_counting_over_fits(make, tmp_path):
    learn, board = make(), TensorBoardCallback(tmp_path/'board')
    learn.fit(1, cbs=board); learn.fit(1, cbs=board)
    assert list(scalars(tmp_path/'board')['train_loss']) == list(range(1, 9)) and list(scalars(tmp_path/'board')['accuracy']) == [4, 8] and board.writer is None

@pytest.mark.parametrize('every, at', [('epoch', (1, 2)), (3, (1, 3)), (4, (2, 0))])
def test_after_a_resume_the_board_is_that_of_one_fit(make, tmp_path, every, at):
    whole = make()
    whole.fit_one_cycle(3, cbs=TensorBoardCallback(tmp_path/'whole'))
    interrupted(make, TensorBoardCallback(), every, at, TensorBoardCallback())
    folder, = (tmp_path/'runs').iterdir()                                # the second one has taken up the folder of the first
    assert scalars(folder) == scalars(tmp_path/'whole')

def test_predictions_are_a_picture_of_each_epoch_and_change_nothing(make, tmp_path):
    import matplotlib.pyplot as plt
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    before, plain, learn = plt.get_fignums(), make(), make()
    plain.fit(2); learn.fit(2, cbs=TensorBoardCallback(tmp_path/'board', log_preds=True, n_preds=2))
    pictures = EventAccumulator(str(tmp_path/'board')).Reload().Images('predictions')
    assert [o.step for o in pictures] == [4, 8] and pictures[0].encoded_image_string.startswith(b'\x89PNG') and pictures[0].width > pictures[0].height
    assert plt.get_fignums() == before and all(map(torch.equal, plain.model.state_dict().values(), learn.model.state_dict().values()))

def test_what_was_logged_is_there_after_a_crash(make, tmp_path):
    with pytest.raises(KeyboardInterrupt): make().fit(2, cbs=[TensorBoardCallback(tmp_path/'board'), Stop(1, 3)])
    assert len(scalars(tmp_path/'board')['train_loss']) == 7

def test_what_a_checkpoint_counts_as_logged_is_on_the_disk(make, tmp_path):
    seen = []
    class Look(Callback):
        order = 101                                                      # right after the checkpoint
        def after_batch(self):
            if self.learn.training: seen.append(len(scalars(tmp_path/'board')['train_loss']))
    make().fit(1, cbs=[TensorBoardCallback(tmp_path/'board'), CheckpointCallback(every=1), Look()])
    assert seen == [1, 2, 3, 4]

def test_on_an_accelerator_losses_are_read_some_steps_at_once(make, monkeypatch):
    logged, learn = [], make()
    class Log(module._StepLogger):
        every = 3
        def _log(self, numbers, step, at): logged.append((step, self.step))
        def after_batch(self):
            class Far:                                                  # a loss that says that it is on another device
                def __init__(self, t): self.t, self.device = t, torch.device('meta')
                def detach(self): return self.t.detach()
            l = self.learn; near, l.loss = l.loss, Far(l.loss)
            try: super().after_batch()
            finally: l.loss = near
    learn.fit(1, cbs=Log())
    assert logged == [(1, 3), (2, 3), (3, 3), (4, 4), (4, 4)]           # three together, the rest after training, then the epoch

@pytest.mark.parametrize('cb, extra', [(TensorBoardCallback, 'tensorboard'), (WandbCallback, 'wandb')])
def test_a_missing_package_is_said_before_the_fit_with_its_extra(make, monkeypatch, cb, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    import importlib
    real = importlib.import_module
    def missing(name, *a):
        if name == extra: raise ModuleNotFoundError(name, name=name)
        return real(name, *a)
    monkeypatch.setattr(importlib, 'import_module', missing)
    learn = make()
    with pytest.raises(MissingExtraError, match=rf"blocks\[{extra}\]"): learn.fit(1, cbs=cb())
    assert not learn.recorder.losses

# --- Weights & Biases
class Run:
    "Keeps what it gets, as a run of wandb does; steps have to rise"
    def __init__(self, id='abc'): self.id, self.rows, self.summary, self.models, self.step = id, {}, {}, [], 0
    @property
    def config(self): return self
    def update(self, d, allow_val_change=False): self.settings = d
    def log(self, numbers, step):
        assert step >= self.step
        self.step = step; self.rows.setdefault(step, {}).update(numbers)
    def log_model(self, path, name): self.models.append((torch.load(path, weights_only=True)['model'], name))

def test_a_run_gets_numbers_configuration_and_bests(make):
    learn, run = make(), Run()
    learn.fit(3, 1e-2, cbs=WandbCallback(run=run, config=dict(note='mine')))
    r, losses = learn.recorder, learn.recorder.column('valid_loss')
    assert [run.rows[i + 1]['train_loss'] for i in range(12)] == r.losses and run.rows[1]['lr_0'] == 1e-2 and list(run.rows) == list(range(1, 13))
    assert [run.rows[s]['accuracy'] for s in r.steps] == r.column('accuracy') and 'accuracy' not in run.rows[3]
    assert run.summary['best_valid_loss'] == min(losses) and run.summary['best_valid_loss_step'] == r.steps[losses.index(min(losses))] and run.summary['best_accuracy'] == max(r.column('accuracy'))
    assert run.settings['note'] == 'mine' and run.settings['epochs'] == 3 and run.settings['batch_size'] == 8 and run.settings['model'] == 'Sequential' and not run.models

def test_a_run_goes_on_with_the_next_fit_also_of_another_callback(make):
    learn, run = make(), Run()
    cb = WandbCallback(run=run)
    learn.fit(1, cbs=cb); learn.fit(1, cbs=cb); learn.fit(1, cbs=WandbCallback(run=run))
    assert list(run.rows) == list(range(1, 13)) and 'valid_loss' in run.rows[12]

def test_the_bests_are_those_of_the_whole_run(make):
    learn, run = make(), Run()
    cb = WandbCallback(run=run)
    learn.fit(1, cbs=cb)
    best, learn.recorder.values = run.summary['best_accuracy'], [[None, 9., best_below(run)]]
    cb._note_best()
    assert run.summary['best_accuracy'] == best and run.summary['best_valid_loss'] < 9

def best_below(run): return run.summary['best_accuracy'] - .1

@pytest.mark.parametrize('every, at', [('epoch', (1, 2)), (3, (1, 3))])
def test_after_a_resume_a_run_has_the_numbers_of_one_fit(make, every, at):
    whole, run, again = Run(), Run(), Run()
    make().fit_one_cycle(3, cbs=WandbCallback(run=whole))
    interrupted(make, WandbCallback(run=run), every, at, WandbCallback(run=again))
    assert again.rows == {k: v for k, v in whole.rows.items() if k in again.rows} and {**run.rows, **again.rows} == whole.rows and again.summary.items() <= whole.summary.items()

def test_the_bests_of_a_checkpoint_are_not_beaten_by_worse_ones(make):
    run = Run()
    state = dict(step=0, id='abc', best=dict(valid_loss=0., accuracy=2.))                   # better than can be
    make().fit(1, cbs=[again := WandbCallback(run=run), type('Load', (Callback,), dict(order=100, before_fit=lambda self: again.load_state_dict(state)))()])
    assert not run.summary

def test_the_weights_that_are_kept_are_the_best_that_were_put_back(make):
    learn, run = make(), Run()
    learn.fit(3, .1, cbs=[WandbCallback(run=run, log_model=True), SaveModelCallback(comp=lambda new, best: best >= 2)])     # the first epoch is the best
    (weights, name), = run.models
    assert learn.validate()[0] == learn.recorder.values[0][1] != learn.recorder.values[-1][1]
    assert name == 'run-abc-model' and all(torch.equal(v, learn.model.state_dict()[k].cpu()) for k, v in weights.items()) and (learn.path/'models'/'run-abc-model.pth').is_file()

def test_the_run_is_the_one_going_on_or_a_new_one_or_the_one_of_the_checkpoint(make, monkeypatch):
    begun = []
    fake = types.ModuleType('wandb'); fake.run = Run('going-on')
    fake.init = lambda **kw: begun.append(kw) or Run('new')
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    learn, cb = make(), WandbCallback(project='cells')
    learn.fit(1, cbs=cb)
    assert cb.run is fake.run and not begun
    fake.run = None
    interrupted(make, WandbCallback(project='cells'), 'epoch', (1, 2), WandbCallback(project='cells'), epochs=2)
    assert begun == [dict(project='cells'), dict(project='cells', id='new', resume='allow')]

# --- all of them
@pytest.mark.parametrize('kind', ['csv', 'board', 'wandb'])
def test_only_the_first_process_writes(make, monkeypatch, tmp_path, kind):
    run = Run()
    cb = dict(csv=CSVLogger('h.csv'), board=TensorBoardCallback(tmp_path/'board', log_preds=True), wandb=WandbCallback(run=run, log_model=True))[kind]
    make().fit(1, cbs=[cb, Silent(monkeypatch)])
    assert not run.rows and not run.summary and not run.models and not any(os.scandir(tmp_path))

def test_the_search_for_a_learning_rate_is_not_logged(make, tmp_path):
    learn, run = make(), Run()
    learn.add_cbs([CSVLogger(), ShowGraphCallback(), TensorBoardCallback(tmp_path/'board'), WandbCallback(run=run)])
    learn.lr_find(num_it=10, show_plot=False)
    assert not run.rows and not (tmp_path/'board').exists() and not (tmp_path/'history.csv').exists()

def test_loggers_have_the_last_epoch_also_when_it_ends_the_fit(make, tmp_path):
    from blocks import EarlyStoppingCallback
    learn, run, log = make(), Run(), CSVLogger()
    learn.fit(5, cbs=[EarlyStoppingCallback(patience=1, comp=lambda new, best: False), log, TensorBoardCallback(tmp_path/'board'), WandbCallback(run=run)])
    assert len(log.read_log()) == len(scalars(tmp_path/'board')['accuracy']) == sum('accuracy' in o for o in run.rows.values()) == len(learn.recorder.values) == 1

def test_validation_is_not_logged(make, tmp_path):
    learn, run = make(), Run()
    learn.add_cbs([CSVLogger(), TensorBoardCallback(tmp_path/'board'), WandbCallback(run=run)])
    learn.validate(); learn.get_preds()
    assert not run.rows and not (tmp_path/'board').exists() and not (tmp_path/'history.csv').exists()
    learn.fit(1)
    assert len(run.rows) == 4 and len(pd.read_csv(tmp_path/'history.csv')) == 1
