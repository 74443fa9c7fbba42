import copy, pickle, warnings
from functools import partial
import numpy as np, pytest, torch
import torch.nn.functional as F
import torchmetrics.functional as tmf
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn import metrics as skm
from blocks.core import DataError, TrainingError
from blocks.train.metric import as_metric, is_lower_better
from blocks.train.scores import (APScoreBinary, APScoreMulti, BalancedAccuracy, BrierScore, BrierScoreMulti, CohenKappa, Dice, DiceMulti, ExpectedCalibrationError, ExplainedVariance, F1Score, F1ScoreMulti,
                                 FBeta, FBetaMulti, HammingLoss, HammingLossMulti, Jaccard, JaccardCoeff, JaccardCoeffMulti, JaccardMulti, MatthewsCorrCoef, MatthewsCorrCoefMulti, MeanIoU, PearsonCorrCoef,
                                 Perplexity, Precision, PrecisionMulti, R2Score, Recall, RecallMulti, RocAuc, RocAucBinary, RocAucMulti, SpearmanCorrCoef, foreground_acc, per_class, perplexity)

def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def classes(n, *shape, seed=1): return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(seed))
PRED, Y = draw(103, 4), classes(4, 103)
TWO, YES = draw(103, 2, seed=2), classes(2, 103, seed=3)
MULTI, TAGS = draw(103, 5, seed=4), classes(2, 103, 5, seed=5)
W = torch.rand(103, generator=torch.Generator().manual_seed(6))
MAPS, MASKS = draw(7, 3, 6, 5, seed=7), classes(3, 7, 6, 5, seed=8)
def raw(p): return p
def softmax(p): return p.softmax(-1)
def gather(m, pred, y, sizes=(64, 30, 9), act=softmax):
    "As a learner does, in batches of these sizes, the last of which repeats"
    m = as_metric(m); m.reset(); i, sizes = 0, list(sizes)
    while i < len(pred):
        n = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        m.accumulate(pred[i:i+n], act(pred[i:i+n]), y[i:i+n]); i += n
    assert type(m.value) is float
    return m.value
def near(a, b, tol=1e-6): assert (np.isnan(a) and np.isnan(b)) or abs(float(a) - float(b)) < tol, (float(a), float(b))
def quiet(f, *a, **k):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return f(*a, **k)

OF_CLASSES = [(Precision, skm.precision_score), (Recall, skm.recall_score), (F1Score, skm.f1_score), (partial(FBeta, 2.), partial(skm.fbeta_score, beta=2.)), (partial(FBeta, .5), partial(skm.fbeta_score, beta=.5)), (Jaccard, skm.jaccard_score)]
AGREEMENT = [(BalancedAccuracy, skm.balanced_accuracy_score), (partial(BalancedAccuracy, adjusted=True), partial(skm.balanced_accuracy_score, adjusted=True)), (CohenKappa, skm.cohen_kappa_score),
             (partial(CohenKappa, weights='quadratic'), partial(skm.cohen_kappa_score, weights='quadratic')), (partial(CohenKappa, labels=[0, 1]), partial(skm.cohen_kappa_score, labels=[0, 1])),
             (MatthewsCorrCoef, skm.matthews_corrcoef), (HammingLoss, skm.hamming_loss)]
OF_LABELS = [(PrecisionMulti, skm.precision_score), (RecallMulti, skm.recall_score), (F1ScoreMulti, skm.f1_score), (partial(FBetaMulti, 2.), partial(skm.fbeta_score, beta=2.)), (JaccardMulti, skm.jaccard_score)]

# ---- one class ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('average', ['macro', 'micro', 'weighted'])
@pytest.mark.parametrize('ours,theirs', OF_CLASSES)
def test_averages_over_classes(ours, theirs, average):
    want = theirs(Y, PRED.argmax(1), average=average)
    near(gather(ours(average=average), PRED, Y), want); near(ours(average=average)(PRED, Y), want); near(ours(average=average)(PRED.argmax(1), Y), want)
    near(ours(average=average, labels=[1, 3])(PRED, Y), theirs(Y, PRED.argmax(1), average=average, labels=[1, 3]))
@pytest.mark.parametrize('ours,theirs', OF_CLASSES)
def test_two_classes(ours, theirs):
    near(gather(ours(), TWO, YES), theirs(YES, TWO.argmax(1))); near(ours(pos_label=0)(TWO, YES), theirs(YES, TWO.argmax(1), pos_label=0)); near(gather(ours(sample_weight=W), TWO, YES), theirs(YES, TWO.argmax(1), sample_weight=W))
@pytest.mark.parametrize('ours,theirs', AGREEMENT)
def test_agreement(ours, theirs):
    for p, y in ((PRED, Y), (TWO, YES)): near(gather(ours(), p, y), theirs(y, p.argmax(1))); near(ours()(p, y), theirs(y, p.argmax(1)))
    near(gather(ours(sample_weight=W), PRED, Y), theirs(Y, PRED.argmax(1), sample_weight=W))
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 40), c=st.integers(2, 5), first=st.integers(1, 40), seed=st.integers(0, 10**6), there=st.integers(1, 5))
def test_any_data_in_any_batches(n, c, first, seed, there):
    p, y = draw(n, c, seed=seed), classes(min(c, there), n, seed=seed + 1)                   # some classes may be absent
    for m, theirs in ((F1Score(average='macro'), partial(skm.f1_score, average='macro', zero_division=0)), (Jaccard(average='weighted'), partial(skm.jaccard_score, average='weighted', zero_division=0)),
                      (BalancedAccuracy(), skm.balanced_accuracy_score), (MatthewsCorrCoef(), skm.matthews_corrcoef), (HammingLoss(), skm.hamming_loss)):
        with warnings.catch_warnings():
            warnings.simplefilter('error'); got = gather(m, p, y, (first, 7, 3))
        near(got, quiet(theirs, y, p.argmax(1)))
@pytest.mark.parametrize('make', [o for o, _ in OF_CLASSES])
def test_many_classes_need_an_average_and_are_told_at_the_first_batch(make):
    with pytest.raises(DataError, match="4.*average='macro'.*per_class"): make()(PRED, Y)
    with pytest.raises(DataError, match="average='macro'"): make()(PRED.argmax(1), Y)
    m = make(); m.reset()
    with pytest.raises(TrainingError, match="on batch 1.*average='macro'"): m.accumulate(PRED, softmax(PRED), Y)
def test_axis_and_masks_and_what_is_ignored():
    flat, y = MAPS.argmax(1).flatten(), MASKS.flatten(); holes = MASKS.clone(); holes[:, 2:4] = 255; known = holes.flatten() != 255
    for make, theirs in ((partial(F1Score, average='macro'), partial(skm.f1_score, average='macro')), (CohenKappa, skm.cohen_kappa_score), (HammingLoss, skm.hamming_loss)):
        near(gather(make(axis=1), MAPS, MASKS, (3,)), theirs(y, flat)); near(gather(make(axis=1, ignore_index=255), MAPS, holes, (3,)), theirs(y[known], flat[known])); near(make(axis=1)(MAPS, MASKS[:, None]), theirs(y, flat))
    with pytest.raises(DataError, match='class 255, and there are 3 .*ignore_index=255'): CohenKappa(axis=1)(MAPS, holes)
    w = torch.rand(holes.numel()); near(gather(CohenKappa(axis=1, ignore_index=255, sample_weight=w), MAPS, holes, (3,)), skm.cohen_kappa_score(y[known], flat[known], sample_weight=w[known]))
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('kind', [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_types_of_outputs_and_targets(dtype, kind):
    p = PRED.to(dtype); near(F1Score(average='macro')(p, Y.to(kind)), skm.f1_score(Y, p.float().argmax(1), average='macro')); near(RocAuc()(p, Y.to(kind)), skm.roc_auc_score(Y, p.double().softmax(1), multi_class='ovr'))
    near(F1ScoreMulti()(MULTI.to(dtype), TAGS.to(kind)), skm.f1_score(TAGS, MULTI.to(dtype).double() > 0, average='macro')); near(perplexity(p, Y.to(kind)), F.cross_entropy(p.double(), Y).exp(), 1e-4)
    near(R2Score()(p[:, 0], Y.to(kind)), skm.r2_score(Y, p[:, 0].double())); near(BrierScore()(p, Y.to(kind)), ((p.double().softmax(1) - F.one_hot(Y, 4))**2).sum(1).mean())
def test_what_cannot_be_class_scores():
    for p, y, word in ((TWO[:, :1], YES, 'F1ScoreMulti'), (TWO[:, 0], YES, 'F1ScoreMulti'), (MULTI, TAGS, 'F1ScoreMulti'), (TWO, YES[:-1], r'\(102,\)'), (TWO, YES + .5, 'whole'), (TWO, YES + 1, 'class 2')):
        with pytest.raises(DataError, match=word): F1Score()(p, y)
    with pytest.raises(DataError, match='50 values'): F1Score(sample_weight=W[:50])(TWO, YES)
def test_nothing_but_counts_is_kept():
    for m in (F1Score(average='macro', axis=1), DiceMulti(), BrierScore(axis=1), ExpectedCalibrationError(axis=1), Perplexity(axis=1), foreground_acc):
        m = as_metric(m); m.reset(); m.accumulate(MAPS, MAPS.softmax(1), MASKS)
        assert max(o.numel() for o in _tensors(vars(m))) <= 45
def _tensors(o):
    if isinstance(o, torch.Tensor): yield o
    elif isinstance(o, dict): yield from _tensors(list(o.values()))
    elif isinstance(o, (list, tuple)):
        for part in o: yield from _tensors(part)
    else: yield torch.zeros(0)

# ---- one number for each class --------------------------------------------------------------------------------
@pytest.mark.parametrize('ours,theirs', OF_CLASSES)
def test_per_class(ours, theirs):
    ms = per_class(ours, ['a', 'b', 'c', 'd']); got = [gather(m, PRED, Y) for m in ms]
    assert np.allclose(got, theirs(Y, PRED.argmax(1), average=None)) and [m.name for m in ms] == [f'{ours(average="macro").name}_{c}' for c in 'abcd']
@pytest.mark.parametrize('ours,theirs', OF_LABELS)
def test_per_label(ours, theirs):
    assert np.allclose([gather(m, MULTI, TAGS) for m in per_class(ours, 'abcde')], theirs(TAGS, MULTI > 0, average=None)); near(per_class(ours, ['a'])[0](MULTI[:, :1], TAGS[:, :1]), theirs(TAGS[:, 0], MULTI[:, 0] > 0))
def test_per_class_of_probabilities():
    p = PRED.softmax(1)
    for i, (a, b, c) in enumerate(zip(per_class(RocAuc, 'abcd'), per_class(APScoreBinary, 'abcd'), per_class(BrierScore, 'abcd'))):
        near(gather(a, PRED, Y), skm.roc_auc_score(Y == i, p[:, i])); near(gather(b, PRED, Y), skm.average_precision_score(Y == i, p[:, i])); near(gather(c, PRED, Y), skm.brier_score_loss(Y == i, p[:, i]))
    for i, (a, b, c) in enumerate(zip(per_class(RocAucMulti, 'abcde'), per_class(APScoreMulti, 'abcde'), per_class(HammingLossMulti, 'abcde'))):
        near(a(MULTI, TAGS), skm.roc_auc_score(TAGS[:, i], MULTI[:, i])); near(b(MULTI, TAGS), skm.average_precision_score(TAGS[:, i], MULTI[:, i])); near(c(MULTI, TAGS), ((MULTI[:, i] > 0) != TAGS[:, i]).float().mean())
def test_per_class_of_masks():
    assert np.allclose([gather(m, MAPS, MASKS, (3,)) for m in per_class(DiceMulti, 'abc')], skm.f1_score(MASKS.flatten(), MAPS.argmax(1).flatten(), average=None)); assert per_class(MeanIoU, 'abc')[2].name == 'jaccard_coeff_multi_c'
def test_per_class_that_cannot_be():
    for make in (BalancedAccuracy, CohenKappa, Dice, R2Score, Perplexity):
        with pytest.raises(DataError, match='one class alone'): per_class(make, 'ab')
    with pytest.raises(DataError, match='3 classes, and the model has 4'): per_class(F1Score, 'abc')[0](PRED, Y)
def test_several_numbers_are_refused():
    with pytest.raises(DataError, match='4 values.*per_class'): F1Score(average=None)(PRED, Y)

# ---- probabilities --------------------------------------------------------------------------------------------
@pytest.mark.parametrize('average', ['macro', 'weighted'])
@pytest.mark.parametrize('multi_class', ['ovr', 'ovo'])
def test_roc_auc(average, multi_class):
    want = skm.roc_auc_score(Y, PRED.double().softmax(1), average=average, multi_class=multi_class); m = RocAuc(average=average, multi_class=multi_class)
    near(gather(m, PRED, Y), want); near(m(PRED, Y), want); near(m(PRED.softmax(1), Y), want)       # logits or probabilities
def test_binary_areas():
    p = TWO.softmax(1)[:, 1]
    for make, theirs in ((RocAucBinary, skm.roc_auc_score), (RocAuc, skm.roc_auc_score), (APScoreBinary, skm.average_precision_score), (BrierScore, skm.brier_score_loss)):
        near(gather(make(), TWO, YES), theirs(YES, p)); near(gather(make(sample_weight=W), TWO, YES), theirs(YES, p, sample_weight=W))
    near(RocAucBinary(max_fpr=.2)(TWO, YES), skm.roc_auc_score(YES, p, max_fpr=.2)); near(APScoreBinary(pos_label=0)(TWO, YES), skm.average_precision_score(1 - YES, 1 - p)); near(BrierScore(pos_label=0)(TWO, YES), skm.brier_score_loss(YES, p))
    for one in (TWO[:, :1], TWO[:, 0], TWO[:, 0].sigmoid()):
        near(RocAucBinary()(one, YES), skm.roc_auc_score(YES, TWO[:, 0])); near(APScoreBinary()(one, YES), skm.average_precision_score(YES, TWO[:, 0])); near(BrierScore()(one, YES), skm.brier_score_loss(YES, TWO[:, 0].sigmoid()))
def test_binary_areas_of_many_classes_are_refused():
    for make, word in ((RocAucBinary, 'RocAuc()'), (APScoreBinary, 'per_class')):
        with pytest.raises(DataError) as e: make()(PRED, Y)
        assert word in str(e.value)
    with pytest.raises(DataError, match='raise'): RocAuc(multi_class='raise')
    with pytest.raises(DataError, match='probabilities'): RocAuc()(PRED.argmax(1), Y)
@pytest.mark.parametrize('make,p,y,word', [(RocAuc, PRED, Y.clamp(max=2), 'class 3'), (RocAucBinary, TWO, YES*0, 'class 1'), (RocAucBinary, TWO, YES*0 + 1, 'class 1 alone'), (RocAucMulti, MULTI, TAGS*torch.tensor([1, 1, 0, 1, 1]), 'label 2'),
                                           (lambda: per_class(RocAuc, 'abcd')[3], PRED, Y.clamp(max=2), 'roc_auc_score_d.*class 3')])
def test_an_area_without_a_class_is_nan_and_says_why_once(make, p, y, word):
    m = make()
    with pytest.warns(UserWarning, match=word): assert np.isnan(gather(m, p, y))
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert np.isnan(gather(m, p, y))
def test_what_else_is_missing_counts_nothing_and_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert APScoreBinary()(TWO, YES*0) == F1Score()(TWO, YES*0) == Recall()(TWO, YES*0) == MatthewsCorrCoef()(TWO, YES*0) == 0; assert Precision()(torch.tensor([[1., 0]]), torch.tensor([1])) == 0
        near(F1ScoreMulti()(MULTI, TAGS*torch.tensor([1, 1, 0, 1, 1])), skm.f1_score(TAGS*torch.tensor([1, 1, 0, 1, 1]), MULTI > 0, average='macro', zero_division=0))
        assert np.isnan(APScoreMulti()(MULTI*float('nan'), TAGS)) and np.isnan(RocAuc()(PRED*float('nan'), Y)) and np.isnan(R2Score()(MULTI[:, 0]*float('nan'), MULTI[:, 1])) and np.isnan(F1ScoreMulti()(MULTI*float('nan'), TAGS))
def test_brier_of_many_classes():
    near(gather(BrierScore(), PRED, Y), ((PRED.softmax(1) - F.one_hot(Y, 4))**2).sum(1).mean()); near(gather(BrierScore(sample_weight=W), PRED, Y), np.average(((PRED.softmax(1) - F.one_hot(Y, 4))**2).sum(1), weights=W))
@pytest.mark.parametrize('n_bins', [1, 7, 15, 40])
def test_calibration_error(n_bins):
    for p, y in ((PRED, Y), (TWO, YES)): near(gather(ExpectedCalibrationError(n_bins), p, y), tmf.calibration_error(p.softmax(1), y, task='multiclass', num_classes=p.shape[1], n_bins=n_bins), 1e-5)
    assert ExpectedCalibrationError()(torch.eye(3), torch.arange(3)) == 0 and ExpectedCalibrationError()(torch.eye(3), (torch.arange(3) + 1)%3) == 1    # sure and right, sure and wrong
    near(ExpectedCalibrationError(2)(torch.tensor([[.5, .5], [.9, .1]]), torch.tensor([0, 1])), (.5 + .9)/2)                                           # .5 is in the lower bin
def test_calibration_error_of_masks_with_holes():
    holes = MASKS.clone(); holes[:, 0] = 255
    near(gather(ExpectedCalibrationError(axis=1, ignore_index=255), MAPS, holes, (3,), lambda p: p.softmax(1)), ExpectedCalibrationError(axis=1)(MAPS[:, :, 1:], MASKS[:, 1:]))
def test_perplexity():
    want = F.cross_entropy(PRED, Y).exp(); near(gather(Perplexity(), PRED, Y), want, 1e-5); near(gather(perplexity, PRED, Y), want, 1e-5); near(perplexity(PRED, Y), want, 1e-5); assert Perplexity().name == as_metric(perplexity).name == 'perplexity'
    near(gather(Perplexity(axis=1, ignore_index=0), MAPS, MASKS, (3,)), F.cross_entropy(MAPS, MASKS, ignore_index=0).exp(), 1e-5)

# ---- several labels -------------------------------------------------------------------------------------------
@pytest.mark.parametrize('average', ['macro', 'micro', 'weighted', 'samples'])
@pytest.mark.parametrize('ours,theirs', OF_LABELS)
def test_averages_over_labels(ours, theirs, average):
    kw = dict(average=average, zero_division=0)
    near(gather(ours(average=average), MULTI, TAGS.float(), act=torch.sigmoid), theirs(TAGS, MULTI > 0, **kw)); near(ours(thresh=.3, average=average)(MULTI, TAGS), theirs(TAGS, MULTI.sigmoid() > .3, **kw))
    near(ours(thresh=.2, sigmoid=False, average=average)(MULTI, TAGS), theirs(TAGS, MULTI > .2, **kw)); near(gather(ours(average=average, sample_weight=W), MULTI, TAGS), theirs(TAGS, MULTI > 0, sample_weight=W, **kw))
    near(ours(average=average)(MULTI > 0, TAGS), theirs(TAGS, MULTI > 0, **kw))
def test_labels_that_are_averaged(): near(F1ScoreMulti(labels=[1, 4])(MULTI, TAGS), skm.f1_score(TAGS, MULTI > 0, labels=[1, 4], average='macro')); near(HammingLossMulti(labels=[1, 4])(MULTI, TAGS), skm.hamming_loss(TAGS[:, [1, 4]], MULTI[:, [1, 4]] > 0))
@pytest.mark.parametrize('average', ['macro', 'micro', 'weighted', 'samples'])
def test_areas_over_labels(average):
    y = TAGS.clone(); y[:, 0], y[:, 1] = 0, 1
    if average == 'samples':
        for make, theirs in ((RocAucMulti, skm.roc_auc_score), (APScoreMulti, skm.average_precision_score)): near(gather(make(average=average), MULTI, y), theirs(y, MULTI, average=average))
    else:
        for make, theirs in ((RocAucMulti, skm.roc_auc_score), (APScoreMulti, skm.average_precision_score)):
            near(gather(make(average=average), MULTI, TAGS), theirs(TAGS, MULTI.sigmoid(), average=average)); near(gather(make(average=average, sample_weight=W), MULTI, TAGS), theirs(TAGS, MULTI.sigmoid(), average=average, sample_weight=W))
    if average == 'micro': near(RocAucMulti(average='micro')(MULTI, y), skm.roc_auc_score(y, MULTI.sigmoid(), average='micro'))        # defined, though label 0 is never there
def test_other_scores_of_labels():
    p = MULTI.sigmoid()
    near(gather(HammingLossMulti(), MULTI, TAGS), skm.hamming_loss(TAGS, p > .5)); near(gather(MatthewsCorrCoefMulti(), MULTI, TAGS), skm.matthews_corrcoef(TAGS.flatten(), p.flatten() > .5)); near(gather(BrierScoreMulti(), MULTI, TAGS), ((p - TAGS)**2).mean())
    near(gather(BrierScoreMulti(thresh=.5), MULTI, TAGS), skm.hamming_loss(TAGS, p > .5)); near(gather(BrierScoreMulti(sample_weight=W), MULTI, TAGS), np.average(((p - TAGS)**2).mean(1), weights=W)); near(RocAucMulti(sigmoid=False)(p, TAGS), skm.roc_auc_score(TAGS, p))
    near(gather(MatthewsCorrCoefMulti(sample_weight=W), MULTI, TAGS), skm.matthews_corrcoef(TAGS.flatten(), p.flatten() > .5, sample_weight=W.repeat_interleave(5)))
def test_labels_of_places():
    p, y = draw(4, 3, 5, 6), classes(2, 4, 3, 5, 6); near(F1ScoreMulti()(p, y), skm.f1_score(y.movedim(1, -1).reshape(-1, 3), p.movedim(1, -1).reshape(-1, 3) > 0, average='macro'))
def test_labels_that_do_not_pair():
    for p, y in ((MULTI, TAGS[:-1]), (MULTI, TAGS[:, :2]), (MULTI, YES)):
        with pytest.raises(DataError, match='do not pair'): F1ScoreMulti()(p, y)
    with pytest.raises(DataError, match='whole'): F1ScoreMulti()(MULTI, TAGS*.3)

# ---- values ---------------------------------------------------------------------------------------------------
def test_values():
    p, t = draw(103, 3), draw(103, 3, seed=9).double() + draw(103, 3)
    for make, theirs in ((R2Score, skm.r2_score), (ExplainedVariance, skm.explained_variance_score)):
        near(gather(make(), p[:, :1], t[:, 0], act=raw), theirs(t[:, 0], p[:, 0].double())); near(gather(make(), p, t, act=raw), theirs(t.flatten(), p.double().flatten())); near(gather(make(sample_weight=W), p[:, 0], t[:, 0], act=raw), theirs(t[:, 0], p[:, 0].double(), sample_weight=W))
        for o in ('uniform_average', 'variance_weighted'): near(gather(make(multioutput=o), p, t, act=raw), theirs(t, p.double(), multioutput=o))
    for make, theirs in ((PearsonCorrCoef, stats.pearsonr), (SpearmanCorrCoef, stats.spearmanr)):
        near(gather(make(), p, t, act=raw), theirs(p.flatten().double(), t.flatten())[0]); near(gather(make(dim_argmax=1), PRED, Y), theirs(PRED.argmax(1), Y)[0])
def test_values_without_a_spread_are_nan_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for make in (R2Score, ExplainedVariance, PearsonCorrCoef, SpearmanCorrCoef): assert np.isnan(make()(draw(1), draw(1)))
        assert np.isnan(PearsonCorrCoef()(torch.ones(5), draw(5))) and np.isnan(SpearmanCorrCoef()(torch.ones(5), draw(5)))
def test_values_far_from_zero_keep_their_differences():
    t = torch.arange(1000.)/1000 + 4000; p = t + draw(1000)*.01
    near(R2Score()(p, t), skm.r2_score(t.double(), p.double()), 1e-9)

# ---- masks ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('sizes', [(1,), (3,), (7,)])
def test_overlap(sizes):
    t, p = MASKS.flatten(), MAPS.argmax(1).flatten()
    near(gather(DiceMulti(), MAPS, MASKS, sizes), skm.f1_score(t, p, average='macro')); near(gather(JaccardCoeffMulti(), MAPS, MASKS, sizes), skm.jaccard_score(t, p, average='macro'))
    two, spot = MAPS[:, :2], MASKS.clamp(max=1); near(gather(Dice(), two, spot, sizes), skm.f1_score(spot.flatten(), two.argmax(1).flatten())); near(gather(JaccardCoeff(), two, spot, sizes), skm.jaccard_score(spot.flatten(), two.argmax(1).flatten()))
    near(gather(Dice(axis=-1), two.movedim(1, -1), spot, sizes), gather(Dice(), two, spot)); near(Dice()(two.argmax(1), spot), gather(Dice(), two, spot)); near(Dice()(two, spot[:, None]), gather(Dice(), two, spot))
    near(gather(foreground_acc, MAPS, MASKS, sizes), (t == p)[t != 0].float().mean()); near(gather(partial(foreground_acc, bkg_idx=2), MAPS, MASKS, sizes), (t == p)[t != 2].float().mean()); near(foreground_acc(MAPS, MASKS[:, None]), (t == p)[t != 0].float().mean())
@pytest.mark.parametrize('make', [DiceMulti, MeanIoU, lambda **k: partial(foreground_acc, **k)])
def test_pixels_without_a_class_do_not_count(make):
    holes = MASKS.clone(); holes[:, 1:3] = 255; kept = [0, 3, 4, 5]
    near(gather(make(ignore_index=255), MAPS, holes, (3,)), gather(make(), MAPS[:, :, kept], MASKS[:, kept], (3,)))
def test_all_pixels_without_a_class():
    for m in (Dice(ignore_index=255), DiceMulti(ignore_index=255), partial(foreground_acc, ignore_index=255), F1Score(axis=1, ignore_index=255)): assert np.isnan(gather(m, MAPS[:, :2], MASKS*0 + 255, (3,)))
def test_classes_that_are_nowhere():
    maps, masks = torch.zeros(2, 4, 3, 3), torch.zeros(2, 3, 3).long(); maps[:, 0] = 1; masks[0, 0, 0] = 1
    near(DiceMulti()(maps, masks), (2*17/35 + 0)/2); near(MeanIoU()(maps, masks), 17/18/2); assert np.isnan(Dice()(maps[:, :2], masks*0)) and np.isnan(per_class(DiceMulti, 'abcd')[3](maps, masks))
def test_two_class_overlap_of_more_is_refused():
    for make, other in ((Dice, 'DiceMulti'), (JaccardCoeff, 'JaccardCoeffMulti')):
        with pytest.raises(DataError, match=other): make()(MAPS, MASKS)
        with pytest.raises(DataError, match=other): make()(MAPS.argmax(1), MASKS)
    with pytest.raises(DataError, match='an output for each class on axis 1'): Dice()(MAPS[:, :1], MASKS.clamp(max=1))

# ---- as metrics -----------------------------------------------------------------------------------------------
ALL = [BalancedAccuracy(), Precision(), Recall(), F1Score(), FBeta(2), CohenKappa(), MatthewsCorrCoef(), HammingLoss(), Jaccard(), RocAuc(), RocAucBinary(), APScoreBinary(), BrierScore(), Perplexity(), ExpectedCalibrationError(),
       F1ScoreMulti(), FBetaMulti(2), PrecisionMulti(), RecallMulti(), RocAucMulti(), JaccardMulti(), HammingLossMulti(), APScoreMulti(), MatthewsCorrCoefMulti(), BrierScoreMulti(),
       R2Score(), ExplainedVariance(), PearsonCorrCoef(), SpearmanCorrCoef(), Dice(), DiceMulti(), JaccardCoeff(), JaccardCoeffMulti(), as_metric(foreground_acc)]
NAMES = ('balanced_accuracy_score precision_score recall_score f1_score fbeta_score cohen_kappa_score matthews_corrcoef hamming_loss jaccard_score roc_auc_score roc_auc_score average_precision_score brier_score_loss perplexity expected_calibration_error '
         'f1_score fbeta_score precision_score recall_score roc_auc_score jaccard_score hamming_loss average_precision_score matthews_corrcoef brier_score_loss '
         'r2_score explained_variance_score pearsonr spearmanr dice dice_multi jaccard_coeff jaccard_coeff_multi foreground_acc').split()
def test_names_are_fastais(): assert [m.name for m in ALL] == NAMES
@pytest.mark.parametrize('m', ALL, ids=NAMES)
def test_direction_reset_copies_and_nothing(m):
    assert is_lower_better(m.name) == (m.name in ('hamming_loss', 'brier_score_loss', 'perplexity', 'expected_calibration_error')); assert is_lower_better(f'valid_{m.name}') == is_lower_better(m.name)
    m.reset(); assert m.value is None
    many = type(m).__name__.endswith('Multi') and 'Coeff' not in type(m).__name__ and type(m) is not DiceMulti or type(m) is MatthewsCorrCoefMulti; axis = getattr(m, 'axis', -1)
    p, y = (MULTI, TAGS) if many else (TWO[:, 0], YES) if isinstance(m, (R2Score, ExplainedVariance, PearsonCorrCoef, SpearmanCorrCoef)) else (TWO, YES)
    if axis == 1 or m.name == 'foreground_acc': p, y = MAPS[:, :2], MASKS.clamp(max=1)
    want = gather(m, p, y, (50,)); assert np.isfinite(want)
    for o in (m, copy.deepcopy(m), *([] if m.name in ('perplexity', 'foreground_acc') else [pickle.loads(pickle.dumps(m))])): assert gather(o, p, y, (20,)) == pytest.approx(want, abs=1e-6)
    assert m(p, y) == pytest.approx(want, abs=1e-6); assert m.value is None                       # a direct call leaves nothing behind
def test_a_class_named_as_a_loss_does_not_turn_the_direction():
    for make in (F1Score, Precision, Recall, Jaccard, RocAuc, APScoreBinary, DiceMulti, MeanIoU, partial(FBeta, 2)): assert not is_lower_better(per_class(make, ['hair loss', 'mae'])[0].name)
    assert is_lower_better(per_class(BrierScore, ['good'])[0].name) and is_lower_better(per_class(HammingLossMulti, ['good'])[0].name) and is_lower_better('dice_loss')
def test_a_metric_that_was_not_called():
    with pytest.raises(TrainingError, match=r'metrics=\[F1Score\(\)\]'): gather(lambda p, t: F1Score(), TWO, YES)
    with pytest.raises(DataError, match='class F1Score'): as_metric(F1Score)
def test_scikit_learn_is_imported_only_when_a_value_is_asked_for():
    import ast, inspect
    from blocks.train import scores
    tops = {(getattr(o, 'module', None) or o.names[0].name).split('.')[0] for o in ast.parse(inspect.getsource(scores)).body if isinstance(o, (ast.Import, ast.ImportFrom))}
    assert not tops & {'sklearn', 'scipy', 'numpy', 'torchmetrics', 'pandas'} and 'torch' in tops
