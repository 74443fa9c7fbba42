"A model carried away in a file: what is in it, what may go wrong, and that all ways to predict agree."
import copy
import io
import json
import os
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
from blocks.infer.card import inspect_export, model_card
from blocks.infer.file import export_predictor
from blocks.infer.values import read_values, write_values
from blocks.model.head import create_vision_model


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
def test_loading_fetches_nothing_and_leaves_the_global_generator(two_class, tmp_path, monkeypatch):
    file = cnn_learner(loaders(two_class), 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path).export()
    for name in ('load_state_dict_from_url', 'download_url_to_file'): monkeypatch.setattr(torch.hub, name, lambda *a, **k: pytest.fail('fetched'))
    before = torch.get_rng_state()
    back = load_learner(file)
    assert torch.equal(torch.get_rng_state(), before) and not back.model.training and list(back.vocab) == list(back.dls.vocab) == ['cat', 'dog'] and back.dls.c == 2

def test_all_ways_to_predict_agree(learn, file, two_class, tiny):
    files, back = sorted(two_class.rglob('*.png'))[:11], load_learner(file, model=tiny)
    want = learn.to_fp32().get_preds(dl=learn.dls.test_dl(files))[0]
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

# --- to another time, and another machine
def test_a_file_of_the_first_format_loads_and_predicts():
    elpv_dataset = pytest.importorskip('elpv_dataset')
    cell = Path(elpv_dataset.__file__).parent/'data'/'images'/'cell0001.png'
    back = load_learner(Path(__file__).parent/'files'/'format_1.pkl')
    label, index, probs = back.predict(cell)
    assert label == 'defect' == back.vocab[index] and probs.tolist() == pytest.approx([.5128, .4872], abs=1e-3) and back.info['classes'] == ['defect', 'good']
    facts = inspect_export(Path(__file__).parent/'files'/'format_1.pkl')
    assert facts['format'] == 1 and facts['architecture'] == 'shufflenet_v2_x0_5' and 'Resize(size=(96, 96)' in facts['geometry'][0] and 'defect' in model_card(facts)

def strings(o): return [s for v in [*o, *o.values()] for s in strings(v)] if isinstance(o, dict) else [s for v in o for s in strings(v)] if isinstance(o, (list, tuple)) else [o] if isinstance(o, str) else []

def test_nothing_in_a_file_is_of_the_machine_that_made_it(two_class, tmp_path):
    learn = cnn_learner(loaders(two_class, item_tfms=RandomResizedCrop(24), batch_tfms=aug_transforms(size=16)), 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path)
    file = learn.export(tmp_path/'sub'/'a b é.pkl')
    texts = strings(read_values(file, tensors=False))
    assert texts and not [s for s in texts if os.sep in s or '\\' in s or str(tmp_path) in s or os.environ.get('USER', '?') == s]
    assert b'pathlib' not in file.read_bytes() and str(tmp_path).encode() not in file.read_bytes()
    assert load_learner(file).vocab == ['cat', 'dog']

def test_numbers_in_the_byte_order_of_another_machine_are_turned_round(tmp_path):
    import zipfile
    x = dict(f=torch.randn(3, 2), b=torch.randn(4).bfloat16(), i=torch.arange(5), u=torch.arange(9, dtype=torch.uint8), c=torch.randn(2, dtype=torch.complex64))
    torch.save(x, tmp_path/'x.pkl')
    with zipfile.ZipFile(tmp_path/'x.pkl') as z, zipfile.ZipFile(tmp_path/'big.pkl', 'w') as big:
        width = dict(zip('01234', (4, 2, 8, 1, 4)))
        for n in z.namelist():
            data, key = z.read(n), n.split('/')[-1]
            if '/data/' in n: data = b''.join(data[i:i + width[key]][::-1] for i in range(0, len(data), width[key]))
            big.writestr(n, b'big' if key == 'byteorder' else data)
    back = read_values(tmp_path/'big.pkl')
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in x.items())

def test_a_fresh_process_elsewhere_without_a_network_and_what_training_needs_predicts_the_same(two_class, tmp_path, picture):
    dls = loaders(two_class, item_tfms=RandomResizedCrop(24), batch_tfms=aug_transforms(size=16))              # a lambda labels, and is left behind
    learn = cnn_learner(dls, 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path/'there')
    files, want = [str(learn.export(f'mine.{o}')) for o in ('pkl', 'safetensors')], learn.predict(picture)
    assert files[0] == str(tmp_path/'there'/'mine.pkl') and isinstance(torch.load(files[0], weights_only=True), dict)
    code = f"""
import sys, warnings
warnings.simplefilter('error')
def watch(event, args):
    if event.startswith('socket.'): raise AssertionError('the network')
sys.addaudithook(watch)
import blocks
for f in {files}: r = blocks.load_learner(f).predict({str(picture)!r}); print(r[0], int(r[1]), *r[2].tolist())
print([m for m in ('pandas', 'matplotlib', 'sklearn', 'torchmetrics', 'scipy', 'timm', 'blocks.train', 'safetensors', 'IPython') if m in sys.modules])"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env={'PYTHONPATH': str(Path(__file__).parent.parent), 'OMP_NUM_THREADS': '1', 'PATH': ''})
    assert out.returncode == 0 and out.stderr == '', out.stderr
    *answers, heavy = out.stdout.splitlines()
    for label, index, *probs in map(str.split, answers): assert same((label, int(index), torch.tensor([float(o) for o in probs])), want)
    assert len(answers) == 2 and heavy == '[]'

def test_the_views_of_training_come_along_for_tta(two_class, tmp_path, picture):
    learn = cnn_learner(loaders(two_class, item_tfms=RandomResizedCrop(24), batch_tfms=aug_transforms(size=16)), 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path)
    back = load_learner(learn.export())
    assert torch.allclose(back.predict(picture, tta=2)[2], learn.predictor.predict(picture, tta=2)[2], atol=1e-5)
    learn = cnn_learner(loaders(two_class, item_tfms=[Resize(16), invert]), 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path)
    assert load_learner(learn.export(), item_tfms=invert).views is None

# --- the other form
def test_safetensors_hold_the_same(learn, tiny, tmp_path, picture):
    from safetensors import safe_open
    back, want = load_learner(learn.export('m.safetensors'), model=tiny), learn.predict(picture)
    assert same(back.predict(picture), want) and back.info['classes'] == ['cat', 'dog'] and back.info['items'] == dict(train=36, valid=12) and back.blocks == learn.dls.blocks
    with safe_open(tmp_path/'m.safetensors', 'pt') as f: assert set(f.keys()) == set(learn.model.state_dict()) and isinstance(json.loads(f.metadata()['blocks']), dict)

def test_code_does_not_go_into_safetensors(learn, tmp_path):
    with pytest.raises(ExportError, match=r'by_value.*\.pkl'): learn.export('m.safetensors', by_value=True)
    assert not list(tmp_path.glob('*.safetensors'))

@pytest.mark.parametrize('suffix', ['pkl', 'safetensors'])
def test_plain_values_come_back_as_they_were(tmp_path, suffix):
    shared = torch.randn(6)
    state = dict(a=shared, tied=shared, half=shared.half(), part=shared[2:5], empty=torch.zeros(0, 3), scalar=torch.tensor(3), flags=torch.tensor([True, False]), turned=torch.randn(2, 3).t(), bf=torch.randn(3).bfloat16(), f8=torch.randn(4).to(torch.float8_e4m3fn))
    content = dict(format=1, nested=[(1, (2., [None, True])), {}], odd={1: 'a', None: 'b', False: (), '$x': [float('nan')], 'ü\n': float('-inf')}, kind=torch.bfloat16, big=2**63 - 1, small=-2**63, tensors=[torch.arange(3), {'t': torch.ones(1)}], state_dict=state)
    write_values(content, tmp_path/f'x.{suffix}')
    back = read_values(tmp_path/f'x.{suffix}')
    for k, v in state.items(): assert back['state_dict'][k].dtype == v.dtype and torch.equal(back['state_dict'][k].float(), v.float()), k
    assert torch.equal(back['tensors'][0], torch.arange(3)) and torch.equal(back['tensors'][1]['t'], torch.ones(1))
    assert back['state_dict']['a'].data_ptr() == back['state_dict']['tied'].data_ptr()
    rest = [repr({k: v for k, v in o.items() if k not in ('tensors', 'state_dict')}) for o in (back, content)]
    assert rest[0] == rest[1]

def test_what_could_not_be_read_again_is_not_written(tmp_path):
    for suffix in ('pkl', 'safetensors'):
        with pytest.raises(ExportError, match='would not be read'): write_values(dict(x=10**40, state_dict={}), tmp_path/f'x.{suffix}')
    assert list(tmp_path.iterdir()) == []

# --- the model out of its description
def round_trip(model, tmp_path, size=64, target=None):
    p = Predictor(model.eval(), (ImageBlock(), target or CategoryBlock(vocab=['a', 'b'])), geometries=(Resize(size),))
    return p, load_learner(export_predictor(p, tmp_path/'m.pkl'))

def agree(p, back, size=64):
    x = torch.rand(2, 3, size, size)
    with torch.no_grad(): return torch.allclose(p.model(x), back.model(x), atol=1e-5)

@pytest.mark.parametrize('arch,size', [('tf_efficientnet_lite0', 64), ('resnetblur18', 64), pytest.param('swin_t', 64, marks=pytest.mark.slow), ('regnet_y_400mf', 64), ('googlenet', 64), ('squeezenet1_1', 64), ('test_resnet.r160_in1k', 64),
                                       pytest.param('swin_tiny_patch4_window7_224', 224, marks=pytest.mark.slow)])
def test_models_are_whole_with_what_they_compute_and_do_not_save(tmp_path, arch, size):
    if arch not in ('swin_t', 'regnet_y_400mf', 'googlenet', 'squeezenet1_1'): pytest.importorskip('timm')
    p, back = round_trip(create_vision_model(arch, 2, pretrained=False), tmp_path, size)
    assert agree(p, back, size) and back.model.spec == p.model.spec
    here, there = dict(p.model.named_buffers()), dict(back.model.named_buffers())
    assert here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here) and not any(o.is_meta for o in [*back.model.parameters(), *there.values()])
    assert all(a.requires_grad == b.requires_grad for a, b in zip(p.model.parameters(), back.model.parameters()))

@pytest.mark.slow
def test_a_u_net_is_whole(tmp_path):
    from blocks import MaskBlock
    from blocks.model.unet import create_unet_model
    assert agree(*round_trip(create_unet_model('shufflenet_v2_x0_5', 2, pretrained=False, img_size=(1030, 1100)), tmp_path, target=MaskBlock(codes=['a', 'b'])))

@pytest.mark.slow
def test_a_detector_is_whole(tmp_path):
    from blocks import BBoxBlock
    from blocks.model.detect import create_detector
    assert agree(*round_trip(create_detector('fasterrcnn_mobilenet_v3_large_320_fpn', 2, pretrained=False), tmp_path, target=BBoxBlock(vocab=['a', 'b'])))

def test_nothing_is_drawn_to_be_overwritten(tmp_path, monkeypatch):
    p, _ = round_trip(create_vision_model('resnet18', 2, pretrained=False), tmp_path)
    real = torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, 'normal_', lambda self, *a, **k: self if self.is_meta else pytest.fail('random numbers'))
    assert agree(p, load_learner(tmp_path/'m.pkl'))
    assert real is not torch.Tensor.normal_

def test_weights_of_half_precision_are_made_whole(tmp_path):
    model = create_vision_model('squeezenet1_1', 2, pretrained=False).eval()
    p = Predictor(copy.deepcopy(model).half(), (ImageBlock(), CategoryBlock(vocab=['a', 'b'])), geometries=(Resize(64),))
    back = load_learner(export_predictor(p, tmp_path/'m.pkl'))
    assert {o.dtype for o in back.model.parameters()} == {torch.float32}

# --- the facts
def test_inspecting_builds_nothing_and_reads_no_weights(learn, two_class, tmp_path, monkeypatch):
    learn = cnn_learner(loaders(two_class), 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path)
    with learn.no_bar(): learn.fit(1)
    for f in (learn.export('m.pkl'), learn.export('m.safetensors')):
        monkeypatch.setattr(torch, 'empty', lambda *a, **k: pytest.fail('a tensor was made'))
        facts = inspect_export(f)
        monkeypatch.undo()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts and set(facts) >= set('format library blocks geometry architecture classes metrics items trained card parameters bytes tensors code'.split())
        assert facts['architecture'] == 'shufflenet_v2_x0_5' and facts['classes'] == ['cat', 'dog'] and facts['items'] == dict(train=36, valid=12) and facts['metrics']['valid_loss'] > 0 and facts['code'] is False
        assert facts['parameters'] == sum(o.numel() for o in learn.model.parameters()) and facts['bytes'] == f.stat().st_size and facts['tensors'] == len(learn.model.state_dict())
        for card in (model_card(f), model_card(facts)): assert all(o in card for o in ('shufflenet_v2_x0_5', '`cat`', 'train 36', 'valid_loss', f"load_learner('{f.name}')", '## Limits'))

def test_a_card_of_what_little_is_known(learn, tmp_path):
    assert 'load_learner' in model_card({}) and 'not written down' in model_card(dict(classes=['a'])) and model_card(load_learner(learn.export(), model=learn.model).info)
    facts = inspect_export(learn.export(by_value=True))
    assert facts['code'] is True and facts['custom'] and 'trust=True' in model_card(facts)

def test_the_words_of_a_stranger_are_only_words():
    card = model_card(dict(classes=['<script>x</script>', 'a|b\n# c'], architecture='`x`', card='<img src=x>\n# Title', metrics={'[a](http://x)': 1.}))
    assert '<script' not in card and '<img' not in card and '\n# c' not in card and '\n# Title' not in card and '[a](' not in card.replace('\\[', '')

# --- bad inputs
def test_a_damaged_file_is_named_and_the_mend_fits_prediction(file, picture, tiny, tmp_path):
    back, bad = load_learner(file, model=tiny), tmp_path/'bad.png'
    bad.write_bytes(picture.read_bytes()[:100])
    for predict in (lambda: back.predict(bad), lambda: back.predict(tmp_path/'bad_there_is_none.png')):
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
        with pytest.raises(ExportError, match='no file|is a folder'): load_learner(gone)

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
    assert same(load_learner(file, trust=True).predict(picture), learn.predict(picture)) and same(load_learner(file, trust=True).predict(picture, tta=2), learn.predict(picture, tta=2))

def test_transforms_of_torchvision_on_the_batch_come_along(two_class, tiny, tmp_path, picture):
    learn = Learner(loaders(two_class, batch_tfms=[v2.GaussianNoise(), v2.RandomHorizontalFlip()]), tiny(), path=tmp_path)
    back = load_learner(learn.export(), model=tiny)
    assert same(back.predict(picture), learn.predict(picture)) and same(back.predict(picture), back.predict(picture)) and [type(t) for t in back.views[2]] == [v2.GaussianNoise, v2.RandomHorizontalFlip]

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
