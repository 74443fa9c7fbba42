import io
import json
import subprocess
import sys
import threading
import warnings

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from blocks import CategoryBlock, DataError, ExportError, ImageBlock, ItemError, MultiCategoryBlock, Predictor, RatioResize, RegressionBlock
from blocks.infer import runtime
from blocks.infer.onnx import to_onnx
from blocks.infer.runtime import OnnxPredictor


def photo(w=160, h=120, seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC)

def encoded(im, **kw):
    f = io.BytesIO()
    im.save(f, **kw)
    return f.getvalue()

def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), format='JPEG', exif=exif)

def model(n=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 32, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, n))
        net[-1].weight.data *= 8
    return net.eval()

@pytest.fixture(scope='module')
def p():
    target = CategoryBlock(vocab=['cat', 'dog', 'owl'])
    return Predictor(model(), (ImageBlock(), target), geometries=(RatioResize(40),), info=dict(architecture='tiny', classes=['cat', 'dog', 'owl']), device='cpu')

@pytest.fixture(scope='module')
def file(p, tmp_path_factory): return to_onnx(p, tmp_path_factory.mktemp('runtime')/'a.onnx')

@pytest.fixture(scope='module')
def fast(file): return OnnxPredictor(file)

PICTURES = dict(jpeg=encoded(photo(1600, 1200), format='JPEG'), turned=turned(), grey=encoded(photo().convert('L'), format='PNG'), palette=encoded(photo().convert('P'), format='GIF'), cmyk=encoded(photo().convert('CMYK'), format='JPEG'),
                transparent=encoded(photo().convert('RGBA').rotate(20), format='PNG'), sixteen=encoded(Image.fromarray(np.asarray(photo().convert('L')).astype(np.uint16)*257), format='PNG'), small=encoded(photo(3, 2), format='PNG'))

# --- one picture
@pytest.mark.parametrize('kind', PICTURES)
def test_every_file_is_read_as_training_reads_it(p, fast, tmp_path, kind):
    (tmp_path/'a').write_bytes(PICTURES[kind])
    label, index, probs = p.predict(PICTURES[kind])
    for raw in (PICTURES[kind], tmp_path/'a', str(tmp_path/'a'), io.BytesIO(PICTURES[kind])):
        assert (fast.read_item(raw)[0] == p.read_item(raw)[0].numpy()).all()                       # the very same pixels, those of a JPEG shrunk while decoding too
        got = fast.predict(raw)
        assert got[0] == label and got[1] == index and isinstance(got[1], np.integer) and abs(got[2] - probs.numpy()).max() < 1e-5 and got[2].dtype == np.float32

def test_what_is_in_memory(p, fast):
    for raw in (photo(), np.asarray(photo()), np.asarray(photo().convert('L'))/255., torch.from_numpy(np.array(photo())).permute(2, 0, 1)): assert fast.predict(raw)[0] == p.predict(raw)[0]

def test_likeliest_labels(p, fast):
    for k in (1, 2, 9):
        got, want = fast.predict(photo(), topk=k), p.predict(photo(), topk=k)
        assert [o for o, _ in got] == [o for o, _ in want] and np.allclose([v for _, v in got], [v for _, v in want], atol=1e-5) and all(type(v) is float for _, v in got)

def test_what_is_too_unsure_is_unknown(p, fast):
    sure = float(fast.predict(photo())[2].max())
    for threshold in (0., sure-.01, min(1., sure+.01)):
        got, want = fast.predict(photo(), threshold=threshold), p.predict(photo(), threshold=threshold)
        assert got[0] == want[0] and got[1] == want[1]
    assert fast.predict(photo(), threshold=1.)[:2] == ('unknown', -1)
    with pytest.raises(DataError, match='from 0 to 1'): fast.predict(photo(), threshold=2)
    with pytest.raises(DataError, match='calibrate'): fast.predict(photo(), reject=.1)

def test_targets_decide_as_the_blocks_do():
    rng = np.random.default_rng(0)
    pairs = [(CategoryBlock(vocab=list('abc'), threshold=.5, confidences=tuple(np.linspace(.3, .9, 11))), runtime._Category(tuple('abc'), .5, tuple(np.linspace(.3, .9, 11)))),
             (MultiCategoryBlock(vocab=list('abc'), thresh=.3), runtime._Multi(tuple('abc'), .3)), (RegressionBlock(n_out=3), runtime._Number())]
    for block, target in pairs:
        for ask in (None, dict(threshold=.6, reject=None), dict(threshold=None, reject=.25)):
            if ask and (block.answer == 'number' or ask['reject'] and block.answer == 'multi'): continue
            b, t = (block.rejecting(**ask), target.rejecting(**ask)) if ask else (block, target)
            for act in rng.dirichlet([1, 1, 1], 50).astype(np.float32):
                assert b.decode(torch.from_numpy(act)) == t.decode(act) and np.array_equal(b.decide(torch.from_numpy(act)).numpy(), t.decide(act))

def test_what_was_said_of_the_training(fast):
    assert list(fast.vocab) == ['cat', 'dog', 'owl'] and fast.info['architecture'] == 'tiny' and fast.n_inp == 1 and fast.shape == ('batch', 3, 'height', 'width')

# --- many
def test_bad_files_do_not_stop_the_others(p, fast, tmp_path):
    files = [tmp_path/f'{i}.png' for i in range(9)]
    for i, f in enumerate(files): photo(seed=i).save(f)
    files[4].write_bytes(files[4].read_bytes()[:300])
    files[7].unlink()
    with pytest.warns(UserWarning, match='2 of 9 items could not be read'): many = fast.predict_batch(files, bs=2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        want = p.predict_batch(files, bs=2)
    assert list(many.errors) == [4, 7] == list(want.errors) and many.labels == want.labels and many.labels[4] is None and np.isnan(many.probs[[4, 7]]).all()
    for i in (4, 7): assert isinstance(many.errors[i], ItemError) and str(many.errors[i]) == str(want.errors[i])
    assert many[4] == (None, None, pytest.approx(many.probs[4], nan_ok=True)) and np.allclose(many.probs, want.probs.numpy(), atol=1e-5, equal_nan=True)
    assert [d.get('label') for d in many.to_dicts()] == [d.get('label') for d in want.to_dicts()] and list(many.to_df().columns) == list(want.to_df().columns)
    json.dumps(many.to_dicts())

def test_a_folder_an_empty_list_and_progress(p, fast, tmp_path, capsys):
    for i in range(3): photo(seed=i).save(tmp_path/f'{i}.png')
    assert fast.predict_batch(tmp_path).labels == p.predict_batch(tmp_path).labels and len(fast.predict_batch([])) == 0 == len(fast.predict_batch([]).to_df())
    assert capsys.readouterr().err == ''
    fast.predict_batch(tmp_path, bs=2, progress=True)
    assert capsys.readouterr().err.endswith('3 of 3\n')
    with pytest.warns(UserWarning): none = fast.predict_batch([tmp_path/'no.png'])
    assert none.labels == [None] and none.probs.shape == (1, 3)

def test_samples_that_were_read(fast):
    items = [photo(seed=i) for i in range(4)]
    many = fast.predict_samples([fast.read_item(o) for o in items], items=list('abcd'))
    assert [o['item'] for o in many.to_dicts()] == list('abcd') and many.labels == [fast.predict(o)[0] for o in items]

def test_threads_share_it(fast):
    items = [photo(seed=i) for i in range(12)]
    want, got = [fast.predict(o)[2] for o in items], {}
    def work(k):
        for _ in range(5): got.setdefault(k, []).append([fast.predict(o)[2] for o in items])
    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(got) == 6 and all(np.allclose(o, want, atol=1e-6) for rounds in got.values() for o in rounds)

@pytest.mark.parametrize('images', [np.zeros((1, 3, 4, 4), np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros((1, 1, 4, 4), np.uint8)])
def test_a_batch_that_does_not_fit_is_told_the_shape(fast, images):
    with pytest.raises(DataError, match=r'expected uint8 of shape \(batch, 3, height, width\)'): fast.run(images)

# --- files
def test_it_works_without_pytorch(p, file, tmp_path):
    (tmp_path/'a.jpg').write_bytes(PICTURES['turned'])
    code = """if True:
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] in ('torch', 'torchvision', 'pandas', 'matplotlib', 'onnx', 'onnxscript', 'sklearn'): raise ImportError(f'{name} is not to be imported')
        sys.meta_path.insert(0, Absent())
        from blocks.infer.runtime import OnnxPredictor
        fast = OnnxPredictor(sys.argv[1])
        label, index, probs = fast.predict(sys.argv[2])
        many = fast.predict_batch([sys.argv[2]]*3, bs=2)
        assert many.labels == [label]*3 and many.to_dicts()[0]['label'] == label and 'torch' not in sys.modules
        print(label, *probs.tolist())
    """
    out = subprocess.run([sys.executable, '-c', code, str(file), str(tmp_path/'a.jpg')], capture_output=True, text=True)
    assert out.returncode == 0 and out.stderr == '', out.stderr
    label, *probs = out.stdout.split()
    assert label == p.predict(PICTURES['turned'])[0] and np.allclose([float(o) for o in probs], p.predict(PICTURES['turned'])[2], atol=1e-5)

def test_a_damaged_file_is_an_export_error(file, tmp_path):
    data, rng, bad = file.read_bytes(), np.random.default_rng(0), tmp_path/'bad.onnx'
    broken = [b'', b'\x00'*100, b'PK\x03\x04 nothing', *(data[:n] for n in (1, 10, 1000, len(data)//2, len(data)-1))]
    for _ in range(60):                                                       # a stretch of noise anywhere
        at, n = rng.integers(len(data)), int(rng.integers(1, 200))
        broken.append(data[:at] + rng.bytes(n) + data[at+n:])
    for i, content in enumerate(broken):
        bad.write_bytes(content)
        try: got = OnnxPredictor(bad)
        except ExportError as e: assert 'bad.onnx' in str(e)
        else: assert i >= 8, len(content); assert got.vocab is not None            # noise in weights or names cannot be told from weights and names

def test_a_foreign_model_is_an_export_error(file, tmp_path):
    net, bad = onnx.load(file), tmp_path/'bad.onnx'
    facts = json.loads(net.metadata_props[0].value)
    def refused(text, said):
        onnx.helper.set_model_props(net, {} if text is None else {'blocks': text if isinstance(text, str) else json.dumps(text)})
        onnx.save(net, bad)
        with pytest.raises(ExportError, match=said): OnnxPredictor(bad)
    for text in (None, 'no json', '[]', '{}', '{"format": "1"}'): refused(text, 'did not write')
    refused(facts | dict(format=99), 'upgrade blocks')
    wrong = dict(target=[dict(answer='poem'), dict(answer='category'), dict(answer='category', vocab='cat'), dict(answer='category', vocab=['a', 'b']), dict(answer='category', vocab=[]), dict(answer='mask', vocab=None), None, 5],
                 mode=['rgb', None, 3], geometries=[[dict(kind='eval', fields={})], [dict(kind='Resize', fields=dict(size=-1))], [dict(kind='Resize')], 5, None], info=[5, None])
    for k, values in wrong.items():
        for v in values: refused(facts | {k: v}, 'cannot be used')
    with pytest.raises(ExportError, match='there is no file'): OnnxPredictor(tmp_path/'none.onnx')
