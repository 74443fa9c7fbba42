"The service: what it answers, what it refuses, and that neither harms the other."
import asyncio
import base64
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException

import pytest
import torch
from PIL import Image
from torch import nn

from blocks.app import checks
from blocks.app.batching import Batcher, QueueFull
from blocks.app.checks import FORMATS, Limits, Refused, check_picture, clean_name, read_parts
from blocks.app.listening import listen, loopback, make_server
from blocks.app.serve import create_app
from blocks.core import BlocksError, DataError
from blocks.data.block import ImageBlock
from blocks.data.frame import Resize
from blocks.data.label import CategoryBlock
from blocks.infer.file import export_predictor
from blocks.infer.pipeline import Pipeline
from blocks.infer.predictor import Predictor
from blocks.model.head import create_vision_model


# Pictures, good and bad

def saved(im, format='PNG', **kwargs):
    out = io.BytesIO(); im.save(out, format, **kwargs)
    return out.getvalue()

def picture(seed=0, size=(40, 30), format='PNG', mode='RGB', **kwargs):
    rng = random.Random(seed)
    return saved(Image.frombytes('RGB', (4, 3), rng.randbytes(36)).resize(size, Image.Resampling.NEAREST).convert(mode), format, **kwargs)

def chunk(kind, content): return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind+content))
def png(*chunks, size=(40, 30)): return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', *size, 8, 2, 0, 0, 0)) + b''.join(chunks) + chunk(b'IDAT', zlib.compress(bytes(121*30))) + chunk(b'IEND', b'')
def tiff(*entries, big=False):
    if big: return b'II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0' + struct.pack('<Q', len(entries)) + b''.join(struct.pack('<HHQQ', *e) for e in entries) + bytes(100)
    return b'II*\0\x08\0\0\0' + struct.pack('<H', len(entries)) + b''.join(struct.pack('<HHII', *e) for e in entries) + bytes(100)
def jpeg_part(code, content): return b'\xff' + bytes([code]) + struct.pack('>H', len(content)+2) + content

JPEG, PROGRESSIVE = picture(format='JPEG'), picture(format='JPEG', progressive=True)
SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b'\xff\xda'):-2]
SIZE = (256, 4, 1, 40), (257, 4, 1, 30)
SAME = [(1000+i, 7, 30_000, 8) for i in range(500)]
BOMBS = {
    'png pixels': png(size=(60_000, 60_000)),
    'png parts': png(chunk(b'tIME', b'1234567')*5000),
    'png empty data': png(chunk(b'IDAT', b'')*60_000),
    'png text': png(*[chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(2**20-1), 9))]*100),
    'png exif': png(chunk(b'eXIf', tiff(*SAME) + bytes(25_000))),
    'png exif text': png(chunk(b'tEXt', b'Raw profile type exif\0\nexif\n  9\n' + (b'Exif\0\0' + tiff(*SAME)).hex().encode())),
    'jpeg pixels': JPEG.replace(struct.pack('>HH', 30, 40), struct.pack('>HH', 65_000, 65_000)),
    'jpeg scans': PROGRESSIVE[:-2] + SCAN*300 + b'\xff\xd9',
    'jpeg scans behind an end that is none': PROGRESSIVE[:-2] + jpeg_part(0xfe, b'\xff\xd9') + SCAN*300 + b'\xff\xd9',
    'jpeg scans of a large picture': PROGRESSIVE.replace(struct.pack('>HH', 30, 40), struct.pack('>HH', 7000, 7000))[:-2] + SCAN*10 + b'\xff\xd9',
    'jpeg parts': JPEG[:2] + b'\xff\xe5\0\x02'*10**5 + JPEG[2:],
    'jpeg junk': JPEG[:20] + bytes(2**19) + JPEG[20:],
    'jpeg padding': JPEG[:2] + b'\xff'*2**19 + JPEG[3:],
    'jpeg exif': JPEG[:2] + jpeg_part(0xe1, b'Exif\0\0' + tiff(*SAME) + bytes(25_000)) + JPEG[2:],
    'gif pixels': b'GIF89a' + struct.pack('<HHBBB', 65_000, 65_000, 0, 0, 0) + b',' + bytes(10),
    'gif comments': b'GIF89a' + struct.pack('<HHBBB', 40, 30, 0, 0, 0) + b'!\xfe' + (b'\xff' + bytes(255))*2000 + b'\0,' + bytes(10),
    'gif extensions': b'GIF89a' + struct.pack('<HHBBB', 40, 30, 0, 0, 0) + b'!\xfe\0'*10**5 + b',' + bytes(10),
    'webp pixels': b'RIFF' + struct.pack('<I', 22) + b'WEBPVP8X' + struct.pack('<I', 10) + bytes(4) + b'\xff\x3f\0\xff\x3f\0',
    'bmp pixels': b'BM' + bytes(8) + struct.pack('<IIiiHHI', 54, 40, 50_000, -50_000, 1, 24, 0) + bytes(40),
    'bmp runs': b'BM' + bytes(8) + struct.pack('<IIiiHHI', 54, 40, 400, 300, 1, 8, 1) + b'\1\0'*60_000,
    'tiff pixels': tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000)),
    'tiff tiles': tiff(*SIZE, (322, 4, 1, 60_000), (323, 4, 1, 60_000)),
    'tiff repeats': tiff(*SIZE, *SAME) + bytes(25_000),
    'tiff entries': tiff(*SIZE, *[(1000+i, 3, 1, 1) for i in range(3000)]),
    'tiff numbers': tiff(*SIZE, (273, 3, 110_000, 8)) + bytes(250_000),
    'big tiff pixels': tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000), big=True),
}
NO_PICTURES = {'text': b'/etc/passwd', 'page': b'<html><script>', 'svg': b'<svg xmlns="http://www.w3.org/2000/svg">', 'pdf': b'%PDF-1.4\n', 'eps': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
               'eps in dos': b'\xc5\xd0\xd3\xc6' + bytes(40), 'wmf': b'\xd7\xcd\xc6\x9a\0\0' + bytes(40), 'ppm': b'P6 2 2 255\n' + bytes(12), 'zip': b'PK\x03\x04' + bytes(40), 'pickle': b'\x80\x04cos\nsystem\n', 'json': b'{"path": "/etc/passwd"}', 'ico': b'\0\0\1\0' + bytes(40)}

def refused(call):
    with pytest.raises(Refused) as e: call()
    return e.value.status

@pytest.mark.parametrize('format, mode, kwargs', [
    ('PNG', 'RGB', {}), ('PNG', 'L', {}), ('PNG', 'RGBA', {}), ('PNG', 'P', {}), ('PNG', '1', {}), ('PNG', 'I;16', {}), ('PNG', 'RGB', dict(exif=b'Exif\0\0' + tiff((0x112, 3, 1, 6)))),
    ('JPEG', 'RGB', {}), ('JPEG', 'L', {}), ('JPEG', 'CMYK', {}), ('JPEG', 'RGB', dict(progressive=True)), ('JPEG', 'RGB', dict(exif=b'Exif\0\0' + tiff((0x112, 3, 1, 8)))), ('JPEG', 'RGB', dict(comment=b'x'*60_000, icc_profile=bytes(200_000))),
    ('GIF', 'P', {}), ('GIF', 'P', dict(comment=b'x'*3000)), ('BMP', 'RGB', {}), ('BMP', 'L', {}), ('WEBP', 'RGB', {}), ('WEBP', 'RGBA', dict(lossless=True)), ('WEBP', 'RGB', dict(exif=b'Exif\0\0' + tiff((0x112, 3, 1, 6)))),
    ('TIFF', 'RGB', {}), ('TIFF', 'L', dict(compression='tiff_lzw')), ('TIFF', 'RGB', dict(compression='tiff_deflate')), ('TIFF', 'RGB', dict(compression='jpeg')), ('TIFF', 'RGB', dict(big_tiff=True))])
def test_ordinary_pictures_pass_with_their_upright_size(format, mode, kwargs):
    im = Image.effect_noise((410, 300), 90).convert('L')
    im = im.convert('I').convert('I;16') if mode == 'I;16' else im.convert(mode)
    turned = 'exif' in kwargs
    assert check_picture(saved(im, format, **kwargs), 410*300) == ((300, 410) if turned else (410, 300))
    assert refused(lambda: check_picture(saved(im, format, **kwargs), 410*300-1)) == 422

@pytest.mark.parametrize('format', ['GIF', 'PNG', 'WEBP', 'TIFF'])
def test_pictures_of_several_frames_pass(format):
    frames = [Image.new('RGB', (40, 30), (i, 0, 0)) for i in range(60)]
    assert check_picture(saved(frames[0], format, save_all=True, append_images=frames[1:]), 2000) == (40, 30)

def test_a_motion_photo_passes():
    "A film after the end of a JPEG holds every pair of bytes, also that of a scan"
    assert check_picture(JPEG + random.Random(0).randbytes(500_000) + b'\xff\xda'*200, 2000) == (40, 30)

@pytest.mark.parametrize('name', BOMBS)
def test_bombs_are_refused_cheaply(name, monkeypatch):
    looked = []
    monkeypatch.setattr(checks, 'open_image', lambda data: looked.append(1) or open_image(data))
    from blocks.data.image import open_image
    started = time.thread_time()
    assert refused(lambda: check_picture(BOMBS[name], 50_000_000)) == (400 if name == 'png text' else 422)
    assert time.thread_time() - started < .5 and (not looked or name in ('png text', 'png exif', 'png exif text'))

@pytest.mark.parametrize('name', NO_PICTURES)
def test_what_is_no_picture_is_never_opened(name, monkeypatch):
    monkeypatch.setattr(checks, 'open_image', lambda data: pytest.fail('it was opened'))
    assert refused(lambda: check_picture(NO_PICTURES[name], 10**6)) == 415

@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('format', FORMATS)
def test_any_beginning_of_a_picture_is_an_answer(format):
    "Cut anywhere, or with a byte changed anywhere: a size or a refusal, never another error"
    data, rng, seen = picture(format=format), random.Random(1), set()
    for n in [*range(0, min(len(data), 400), 3), *range(400, len(data), 97)]:
        broken = bytearray(data); broken[n] = rng.randrange(256)
        for part in (data[:n], broken):
            try: check_picture(part, 10**6); seen.add(200)
            except Refused as e: seen.add(e.status)
    assert {200, 400} <= seen <= {200, 400, 415, 422}

def test_a_file_of_two_formats_is_refused(monkeypatch):
    class Other(Image.Image): format = 'SPIDER'
    monkeypatch.setattr(checks, 'open_image', lambda data: Other())
    assert refused(lambda: check_picture(picture(format='TIFF'), 10**6)) == 415

def test_limits_are_checked():
    for wrong in (dict(max_bytes=0), dict(timeout=-1), dict(batch=True), dict(queue=2.5), dict(max_pixels='1'), dict(queue=3, max_files=4), dict(max_held=1)):
        with pytest.raises(DataError, match=next(iter(wrong))): Limits(**wrong)
    assert Limits(wait_ms=0).max_bytes == 20*2**20


# Forms

def form(*files, edge=b'edge'): return b''.join(b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n' % (edge, name.encode(), data) for name, data in files) + b'--%b--\r\n' % edge
FORM = 'multipart/form-data; boundary=edge'

def test_forms_are_read():
    data = bytes(range(256))*10 + b'\r\n--edg\r\n--'
    assert read_parts(form(('a.png', data), ('b', b'')), FORM, 2) == [('a.png', data), ('b', b'')]
    assert read_parts(b'--edge\r\ncontent-disposition: form-data; name="x"\r\nX-Other: 1\r\n\r\nhi\r\n--edge--', FORM, 2) == [('picture 1', b'hi')]
    assert read_parts(b'--edge\r\nContent-Disposition: form-data; name="topk"\r\n\r\n5\r\n' + form(('a.png', b'1')), FORM, 2) == [('a.png', b'1')]     # a field beside the files

@pytest.mark.parametrize('sent, name', [(b"filename*=UTF-8''k%C3%A4se.png", 'käse.png'), (b"filename=\"k.png\"; filename*=utf-8'de'k%C3%A4%20b.png", 'kä b.png'), (b"filename*=UTF-8''..%2F..%2Fetc%2Fpasswd", 'passwd'), (b"filename*=UTF-8''%FF", '\ufffd'), (b"filename*=nonsense; filename=b.png", 'b.png')])
def test_names_with_percent_signs(sent, name):
    assert read_parts(b'--edge\r\nContent-Disposition: form-data; name="f"; ' + sent + b'\r\n\r\n1\r\n--edge--', FORM, 2) == [(name, b'1')]

@pytest.mark.parametrize('body, kind, status', [
    (form(('a', b'1'), ('b', b'2'), ('c', b'3')), FORM, 413), (form(('a', b'1'))[:-4], FORM, 400), (b'', FORM, 400), (b'--edge--\r\n', FORM, 400), (form(('a', b'1')), 'multipart/form-data', 400),
    (form(('a', b'1')), 'multipart/form-data; boundary=' + 'x'*500, 400), (b'--edge\r\n' + b'A: b\r\n'*100 + b'\r\nx\r\n--edge--', FORM, 400), (b'--edge\r\nA' + b'a'*10**5 + b': b\r\n\r\nx\r\n--edge--', FORM, 400), (b'--edge\r\n\0: b\r\n\r\nx\r\n--edge--', FORM, 400),
    (b'--edge\r\n'*1000, FORM, 413), (b'--edge no line\r\n', FORM, 400), (b'\r\n'*1000, FORM, 400)])
def test_broken_forms_are_refused(body, kind, status): assert refused(lambda: read_parts(body, kind, 2)) == status

def test_no_beginning_of_a_form_is_another_error():
    whole = form(('a.png', b'12345'), ('b.png', b'67890'))
    assert {refused(lambda n=n: read_parts(whole[:n], FORM, 2)) for n in range(len(whole)-4)} == {400}

def test_names_are_cleaned():
    for name, clean in {'../../etc/passwd': 'passwd', 'C:\\a\\b.png': 'b.png', 'a\0\n\x1b[31mb.png': 'a[31mb.png', '..': 'x', '': 'x', '/': 'x', 'é'*200: 'é'*100, '\u202egnp.exe': 'gnp.exe'}.items(): assert clean_name(name, 'x') == clean


# Batches

def test_each_gets_its_own_answer_in_fewer_passes():
    sizes = []
    b = Batcher(lambda n: n, lambda ns: (sizes.append(len(ns)), time.sleep(.003), [n*n for n in ns])[-1], size=8, capacity=500)
    with ThreadPoolExecutor(16) as pool: assert list(pool.map(lambda n: b.submit([n])[0].result(5), range(200))) == [n*n for n in range(200)]
    assert max(sizes) <= 8 and b.batches == len(sizes) < 120 and b.items == 200 and b.held == b.reading == 0
    b.close()

def test_a_failing_item_does_not_harm_its_neighbours():
    started = threading.Event()
    def work(ns):
        started.wait(5)
        if any(n % 10 == 3 for n in ns): raise RuntimeError('three')
        return [-n for n in ns]
    def read(n):
        if n % 10 == 5: raise ValueError('five')
        return n
    b = Batcher(read, work, size=8)
    futures = b.submit(list(range(40))); started.set()
    got = [f.exception(5) or f.result() for f in futures]
    assert all(isinstance(o, RuntimeError) if n % 10 == 3 else isinstance(o, ValueError) if n % 10 == 5 else o == -n for n, o in enumerate(got)) and b.held == 0
    assert isinstance(Batcher(read, lambda ns: [], size=8).submit([1])[0].exception(5), DataError)
    b.close()

def test_the_queue_is_bounded_and_takes_all_or_nothing():
    gate = threading.Event()
    b = Batcher(lambda n: n, lambda ns: (gate.wait(5), ns)[1], size=2, capacity=5)
    first = b.submit([1, 2, 3])
    with pytest.raises(QueueFull, match='3 items'): b.submit([4, 5, 6])
    rest = b.submit([4, 5]); gate.set()
    assert [f.result(5) for f in first + rest] == [1, 2, 3, 4, 5] and b.held == 0
    b.close()

def test_a_single_item_does_not_wait():
    b = Batcher(lambda n: n, lambda ns: ns, size=8, wait=2)
    b.submit([1])[0].result(5)
    started = time.perf_counter()
    for n in range(20): b.submit([n])[0].result(5)
    assert time.perf_counter() - started < 1
    b.close()

def test_a_batch_waits_for_what_is_being_read():
    sizes = []
    b = Batcher(lambda n: time.sleep(.1*n) or n, lambda ns: sizes.append(len(ns)) or ns, size=8, wait=2, readers=4)
    [f.result(5) for f in b.submit([0, 1, 2, 1])]
    assert sizes == [4]
    b.close()

def test_close_answers_what_was_taken_and_may_come_twice():
    b = Batcher(lambda n: time.sleep(.02) or n, lambda ns: ns)
    futures = b.submit(list(range(10)))
    b.close(); b.close()
    assert [f.result(0) for f in futures] == list(range(10)) and b.submit([7])[0].result(5) == 7
    b.close()
    assert not [t for t in threading.enumerate() if t.name.startswith('blocks-') and t is b._thread]


# The service

class Service:
    "An application on a port of its own, in a thread"
    def __init__(self, predictor, pipeline=None, **limits):
        self.predictor, self.limits = predictor, Limits(**limits)
        self.app = create_app(predictor, pipeline, self.limits)
        self.batcher, self.sock, self.server = self.app.state.batcher, listen('127.0.0.1', 0), make_server(self.app, self.limits)
        self.address = self.sock.getsockname()
        self.thread = threading.Thread(target=self.server.run, kwargs=dict(sockets=[self.sock]))
    def __enter__(self):
        self.thread.start()
        for _ in range(500):
            if self.server.started: return self
            time.sleep(.01)
        raise RuntimeError('the server did not start')
    def __exit__(self, *_):
        self.server.should_exit = True; self.thread.join(20)
        assert not self.thread.is_alive()

    def ask(self, path='/predict', body=None, method=None, **headers):
        link = HTTPConnection(*self.address, timeout=20)
        try:
            link.request(method or ('GET' if body is None else 'POST'), path, body, headers)
            answer = link.getresponse(); text = answer.read()
        finally: link.close()
        self.last = answer.headers
        return answer.status, json.loads(text) if text and 'json' in answer.headers.get('content-type', '') else text.decode()

    def talk(self, *pieces, pause=0):
        "Send `pieces` as they are; what came back, and '' for a connection that was closed"
        with socket.create_connection(self.address, timeout=20) as s:
            got = b''
            try:
                for piece in pieces: s.sendall(piece); time.sleep(pause)
                while (more := s.recv(65536)): got += more
            except (ConnectionError, TimeoutError) as e: assert not isinstance(e, TimeoutError)
        return got.decode('latin-1')

    def metric(self, name): return float(re.search(rf'^{re.escape(name)} (\S+)$', self.ask('/metrics')[1], re.MULTILINE)[1])

def make_predictor(model=None, geometries=None, n=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model or nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, n))
        for p in model.parameters(): p.data.mul_(8)                          # answers that differ
    return Predictor(model, (ImageBlock(), CategoryBlock(vocab=[f'class {i}' for i in range(n)])), geometries=(Resize(16),) if geometries is None else geometries, info=dict(architecture='tiny', metrics=dict(accuracy=.5, loss=float('nan')), card='# A card'))

SMALL = dict(max_bytes=400_000, max_pixels=200_000, max_files=4, timeout=.4, queue=16, batch=4, wait_ms=5, max_held=1_000_000)

@pytest.fixture(scope='module')
def service():
    with Service(make_predictor(), **SMALL) as s: yield s

def right(service, data, answer):
    "Whether `answer` is what `predict` says about `data`"
    label, index, probs = service.predictor.predict(data)
    return answer['label'] == label and abs(answer['probability'] - float(probs.max())) < 1e-5 and {o['label'] for o in answer['top']} <= set(service.predictor.vocab)

def head(length=None, path='/predict', more=''): return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{'' if length is None else f'Content-Length: {length}'+chr(13)+chr(10)}{more}\r\n".encode()
def status(reply): return int(reply.split()[1]) if reply.startswith('HTTP/') else None

@pytest.mark.parametrize('format', FORMATS)
def test_answers_are_those_of_predict(service, format):
    for seed in range(3):
        data = picture(seed, format=format)
        code, said = service.ask(body=data)
        assert code == 200 and right(service, data, said['predictions'][0]) and said['predictions'][0]['kind'] == 'category' and said['predictions'][0]['item'] == 'picture'

def test_a_body_in_chunks_and_whatever_type_is_claimed(service):
    data = picture(5)
    for kind in ('image/jpeg', 'text/html', 'application/x-www-form-urlencoded', 'application/json', 'nonsense', ''):
        code, said = service.ask(body=iter([data[:50], data[50:]]), **{'Content-Type': kind})
        assert code == 200 and right(service, data, said['predictions'][0])

def test_several_in_their_order_with_a_bad_one_between(service):
    files = [('a.png', picture(1)), ('../b.jpg', picture(2, format='JPEG')), ('c.png', picture(3)[:60]), ('<b>d', picture(4))]
    code, said = service.ask('/predict?topk=1', form(*files), **{'Content-Type': FORM})
    answers = said['predictions']
    assert code == 200 and [o['item'] for o in answers] == ['a.png', 'b.jpg', 'c.png', '<b>d'] and 'truncated' in answers[2]['error'] and 'label' not in answers[2]
    assert all(right(service, files[i][1], answers[i]) and len(answers[i]['top']) == 1 for i in (0, 1, 3))

def test_when_none_can_be_used_it_is_an_error(service):
    assert service.ask(body=form(('a', b'x'), ('b', b'')), **{'Content-Type': FORM})[0] == 415
    assert 'the first, a' in service.ask(body=form(('a', b'x'), ('b', b'')), **{'Content-Type': FORM})[1]['error']

@pytest.mark.parametrize('query, code', [('topk=1', 200), ('topk=1000', 200), ('topk=0', 422), ('topk=1001', 422), ('topk=-1', 422), ('topk=x', 422), ('topk=' + '9'*5000, 422), ('picture=perhaps', 422), ('path=/etc/passwd', 422), ('model=other.pkl', 422), ('%00=1', 422), ('topk=%ff', 422)])
def test_query_values(service, query, code):
    got, said = service.ask(f'/predict?{query}', picture())
    assert got == code and (code == 200 or set(said) == {'error'})

def test_topk_is_of_its_own_request_also_in_a_batch(service):
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda k: len(service.ask(f'/predict?topk={k}', picture(k))[1]['predictions'][0]['top']), [1, 2, 3]*5))
    assert got == [1, 2, 3]*5

def test_concurrent_requests_share_passes_and_each_gets_its_own(service):
    before, pictures = service.batcher.batches, [picture(i) for i in range(48)]
    with ThreadPoolExecutor(12) as pool: got = list(pool.map(lambda o: service.ask(body=o), pictures))
    assert all(code == 200 and right(service, o, said['predictions'][0]) for o, (code, said) in zip(pictures, got))
    assert 0 < service.batcher.batches - before < 48


def test_an_answer_on_an_open_connection_is_not_held_back(service):
    "Both ends wait for each other, 40 ms a time, where the answer goes out in two pieces and the socket collects small ones"
    link, took = HTTPConnection(*service.address, timeout=20), []
    for n in range(20):
        started = time.perf_counter(); link.request('POST', '/predict', picture(n)); assert link.getresponse().read(); took.append(time.perf_counter() - started)
    link.close()
    assert min(took[5:]) < .035

# Limits

def test_a_body_that_is_too_large(service):
    big = bytes(service.limits.max_bytes+1)
    assert service.ask(body=big)[0] == 413 and service.ask(body=iter([big]))[0] == 413
    assert status(service.talk(head(10**15))) == 413                               # before anything was sent
    assert status(service.talk(head(None, more='Transfer-Encoding: chunked\r\n'), *[b'8000\r\n' + bytes(0x8000) + b'\r\n']*14)) == 413
    assert service.metric('blocks_body_bytes') == 0

def test_a_body_at_the_limit_passes(service):
    data = picture(); code, said = service.ask(body=data + bytes(service.limits.max_bytes - len(data)))
    assert code == 200 and right(service, data, said['predictions'][0])

@pytest.mark.parametrize('name', NO_PICTURES)
def test_415(service, name):
    code, said = service.ask(body=NO_PICTURES[name], **{'Content-Type': 'image/png'})
    assert code == 415 and set(said) == {'error'}

@pytest.mark.parametrize('name', [k for k, v in BOMBS.items() if len(v) < SMALL['max_bytes']])
def test_bombs_at_the_service(service, name): assert service.ask(body=BOMBS[name])[0] in (400, 422)

@pytest.mark.parametrize('data', [b'', picture()[:8], picture()[:70], picture(format='JPEG')[:200], picture(format='JPEG')[:-40], picture(size=(200, 200), format='WEBP')[:60], b'GIF89a', b'BM', b'II*\0'])
def test_empty_and_truncated_pictures(service, data): assert service.ask(body=data)[0] == 400

def test_pixels(service):
    assert service.ask(body=picture(size=(500, 400)))[0] == 200
    code, said = service.ask(body=picture(size=(500, 401)))
    assert code == 422 and '500×401' in said['error'] and '200,000' in said['error']

def test_files(service): assert service.ask(body=form(*[('a', picture())]*5), **{'Content-Type': FORM})[0] == 413

def test_slow_senders_are_cut_and_leave_nothing(service):
    started = time.monotonic()
    assert status(service.talk(head(1000), picture()[:100])) == 408                                         # the rest never comes
    assert status(service.talk(head(1000), *[b'x']*8, pause=.1)) in (408, None)
    assert service.talk(b'POST /predict HTTP/1.1\r\nHost: ') == '' and service.talk(b'') == ''              # no request at all
    assert time.monotonic() - started < 8 and service.metric('blocks_body_bytes') == 0 and service.batcher.held == 0

def test_slow_senders_do_not_fill_the_memory(service):
    with ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(service.talk, head(350_000), bytes(300_000)) for _ in range(8)]
        codes = {status(o.result(20)) for o in replies}
    assert codes == {408, 503} and service.metric('blocks_body_bytes') == 0 and service.ask(body=picture())[0] == 200

def test_who_leaves_in_the_middle_leaves_nothing(service):
    for n in range(20):
        s = socket.create_connection(service.address); s.sendall(head(5000) + picture()); s.close()
        s = socket.create_connection(service.address); s.sendall(head(len(picture())) + picture()); s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close()
    time.sleep(service.limits.timeout + .3)                                        # until the last of them was accepted and given up
    assert service.metric('blocks_body_bytes') == 0 and service.batcher.held == 0 and len(service.server.server_state.connections) <= 1

def test_the_queue_is_full_and_then_not():
    gate = threading.Event()
    class Gated(nn.Module):
        def __init__(self): super().__init__(); self.inner = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
        def forward(self, x): gate.wait(10); return self.inner(x)
    with Service(make_predictor(Gated()), **{**SMALL, 'queue': 4}) as s:
        with ThreadPoolExecutor(12) as pool:
            waiting = [pool.submit(s.ask, '/predict', picture(i)) for i in range(12)]
            while sum(o.done() for o in waiting) < 8: time.sleep(.01)
            assert s.ask('/health')[0] == 200 and s.batcher.held == 4                # the service itself does not wait
            code, said = s.ask(body=picture())
            assert code == 503 and int(s.last['Retry-After']) > 0 and 'again' in said['error']
            gate.set()
            assert sorted(o.result()[0] for o in waiting) == [200]*4 + [503]*8
        assert s.ask(body=picture())[0] == 200 and s.batcher.held == 0

def test_connections_are_bounded_and_the_silent_make_room():
    with Service(make_predictor(), **{**SMALL, 'timeout': 20, 'max_connections': 10}) as s:
        idle = [socket.create_connection(s.address) for _ in range(40)]
        assert s.ask(body=picture())[0] == 200 and len(s.server.server_state.connections) <= 10
        for o in idle: o.close()

def test_a_body_in_tiny_chunks_costs_the_sender_its_connection(service):
    reply = service.talk(head(None, more='Transfer-Encoding: chunked\r\n'), *[b'1\r\nx\r\n'*20_000]*18)
    assert status(reply) in (None, 408)

def test_an_answer_that_nobody_fetches_is_dropped(service):
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096); s.connect(service.address)
    s.setblocking(False)
    asked = b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n'*20000
    end = time.monotonic() + 6
    while time.monotonic() < end:
        try: asked = asked[s.send(asked):] or asked
        except BlockingIOError: time.sleep(.05)
        except ConnectionError: break
    else: pytest.fail('the connection stayed open')
    s.close()


# What is no request, and who is no friend

@pytest.mark.parametrize('text', [b'GET / HTTP/9.9\r\n\r\n', b'\x16\x03\x01\x02\0\x01\0\r\n\r\n', b'\0'*100 + b'\r\n\r\n', b'GET /' + b'a'*70_000 + b' HTTP/1.1\r\n\r\n', b'GET / HTTP/1.1\r\n' + b'A: b\r\n'*5000 + b'\r\n', b'GET / HTTP/1.1\r\n\r\n', b'GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n',
    head('-5'), head('1e3'), head(5, more='Content-Length: 6\r\n'), head(None, more='Transfer-Encoding: chunked\r\n') + b'zz\r\nxx\r\n', head(None, more='Transfer-Encoding: gzip\r\n') + b'x', b'\r\n\r\nnonsense\r\n\r\n'])
def test_garbage_is_a_bad_request(service, text):
    reply = service.talk(text)
    assert status(reply) in (400, 501, None) or status(reply) == 200 and b'Host' not in text
    assert 'Traceback' not in reply and service.ask('/health')[0] == 200

@pytest.mark.parametrize('path, code', [('/etc/passwd', 404), ('/../../etc/passwd', 404), ('/%2e%2e/%2e%2e/etc/passwd', 404), ('/page.html', 404), ('/static/..%2f..%2fetc/passwd', 404), ('//etc/passwd', 404), ('/predict/', (404, 307)), ('/docs', 200), ('/predict', 405)])
def test_no_path_leads_to_a_file(service, path, code):
    got, said = service.ask(path)
    assert got in (code if isinstance(code, tuple) else (code,)) and (got == 200 or got == 307 or 'error' in said)

def test_methods(service):
    for method in ('PUT', 'DELETE', 'PATCH', 'OPTIONS', 'TRACE', 'NONSENSE'): assert service.ask('/predict', b'', method=method)[0] == 405

def test_head_is_get_without_a_body(service):
    for path in ('/', '/health', '/info', '/metrics', '/docs'):
        assert service.ask(path, method='HEAD') in ((200, ''), (200, None)) and int(service.last['content-length']) > 0
    assert service.ask('/predict', method='HEAD')[0] == 405 and all('head' not in o for o in service.ask('/openapi.json')[1]['paths'].values())

def test_strangers_are_turned_away(service):
    port = service.address[1]
    for headers in (dict(Host='rebound.example.com'), dict(Host='127.0.0.1.example.com'), dict(Host='169.254.0.1'), dict(Host='localhost.example.com:80'), dict(Origin='https://example.com'), dict(Origin='null'), dict(Origin=f'http://127.0.0.1:{port+1}'), dict(Host='[')):
        code, said = service.ask(body=picture(), **headers)
        assert code == 403 and set(said) == {'error'}, headers
    for headers in (dict(Host=f'localhost:{port}'), dict(Host='127.0.0.1'), dict(Host='[::1]:80'), dict(Host=f'localhost:{port}', Origin=f'http://localhost:{port}')): assert service.ask(body=picture(), **headers)[0] == 200
    assert loopback('127.255.0.1') and not loopback('127.0.0.1.example.com') and not loopback('')

def test_headers(service):
    for path, body in (('/', None), ('/predict', picture()), ('/predict', b'x'), ('/nothing', None), ('/docs', None)):
        service.ask(path, body)
        assert service.last['X-Content-Type-Options'] == 'nosniff' and "default-src 'none'" in service.last['Content-Security-Policy'] and "frame-ancestors 'none'" in service.last['Content-Security-Policy']
        assert 'camera=(self)' in service.last['Permissions-Policy'] and not [k for k in service.last if k.lower().startswith('access-control') or k.lower() == 'server']

def test_the_page_runs_its_own_script_and_no_other(service):
    code, page = service.ask('/')
    policy, scripts = service.last['Content-Security-Policy'], re.findall(r'<script>(.*?)</script>', page, re.DOTALL)
    assert code == 200 and 'text/html' in service.last['content-type'] and page.count('<script') == len(scripts)
    assert re.findall("'sha256-([^']+)'", policy) == [base64.b64encode(hashlib.sha256(o.encode()).digest()).decode() for o in scripts] and "'unsafe-inline'" not in policy.split('script-src')[1].split(';')[0]
    assert not re.search(r'<\w+[^>]*\son\w+\s*=', re.sub(r'<script>.*?</script>', '', page, flags=re.DOTALL)) and 'http-equiv="refresh"' not in page


# What it says about itself

def test_info_health_metrics(service):
    assert service.ask('/health') == (200, dict(status='ok'))
    code, about = service.ask('/info')
    assert code == 200 and about['classes'] == ['class 0', 'class 1', 'class 2'] and about['limits']['max_bytes'] == 400_000 and about['architecture'] == 'tiny' and about['card'] == '# A card'
    assert about['metrics'] == dict(accuracy=.5, loss=None) and about['finds_objects'] is False and about['answer'] == 'category'
    before = service.metric('blocks_pictures_total{status="200"}'), service.metric('blocks_batch_pictures_total')
    service.ask(body=picture()); service.ask(body=form(('a', picture()), ('b', b'x')), **{'Content-Type': FORM})
    assert (service.metric('blocks_pictures_total{status="200"}'), service.metric('blocks_batch_pictures_total')) == (before[0]+2, before[1]+2)
    text = service.ask('/metrics')[1]
    assert service.last['content-type'].startswith('text/plain; version=0.0.4') and all(re.fullmatch(r'# TYPE \w+ (counter|gauge)|\w+(\{\w+="[^"\n]*"(,\w+="[^"\n]*")*\})? [-+.e\d]+', line) for line in text.splitlines())
    service.ask('/nothing"}here'); assert service.metric('blocks_requests_total{path="other",status="404"}') >= 1 and 'nothing' not in service.ask('/metrics')[1]

def test_the_description_names_bodies_answers_and_errors(service):
    code, described = service.ask('/openapi.json')
    post = described['paths']['/predict']['post']
    assert code == 200 and {'multipart/form-data', 'image/*', 'application/octet-stream'} == set(post['requestBody']['content']) and {o['name'] for o in post['parameters']} == {'topk', 'picture'}
    assert {'200', '400', '403', '408', '413', '415', '422', '503'} == set(post['responses']) and all(list(o['content']['application/json']['schema']['properties']) == ['error'] for k, o in post['responses'].items() if k != '200')
    answer = service.ask(body=picture())[1]['predictions'][0]
    assert set(answer) <= set(post['responses']['200']['content']['application/json']['schema']['properties']['predictions']['items']['properties'])
    code, docs = service.ask('/docs')
    assert code == 200 and not re.search(r'(src|href|url)\s*[=(]', docs) and '400000' in docs and '<script' not in docs


# Detectors, other models, faults

def halves(im): return [((0, 0, im.width/2, im.height), .9), ((im.width/2, 0, im.width, im.height), .8)]

def test_with_a_pipeline_answers_have_objects_counts_and_the_picture():
    p = make_predictor()
    with Service(p, Pipeline(halves, p, margin=0), **SMALL) as s:
        for query in ('', '?picture=1', '?picture=false'):
            data = picture(3, size=(80, 40), format='JPEG')
            code, said = s.ask(f'/predict{query}', data)
            answer = said['predictions'][0]
            assert code == 200 and right(s, data, answer) and [o['box'] for o in answer['objects']] == [[0, 0, 40, 40], [40, 0, 80, 40]] and sum(answer['counts'].values()) == 2
            assert ('picture' in answer) == (query == '?picture=1')
        assert s.ask('/info')[1]['finds_objects'] and s.ask(body=picture()[:70])[0] == 400

def test_the_picture_comes_back_small_enough_and_upright(service):
    data = saved(Image.new('RGB', (500, 100), 'red'), 'TIFF')
    shown = service.ask('/predict?picture=1', data)[1]['predictions'][0]['picture']
    assert Image.open(io.BytesIO(base64.b64decode(shown.removeprefix('data:image/jpeg;base64,')))).size == (500, 100)
    with Service(make_predictor(), max_pixels=10**7) as s:
        shown = s.ask('/predict?picture=1', saved(Image.new('L', (4000, 100)), 'JPEG', exif=b'Exif\0\0' + tiff((0x112, 3, 1, 6))))[1]['predictions'][0]['picture']
    assert Image.open(io.BytesIO(base64.b64decode(shown.split(',')[1]))).size == (51, 2048)

class Picky(nn.Module):
    "A model that cannot take small pictures, and whose answers may be no numbers"
    def __init__(self): super().__init__(); self.inner = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
    def forward(self, x):
        if x.shape[-1] < 10: raise RuntimeError('secret: kernel size is greater than the input')
        return self.inner(x)*(float('nan') if x.shape[-1] == 20 else 1)

def test_a_picture_that_the_model_cannot_take_harms_nobody():
    with Service(make_predictor(Picky(), geometries=()), **SMALL) as s:
        sizes = [(30, 30), (8, 30), (20, 30), (31, 30)]*6
        with ThreadPoolExecutor(12) as pool: got = list(pool.map(lambda size: s.ask(body=picture(1, size=size)), sizes))
        for size, (code, said) in zip(sizes, got):
            assert code == (422 if size[0] == 8 else 200) and 'secret' not in str(said)
            if size[0] == 20: assert said['predictions'][0]['probability'] is None
            elif code == 200: assert right(s, picture(1, size=size), said['predictions'][0])

def test_a_fault_of_ours_is_an_error_without_its_details(monkeypatch):
    with Service(make_predictor(), **SMALL) as s:
        monkeypatch.setattr(s.batcher, 'submit', lambda items: 1/0)
        code, said = s.ask(body=picture())
        assert code == 500 and set(said) == {'error'} and 'ZeroDivision' not in str(said) and s.last['X-Content-Type-Options'] == 'nosniff'
        monkeypatch.undo()
        assert s.ask(body=picture())[0] == 200 and s.metric('blocks_body_bytes') == 0

def test_only_models_of_one_picture_are_served():
    with pytest.raises(DataError, match='CategoryBlock'): create_app(Predictor(nn.Identity(), (CategoryBlock(vocab=['a']), CategoryBlock(vocab=['a']))))
    with pytest.raises(DataError, match='ImageBlock, ImageBlock'): create_app(Predictor(nn.Identity(), (ImageBlock(), ImageBlock(), CategoryBlock(vocab=['a'])), n_inp=2))

def test_an_application_can_run_again():
    app = create_app(make_predictor(), limits=Limits(**SMALL))
    async def once():
        async with app.router.lifespan_context(app): return await asyncio.wrap_future(app.state.batcher.submit([('a', picture(), 1, False)])[0])
    assert asyncio.run(once())['item'] == asyncio.run(once())['item'] == 'a'

def small_export(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        p = Predictor(create_vision_model('shufflenet_v2_x0_5', 2, pretrained=False), (ImageBlock(), CategoryBlock(vocab=['a', 'b'])), geometries=(Resize(32),))
    return p, export_predictor(p, tmp_path/'export.pkl')

def test_serve_loads_answers_and_says_what_it_does(tmp_path, monkeypatch, capsys):
    from blocks.app import serve as module
    (p, file), made = small_export(tmp_path), []
    monkeypatch.setattr(module, 'make_server', lambda app, limits: made.append(make_server(app, limits)) or made[0])
    thread = threading.Thread(target=module.serve, args=(file,), kwargs=dict(port=0, limits=Limits(max_files=3))); thread.start()
    while not (made and made[0].started): time.sleep(.01); assert thread.is_alive()
    port = made[0].servers[0].sockets[0].getsockname()[1]
    link = HTTPConnection('127.0.0.1', port, timeout=20); link.request('POST', '/predict', picture()); answer = json.loads(link.getresponse().read())['predictions'][0]; link.close()
    made[0].should_exit = True; thread.join(20)
    out = capsys.readouterr().out
    assert answer['label'] == p.predict(picture())[0] and 'export.pkl' in out and f'http://127.0.0.1:{port}' in out and out.endswith('stopped\n')

@pytest.mark.slow
def test_a_process_serves_until_it_is_interrupted_and_imports_the_web_late(tmp_path):
    p, file = small_export(tmp_path)
    late = "import sys, blocks.app.serve as s; print([m for m in ('fastapi', 'uvicorn', 'starlette', 'python_multipart', 'cv2', 'pandas', 'matplotlib') if m in sys.modules], flush=True)"
    code = f'{late}; s.serve({str(file)!r}, port=0)'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': os.getcwd()}) as run:
        try:
            assert run.stdout.readline().strip() == '[]'
            said = run.stdout.readline()
            host, port = re.search(r'http://([\d.]+):(\d+)', said).groups()
            link = HTTPConnection(host, int(port), timeout=20); link.request('POST', '/predict', picture()); answer = json.loads(link.getresponse().read())['predictions'][0]
            assert 'export.pkl' in said and answer['label'] == p.predict(picture())[0]
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=20)
            assert run.returncode == 0 and 'stopped' in out and err == ''
        finally: run.kill()

def test_a_port_that_is_taken_is_said_at_once(tmp_path):
    from blocks.app.serve import serve
    with listen('127.0.0.1', 0) as taken:
        with pytest.raises(BlocksError, match='port'): serve(tmp_path/'nothing.pkl', port=taken.getsockname()[1])
    with pytest.raises(BlocksError, match=r'0-65535\. .*--port'): listen('127.0.0.1', 70_000)
    with pytest.raises(BlocksError, match='nothing.pkl'): serve(tmp_path/'nothing.pkl', port=0)


# All of it at once

def attacks(service, rng):
    "Functions that each send one hostile request, and give the status of the answer or None"
    ask, talk, good = service.ask, lambda *a, **k: status(service.talk(*a, **k)), picture(1)
    def leave(n):
        with socket.create_connection(service.address, timeout=20) as s:
            s.sendall((head(5000) + picture())[:n])
            if n % 2: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    names = ['../../etc/passwd', '/dev/zero', 'C:\\boot.ini', 'a\0b', '\r\nX: y', '"; rm -rf', 'x'*3000, '%2e%2e%2f', 'file:///etc/passwd', 'http://localhost:1/']
    def changed():
        data = bytearray(picture(rng.randrange(9), format=rng.choice(FORMATS)))
        for _ in range(rng.randrange(1, 20)): data[rng.randrange(len(data))] = rng.randrange(256)
        return ask(body=bytes(data))[0]
    return [
        lambda: ask(body=bytes(rng.choice([400_001, 900_000])))[0],
        lambda: ask(body=iter([bytes(150_000)]*4))[0],
        lambda: talk(head(10**rng.randrange(6, 18)), b'x'),
        lambda: ask(body=picture(2, format=rng.choice(FORMATS))[:rng.randrange(300)])[0],
        changed, changed,
        lambda: ask(body=rng.choice(list(NO_PICTURES.values())), **{'Content-Type': 'image/png'})[0],
        lambda: ask(body=rng.choice([v for v in BOMBS.values() if len(v) < 400_000]))[0],
        lambda: ask(body=rng.choice(list(BOMBS.values())))[0],
        lambda: talk(head(5000), *[b'x']*rng.randrange(3), pause=.1),
        lambda: talk(b'POST /predict HTTP/1.1\r\nHost: local'[:rng.randrange(37)]),
        lambda: ask(body=form((rng.choice(names), rng.choice([good, b'/etc/passwd']))), **{'Content-Type': FORM})[0],
        lambda: ask('/predict?' + rng.choice(['path=/etc/passwd', 'topk=1e9', 'topk=' + '9'*3000, 'model=../x.pkl', '%00', 'a'*5000]), good)[0],
        lambda: ask(rng.choice(['/../../etc/passwd', '/%2e%2e/etc/passwd', '/docs/../../x', '/info?x=' + 'y'*3000, '//']))[0],
        lambda: ask(body=form(*[('a', good)]*rng.randrange(4))[:rng.randrange(20, 300)], **{'Content-Type': FORM})[0],
        lambda: ask(body=form(*[('a', b'')]*rng.choice([4, 5, 500])), **{'Content-Type': FORM})[0],
        lambda: ask(body=rng.randbytes(3000).replace(b'\n', b'\n--edge\r\n'), **{'Content-Type': rng.choice([FORM, 'multipart/form-data', 'multipart/form-data; boundary=' + 'z'*300, 'multipart/mixed; boundary=edge'])})[0],
        lambda: talk(rng.randbytes(rng.randrange(1, 2000)) + b'\r\n\r\n'),
        lambda: talk(head(rng.choice(['-1', '0x10', '1, 2', '', 'a'])), good),
        lambda: talk(head(None, more='Transfer-Encoding: chunked\r\n'), rng.choice([b'zz\r\n', b'fffffffffffffffff\r\n', b'5\r\nab\r\n0\r\n\r\n', b'-1\r\n\r\n', b'5;' + b'x'*70_000, b'1\r\nx\r\n'*5000])),
        lambda: talk(head(None, more='Transfer-Encoding: chunked\r\nContent-Length: 4\r\n'), b'0\r\n\r\nGET /info HTTP/1.1\r\n\r\n'),
        lambda: leave(rng.randrange(1, 400)), lambda: leave(rng.randrange(1, 400)),
        lambda: ask(body=good, Host='rebound.example.com')[0],
        lambda: ask(body=good, Origin='https://example.com')[0],
    ]

def memory():
    with open('/proc/self/status') as f: return int(re.search(r'VmRSS:\s+(\d+)', f.read())[1])*1024

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='memory is read from /proc')
def test_two_thousand_hostile_requests_beside_an_honest_client():
    with Service(make_predictor(), **{**SMALL, 'timeout': .6}) as s:                # on a busy machine
        stop, answered, busy, wrong = threading.Event(), [0], [0], []
        def honest():
            n = 0
            while not stop.is_set() or answered[0] < 50:
                n += 1; data = picture(n % 40, format=FORMATS[n % len(FORMATS)])
                code, said = s.ask(body=data)
                if code == 503: busy[0] += 1; time.sleep(.02)
                elif code == 200 and right(s, data, said['predictions'][0]): answered[0] += 1
                else: wrong.append((code, said))
        def attack(seed):
            rng = random.Random(seed); attack = attacks(s, rng)[seed % 25]
            try: return seed % 25, attack()
            except (OSError, HTTPException): return seed % 25, None              # cut off
        client = threading.Thread(target=honest); client.start()
        with ThreadPoolExecutor(16) as pool:
            seen = list(pool.map(attack, range(500)))
            half = memory()
            seen += pool.map(attack, range(500, 2000))
            grown = memory() - half
        stop.set(); client.join(30)
        codes = {code for _, code in seen}
        assert len(seen) == 2000 and not wrong and answered[0] > 100, (wrong[:3], answered)
        assert codes <= {None, 200, 400, 403, 404, 408, 413, 415, 422, 503} and {400, 403, 404, 408, 413, 415, 422} <= codes, codes
        assert s.batcher.held == 0 and s.metric('blocks_body_bytes') == 0 and 'status="500"' not in s.ask('/metrics')[1]
        assert grown < 60*2**20, f'{grown/2**20:.0f} MB more'
        time.sleep(1.5)
        assert len(s.server.server_state.connections) <= 1 and s.ask(body=picture())[0] == 200
