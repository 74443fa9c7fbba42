"A learner with a new head on a body: what the data decide, what the keywords change."
import numpy as np
import pytest
import torch
from torch import nn

from blocks import CategoryBlock, DataBlock, DataError, ImageBlock, Normalize, RandomSplitter, Resize, TrainingError, WeightsError, accuracy, cnn_learner, error_rate, get_image_files, mlp_head, parent_label, vision_learner
from blocks.data.place import MaskBlock
from blocks.model.head import AdaptiveConcatPool2d
from blocks.train.vision import unet_learner


def body(pretrained=False):
    "An architecture of one's own: a small fully convolutional body"
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())

def loaders(root, image=ImageBlock, **kw):
    block = DataBlock((image, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(32), **kw)
    return block.dataloaders(root, bs=8, num_workers=0, seed=1, device='cpu')

def fit(learn, *a, **kw):
    with learn.no_bar(): learn.fit(1, *a, **kw)
    return learn

def test_both_names_are_the_same_and_the_head_fits_the_data(dls):
    assert vision_learner is cnn_learner
    learn = cnn_learner(dls, body, pretrained=False, metrics=error_rate)
    assert learn.model(torch.rand(2, 3, 32, 32)).shape == (2, 2) and isinstance(learn.model[1][0], AdaptiveConcatPool2d) and learn.recorder.metric_names[3] == 'error_rate'
    assert [m.p for m in learn.model.modules() if isinstance(m, nn.Dropout)] == [.25, .5] and learn.model[1][4].out_features == 512

def test_pretrained_is_frozen_and_without_weights_it_is_not(dls, tmp_path):
    learns = lambda learn: [g[0].requires_grad for g in learn.splitter(learn.model)]
    assert learns(cnn_learner(dls, body)) == [False, False, True]         # the function takes pretrained= itself
    assert learns(cnn_learner(dls, body, pretrained=False)) == [True]*3
    torch.save(body().state_dict(), tmp_path/'w.pth')
    assert learns(cnn_learner(dls, body, pretrained=False, weights=tmp_path/'w.pth')) == [False, False, True]

def test_weights_of_a_file_are_the_ones_that_are_used(dls, tmp_path):
    want = body()
    torch.save(want.state_dict(), tmp_path/'w.pth')
    learn = cnn_learner(dls, body, weights=tmp_path/'w.pth')
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), learn.model[0].state_dict().values()))
    before = {k: v.clone() for k, v in learn.model[0].state_dict().items()}
    fit(learn, 1e-1)
    assert all(torch.equal(before[k], v) for k, v in learn.model[0].state_dict().items() if 'num_batches' not in k)     # frozen, statistics too
    with learn.no_bar(): learn.fine_tune(1, 1e-2)
    assert not torch.equal(before['0.weight'], learn.model[0][0].weight)

def test_weights_that_are_not_there(dls, tmp_path):
    with pytest.raises(WeightsError, match='none.pth'): cnn_learner(dls, body, weights=tmp_path/'none.pth')

def test_normalisation_is_done_once(two_class):
    x = torch.rand(4, 3, 32, 32)
    stats = Normalize.from_stats([.1, .2, .3], [.5, .5, .5])
    assert cnn_learner(loaders(two_class), body).model.mean is not None
    assert cnn_learner(loaders(two_class), body, normalize=False).model.mean is None
    assert cnn_learner(loaders(two_class), body, pretrained=False).model.mean is None
    assert cnn_learner(loaders(two_class, batch_tfms=stats), body).model.mean is None and x is not None

def test_grey_pictures_and_other_numbers_of_channels(two_class):
    for mode, n in (('L', 1), ('RGBA', 4)):
        learn = cnn_learner(loaders(two_class, ImageBlock(mode=mode)), body)
        assert learn.model[0][0].in_channels == n and learn.model.mean.shape == (1, n, 1, 1)
        fit(learn)

def test_what_the_keywords_change(dls, two_class):
    learn = cnn_learner(dls, body, pretrained=False, ps=.1, lin_ftrs=[7], n_out=5, opt_func='sgd', lr=.3, wd=.2, path='there', model_dir='m', precision='fp32', train_bn=True)
    assert learn.model[1][-1].out_features == 5 and learn.model[1][4].out_features == 7 and (learn.opt_func, learn.lr, learn.wd, str(learn.path), learn.model_dir, learn.train_bn) == ('sgd', .3, .2, 'there', 'm', True)
    with pytest.raises(TypeError, match='metric'): cnn_learner(dls, body, pretrained=False, metric=accuracy)
    assert cnn_learner(dls, body, pretrained=False, custom_head=mlp_head(hidden=(6, 4))).model[1][2].out_features == 6
    assert fit(cnn_learner(dls, body, pretrained=False, opt_func=torch.optim.SGD, loss_func=nn.CrossEntropyLoss())).opt.__class__ is torch.optim.SGD

def test_three_groups_take_three_rates(dls):
    learn = fit(cnn_learner(dls, body, pretrained=False), slice(1e-5, 1e-3))
    assert sorted({g['lr'] for g in learn.opt.param_groups}) == pytest.approx([1e-5, 1e-4, 1e-3])

def test_a_target_without_a_number_of_outputs_asks_for_it(two_class):
    dls = DataBlock((ImageBlock,), get_items=get_image_files, item_tfms=Resize(32)).dataloaders(two_class, bs=8, num_workers=0, device='cpu')
    with pytest.raises(DataError, match='n_out'): cnn_learner(dls, body, pretrained=False)

def test_an_input_that_is_no_image_is_an_error(two_class):
    dls = DataBlock((CategoryBlock, CategoryBlock), get_items=get_image_files, get_x=parent_label, get_y=parent_label).dataloaders(two_class, bs=8, num_workers=0, device='cpu')
    with pytest.raises(DataError, match='CategoryBlock'): cnn_learner(dls, body, pretrained=False)

def test_a_single_class_is_an_error_at_fit(tmp_path, two_class):
    with pytest.warns(UserWarning, match='cat'): dls = loaders(two_class/'cat')
    with pytest.raises(TrainingError, match='only one class'): cnn_learner(dls, body, pretrained=False).fine_tune(1)

def test_making_a_learner_is_repeatable(dls):
    def make(): torch.manual_seed(3); return cnn_learner(dls, body, pretrained=False).model.state_dict()
    a, b = make(), make()
    assert all(torch.equal(a[k], b[k]) for k in a)

# ---- a U-Net instead of a head --------------------------------------------------------------------------------
def masks(root, image=ImageBlock):
    block = DataBlock((image, MaskBlock(codes=['no', 'yes'])), get_items=get_image_files, get_y=lambda p: np.ones((32, 40), np.uint8), splitter=RandomSplitter(.25, seed=1))
    return block.dataloaders(root, bs=8, num_workers=0, seed=1, device='cpu')

def test_each_learner_names_the_other(dls, two_class):
    with pytest.raises(DataError, match='unet_learner'): cnn_learner(masks(two_class), body, pretrained=False)
    with pytest.raises(DataError, match='CategoryBlock: use cnn_learner'): unet_learner(dls, body, pretrained=False)
    inputs = DataBlock((CategoryBlock, MaskBlock(codes=['no', 'yes'])), get_items=get_image_files, get_x=parent_label, get_y=lambda p: np.ones((32, 40), np.uint8)).dataloaders(two_class, bs=8, num_workers=0, device='cpu')
    with pytest.raises(DataError, match='unet_learner needs images'): unet_learner(inputs, body, pretrained=False)

def test_what_the_keywords_of_a_unet_change(two_class):
    learn = unet_learner(masks(two_class, ImageBlock(mode='L')), body, pretrained=False, n_out=5, opt_func='sgd', lr=.3, wd=.2, train_bn=False, precision='fp32', last_cross=False, y_range=(0, 1), self_attention=True)
    out = learn.model.eval()(torch.rand(1, 1, 33, 47))
    assert out.shape == (1, 5, 33, 47) and 0 <= out.min() and out.max() <= 1 and (learn.opt_func, learn.lr, learn.wd, learn.train_bn, learn.model[1].cross) == ('sgd', .3, .2, False, None)
    with pytest.raises(TypeError, match='metric'): unet_learner(masks(two_class), body, pretrained=False, metric=accuracy)
    with pytest.raises(DataError, match='n_out'): unet_learner(DataBlock((ImageBlock,), get_items=get_image_files, item_tfms=Resize(32)).dataloaders(two_class, bs=8, num_workers=0, device='cpu'), body, pretrained=False)
    assert unet_learner(masks(two_class), body).model.mean is not None and unet_learner(masks(two_class), body, normalize=False).model.mean is None
