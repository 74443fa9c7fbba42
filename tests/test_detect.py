"torchvision's detectors as models of batches: what goes in, what comes out, what is kept"
import copy
import json
import threading

import pytest
import torch
import torchvision

from blocks.core import DataError, ExportError, TrainingError, WeightsError
from blocks.model.detect import Detector, create_detector
from blocks.model.head import build_vision_model, param_groups

SMALL, TWO_STAGES = 'ssdlite320_mobilenet_v3_large', 'fasterrcnn_mobilenet_v3_large_320_fpn'
NONE = [0., 0, 0, 0, -1]
BOXES = torch.tensor([[[-.5, -.5, 0, .5, 1], [-.2, 0, .5, .7, 0]], [NONE, NONE]])

def images(n=2, h=64, w=96, c=3): return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(0))
def made(name, n_out=2, **kw): torch.manual_seed(0); return create_detector(name, n_out, pretrained=False, **kw)

@pytest.fixture(scope='module')
def models(): return {name: made(name) for name in (SMALL, TWO_STAGES)}

@pytest.mark.parametrize('name', [SMALL, TWO_STAGES])
def test_every_output_has_the_pictures_first_and_the_form_is_fixed(models, name):
    m, x = models[name].eval(), images()
    with torch.no_grad(): found, both = m(x), m(x, BOXES)
    assert found.shape == (2, 100, 6) and both.shape[:2] == (2, 100) and torch.equal(both[..., :6], found)
    there = found[..., 5] >= 0
    assert there.any() and (found[..., :4].abs() <= 1 + 1e-5).all() and set(found[there][:, 5].tolist()) <= {0., 1.} and torch.equal(found[~there], torch.tensor([0., 0, 0, 0, 0, -1]).expand((~there).sum(), 6))
    assert (found[..., 4].diff(dim=1) <= 0).all()                                    # the best first
    losses = m.train()(x, BOXES)
    assert losses.shape == (2, both.shape[2] - 6) and losses.isfinite().all() and torch.equal(losses[0], losses[1])
    assert (both[:, :1, 6:] == both[:, :, 6:]).all() and both[..., 6:].isfinite().all()

@pytest.mark.parametrize('name', [SMALL, TWO_STAGES])
def test_a_batch_without_any_box_has_finite_losses_and_gradients(models, name):
    m, x = models[name].train(), images(h=32, w=32)
    for boxes in (torch.tensor([[NONE]]*2), torch.zeros(2, 0, 5), torch.tensor([[[.2, .3, .2, .6, 0.]]]*2)):      # none real, no rows, one without width
        losses = m(x, boxes)
        grads = torch.autograd.grad(losses.sum(1).mean(), list(m[1].parameters()), allow_unused=True)
        assert losses.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)

def test_losses_depend_on_the_boxes_and_their_classes(models):
    m, x = copy.deepcopy(models[SMALL]).eval(), images()
    for p in m[1].parameters(): torch.nn.init.normal_(p)                                  # an untrained one says the same of all classes
    other = BOXES.clone(); other[0, 0, 4] = 0
    with torch.no_grad(): a, b, c = m(x, BOXES)[:, 0, 6:], m(x, other)[:, 0, 6:], m(x, BOXES.flip(1))[:, 0, 6:]
    assert not torch.allclose(a, b) and torch.allclose(a, c)                          # the order of the rows means nothing

def test_validation_repeats_and_touches_no_random_state(models):
    m, x = models[TWO_STAGES].eval(), images()
    with torch.no_grad():
        torch.manual_seed(3); a, after = m(x, BOXES), torch.rand(1)
        b = m(x, BOXES)
        torch.manual_seed(3); assert torch.equal(after, torch.rand(1)) and torch.equal(a, b)

def test_modes_are_never_switched_and_threads_do_not_meet(models):
    m = models[TWO_STAGES].eval()
    xs = [images(1, 32, 32 + 32*(i % 2)) for i in range(4)]
    seen, wrong, out = [], [], [None]*4
    handle = m[1].roi_heads.box_head.register_forward_hook(lambda mod, *a: seen.append((mod.training, m[1].rpn.training, m[1].training)))
    with torch.no_grad():
        want = [m(x) for x in xs]
        def work(i):
            with torch.no_grad():
                out[i] = m(xs[i])
                if m(xs[i], BOXES[:1])[..., :6].ne(out[i]).any(): wrong.append(i)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
    handle.remove()
    assert not wrong and all(torch.equal(a, b) for a, b in zip(out, want)) and seen and not any(map(any, seen))

def test_training_without_boxes_is_refused(models):
    with pytest.raises(TrainingError, match='boxes'): models[SMALL].train()(images())

@pytest.mark.parametrize('name', [SMALL, TWO_STAGES])
def test_in_half_precision_losses_and_boxes_stay_in_32_bits(models, name):
    m, x = models[name], images()
    with torch.autocast('cpu', torch.bfloat16):
        losses = m.train()(x, BOXES)
        with torch.no_grad(): found = m.eval()(x)
        kind = m[0](x)
    assert losses.dtype == found.dtype == torch.float32 and next(iter(kind.values())).dtype == torch.bfloat16          # the body was in half precision
    losses.sum().backward()
    with torch.no_grad(): assert torch.allclose(losses, m.train()(x, BOXES), rtol=.2, atol=.05)

def test_the_result_is_that_of_torchvision():
    torch.manual_seed(0)
    theirs = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=200, detections_per_img=100, score_thresh=.004).eval()
    ours, x = Detector(copy.deepcopy(theirs), mean=theirs.transform.image_mean, std=theirs.transform.image_std).eval(), images()
    with torch.no_grad(): got, want = ours(x), theirs(list(x))
    assert any((o['labels'] > 0).any() for o in want)
    for g, o in zip(got, want):
        real, g = o['labels'] > 0, g[g[:, 5] >= 0]
        assert torch.allclose((g[:, :4] + 1)*torch.tensor([48, 32, 48, 32]), o['boxes'][real], atol=1e-2) and torch.allclose(g[:, 4], o['scores'][real], atol=1e-5) and torch.equal(g[:, 5].long() + 1, o['labels'][real])

@pytest.mark.parametrize('kw', [dict(name=SMALL, n_out=1), dict(name=SMALL, n_in=1, normalize=False, max_boxes=7), dict(name=TWO_STAGES, anchor_scale=.25, n_in=4)], ids=str)
def test_the_spec_is_plain_and_enough(kw):
    m, x = made(**kw).eval(), images(c=kw.get('n_in', 3))
    back = build_vision_model(json.loads(json.dumps(m.spec))).eval()
    back.load_state_dict(m.state_dict())
    with torch.no_grad(): assert torch.equal(back(x), m(x)) and m(x).shape == (2, kw.get('max_boxes', 100), 6)
    assert (m.mean is None) == (kw.get('normalize') is False)
    with pytest.raises(ExportError): build_vision_model({k: v for k, v in m.spec.items() if k != 'head'})

def test_groups_are_the_body_and_what_comes_behind(models):
    m = models[TWO_STAGES]
    groups = param_groups(m)
    ids = [{id(p) for p in g} for g in groups]
    assert sum(map(len, groups)) == len(list(m.parameters())) == len(set.union(*ids))
    assert set.union(*ids[:-1]) == {id(p) for p in m[0].parameters()} and {id(p) for p in m[1].parameters()} == ids[-1]

def test_smaller_anchors():
    big, small = (made(TWO_STAGES, anchor_scale=s)[1].rpn.anchor_generator for s in (1, .25))
    assert small.sizes[0] == (8, 16, 32, 64, 128) and small.num_anchors_per_location() == big.num_anchors_per_location()
    with pytest.raises(DataError, match='share'): made(SMALL, anchor_scale=.5)

# ---- weights ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    "Weights of 91 classes, as torchvision publishes them: of frozen normalisation layers"
    torch.manual_seed(1)
    net = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=91)
    path = tmp_path_factory.mktemp('weights')/'coco.pth'
    torch.save({k: v for k, v in net.state_dict().items() if not k.endswith('num_batches_tracked')}, path)
    return path

def test_weights_of_other_classes_fill_all_but_what_names_classes(coco):
    m, state = create_detector(TWO_STAGES, 2, weights=coco), torch.load(coco)
    assert all(torch.equal(v, state['backbone.body.' + k]) for k, v in m[0].state_dict().items())
    new = {k for k, v in m[1].state_dict().items() if state[k].shape != v.shape}
    assert new == {f'roi_heads.box_predictor.{k}.{o}' for k in ('cls_score', 'bbox_pred') for o in ('weight', 'bias')} and all(torch.equal(v, state[k]) for k, v in m[1].state_dict().items() if k not in new)
    assert {type(o).__name__ for o in m[0].modules() if 'BatchNorm' in type(o).__name__} == {'FrozenBatchNorm2d'}
    assert torch.equal(create_detector(TWO_STAGES, 90, weights=coco)[1].roi_heads.box_predictor.cls_score.weight, state['roi_heads.box_predictor.cls_score.weight'])
    back = build_vision_model(m.spec); back.load_state_dict(m.state_dict())
    with torch.no_grad(): assert torch.equal(back.eval()(images()), m.eval()(images()))

def test_grey_pictures_keep_what_the_first_layer_learned(coco):
    m, w = create_detector(TWO_STAGES, 2, weights=coco, n_in=1), torch.load(coco)['backbone.body.0.0.weight']
    assert torch.allclose(m[0]['0'][0].weight, w.sum(1, keepdim=True)) and m.mean.numel() == 1

def test_older_names_of_layers_are_known(coco, tmp_path):
    old = {k.replace('.0.0.', '.0.') if 'fpn' in k or 'rpn.head.conv' in k else k: v for k, v in torch.load(coco).items()}
    old = {k.replace('rpn.head.conv.0.', 'rpn.head.conv.'): v for k, v in old.items()}
    old = {k.replace('inner_blocks.1.0.', 'inner_blocks.1.').replace('layer_blocks.1.0.', 'layer_blocks.1.'): v for k, v in old.items()}
    assert old.keys() != torch.load(coco).keys()
    torch.save(old, tmp_path/'old.pth')
    a, b = (create_detector(TWO_STAGES, 2, weights=p)[1].state_dict() for p in (coco, tmp_path/'old.pth'))
    assert all(torch.equal(v, b[k]) for k, v in a.items() if 'box_predictor' not in k)

def test_weights_saved_from_a_detector_fill_one_of_other_classes(models, tmp_path):
    torch.save(dict(model=models[SMALL].state_dict(), opt=None), tmp_path/'own.pth')
    m = create_detector(SMALL, 5, weights=tmp_path/'own.pth')
    assert all(torch.equal(v, models[SMALL][0].state_dict()[k]) for k, v in m[0].state_dict().items()) and type(m[0].features[0][0][1]).__name__ == 'BatchNorm2d'

def test_weights_that_do_not_fit_are_told(coco, tmp_path):
    torch.save(torchvision.models.mobilenet_v3_large().state_dict(), tmp_path/'classifier.pth')
    with pytest.raises(WeightsError, match='do not fit'): create_detector(SMALL, 2, weights=coco)
    with pytest.raises(WeightsError, match='do not fit'): create_detector(TWO_STAGES, 2, weights=tmp_path/'classifier.pth')
    with pytest.raises(WeightsError, match='no such file'): create_detector(TWO_STAGES, 2, weights=tmp_path/'none.pth')
    with pytest.raises(WeightsError, match='weights_backbone'): create_detector(SMALL, 2, pretrained=False, weights_backbone=tmp_path/'classifier.pth')
    m = create_detector(TWO_STAGES, 2, pretrained=False, weights_backbone=tmp_path/'classifier.pth')
    assert torch.equal(m[0]['0'][0].weight, torch.load(tmp_path/'classifier.pth')['features.0.0.weight'])

def test_weights_that_cannot_be_had_say_where_to_put_them(monkeypatch, tmp_path):
    def no_network(*a, **k): raise OSError('no network')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(WeightsError, match=r'ssdlite320_mobilenet_v3_large_coco-a79551df\.pth(.|\n)*weights=PATH(.|\n)*pretrained=False'): create_detector(SMALL, 2)

def test_names_are_those_of_torchvision():
    assert made(torchvision.models.detection.ssdlite320_mobilenet_v3_large).spec['arch'] == SMALL
    for arch in ('resnet50', 'maskrcnn_resnet50_fpn', lambda: None):
        with pytest.raises(DataError, match='retinanet_resnet50_fpn'): made(arch)
    with pytest.raises(DataError, match='n_out'): made(SMALL, n_out=0)
