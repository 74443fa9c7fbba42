"Answers: unsure ones, of damaged files, of several views, of every kind, in every form."
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from blocks import (BBoxBlock, CategoryBlock, DataError, ImageBlock, ItemError, Learner, MaskBlock, MultiCategoryBlock, PointBlock, Predictor, RegressionBlock, Resize, cnn_learner,
                    get_image_files)


@pytest.fixture
def files(two_class): return sorted(get_image_files(two_class))[20:30]         # four cats, then six dogs

@pytest.fixture
def learn(dls, tiny, tmp_path): return Learner(dls, tiny(), path=tmp_path)

@pytest.fixture
def p(learn): return learn.predictor

class Says(nn.Module):
    "Gives the same for every picture"
    def __init__(self, value): super().__init__(); self.value = torch.tensor(value)
    def forward(self, x): return self.value.expand(len(x), *self.value.shape)

def predictor(block, value, size=16): return Predictor(Says(value), (ImageBlock(), block), geometries=() if size is None else (Resize(size),))

# --- one that is not sure
def test_a_class_below_the_threshold_is_unknown(files):
    p = predictor(CategoryBlock(vocab=('a', 'b', 'c')), [0., 1.5, 0.])
    top = float(p.predict(files[0])[2].max())
    assert p.predict(files[0], threshold=top - .01)[0] == 'b' and p.predict(files[0], threshold=top - .01)[1] == 1
    label, index, probs = p.predict(files[0], threshold=top + .01)
    assert (label, int(index)) == ('unknown', -1) and torch.equal(probs, p.predict(files[0])[2])
    assert p.predict_batch(files, threshold=top + .01).labels == ['unknown']*10 and p.predict_batch(files).labels == ['b']*10

def test_reject_turns_away_its_share_of_held_back_items(learn):
    with pytest.raises(DataError, match='calibrate'): learn.predict_batch(learn.dls.valid_ds.fields[0], reject=.25)
    learn.calibrate()
    held_back = list(learn.dls.valid_ds.fields[0])
    for share in (0, .25, .5): assert learn.predict_batch(held_back, reject=share).labels.count('unknown') == int(share*len(held_back))

def test_confidences_go_along_in_the_file(learn, files):
    from blocks import load_learner
    learn.calibrate()
    back = load_learner(learn.export(), model=learn.model)
    assert back.predict_batch(files, reject=.5).labels == learn.predict_batch(files, reject=.5).labels and 'unknown' in back.predict_batch(files, reject=.9).labels

def test_several_labels_and_boxes_have_a_threshold_too(files):
    several = predictor(MultiCategoryBlock(vocab=('a', 'b')), [0.4, 3.])
    assert several.predict(files[0])[0] == ['a', 'b'] and several.predict(files[0], threshold=.8)[0] == ['b']
    assert several.predict(files[0], threshold=.8)[1].tolist() == [False, True]
    boxes = predictor(BBoxBlock(vocab=('a',)), [[-.5, -.5, 0., 0., .9, 0.], [0., 0., .5, .5, .3, 0.]])
    assert [len(boxes.predict(files[0], threshold=t)[0]) for t in (.2, .5, .95)] == [2, 1, 0] and len(boxes.predict(files[0])[0]) == 1

@pytest.mark.parametrize('ask', [dict(threshold=1.5), dict(threshold=-.1), dict(reject=2), dict(threshold=.5, reject=.5)])
def test_a_threshold_that_cannot_be_is_an_error(p, files, ask):
    with pytest.raises(DataError): p.predict(files[0], **ask)

def test_numbers_have_no_threshold(files):
    with pytest.raises(DataError, match='RegressionBlock'): predictor(RegressionBlock(n_out=1), [3.]).predict(files[0], threshold=.5)
    with pytest.raises(DataError, match='several labels'): predictor(MultiCategoryBlock(vocab=('a',)), [3.]).predict(files[0], reject=.5)

# --- many items
def test_what_cannot_be_read_keeps_its_place(p, files, tmp_path, recwarn):
    bad, none = tmp_path/'bad.png', tmp_path/'none.png'
    bad.write_bytes(files[0].read_bytes()[:60])
    for workers in (0, 2):
        many = p.predict_batch([files[0], bad, files[9], none], bs=3, num_workers=workers)
        assert many.labels == [p.predict(files[0])[0], None, p.predict(files[9])[0], None] and list(many.errors) == [1, 3] and isinstance(many.errors[1], ItemError)
        assert many[1][0] is None and torch.isnan(many[1][2]).all() and torch.allclose(many[2][2], p.predict(files[9])[2], atol=1e-5)
        assert many.plot_counts() and 'bad.png' in many.to_df().error[1] and many.to_df().error[0] == '' and 'none.png' in many.to_dicts()[3]['error']
    assert len(recwarn) == 2 and 'could not be read' in str(recwarn[0].message) and 'bad.png' in str(recwarn[0].message)

def test_only_bad_files_is_an_answer_too(p, tmp_path):
    (tmp_path/'bad.png').write_text('no picture')
    with pytest.warns(UserWarning, match='1 of 1'): many = p.predict_batch([tmp_path/'bad.png'])
    assert many.labels == [None] and list(many.to_df().columns) == ['item', 'prediction', 'probability', 'p(cat)', 'p(dog)', 'error']

def test_a_folder_a_column_and_a_path_are_items(p, two_class, files):
    import pandas as pd
    assert [str(o) for o in p.predict_batch(two_class/'cat').items] == sorted(map(str, get_image_files(two_class/'cat')))
    table = pd.DataFrame(dict(f=files))
    assert p.predict_batch(table.f).labels == p.predict_batch(files).labels and p.predict_batch(str(files[0])).labels == [p.predict(files[0])[0]]
    with pytest.raises(DataError, match="'f'"): p.predict_batch(table)
    with pytest.raises(DataError, match='no image in the folder'): p.predict_batch(two_class.parent/'nowhere' if (two_class.parent/'nowhere').mkdir() is None else '')

def test_progress_is_told_on_stderr_and_nothing_without(p, files, capsys):
    p.predict_batch(files, bs=4)
    assert capsys.readouterr() == ('', '')
    p.predict_batch(files, bs=4, progress=True)
    assert capsys.readouterr() == ('', '\r4 of 10\r8 of 10\r10 of 10\n')

def test_samples_of_different_size_are_run_apart(p, files):
    free = Predictor(p.model, p.blocks)
    pictures = [Image.new('RGB', (20 + i % 3, 30), (i*20, 50, 99)) for i in range(7)]
    many = free.predict_samples([free.read_item(o) for o in pictures], pictures)
    assert len(many) == 7 and all(torch.allclose(many[i][2], free.predict(o)[2], atol=1e-5) for i, o in enumerate(pictures))
    masks = predictor(MaskBlock(codes=('sky', 'road')), np.zeros((2, 1, 1), np.float32), size=None)
    masks.model = nn.Conv2d(3, 2, 1)
    sizes = [label.shape for label in masks.predict_batch(pictures).labels]
    assert sizes == [(30, 20 + i % 3) for i in range(7)]

# --- several views
def test_views_are_those_of_the_learner(learn, files):
    dl = learn.dls.test_dl(files)
    want = learn.to_fp32().tta(dl=dl.new(seed=0, samples=dl.samples.new(seed=0)), n=3)[0]                # the same draws
    got = learn.predict_batch(files, tta=3).probs
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(learn.predict(files[2], tta=3)[2].sum(), torch.tensor(1.), atol=1e-5)

def test_views_of_a_file_object_and_beside_a_bad_file(learn, files, tmp_path):
    with open(files[0], 'rb') as f: assert torch.allclose(learn.predict(f, tta=2)[2], learn.predict(files[0], tta=2)[2])
    (tmp_path/'bad.png').write_text('no picture')
    with pytest.warns(UserWarning): many = learn.predict_batch([tmp_path/'bad.png', files[0]], tta=2)
    assert many.labels[0] is None and torch.allclose(many.probs[1], learn.predict(files[0], tta=2)[2], atol=1e-5)

def test_views_that_are_not_known_or_would_move_places_are_an_error(p, files):
    with pytest.raises(DataError, match='transforms of its training'): Predictor(p.model, p.blocks, geometries=p.geometries).predict(files[0], tta=2)
    points = predictor(PointBlock(n_points=1), [0., 0.])
    points.views = ((), (), ())
    with pytest.raises(DataError, match='PointBlock'): points.predict(files[0], tta=2)

# --- features
def test_features_are_the_mean_of_the_last_map(dls, files, tmp_path):
    learn = cnn_learner(dls, 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path)
    got = learn.embed(files, bs=3)
    learn.model.eval()
    x = torch.cat([o[0] for o in dls.test_dl(files)])
    with torch.no_grad(): want = learn.model[0](x).mean((2, 3))
    assert got.shape == (10, 1024) and got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-4)
    with pytest.raises(ItemError, match='none.png'): learn.embed([files[0], tmp_path/'none.png'])

def test_a_model_of_ones_own_has_no_body_to_embed_with(p, files):
    with pytest.raises(DataError, match='Sequential'): p.embed(files)

# --- as JSON
@pytest.mark.parametrize('block, value, want', [
    (CategoryBlock(vocab=('a', 'b')), [0., 0.], dict(kind='category', label='a', probability=.5, top=[dict(label='a', probability=.5), dict(label='b', probability=.5)])),
    (MultiCategoryBlock(vocab=(7, 8)), [0., 50.], dict(kind='multi', labels=[8], top=[dict(label=8, probability=1.), dict(label=7, probability=.5)])),
    (RegressionBlock(n_out=1), [2.5], dict(kind='number', value=2.5)),
    (RegressionBlock(n_out=2), [2.5, 1.], dict(kind='number', value=[2.5, 1.])),
    (PointBlock(n_points=2), [-1., -1., 0., 1.], dict(kind='points', points=[[4., 0.], [20., 32.]])),                      # the picture is 40×32, the middle 32×32 is seen
    (BBoxBlock(vocab=('car',)), [[-1., -1., 0., 1., .75, 0.]], dict(kind='boxes', boxes=[dict(label='car', score=.75, box=[4., 0., 20., 32.])])),
    (MaskBlock(codes=('sky', 'road')), np.stack([np.full((16, 16), .5), np.eye(16)]).astype(np.float32), dict(kind='mask', shares=dict(sky=15/16, road=1/16))),
])
def test_every_kind_of_answer_as_plain_values(files, block, value, want):
    got, = predictor(block, value).predict_batch([files[0]]).to_dicts()
    assert json.loads(json.dumps(got)) == dict(item=str(files[0]), **want)

def test_an_answer_of_a_block_of_ones_own_as_text(files):
    class Odd(RegressionBlock):
        answer = None
        def decode(self, value): return {1, 2}
    assert predictor(Odd(n_out=1), [1.]).predict_batch([files[0]]).to_dicts()[0]['value'] == '{1, 2}'

def test_items_without_a_name_are_numbered(p, files):
    many = p.predict_batch([files[0], files[1].read_bytes(), Image.open(files[2])])
    assert many.names == [str(files[0]), 'item 1', 'item 2'] == list(many.to_df().item)

def test_columns_get_the_names_that_a_competition_wants(p, files, tmp_path):
    p.predict_batch(files).to_csv(tmp_path/'s.csv', columns={'item': 'id', 'prediction': 'label'})
    assert (tmp_path/'s.csv').read_text().splitlines()[0] == 'id,label'

def test_several_labels_are_joined_as_a_competition_wants(files, tmp_path):
    predictor(MultiCategoryBlock(vocab=('a', 'b')), [9., 9.]).predict_batch(files[:1]).to_csv(tmp_path/'s.csv', columns=['prediction'], label_delim=' ')
    assert (tmp_path/'s.csv').read_text().split('\n')[1] == 'a b'

def test_topk_of_the_json(p, files):
    assert [len(p.predict_batch(files[:1]).to_dicts(topk=k)[0]['top']) for k in (1, 2, 9)] == [1, 2, 2]

# --- what is asked, and of what
def test_threads_that_ask_a_learner_agree(dls, tiny, files, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    learn = Learner(dls, tiny(), path=tmp_path)
    learn.model.train()                                                          # as it is before any fit
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    want = [learn.predict(f)[2] for f in files]
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(learn.predict, files*6))
    assert all(torch.equal(g[2], w) for g, w in zip(got, want*6)) and learn.model.training
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())

def test_whole_number_classes_stay_whole_beside_a_bad_file(files, tmp_path):
    with pytest.warns(UserWarning): many = predictor(CategoryBlock(vocab=(0, 1)), [1., 0.]).predict_batch([files[0], tmp_path/'none.png'])
    many.to_csv(tmp_path/'s.csv', columns='prediction')
    assert (tmp_path/'s.csv').read_text().split('\n')[1] == '0' and many.to_dicts()[0]['label'] == 0 and '1 of them' in repr(many)

def test_places_in_a_table_are_json(files, tmp_path):
    for block, value, want in ((PointBlock(n_points=1), [-1., -1.], [[4., 0.]]), (MaskBlock(codes=('sky', 'road')), np.stack([np.ones((16, 16)), np.zeros((16, 16))]).astype(np.float32), dict(sky=1., road=0.))):
        import pandas as pd
        predictor(block, value).predict_batch(files[:2]).to_csv(tmp_path/'s.csv')
        assert json.loads(pd.read_csv(tmp_path/'s.csv').prediction[1]) == want

def test_one_item_is_a_list_of_one(p, files):
    picture = Image.open(files[0])
    with open(files[0], 'rb') as f:
        for one in (picture, np.asarray(picture), files[0].read_bytes(), f, str(files[0])): assert p.predict_batch(one).labels == [p.predict(files[0])[0]]
    assert p.predict_batch(np.stack([np.asarray(picture)]*3)).labels == [p.predict(files[0])[0]]*3
    with pytest.raises(DataError, match='no file and no folder'): p.predict_batch('nowhere/')

def test_two_inputs_are_a_pair(tiny, files):
    class Both(nn.Module):
        def __init__(self): super().__init__(); self.net = tiny()
        def forward(self, a, b): return self.net(a) - self.net(b)
    two = Predictor(Both(), (ImageBlock(), ImageBlock(), CategoryBlock(vocab=('a', 'b'))), n_inp=2, geometries=(Resize(16),))
    assert torch.allclose(two.predict_batch([(files[0], files[9])]).probs[0], two.predict((files[0], files[9]))[2], atol=1e-6)
    for wrong in (files[0], (files[0],), (files[0],)*3):
        with pytest.raises(DataError, match='takes 2 inputs'): two.predict(wrong)
        with pytest.raises(DataError, match='takes 2 inputs'): two.predict_batch([wrong])

@pytest.mark.parametrize('ask', [dict(bs=0), dict(bs=None), dict(tta=-1), dict(threshold='x')])
def test_what_cannot_be_asked_of_many_is_an_error(p, files, ask):
    with pytest.raises(DataError, match=next(iter(ask))): p.predict_batch(files, **ask)

@pytest.mark.parametrize('ask', [dict(topk=0), dict(topk=-1), dict(tta=1.5), dict(topk=2, threshold=.9)])
def test_what_cannot_be_asked_of_one_is_an_error(p, files, ask):
    with pytest.raises(DataError, match=next(iter(ask))): p.predict(files[0], **ask)

def test_a_loaded_predictor_is_exported_again(dls, files, tmp_path):
    from blocks import load_learner
    learn = cnn_learner(dls, 'shufflenet_v2_x0_5', pretrained=False, path=tmp_path)
    back = load_learner(load_learner(learn.export(), cpu=True).export(tmp_path/'again.safetensors'))
    assert torch.allclose(back.predict(files[0], tta=2)[2], learn.predict(files[0], tta=2)[2], atol=1e-4) and back.info['architecture'] == 'shufflenet_v2_x0_5'
