"A model carried away in a file: what is in it, what may go wrong, and that all ways to predict agree."
import io
import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from blocks import (CategoryBlock, DataBlock, DataError, ExportError, ImageBlock, ItemError, Learner, Predictor, RandomResizedCrop, RandomSplitter, Resize, aug_transforms,
                    cnn_learner, get_image_files, load_learner)
from blocks.infer import file as module
from blocks.infer.file import export_predictor


def invert(im): return 255 - im
def halve(im): return im//2

class Invert:
    def __call__(self, im): return 255 - im

@dataclass(frozen=True)
class Negative(ImageBlock):
    "A block of one's own, with a field"
    offset: float = 0.
    def prepare(self, batch): return 1 + self.offset - super().prepare(batch)

def loaders(root, item_tfms=None, batch_tfms=None, image=ImageBlock, get_y=lambda p: p.parent.name):
    block = DataBlock((image, CategoryBlock), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(.25, seed=1), item_tfms=item_tfms or Resize(16), batch_tfms=batch_tfms)
    return block.dataloaders(root, bs=8, num_workers=0, seed=1, device='cpu')

@pytest.fixture
def learn(dls, tiny, tmp_path): return Learner(dls, tiny(), path=tmp_path)

@pytest.fixture
def file(learn): return learn.export()

@pytest.fixture
def content(file): return torch.load(file, weights_only=True)

@pytest.fixture
def picture(two_class): return two_class/'cat'/'cat_3.png'

def saved(tmp_path, content): torch.save(content, tmp_path/'changed.pkl'); return tmp_path/'changed.pkl'
def same(a, b): return a[0] == b[0] and int(a[1]) == int(b[1]) and torch.allclose(a[2], b[2], atol=1e-5)

# --- to another place
def test_a_fresh_process_elsewhere_predicts_the_same(two_class, tmp_path, picture):
    dls = loaders(two_class, item_tfms=RandomResizedCrop(24), batch_tfms=aug_transforms(size=16))              # a lambda labels, and is left behind
    learn = cnn_learner(dls, 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path)
    file, want = learn.export('mine.pkl'), learn.predict(picture)
    assert file == tmp_path/'mine.pkl' and isinstance(torch.load(file, weights_only=True), dict)
    code = f'import warnings; warnings.simplefilter("error")\nfrom blocks import load_learner\nr = load_learner({str(file)!r}).predict({str(picture)!r})\nprint(r[0], int(r[1]), *r[2].tolist())'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env={'PYTHONPATH': str(Path(__file__).parent.parent), 'OMP_NUM_THREADS': '1', 'PATH': ''})
    assert out.returncode == 0 and out.stderr == '', out.stderr
    label, index, *probs = out.stdout.split()
    assert same((label, int(index), torch.tensor([float(o) for o in probs])), want)

def test_loading_fetches_nothing_and_leaves_the_global_generator(two_class, tmp_path, monkeypatch):
    file = cnn_learner(loaders(two_class), 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path).export()
    for name in ('load_state_dict_from_url', 'download_url_to_file'): monkeypatch.setattr(torch.hub, name, lambda *a, **k: pytest.fail('fetched'))
    before = torch.get_rng_state()
    back = load_learner(file)
    assert torch.equal(torch.get_rng_state(), before) and not back.model.training and list(back.vocab) == list(back.dls.vocab) == ['cat', 'dog'] and back.dls.c == 2

def test_all_ways_to_predict_agree(learn, file, two_class, tiny):
    files, back = sorted(two_class.rglob('*.png'))[:11], load_learner(file, model=tiny)
    want = learn.get_preds(dl=learn.dls.test_dl(files))[0]
    for p in (learn.predict_batch(files), back.predict_batch(files, bs=4, num_workers=2)): assert torch.allclose(p.probs, want, atol=1e-5) and len(p) == 11
    assert torch.allclose(back.get_preds(back.dls.test_dl(files))[0], want, atol=1e-5)
    assert torch.allclose(torch.stack([back.predict(f)[2] for f in files]), want, atol=1e-5)

def test_predictions_are_a_sequence_and_a_table(learn, two_class):
    files = sorted(two_class.rglob('*.png'))[:3]
    p = learn.predict_batch(files)
    table = p.to_df()
    assert same(p[1], learn.predict(files[1])) and [o[0] for o in p] == p.labels == table.prediction.to_list() and len(p[1:]) == 2 and same(p[-1], p[2])
    assert table['p(cat)'].tolist() == pytest.approx(p.probs[:, 0].tolist()) and table.item.to_list() == [str(f) for f in files]
    assert len(learn.predict_batch([])) == 0 and list(learn.predict_batch([]).to_df().columns) == list(table.columns)

def test_everything_people_have_gives_the_same(file, picture, tiny, capsys):
    back, array = load_learner(file, model=tiny), np.array(Image.open(picture))
    want = back.predict(picture)
    with open(picture, 'rb') as f:
        for o in (str(picture), picture.read_bytes(), f, f, io.BytesIO(picture.read_bytes()), Image.open(picture), array, torch.from_numpy(array).permute(2, 0, 1), array/255):
            assert same(back.predict(o), want), type(o)
        assert not f.closed
    assert capsys.readouterr() == ('', '')

def test_many_threads(file, two_class, tiny):
    back, files, got = load_learner(file, model=tiny), sorted(two_class.rglob('*.png'))[:12], {}
    want = [back.predict(o) for o in files]
    def work(k):
        for i, o in enumerate(files): got[k, i] = back.predict(o)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(got) == 72 and all(same(v, want[i]) for (_, i), v in got.items())

def test_an_export_while_the_model_trains_is_in_evaluation_mode_when_loaded(learn, tiny, picture):
    learn.model.train()
    assert same(load_learner(learn.export(), model=tiny).predict(picture), learn.predict(picture))

# --- bad inputs
def test_a_damaged_file_is_named_and_the_mend_fits_prediction(file, picture, tiny, tmp_path):
    back, bad = load_learner(file, model=tiny), tmp_path/'bad.png'
    bad.write_bytes(picture.read_bytes()[:100])
    for predict in (lambda: back.predict(bad), lambda: back.predict_batch([picture, bad]), lambda: back.predict(tmp_path/'bad_there_is_none.png')):
        with pytest.raises(ItemError, match='bad') as e: predict()
        assert not any(word in str(e.value) for word in ('on_bad', 'get_x'))           # nothing is built here

def test_no_items_for_get_preds_is_a_clear_error(file, tiny):
    back = load_learner(file, model=tiny)
    with pytest.raises(ValueError, match='nothing|no batch|0 items'): back.get_preds(back.dls.test_dl([]))

# --- hostile, damaged and foreign files
def test_hostile_pickles_are_not_run(tmp_path):
    mark = tmp_path/'owned'
    class Evil:
        def __reduce__(self): return Path.touch, (mark,)
    (tmp_path/'a.pkl').write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save(dict(format=1, blocks=[], model={}, state_dict=Evil()), tmp_path/'b.pkl')
    torch.save(dict(format=1, blocks=[], model={}, state_dict={}, by_value=Evil()), tmp_path/'c.pkl')
    for n in 'abc':
        with pytest.raises(ExportError, match='never run'): load_learner(tmp_path/f'{n}.pkl')
    assert not mark.exists()

def test_code_in_a_file_is_not_run_without_trust(content, tmp_path, tiny):
    mark = tmp_path/'owned'
    class Evil:
        def __reduce__(self): return Path.touch, (mark,)
    code = torch.frombuffer(bytearray(pickle.dumps(Evil())), dtype=torch.uint8)
    load_learner(saved(tmp_path, content | dict(by_value=code)), model=tiny)
    assert not mark.exists()

def test_half_empty_missing_and_foreign_files(file, tmp_path):
    data, f = file.read_bytes(), tmp_path/'x.pkl'
    for part in (b'', data[:len(data)//2], data[:-20], b'PK\3\4rubbish', b'hello'):
        f.write_bytes(part)
        with pytest.raises(ExportError, match=r'x\.pkl.*(damaged|not a file)'): load_learner(f)
    for other in (nn.Linear(1, 1).state_dict(), torch.ones(2), [1]):
        torch.save(other, f)
        with pytest.raises(ExportError, match=r'x\.pkl is not a file that blocks exported'): load_learner(f)
    for gone in (tmp_path/'none.pkl', tmp_path):
        with pytest.raises(ExportError, match='no file'): load_learner(gone)

@pytest.mark.parametrize('change', [dict(format=module.FORMAT + 1), None])
def test_a_newer_file_says_to_upgrade_whatever_else_is_in_it(content, tmp_path, change):
    newer = content | change if change else dict(format=module.FORMAT + 1, library='9.9', parts=[])
    with pytest.raises(ExportError, match='upgrade blocks'): load_learner(saved(tmp_path, newer))

@pytest.mark.parametrize('key', ['format', 'n_inp', 'info', 'blocks', 'geometries', 'tfms', 'batch_tfms', 'model', 'state_dict'])
def test_a_file_without_one_of_its_parts_is_an_export_error_that_names_the_file(content, tmp_path, tiny, key):
    with pytest.raises(ExportError, match=r'changed\.pkl'): load_learner(saved(tmp_path, {k: v for k, v in content.items() if k != key}), model=tiny)

@pytest.mark.parametrize('change', [
    dict(format='x'), dict(blocks=3), dict(blocks=[3]), dict(state_dict=[1]), dict(state_dict={}), dict(model=dict(spec=None)),
    dict(blocks=[dict(kind='ImageBlock', fields=dict(mode='XYZ'))]), dict(blocks=[dict(kind='ImageBlock', fields=dict(colour=1))]), dict(blocks=[dict(kind='HologramBlock', fields={})]),
    dict(geometries=[dict(kind='Resize', fields=dict(size=-1))]), dict(tfms=[dict(kind='Teleport', torchvision={})]),
    dict(model=dict(spec=dict(arch='nonet', source='torchvision', n_in=3, n_out=2, cut=None, head={'create_head': {}}, mean=None, std=None, custom=[])))])
def test_nonsense_inside_a_plain_file_is_an_export_error_that_names_the_file(content, tmp_path, tiny, change):
    with pytest.raises(ExportError, match=r'changed\.pkl'): load_learner(saved(tmp_path, content | change), model=tiny)

# --- writing
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(learn, file, monkeypatch):
    before, listing = file.read_bytes(), sorted(file.parent.iterdir())
    def half(content, f): f.write(b'half'); raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(OSError, match='space'): learn.export()
    assert file.read_bytes() == before and sorted(file.parent.iterdir()) == listing

def test_a_folder_in_the_place_of_the_file_is_a_clear_error(learn, tmp_path):
    (tmp_path/'there').mkdir()
    with pytest.raises(ExportError, match='there'): learn.export('there')
    assert [o.name for o in tmp_path.iterdir()] == ['there']

def test_folders_are_made_for_a_file(learn): assert learn.export('a/b/c.pkl').is_file()

def test_an_export_with_labels_that_are_not_plain_says_so(two_class, tiny, tmp_path):
    learn = Learner(loaders(two_class, get_y=lambda p: p.parent), tiny(), path=tmp_path)                       # a Path as a label
    with pytest.raises(ExportError, match='(?i)label|class|vocab'): learn.export()

def test_scores_and_classes_come_along(learn, tiny, dls):
    with learn.no_bar(): learn.fit(1)
    info = load_learner(learn.export(), model=tiny).info
    assert info['classes'] == ['cat', 'dog'] and info['metrics']['valid_loss'] == pytest.approx(learn.recorder.values[-1][1]) and info['items'] == dict(train=36, valid=12)

# --- parts of one's own
def test_a_model_of_ones_own_is_given_as_callable_or_instance(learn, file, tiny, picture):
    want = learn.predict(picture)
    with pytest.raises(ExportError, match='model='): load_learner(file)
    assert same(load_learner(file, model=tiny).predict(picture), want) and same(load_learner(file, model=tiny(seed=5)).predict(picture), want)

@pytest.mark.parametrize('wrong', [lambda: 3, 'resnet18', lambda: nn.Linear(2, 2)])
def test_a_model_that_does_not_fit_is_an_export_error(file, wrong):
    with pytest.raises(ExportError, match=r'export\.pkl'): load_learner(file, model=wrong)

def test_a_block_of_ones_own_keeps_its_fields(two_class, tiny, tmp_path, picture):
    learn = Learner(loaders(two_class, image=Negative(offset=.25)), tiny(), path=tmp_path)
    file = learn.export()
    with pytest.raises(ExportError, match='Negative'): load_learner(file, model=tiny)
    back = load_learner(file, model=tiny, blocks=[Negative])
    assert back.blocks[0] == Negative(offset=.25) and same(back.predict(picture), learn.predict(picture))

@pytest.mark.parametrize('tfm,given', [(invert, invert), (Invert(), Invert()), (Invert(), Invert), (Invert, Invert), (lambda im: 255 - im, None)])
def test_an_item_transform_of_ones_own(two_class, tiny, tmp_path, picture, tfm, given):
    learn = Learner(loaders(two_class, item_tfms=[Resize(16), tfm]), tiny(), path=tmp_path)
    file = learn.export()
    with pytest.raises(ExportError, match='item_tfms|trust|at loading'): load_learner(file, model=tiny)
    assert same(load_learner(file, model=tiny, item_tfms=[given or tfm]).predict(picture), learn.predict(picture))

def test_one_part_may_be_given_without_a_list(two_class, tiny, tmp_path, picture):
    learn = Learner(loaders(two_class, item_tfms=[Resize(16), invert], image=Negative), tiny(), path=tmp_path)
    assert same(load_learner(learn.export(), model=tiny, blocks=Negative, item_tfms=invert).predict(picture), learn.predict(picture))

def test_two_lambdas_are_not_taken_for_each_other(two_class, tiny, tmp_path, picture):
    a, b = (lambda im: 255 - im), (lambda im: im//2)
    learn = Learner(loaders(two_class, item_tfms=[Resize(16), a, b]), tiny(), path=tmp_path)
    file = learn.export()
    try: back = load_learner(file, model=tiny, item_tfms=[a, b])
    except ExportError: return                                          # refusing is fine, another answer is not
    assert same(back.predict(picture), learn.predict(picture))

@pytest.mark.parametrize('tfm', [v2.Grayscale(3), v2.CenterCrop(12), v2.Pad(2, fill=(1, 2, 3)), v2.Resize((12, 12), interpolation=v2.InterpolationMode.NEAREST),
                                 v2.ToDtype(torch.float32, scale=True), v2.RandomHorizontalFlip(1.), v2.Compose([v2.CenterCrop(12), v2.Grayscale(3)])], ids=lambda t: type(t).__name__)
def test_transforms_of_torchvision_come_along(two_class, tiny, tmp_path, picture, tfm):
    learn = Learner(loaders(two_class, item_tfms=[Resize(16), tfm]), tiny(), path=tmp_path)
    assert same(load_learner(learn.export(), model=tiny).predict(picture), learn.predict(picture))

def test_by_value_needs_trust(two_class, tiny, tmp_path, picture):
    learn = Learner(loaders(two_class, item_tfms=[Resize(16), lambda im: 255 - im]), tiny(), path=tmp_path)
    file = learn.export(by_value=True)
    with pytest.raises(ExportError, match='trust=True'): load_learner(file)
    assert same(load_learner(file, trust=True).predict(picture), learn.predict(picture))

def test_trust_changes_nothing_for_a_file_without_code(file, tiny, learn, picture):
    assert same(load_learner(file, model=tiny, trust=True).predict(picture), learn.predict(picture))

def test_a_predictor_by_hand_is_exported_too(tiny, tmp_path, picture):
    p = Predictor(tiny(), (ImageBlock(), CategoryBlock(vocab=('a', 'b'))), geometries=(Resize(16),))
    assert same(load_learner(export_predictor(p, tmp_path/'p.pkl'), model=tiny).predict(picture), p.predict(picture))

# --- the likeliest labels, counts, tables
def test_the_likeliest_labels_come_first(learn, two_class):
    file = get_image_files(two_class)[3]
    top, (label, _, probs) = learn.predict(file, topk=5), learn.predict(file)
    assert top[0] == (label, pytest.approx(float(probs.max()))) and [p for _, p in top] == sorted((p for _, p in top), reverse=True) and {o for o, _ in top} == {'cat', 'dog'}
    assert len(learn.predict(file, topk=1)) == 1

def test_a_prediction_is_drawn_with_its_bars(learn, two_class):
    left, right = learn.plot_prediction(get_image_files(two_class)[3], topk=2)
    assert left.images and [round(p.get_width(), 4) for p in right.patches] == [round(p, 4) for _, p in learn.predict(get_image_files(two_class)[3], topk=2)]

def test_predictions_are_counted_and_written(learn, two_class, tmp_path):
    import pandas as pd
    p = learn.predict_batch(get_image_files(two_class)[:9])
    assert [b.get_width() for b in p.plot_counts().patches] == [p.labels.count('cat'), p.labels.count('dog')]
    p.to_csv(tmp_path/'s.csv', columns=['prediction'])
    assert list(pd.read_csv(tmp_path/'s.csv').prediction) == p.labels
    p.to_csv(tmp_path/'all.csv')
    assert list(pd.read_csv(tmp_path/'all.csv')) == list(p.to_df())
    with pytest.raises(DataError, match="no column 'label'.*'prediction'"): p.to_csv(tmp_path/'s.csv', columns=['label'])
