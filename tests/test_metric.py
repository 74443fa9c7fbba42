import functools
import numpy as np, pytest, torch
import torchmetrics as tm
from sklearn import metrics as skm
from blocks.core import DataError, TrainingError
from blocks.train.loss import CrossEntropyLossFlat
from blocks.train.metric import Metric, accuracy, accuracy_multi, as_metric, error_rate, exp_rmspe, is_lower_better, mae, mse, msle, rmse, top_k_accuracy, unique_names

G = torch.Generator().manual_seed(0)
PRED, Y = torch.randn(103, 4, generator=G), torch.randint(0, 4, (103,), generator=G)
TWO, YES = torch.randn(103, 2, generator=G), torch.randint(0, 2, (103,), generator=G)

def gather(m, pred, y, bs=10, act=lambda p: p.softmax(-1)):
    m = as_metric(m); m.reset()
    for i in range(0, len(pred), bs): m.accumulate(pred[i:i+bs], act(pred[i:i+bs]), tuple(t[i:i+bs] for t in y) if isinstance(y, tuple) else y[i:i+bs])
    return m.value
def near(a, b): assert abs(float(a) - float(b)) < 1e-6, (a, b)

# ---- functions ------------------------------------------------------------------------------------------------
def test_accuracy_and_error_rate():
    want = skm.accuracy_score(Y, PRED.argmax(1)); near(accuracy(PRED, Y), want); near(error_rate(PRED, Y), 1 - want); near(accuracy(PRED.T, Y, axis=0), want)
    near(accuracy(PRED, Y[:, None]), want)
def test_accuracy_of_masks():
    p, m = torch.randn(3, 4, 5, 6, generator=G), torch.randint(0, 4, (3, 5, 6), generator=G); want = (p.argmax(1) == m).float().mean()
    near(accuracy(p, m, axis=1), want); near(accuracy(p, m[:, None], axis=1), want); near(error_rate(p, m, axis=1), 1 - want)
    near(top_k_accuracy(p, m, k=2, axis=1), (p.topk(2, 1).indices == m[:, None]).any(1).float().mean())
@pytest.mark.parametrize('k', [1, 2, 3])
def test_top_k(k): near(top_k_accuracy(PRED, Y, k=k), skm.top_k_accuracy_score(Y, PRED.numpy(), k=k))
def test_top_k_of_all_is_one(): assert top_k_accuracy(PRED, Y, k=4) == 1
@pytest.mark.parametrize('k', [5, 0])
def test_top_k_that_cannot_be(k):
    with pytest.raises(DataError, match=f'k={k} .*has 4'): top_k_accuracy(PRED, Y, k=k)
def test_accuracy_multi():
    y = torch.randint(0, 2, (103, 4), generator=G)
    near(accuracy_multi(PRED, y), 1 - skm.hamming_loss(y, PRED.sigmoid() > .5)); near(accuracy_multi(PRED, y.float(), thresh=.3), 1 - skm.hamming_loss(y, PRED.sigmoid() > .3))
    near(accuracy_multi(PRED, y, thresh=.2, sigmoid=False), 1 - skm.hamming_loss(y, PRED > .2))
def test_differences():
    a, b = torch.randn(50, 3, generator=G).double(), torch.randn(50, 3, generator=G).double()
    near(mse(a, b), skm.mean_squared_error(b, a)); near(rmse(a, b), skm.root_mean_squared_error(b.flatten(), a.flatten())); near(mae(a, b), skm.mean_absolute_error(b, a))
    near(mae(a[:, :1], b[:, 0]), (a[:, 0] - b[:, 0]).abs().mean())                            # (n, 1) and (n,) pair, they are not crossed
def test_logarithms():
    a, b = torch.rand(50, 3, generator=G).double()*9, torch.rand(50, 3, generator=G).double()*9
    near(msle(a, b), skm.mean_squared_log_error(b, a)); near(exp_rmspe(a, b), (((b.exp() - a.exp())/b.exp())**2).mean().sqrt()); assert torch.isnan(msle(a - 20, b))
    assert exp_rmspe(torch.tensor([100.]), torch.tensor([100.])) == 0                         # exp(100) is more than float32 holds
def test_what_is_ignored_does_not_count():
    known = Y != 2
    for f in (accuracy, error_rate, functools.partial(top_k_accuracy, k=2)): near(f(PRED, Y, ignore_index=2), f(PRED[known], Y[known])); near(gather(functools.partial(f, ignore_index=2), PRED, Y), f(PRED[known], Y[known]))
    assert np.isnan(gather(functools.partial(accuracy, ignore_index=1), PRED, Y*0 + 1))
def test_half_precision_answers():
    p = (torch.randn(5000, generator=G)*.01).half(); near(accuracy_multi(p, p > 0), 1)
@pytest.mark.parametrize('f', [mse, rmse, mae])
def test_differences_of_half_and_integers_are_taken_in_float32(f):
    a, b = torch.randn(5000, generator=G).bfloat16() + 100, torch.arange(5000)%7
    assert f(a, b).dtype == torch.float32 and abs(f(a, b) - f(a.double(), b.double())) < 1e-2
@pytest.mark.parametrize('f', [accuracy, error_rate, functools.partial(top_k_accuracy, k=2), accuracy_multi, mse, rmse, mae])
def test_shapes_that_do_not_pair_are_both_named(f):
    with pytest.raises(DataError) as e: f(PRED, Y[:-1])
    assert '(103, 4)' in str(e.value) and '(102,)' in str(e.value)

# ---- over the whole set ---------------------------------------------------------------------------------------
def f1(p, t): return skm.f1_score(t, p.argmax(1), average='macro')
@pytest.mark.parametrize('bs', [1, 10, 64, 103])
@pytest.mark.parametrize('m', [accuracy, error_rate, functools.partial(top_k_accuracy, k=2), f1])
def test_a_function_gets_the_whole_set_whatever_the_batches(m, bs):
    near(gather(m, PRED, Y, bs), m(PRED, Y)); assert type(gather(m, PRED, Y, bs)) is float
def test_a_function_is_called_once_with_raw_outputs_on_the_cpu():
    calls = []
    def f(p, t): calls.append((p, t)); return 0.
    gather(f, PRED, Y); (p, t), = calls; assert torch.equal(p, PRED) and torch.equal(t, Y)
def test_several_targets_and_outputs_stay_apart():
    m = as_metric(lambda p, t: (p[0]*t[0]).sum() + (p[1]*t[1]).sum()); a, b = PRED[:, 0], PRED[:, 1]
    for i in range(0, 103, 10): m.accumulate((a[i:i+10], b[i:i+10]), None, (Y[i:i+10], YES[i:i+10]))
    assert m.value == pytest.approx(float((a*Y).sum() + (b*YES).sum()), rel=1e-5)
def test_reset_forgets_and_nothing_is_none():
    for o in (accuracy, tm.Accuracy(task='multiclass', num_classes=4)):
        m = as_metric(o); assert m.value is None
        m.accumulate(PRED, PRED.softmax(1), (Y + 1)%4); m.reset(); assert m.value is None
        near(gather(m, PRED, Y), accuracy(PRED, Y))
def test_what_is_kept_hangs_on_no_graph():
    m = as_metric(lambda p, t: 0.); p = PRED.clone().requires_grad_(); m.accumulate(p*2, None, Y); assert not m.preds[0].requires_grad
    m = as_metric(mse); m.accumulate(p[:, 0]*2, None, Y); assert not m.means[0].requires_grad
@pytest.mark.parametrize('f', [accuracy, error_rate, functools.partial(top_k_accuracy, k=2), functools.partial(accuracy, axis=1), functools.partial(accuracy, ignore_index=2)])
@pytest.mark.parametrize('bs', [1, 10, 64])
def test_means_over_entries_keep_no_outputs(f, bs):
    near(gather(f, PRED, Y, bs), f(PRED, Y)); m = as_metric(f); m.accumulate(PRED, None, Y); assert sum(t.numel() for o in vars(m).values() if isinstance(o, list) for t in o if isinstance(t, torch.Tensor)) == 1
@pytest.mark.parametrize('f', [mse, rmse, mae, msle, exp_rmspe, accuracy_multi])
@pytest.mark.parametrize('bs', [1, 10, 64])
def test_means_of_values_over_unequal_batches(f, bs):
    a, b = torch.rand(103, 3, generator=G), torch.rand(103, 3, generator=G); near(gather(f, a, b > .5 if f is accuracy_multi else b, bs), f(a, b > .5 if f is accuracy_multi else b))
@pytest.mark.parametrize('result', [.25, torch.tensor(.25), torch.tensor([.25]), np.float32(.25), np.array([.25])])
def test_one_number_of_any_kind(result): assert gather(lambda p, t: result, PRED, Y) == .25

def test_a_metric_can_be_called():
    m = as_metric(f1); near(m(PRED, Y), f1(PRED, Y)); assert type(m(PRED, Y)) is float; near(as_metric(accuracy)(PRED.numpy(), Y.numpy()), accuracy(PRED, Y)); near(as_metric(tm.AUROC(task='multiclass', num_classes=4))(PRED, Y, act=PRED.softmax(1)), skm.roc_auc_score(Y, PRED.softmax(1), multi_class='ovr'))
    m.accumulate(PRED, None, (Y + 1)%4); near(m(PRED, Y), f1(PRED, Y)); assert m.value is None              # what was gathered is forgotten, before and after
    with pytest.raises(DataError, match='2 values'): as_metric(lambda p, t: torch.zeros(2))(PRED, Y)

# ---- torchmetrics ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize('average', ['macro', 'micro', 'weighted'])
def test_torchmetrics_keeps_its_average(average):
    near(gather(tm.F1Score(task='multiclass', num_classes=4, average=average), PRED, Y), skm.f1_score(Y, PRED.argmax(1), average=average))
def test_torchmetrics_gets_probabilities():
    near(gather(tm.AUROC(task='multiclass', num_classes=4), PRED, Y), skm.roc_auc_score(Y, PRED.softmax(1), multi_class='ovr'))
    seen = []
    class Own:
        def reset(self): seen.clear()
        def update(self, p, t): seen.append((p, t))
        def compute(self): return len(seen)
    assert gather(Own(), PRED, Y) == 11 and torch.equal(torch.cat([p for p, _ in seen]), PRED.softmax(1))
def test_binary_torchmetrics_of_a_two_class_model_and_of_one_output():
    for m, theirs in ((tm.F1Score(task='binary'), skm.f1_score), (tm.AUROC(task='binary'), None)):
        p = TWO.softmax(1)[:, 1]; want = skm.roc_auc_score(YES, p) if theirs is None else theirs(YES, p > .5); near(gather(m, TWO, YES), want)
    near(gather(tm.F1Score(task='binary'), TWO[:, :1], YES.float(), act=torch.sigmoid), skm.f1_score(YES, TWO[:, 0] > 0))
def test_multilabel_torchmetrics_with_float_targets():
    y = torch.randint(0, 2, (103, 4), generator=G).float()
    near(gather(tm.F1Score(task='multilabel', num_labels=4, average='macro'), PRED, y, act=torch.sigmoid), skm.f1_score(y, PRED.sigmoid() > .5, average='macro'))
def test_regression_torchmetrics():
    t = torch.randn(103, generator=G); near(gather(tm.MeanSquaredError(), PRED[:, :1], t, act=lambda p: p), mse(PRED[:, :1], t)); near(gather(tm.R2Score(), PRED[:, 0], t, act=lambda p: p), skm.r2_score(t, PRED[:, 0]))
def test_torchmetrics_moves_to_the_device_of_the_data():
    class Own(torch.nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('n', torch.zeros(()))
        def reset(self): pass
        def update(self, p, t): assert self.n.device == p.device
        def compute(self): return 1.
    m = as_metric(Own()); p = torch.zeros(2, 2, device='meta'); m.accumulate(p, p, torch.zeros(2, device='meta')); assert m.metric.n.device.type == 'meta'
@pytest.mark.parametrize('m,words', [(tm.Recall(task='multiclass', num_classes=4, average=None), ['multiclass_recall', '4 values', "average='macro'"]), (tm.MetricCollection([tm.Accuracy(task='multiclass', num_classes=4)]), ['metric_collection', 'MulticlassAccuracy', 'of its own'])])
def test_values_that_are_not_one_number(m, words):
    with pytest.raises(TrainingError) as e: gather(m, PRED, Y)
    assert all(w in str(e.value) for w in words), e.value

# ---- errors ---------------------------------------------------------------------------------------------------
def test_a_failing_function_is_named_with_shapes_and_cause():
    def fragile(p, t): return p[:, 99]
    with pytest.raises(TrainingError, match=r"'fragile'.*11 batches.*\(3, 4\).*\(3,\).*IndexError") as e: gather(fragile, PRED, Y)
    assert isinstance(e.value.__cause__, IndexError)
def test_a_failing_update_names_its_batch():
    with pytest.raises(TrainingError, match=r"'multiclass_accuracy'.*batch 1.*\(10, 4\).*\(10,\)") as e: gather(tm.Accuracy(task='multiclass', num_classes=7), PRED, Y)
    assert e.value.__cause__ is not None
def test_a_failing_metric_of_ones_own_is_named_too():
    class Own(Metric):
        def clear(self): pass
        def update(self, pred, act, y): raise KeyError('x')
        def compute(self): return 1.
    with pytest.raises(TrainingError, match=r"'mine'.*\(103, 4\).*KeyError"): Own('mine').accumulate(PRED, PRED, Y)
@pytest.mark.parametrize('bad,word', [('accuracy', "'accuracy'"), (None, 'None'), (3, '3'), (tm.MeanSquaredError, 'class MeanSquaredError'), (Metric, 'class Metric')])
def test_what_is_no_metric(bad, word):
    with pytest.raises(DataError, match=word): as_metric(bad)
def test_interrupts_pass_through():
    def stop(p, t): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): gather(stop, PRED, Y)

# ---- names ----------------------------------------------------------------------------------------------------
class Callable:
    def __call__(self, p, t): return 0.
@pytest.mark.parametrize('m,name', [(accuracy, 'accuracy'), (functools.partial(top_k_accuracy, k=2), 'top_k_accuracy'), (functools.partial(functools.partial(top_k_accuracy, k=2), axis=1), 'top_k_accuracy'),
    (lambda p, t: 0, 'lambda'), (Callable(), 'Callable'), (functools.partial(Callable()), 'Callable'), (CrossEntropyLossFlat(), 'CrossEntropyLossFlat'), (tm.F1Score(task='binary'), 'binary_f1_score'),
    (tm.AUROC(task='multiclass', num_classes=3), 'multiclass_auroc'), (tm.R2Score(), 'r2_score'), (tm.MeanSquaredError(), 'mean_squared_error')])
def test_name(m, name): assert as_metric(m).name == name
def test_a_metric_stays_itself():
    m = as_metric(accuracy); assert as_metric(m) is m
def test_unique_names():
    class N:
        def __init__(self, name): self.name = name
    assert unique_names([N(n) for n in ('a', 'b', 'a', 'a_2', 'a')]) == ['a', 'b', 'a_2', 'a_2_2', 'a_3'] and unique_names([]) == []
@pytest.mark.parametrize('name', ['train_loss', 'valid_loss', 'error_rate', 'mse', 'rmse', 'mae', 'msle', 'exp_rmspe', 'brier_score_loss', 'expected_calibration_error', 'dice_loss', 'brier_score_loss_cat', 'perplexity', 'hamming_loss', 'multiclass_hamming_distance', 'calibration_error', 'MulticlassCalibrationError',
    'mean_squared_error', 'MSE', 'rmse_2', 'CrossEntropyLossFlat', 'cross_entropy', 'brier_score', 'valid_mae'])
def test_lower_is_better(name): assert is_lower_better(name)
@pytest.mark.parametrize('name', ['accuracy', 'accuracy_multi', 'top_k_accuracy_2', 'f1', 'F1Score', 'binary_auroc', 'roc_auc', 'dice', 'DiceMulti', 'jaccard', 'iou', 'precision', 'recall', 'r2_score', 'cohen_kappa', 'matthews_corrcoef',
    'explained_variance', 'foreground_acc', 'specificity', 'my_thing', 'mseed', 'camera_accuracy', 'f1_score_hair loss', 'valid_recall_score_mae', 'roc_auc_score_error', 'dice_multi_distance', 'jaccard_coeff_multi_loss', 'matthews_corrcoef', 'pearsonr', 'spearmanr', 'average_precision_score'])
def test_higher_is_better(name): assert not is_lower_better(name)

# --- scikit-learn's functions as they are
def test_functions_of_scikit_learn_get_the_truth_first_and_what_they_ask_for():
    partial = functools.partial
    g = torch.Generator().manual_seed(0)
    for n in (2, 3):
        pred, y = torch.randn(30, n, generator=g), torch.randint(0, n, (30,), generator=g)
        act = pred.softmax(1)
        exact = act.double()/act.double().sum(1, keepdim=True)
        for f in (skm.accuracy_score, partial(skm.f1_score, average='macro'), skm.balanced_accuracy_score, skm.cohen_kappa_score):
            m = as_metric(f)
            for i in (0, 7, 19): m.accumulate(pred[i:{0: 7, 7: 19, 19: 30}[i]], act[i:{0: 7, 7: 19, 19: 30}[i]], y[i:{0: 7, 7: 19, 19: 30}[i]])
            assert m.value == pytest.approx(f(y, pred.argmax(1)))
        auc = partial(skm.roc_auc_score, multi_class='ovr')
        m = as_metric(auc); m.accumulate(pred, act, y)
        assert m.value == pytest.approx(auc(y, act[:, 1] if n == 2 else act))
        m = as_metric(skm.log_loss); m.accumulate(pred, act, y); assert m.value == pytest.approx(skm.log_loss(y, exact))
    pred, y = torch.randn(20, 1, generator=g), torch.randn(20, generator=g)
    m = as_metric(skm.r2_score); m.accumulate(pred, pred, y); assert m.value == pytest.approx(skm.r2_score(y, pred[:, 0]))

def test_a_function_of_scikit_learn_that_cannot_take_several_labels_names_one_that_can():
    partial = functools.partial
    m = as_metric(partial(skm.f1_score, average='macro'))
    pred = torch.randn(10, 3)
    m.accumulate(pred, pred.sigmoid(), (torch.rand(10, 3) > .5).float())
    with pytest.raises(TrainingError, match='F1ScoreMulti'): m.value

def test_lists_of_boxes_of_different_length_are_joined_and_masks_of_different_size_are_not():
    m = as_metric(lambda preds, targs: targs.shape[1] + (targs[0, -1, -1] == -1).float())
    for k in (1, 3): m.accumulate(torch.zeros(2, 4, 6), None, torch.ones(2, k, 5))
    assert m.value == 4                                                   # three rows, the last of the first picture without a box
    m.reset()
    for h in (4, 6): m.accumulate(torch.zeros(2, 3), None, torch.zeros(2, h, 5, dtype=torch.int64))
    with pytest.raises(TrainingError, match='Sizes of tensors'): m.value
