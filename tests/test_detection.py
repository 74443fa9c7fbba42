"Object detection from end to end: fitted, measured, predicted in source pixels, exported"
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.ops import box_iou

from blocks.core import DataError, MissingExtraError, TrainingError, set_seed
from blocks.data.block import ImageBlock
from blocks.data.datablock import DataBlock
from blocks.data.frame import Resize
from blocks.data.label import CategoryBlock
from blocks.data.place import BBoxBlock, BBoxLblBlock, Detection
from blocks.infer.file import load_learner
from blocks.infer.predictor import Predictor
from blocks.train.detection import BoxesToModel, detection_learner, detection_loss, mAP
from blocks.train.interpret import Interpretation
from blocks.train.memory import ActivationCheckpointing, find_batch_size

ARCH = 'ssdlite320_mobilenet_v3_large'
EMPTY = 3                                                                 # this picture has no box

def scene(i):
    "A grey picture, 160 × 120, with a bright square; two kinds by brightness"
    rng = np.random.default_rng(i)
    a = rng.integers(90, 110, (120, 160, 3)).astype(np.uint8)
    if i == EMPTY: return a, ([], [])
    x, y, kind = rng.integers(5, 115), rng.integers(5, 75), i % 2
    a[y:y+40, x:x+40] = (250, 30)[kind]
    return a, ([(x, y, x+40, y+40)], [('light', 'dark')[kind]])
SCENES = [scene(i) for i in range(8)]

def loaders(blocks=None, bs=4, get_y=lambda i: SCENES[i][1], n=8):
    "`n` training items, the eight scenes again and again; each of them once for validation"
    return DataBlock(blocks or (ImageBlock(), BBoxBlock()), get_x=lambda i: SCENES[i % 8][0], get_y=lambda i: get_y(i % 8), splitter=lambda items: (list(range(8, 8+n)), list(range(8))),
                     item_tfms=Resize(64, 'squish')).dataloaders(range(8+n), bs=bs, num_workers=0, device='cpu')

def learner(dls=None, arch=ARCH, **kw):
    set_seed(0)
    learn = detection_learner(dls or loaders(), arch, pretrained=False, **{'precision': 'fp32', **kw})
    for m in learn.model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = .1
    return learn

@pytest.fixture(scope='module')
def fitted():
    "Eight pictures, learned by heart"
    learn = learner(loaders(n=120), metrics=mAP('map', 'map_50'))
    with learn.no_bar(): learn.fit_one_cycle(3, 3e-3)
    return learn

def test_losses_fall_and_the_boxes_are_found(fitted):
    losses = fitted.recorder.losses
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])/3
    scores = dict(zip(fitted.recorder.metric_names[1:-1], fitted.recorder.values[-1]))
    assert scores['mAP_50'] > .5 and scores['mAP_50'] >= scores['mAP'] and list(fitted.validate()) == pytest.approx(list(fitted.recorder.values[-1])[1:])

def test_a_loader_gives_boxes_as_the_model_sees_them(fitted):
    acts, y = fitted.get_preds()
    assert acts.shape == (8, 100, 6)
    rows = fitted.dls.targets[0].decide(acts)
    hits = [box_iou(r[r[:, 4] >= 0, :4], t[t[:, 4] >= 0, :4]).max() > .5 for r, t in zip(rows, y) if (r[:, 4] >= 0).any() and (t[:, 4] >= 0).any()]
    assert len(hits) >= 4 and np.mean(hits) > .5

@pytest.mark.skipif(not hasattr(Predictor, 'seen'), reason='the predictor does not yet send the source along')
def test_predict_gives_pixels_of_the_source(fitted):
    hits = []
    for a, (boxes, labels) in SCENES:
        found, decided, act = fitted.predict(a)
        assert decided.shape == (100, 5) and act.shape == (100, 6) and all(isinstance(o, Detection) and o.score >= .5 for o in found)
        rows = act[(act[:, 5] >= 0) & (act[:, 4] >= .5)]                  # the whole picture was squished, so the way back is plain
        assert len(rows) == len(found) and all(np.allclose(o.box, (r[:4] + 1)*torch.tensor([80, 60, 80, 60]), atol=.02) for o, r in zip(found, rows))
        if found and boxes: hits.append(box_iou(torch.tensor([o.box for o in found]), torch.tensor(np.array(boxes), dtype=torch.float32)).max() > .5)
    assert len(hits) >= 4 and np.mean(hits) > .5
    assert fitted.predict_batch([a for a, _ in SCENES], bs=3).labels == [fitted.predict(a)[0] for a, _ in SCENES]

def test_an_exported_detector_agrees_exactly(fitted, tmp_path):
    fitted.path = tmp_path
    loaded = load_learner(fitted.export())
    for a, _ in SCENES[:3]: assert torch.equal(loaded.predict(a)[2], fitted.predict(a)[2])
    assert list(loaded.vocab) == ['dark', 'light'] and loaded.target == fitted.dls.targets[0]

def test_results_are_shown(fitted):
    import matplotlib
    matplotlib.use('Agg', force=True)
    import matplotlib.pyplot as plt
    fitted.show_results(max_n=4)
    texts = [t.get_text() for ax in plt.gcf().axes for t in ax.texts]
    assert {'light', 'dark'} & set(texts) and any(t.split()[-1].startswith(('0.', '1.')) for t in texts)
    plt.close('all')

# ---- the loop --------------------------------------------------------------------------------------------------
def test_without_the_callback_the_model_has_no_boxes():
    learn = learner()
    learn.remove_cbs(BoxesToModel)
    with learn.no_bar(), pytest.raises(TrainingError, match='boxes'): learn.fit(1)

def test_one_class_without_names_and_the_pair_of_fastai():
    dls = loaders(get_y=lambda i: SCENES[i][1][0])
    learn = learner(dls)
    assert dls.vocab == ['object'] and learn.model.spec['n_out'] == 1
    with learn.no_bar(): learn.fit(1)
    assert set(learn.get_preds()[0][..., 5].unique().tolist()) <= {-1., 0.}
    data = DataBlock((ImageBlock(), BBoxBlock(), BBoxLblBlock()), get_x=lambda i: SCENES[i][0], get_y=[lambda i: SCENES[i][1][0], lambda i: SCENES[i][1][1]], n_inp=1, item_tfms=Resize(64))
    assert learner(data.dataloaders(range(8), bs=4, num_workers=0, device='cpu')).model.spec['n_out'] == 3

@pytest.mark.slow
def test_a_detector_of_two_stages_in_half_precision():
    learn = learner(arch='fasterrcnn_mobilenet_v3_large_320_fpn', anchor_scale=.5, precision='bf16', metrics=mAP())
    with learn.no_bar(): learn.fit(1, 1e-4)
    loss, score = learn.validate()
    assert np.isfinite([*learn.recorder.losses, loss]).all() and 0 <= score <= 1

def test_groups_and_freezing():
    learn = learner()
    learn.freeze()
    assert not any(p.requires_grad for p in learn.model[0].parameters() if p.ndim > 1) and all(p.requires_grad for p in learn.model[1].parameters())

def test_each_process_can_have_its_share_of_the_losses():
    rows, y = torch.rand(4, 3), torch.zeros(4, 1, 5)
    assert torch.allclose(detection_loss(rows, y), detection_loss(rows, y, reduction='none').mean()) and torch.allclose(detection_loss(rows, y), rows.sum(1).mean())
    both = torch.cat([torch.rand(4, 9, 6), rows[:, None].expand(-1, 9, -1)], -1)
    assert torch.allclose(detection_loss(both, y), detection_loss(rows, y))
    with pytest.raises(TrainingError, match='fit and validate'): detection_loss(both[..., :6], y)

def test_what_is_not_a_detection_is_refused():
    dls = loaders((ImageBlock(), CategoryBlock()), get_y=lambda i: i % 2)
    with pytest.raises(DataError, match='BBoxBlock'): detection_learner(dls, ARCH, pretrained=False)
    with pytest.raises(DataError, match='ssdlite320'): detection_learner(loaders(), 'resnet18', pretrained=False)

# ---- the metric ------------------------------------------------------------------------------------------------
def random_boxes(rng, n, k):
    a, size = rng.uniform(-1, .4, (n, k, 2)), rng.uniform(.1, .6, (n, k, 2))
    return np.concatenate([a, a+size, rng.integers(3, size=(n, k, 1))], -1)

@pytest.mark.parametrize('seed', range(3))
def test_the_metric_is_that_of_torchmetrics_in_pixels(seed):
    from torchmetrics.detection import MeanAveragePrecision
    rng = np.random.default_rng(seed)
    y = random_boxes(rng, 9, 4); y[rng.random((9, 4)) < .3] = [0, 0, 0, 0, -1]
    near = y.copy(); near[..., :4] += rng.normal(0, .04, (9, 4, 4)); near[..., 2:4] = np.maximum(near[..., 2:4], near[..., :2] + .01)
    a = np.concatenate([np.concatenate([near, random_boxes(rng, 9, 2)], 1)[..., :4], rng.random((9, 6, 1)), np.concatenate([near, random_boxes(rng, 9, 2)], 1)[..., 4:]], -1)
    y, a = (torch.tensor(o, dtype=torch.float32) for o in (y, a))
    metrics = mAP('map', 'map_50', 'map_75', 'mar_1', 'mar_10', 'mar_100')
    for _ in range(2):                                                            # once more after a reset
        for m in metrics: m.reset()
        for i in range(0, 9, 4):
            for m in metrics: m.accumulate(None, a[i:i+4], y[i:i+4])
    by_hand, px = MeanAveragePrecision(), lambda o: (o + 1)*torch.tensor([400., 300, 400, 300])
    by_hand.update([dict(boxes=px(o[k, :4]), scores=o[k, 4], labels=o[k, 5].long()) for o, k in zip(a, a[..., 5] >= 0)], [dict(boxes=px(o[k, :4]), labels=o[k, 4].long()) for o, k in zip(y, y[..., 4] >= 0)])
    want = by_hand.compute()
    for m in metrics: assert m.value == pytest.approx(want[m.what].item(), abs=1e-4)
    assert 0 < metrics[0].value < metrics[1].value < 1

def test_the_numbers_are_computed_once_and_nothing_is_nan_not_minus_one():
    metrics = mAP('map', 'map_50')
    calls, compute = [], metrics[0].state.metric.compute
    metrics[0].state.metric.compute = lambda: calls.append(1) or compute()
    for m in metrics: m.accumulate(None, torch.tensor([[[0, 0, .5, .5, .9, 0]]]), torch.tensor([[[0, 0, .5, .5, 0]]]))
    assert [m.value for m in metrics] == [1, 1] and len(calls) == 1 and [m.name for m in metrics] == ['mAP', 'mAP_50']
    for m in metrics: m.reset(); m.accumulate(None, torch.tensor([[[0, 0, 0, 0, 0, -1.]]]), torch.zeros(1, 0, 5))
    assert np.isnan(metrics[0].value)
    with pytest.raises(DataError, match='map_90'): mAP('map_90')

def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    with pytest.raises(MissingExtraError, match=r"blocks\[detection\]"): mAP()

def test_a_detector_with_little_memory_learns_the_same():
    def trained(*cbs):
        set_seed(1)
        learn = learner(precision='fp32')
        with learn.no_bar(): learn.fit(1, 1e-3, cbs=list(cbs))
        return learn.recorder.losses
    assert trained(ActivationCheckpointing()) == pytest.approx(trained(), rel=1e-4)

def test_a_batch_size_is_found_for_a_detector():
    assert 2 <= find_batch_size(learner(precision='fp32'), limit=2*2**30) <= 8

def test_what_is_said_about_a_detector(fitted, tmp_path):
    with pytest.raises(DataError, match='show_results.*mAP'): Interpretation.from_learner(fitted)
    with pytest.raises(DataError, match='show_results'): fitted.plot_prediction(SCENES[0][0])
    found = fitted.predict_batch([SCENES[0][0], SCENES[1][0]])
    found.to_csv(tmp_path/'boxes.csv')
    rows = [json.loads(o) if isinstance(o, str) else [] for o in pd.read_csv(tmp_path/'boxes.csv').prediction]
    assert [[(o['label'], tuple(o['box'])) for o in row] for row in rows] == [[(o.label, tuple(o.box)) for o in row] for row in found.labels] and any(rows)
    assert [m.name for m in learner(metrics=mAP).recorder.metrics] == [m.name for m in learner(metrics=mAP()).recorder.metrics]
