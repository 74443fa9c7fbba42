"Which layers learn in which epoch."
import pytest, torch
from torch import nn
from blocks import Callback, Learner, TrainingError

@pytest.fixture
def make(dls, tmp_path):
    "A learner with a body of two stages (conv, norm, ReLU each) and a head"
    def make(train_bn=False, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())], **kw):
        torch.manual_seed(0)
        stage = lambda i, o: [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
        model = nn.Sequential(nn.Sequential(*stage(3, 4), *stage(4, 4)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
        learn = Learner(dls, model, path=tmp_path, train_bn=train_bn, splitter=splitter, **kw)
        learn.remove_cbs(learn.progress)
        return learn
    return make

class Watch(Callback):
    "The parameters that changed in each epoch"
    def before_fit(self): self.moved = []
    def before_train(self): self.was = {k: p.detach().clone() for k, p in self.learn.model.named_parameters()}
    def after_train(self): self.moved.append({k for k, p in self.learn.model.named_parameters() if not torch.equal(p, self.was[k])})

HEAD = {'1.2.weight', '1.2.bias'}
LAST = HEAD | {'0.3.weight', '0.3.bias', '0.4.weight', '0.4.bias'}
ALL = LAST | {'0.0.weight', '0.0.bias', '0.1.weight', '0.1.bias'}

@pytest.mark.parametrize('strategy,want', [('freeze', [HEAD]*3), ('no_freeze', [ALL]*3), (('freeze_unfreeze', 1), [HEAD, ALL, ALL]), (['freeze_unfreeze', 0], [ALL]*3),
    (('unfreeze_milestones', ((1, 2), 2)), [HEAD, LAST, ALL]),                     # conv and norm of the last stage
    (('unfreeze_milestones', ((0, 1), 2)), [LAST, ALL, ALL]),
    (('unfreeze_milestones', ((1, 2), 3)), [HEAD, LAST, ALL]),                     # the activation before them counts as a layer
    (('unfreeze_milestones', ((1, 2), 100)), [HEAD, ALL, ALL])])
def test_what_learns_in_which_epoch(make, strategy, want):
    for fit in ('fit', 'fit_one_cycle', 'fit_flat_cos'):
        learn = make(wd=.1)
        getattr(learn, fit)(3, 1e-2, strategy=strategy, cbs=(watch := Watch()))
        assert [o - {'0.0.bias', '0.3.bias'} for o in watch.moved] == [o - {'0.0.bias', '0.3.bias'} for o in want]      # a bias before a norm has no gradient to speak of

def test_fine_tune_under_a_strategy_takes_the_epochs_alone(make):
    learn, watch = make(), Watch()
    learn.fine_tune(3, strategy=('freeze_unfreeze', 2), cbs=watch)
    assert len(watch.moved) == 3 and watch.moved[0] == watch.moved[1] == HEAD and watch.moved[2] > LAST - {'0.3.bias'}

def test_milestones_of_a_fit_begin_anew_and_what_was_reached_stays(make):
    learn, watch = make(), Watch()
    for _ in range(2):
        learn.fit(2, 1e-2, strategy=('freeze_unfreeze', 1), cbs=watch)
        assert watch.moved[0] == HEAD and learn.frozen == 0
    learn.fit(1, 1e-2, cbs=watch); assert watch.moved[0] > HEAD
    learn.fit(1, 1e-2, strategy='freeze'); learn.fit(1, 1e-2, cbs=watch); assert watch.moved[0] == HEAD

def test_norms_of_a_frozen_body_follow_train_bn(make):
    learn, watch = make(train_bn=True), Watch()
    learn.fit(1, 1e-2, strategy='freeze', cbs=watch)
    assert watch.moved[0] == HEAD | {'0.1.weight', '0.1.bias', '0.4.weight', '0.4.bias'}

@pytest.mark.parametrize('wrong', ['freezed', '', 3, ('freeze',), ('freeze_unfreeze',), ('freeze_unfreeze', '1'), ('freeze_unfreeze', -1), ('freeze_unfreeze', True), ('freeze_unfreeze', 1.),
    ('unfreeze_milestones', (1, 2), 3), ('unfreeze_milestones', ((2, 1), 3)), ('unfreeze_milestones', ((1, 2), 0)), ('unfreeze_milestones', (1, 2)), {'freeze_unfreeze': 1}])
def test_other_notations_are_quoted_with_the_forms(make, wrong):
    learn = make()
    for fit in (learn.fit, learn.fit_one_cycle, learn.fine_tune):
        with pytest.raises(TrainingError) as e: fit(2, strategy=wrong)
        assert repr(wrong) in str(e.value) and all(o in str(e.value) for o in ("'freeze'", "'no_freeze'", "('freeze_unfreeze', epoch)", "('unfreeze_milestones', ((epoch_1, epoch_2), n_last_layers))"))
    assert learn.opt is None and all(p.requires_grad for p in learn.model.parameters())

def test_a_model_without_a_body_is_an_error(make):
    learn = make(splitter=lambda m: [list(m.parameters())])
    with pytest.raises(TrainingError, match='splitter'): learn.fit(1, strategy='freeze')
    learn.fit(1, strategy='no_freeze')

def test_an_epoch_beyond_the_fit_is_told(make):
    with pytest.warns(UserWarning, match='epoch 5, and the fit has 2'): make().fit(2, strategy=('freeze_unfreeze', 5))
