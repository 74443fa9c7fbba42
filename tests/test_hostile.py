"Files made to do harm: none runs, none hangs, each is an ExportError of one paragraph. And thousands of damaged ones."
import ast
import gzip
import io
import json
import os
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from blocks import CategoryBlock, ImageBlock, Predictor, Resize
from blocks.infer.file import export_predictor
from blocks.infer.values import read_values
from blocks.model.head import create_vision_model

# --- the tools of an attacker
def text(s): return b'X' + struct.pack('<I', len(s.encode())) + s.encode()
def number(n): return b'\x8a\x08' + struct.pack('<q', n)
def name(module, attr): return b'c' + f'{module}\n{attr}\n'.encode()
def tuple_of(*parts): return b'(' + b''.join(parts) + b't'
def plain(stream): return b'\x80\x02' + stream + b'.'
def zipped(records, prefix='archive', **how):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', **how) as z:
        for n, data in records: z.writestr(f'{prefix}/{n}' if prefix else n, data)
    return f.getvalue()
def archive(stream, *more): return zipped([('data.pkl', stream), ('version', b'3\n'), ('byteorder', b'little'), *more])
def storage(numel=4, kind='FloatStorage', key='0', module='torch'): return tuple_of(text('storage'), name(module, kind), text(key), text('cpu'), number(numel)) + b'Q'
def tensor(shape=(4,), stride=(1,), offset=0, stored=None, make='_rebuild_tensor_v2', hooks=None):
    sizes = [tuple_of(*map(number, o)) for o in (shape, stride)]
    return name('torch._utils', make) + tuple_of(stored or storage(), number(offset), *sizes, b'\x89', hooks or name('collections', 'OrderedDict') + b')R') + b'R'
def holding(stream): return archive(plain(b'}' + text('format') + b'K\x01s' + text('x') + stream + b's'), ('data/0', bytes(16)))
def saved(content, **how): f = io.BytesIO(); torch.save(content, f, **how); return f.getvalue()
def safetensors(header, data=b'', length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header) if length is None else length) + header + data

# --- the files
def code_streams(command):
    "Pickles that would run `command`, by the instruction that does it: name → (stream without its protocol, lowest protocol)"
    run, arg = name('os', 'system'), text(command)
    return dict(reduce=run + arg + b'\x85R', global_only=run, stack_global=text('os') + text('system') + b'\x93' + arg + b'\x85R', inst=b'(' + arg + b'ios\nsystem\n', obj=b'(' + run + arg + b'o',
                newobj=name('subprocess', 'Popen') + arg + b'\x85\x81', newobj_ex=name('subprocess', 'Popen') + arg + b'\x85}\x92', build=name('collections', 'OrderedDict') + b')R' + b'}' + text('__class__') + run + b'sb',
                setstate=name('zipimport', 'zipimporter') + b')R}b', ext1=b'\x82\x01', ext2=b'\x83\x01\x00', ext4=b'\x84\x01\x00\x00\x00', persid=b'Pevil\n', binpersid=arg + b'Q', call_text=arg + b')R',
                call_dtype=name('torch', 'float32') + b')R', call_storage=name('torch', 'FloatStorage') + number(2**40) + b'\x85R', frame=b'\x95' + struct.pack('<Q', 2**62), buffer=b'\x97', bytearray8=b'\x96' + struct.pack('<Q', 2**62),
                get_missing=b'h\x07', pop_all=b'000', dup=b'2222', mark_only=b'((((', memo=b'}r\xff\xff\xff\xff')

CALLED = '''os._exit os.abort os.remove os.popen os.execv builtins.eval builtins.exec builtins.getattr builtins.__import__ builtins.compile builtins.open builtins.bytearray builtins.print builtins.input builtins.setattr
    __builtin__.eval __main__.main subprocess.call subprocess.check_output shutil.rmtree socket.socket socket.create_connection urllib.request.urlopen importlib.import_module runpy.run_path pickle.loads marshal.loads
    types.CodeType types.FunctionType functools.partial operator.attrgetter operator.methodcaller pathlib.Path ctypes.CDLL webbrowser.open timeit.timeit pdb.run code.interact sys.exit signal.raise_signal time.sleep
    torch.load torch.save torch.hub.load torch.jit.load torch.ops.load_library torch.storage._load_from_bytes torch._utils._rebuild_parameter torch._utils._rebuild_qtensor torch._utils._rebuild_sparse_tensor
    torch._utils._rebuild_meta_tensor_no_storage torch._utils._rebuild_wrapper_subclass torch._utils._rebuild_device_tensor_from_numpy torch._tensor._rebuild_from_type_v2 torch.nn.modules.linear.Linear torch.Tensor
    torch.empty torch.zeros torch.device torch.Size torch.serialization._get_layout numpy.load numpy.core.multiarray._reconstruct _codecs.encode collections.Counter collections.defaultdict
    fastai.learner.Learner blocks.core.require blocks.infer.file.load_learner'''.split()

def pickled(command):
    files = {}
    for n, stream in code_streams(command).items():
        files[f'pickle-{n}.pkl'], files[f'archive-{n}.pkl'] = plain(stream), archive(plain(stream))
        files[f'inside-{n}.pkl'] = holding(stream)
    class Evil:
        def __init__(self, how): self.how = how
        def __reduce__(self): return self.how
    for protocol in range(6):
        evil = pickle.dumps(dict(format=1, x=Evil((os.system, (command,)))), protocol)
        files[f'protocol-{protocol}.pkl'], files[f'archive-protocol-{protocol}.pkl'] = evil, archive(evil)
        files[f'plain-protocol-{protocol}.pkl'] = pickle.dumps(dict(format=1), protocol)
    for n in CALLED:
        module, _, attr = n.rpartition('.')
        files[f'calls-{n}.pkl'] = holding(name(module, attr) + text(command) + b'\x85R')
    evil = Evil((os.system, (command,)))
    files |= {'torch-evil.pkl': saved(dict(format=1, x=evil)), 'torch-evil-4.pkl': saved(dict(format=1, x=evil), pickle_protocol=4), 'torch-by_value.pkl': saved(dict(format=1, by_value=evil)),
              'torch-legacy-evil.pkl': saved(dict(x=evil), _use_new_zipfile_serialization=False), 'torch-legacy.pkl': saved(dict(format=1, x=torch.ones(2)), _use_new_zipfile_serialization=False),
              'torch-module.pkl': saved(nn.Linear(2, 2)), 'torch-state.pkl': saved(nn.Linear(2, 2).state_dict()), 'torch-tensor.pkl': saved(torch.ones(3)), 'fastai.pkl': saved(dict(dls=Path('x'), model=nn.Linear(1, 1))),
              'fastai-old.pkl': pickle.dumps(nn.Linear(1, 1)), 'torch-parameter.pkl': saved(dict(format=1, x=nn.Parameter(torch.ones(2)))), 'torch-sparse.pkl': saved(dict(format=1, x=torch.eye(3).to_sparse())),
              'torch-csr.pkl': saved(dict(format=1, x=torch.eye(3).to_sparse_csr())), 'torch-meta.pkl': saved(dict(format=1, x=torch.empty(10**9, device='meta'))),
              'torch-quantized.pkl': saved(dict(format=1, x=torch.quantize_per_tensor(torch.ones(2), .1, 0, torch.qint8))), 'torch-expanded.pkl': saved(dict(format=1, x=torch.zeros(1).expand(10**9))),
              'torch-module-4.pkl': saved(dict(format=1), pickle_protocol=4)}
    return files

def tensors():
    far = dict(shape=dict(shape=(10**9,)), terabyte=dict(shape=(2**40,)), many=dict(shape=(2**20, 2**20, 2**20)), offset=dict(offset=2), far=dict(offset=2**47), before=dict(offset=-1), backwards=dict(stride=(-1,)),
               minus=dict(shape=(-4,)), same=dict(shape=(2, 4), stride=(0, 1)), overlap=dict(shape=(2, 2), stride=(1, 1)), lying_over=dict(shape=(3, 2), stride=(1, 2)), axes=dict(shape=(1,)*99, stride=(1,)*99),
               ragged=dict(shape=(4, 1)), empty=dict(shape=(0, 2**47), stride=(1, 1)), spread=dict(shape=(2,), stride=(2**40,)), larger=dict(stored=storage(5)), smaller=dict(stored=storage(3)), huge=dict(stored=storage(2**50)),
               none=dict(stored=storage(key='7')), outside=dict(stored=storage(key='../x')), records=dict(stored=storage(key='0/../0')), doubles=dict(stored=storage(kind='DoubleStorage')), quantized=dict(stored=storage(kind='QInt8Storage')),
               evil=dict(stored=storage(module='os', kind='system')), untyped=dict(stored=storage(16, module='torch.storage', kind='UntypedStorage')), no_storage=dict(stored=b'N'), text=dict(stored=text('x')),
               nested=dict(stored=tensor()), hooks=dict(hooks=b'}' + text('a') + name('os', 'system') + b's'), v3=dict(make='_rebuild_tensor_v3'), v1=dict(make='_rebuild_tensor'))
    files = {f'tensor-{n}.pkl': holding(tensor(**how)) for n, how in far.items()}
    return files | {'tensor-storage-alone.pkl': holding(storage()), 'tensor-id-short.pkl': holding(tuple_of(text('storage'), text('0')) + b'Q'), 'tensor-id-module.pkl': holding(tuple_of(text('module'), *[text('os')]*4) + b'Q'),
                    'tensor-as-key.pkl': holding(b'}' + tensor() + b'Ns'), 'tensor-no-args.pkl': holding(name('torch._utils', '_rebuild_tensor_v2') + b')R')}

def bombs():
    def stream(s): return archive(plain(s))
    laughs = b']q\0' + b''.join(b'h%cq%c0(' % (i, i) + b'h%c'*0 + b'h%ch%cee'[:0] + b'00' for i in ()) + b''.join(b'h%c\x86q%c' % (i, i + 1) for i in range(60))
    collide = b'}(' + b''.join(number(i*(2**61 - 1)) + b'N' for i in range(-4, 4)) + b'u'
    files = dict(deep=b']'*50_000 + b'a'*49_999, deep_tuples=b')' + b'\x85'*100_000, deep_dicts=(b'}' + text('a'))*3000 + b'}' + b's'*3000, itself=b']q\0h\0a', laughs=laughs, collide=collide, long=b'\x8a\xff' + b'\1'*255, long4=b'\x8b' + struct.pack('<i', 2**31 - 1),
                 text=b'X' + struct.pack('<I', 2**32 - 1), bytes=b'B' + struct.pack('<I', 2**32 - 1), text8=b'\x8d' + struct.pack('<Q', 2**62), not_utf8=b'X\2\0\0\0\xff\xfe', memo=b']r' + struct.pack('<I', 2**32 - 1), int=b'I99999999999999999999\n',
                 wide=b'(' + b'N'*5_000_000 + b't', stops=b'N.N', values=b'NN', nothing=b'', name_far=b'c' + b'a'*10_000, key=b'}]Ns', odd=b'}(Nu', no_list=b'}Na', half=b'}' + text('format'))
    return {f'bomb-{n}.pkl': stream(s) for n, s in files.items()} | {'bomb-protocol.pkl': archive(b'\x80\xffN.'), 'bomb-no-protocol.pkl': archive(b'N.'), 'bomb-huge.pkl': archive(plain(b'N0'*9_000_000 + b'N'))}

def patched(data, start, form, *values): return data[:start] + struct.pack(form, *values) + data[start + struct.calcsize(form):]

def archives(good):
    records = [(i.filename.partition('/')[2], zipfile.ZipFile(io.BytesIO(good)).read(i)) for i in zipfile.ZipFile(io.BytesIO(good)).infolist()]
    pkl, end, table = dict(records)['data.pkl'], len(good) - 22, struct.unpack_from('<I', good, len(good) - 6)[0]
    first, wide, bomb = good.index(b'PK\1\2'), good.index(b'PK\6\6'), bytes(30_000_000)
    files = {f'extra-{n}': zipped(records + [(n, pkl)]) for n in ('evil.pkl', 'code/x.py', 'data/evil', 'data/99999', 'data/01', 'constants.pkl', '../evil', '..', 'data/../../evil', 'data/0\\x', 'a'*300, 'é.pkl', 'attributes.pkl', '__init__.py')}
    files |= {'twice-data.pkl': zipped(records + [('data.pkl', pkl)]), 'twice-tensor': zipped(records + [('data/0', b'')]), 'root': zipped(records, prefix=''), 'parent': zipped(records, prefix='..'), 'absolute': zipped(records, prefix='/etc'),
              'here': zipped(records, prefix='.'), 'two-prefixes': zipped([(f'a/{n}' if n == 'data.pkl' else f'b/{n}', d) for n, d in records], prefix=''), 'deeper': zipped(records, prefix='a/b'), 'windows': zipped(records, prefix='C:\\x/y'),
              'deflated': zipped(records, compression=zipfile.ZIP_DEFLATED), 'bomb': zipped([(n, bomb if n == 'data/0' else d) for n, d in records], compression=zipfile.ZIP_DEFLATED), 'bzip2': zipped(records, compression=zipfile.ZIP_BZIP2),
              'lzma': zipped(records, compression=zipfile.ZIP_LZMA), 'no-pkl': zipped(records[1:]), 'no-tensor': zipped([o for o in records if o[0] != 'data/0']), 'empty': zipped([]), 'only-end': b'PK\5\6' + bytes(18),
              'order': zipped([(n, b'middle' if n == 'byteorder' else d) for n, d in records]), 'before': b'#!/bin/sh\n' + good, 'before-zip': zipped([('x', b'')]) + good, 'behind': good + b'x', 'behind-zeros': good + bytes(100), 'comment': patched(good, end + 20, '<H', 4) + b'evil',
              'zip-in-pickle': plain(b'N') + good, 'jit': zipped(records + [('code/__torch__.py', b'import os'), ('constants.pkl', pkl)]), 'npz': zipped([('x.npy', b'')], prefix=''), 'docx': zipped([('[Content_Types].xml', b'<x/>')], prefix=''),
              'crc-pkl': good.replace(b'format', b'fOrmat', 1), 'crc-tensor': good[:-3000].replace(good[table//2:table//2 + 8], b'evilevil', 1) + good[-3000:], 'count': patched(good, end + 8, '<2H', 3, 3), 'count-many': patched(good, end + 8, '<2H', 65534, 65534),
              'disks': patched(good, end + 4, '<H', 1), 'table-start': patched(good, end + 16, '<I', 0), 'table-size': patched(good, end + 12, '<I', 2**31), 'local-name': good[:30] + b'Archive' + good[37:], 'local-method': patched(good, 8, '<H', 8),
              'local-mark': b'PK\3\5' + good[4:], 'local-extra': patched(good, 28, '<H', 0), 'encrypted': patched(good, first + 8, '<H', 0x809), 'method': patched(good, first + 10, '<H', 8), 'size': patched(good, first + 24, '<I', 2**31), 'sizes': patched(good, first + 20, '<2I', 2**31, 2**31),
              'overlap': patched(good, first + 20, '<2I', table//2, table//2), 'short': patched(good, first + 20, '<2I', 10, 10), 'start': patched(good, first + 42, '<I', 1), 'name-length': patched(good, first + 28, '<H', 65535), 'extra-length': patched(good, first + 30, '<H', 65535),
              'entry-comment': patched(good, first + 32, '<H', 9), 'saturated': patched(good, first + 20, '<2I', 2**32 - 1, 2**32 - 1), 'wide-count': patched(good, wide + 24, '<2Q', 2**40, 2**40), 'wide-size': patched(good, wide + 40, '<Q', 2**60),
              'wide-start': patched(good, wide + 48, '<Q', 2**60), 'wide-own': patched(good, wide + 4, '<Q', 2**60), 'wide-place': patched(good, wide + 64, '<Q', 2**60), 'wide-mark': patched(good, wide, '<4s', b'PK\6\5'), 'wide-disk': patched(good, wide + 16, '<2I', 7, 7)}
    for share in (1, 5, 20, 40, 60, 80, 95, 99): files[f'cut-{share}'] = good[:len(good)*share//100]
    for k in (1, 10, 21, 22, 23, 40, 60, 98, 99, 500): files[f'cut-end-{k}'] = good[:-k]
    return {f'zip-{re.sub("[^a-z0-9.-]", "_", n)[:40]}.pkl': data for n, data in files.items()}

def contents(good):
    "Plain files whose content is meant to cost, to read elsewhere, or to break"
    content = read_values(good)
    spec = content['model']['spec']
    def block(kind, **f): return dict(blocks=[dict(kind=kind, fields=f), content['blocks'][1]])
    def target(kind, **f): return dict(blocks=[content['blocks'][0], dict(kind=kind, fields=f)])
    def model(**f): return dict(model=dict(spec=spec | f))
    def head(kind='create_head', **f): return model(head={kind: f})
    def resize(**f): return dict(geometries=[dict(kind='Resize', fields=f)])
    def tfm(kind, **f): return dict(tfms=[dict(kind=kind, torchvision=f)])
    nested = dict(a=1)
    for _ in range(40): nested = dict(a=nested)
    changes = dict(outs=model(n_out=10**9), outs_minus=model(n_out=-1), outs_float=model(n_out=2.), outs_true=model(n_out=True), ins=model(n_in=10**9), features=model(nf=10**12), features_none=model(nf=0), cut=model(cut=10**12), arch=model(arch='squeezenet1_1'),
                   arch_none=model(arch='nonet'), arch_list=model(arch=['resnet18']), arch_quantized=model(arch='quantized_resnet18'), arch_video=model(arch='r3d_18'), arch_large=model(arch='regnet_y_128gf'), hub=model(arch='hf-hub:timm/resnet18.a1_in1k', source='timm'),
                   local=model(arch='local-dir:/etc', source='timm'), hub_source=model(arch='a/b', source='hub'), custom_source=model(source='custom', arch='os.system'), custom=model(custom=['arch']), mean=model(mean=[float('inf')]*3, std=[1.]*3), std=model(mean=[0.]*3, std=[0.]*3), mean_long=model(mean=[.5]*10_000),
                   spec_more=model(evil=1), spec_none=dict(model=dict(spec=None)), spec_list=dict(model=dict(spec=[1])), model_none=dict(model={}), head_none=model(head=None), head_two=model(head=dict(create_head={}, unet={})), head_evil=model(head=dict(system={})),
                   layers=head(lin_ftrs=[1]*10**5), layer=head(lin_ftrs=[10**9]), layer_minus=head(lin_ftrs=[-5]), drop=head(ps=float('nan')), drops=head(ps=[.1]*10**5), y_range=head(y_range=[0, float('inf')]), argument=head(evil=1), argument_text=head(concat_pool='yes'), hidden=head('mlp_head', hidden=[10**9]),
                   unet=head('unet', img_size=[10**9, 10**9]), unet_thin=head('unet', img_size=[8, 16384]), unet_plain=head('unet'), detector=model(arch='fasterrcnn_resnet50_fpn', head=dict(detector=dict(max_boxes=10**9, anchor_scale=1., frozen=None))),
                   detector_scale=model(arch='retinanet_resnet50_fpn', head=dict(detector=dict(max_boxes=9, anchor_scale=1e300, frozen=None))), detector_arch=model(head=dict(detector=dict(max_boxes=9, anchor_scale=1., frozen=None))),
                   resize=resize(size=10**9), resize_two=resize(size=(10**9, 1)), resize_nan=resize(size=float('nan')), resize_text=resize(size='big'), resize_none=resize(), resize_more=resize(size=8, evil=1), ratio=dict(geometries=[dict(kind='RatioResize', fields=dict(max_sz=10**9))]),
                   path=target('CategoryBlock', vocab=['a', 'b'], class_names='/etc/passwd'), path_zero=target('CategoryBlock', vocab=['a', 'b'], class_names='/dev/zero'), codes=target('MaskBlock', codes=tuple(range(50_000))), twice=target('CategoryBlock', vocab=['a']*50_000),
                   points=target('PointBlock', n_points=10**12), numbers=target('RegressionBlock', n_out=10**12), temperature=target('CategoryBlock', vocab=['a', 'b'], temperature=0.), weights=target('CategoryBlock', vocab=['a', 'b'], weights=(1., float('nan'))), mode=block('ImageBlock', mode='XYZ'),
                   mode_list=block('ImageBlock', mode=['RGB']), sound=block('SpectrogramBlock', n_mels=10**9), sound_fft=block('SpectrogramBlock', n_fft=2**40), sound_long=block('SpectrogramBlock', duration=1e18), unknown=block('HologramBlock'), private=block('_Classes'), frame=block('Frame', box=(0, 0, 1, 1), size=(1, 1)),
                   wrong_place=dict(blocks=[dict(kind='Resize', fields=dict(size=8)), content['blocks'][1]]), block_geometry=dict(geometries=[dict(kind='ImageBlock', fields={})]), block_custom=dict(blocks=[dict(kind='Evil', custom='os.system'), content['blocks'][1]]), dunder=dict(blocks=[dict(kind='__builtins__', fields={}), content['blocks'][1]]),
                   np=dict(blocks=[dict(kind='np', fields={}), content['blocks'][1]]), kind=dict(blocks=[dict(kind=3)]), kindless=dict(blocks=[{}, {}]), blocks_none=dict(blocks=[]), blocks_many=dict(blocks=[content['blocks'][0]]*1000), blocks_text=dict(blocks='ImageBlock'),
                   lam=tfm('Lambda', lambd='os.system'), tfm_none=tfm('Teleport'), tfm_functional=tfm('functional'), tfm_forward=tfm('CenterCrop', forward=1), tfm_class=tfm('CenterCrop', __class__=1), tfm_hooks=tfm('CenterCrop', _forward_hooks={}), tfm_size=tfm('CenterCrop', size=[10**9, 10**9]), pad=tfm('Pad', padding=10**9),
                   compose=dict(tfms=[dict(kind='Compose', parts=3)]), batch=dict(batch_tfms=[dict(kind='Flip', fields=dict(size=10**9))]), batch_kind=dict(batch_tfms=[dict(kind='_Changed', fields={})]), views=dict(views=[[], []]), views_text=dict(views='abc'), views_wrong=dict(views=[[dict(kind='ImageBlock', fields={})], [], []]),
                   info=dict(info=[]), info_deep=dict(info=nested), inputs=dict(n_inp=0), inputs_many=dict(n_inp=10**9), inputs_float=dict(n_inp=1.), inputs_true=dict(n_inp=True), state=dict(state_dict=[]), state_none=dict(state_dict={}), state_text=dict(state_dict={'a': 'b'}), state_keys=dict(state_dict={1: torch.ones(1)}),
                   state_more=dict(state_dict=content['state_dict'] | {'evil': torch.ones(1)}), state_less=dict(state_dict=dict([*content['state_dict'].items()][1:])), state_types=dict(state_dict={k: v.long() for k, v in content['state_dict'].items()}), state_one=dict(state_dict={k: torch.zeros(1) for k in content['state_dict']}),
                   format_text=dict(format='1'), format_new=dict(format=10**9), format_none=dict(format=None))
    shared = torch.zeros(max(v.numel() for v in content['state_dict'].values()))
    changes['state_shared'] = dict(state_dict={k: shared[:v.numel()].view(v.shape) if v.is_floating_point() else v for k, v in content['state_dict'].items()} | {f'x{i}': shared for i in range(50)})
    return {f'content-{n}.pkl': saved(content | change) for n, change in changes.items()}

def safe_files(good):
    (n,) = struct.unpack_from('<Q', good)
    header, data = json.loads(good[8:8 + n]), good[8 + n:]
    first = min((k for k in header if k != '__metadata__'), key=lambda k: header[k]['data_offsets'])
    blocks = json.loads(header['__metadata__']['blocks'])
    def entry(**f): return safetensors(header | {first: header[first] | f}, data)
    def meta(text): return safetensors(header | {'__metadata__': text}, data)
    def inner(**f): return meta(dict(blocks=json.dumps(blocks | f)))
    size = header[first]['data_offsets'][1]
    files = dict(length=safetensors(good[8:8 + n], data, 2**63), length_more=safetensors(good[8:8 + n], data, len(good)), length_less=safetensors(good[8:8 + n], data, n - 5), length_one=safetensors(b'{', b'', 1), length_giant=safetensors(b'{}', b'', 2**40), not_json=safetensors(b'{evil', data), deep=safetensors(b'{"a":' + b'['*100_000, data),
                 objects=safetensors(b'{"a":'*50_000, data), twice=safetensors(b'{"a":1,"a":2}'), infinite=safetensors(b'{"a":NaN}'), digits=safetensors(b'{"a":' + b'9'*10_000 + b'}'), list=safetensors(b'[]'), utf16=safetensors('{"a":1}'.encode('utf-16')), empty=safetensors({}), weights=safetensors({first: header[first]}, data[:size]),
                 overlap=entry(data_offsets=[0, size + 4]), hole=entry(data_offsets=[4, size]), before=entry(data_offsets=[-4, size]), far=entry(data_offsets=[0, 2**60]), three=entry(data_offsets=[0, size, 9]), backwards=entry(data_offsets=[size, 0]), offset_text=entry(data_offsets='ab'), offset_none=entry(data_offsets=None), offset_float=entry(data_offsets=[0., float(size)]),
                 shape=entry(shape=[10**9]), shape_minus=entry(shape=[-1]), shape_true=entry(shape=[True]), shape_huge=entry(shape=[2**62, 2**62]), shape_axes=entry(shape=[1]*100_000), shape_none=entry(shape=None), dtype=entry(dtype='F9'), dtype_list=entry(dtype=['F32']), dtype_wider=entry(dtype='F64'), dtypeless=safetensors(header | {first: {}}, data),
                 tensor_list=safetensors(header | {first: []}, data), more=good + b'evil', less=good[:-4], cut=good[:len(good)//2], cut_header=good[:8 + n//2], cut_length=good[:5], meta_list=meta([]), meta_none=meta({}), meta_text=meta('evil'), meta_number=meta(dict(blocks=3)), meta_json=meta(dict(blocks='{evil')), meta_array=meta(dict(blocks='[]')), meta_deep=meta(dict(blocks='['*50_000)),
                 state=inner(state_dict={}), state_list=inner(state_dict=[]), state_unknown=inner(state_dict={'a': 'evil'}), state_none=inner(state_dict=None), reference=inner(info={'$tensor': 'evil'}), kind=inner(info={'$evil': 1}), two=inner(info={'$tuple': [], 'a': 1}), pairs=inner(info={'$dict': [[[], 1]]}), number=inner(info={'$float': 'evil'}),
                 dtype_evil=inner(info={'$dtype': 'evil'}), tuple_evil=inner(info={'$tuple': 3}), by_value=inner(by_value='os.system', blocks=[]))
    return {f'safe-{n}.safetensors': data for n, data in files.items()}

def foreign(good):
    f = io.BytesIO(); torch.jit.save(torch.jit.script(nn.ReLU()), f)
    return {'foreign-jit.pt': f.getvalue(), 'foreign-empty.pkl': b'', 'foreign-text.pkl': b'hello\n', 'foreign-npy.npy': b'\x93NUMPY\x01\x00v\x00{}' + bytes(100), 'foreign-hdf5.h5': b'\x89HDF\r\n\x1a\n' + bytes(500), 'foreign-json.pkl': b'{"format": 1}', 'foreign-png.pkl': b'\x89PNG\r\n\x1a\n' + bytes(50),
            'foreign-gzip.pkl': gzip.compress(good), 'foreign-zlib.pkl': zlib.compress(good), 'foreign-elf.pkl': b'\x7fELF' + bytes(100), 'foreign-script.pkl': b'#!/bin/sh\ntouch owned\n', 'foreign-python.pkl': b'import os\nos.system("touch owned")\n', 'foreign-pk.pkl': b'PK\3\4rubbish', 'foreign-zeros.pkl': bytes(10_000),
            'foreign-onnx.onnx': b'\x08\x07\x12\x07pytorch' + bytes(50), 'foreign-tar.pkl': b'archive/'.ljust(257, b'\0') + b'ustar\0' + bytes(250), 'foreign-noise.pkl': random.Random(0).randbytes(5000), 'foreign-byte.pkl': b'\x80'}

# --- what watches
WATCH = '''
import json, os, resource, signal, sys, time
sys.path.insert(0, ROOT)
from blocks.infer.card import inspect_export
from blocks.infer.file import load_learner
from blocks.core import ExportError
import torch
torch.set_num_threads(1)
for good in GOOD: load_learner(good).predict(torch.zeros(3, 32, 32, dtype=torch.uint8)); inspect_export(good)
import timm, blocks.data.sound, blocks.data.policy, blocks.data.sound_mask, torchvision.models.detection, blocks.model.detect, blocks.model.unet            # what a file may rightly ask for is there, so nothing else is fetched
try: load_learner(NEEDS)
except ExportError: pass
seen, watching = [], False
FORBIDDEN = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.remove', 'os.rename', 'os.mkdir', 'os.kill', 'subprocess.Popen', 'socket.', 'ctypes.', 'pty.', 'shutil.', 'urllib.', 'webbrowser.', 'import', 'exec', 'compile', 'pickle.find_class', 'marshal.')
def watch(event, args):
    if not watching: return
    if event == 'open' and (not isinstance(args[0], str) or os.path.dirname(args[0]) != FOLDER or args[1] not in ('rb', 'r') or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)): seen.append(f'open {args[:2]}')
    elif event.startswith(FORBIDDEN): seen.append(f'{event} {str(args)[:100]}')
sys.addaudithook(watch)
with open('/proc/self/statm') as f: used = int(f.read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,)*2)
said, rss = {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
for name in sorted(os.listdir(FOLDER)):
    out = {}
    for what, f in (('load', load_learner), ('inspect', inspect_export)):
        seen.clear(); start = time.process_time(); signal.alarm(60); watching = True
        try: result = f(os.path.join(FOLDER, name)); out[what] = [type(result).__name__, '']
        except BaseException as e: result = None; out[what] = [type(e).__name__, str(e)]
        watching = False; signal.alarm(0)
        out[what] += [list(seen), time.process_time() - start]
    said[name] = out
json.dump(dict(said=said, grown=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024 - rss), open(REPORT, 'w'))
'''

def predictor():
    model = create_vision_model('resnet18', 2, pretrained=False, cut=2, lin_ftrs=[])                       # a convolution, a BatchNorm and a last layer
    return Predictor(model, (ImageBlock(), CategoryBlock(vocab=['a', 'b'])), geometries=(Resize(16),), info=dict(classes=['a', 'b'], metrics=dict(accuracy=.5), items=dict(train=2, valid=1)))

@pytest.fixture(scope='session')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good')
    return [export_predictor(predictor(), folder/f'good.{o}') for o in ('pkl', 'safetensors')]

def files_of(good, command): return pickled(command) | tensors() | bombs() | archives(good[0].read_bytes()) | contents(good[0]) | safe_files(good[1].read_bytes()) | foreign(good[0].read_bytes())

@pytest.fixture(scope='session')
def hostile(good, tmp_path_factory):
    "What each file said, and whether something happened"
    root = tmp_path_factory.mktemp('hostile'); folder, mark = root/'files', root/'owned'
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                              # about making odd files
        files = files_of(good, f'touch {mark}')
    for n, data in files.items(): (folder/n).write_bytes(data)
    needs = root/'needs.pkl'
    needs.write_bytes((folder/'content-unet_plain.pkl').read_bytes())
    names = dict(ROOT=str(Path(__file__).parent.parent), FOLDER=str(folder), REPORT=str(root/'report.json'), GOOD=[str(o) for o in good], NEEDS=str(needs))
    code = '\n'.join(f'{k} = {v!r}' for k, v in names.items()) + WATCH
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root, timeout=300, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert out.returncode == 0, out.stderr[-3000:]
    return dict(json.loads((root/'report.json').read_text()), mark=mark, files=files, stderr=out.stderr, left=sorted(o.name for o in root.iterdir()))

def test_there_are_two_hundred_of_them_and_each_was_opened(hostile): assert len(hostile['said']) == len(hostile['files']) >= 200 and len(set(hostile['files'].values())) >= 200

def test_nothing_was_run(hostile):
    assert not hostile['mark'].exists() and hostile['left'] == ['files', 'needs.pkl', 'report.json']
    assert {(n, what): o[what][2] for n, o in hostile['said'].items() for what in o if o[what][2]} == {}

def test_each_is_an_export_error(hostile):
    assert {n: o['load'][:2] for n, o in hostile['said'].items() if o['load'][0] != 'ExportError'} == {}
    assert {n: o['inspect'][:2] for n, o in hostile['said'].items() if o['inspect'][0] not in ('ExportError', 'dict')} == {}

def test_each_error_is_one_paragraph_that_names_the_file(hostile):
    texts = {n: o['load'][1] for n, o in hostile['said'].items()}
    assert {n: t for n, t in texts.items() if n not in t or '\n' in t or not 40 < len(t) < 900} == {}

def test_code_is_said_to_be_never_run(hostile):
    lacking = [n for n, o in hostile['said'].items() if n.startswith(('pickle-', 'calls-', 'protocol-')) and 'code' not in o['load'][1] and 'damaged' not in o['load'][1]]
    assert lacking == []

def test_all_together_take_little_memory(hostile): assert hostile['grown'] < 500e6

def test_none_takes_long(hostile): assert {n: o['load'][3] for n, o in hostile['said'].items() if o['load'][3] > 5} == {}

def test_the_watch_sees_what_it_should(good, tmp_path):
    "The same pickle, opened the way it should not be, is noticed: by the mark that it leaves"
    f = tmp_path/'evil.pkl'; f.write_bytes(plain(code_streams(f'touch {tmp_path}/owned')['reduce']))
    subprocess.run([sys.executable, '-c', f'import pickle; pickle.load(open({str(f)!r}, "rb"))'], check=True)
    assert (tmp_path/'owned').exists()

def test_a_name_from_the_network_never_gets_there(good, tmp_path, monkeypatch):
    import socket
    from blocks import ExportError, load_learner
    monkeypatch.setattr(socket, 'socket', lambda *a, **k: pytest.fail('a socket'))
    content = read_values(good[0])
    for arch in ('hf-hub:timm/resnet18.a1_in1k', 'hf_hub:timm/resnet18', 'local-dir:/tmp', 'timm/resnet18', 'resnet18.a1_in1k?x', 'https://x'):
        content['model']['spec'] |= dict(arch=arch, source='timm')
        torch.save(content, tmp_path/'x.pkl')
        with pytest.raises(ExportError, match='no architecture'): load_learner(tmp_path/'x.pkl')

def test_a_spec_costs_nothing(good, tmp_path):
    "The largest architecture there is, and a head of a million layers, beside a few weights: refused in no time"
    import time
    from blocks import ExportError, load_learner
    content = read_values(good[0])
    for change in (dict(arch='regnet_y_128gf'), dict(arch='convnext_large'), dict(head={'create_head': dict(lin_ftrs=[1]*10**6)}), dict(n_out=10**9)):
        torch.save(content | dict(model=dict(spec=content['model']['spec'] | change)), tmp_path/'x.pkl')
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(ExportError): load_learner(tmp_path/'x.pkl')
        assert time.process_time() - start < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200*2**10

# --- damage
MUTATE = '''
import io, json, os, random, resource, signal, sys, time
sys.path.insert(0, ROOT)
import torch
from torch import nn
from blocks.infer.file import load_learner
from blocks.infer.values import read_values
from blocks.infer.predictor import Predictor
from blocks.core import ExportError
torch.set_num_threads(1)
rng, tally, odd, start = random.Random(SEED), {}, [], time.process_time()
def tiny(): return nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
load_learner(GOOD[0])
with open('/proc/self/statm') as f: used = int(f.read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,)*2); resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
originals = {g: open(g, 'rb').read() for g in GOOD}

def bytes_changed(data):
    data, how = bytearray(data), rng.randrange(7)
    i = rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 4000)), len(data) - 1 - rng.randrange(min(len(data), 2000))])
    n = min(rng.choice([1, 2, 8, 100, 2000]), len(data) - i)
    if how == 0: data[i] ^= 1 << rng.randrange(8)
    elif how == 1: data[i:i+n] = bytes(n)
    elif how == 2: del data[i:]
    elif how == 3: del data[i:i+n]
    elif how == 4: data[i:i] = rng.randbytes(n)
    elif how == 5: data[i:i+n] = rng.randbytes(n)
    else: j = rng.randrange(len(data) - n + 1); data[i:i+n], data[j:j+n] = data[j:j+n], data[i:i+n]
    return bytes(data)

WILD = [None, True, 0, -1, 1, 2, 3, 7, 2**31, 2**63 - 1, -2**63, 10**9, 1.5, -1., 1e308, float('nan'), float('inf'), '', 'a', 'RGB', '/etc/passwd', '../x', 'resnet34', 'timm', 'x'*1000, [], (), {}, [1, 2], (3, 4), [[]], {'a': 1}, {1: 2}, dict(kind='Resize', fields={}), dict(kind='ImageBlock', fields={}),
        torch.float16, torch.int64, torch.zeros(0), torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), torch.tensor(1.)]

def values_changed(content):
    "One value somewhere in the content, not a tensor of the weights most of the time, is another, is gone, is there twice"
    def copy(o): return {k: copy(v) for k, v in o.items()} if isinstance(o, dict) else [copy(v) for v in o] if isinstance(o, list) else o
    content = copy(content)
    o = content if rng.random() < .1 else content[rng.choice(['blocks', 'geometries', 'model', 'model', 'model', 'info', 'state_dict', 'batch_tfms', 'blocks'])]
    for _ in range(rng.randrange(5)):
        inner = [v for v in (o.values() if isinstance(o, dict) else o) if isinstance(v, (dict, list)) and v]
        if not inner: break
        o = rng.choice(inner)
    keys, how = list(o) if isinstance(o, dict) else list(range(len(o))), rng.randrange(5)
    if not keys: (o.update(a=rng.choice(WILD)) if isinstance(o, dict) else o.append(rng.choice(WILD))); return content
    k = rng.choice(keys)
    if how == 0: del o[k]
    elif how == 1 and isinstance(o, list): o.append(o[k])
    elif how == 1: o[rng.choice(['evil', 'size', 'mode', 'spec', 1, None])] = o[k]
    elif how == 2: o[k], o[keys[0]] = o[keys[0]], o[k]
    else: o[k] = rng.choice(WILD)
    return content

contents = {g: read_values(g) for g in GOOD}
for i in range(COUNT):
    good = GOOD[(0, 1, 2, 1)[i//2 % 4]]
    kind = 'values' if i % 2 else 'bytes'
    if kind == 'bytes': data = bytes_changed(originals[good])
    else:
        f = io.BytesIO(); torch.save(values_changed(contents[good]), f); data = f.getvalue()
    with open(FILE, 'wb') as f: f.write(data)
    signal.alarm(20); began = time.process_time()
    try: result = load_learner(FILE, model=tiny); what = type(result).__name__
    except ExportError as e: what = 'ExportError'
    except BaseException as e: what = type(e).__name__; odd.append([i, kind, what, str(e)[:300]])
    signal.alarm(0)
    if time.process_time() - began > 3: odd.append([i, kind, 'slow', time.process_time() - began])
    tally[kind + what] = tally.get(kind + what, 0) + 1
print(json.dumps(dict(tally=tally, odd=odd[:20], seconds=time.process_time() - start)))
'''

@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
def test_a_thousand_damaged_exports_are_predictors_or_errors(good, tmp_path, seed):
    own = Predictor(nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)), (ImageBlock(), CategoryBlock(vocab=['a', 'b'])), geometries=(Resize(16),))
    made = [export_predictor(predictor(), tmp_path/'library.pkl'), export_predictor(own, tmp_path/'own.pkl'), export_predictor(own, tmp_path/'own.safetensors')]
    names = dict(ROOT=str(Path(__file__).parent.parent), GOOD=[str(o) for o in made], SEED=seed, COUNT=1000, FILE=str(tmp_path/'mutated'))
    out = subprocess.run([sys.executable, '-c', '\n'.join(f'{k} = {v!r}' for k, v in names.items()) + MUTATE], capture_output=True, text=True, timeout=300, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert out.returncode == 0, (out.returncode, out.stderr[-2000:])                 # below 0: the process was killed
    found = ast.literal_eval(out.stdout.strip().splitlines()[-1])
    print(found)
    assert found['odd'] == [] and sum(found['tally'].values()) == 1000
    assert found['tally']['bytesExportError'] > 400 and found['tally']['valuesExportError'] > 100 and found['tally']['valuesPredictor'] > 20
