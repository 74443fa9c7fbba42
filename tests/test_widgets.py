"Widgets without a browser: values are set and buttons clicked as a hand would."
import datetime, io, shutil, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip('ipywidgets')
import ipywidgets as W

from blocks.app import widgets as module
from blocks.app.widgets import ImageClassifierCleaner, app
from blocks.core import DataError, MissingExtraError
from blocks.data.block import ImageBlock
from blocks.data.datablock import DataBlock
from blocks.data.frame import Resize
from blocks.data.label import CategoryBlock, MultiCategoryBlock, RegressionBlock
from blocks.data.place import BBoxBlock, MaskBlock, PointBlock
from blocks.data.source import RandomSplitter, get_image_files, parent_label
from blocks.infer.pipeline import Pipeline
from blocks.infer.predictor import Predictor
from blocks.train.learner import Learner


def png(colour=(200, 40, 40), size=(40, 32), **kw):
    file = io.BytesIO(); Image.new('RGB', size, colour).save(file, 'PNG', **kw)
    return file.getvalue()

def chosen(*files): return tuple(dict(name=name, type='', size=len(o), content=memoryview(o), last_modified=datetime.datetime.now()) for name, o in files)

class Driven:
    "The parts of an app, and what it shows"
    def __init__(self, box): self.box, (self.upload, self.clear), self.answers = box, box.children[0].children, box.children[1]
    def give(self, *files): self.upload.value = chosen(*files); return self
    @property
    def texts(self): return [card.children[-1].value for card in self.answers.children]
    def picture(self, i=0): return Image.open(io.BytesIO(self.answers.children[i].children[0].value))

class Constant(nn.Module):
    "A model that always says the same"
    def __init__(self, out): super().__init__(); self.out = torch.tensor(out)
    def forward(self, x): return self.out.expand(len(x), *self.out.shape)

def predictor(out, target): return Predictor(Constant(out), (ImageBlock(), target), geometries=(Resize(16, 'squish'),))

@pytest.fixture
def classes(): return predictor([0., 2., 1., -3., -1., -2.], CategoryBlock(vocab=['ant', 'bee', 'cat', 'dog', 'eel', 'fox']))


# The app

def test_pictures_get_a_label_and_the_five_likeliest_classes(classes):
    a = Driven(app(classes)).give(('one.png', png()), ('two.png', png()))
    assert isinstance(a.box, W.VBox) and len(a.texts) == 2 and [t.split('<br>')[0] for t in a.texts] == ['one.png', 'two.png']
    label, _, probs = classes.predict(png())
    said = a.texts[0]
    assert f'<b>{label}</b>' in said and f'{float(probs.max()):.1%}' in said and [said.index(f'>{o}</span>') for o in ('bee', 'cat', 'ant', 'eel', 'fox')] == sorted(said.index(f'>{o}</span>') for o in ('bee', 'cat', 'ant', 'eel', 'fox'))
    assert 'dog' not in said and a.picture().size == (40, 32)

def test_the_newest_come_first_and_the_button_clears(classes):
    a = Driven(app(classes)).give(('one.png', png()))
    assert a.upload.value == ()                                          # the same file can be chosen once more
    a.give(('one.png', png())).give(('two.png', png()), ('three.png', png()))
    assert [t.split('<br>')[0] for t in a.texts] == ['two.png', 'three.png', 'one.png', 'one.png']
    a.clear.click()
    assert a.texts == []
    assert len(a.give(('four.png', png())).texts) == 1

def test_a_bad_file_says_so_in_plain_words_and_stops_nothing(classes):
    bad = [('notes.txt', b'hello'), ('cut.png', png(size=(200, 200))[:60]), ('empty.png', b'')]
    a = Driven(app(classes)).give(('good.png', png()), *bad, ('good2.png', png()))
    assert ['bee' in t for t in a.texts] == [True, False, False, False, True]
    for t in a.texts[1:4]: assert 'd55e00' in t and '0x' not in t and 'Error' not in t and "b'" not in t
    assert 'not a picture' in a.texts[1]

def test_an_unexpected_error_is_shown(classes, monkeypatch):
    def broken(*args, **kw): raise RuntimeError('out of memory')
    monkeypatch.setattr(Predictor, 'predict_samples', broken)
    assert 'out of memory' in Driven(app(classes)).give(('a.png', png())).texts[0]

def test_names_cannot_become_a_part_of_the_page():
    evil = '<script>alert(1)</script>'
    p = predictor([3., 0.], CategoryBlock(vocab=[evil, 'b']))
    for box in (app(p), app(None, Pipeline(lambda im: [((0, 0, 20, 20), 1.)], p))):
        for name, content in ((evil, png()), (evil, b'x')):
            assert '<script' not in Driven(box).give((name, content)).texts[0]

def test_a_learner_as_it_is_now(dls, tiny):
    learn = Learner(dls, tiny(2))
    a, labels = Driven(app(learn)), []
    for bias in ([9., 0.], [0., 9.]):
        learn.model.load_state_dict({**learn.model.state_dict(), '5.bias': torch.tensor(bias)})
        labels.append('<b>cat</b>' in a.give(('a.png', png())).texts[0])
    assert labels == [True, False]

def test_every_kind_of_answer():
    grey = lambda p: Driven(app(p)).give(('a.png', png((90, 90, 90), (64, 64))))
    assert '<b>sun, sea</b>' in grey(predictor([5., -5., 5.], MultiCategoryBlock(vocab=['sun', 'ice', 'sea']))).texts[0]
    assert 'none of the labels' in grey(predictor([-5., -5.], MultiCategoryBlock(vocab=['sun', 'ice']))).texts[0]
    assert '<b>3.25</b>' in grey(predictor([3.25], RegressionBlock())).texts[0]
    mask = torch.zeros(2, 16, 16); mask[1, :4] = 5; mask[0, 4:] = 5
    said = grey(predictor(mask.tolist(), MaskBlock(codes=['land', 'sky']))).texts[0]
    assert 'sky' in said and '25.0%' in said and '75.0%' in said
    boxes = grey(predictor([[-1., -1, 0, 0, .8, 1], [0, 0, 1, 1, .1, 0]], BBoxBlock(vocab=['hand', 'face'])))
    assert 'face 80%' in boxes.texts[0] and 'hand' not in boxes.texts[0] and np.asarray(boxes.picture()).std() > 5       # the box is drawn
    nothing = grey(predictor([[-1., -1, 0, 0, .1, 1]], BBoxBlock(vocab=['hand', 'face'])))
    assert 'nothing found' in nothing.texts[0] and np.asarray(nothing.picture()).std() < 1
    points = grey(predictor([[0., 0.]], PointBlock(n_points=1)))
    assert '32.0, 32.0' in points.texts[0] and np.asarray(points.picture())[32, 32, 0] > 150

def test_pictures_are_shown_upright_and_small(classes):
    exif = Image.Exif(); exif[0x0112] = 6
    assert Driven(app(classes)).give(('a.png', png(size=(900, 600), exif=exif))).picture().size == (213, 320)

def test_a_pipeline_shows_its_picture_and_its_counts(classes):
    pipeline = Pipeline(lambda im: [((0, 0, 20, 20), 1.), ((20, 0, 40, 20), .9)]*(im.size == (40, 32)), classes)
    a = Driven(app(None, pipeline)).give(('a.png', png()), ('none.png', png(size=(8, 8))), ('bad.png', b'no'))
    assert '<b>2</b> bee' in a.texts[0] and 'nothing found' in a.texts[1] and 'not a picture' in a.texts[2]
    assert np.asarray(a.picture()).tolist() != np.asarray(Image.new('RGB', (40, 32), (200, 40, 40))).tolist()

def test_a_model_of_two_inputs_is_refused(classes):
    two = Predictor(classes.model, (ImageBlock(), ImageBlock(), classes.target), n_inp=2, geometries=(Resize(16),))
    with pytest.raises(DataError, match='2 inputs'): app(two)

def test_without_ipywidgets(classes, dls, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    for make in (lambda: app(classes), lambda: ImageClassifierCleaner(Learner(dls, tiny(2)))):
        with pytest.raises(MissingExtraError, match=r'blocks\[widgets\]'): make()


# The cleaner

@pytest.fixture
def root(two_class, tmp_path):
    "A copy of the two classes that may be changed"
    return Path(shutil.copytree(two_class, tmp_path/'two'))

def learner(root, tiny, get_y=parent_label):
    learn = Learner(DataBlock(get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(.5, seed=1), item_tfms=Resize(16)).dataloaders(root, bs=8, num_workers=0, seed=1, device='cpu'), tiny(2))
    learn.remove_cbs(learn.progress)
    return learn

@pytest.fixture
def learn(root, tiny): return learner(root, tiny)

@pytest.fixture
def cleaner(learn): return ImageClassifierCleaner(learn, max_n=5)

def choose(cleaner, k, value): cleaner.grid.children[k].children[2].value = value

def test_the_largest_losses_of_a_class_come_first(learn, cleaner):
    for split in ('valid', 'train'):
        dl = learn.dls.parts[split].in_order()
        _, targs, losses = learn.get_preds(dl=dl, with_loss=True)
        for k, label in enumerate(learn.dls.vocab):
            cleaner.split.value, cleaner.category.value = split, label
            worst = sorted((-float(losses[i]), i) for i in range(len(targs)) if targs[i] == k)[:5]
            assert cleaner.fns == [dl.samples.fields[0][i] for _, i in worst] and len(cleaner.grid.children) == 5
            assert f'loss {-worst[0][0]:.2f}' in cleaner.grid.children[0].children[1].value
            assert {o.parent.name for o in cleaner.fns} == {label}

def test_the_choices_are_keep_delete_and_the_other_classes(learn):
    c = ImageClassifierCleaner(learn, opts=('unsure',), height=20, width=30, max_n=1000)
    assert c.split.options == ('train', 'valid') and [o for _, o in c.category.options] == ['cat', 'dog'] and c.split.value == 'valid'
    assert len(c.fns) == sum(1 for o in learn.dls.valid_ds.fields[1] if o == 'cat')
    picture, _, choice = c.grid.children[0].children
    assert [o for _, o in choice.options] == ['<Keep>', '<Delete>', 'dog', 'unsure'] and choice.value == '<Keep>'
    assert Image.open(io.BytesIO(picture.value)).size == (25, 20) and (picture.layout.height, picture.layout.width) == ('20px', '30px')

def test_positions_follow_what_is_shown(cleaner):
    assert (cleaner.delete(), cleaner.change()) == ([], [])
    choose(cleaner, 1, '<Delete>'); choose(cleaner, 3, 'dog'); choose(cleaner, 4, '<Delete>'); choose(cleaner, 4, '<Keep>')
    assert (cleaner.delete(), cleaner.change()) == ([1], [(3, 'dog')]) and cleaner.values() == ['<Keep>', '<Delete>', '<Keep>', 'dog', '<Keep>']

def test_choices_outlive_a_look_at_something_else(cleaner):
    first = cleaner.fns
    choose(cleaner, 1, '<Delete>')
    cleaner.category.value = 'dog'
    assert cleaner.delete() == []
    choose(cleaner, 0, 'cat'); dog = cleaner.fns[0]
    cleaner.split.value = 'train'
    assert cleaner.delete() == cleaner.change() == []
    cleaner.split.value, cleaner.category.value = 'valid', 'cat'
    assert cleaner.fns == first and cleaner.delete() == [1] and cleaner.grid.children[1].children[2].value == '<Delete>'
    assert {tuple(o) for o in cleaner.to_df().itertuples(index=False)} == {(str(first[1]), 'delete', 'cat'), (str(dog), 'change', 'cat')}

def test_the_table_touches_no_file(cleaner, root, tmp_path):
    choose(cleaner, 0, '<Delete>'); choose(cleaner, 1, 'dog')
    before = get_image_files(root)
    table = pd.read_csv(cleaner.to_csv(tmp_path/'t.csv'))
    assert list(table) == ['file', 'action', 'label'] and sorted(table.action) == ['change', 'delete'] and list(get_image_files(root)) == list(before)
    assert pd.read_csv(ImageClassifierCleaner(cleaner.learn).to_csv(tmp_path/'none.csv')).empty

def test_apply_moves_and_never_removes(cleaner, root):
    away, changed = cleaner.fns[0], cleaner.fns[2]
    shutil.copy(away, root/'dog'/changed.name)                           # a file of that name is there already
    before = {o.read_bytes() for o in root.rglob('*.png')}
    choose(cleaner, 0, '<Delete>'); choose(cleaner, 2, 'dog')
    moved = dict(cleaner.apply())
    assert moved == {away: root/'.deleted'/'cat'/away.name, changed: root/'dog'/f'{changed.stem}_1.png'}
    assert {o.read_bytes() for o in root.rglob('*.png')} == before and not away.exists() and not changed.exists()
    assert away.name not in {o.name for o in get_image_files(root)} and parent_label(moved[changed]) == 'dog'
    assert not {away, changed} & set(cleaner.fns) and cleaner.values() == ['<Keep>']*5 and cleaner.apply() == [] and cleaner.to_df().empty

def test_another_folder_for_what_is_deleted(cleaner, tmp_path):
    away = cleaner.fns[1]
    choose(cleaner, 1, '<Delete>')
    assert cleaner.apply(trash=tmp_path/'bin') == [(away, tmp_path/'bin'/'cat'/away.name)] and (tmp_path/'bin'/'cat'/away.name).is_file()

def test_further_choices_are_left_alone(learn):
    c = ImageClassifierCleaner(learn, opts=['unsure'])
    choose(c, 0, 'unsure')
    assert c.change() == [(0, 'unsure')] and c.apply() == [] and c.change() == [(0, 'unsure')] and list(c.to_df().label) == ['unsure']

def test_labels_that_are_not_folders_are_not_moved(root, tiny):
    c = ImageClassifierCleaner(learner(root, tiny, get_y=lambda o: 'even' if int(o.stem.split('_')[1])%2 == 0 else 'odd'))
    choose(c, 0, 'odd'); choose(c, 1, '<Delete>')
    before = list(root.rglob('*'))
    with pytest.raises(DataError, match='to_csv'): c.apply()
    assert list(root.rglob('*')) == before and len(c.to_df()) == 2

def test_a_file_that_went_away_stops_before_anything_is_moved(cleaner, root):
    choose(cleaner, 0, 'dog'); choose(cleaner, 1, '<Delete>')
    cleaner.fns[1].unlink()
    before = sorted(root.rglob('*'))
    with pytest.raises(DataError, match='not there any more'): cleaner.apply()
    assert sorted(root.rglob('*')) == before and len(cleaner.to_df()) == 2

def test_a_picture_that_cannot_be_read_is_said_in_its_place(cleaner):
    cleaner.fns[0].write_bytes(b'broken')
    cleaner.category.value = 'dog'; cleaner.category.value = 'cat'
    assert 'not a picture' in cleaner.grid.children[0].children[0].value and isinstance(cleaner.grid.children[1].children[0], W.Image)

def test_items_that_are_no_files(tiny):
    pictures = [Image.new('RGB', (20, 20), (200, 20*i, 0)) for i in range(8)]
    learn = Learner(DataBlock(get_x=pictures.__getitem__, get_y=lambda i: 'ab'[i%2], splitter=RandomSplitter(.5, seed=0), item_tfms=Resize(16)).dataloaders(range(8), bs=2, num_workers=0, device='cpu'), tiny(2))
    c = ImageClassifierCleaner(learn)
    assert c.fns and all(o in pictures for o in c.fns)
    choose(c, 0, '<Delete>')
    with pytest.raises(DataError, match='to_csv'): c.apply()
    assert len(c.to_df()) == 1

def test_training_items_are_looked_at_only_when_asked_for(learn, monkeypatch):
    asked, own = [], module.ClassificationInterpretation.from_learner
    monkeypatch.setattr(module.ClassificationInterpretation, 'from_learner', lambda learn, split: (asked.append(split), own(learn, split=split))[1])
    c = ImageClassifierCleaner(learn)
    c.category.value = 'dog'; c.category.value = 'cat'
    assert asked == ['valid']
    c.split.value = 'train'; c.split.value = 'valid'; c.split.value = 'train'
    assert asked == ['valid', 'train']

def test_only_for_one_target_of_classes(two_class, tiny):
    block = DataBlock((ImageBlock, RegressionBlock), get_items=get_image_files, get_y=lambda o: float(o.parent.name == 'cat'), splitter=RandomSplitter(.5, seed=1), item_tfms=Resize(16))
    with pytest.raises(DataError, match='RegressionBlock'): ImageClassifierCleaner(Learner(block.dataloaders(two_class, bs=8, num_workers=0, device='cpu'), tiny(1)))

def test_jupyter_shows_the_box(cleaner): assert 'application/vnd.jupyter.widget-view+json' in cleaner._repr_mimebundle_(include=None, exclude=None)

def test_labels_that_are_numbers_are_shown():
    top = [dict(label=0, probability=.9), dict(label=1, probability=.1)]
    assert '<b>0</b>' in module._said(dict(kind='category', label=0, top=top)) and '<b>0, 1</b>' in module._said(dict(kind='multi', labels=[0, 1], top=top))
