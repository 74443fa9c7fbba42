"""Annotation files: the meaning of their numbers, and every way in which they can be wrong."""
import inspect, json, subprocess, sys
from pathlib import Path

import pytest

import blocks.data.annotation as annotation
from blocks.core import DataError
from blocks.data.annotation import get_annotations

def coco(**change):
    "Two pictures with objects, one without, one with a crowd alone; the annotations are not in the order of the pictures"
    return dict(images=[dict(id=9, file_name='b.jpg'), dict(id=4, file_name='a.jpg'), dict(id=5, file_name='none.jpg'), dict(id=6, file_name='crowd.jpg')],
                categories=[dict(id=3, name='cat'), dict(id=70, name='dog')],
                annotations=[dict(image_id=4, category_id=70, bbox=[10, 20, 5, 7]), dict(image_id=9, category_id=3, bbox=[0, 0, 640.5, 480], iscrowd=0),
                             dict(image_id=4, category_id=3, bbox=[1.5, 2, 0, 0]), dict(image_id=6, category_id=3, bbox=[0, 0, 9, 9], iscrowd=1)]) | change

@pytest.fixture
def write(tmp_path):
    def to(content, name='x.json'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8'); return tmp_path/name
    return to

def voc(*objects, filename='<filename>1.jpg</filename>', head=''):
    return f"{head}<annotation>{filename}{''.join(objects)}</annotation>"
def thing(name='cat', **box): return f"<object><name>{name}</name><bndbox>{''.join(f'<{k}>{v}</{k}>' for k, v in (dict(xmin=1, ymin=1, xmax=10, ymax=20) | box).items())}</bndbox></object>"

def test_importing_loads_nothing_heavy():
    code = "import sys, blocks.data.annotation; print([m for m in ('torch', 'torchvision', 'pandas', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    assert annotation.__all__ == ['get_annotations'] and inspect.getdoc(get_annotations)

# ---- COCO -----------------------------------------------------------------------------------------------------
WANT = ['b.jpg', 'a.jpg'], [([[0, 0, 640.5, 480]], ['cat']), ([[10, 20, 15, 27], [1.5, 2, 1.5, 2]], ['dog', 'cat'])]
def test_coco(write): assert get_annotations(write(coco())) == WANT and get_annotations(str(write(coco()))) == WANT
def test_coco_empty_and_crowd(write):
    f = write(coco()); e = ([], [])
    assert get_annotations(f, empty=True) == (WANT[0] + ['none.jpg', 'crowd.jpg'], WANT[1] + [e, e])
    assert get_annotations(f, crowd=True) == (WANT[0] + ['crowd.jpg'], WANT[1] + [([[0, 0, 9, 9]], ['cat'])])
def test_prefix(write):
    f = write(coco())
    assert get_annotations(f, 'd/')[0] == ['d/b.jpg', 'd/a.jpg'] and get_annotations(f, prefix='d')[0][0] == 'db.jpg'
    assert get_annotations(f, Path('d'))[0] == [str(Path('d/b.jpg')), str(Path('d/a.jpg'))]

A = dict(image_id=4, category_id=3, bbox=[1, 2, 3, 4])
@pytest.mark.parametrize('change,text', [
    (dict(annotations=[A, A | dict(category_id=8)]), r"annotations\[1\] in 'x.json' is of the category 8.*categories: 3, 70"), (dict(annotations=[A | dict(image_id=1)]), r'annotations\[0\].*image 1'),
    (dict(annotations=[A | dict(bbox=[1, 2, -3, 4])]), r'annotations\[0\].*\[1, 2, -3, 4\].*negative'), (dict(annotations=[A | dict(bbox=[1, 2, 3])]), 'four numbers'),
    (dict(annotations=[A | dict(bbox=[1, 2, 3, 'x'])]), 'four numbers'), (dict(annotations=[A | dict(bbox=[1, 2, 3, float('nan')])]), 'four numbers'), (dict(annotations=[A | dict(bbox=None)]), 'four numbers'),
    (dict(annotations=[dict(image_id=4, category_id=3, segmentation=[])]), r"annotations\[0\] in 'x.json' has no 'bbox'; it has 'image_id'"), (dict(annotations=['a']), r'annotations\[0\].*must be an object'),
    (dict(annotations={}), "'annotations'.*must be a list"), (dict(images=[dict(id=4)]), r"images\[0\].*no 'file_name'"), (dict(images=[dict(file_name='a')]), "no 'id'"),
    (dict(images=[dict(id=4, file_name='a'), dict(id=4, file_name='b')]), 'same id more than once: 4'), (dict(categories=[dict(id=3)]), r"categories\[0\].*no 'name'")], ids=str)
def test_coco_faults(write, change, text):
    with pytest.raises(DataError, match=text): get_annotations(write(coco(**change)))

@pytest.mark.parametrize('content,text', [('{"images": [', "'x.json' is not JSON.*line 1"), ('', 'not JSON'), ('[1, 2]', r"COCO file 'x.json' must be an object"), ('{"info": 1}', "no 'categories'; it has 'info'"), ('null', 'must be an object')])
def test_files_that_are_not_coco(write, content, text):
    with pytest.raises(DataError, match=text): get_annotations(write(content))

# ---- Pascal-VOC -----------------------------------------------------------------------------------------------
def test_voc_counts_pixels_from_one(write):
    f = write(voc(thing(), thing('dog', xmin=500, xmax=500, ymin='12.5', ymax=' 13 '), thing(xmin=0)), 'v/1.xml')
    assert get_annotations(f) == (['1.jpg'], [([[0, 0, 10, 20], [499, 11.5, 500, 13], [0, 0, 10, 20]], ['cat', 'dog', 'cat'])])

def test_voc_folder(write, tmp_path):
    write(voc(thing('z'), filename='<filename>2.jpg</filename>'), 'v/2.xml'); write(voc(filename='<filename>0.jpg</filename>'), 'v/0.xml'); write(voc(thing('a')), 'v/sub/1.XML'); write('?', 'v/.hidden.xml'); write('?', 'v/x.txt')
    assert get_annotations(tmp_path/'v', 'p/') == (['p/2.jpg', 'p/1.jpg'], [([[0, 0, 10, 20]], ['z']), ([[0, 0, 10, 20]], ['a'])])
    assert get_annotations(tmp_path/'v', empty=True)[0] == ['0.jpg', '2.jpg', '1.jpg'] and get_annotations(tmp_path/'v', empty=True)[1][0] == ([], [])

def test_boxes_of_parts_are_not_the_objects_own(write):
    part = '<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>'
    person = thing('person').replace('<name>', part + '<name>', 1)
    assert get_annotations(write(voc(person), '1.xml'))[1] == [([[0, 0, 10, 20]], ['person'])]

@pytest.mark.parametrize('content,text', [
    (voc(thing(), thing(xmax='')), r"object 2 \('cat'\) in 'v.xml' has no <xmax>"), (voc(thing(xmin=30)), 'ends before it begins.*30, 1, 10, 20'), (voc(thing(ymax='abc')), 'four numbers.*abc'),
    (voc(thing(ymax='inf')), 'four numbers'), (voc('<object><name>cat</name></object>'), 'no <bndbox>'), (voc('<object/>'), "object 1 in 'v.xml' has no <name>"), (voc(thing(), filename=''), 'no <filename>'),
    ('<html></html>', 'it is a <html>'), ('<annotation>', "'v.xml' is not XML.*line 1"), ('', 'not XML')], ids=str)
def test_voc_faults(write, content, text):
    with pytest.raises(DataError, match=text): get_annotations(write(content, 'v.xml'))

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16'])
def test_entities_are_refused_before_they_grow(tmp_path, encoding):
    defs = ''.join(f'<!ENTITY e{i} "{f"&e{i-1};"*40}">' for i in range(1, 12))
    (tmp_path/'v.xml').write_bytes(voc(filename='<filename>&e11;</filename>', head=f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY e0 "ha">{defs}]>').encode(encoding))
    with pytest.raises(DataError, match="'v.xml' is refused.*document type"): get_annotations(tmp_path/'v.xml')
    (tmp_path/'v.xml').write_text(voc(head=f'<!DOCTYPE a SYSTEM "file://{tmp_path}/secret">'))
    with pytest.raises(DataError, match='document type'): get_annotations(tmp_path/'v.xml')

# ---- which of the two -----------------------------------------------------------------------------------------
def test_paths_that_lead_nowhere(write, tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.json'): get_annotations(tmp_path/'nothing.json')
    with pytest.raises(DataError, match=r"'.*x.csv' is neither"): get_annotations(write('a,b', 'x.csv'))
    write(coco(), 'd/instances.json')
    with pytest.raises(DataError, match="holds no Pascal-VOC files.*It holds 'instances.json': give that file"): get_annotations(tmp_path/'d')
