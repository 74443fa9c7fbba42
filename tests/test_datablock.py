import shutil
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.foundation import L
from PIL import Image
from torchvision.transforms import v2

from blocks import (BlocksError, CategoryBlock, ColReader, DataBlock, DataError, DataLoaders, Datasets, DeviceError, EndSplitter, Flip, GrandparentSplitter, ImageBlock,
                    ImageDataLoaders, ItemError, Loader, Normalize, RandomResizedCrop, RandomSplitter, Resize, StratifiedSplitter, aug_transforms, get_image_files, imagenet_stats, parent_label)

matplotlib.use('Agg')
CPU = dict(num_workers=0, device='cpu')

def block(**kw): return DataBlock(**{**dict(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=1), item_tfms=Resize(16)), **kw})

def build(root, bs=8, **kw): return block(**kw).dataloaders(root, bs=bs, seed=3, **CPU)

def save(path, colour=(10, 20, 30), size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path)
    return path

def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) > 0 and all(torch.equal(s, t) for x, y in zip(a, b) for s, t in zip(x, y))

@pytest.fixture
def copied(two_class, tmp_path):
    "The two classes, to be damaged"
    return Path(shutil.copytree(two_class, tmp_path/'d'))

@pytest.fixture
def figures():
    "The axes with pictures of the figure that was drawn last"
    import matplotlib.pyplot as plt
    plt.close('all')
    yield lambda: [a for a in plt.gcf().axes if a.images]
    plt.close('all')

@pytest.fixture
def table(two_class):
    "File names below the folder, a text label, a number as label, and a mark for validation"
    files = get_image_files(two_class)
    return pd.DataFrame(dict(name=[str(f.relative_to(two_class)) for f in files], label=[f.parent.name for f in files], number=[int(f.parent.name == 'dog')*7 for f in files],
                             held=[i % 4 == 0 for i in range(len(files))]), index=range(100, 100 + len(files)))

# --- bad input: no usable items
def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=f'0 items in .*{tmp_path.name}.*get_image_files'): build(tmp_path)

def test_a_missing_folder_is_named_and_the_nearest_offered(two_class):
    with pytest.raises(FileNotFoundError, match="'cet'.*Did you mean 'cat'"): build(two_class/'cet')

def test_a_folder_without_get_items_says_what_to_set(two_class):
    with pytest.raises(DataError, match='get_items=get_image_files'): block(get_items=None).dataloaders(two_class)

@pytest.mark.parametrize('source', [[], (), L(), np.array([]), pd.DataFrame(dict(a=[]))])
def test_an_empty_list_is_said(source):
    with pytest.raises(DataError, match='0 items'): block(get_items=None).dataloaders(source)

@pytest.mark.parametrize('source', [None, 3])
def test_a_source_that_is_no_list_is_a_clear_error(source):
    with pytest.raises(DataError, match='source|items'): block(get_items=None).dataloaders(source)

@pytest.mark.parametrize('found', [None, Path('a.png'), 'a.png'])
def test_get_items_that_gives_no_list_is_named(two_class, found):
    with pytest.raises(DataError, match='get_items') as e: build(two_class, get_items=lambda p: found)
    assert not isinstance(e.value, ItemError)                           # a text is not a list of letters

def test_get_items_that_raises_is_named(two_class):
    with pytest.raises(DataError, match='get_items failed.*ZeroDivisionError'): build(two_class, get_items=lambda p: 1/0)

# --- bad input: labels
def test_a_label_function_that_raises_names_stage_item_and_cause(two_class):
    with pytest.raises(ItemError, match=r"get_y failed for item .*cat_0\.png.*KeyError: 'cat_0.png'") as e: build(two_class, get_y=lambda p: {}[p.name])
    assert e.value.stage == 'get_y' and e.value.item.name == 'cat_0.png' and isinstance(e.value.__cause__, KeyError)

def test_an_input_function_that_raises_is_named_as_such(two_class):
    with pytest.raises(ItemError, match='get_x failed') as e: build(two_class, get_x=lambda p: p.nothing)
    assert e.value.stage == 'get_x'

def test_a_label_only_in_validation_is_an_error_at_build(tmp_path):
    for i, c in enumerate(('dog', 'dog', 'dog', 'emu')): save(tmp_path/c/f'{i}.png')
    with pytest.raises(DataError, match=r"validation split.*'emu' \(1\).*StratifiedSplitter"): build(tmp_path, splitter=EndSplitter(.25))
    assert build(tmp_path, bs=2, splitter=EndSplitter(.25), blocks=(ImageBlock, CategoryBlock(add_na=True))).vocab == ['#na#', 'dog']

def test_a_label_outside_a_given_vocab_is_not_said_to_be_a_matter_of_the_split(two_class):
    for held in ('cat', 'dog'):                                         # once in validation, once in training
        with pytest.raises(DataError, match="'cat'") as e:
            build(two_class, blocks=(ImageBlock, CategoryBlock(vocab=['dog'])), splitter=lambda o: tuple([i for i, p in enumerate(o) if (p.parent.name == held) == v] for v in (False, True)))
        assert 'vocab does not hold' in str(e.value) and 'training split:' not in str(e.value)

def test_a_missing_label_names_its_item(two_class):
    with pytest.raises(DataError, match='cat_3.png'): build(two_class, get_y=lambda p: None if p.name == 'cat_3.png' else p.parent.name)

def test_a_single_class_is_a_warning(two_class):
    with pytest.warns(UserWarning, match="same class, 'x'"): build(two_class, get_y=lambda p: 'x')

# --- bad input: files
def test_an_unreadable_image_is_named_at_build_with_the_mend(copied):
    (copied/'cat'/'cat_3.png').write_bytes(b'not an image')
    with pytest.raises(ItemError, match=r"ImageBlock.*cat_3\.png.*Unidentified") as e: build(copied)
    assert "on_bad='skip'" in str(e.value) and e.value.item == copied/'cat'/'cat_3.png'

def test_several_unreadable_images_are_counted(copied):
    for i in range(5): (copied/'cat'/f'cat_{i}.png').write_bytes(b'')
    with pytest.raises(ItemError, match='4 more'): build(copied)

def test_a_missing_file_says_to_check_the_path(table, two_class):
    with pytest.raises(ItemError, match='FileNotFoundError.*\n.*pref='): build(table, get_items=None, get_x=ColReader('name', pref='/nowhere/'), get_y=ColReader('label'))

def test_a_truncated_image_is_found_by_skip_and_else_named_when_read(copied):
    bad = copied/'dog'/'dog_5.png'
    bad.write_bytes(bad.read_bytes()[:1000])
    with pytest.raises(ItemError, match='dog_5.png'):
        for dl in build(copied): list(dl.in_order())
    with pytest.warns(UserWarning, match=r'1 of 48 items.*dog_5\.png'): dls = block().dataloaders(copied, bs=8, path=copied, on_bad='skip', **CPU)
    assert list(dls.bad_items) == [bad] and len(dls.train_ds) + len(dls.valid_ds) == 47
    assert bad not in dls.train_ds.fields[0] + dls.valid_ds.fields[0]
    for dl in dls: list(dl)

def test_skipping_does_not_move_other_items_between_train_and_valid(copied):
    before = block().datasets(copied)
    bad = before.train.fields[0][0]
    bad.write_bytes(b'')
    with pytest.warns(UserWarning): after = block().datasets(copied, on_bad='skip')
    assert after.train.fields[0] == before.train.fields[0][1:] and after.valid.fields == before.valid.fields
    assert [after.items[i] for i in after.splits[0]] == after.train.fields[0] and list(after.bad_items) == [bad]

def test_too_many_bad_items_are_an_error_that_says_what_would_allow_them(copied):
    for i in range(6): (copied/'cat'/f'cat_{i}.png').write_bytes(b'')
    with pytest.raises(DataError, match=r'6 of 48 items.*cat_0\.png.*max_bad=0\.1 ') as e: block().dataloaders(copied, path=copied, on_bad='skip', **CPU)
    allowed = float(str(e.value).rsplit('max_bad=')[-1])
    with pytest.warns(UserWarning): assert len(block().dataloaders(copied, bs=8, path=copied, on_bad='skip', max_bad=allowed, **CPU).bad_items) == 6

def test_nothing_left_after_skipping_is_said(copied):
    for f in get_image_files(copied): f.write_bytes(b'')
    with pytest.warns(UserWarning), pytest.raises(DataError, match='(?i)no .*item|nothing|0 .*items'): block().dataloaders(copied, path=copied, on_bad='skip', max_bad=1., **CPU)

def test_only_raise_and_skip_are_known(two_class):
    with pytest.raises(DataError, match="'ignore'"): block().dataloaders(two_class, on_bad='ignore')

def test_pictures_of_different_sizes_without_a_resize_are_an_error_at_build(tmp_path):
    for i in range(8): save(tmp_path/'a'/f'{i}.png', size=(20 + i//4, 16))
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r'20×16.*21×16.*Resize\(224\)|21×16.*20×16.*Resize\(224\)'): build(tmp_path, item_tfms=None)

def test_building_leaves_no_file_open(two_class):
    import gc
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always', ResourceWarning)
        build(two_class, item_tfms=None); gc.collect()
    assert not [w for w in seen if issubclass(w.category, ResourceWarning)]

# --- bad input: arguments
def test_a_batch_larger_than_the_data_is_cut_to_it_and_said(two_class):
    with pytest.warns(UserWarning, match='bs=512 is larger than the 36') as w: dls = build(two_class, bs=512)
    assert len(dls.train) == 1 and len(dls.one_batch()[0]) == 36 and dls.bs == 36
    assert w[0].filename == __file__

@pytest.mark.parametrize('bs', [0, -1, 2.5, '8', None])
def test_a_batch_size_that_is_none_is_a_clear_error(two_class, bs):
    with pytest.raises(DataError, match='bs='): build(two_class, bs=bs)

def test_a_typo_in_a_keyword(two_class):
    with pytest.raises(TypeError, match='batchsize'): block().dataloaders(two_class, batchsize=8)
    with pytest.raises(TypeError, match='item_tfm'): DataBlock(item_tfm=Resize(8))
    with pytest.raises(TypeError, match='batchsize'): ImageDataLoaders.from_folder(two_class, valid_pct=.2, batchsize=8)
    with pytest.raises(TypeError, match='sise'): build(two_class).new(sise=8)

def test_a_gpu_that_is_not_there_is_said_before_anything_is_read():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(DeviceError, match='cuda.*cpu'): block().dataloaders('/nowhere', device='cuda')
    with pytest.raises(DeviceError, match="'gpu'"): block().dataloaders('/nowhere', device='gpu')

def test_blocks_are_checked():
    for blocks in (None, (), (ImageBlock, None), (ImageBlock, 'category'), lambda: 1):
        with pytest.raises(DataError, match='[Bb]lock'): DataBlock(blocks=blocks)
    for n_inp in (0, 3):
        with pytest.raises(DataError, match=f'n_inp={n_inp}'): DataBlock(n_inp=n_inp)

def test_the_number_of_getters_is_checked():
    with pytest.raises(DataError, match='get_y has 2 functions for 1'): block(get_y=[parent_label, parent_label])
    with pytest.raises(DataError, match='get_x has 1 functions for 2'): block(blocks=(ImageBlock, ImageBlock, CategoryBlock), get_x=[str])

def test_a_getter_for_which_there_is_no_block_is_not_ignored():
    with pytest.raises(DataError, match='get_y'): DataBlock(blocks=ImageBlock, get_items=get_image_files, get_y=parent_label)

def test_item_transforms_are_checked_when_the_template_is_made():
    with pytest.raises(DataError, match='ColorJitter comes before Resize'): block(item_tfms=[v2.ColorJitter(.2), Resize(8)])
    with pytest.raises(DataError, match='not callable'): block(item_tfms=[Resize(8), 3])
    with pytest.raises(DataError, match='item_tfms.*Flip.*batch_tfms'): block(item_tfms=[Resize(8), Flip()])
    with pytest.raises(DataError, match='item_tfms.*Resize'): block(item_tfms=Resize)
    with pytest.raises(DataError, match='item_tfms'): block(batch_tfms=Resize(8))

def test_lists_of_item_transforms_may_hold_lists(two_class):
    assert build(two_class, item_tfms=[[Resize(8)], [v2.Grayscale(3)]]).one_batch()[0].shape[-1] == 8

@pytest.mark.parametrize('splitter', [RandomSplitter, EndSplitter, StratifiedSplitter])
def test_a_splitter_may_be_given_as_a_class(two_class, splitter):
    "As blocks and item transforms may; if it is refused, the error must say to call it, and not list all items"
    try: dls = build(two_class, splitter=splitter)
    except DataError as e: assert 'RandomSplitter()' in str(e) or f'{splitter.__name__}()' in str(e); assert len(str(e)) < 500
    else: assert len(dls.valid_ds) == 9

def test_a_splitter_that_leaks_is_found(two_class):
    with pytest.raises(DataError, match='leaks.*share 2'): build(two_class, splitter=lambda o: (range(20), range(18, 30)))

def test_a_splitter_that_raises_is_named(two_class):
    with pytest.raises(DataError, match='splitter failed on 48 items: ZeroDivisionError'): build(two_class, splitter=lambda o: 1/0)

# --- templates
def test_one_template_serves_two_sources(two_class, tmp_path):
    for i in range(8): save(tmp_path/('emu', 'fox')[i % 2]/f'{i}.png')
    template = block()
    a, b = template.dataloaders(two_class, bs=8, **CPU), template.dataloaders(tmp_path, bs=2, **CPU)
    assert a.vocab == ['cat', 'dog'] and b.vocab == ['emu', 'fox'] and template.blocks[1].vocab is None

def test_a_template_cannot_be_changed_but_renewed(two_class):
    template = block()
    with pytest.raises(AttributeError): template.item_tfms = None
    small = template.new(item_tfms=RandomResizedCrop(8, min_scale=.5), batch_tfms=aug_transforms())
    assert small.dataloaders(two_class, bs=8, **CPU).one_batch()[0].shape[-1] == 8 and template.item_tfms == Resize(16)

@pytest.mark.parametrize('blocks', [(ImageBlock, CategoryBlock), [ImageBlock(), CategoryBlock()], (ImageBlock, CategoryBlock(vocab=['dog', 'cat']))])
def test_blocks_as_classes_or_instances(two_class, blocks):
    assert build(two_class, blocks=blocks).vocab == (['dog', 'cat'] if getattr(blocks[1], 'vocab', None) else ['cat', 'dog'])

def test_one_block_alone_has_inputs_only(two_class):
    dls = build(two_class, blocks=ImageBlock, get_y=None)
    x, = dls.one_batch()
    assert x.shape == (8, 3, 16, 16) and dls.vocab is None and list(dls.targets) == []
    assert dls.c is None

def test_getters_alone_or_in_lists(two_class):
    for kw in (dict(get_y=[parent_label]), dict(get_x=[str], get_y=[parent_label]), dict(get_x=lambda p: p.read_bytes()), dict(get_x=L(Image.open))):
        assert same(build(two_class, **kw).valid, build(two_class).valid)

def test_two_pictures_as_input(two_class, tmp_path):
    blocks, twin = (ImageBlock, ImageBlock, CategoryBlock), lambda p: p.with_name(p.name.replace(p.stem.split('_')[1], '0'))
    dls = build(two_class, blocks=blocks, get_x=[lambda p: p, twin], item_tfms=RandomResizedCrop(16), batch_tfms=[Flip(.5), *aug_transforms()])
    assert dls.n_inp == 2 and len(dls.targets) == 1 and dls.c == 2
    a, b, y = dls.one_batch()
    assert a.shape == b.shape == (8, 3, 16, 16) and y.shape == (8,)
    a, b, _ = build(two_class, blocks=blocks, item_tfms=RandomResizedCrop(16), batch_tfms=aug_transforms()).one_batch()     # one getter for both
    assert torch.equal(a, b)

def test_a_test_loader_for_two_inputs_has_both(two_class):
    dls = build(two_class, blocks=(ImageBlock, ImageBlock, CategoryBlock))
    f = get_image_files(two_class)[:3]
    assert [t.shape[0] for t in dls.test_dl([(o, o) for o in f]).one_batch()] == [3, 3]

# --- sources
@pytest.mark.parametrize('kind', ['L', 'list', 'tuple', 'ndarray', 'generator', 'strings', 'series'])
def test_lists_of_every_kind(two_class, kind):
    files = get_image_files(two_class)
    source = dict(L=files, list=list(files), tuple=tuple(files), ndarray=np.array(list(map(str, files))), generator=(f for f in files), strings=list(map(str, files)), series=pd.Series(list(map(str, files)), index=range(7, 55)))[kind]
    assert same(build(source, get_items=None).train, build(two_class).train)

def test_arrays_and_pictures_as_items(two_class):
    files = get_image_files(two_class)
    arrays = np.stack([np.asarray(Image.open(f)) for f in files])
    label = {a.tobytes(): f.parent.name for a, f in zip(arrays, files)}
    for source in (arrays, list(arrays), [Image.fromarray(a) for a in arrays], [torch.from_numpy(a).permute(2, 0, 1) for a in arrays]):
        to_array = lambda o: o.permute(1, 2, 0).numpy() if isinstance(o, torch.Tensor) else np.asarray(o)
        dls = build(source, get_items=None, get_y=lambda o: label[np.ascontiguousarray(to_array(o)).tobytes()])
        assert same(dls.train, build(two_class).train)

def test_a_table_by_name_by_position_and_by_function(table, two_class):
    want = list(build(two_class).train)
    for get_x, get_y in ((ColReader('name', pref=two_class), ColReader('label')), (ColReader(0, pref=f'{two_class}/'), ColReader(1)),
                         (lambda r: two_class/r['name'], lambda r: r.label), (lambda r: f'{two_class}/{r["name"]}', ColReader('label'))):
        assert same(build(table, get_items=None, get_x=get_x, get_y=get_y).train, want)
    assert same(build(two_class, get_items=lambda p: table, get_x=ColReader('name', pref=two_class), get_y=ColReader('label')).train, want)

def test_a_table_with_a_wrong_column_names_those_there(table, two_class):
    with pytest.raises(DataError, match="'lable'.*Did you mean 'label'"): build(table, get_items=None, get_x=ColReader('name', pref=two_class), get_y=ColReader('lable'))

@pytest.mark.parametrize('label', [lambda p: int(p.parent.name == 'dog'), lambda p: p.parent.name == 'dog', lambda p: np.int64(p.parent.name == 'dog'), lambda p: np.str_(p.parent.name)])
def test_labels_of_several_types(two_class, label):
    dls = build(two_class, get_y=label)
    assert type(dls.vocab[0]) in (int, bool, str) and dls.c == 2
    ys = torch.stack([y for _, y in dls.train_ds])
    assert [dls.vocab[y] for y in ys] == [label(f) for f in dls.train_ds.fields[0]]

def test_folders_as_text_as_path_and_relative(two_class, monkeypatch):
    want = list(build(two_class).train)
    monkeypatch.chdir(two_class.parent)
    for source in (str(two_class), two_class.name, Path(two_class.name)): assert same(build(source).train, want)

# --- splits and seeds
def test_stratified_with_the_labels_of_the_template(two_class):
    dls = build(two_class, splitter=StratifiedSplitter(.25, seed=1))
    assert sorted(int(y) for _, y in dls.valid_ds) == [0]*6 + [1]*6

def test_a_splitter_of_ones_own(two_class):
    dls = build(two_class, splitter=lambda o: ([i for i, p in enumerate(o) if '_1' not in p.name], np.array([i for i, p in enumerate(o) if '_1' in p.name])))
    assert all('_1' in f.name for f in dls.valid_ds.fields[0]) and len(dls.train_ds) + len(dls.valid_ds) == 48

def test_no_splitter_holds_back_a_fifth(two_class): assert len(build(two_class, splitter=None).valid_ds) == 9

def test_no_validation_items_are_allowed(two_class, figures):
    dls = build(two_class, splitter=RandomSplitter(0.))
    assert len(dls.train_ds) == 48 and list(dls.valid) == [] and len(dls.valid) == 0
    with pytest.raises(DataError, match='0 samples|no '): dls.show_batch(train=False)

def test_the_same_seed_gives_the_same_batches_and_another_others(two_class):
    make = lambda seed: block(item_tfms=RandomResizedCrop(16), batch_tfms=aug_transforms()).dataloaders(two_class, bs=8, seed=seed, **CPU)
    assert same(make(1).train, make(1).train) and not same(make(1).train, make(2).train)

def test_without_a_seed_set_seed_decides(two_class):
    from blocks.core import current_seed, set_seed
    before = current_seed()
    def run(seed):
        set_seed(seed)
        return list(block(splitter=None, item_tfms=RandomResizedCrop(16)).dataloaders(two_class, bs=8, **CPU).train)
    try: assert same(run(1), run(1)) and not same(run(1), run(2))
    finally: set_seed(before)

# --- datasets
def test_datasets_by_themselves(two_class):
    d = block().datasets(two_class)
    assert isinstance(d, Datasets) and (len(d), len(d.train), len(d.valid)) == (48, 36, 12) and d.vocab == ['cat', 'dog'] and d.n_inp == 1
    x, y = d.train[0]
    assert x.shape == (3, 16, 16) and x.dtype == torch.uint8 and y.item() == ['cat', 'dog'].index(d.train.fields[0][0].parent.name)
    assert torch.equal(d[40][0], d.valid[4][0]) and len(list(d)) == 48 and isinstance(d.items, L)

def test_the_last_item_by_a_negative_index(two_class):
    d = block().datasets(two_class)
    assert torch.equal(d[-1][0], d.valid[-1][0]) and torch.equal(d[-48][0], d.train[0][0])
    with pytest.raises(IndexError): d[48]

def test_what_is_printed_does_not_list_the_whole_data_set(two_class):
    dls = build(two_class)
    for o in (dls, dls.train, dls.train_ds, block().datasets(two_class)): assert len(repr(o)) < 1000

# --- loaders
def test_attributes_that_people_use(two_class):
    dls = build(two_class)
    assert isinstance(dls, DataLoaders) and dls[0] is dls.train and dls[1] is dls.valid and list(dls) == dls.loaders and len(dls) == 2 and dls.path == Path('.')
    assert dls.train.dataset is dls.train_ds and dls.valid.dataset is dls.valid_ds and dls.bs == 8 and dls.device.type == 'cpu' and dls.train.n == 36
    assert dls.vocab == ['cat', 'dog'] and isinstance(dls.vocab, L) and dls.c == 2
    assert dls.to('cpu') is dls and dls.cpu() is dls and all(isinstance(o, Loader) for o in dls)

def test_train_drops_the_last_and_valid_keeps_it(two_class):
    dls = block().dataloaders(two_class, bs=10, val_bs=7, **CPU)
    assert [len(x) for x, _ in dls.train] == [10]*3 and [len(x) for x, _ in dls.valid] == [7, 5]
    assert [len(x) for x, _ in block().dataloaders(two_class, bs=10, drop_last=False, **CPU).train] == [10]*3 + [6]
    assert block().dataloaders(two_class, bs=36, shuffle=False, **CPU).train.order(0).tolist() == list(range(36))

def test_usable_in_a_plain_loop(two_class, tiny):
    dls, model = build(two_class), tiny()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for x, y in dls.train: torch.nn.functional.cross_entropy(model(x), y).backward(); opt.step(); opt.zero_grad()

def test_normalize_becomes_a_part_of_the_image_block(two_class):
    plain, norm = build(two_class), build(two_class, batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in imagenet_stats)
    x, want = norm.valid.one_batch()[0], plain.valid.one_batch()[0]
    assert torch.allclose(x, (want - mean)/std, atol=1e-5)
    assert all(dl.samples.blocks[0].mean == imagenet_stats[0] and not any(isinstance(t, Normalize) for t in dl.batch_tfms) for dl in norm)
    assert torch.allclose(torch.as_tensor(norm.blocks[0].decode(x[0])), want[0].permute(1, 2, 0), atol=1e-5)
    assert norm.test_dl(norm.valid_ds.fields[0][:2]).one_batch()[0].allclose(x[:2]) and norm.blocks is norm.valid_ds.blocks
    with pytest.raises(DataError, match='3 channels.*1'): build(two_class, blocks=(ImageBlock('L'), CategoryBlock), batch_tfms=Normalize.from_stats(*imagenet_stats))

def test_normalize_for_two_images_is_for_both(two_class):
    dls = build(two_class, blocks=(ImageBlock, ImageBlock, CategoryBlock), batch_tfms=Normalize.from_stats(*imagenet_stats))
    a, b, _ = dls.valid.one_batch()
    assert torch.equal(a, b) and a.min() < 0

def test_new_size_of_the_item_transform(two_class):
    dls = build(two_class, item_tfms=Resize(16, method='squish'), batch_tfms=aug_transforms())
    for size, shape in ((8, (8, 8)), ((10, 20), (10, 20))):
        small = dls.new(size=size)
        assert small.one_batch()[0].shape[-2:] == shape == small.valid.one_batch()[0].shape[-2:] and small.train_ds[0][0].shape[-2:] == shape
    assert dls.one_batch()[0].shape[-1] == 16 and small.train_ds.geometries[0].method == 'squish'

def test_new_size_of_the_batch_transforms_leaves_the_items(two_class):
    small = build(two_class, item_tfms=Resize(24), batch_tfms=aug_transforms(size=16)).new(size=8)
    assert small.one_batch()[0].shape[-1] == small.valid.one_batch()[0].shape[-1] == 8 and small.train_ds[0][0].shape[-1] == 24

def test_new_size_where_there_was_none(two_class): assert build(two_class, item_tfms=None).new(size=8).one_batch()[0].shape[-2:] == (8, 8)

def test_new_size_beside_a_users_own_batch_transform_with_a_size(two_class):
    class Own:
        size = 3
        def __call__(self, x): return x
    assert build(two_class, batch_tfms=[Own()]).new(size=8).one_batch()[0].shape[-1] == 8

def test_new_changes_what_is_asked_and_nothing_here(two_class):
    dls = build(two_class)
    other = dls.new(bs=4, item_tfms=[Resize(8), v2.Grayscale(3)], batch_tfms=[Flip(1.)], num_workers=1)
    x = other.one_batch()[0]
    assert x.shape == (4, 3, 8, 8) and torch.equal(x[:, 0], x[:, 1]) and other.train.num_workers == 1 and other.valid.bs == 4
    assert dls.bs == 8 and dls.train.batch_tfms == () and dls.train_ds.tfms == () and dls.train.num_workers == 0
    assert dls.new(bs=512).bs == 36 and same(dls.new().train, build(two_class).train)

def test_test_loader(two_class):
    dls, files = build(two_class, batch_tfms=aug_transforms()), get_image_files(two_class)[:11]
    dl = dls.test_dl(files)
    xs = [x for x, in dl]
    assert [len(x) for x in xs] == [8, 3] and len(dls.test_dl(files, bs=4)) == 3
    assert torch.equal(torch.cat([x for x, in dls.test_dl(dls.valid_ds.fields[0])]), torch.cat([x for x, _ in dls.valid]))
    for kind in (list(map(str, files)), tuple(files), np.array(list(map(str, files))), [f.read_bytes() for f in files], [Image.open(f) for f in files], [np.asarray(Image.open(f)) for f in files]):
        assert torch.equal(torch.cat([x for x, in dls.test_dl(kind)]), torch.cat(xs))
    assert list(dls.test_dl([])) == []

@pytest.mark.parametrize('as_kind', [str, Path])
def test_a_test_loader_of_one_path_is_that_one_or_a_clear_error(two_class, as_kind):
    f = get_image_files(two_class)[0]
    try: x, = build(two_class).test_dl(as_kind(f)).one_batch()
    except DataError as e: assert 'list' in str(e)
    else: assert len(x) == 1

def test_a_test_loader_of_a_table_reads_it_as_training_did(table, two_class):
    dls = build(table, get_items=None, get_x=ColReader('name', pref=two_class), get_y=ColReader('label'))
    x, = dls.test_dl(table[['name']].head(3)).one_batch()
    assert torch.equal(x, dls.test_dl([two_class/o for o in table.name[:3]]).one_batch()[0])

# --- pictures
def test_show_batch_draws_as_many_as_asked_with_titles(two_class, figures):
    build(two_class).show_batch(max_n=5)
    assert len(figures()) == 5 and {a.get_title() for a in figures()} <= {'cat', 'dog'}
    for a in figures(): assert a.get_title() == ['cat', 'dog'][int(np.asarray(a.images[0].get_array())[..., :2].mean((0, 1)).argmax())]

def test_show_batch_by_default_nine(two_class, figures): build(two_class).show_batch(); assert len(figures()) == 9

@pytest.mark.parametrize('kw,n', [(dict(nrows=1, ncols=3), 3), (dict(nrows=2), 9), (dict(max_n=4, nrows=1), 4), (dict(max_n=4, ncols=2, figsize=(3, 3)), 4), (dict(nrows=3, ncols=4), 9), (dict(max_n=100), 36)])
def test_show_batch_in_the_grid_asked_for(two_class, figures, kw, n): build(two_class, bs=4).show_batch(**kw); assert len(figures()) == n

@pytest.mark.parametrize('kw', [dict(unique=True), dict(unique=True, nrows=1, ncols=3), dict(unique=True, max_n=4, nrows=1)])
def test_show_batch_of_one_item_augmented(two_class, figures, kw):
    build(two_class, item_tfms=RandomResizedCrop(16, min_scale=.3), batch_tfms=aug_transforms()).show_batch(**kw)
    pictures = [np.asarray(a.images[0].get_array()) for a in figures()]
    assert len(pictures) == kw.get('max_n', 3 if 'ncols' in kw else 9) and len({a.get_title() for a in figures()}) == 1
    assert len({p.tobytes() for p in pictures}) == len(pictures)

def test_show_batch_unique_is_one_picture(two_class, figures):
    build(two_class).new(item_tfms=Resize(16, method='squish')).show_batch(unique=True, max_n=4)
    assert len({np.asarray(a.images[0].get_array()).tobytes() for a in figures()}) == 1

def test_show_batch_shows_others_each_time(two_class, figures):
    import matplotlib.pyplot as plt
    dls, seen = build(two_class), set()
    for _ in range(2): dls.show_batch(max_n=4); seen.add(b''.join(np.asarray(a.images[0].get_array()).tobytes() for a in figures())); plt.close('all')
    assert len(seen) == 2

def test_show_batch_of_validation_of_grey_and_of_two_inputs(two_class, figures):
    import matplotlib.pyplot as plt
    build(two_class).show_batch(max_n=2, train=False); assert len(figures()) == 2; plt.close('all')
    build(two_class, blocks=(ImageBlock('L'), CategoryBlock)).show_batch(max_n=2); assert figures()[0].images[0].get_array().ndim == 2; plt.close('all')
    build(two_class, blocks=(ImageBlock, ImageBlock, CategoryBlock)).show_batch(max_n=3); assert len(figures()) == 6; plt.close('all')
    build(two_class, batch_tfms=Normalize.from_stats(*imagenet_stats)).show_batch(max_n=2); assert .1 < np.asarray(figures()[0].images[0].get_array()).mean() < .9

def test_a_loader_shows_its_batches_too(two_class, figures):
    build(two_class).valid.show_batch(max_n=2)
    assert len(figures()) == 2

def test_looking_does_not_change_training(two_class, figures):
    plain, looked = (build(two_class, item_tfms=RandomResizedCrop(16), batch_tfms=aug_transforms()) for _ in range(2))
    looked.show_batch(); looked.show_batch(unique=True); looked.one_batch(); looked.new(size=8).one_batch(); looked.test_dl([get_image_files(two_class)[0]]).one_batch(); looked.to('cpu')
    assert same(plain.train, looked.train)

# --- summary
def test_summary_says_what_comes_out_of_every_stage(two_class, capsys):
    block(item_tfms=[RandomResizedCrop(16), v2.ColorJitter(.2)], batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)]).summary(two_class)
    out = capsys.readouterr().out
    for text in ('48 items', "str 'cat'", '36 train, 12 valid', "('cat', 'dog')", 'Image (3, 16, 16) uint8', '→ 16×16', 'item_tfms', '(4, 3, 16, 16)', 'float32', 'int64', 'All stages work'): assert text in out, text
    assert [line.split()[0] for line in out.splitlines()[:4]] == ['get_items', 'get_x', 'get_y', 'splitter']

@pytest.mark.parametrize('kw,stage', [(dict(get_y=lambda p: p.nothing), 'get_y'), (dict(splitter=lambda o: 1/0), 'splitter'), (dict(item_tfms=None, get_items=lambda p: [save(p/f'{i}.png', size=(9 + i, 9)) for i in range(8)]), 'collate'),
                                      (dict(item_tfms=[Resize(8), lambda x: 1/0]), 'item_tfms'), (dict(get_items=lambda p: []), 'get_items'), (dict(batch_tfms=lambda x: x[0]), 'batch_tfms'),
                                      (dict(get_x=lambda p: 'nowhere.png'), 'ImageBlock.read'), (dict(get_y=lambda p: [1]), 'CategoryBlock.fit')])
def test_summary_names_the_stage_that_fails(two_class, tmp_path, capsys, kw, stage):
    source = tmp_path if stage == 'collate' else two_class
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(BlocksError): block(**kw).summary(source)
    last = capsys.readouterr().out.splitlines()
    failed = [line for line in last if 'FAILED' in line]
    assert len(failed) == 1 and failed[0].startswith(stage) and 'All stages' not in last[-1]

def test_summary_of_a_table(table, two_class, capsys):
    block(get_items=None, get_x=ColReader('name', pref=two_class), get_y=ColReader('number')).summary(table)
    assert 'All stages work' in capsys.readouterr().out

# --- the usual sources
ARGS = dict(item_tfms=Resize(16), bs=8, seed=1, **CPU)

def check(dls, n_valid=9, vocab=('cat', 'dog')):
    assert isinstance(dls, DataLoaders) and (len(dls.train_ds), len(dls.valid_ds)) == (48 - n_valid, n_valid) and tuple(dls.vocab) == vocab and dls.one_batch()[0].shape == (8, 3, 16, 16)
    for s in (dls.train_ds, dls.valid_ds):
        for raw, (_, y) in zip(s.fields[0], s): assert ('cat', 'dog')[dls.vocab.index(vocab[int(y)])] == Path(raw).parent.name

@pytest.fixture
def halves(two_class, tmp_path):
    "train/ and valid/ with both classes in each, and a file that is in neither"
    for f in get_image_files(two_class):
        to = tmp_path/('valid' if int(f.stem.split('_')[1]) < 6 else 'train')/f.parent.name/f.name
        to.parent.mkdir(parents=True, exist_ok=True); shutil.copy(f, to)
    save(tmp_path/'test'/'cat'/'x.png')
    return tmp_path

def test_from_folder(two_class, halves):
    check(ImageDataLoaders.from_folder(two_class, valid_pct=.2, **ARGS)); check(ImageDataLoaders.from_folder(str(two_class), valid_pct=.2, **ARGS))
    dls = ImageDataLoaders.from_folder(halves, **ARGS)
    check(dls, 12); assert {f.parent.parent.name for f in dls.valid_ds.fields[0]} == {'valid'} and dls.path == halves
    (halves/'valid').rename(halves/'val')
    check(ImageDataLoaders.from_folder(halves, valid='val', **ARGS), 12)
    assert ImageDataLoaders.from_folder(two_class, valid_pct=.2, vocab=['dog', 'cat'], **ARGS).vocab == ['dog', 'cat']

def test_from_folder_without_its_folders_says_what_to_do(two_class, halves):
    with pytest.raises(DataError, match=r"no folder 'train'.*valid_pct=0\.2"): ImageDataLoaders.from_folder(two_class)
    with pytest.raises(DataError, match=r"no folder 'val'.*valid=|Did you mean 'valid'"): ImageDataLoaders.from_folder(halves, valid='val')
    with pytest.raises(FileNotFoundError, match='nowhere'): ImageDataLoaders.from_folder(two_class/'nowhere')

def test_from_path_and_name_functions_and_expressions(two_class):
    files = get_image_files(two_class)
    check(ImageDataLoaders.from_path_func(two_class, files, parent_label, **ARGS))
    check(ImageDataLoaders.from_name_func(two_class, files, lambda name: name.split('_')[0], **ARGS))
    check(ImageDataLoaders.from_path_re(two_class, files, r'/(cat|dog)/[^/]+$', **ARGS))
    check(ImageDataLoaders.from_name_re(two_class, files, r'^(.+)_\d+\.png$', **ARGS))
    check(ImageDataLoaders.from_name_re(two_class, list(map(str, files)), r'^(.+)_\d+\.png$', valid_pct=.25, **ARGS), 12)
    with pytest.raises(ItemError, match=r'cat_0\.png'): ImageDataLoaders.from_name_re(two_class, files, r'^(bird)', **ARGS)

def test_from_lists(two_class, monkeypatch):
    files = get_image_files(two_class)
    labels = [f.parent.name for f in files]
    check(ImageDataLoaders.from_lists(two_class, files, labels, **ARGS)); check(ImageDataLoaders.from_lists(two_class, files, np.array(labels), **ARGS))
    check(ImageDataLoaders.from_lists(two_class, files, [int(o == 'dog') for o in labels], **ARGS), vocab=(0, 1))
    with pytest.raises(DataError, match='48 files and 47 labels'): ImageDataLoaders.from_lists(two_class, files, labels[1:], **ARGS)

def test_from_lists_of_relative_paths_as_get_image_files_gives_them(two_class, monkeypatch):
    monkeypatch.chdir(two_class.parent)
    files = get_image_files(two_class.name)
    check(ImageDataLoaders.from_lists(two_class.name, files, [f.parent.name for f in files], **ARGS))

def test_from_df(table, two_class):
    check(ImageDataLoaders.from_df(table, two_class, **ARGS)); check(ImageDataLoaders.from_df(table, str(two_class), **ARGS))
    check(ImageDataLoaders.from_df(table, two_class.parent, folder=two_class.name, fn_col='name', label_col='label', **ARGS))
    check(ImageDataLoaders.from_df(table, two_class, label_col='number', **ARGS), vocab=(0, 7))
    dls = ImageDataLoaders.from_df(table, two_class, valid_col='held', **ARGS)
    check(dls, 12); assert [str(two_class/o) for o in table.name[table.held]] == dls.valid_ds.fields[0]
    bare = table.assign(name=table.name.str[:-4])
    check(ImageDataLoaders.from_df(bare, two_class, suff='.png', **ARGS))
    with pytest.raises(DataError, match="'hold'.*Did you mean 'held'"): ImageDataLoaders.from_df(table, two_class, valid_col='hold', **ARGS)

def test_from_df_of_whole_paths(table, two_class):
    check(ImageDataLoaders.from_df(table.assign(name=[str(two_class/o) for o in table.name]), **ARGS))

def test_from_df_with_a_missing_label_names_the_row(table, two_class):
    table.loc[103, 'label'] = None
    with pytest.raises(DataError, match="column 1 .*103"): ImageDataLoaders.from_df(table, two_class, **ARGS)

def test_the_factories_take_a_splitter_of_ones_own(table, two_class):
    files = get_image_files(two_class)
    check(ImageDataLoaders.from_path_func(two_class, files, parent_label, splitter=StratifiedSplitter(.25), **ARGS), 12)
    check(ImageDataLoaders.from_df(table, two_class, splitter=StratifiedSplitter(.25), **ARGS), 12)

def test_from_csv(table, two_class, tmp_path, monkeypatch):
    table.to_csv(tmp_path/'list.csv', index=False); table.to_csv(tmp_path/'semi.csv', index=False, sep=';'); table.to_csv(tmp_path/'bare.csv', index=False, header=False)
    check(ImageDataLoaders.from_csv(two_class, tmp_path/'list.csv', **ARGS))                   # a table in another place
    check(ImageDataLoaders.from_csv(str(two_class), str(tmp_path/'semi.csv'), delimiter=';', valid_col='held', **ARGS), 12)
    check(ImageDataLoaders.from_csv(two_class, tmp_path/'bare.csv', header=None, label_col=2, **ARGS), vocab=(0, 7))
    check(ImageDataLoaders.from_csv(tmp_path, 'list.csv', folder=two_class, **ARGS))           # pictures in another place
    with pytest.raises(DataError, match='labels.csv'): ImageDataLoaders.from_csv(two_class)
    (tmp_path/'empty.csv').write_text('')
    with pytest.raises(DataError, match='empty.csv'): ImageDataLoaders.from_csv(tmp_path, 'empty.csv')

def test_the_factories_hand_on_what_is_known(two_class):
    dls = ImageDataLoaders.from_folder(two_class, valid_pct=.25, batch_tfms=aug_transforms(), val_bs=5, drop_last=False, **{**ARGS, 'bs': 10})
    assert dls.valid.bs == 5 and not dls.train.drop_last and len(dls.train.batch_tfms) == len(aug_transforms())
    assert same(dls.train, ImageDataLoaders.from_folder(two_class, valid_pct=.25, batch_tfms=aug_transforms(), drop_last=False, **{**ARGS, 'bs': 10}).train)

def test_the_split_of_train_and_valid_folders_is_the_grandparent_splitters(halves):
    a, b = ImageDataLoaders.from_folder(halves, **ARGS), build(halves, splitter=GrandparentSplitter())
    assert a.train_ds.fields == b.train_ds.fields and a.valid_ds.fields == b.valid_ds.fields
