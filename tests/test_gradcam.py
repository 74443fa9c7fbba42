"The map lies where the evidence is, and the model does not notice that it was asked."
import threading

import matplotlib
import pytest
import torch
from torch import nn

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from blocks import DataError, Learner, create_body, get_image_files
from blocks.model.head import create_vision_model
from blocks.train.gradcam import grad_cam, plot_gradcam


def spot_model():
    "Class 0 likes what is bright, class 1 what is dark; nothing to train"
    m = nn.Sequential(nn.Conv2d(1, 2, 4, 4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        m[0].weight[0], m[0].weight[1] = 1/16, -1/16
        m[0].bias.copy_(torch.tensor([-.5, .5])); m[4].weight.copy_(torch.tensor([[1., -1.], [-1., 1.]])); m[4].bias.zero_()
    return m

def spots():
    "A bright and a dark square, in different places of each picture"
    x = torch.full((2, 1, 32, 32), .5)
    x[0, :, 4:8, 4:8] = x[1, :, 24:28, 4:8] = 1
    x[0, :, 24:28, 24:28] = x[1, :, 4:8, 24:28] = .1
    return x

def centre(cam):
    at = torch.arange(cam.shape[-1]) + .5
    return torch.stack([(cam.sum(2)*at).sum(1), (cam.sum(1)*at).sum(1)], 1)/cam.sum((1, 2))[:, None]

def resnet(frozen=True):
    m = create_vision_model('resnet18', 3, pretrained=False)
    for p in m.parameters(): p.requires_grad_(not frozen)
    return m

def test_the_centre_of_the_map_lies_on_what_decides():
    x = spots()
    for index, places in ((0, [(6, 6), (26, 6)]), (1, [(26, 26), (6, 26)])):
        assert torch.allclose(centre(grad_cam(spot_model(), x, index)), torch.tensor(places).float(), atol=.6)
    mixed = grad_cam(spot_model(), x, [1, 0])
    assert torch.equal(mixed[0], grad_cam(spot_model(), x, 1)[0]) and torch.equal(mixed[1], grad_cam(spot_model(), x, 0)[1])
    assert torch.equal(grad_cam(spot_model(), x), grad_cam(spot_model(), x, spot_model()(x).argmax(1)))

def test_a_map_goes_from_zero_to_one_and_has_the_size_of_the_picture():
    cam = grad_cam(spot_model(), torch.cat([spots(), torch.full((1, 1, 32, 32), .5)])[..., :20], 0)
    assert cam.shape == (3, 32, 20) and cam.dtype == torch.float32 and cam.min() == 0 and cam[:2].amax((1, 2)).tolist() == [1, 1]
    assert cam[2].abs().max() == 0                                        # nothing there, and no NaN
    assert not cam.requires_grad

@pytest.mark.parametrize('frozen', [True, False])
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_stays_as_it_is(frozen, mode):
    m, state = resnet(frozen), torch.random.get_rng_state()
    m.train(); m[1].eval()
    m[0][0].weight.grad = kept = torch.ones_like(m[0][0].weight)
    before, modes = {k: v.clone() for k, v in m.state_dict().items()}, [o.training for o in m.modules()]
    with mode():
        cam = grad_cam(m, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert cam.shape == (2, 64, 64) and cam.max() <= 1
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and [o.training for o in m.modules()] == modes
    assert m[0][0].weight.grad is kept and all(p.grad is None for p in m.parameters() if p is not m[0][0].weight)
    assert all(p.requires_grad != frozen for p in m.parameters()) and not any(o._forward_hooks for o in m.modules())
    assert torch.equal(state, torch.random.get_rng_state())

def test_evaluation_mode_is_used():
    m = resnet().train()
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(grad_cam(m, x, 0)[:1], grad_cam(m, x[:1], 0), atol=1e-4)        # in training mode the batch would matter

class Broken(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.other = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 1, 1)
    def forward(self, x): self.conv(x); raise RuntimeError('broken head')

def test_hooks_and_modes_are_put_back_after_an_error():
    m = Broken().train()
    for layer in (None, 'conv'):
        with pytest.raises(RuntimeError, match='broken head'): grad_cam(m, torch.rand(1, 1, 8, 8), layer=layer)
        assert m.training and not any(o._forward_hooks for o in m.modules())

@pytest.mark.parametrize('make', [lambda: create_vision_model('resnet18', 4, pretrained=False, n_in=1), lambda: create_vision_model('mobilenetv3_small_050', 4, pretrained=False, n_in=1),
                                  lambda: nn.Sequential(create_body('resnet18', n_in=1, pretrained=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 4)), lambda: nn.Sequential(spot_model(), nn.Linear(2, 1), nn.Flatten(0))])
def test_the_layer_is_found_in(make): assert grad_cam(make(), torch.rand(2, 1, 64, 64)).shape == (2, 64, 64)

def test_the_last_layer_with_places_is_taken_and_another_can_be_named():
    m, x = spot_model(), spots()
    assert torch.equal(grad_cam(m, x, 0), grad_cam(m, x, 0, layer=m[1])) and torch.equal(grad_cam(m, x, 0), grad_cam(m, x, 0, layer='1'))
    pooled = grad_cam(m, x, 0, layer='2')                                 # one place for the whole picture
    assert pooled.min() > .999
    big, x = resnet(), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grad_cam(big, x, 0), grad_cam(big, x, 0, layer=big[0])) and torch.equal(grad_cam(big, x, 0, layer=big[0][4]), grad_cam(big, x, 0, layer='0.4'))

@pytest.mark.parametrize('kw, match', [(dict(index=2), 'from 0 to 1'), (dict(index=-1), 'from 0 to 1'), (dict(index=[0, 1, 0]), 'each of the 2'), (dict(index=.5), 'index='), (dict(layer='7'), 'no such part'),
                                       (dict(layer=nn.ReLU()), 'not part of it'), (dict(layer='4'), 'shape')])
def test_what_cannot_be_explained_is_said(kw, match):
    with pytest.raises(DataError, match=match): grad_cam(spot_model(), spots(), **kw)

def test_other_models_are_refused():
    with pytest.raises(DataError, match='needs a layer'): grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(1024, 2)), spots())
    with pytest.raises(DataError, match='whole picture'): grad_cam(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), spots())

def test_other_threads_may_use_the_model_meanwhile():
    m, x, seen = spot_model().eval(), spots(), []
    def other():
        with torch.inference_mode(): seen.append(m(x))
    class Pool(nn.AdaptiveAvgPool2d):
        def forward(self, x):
            t = threading.Thread(target=other) if threading.current_thread() is threading.main_thread() else None
            if t: t.start(); t.join()
            return super().forward(x)
    m[2] = Pool(1)
    cam = grad_cam(m, x, 0)
    assert torch.equal(cam, grad_cam(spot_model(), x, 0)) and len(seen) == 2 and torch.allclose(seen[0], spot_model()(x))

def test_pictures_with_label_and_probability(dls, tiny, two_class):
    learn, files = Learner(dls, tiny()), get_image_files(two_class)[:3]
    learn.model.train()
    probs = learn.predict_batch(files).probs
    axs = plot_gradcam(learn, files)
    assert [a.get_title() for a in axs[1::2]] == [f'{dls.vocab[int(p.argmax())]} {p.max():.2f}' for p in probs] and learn.model.training
    assert [len(a.images) for a in axs] == [1, 2]*3
    named = plot_gradcam(learn.predictor, files[0], label='dog')
    assert named[1].get_title() == f'dog {probs[0, 1]:.2f}' and len(named) == 2
    with pytest.raises(DataError, match='wolf'): plot_gradcam(learn, files, label='wolf')
    with pytest.raises(DataError, match='no item'): plot_gradcam(learn, [])
    plt.close('all')
