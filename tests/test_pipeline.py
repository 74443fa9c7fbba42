"Find, then classify: what is cropped, what is merged, what is drawn, and what detectors may give."
import io, json, sys, types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from blocks.core import DataError, ItemError, MissingExtraError
from blocks.data.block import ImageBlock
from blocks.data.frame import Resize
from blocks.data.label import CategoryBlock, MultiCategoryBlock
from blocks.data.place import BBoxBlock
from blocks.infer import pipeline as module
from blocks.infer.file import export_predictor
from blocks.infer.pipeline import CascadeDetector, Pipeline, YuNetDetector, draw_boxes, load_detector, read_upright
from blocks.infer.predictor import Predictor


class Reddest:
    "A classifier that calls what has more red than green 'red'; it keeps what it was shown"
    vocab = ['green', 'red']
    def __init__(self, probability=.9): self.calls, self.probability = [], probability
    def predict_batch(self, items, **kw):
        self.calls.append(list(items))
        means = [np.asarray(o, dtype=float).mean((0, 1)) for o in items]
        return types.SimpleNamespace(to_dicts=lambda topk=5: [dict(item=str(i), kind='category', label=self.vocab[int(m[0] > m[1])], probability=self.probability) for i, m in enumerate(means)])

def boxes(*given): return lambda image: list(given)

@pytest.fixture
def picture():
    "100×80: red on the left, green on the right"
    a = np.zeros((80, 100, 3), dtype=np.uint8)
    a[:, :50, 0], a[:, 50:, 1] = 200, 200
    return Image.fromarray(a)

def test_a_crop_has_its_margin_and_ends_at_the_edges(picture):
    learn = Reddest()
    Pipeline(boxes(((10, 20, 30, 60), .9), ((80, 60, 100, 80), .8), ((40.4, 10, 50.6, 20), .7)), learn, margin=.25).annotate(picture)
    (crops,) = learn.calls                                                # one call for all
    want = [(5, 10, 35, 70), (75, 55, 100, 80), (37, 7, 54, 23)]
    assert [c.size for c in crops] == [(r-l, b-t) for l, t, r, b in want]
    assert all(np.array_equal(np.asarray(c), np.asarray(picture.crop(box))) for c, box in zip(crops, want))

def test_what_comes_back(picture):
    r = Pipeline(boxes(((60, 10, 90, 40), .5), ((10, 20, 30, 60), .9, 'thing')), Reddest(), margin=0).annotate(picture)
    assert r.objects == [dict(box=[10., 20., 30., 60.], score=.9, detected='thing', label='red', probability=.9), dict(box=[60., 10., 90., 40.], score=.5, label='green', probability=.9)]
    assert list(r.counts.items()) == [('green', 1), ('red', 1)] and json.loads(json.dumps(r.to_dict())) == dict(objects=r.objects, counts=r.counts)
    assert r.image.size == picture.size and r.image.tobytes() != picture.tobytes() and repr(r) == 'Annotated: 2 objects (1 green, 1 red)'
    assert picture.getpixel((10, 20)) == (200, 0, 0)                      # the picture given is not drawn on

def test_the_picture_can_be_kept(picture, tmp_path):
    r = Pipeline(boxes(((10, 20, 30, 60), .9)), Reddest()).annotate(picture)
    assert Image.open(r.save(tmp_path/'a.png')).tobytes() == r.image.tobytes() == Image.open(io.BytesIO(r._repr_png_())).tobytes()
    assert max(Image.open(io.BytesIO(Pipeline(boxes(), Reddest()).annotate(picture.resize((2000, 1600)))._repr_png_())).size) == 1024

@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'P'])
def test_nothing_found_changes_nothing(picture, mode):
    learn, given = Reddest(), picture.convert(mode)
    r = Pipeline(boxes(), learn).annotate(given)
    assert (r.objects, r.counts, learn.calls) == ([], {}, []) and r.image.tobytes() == given.convert('RGB').tobytes()

def test_every_kind_of_input(picture, tmp_path):
    path = tmp_path/'a.png'; picture.save(path)
    pipeline, want = Pipeline(boxes(((10, 20, 30, 60), .9)), Reddest()), None
    with open(path, 'rb') as f:
        for raw in (path, str(path), path.read_bytes(), f, picture, np.asarray(picture), torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)):
            r = pipeline.annotate(raw)
            want = want or r
            assert r.objects == want.objects and r.image.tobytes() == want.image.tobytes()

@pytest.mark.parametrize('orientation', range(1, 9))
def test_the_picture_is_upright_before_anything_is_looked_for(tmp_path, orientation, picture):
    exif = Image.Exif(); exif[0x0112] = orientation
    picture.save(tmp_path/'a.png', exif=exif)
    seen = []
    def detector(image): seen.append(image); return [((0, 0, 20, 20), .9)]
    learn = Reddest()
    r = Pipeline(detector, learn, margin=0).annotate(tmp_path/'a.png')
    want = ImageBlock().read(tmp_path/'a.png', module.FrameDraw(())).permute(1, 2, 0).numpy()
    assert r.image.size == seen[0].size == ((100, 80) if orientation < 5 else (80, 100)) and seen[0].mode == 'RGB'
    assert np.array_equal(np.asarray(seen[0]), want) and np.array_equal(np.asarray(learn.calls[0][0]), want[:20, :20])

def test_overlapping_boxes_become_the_best_of_them(picture):
    close = [((10, 10, 40, 40), .6), ((12, 10, 42, 40), .9), ((11, 11, 41, 41), .7), ((60, 10, 90, 40), .2)]
    r = Pipeline(boxes(*close), Reddest()).annotate(picture)
    assert [o['score'] for o in r.objects] == [.9, .2]
    assert len(Pipeline(boxes(*close), Reddest(), overlap=1).annotate(picture).objects) == 4
    half = [((0, 0, 30, 30), .9), ((10, 0, 40, 30), .8)]                  # they share 20 of 40 columns: .5
    assert [len(Pipeline(boxes(*half), Reddest(), overlap=o).annotate(picture).objects) for o in (.49, .51)] == [1, 2]

def test_boxes_are_cut_at_the_edges_and_those_outside_left_out(picture):
    r = Pipeline(boxes(((-20, -5, 30, 30), .9), ((200, 10, 220, 30), .8), ((50, 50, 50, 60), .7), ((90, 70, 500, 500), .6)), Reddest()).annotate(picture)
    assert [o['box'] for o in r.objects] == [[0, 0, 30, 30], [90, 70, 100, 80]]

def test_unsure_crops_are_unknown_and_grey(picture):
    box = ((10, 20, 60, 70), .9)
    sure, unsure = (Pipeline(boxes(box), Reddest(.7), threshold=t).annotate(picture) for t in (.7, .71))
    assert sure.counts == {'red': 1} and unsure.counts == {'unknown': 1} and unsure.objects[0]['probability'] == .7
    assert unsure.image.getpixel((10, 69)) == (128, 128, 128) != sure.image.getpixel((10, 69))

def test_several_pictures_are_classified_together(picture):
    learn = Reddest()
    detector = lambda image: [((5, 5, 30, 30), .9)]*(image.size == (100, 80)) + [((image.width-30, 5, image.width-5, 30), .8)]
    pipeline = Pipeline(detector, learn)
    several = pipeline.annotate_batch([picture, picture.resize((200, 80)), picture.crop((50, 0, 100, 80))])
    assert len(learn.calls) == 1 and [r.counts for r in several] == [{'green': 1, 'red': 1}, {'green': 1}, {'green': 1}]
    assert several[0].image.tobytes() == pipeline(picture).image.tobytes() and pipeline.annotate_batch([]) == []

def test_a_crop_is_classified_as_if_it_were_predicted(picture, tiny):
    p = Predictor(tiny(2, seed=3), (ImageBlock(), CategoryBlock(vocab=['a', 'b'])), geometries=(Resize(16),))
    r = Pipeline(boxes(((10, 20, 33, 61), .9), ((40, 5, 80, 50), .8)), p, margin=0).annotate(picture)
    for o in r.objects:
        label, _, probs = p.predict(picture.crop(tuple(map(int, o['box']))))
        assert o['label'] == label and abs(o['probability'] - float(probs.max())) < 1e-5
    assert Pipeline(boxes(((10, 20, 33, 61), .9)), p, threshold=.999).annotate(picture).counts == {'unknown': 1}

def test_a_learner_as_it_is_now(dls, tiny, picture):
    from blocks.train.learner import Learner
    learn = Learner(dls, tiny(2))
    pipeline = Pipeline(boxes(((10, 20, 33, 61), .9)), learn)
    labels = []
    for bias in ([9., 0.], [0., 9.]):
        learn.model.load_state_dict({**learn.model.state_dict(), '5.bias': torch.tensor(bias)})
        learn.model.train()                                               # as a fit without validation leaves it
        labels.append(pipeline.annotate(picture).objects[0]['label'])
    assert labels == ['cat', 'dog']


# What a detector may be, and what it may not give

class Corner(nn.Module):
    "Finds the upper left quarter of every picture"
    def forward(self, x): return torch.tensor([[[-1., -1, 0, 0, .8, 1], [0, 0, 1, 1, .1, 0]]]).expand(len(x), -1, -1)

def box_predictor(): return Predictor(Corner(), (ImageBlock(), BBoxBlock(vocab=['hand', 'face'])), geometries=(Resize(32, 'squish'),))

def test_a_model_of_boxes_is_a_detector(picture):
    p = box_predictor()
    for detector in (p, types.SimpleNamespace(dls=types.SimpleNamespace(targets=[p.target]), predict=p.predict), lambda image: p.predict(image)[0]):       # itself, a learner, its answers
        r = Pipeline(detector, Reddest()).annotate(picture)
        assert [(o['detected'], round(o['score'], 3)) for o in r.objects] == [('face', .8)] and np.allclose(r.objects[0]['box'], [0, 0, 50, 40], atol=.1)

def test_boxes_of_any_kind_of_numbers(picture):
    for box in ([10, 20, 30, 60], torch.tensor([10., 20, 30, 60]), np.array([10, 20, 30, 60], dtype=np.int32)):
        r = Pipeline(boxes((box, np.float32(.5))), Reddest()).annotate(picture)
        assert r.objects[0]['box'] == [10, 20, 30, 60]; json.dumps(r.to_dict())

@pytest.mark.parametrize('given, says', [(None, 'gave a NoneType'), ([(1, 2, 3, 4)], 'expected'), ([((1, 2, 3), .5)], 'expected'), ([((10, 10, 5, 5), .5)], 'width'), ([((1, 2, float('nan'), 4), .5)], 'finite'),
                                         ([((1, 2, 3, 4), float('inf'))], 'finite'), ([5], 'expected'), (['abcd'], 'expected')])
def test_a_wrong_answer_of_the_detector_is_said(picture, given, says):
    with pytest.raises(DataError, match=says): Pipeline(lambda image: given, Reddest()).annotate(picture)

def test_what_cannot_work_is_said_at_once():
    several = Predictor(nn.Identity(), (ImageBlock(), MultiCategoryBlock(vocab=['a', 'b'])))
    classes = Predictor(nn.Identity(), (ImageBlock(), CategoryBlock(vocab=['a', 'b'])))
    for make in (lambda: Pipeline('cascade', Reddest()), lambda: Pipeline(classes, Reddest()), lambda: Pipeline(boxes(), several), lambda: Pipeline(boxes(), lambda x: x),
                 lambda: Pipeline(boxes(), Reddest(), margin=-1), lambda: Pipeline(boxes(), Reddest(), margin=float('nan')), lambda: Pipeline(boxes(), Reddest(), threshold=2), lambda: Pipeline(boxes(), Reddest(), overlap='x')):
        with pytest.raises(DataError): make()

def test_what_is_no_picture(tmp_path):
    for raw in (b'no picture', tmp_path/'none.png', 5):
        with pytest.raises(ItemError): Pipeline(boxes(), Reddest()).annotate(raw)

def test_an_error_of_the_classifier_is_not_a_label(picture):
    learn = types.SimpleNamespace(predict_batch=lambda items: types.SimpleNamespace(to_dicts=lambda topk: [dict(item='0', error='no memory')]))
    with pytest.raises(DataError, match='no memory'): Pipeline(boxes(((10, 20, 30, 60), .9)), learn).annotate(picture)


# The drawing

@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.lists(st.tuples(*[st.floats(-400, 400)]*2, *[st.floats(0, 500)]*2), min_size=1, max_size=3), st.text(max_size=60))
def test_nothing_is_drawn_outside(size, given, label):
    drawn, made = [], module.ImageDraw.Draw
    def recording(image):
        d = made(image); rectangle, text = d.rectangle, d.text
        d.rectangle = lambda xy, **kw: (drawn.append(xy), rectangle(xy, **kw))
        d.text = lambda xy, text_, **kw: (drawn.append(d.textbbox(xy, text_, font=kw['font'])), text(xy, text_, **kw))
        return d
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module.ImageDraw, 'Draw', recording)
        ground = Image.new('RGB', size, (90, 90, 90))
        result = draw_boxes(ground, [dict(box=(x, y, x+w, y+h), label=label, probability=.5) for x, y, w, h in given])
    assert result.size == size and ground.getextrema() == ((90, 90),)*3
    assert drawn and all(x1 >= 0 and y1 >= 0 and x2 <= size[0] and y2 <= size[1] for x1, y1, x2, y2 in drawn)

def luminance(colour):
    linear = [v/12.92 if (v := c/255) <= .03928 else ((v+.055)/1.055)**2.4 for c in colour]
    return .2126*linear[0] + .7152*linear[1] + .0722*linear[2]

def test_letters_can_be_read_on_their_ground():
    for colour in (*module._COLOURS, module._GREY):
        lo, hi = sorted(map(luminance, (colour, module._readable_on(colour))))
        assert (hi + .05)/(lo + .05) > 3                                  # the contrast that WCAG asks of large letters

def test_colours_are_those_of_the_classes():
    colour = lambda label, classes: draw_boxes(Image.new('RGB', (200, 200)), [dict(box=(50, 100, 150, 190), label=label)], classes).getpixel((50, 150))
    assert len({colour(str(i), list('0123456')) for i in range(7)}) == 7 and colour('b', ['a', 'b']) == colour('b', ['x', 'b', 'z'])
    assert colour('cat', []) == colour('cat', []) and colour(3, [1, 2, 3]) == colour('3', '123')

def test_letters_and_lines_grow_with_the_picture():
    def grey_rows(n): return int((np.asarray(draw_boxes(Image.new('RGB', (n, n)), [dict(box=(0, n/2, n, n), label='unknown')])) == 128).all(-1).any(1).sum())
    line = lambda n: int((np.asarray(draw_boxes(Image.new('RGB', (n, n)), [dict(box=(0, 0, n-1, n-1), label='unknown')]))[n//2, :n//2] == 128).all(-1).sum())
    assert grey_rows(2000) > 0 and line(3000) > 3*line(300)


# OpenCV's detectors

@pytest.fixture(scope='module')
def portrait():
    from matplotlib.cbook import get_sample_data
    return Image.open(get_sample_data('grace_hopper.jpg')).convert('RGB')

def test_a_cascade_finds_the_face(portrait):
    (box, score), = CascadeDetector()(portrait)
    assert box[0] < 230 < 300 < box[2] and box[1] < 160 < 270 < box[3] and .5 <= score < 1
    scores = [s for n in (3, 10) for _, s in CascadeDetector(min_neighbors=n)(portrait)]
    assert len(scores) == 2 and scores[0] > scores[1] >= .5

def test_a_large_picture_is_searched_smaller(portrait):
    (small, _), (large, _) = (CascadeDetector(max_side=300)(o)[0] for o in (portrait, portrait.resize((1024, 1200))))
    assert np.allclose(np.array(small)*2, large, atol=60)

@pytest.mark.parametrize('size', [(1, 1), (5, 300), (23, 23)])
def test_a_picture_smaller_than_the_window(size): assert CascadeDetector()(Image.new('RGB', size)) == []

def test_cascades_in_threads(portrait):
    detector, pictures = CascadeDetector(), [portrait.resize((150 + 5*i, 180 + 6*i)) for i in range(6)]
    want = [detector(o) for o in pictures]
    classifiers = set()
    def look(o): classifiers.add(id(detector._classifier.own)); return detector(o)
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(look, pictures*2)) == want*2 and len(classifiers) > 1
    assert any(want)

def test_a_wrong_name_says_which_there_are():
    with pytest.raises(DataError, match='frontalface_alt2'): CascadeDetector('frontal')
    for wrong in (dict(scale=1), dict(min_neighbors=0), dict(max_side=0)):
        with pytest.raises(DataError): CascadeDetector(**wrong)

def test_opencv_5_has_no_cascades(monkeypatch, tmp_path):
    import cv2
    monkeypatch.setattr(cv2, '__version__', '5.0.0')
    with monkeypatch.context() as m:
        m.delattr(cv2, 'CascadeClassifier')
        with pytest.raises(MissingExtraError, match=r'OpenCV 5\.0\.0 .*<5'): CascadeDetector()
    monkeypatch.setattr(cv2.data, 'haarcascades', str(tmp_path))
    with pytest.raises(MissingExtraError, match=r'OpenCV 5\.0\.0 .*<5'): CascadeDetector()

def test_without_opencv(monkeypatch, tmp_path):
    (tmp_path/'a.onnx').write_bytes(b'x')
    monkeypatch.setitem(sys.modules, 'cv2', None)
    for make in (CascadeDetector, lambda: YuNetDetector(tmp_path/'a.onnx'), lambda: load_detector('cascade')):
        with pytest.raises(MissingExtraError, match=r'blocks\[detect\]'): make()

@pytest.fixture(scope='module')
def yunet(tmp_path_factory):
    "A file with the inputs and outputs of YuNet that gives a box for each fully red cell of 32 pixels; the real weights are not here"
    onnx = pytest.importorskip('onnx')
    helper, nodes, given, outs = onnx.helper, [], [], {}
    def constant(name, a, dtype=np.float32): given.append(onnx.numpy_helper.from_array(np.asarray(a, dtype=dtype), name)); return name
    nodes.append(helper.make_node('Conv', ['input', constant('w', np.array([-1, -1, 1]).reshape(1, 3, 1, 1)/255)], ['red'], kernel_shape=[1, 1]))       # the input is blue, green, red
    constant('rows', [1, -1, 1], np.int64)
    for s in (8, 16, 32):
        nodes += [helper.make_node('AveragePool', ['red'], [f'p{s}'], kernel_shape=[s, s], strides=[s, s]), helper.make_node('Transpose', [f'p{s}'], [f't{s}'], perm=[0, 2, 3, 1]), helper.make_node('Reshape', [f't{s}', 'rows'], [f'm{s}'])]
        for kind, scale, offset in (('cls', [float(s == 32)], [0.]), ('obj', [1.], [0.]), ('bbox', [0.]*4, [.5, .5, 0, 0]), ('kps', [0.]*10, [0.]*10)):
            name = f'{kind}_{s}'
            nodes += [helper.make_node('Mul', [f'm{s}', constant(f'k_{name}', [[scale]])], [f'x_{name}']), helper.make_node('Add', [f'x_{name}', constant(f'o_{name}', [[offset]])], [name])]
            outs[kind, s] = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, (640//s)**2, len(scale)])
    graph = helper.make_graph(nodes, 'yunet', [helper.make_tensor_value_info('input', onnx.TensorProto.FLOAT, [1, 3, 640, 640])], [outs[k, s] for k in ('cls', 'obj', 'bbox', 'kps') for s in (8, 16, 32)], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 11)]); model.ir_version = 6
    path = tmp_path_factory.mktemp('yunet')/'yunet.onnx'; onnx.save(model, path)
    return path

def test_yunet_boxes_and_scores(yunet):
    detector, im = YuNetDetector(yunet), Image.new('RGB', (320, 256))
    im.paste((255, 0, 0), (64, 32, 96, 64)); im.paste((0, 0, 255), (160, 96, 192, 128))              # blue is not found: the order of the channels is right
    assert detector(im) == [((64, 32, 96, 64), 1.)] and detector(Image.new('L', (50, 70), 255)) == []
    large = im.resize((2560, 2048), Image.Resampling.NEAREST)
    (box, score), = YuNetDetector(yunet, max_side=320)(large)
    assert box == (512, 256, 768, 512) and score > .95
    im.paste((180, 0, 0), (64, 32, 96, 64))
    assert YuNetDetector(yunet, min_score=.8)(im) == [] and .6 < YuNetDetector(yunet, min_score=.5)(im)[0][1] < .8
    with ThreadPoolExecutor(4) as pool: assert all(o == [((64, 32, 96, 64), 1.)] for o in pool.map(YuNetDetector(yunet), [large.resize((320, 256), Image.Resampling.NEAREST)]*8))

def test_a_file_that_is_no_yunet(tmp_path, yunet):
    onnx = pytest.importorskip('onnx')
    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 64, 64])
    other = onnx.helper.make_model(onnx.helper.make_graph([onnx.helper.make_node('Relu', ['input'], ['out'])], 'other', [value('input')], [value('out')]), opset_imports=[onnx.helper.make_opsetid('', 11)]); other.ir_version = 6
    onnx.save(other, tmp_path/'other.onnx')
    (tmp_path/'garbage.onnx').write_bytes(b'garbage'*100); (tmp_path/'empty.onnx').write_bytes(b''); (tmp_path/'cut.onnx').write_bytes(yunet.read_bytes()[:200])
    for name in ('other', 'garbage', 'empty', 'cut'):
        with pytest.raises(DataError, match=f'{name}.onnx is not a YuNet'): YuNetDetector(tmp_path/f'{name}.onnx')
    with pytest.raises(DataError, match='opencv_zoo'): YuNetDetector(tmp_path/'none.onnx')

def test_detectors_by_name(yunet, tmp_path):
    assert load_detector('cascade') == CascadeDetector() and load_detector('cascade:eye') == CascadeDetector('eye') and load_detector(yunet) == YuNetDetector(str(yunet))
    for wrong in ('nothing', tmp_path, 'cascade:nose'):
        with pytest.raises(DataError): load_detector(wrong)

def test_the_export_of_a_detection_learner(tmp_path, picture):
    from blocks.model.detect import create_detector
    net = create_detector('ssdlite320_mobilenet_v3_large', 2, pretrained=False)
    p = Predictor(net, (ImageBlock(), BBoxBlock(vocab=['hand', 'face'], min_score=0)), geometries=(Resize(64),))
    found = Pipeline(load_detector(export_predictor(p, tmp_path/'boxes.pkl')), Reddest(), overlap=1).annotate(picture).objects
    assert len(found) == len([o for o in p.predict(picture)[0] if min(o.box[2]-o.box[0], o.box[3]-o.box[1]) >= 1]) and {o['detected'] for o in found} <= {'hand', 'face'}

def test_the_export_of_a_classifier_is_no_detector(tmp_path):
    from blocks.model.head import create_vision_model
    p = Predictor(create_vision_model('resnet18', 2, pretrained=False), (ImageBlock(), CategoryBlock(vocab=['a', 'b'])), geometries=(Resize(16),))
    with pytest.raises(DataError, match='has to give boxes'): load_detector(export_predictor(p, tmp_path/'classes.pkl'))

def test_read_upright_is_what_predict_reads(picture):
    assert read_upright(picture).tobytes() == picture.tobytes() and read_upright(np.asarray(picture.convert('L'))).mode == 'RGB'
