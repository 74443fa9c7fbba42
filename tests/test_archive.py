"""Archives: names like paths, bytes in threads and processes, and every kind of damage."""
import gzip, inspect, io, multiprocessing, os, pickle, struct, subprocess, sys, tarfile, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastcore.foundation import L

import blocks.data.archive as archive
from blocks.core import DataError, ItemError, MissingExtraError
from blocks.data.archive import Member, RemoteFile, get_archive_files, get_archive_images, get_remote_images
from blocks.data.source import FileSplitter, GrandparentSplitter, RegexLabeller, parent_label

RNG = np.random.default_rng(0)
FILES = {f'{part}/{kind}/{i}.png': RNG.integers(0, 4, 3000+i, dtype=np.uint8).tobytes() for part in ('train', 'valid') for kind in ('cat', 'dog') for i in range(10)}

def make_zip(path, files=FILES, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', method) as z:
        for n, b in files.items(): z.writestr(n, b)
    return path
def add(t, name, data=b'', **kw):
    info = tarfile.TarInfo(name); info.size = len(data)
    for k, v in kw.items(): setattr(info, k, v)
    t.addfile(info, io.BytesIO(data))
def make_tar(path, files=FILES, mode='w', format=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=format) as t:
        for n, b in files.items(): add(t, n, b)
    return path

@pytest.fixture(params=['stored', 'deflated', 'ustar', 'gnu', 'pax'])
def packed(request, tmp_path):
    if request.param in ('stored', 'deflated'): return make_zip(tmp_path/'a.zip', method=dict(stored=0, deflated=8)[request.param])
    return make_tar(tmp_path/'a.tar', format=dict(ustar=tarfile.USTAR_FORMAT, gnu=tarfile.GNU_FORMAT, pax=tarfile.PAX_FORMAT)[request.param])

def test_importing_loads_nothing_heavy():
    code = "import sys, blocks.data.archive; print([m for m in ('torch', 'torchvision', 'pandas', 'sklearn', 'matplotlib', 'fsspec') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    assert set(archive.__all__) == {'Member', 'RemoteFile', 'get_archive_files', 'get_archive_images', 'get_remote_images'} and all(inspect.getdoc(getattr(archive, n)) for n in archive.__all__)

# ---- names ----------------------------------------------------------------------------------------------------
def test_a_member_looks_like_its_path(packed):
    items = get_archive_images(packed); o = items[0]; path = Path(os.fspath(o))
    assert isinstance(items, L) and len(items) == 40 and str(path) == str(o) == f'{packed}/train/cat/0.png' and Path(o) == path
    for attr in ('name', 'stem', 'suffix', 'parts'): assert getattr(o, attr) == getattr(path, attr)
    assert parent_label(o) == 'cat' and RegexLabeller(r'/(\w+)/\d+\.png$')(o) == 'cat' and repr(o) == f"Member('{o}')"
    assert [list(p) for p in GrandparentSplitter()(items)] == [list(range(20)), list(range(20, 40))]
    (packed.parent/'v.txt').write_text('cat/0.png'); assert list(FileSplitter(packed.parent/'v.txt')(items)[1]) == [0, 20]

def test_parents_and_siblings_are_members(packed):
    o = get_archive_images(packed)[0]
    assert o.parent == Member(str(packed), 'train/cat') and o.parent.name == 'cat' and o.parent.parent.parent.name == packed.name and o.parent.parent.parent.parent == packed.parent
    other = o.parent.parent.parent/'valid'/'dog'/'3.png'
    assert other.read_bytes() == FILES['valid/dog/3.png'] and other.exists() and not (o.parent/'nothing.png').exists()
    assert o.with_name('7.png').read_bytes() == FILES['train/cat/7.png'] and o.with_name('0.txt').with_suffix('.png') == o

def test_equality_hash_order_and_pickling(packed):
    items = get_archive_images(packed); back = pickle.loads(pickle.dumps(list(items)))
    assert back == list(items) and len({*items, *back}) == 40 and sorted(items[::-1]) == list(items) and items[0] != Member('other.zip', items[0].inner)
    with pytest.raises(AttributeError): items[0].inner = 'x'
    assert len(pickle.dumps(list(items)))/40 < 200

def test_order_hidden_files_and_suffixes(tmp_path):
    names = ['a/z.PNG', 'a.b/y.png', 'a-b/x.jpg', '10.png', '9.png', 'a/b/c.png', 'a/t.txt', '.h.png', '.d/1.png', 'a/.d/2.png', '__MACOSX/a/._z.png', 'a/__MACOSX/1.png', '../up.png', '/abs.png', 'dir.png/', 'ä/ö.png']
    z = make_zip(tmp_path/'a.zip', dict.fromkeys(names, b'1'))
    want = sorted((n for n in names if not any(h in n for h in ('.h.', '.d/', 'MAC', 'dir.png'))), key=lambda n: n.split('/'))
    assert [o.inner for o in get_archive_files(z)] == want and [o.inner for o in get_archive_images(z)] == [n for n in want if not n.endswith('.txt')]
    assert [o.inner for o in get_archive_files(z, ['JPG', '.txt'])] == ['a/t.txt', 'a-b/x.jpg'] and get_archive_files(z, 'gif') == []
    for o in get_archive_images(z): assert o.read_bytes() == b'1' and str(o).startswith(f'{z}/')
    assert os.listdir(tmp_path) == ['a.zip']                                # nothing was unpacked

# ---- bytes ----------------------------------------------------------------------------------------------------
def check(packed): return all(o.read_bytes() == FILES[o.inner] for o in get_archive_files(packed))
def test_bytes(packed): assert check(packed) and check(str(packed))

def test_threads(packed):
    items = get_archive_images(packed)*25; archive._index.cache_clear()
    with ThreadPoolExecutor(16) as pool: assert all(b == FILES[o.inner] for o, b in zip(items, pool.map(Member.read_bytes, items)))

@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
@pytest.mark.parametrize('start', [m for m in ('fork', 'spawn') if m in multiprocessing.get_all_start_methods()])
@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_processes_and_the_parent_at_once(tmp_path, start, kind):
    items = get_archive_images(dict(zip=make_zip, tar=make_tar)[kind](tmp_path/f'a.{kind}'))*10; items[0].read_bytes()
    with multiprocessing.get_context(start).Pool(2) as pool:
        got = pool.map_async(Member.read_bytes, list(items), chunksize=7)
        while not got.ready(): assert items[5].read_bytes() == FILES[items[5].inner]
        assert got.get() == [FILES[o.inner] for o in items]

def test_no_file_stays_open(packed):
    if not Path('/proc/self/fd').exists(): pytest.skip('no list of open files here')
    [o.read_bytes() for o in get_archive_images(packed)]
    assert str(packed) not in [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}')]

def test_the_table_is_read_once(packed, monkeypatch):
    o = get_archive_images(packed)[0]; misses = archive._index.cache_info().misses
    for _ in range(5): o.read_bytes()
    assert archive._index.cache_info().misses == misses

def test_an_archive_that_changes(tmp_path):
    z = make_zip(tmp_path/'a.zip', {'1.png': b'old', '2.png': b'gone'}); one, two = get_archive_images(z)
    make_zip(z, {'0.png': b'first', '1.png': b'newer'}); assert one.read_bytes() == b'newer'
    with pytest.raises(ItemError, match='no file of this name') as e: two.read_bytes()
    assert e.value.item == two
    z.unlink()
    with pytest.raises(FileNotFoundError, match=r'a\.zip'): one.read_bytes()

def test_kinds_of_archives(tmp_path):
    z = make_zip(tmp_path/'a.zip'); (tmp_path/'self.exe').write_bytes(b'#!/bin/sh\n'*50 + z.read_bytes()); assert check(tmp_path/'self.exe')
    make_tar(tmp_path/'no_suffix'); assert check(tmp_path/'no_suffix')
    holds = make_tar(tmp_path/'holds.tar', {'1.png': b'1', 'z.zip': z.read_bytes()}); assert [o.inner for o in get_archive_files(holds)] == ['1.png', 'z.zip']
    assert get_archive_files(make_zip(tmp_path/'empty.zip', {})) == [] == get_archive_files(make_tar(tmp_path/'empty.tar', {}))
    with zipfile.ZipFile(tmp_path/'stream.zip', 'w') as f:                  # sizes after the bytes, and extra fields
        with f.open('1.png', 'w', force_zip64=True) as m: m.write(b'abc')
    assert get_archive_files(tmp_path/'stream.zip')[0].read_bytes() == b'abc'

def test_tar_names_and_links(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        add(t, './a', type=tarfile.DIRTYPE); add(t, './s/early.png', type=tarfile.SYMTYPE, linkname='../a/1.png'); add(t, './a/1.png', b'one'); add(t, './a/hard.png', type=tarfile.LNKTYPE, linkname='./a/1.png')
        add(t, './a/out.png', type=tarfile.SYMTYPE, linkname='/etc/passwd'); add(t, './a/fifo.png', type=tarfile.FIFOTYPE); add(t, 'x'*150 + '/long.png', b'long'); add(t, 'twice.png', b'1'); add(t, 'twice.png', b'2')
    assert {o.inner[-11:]: o.read_bytes() for o in get_archive_images(tmp_path/'a.tar')} == {'a/1.png': b'one', 'a/hard.png': b'one', 's/early.png': b'one', 'xx/long.png': b'long', 'twice.png': b'2'}

# ---- faults ---------------------------------------------------------------------------------------------------
def patched(path, at, new): b = bytearray(path.read_bytes()); b[at:at+len(new)] = new; path.write_bytes(b)

@pytest.mark.parametrize('method', [0, 8])
def test_damaged_members_are_named(tmp_path, method):
    z = make_zip(tmp_path/'a.zip', {'1.png': b'ab'*500, '2.png': bytes(RNG.integers(0, 9, 900, dtype=np.uint8)), '3.png': b'fine'}, method)
    with zipfile.ZipFile(z) as f: start = f.getinfo('2.png').header_offset
    for k in (30 + 5 + 40, 30 + 5 + 200): patched(z, start + k, bytes([z.read_bytes()[start + k] ^ 255]))
    one, two, three = get_archive_images(z); assert one.read_bytes() == b'ab'*500 and three.read_bytes() == b'fine'
    with pytest.raises(ItemError, match=r'a\.zip/2\.png.*(checksum|damaged|bytes)') as e: two.read_bytes()
    assert e.value.item == two and pickle.loads(pickle.dumps(e.value)).item == two
    patched(z, start, b'??')
    with pytest.raises(ItemError, match='header in the archive is damaged'): two.read_bytes()

def test_a_member_is_never_unpacked_beyond_its_size(tmp_path):
    z = make_zip(tmp_path/'a.zip', {'1.png': bytes(10**7)}); end = z.read_bytes().index(b'PK\1\2')
    patched(z, end + 24, struct.pack('<I', 100))
    with pytest.raises(ItemError, match='101 bytes or more, and should have 100'): get_archive_images(z)[0].read_bytes()

def test_what_cannot_be_read_says_how_to_pack_it(tmp_path):
    z = make_zip(tmp_path/'a.zip', {'1.png': b'secret', '2.png': b'b'}); at = z.read_bytes().index(b'PK\1\2'); patched(z, at + 8, b'\1')
    with pytest.raises(ItemError, match=r'(?s)1\.png.*encrypted.*password'): get_archive_images(z)[0].read_bytes()
    assert get_archive_images(z)[1].read_bytes() == b'b'
    z = make_zip(tmp_path/'b.zip', {'1.png': b'1'*99}, zipfile.ZIP_BZIP2)
    with pytest.raises(ItemError, match='(?s)"store" and "deflate".*zip -0'): get_archive_images(z)[0].read_bytes()
    with zipfile.ZipFile(tmp_path/'c.zip', 'w') as f: i = zipfile.ZipInfo('1.png'); i.create_system = 3; i.external_attr = 0o120777 << 16; f.writestr(i, 'other.png')
    with pytest.raises(ItemError, match='it is a link'): get_archive_images(tmp_path/'c.zip')[0].read_bytes()

@pytest.mark.parametrize('mode,tool', [('w:gz', 'gunzip'), ('w:bz2', 'bunzip2'), ('w:xz', 'unxz')])
def test_compressed_tars_are_refused(tmp_path, mode, tool):
    make_tar(tmp_path/'a.tar.x', mode=mode)
    with pytest.raises(DataError, match=rf"compressed as a whole.*{tool} 'a\.tar\.x'"): get_archive_images(tmp_path/'a.tar.x')

def test_damaged_archives(tmp_path):
    z, t = make_zip(tmp_path/'a.zip'), make_tar(tmp_path/'a.tar'); whole = t.read_bytes()
    (tmp_path/'b.zip').write_bytes(z.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"b\.zip' is a damaged zip file.*not a zip file"): get_archive_images(tmp_path/'b.zip')
    for name, data in dict(cut=whole[:5000], header=whole[:20*512] + b'?'*512 + whole[21*512:], text=b'hello'*200, empty=b'', gif=b'GIF89a' + bytes(2000)).items():
        (tmp_path/name).write_bytes(data)
        if name == 'header': (tmp_path/name).write_bytes(whole[:(at := whole.index(b'train/cat/5.png'))] + b'?'*512 + whole[at+512:])
        with pytest.raises(DataError, match=f"{name}' is no zip or tar file, or a damaged one"): get_archive_images(tmp_path/name)
    (tmp_path/'x.gz').write_bytes(gzip.compress(b'x')); pytest.raises(DataError, get_archive_files, tmp_path/'x.gz')

def test_paths_that_are_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.zip'): get_archive_images(tmp_path/'nothing.zip')
    with pytest.raises(FileNotFoundError, match='is a folder.*get_image_files'): get_archive_images(tmp_path)

# ---- remote ---------------------------------------------------------------------------------------------------
@pytest.fixture
def memory():
    import fsspec
    fs = fsspec.filesystem('memory')
    for n, b in FILES.items(): fs.pipe(f'/data/set/{n}', b)
    for n in ('.hid/1.png', 'train/.2.png', 'a.txt'): fs.pipe(f'/data/set/{n}', b'?')
    yield fs
    fs.rm('/data', recursive=True)

def test_remote_files(memory, tmp_path):
    items = get_remote_images('memory://data/set'); o = items[0]
    assert [i.inner for i in items] == sorted(FILES) and all(i.read_bytes() == FILES[i.inner] for i in items)
    assert str(o) == os.fspath(o) == 'memory://data/set/train/cat/0.png' and parent_label(o) == 'cat' and (o.name, o.stem, o.suffix) == ('0.png', '0', '.png') and o.parent.parent/'dog'/'1.png' == items[11]
    assert [len(p) for p in GrandparentSplitter()(items)] == [20, 20] and [i.inner for i in get_remote_images('memory://data/set/')] == sorted(FILES)
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(RemoteFile.read_bytes, items*5)) == [FILES[i.inner] for i in items*5]
    memory.rm('/data/set/train/cat/0.png')
    with pytest.raises(ItemError, match=r'train/cat/0\.png.*no such file'): o.read_bytes()

def test_zip_in_a_remote_place(memory, tmp_path):
    memory.pipe('/data/a.zip', make_zip(tmp_path/'a.zip').read_bytes())
    for url, n in (('zip://::memory://data/a.zip', 40), ('zip://train::memory://data/a.zip', 20), (f'zip://::file://{tmp_path}/a.zip', 40)):
        items = get_remote_images(url); assert len(items) == n and items[0].read_bytes() == FILES['train/cat/0.png'] and parent_label(items[0]) == 'cat'
    with pytest.raises(DataError, match="is a file.*'zip://::memory://data/a.zip'"): get_remote_images('memory://data/a.zip')

def test_local_files_through_fsspec_in_a_new_process(tmp_path):
    for n, b in FILES.items(): (tmp_path/n).parent.mkdir(parents=True, exist_ok=True); (tmp_path/n).write_bytes(b)
    items = get_remote_images(f'file://{tmp_path}', auto_mkdir=False)
    with multiprocessing.get_context('spawn').Pool(1) as pool: assert pool.map(RemoteFile.read_bytes, list(items)) == [FILES[i.inner] for i in items]

def test_options_are_kept_hidden_and_hashable():
    a, b = (RemoteFile('s3://b/d', '1.png', dict(key='hush', client_kwargs={'x': 1})) for _ in range(2))
    assert 'hush' not in f'{a} {a!r}' and a == b and len({a, b}) == 1 and pickle.loads(pickle.dumps(a)).storage_options['key'] == 'hush' == (a.parent/'2.png').storage_options['key']

def test_remote_faults(memory, monkeypatch):
    with pytest.raises(FileNotFoundError, match='memory://data/sat'): get_remote_images('memory://data/sat')
    with pytest.raises(DataError, match='nosuch://x'): get_remote_images('nosuch://x')
    import fsspec
    monkeypatch.setattr(fsspec.core, 'url_to_fs', lambda *a, **k: (_ for _ in ()).throw(ImportError('Install s3fs to access S3')))
    with pytest.raises(MissingExtraError, match='Install s3fs'): get_remote_images('s3://b')
    monkeypatch.setitem(sys.modules, 'fsspec', None)
    with pytest.raises(MissingExtraError, match=r'blocks\[remote\]'): get_remote_images('s3://b')
