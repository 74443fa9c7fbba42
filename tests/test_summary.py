"The table of layers, and that making it changes nothing."
import pytest, torch
from torch import nn
from blocks import Learner
from blocks.train.summary import model_summary

def test_rows_and_totals(dls, tiny, tmp_path):
    learn = Learner(dls, tiny(), path=tmp_path, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters()), list(m[5].parameters())], train_bn=False)
    learn.freeze()
    s = learn.summary()
    rows = [(l.name, l.kind, l.shape, l.n_params, l.trainable) for l in s.layers]
    assert rows == [('0', 'Conv2d', (8, 8, 8), 224, 'no'), ('1', 'BatchNorm2d', (8, 8, 8), 16, 'no'), ('2', 'ReLU', (8, 8, 8), 0, ''), ('3', 'AdaptiveAvgPool2d', (8, 1, 1), 0, ''),
                    ('4', 'Flatten', (8,), 0, ''), ('5', 'Linear', (2,), 18, 'yes')]
    assert (s.n_params, s.n_trainable, s.inputs) == (258, 18, ((3, 16, 16),)) and s.n_bytes == 4*(258 + 16) + 8
    text = str(s)
    assert all(o in text for o in ('Trainable', 'MB', '8 × 8 × 8', 'Parameters:  258', 'Frozen:      240', 'first 2 frozen')) and repr(s) == text
    assert s.to_df().Parameters.sum() == 258

def test_nothing_is_touched(dls, tiny, tmp_path):
    learn = Learner(dls, tiny(), path=tmp_path)
    learn.model[1].eval()
    def state(): return ({k: v.clone() for k, v in learn.model.state_dict().items()}, [m.training for m in learn.model.modules()], torch.get_rng_state().tolist(), dls.train.epoch, learn.passes, learn.opt)
    before = state(); learn.summary(); after = state()
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0]) and before[1:] == after[1:] and not any(m._forward_hooks for m in learn.model.modules())

def test_hooks_and_modes_are_put_back_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 2))
    with pytest.raises(RuntimeError): model_summary(model, (torch.rand(2, 3, 8, 8),))
    assert model.training and not any(m._forward_hooks for m in model.modules())

def test_shared_and_uncalled_layers_are_counted_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.never, self.scale = nn.Linear(4, 4), nn.Linear(4, 1), nn.Parameter(torch.ones(4))
        def forward(self, x): return self.lin(self.lin(x))*self.scale, x
    s = model_summary(Odd(), (torch.rand(2, 4),))
    assert [(l.name, l.n_params, l.shape) for l in s.layers] == [('lin', 20, (4,)), ('lin', 0, (4,)), ('', 4, ()), ('never', 5, None)] and s.n_params == 29 and 'not called' in str(s)
