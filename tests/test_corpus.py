"""The same documents from every format, place and cut; what cannot be read is named."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
from common_data import ROOT, as_lines, some_texts, write_formats
from servers import serve_folder, serve_hub

from config import ConfigError
from corpus import documents as module
from corpus import files as corpus_files
from corpus.documents import cut_into_parts, documents
from corpus.files import File, RemoteError, find_files, split_inputs
from corpus.records import Bad, Document
from corpus.text_files import BOM

pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')
zstandard = pytest.importorskip('zstandard')
fsspec = pytest.importorskip('fsspec')


def read(patterns: str | list[str], part_bytes: int = 1 << 30, field: str = 'text') -> list:
    files = find_files([patterns] if isinstance(patterns, str) else patterns)
    parts = cut_into_parts(files, part_bytes, field)
    return [item for part in parts for piece in part for item in documents(piece, field)]


def test_every_format_gives_the_same_documents(tmp_path):
    texts = some_texts()
    write_formats(tmp_path, texts)
    for name, prefix in {
        'a.jsonl': 'a.jsonl',
        'b.jsonl.gz': 'b.jsonl',
        'c.jsonl.zst': 'c.jsonl',
        'd.parquet': 'd.parquet',
        'e.parquet': 'e.parquet',
        'f.parquet': 'f.parquet',
    }.items():
        assert read(f'{tmp_path}/{name}') == [
            Document(f'{prefix}:{i}', text, len(text.encode())) for i, text in enumerate(texts, 1)
        ]
    (tmp_path / 'g.txt').write_bytes(texts[5].encode())
    assert read(f'{tmp_path}/g.txt') == [Document('g.txt', texts[5], len(texts[5].encode()))]


@pytest.mark.parametrize('part_bytes', [1, 7, 40, 333, 4096, 10**6])
def test_byte_ranges_give_every_line_once(tmp_path, part_bytes, monkeypatch):
    monkeypatch.setattr(module, 'READ_BYTES', 64)
    texts = some_texts(4 if part_bytes == 1 else 20)
    lines = as_lines(texts).replace(b'}\n', b'}\r\n\n \n', 3)
    for i, content in enumerate([lines, lines.rstrip(b'\n'), b'\n\n' + lines, lines + b'\n\n']):
        path = tmp_path / f'{i}.jsonl'
        path.write_bytes(content)
        found = read(str(path), part_bytes)
        numbers = [n for n, line in enumerate(content.split(b'\n'), 1) if line.strip()]
        assert [d.id for d in found] == [f'{i}.jsonl:{n}' for n in numbers]
        assert [d.text for d in found] == texts
    parts = cut_into_parts(find_files([str(path)]), part_bytes)
    assert len(parts) == -(-len(content) // part_bytes)


def test_row_groups_are_parts_of_their_own(tmp_path):
    texts = some_texts()
    write_formats(tmp_path, texts)
    for part_bytes in (1, 5000, 20_000):
        for name, groups in (('d', 7), ('e', 1), ('f', 29)):
            files = find_files([f'{tmp_path}/{name}.parquet'])
            parts = cut_into_parts(files, part_bytes)
            assert len(parts) <= groups
            assert len(parts) == groups or part_bytes > 1
            assert all(len(part) == 1 for part in parts)
            assert [d.text for d in read(str(files[0].path), part_bytes)] == texts


def test_parts_are_of_about_the_same_size(tmp_path):
    for i in range(30):
        (tmp_path / f'{i:02}.txt').write_bytes(b'x' * 100)
    (tmp_path / 'a.jsonl').write_bytes(b'{"text": "x"}\n' * 200)
    parts = cut_into_parts(find_files([f'{tmp_path}/*']), 1000)
    assert [sum(piece.size for piece in part) for part in parts] == [1000] * 5 + [800]


def broken(tmp_path, name: str, content: bytes) -> list:
    (tmp_path / name).write_bytes(content)
    return read(f'{tmp_path}/{name}')


@pytest.mark.parametrize('pack', ['gz', 'zst'])
def test_compressed_file_cut_short(tmp_path, pack):
    texts = some_texts(1000)
    whole = {'gz': gzip.compress, 'zst': zstandard.ZstdCompressor().compress}[pack](as_lines(texts))
    name = f'a.jsonl.{pack}'
    for kept in (len(whole) - 1, len(whole) // 2, 0):
        *good, last = broken(tmp_path, name, whole[:kept])
        assert [d.text for d in good] == texts[: len(good)]
        assert isinstance(last, Bad)
        assert last.broken
        assert (
            last.message('P')
            == f'P is broken after line {len(good)} ({last.error}): fetch it again'
        )


@pytest.mark.parametrize('pack', ['gz', 'zst'])
def test_nothing_of_a_corrupt_compressed_file_is_used(tmp_path, pack):
    lines = as_lines(['the text of a line', *some_texts(300)])
    if pack == 'gz':
        whole = gzip.compress(lines, 0)
        altered = whole.replace(b'text of a', b'test of a')  # which only the checksum shows
    else:
        whole = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
        altered = whole[:-1] + bytes([whole[-1] ^ 1])
    assert altered != whole
    for content in (altered, whole + b'garbage', b'garbage'):
        (found,) = broken(tmp_path, f'a.jsonl.{pack}', content)
        assert (found.place, found.broken, found.lost_bytes) == ('', True, len(content))
    assert len(broken(tmp_path, f'a.jsonl.{pack}', whole)) == len(lines.splitlines())


def test_broken_parquet(tmp_path):
    texts = some_texts()
    write_formats(tmp_path, texts)
    whole = (tmp_path / 'd.parquet').read_bytes()
    (bad,) = broken(tmp_path, 'x.parquet', whole[:-9])
    assert bad.broken
    assert bad.lost_bytes == len(whole) - 9
    assert 'x.parquet is broken (Parquet magic bytes not found' in bad.message('x.parquet')
    column = pq.ParquetFile(tmp_path / 'd.parquet').metadata.row_group(2).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    found = broken(tmp_path, 'y.parquet', whole[:start] + b'\xff' * 60 + whole[start + 60 :])
    (bad,) = [item for item in found if isinstance(item, Bad)]
    assert (bad.file, bad.place, bad.count, bad.broken) == ('y.parquet', 'row 60', 30, True)
    assert [d.text for d in found if d is not bad] == texts[:60] + texts[90:]


def test_bad_rows(tmp_path):
    raw = pa.array([b'fine', b'\xff', None, b''], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({'text': column, 'n': [1, 2, 3, 4]}), tmp_path / 'a.parquet')
    fine, invalid, missing, empty = read(f'{tmp_path}/a.parquet')
    assert fine == Document('a.parquet:1', 'fine', 4)
    assert empty == Document('a.parquet:4', '', 0)
    assert invalid.place == 'row 2'
    assert 'utf-8' in invalid.error
    assert missing == Document('a.parquet:3', '', 0)  # as if it were empty
    (bad,) = read(f'{tmp_path}/a.parquet', field='body')
    assert bad.count == 4
    assert "no column 'body' (--text_field) in text, n" in bad.error
    (bad,) = read(f'{tmp_path}/a.parquet', field='n')
    assert bad.count == 4
    assert 'but int64' in bad.error


def test_nesting_that_json_cannot_follow_is_a_bad_record(tmp_path):
    bad, good = broken(tmp_path, 'a.jsonl', b'[' * 100_000 + b'\n{"text": "x"}\n')
    assert bad.place == 'line 1'
    assert good.text == 'x'


def texts(found: list) -> list[str]:
    assert not [item for item in found if isinstance(item, Bad)]
    return [item.text for item in found]


def write_column(path, column: 'pa.Array', name: str = 'text') -> str:
    pq.write_table(pa.Table.from_arrays([column], names=[name]), path)
    return str(path)


@pytest.mark.parametrize('window_log', [27, 28, 31])
def test_zstd_with_a_long_window(tmp_path, window_log):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = packer.compress(as_lines(['one', 'two'])) + packer.flush()
    (tmp_path / 'a.jsonl.zst').write_bytes(content)
    assert texts(read(f'{tmp_path}/a.jsonl.zst')) == ['one', 'two']


def test_byte_order_marks_are_no_text(tmp_path):
    (tmp_path / 'a.txt').write_bytes(BOM + 'é'.encode())
    assert read(f'{tmp_path}/a.txt') == [Document('a.txt', 'é', 2)]
    (tmp_path / 'b.jsonl').write_bytes(BOM + as_lines(['x', '\ufeffy', 'z']))
    for part_bytes in (1 << 20, 20):
        assert texts(read(f'{tmp_path}/b.jsonl', part_bytes)) == ['x', '\ufeffy', 'z']
    (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress(BOM + as_lines(['x'])))
    assert texts(read(f'{tmp_path}/c.jsonl.gz')) == ['x']
    (tmp_path / 'd.txt').write_bytes('text'.encode('utf-16'))
    (bad,) = read(f'{tmp_path}/d.txt')
    assert 'it starts as UTF-16 does' in bad.error


@pytest.mark.parametrize(
    'kind',
    ['string', 'large_string', 'string_view', 'binary', 'large_binary', 'binary_view', 'coded'],
)
def test_types_of_text_columns(tmp_path, kind):
    rows = ['one', None, '', 'é']
    column = pa.array(rows)
    if 'binary' in kind:
        column = pa.array([row and row.encode() for row in rows], getattr(pa, kind)())
    elif kind == 'coded':
        column = column.dictionary_encode()
    else:
        column = pa.array(rows, getattr(pa, kind)())
    assert texts(read(write_column(tmp_path / 'a.parquet', column))) == ['one', '', '', 'é']


def test_json_columns_and_columns_of_nulls(tmp_path):
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None]))
    assert texts(read(write_column(tmp_path / 'a.parquet', column))) == ['{"a": 1}', '']
    assert texts(read(write_column(tmp_path / 'b.parquet', pa.nulls(2)))) == ['', '']


def test_text_inside_a_record(tmp_path):
    rows = [{'text': 'x', 'n': {'u': 'deep'}}, None, {'text': None, 'n': None}]
    path = write_column(tmp_path / 'a.parquet', pa.array(rows), 'doc')
    assert texts(read(path, field='doc.text')) == ['x', '', '']
    assert texts(read(path, field='doc.n.u')) == ['deep', '', '']
    (bad,) = read(path, field='doc')
    assert 'a field of it is named as doc.NAME' in bad.error
    (bad,) = read(path, field='doc.z')
    assert "no column 'doc.z'" in bad.error
    path = write_column(tmp_path / 'b.parquet', pa.array(['whole name']), 'doc.text')
    assert texts(read(path, field='doc.text')) == ['whole name']
    lines = [*({'doc': row} for row in rows), {'doc.text': 'whole name'}, {'text': None}]
    (tmp_path / 'c.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    *found, bad = read(f'{tmp_path}/c.jsonl', field='doc.text')
    assert texts(found) == ['x', '', '', 'whole name']
    assert bad.place == 'line 5'
    *_, found = read(f'{tmp_path}/c.jsonl')
    assert found == Document('c.jsonl:5', '', 0)


def test_column_that_occurs_twice_is_named(tmp_path):
    twice = pa.Table.from_arrays([pa.array(['x']), pa.array(['y'])], names=['text', 'text'])
    pq.write_table(twice, tmp_path / 'a.parquet')
    (bad,) = read(f'{tmp_path}/a.parquet')
    assert "the column 'text' (--text_field) occurs 2 times" in bad.error


# Paths


def make_files(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names_of(*patterns: str, extensions: tuple[str, ...] = ()) -> list[str]:
    return [file.name for file in find_files(patterns, extensions)]


def test_brackets_and_commas_in_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, '[v2] set/a.txt', '[v2] set/b?.txt', 'x,y/a.txt', 'p,q.txt', 'c.txt')
    assert names_of('[v2] set/a.txt') == ['a.txt']
    assert names_of('[v2] set/*.txt') == names_of(f'{tmp_path}/[v2] set') == ['a.txt', 'b?.txt']
    assert names_of('[v2] set/b?.txt') == ['b?.txt']
    assert split_inputs(['x,y,c.txt', 'x,y/*.txt,p,q.txt', 'a,b', 's3://a/x,c.txt,']) == [
        'x,y', 'c.txt', 'x,y/*.txt', 'p,q.txt', 'a', 'b', 's3://a/x', 'c.txt',
    ]  # fmt: skip


def test_folders_are_walked(tmp_path, capsys):
    known = ['a/b.txt', 'a/c/D.TXT', 'e.jsonl']
    make_files(tmp_path, *known, 'f.rst', 'g.C', 'h', 'a/i.png', '.git/j.txt', '.k.txt')
    (tmp_path / 'a/latest').symlink_to('c')
    (tmp_path / 'a/c/up').symlink_to('..')
    for folder in (tmp_path, f'{tmp_path}/'):
        # A folder that is met twice counts once.
        assert names_of(str(folder)) == ['a/b.txt', 'a/c/D.TXT', 'e.jsonl']
        assert '1 .rst' in (said := capsys.readouterr().err)
        assert all(ending in said for ending in ('1 .c', '1 without an ending', '1 .png'))
    assert names_of(str(tmp_path), extensions=('rst', '.c')) == [
        'a/b.txt', 'a/c/D.TXT', 'e.jsonl', 'f.rst', 'g.C',
    ]  # fmt: skip
    (found,) = read([f'{tmp_path}/a/c/D.TXT'])
    assert found == Document('D.TXT', 'a/c/D.TXT', 9)
    with pytest.raises(ConfigError, match=r'no file that can be read: there are 1 \.png, .*--ext'):
        find_files([f'{tmp_path}/a/*.png'])


def test_folders_named_as_files(tmp_path):
    (tmp_path / 'x.parquet').mkdir()
    write_column(tmp_path / 'x.parquet/part-0.parquet', pa.array(['a']))
    (tmp_path / 'x.parquet/_SUCCESS').write_text('')
    write_column(tmp_path / 'y.parquet', pa.array(['b']))
    assert texts(read(f'{tmp_path}/x.parquet')) == ['a']
    assert names_of(f'{tmp_path}/*.parquet') == ['x.parquet/part-0.parquet', 'y.parquet']
    system = fsspec.filesystem('memory')
    for path in tmp_path.rglob('*.parquet'):
        if path.is_file():
            system.pipe(f'/lake/{path.relative_to(tmp_path)}', path.read_bytes())
    system.pipe('/lake/.hidden/z.parquet', b'')
    assert names_of('memory://lake') == ['x.parquet/part-0.parquet', 'y.parquet']
    assert names_of('memory://lake/x.parquet/') == ['part-0.parquet']


def test_all_folders_of_a_glob_that_matches_no_file(tmp_path, capsys):
    names = ['s/a/x.txt', 's/b/x.txt', 's/c/x.txt']
    make_files(tmp_path, *names)
    assert (
        names_of(f'{tmp_path}/s/*')
        == names_of(f'{tmp_path}/s')
        == ['a/x.txt', 'b/x.txt', 'c/x.txt']
    )
    assert 'left out' not in capsys.readouterr().err
    make_files(tmp_path, 's/y.txt')
    assert names_of(f'{tmp_path}/s/*') == ['y.txt']
    assert '/s/*: folders (3, the' in capsys.readouterr().err
    assert len(names_of(f'{tmp_path}/s/**/*')) == 4
    assert 'left out' not in capsys.readouterr().err


def test_files_of_one_name_get_names_of_their_own(tmp_path, monkeypatch):
    make_files(tmp_path, 's/a/r.md', 's/b/r.md', 's/b/c.md', 't/b/r.md', 't/c.md')
    monkeypatch.chdir(tmp_path / 's/a')
    assert names_of('r.md', '../b/r.md', '../b/c.md') == ['a/r.md', 'b/r.md', 'c.md']
    assert names_of('r.md', '../a/r.md') == ['r.md']
    # A name that is taken is not given again.
    names = names_of('r.md', '../b/r.md', f'{tmp_path}/t')
    assert names == [f'{tmp_path}/s/a/r.md', f'{tmp_path}/s/b/r.md', 'b/r.md', 'c.md']
    system = fsspec.filesystem('memory')
    system.pipe('/one/r.md', b'x')
    assert names_of('memory://one/r.md', 'r.md') == ['memory:///one/r.md', 'r.md']


# File systems


def memory_copy(folder) -> str:
    system = fsspec.filesystem('memory')
    for path in folder.iterdir():
        system.pipe(f'/{folder.name}/{path.name}', path.read_bytes())
    return f'memory://{folder.name}'


def test_urls_give_what_local_files_give(tmp_path):
    write_formats(tmp_path, some_texts())
    (tmp_path / 'broken.parquet').write_bytes(b'PAR1')
    (tmp_path / 'broken.jsonl.gz').write_bytes(gzip.compress(b'{"text": "x"}')[:-5])
    expected = read(f'{tmp_path}/*', 5000)
    assert read(f'file://{tmp_path}/*', 5000) == expected
    assert read(f'{memory_copy(tmp_path)}/*', 5000) == expected
    names = [file.name for file in find_files([f'{tmp_path}/*'])]
    urls = [f'{memory_copy(tmp_path)}/{name}' for name in names]
    assert [file.name for file in find_files(urls)] == names
    pytest.importorskip('aiohttp')
    with serve_folder() as store:
        store.objects = {f'x/{path.name}': path.read_bytes() for path in tmp_path.iterdir()}
        web = f'http://127.0.0.1:{store.port}/x/'
        assert read([web + name for name in names], 5000) == expected
        assert [file.name for file in find_files([web + '*'])] == names
        assert read(web + '*', 5000) == expected


READ_HUB = """
import json, sys
sys.path.insert(0, sys.argv[1])
from corpus.documents import cut_into_parts, documents
from corpus.files import find_files
files = find_files(['hf://datasets/org/name/sample/*.parquet'])
parts = cut_into_parts(files, 5000)
print(json.dumps([d for part in parts for piece in part for d in documents(piece)]))
"""


def test_datasets_of_a_hub(tmp_path):
    pytest.importorskip('huggingface_hub')
    write_formats(tmp_path, some_texts())
    with serve_hub() as store:
        for path in tmp_path.glob('*.parquet'):
            store.objects[f'sample/{path.name}'] = path.read_bytes()
        done = subprocess.run(
            [sys.executable, '-c', READ_HUB, ROOT],
            env={**os.environ, 'HF_ENDPOINT': f'http://127.0.0.1:{store.port}'},
            check=True,
            capture_output=True,
            text=True,
        )
    found = [Document(*item) for item in json.loads(done.stdout)]
    assert found == read(f'{tmp_path}/*.parquet', 5000)


def test_only_the_needed_column_and_row_group_are_read(tmp_path):
    pytest.importorskip('aiohttp')
    noise = random.Random(0).randbytes(4_000_000)
    table = pa.table({'noise': [noise[i::100] for i in range(100)], 'text': ['word'] * 100})
    pq.write_table(table, tmp_path / 'a.parquet', row_group_size=10, compression='none')
    with serve_folder() as store:
        store.objects = {'a.parquet': (tmp_path / 'a.parquet').read_bytes()}
        url = f'http://127.0.0.1:{store.port}/a.parquet'
        parts = cut_into_parts(find_files([url]), 1)
        assert len(parts) == 10
        store.reads.clear()
        assert len(list(documents(parts[4][0]))) == 10
        assert sum(n for _, n in store.reads) < 0.1 * len(noise)


def test_failing_server_is_asked_again_and_then_named(monkeypatch, capsys):
    pytest.importorskip('aiohttp')
    monkeypatch.setattr(corpus_files, 'PAUSE', 0.0)
    with serve_folder() as store:
        store.objects = {'a.jsonl': as_lines(['x', 'y'])}
        files = find_files([f'http://127.0.0.1:{store.port}/a.jsonl'])
        (piece,) = cut_into_parts(files, 1000)[0]
        store.failures = 1
        with pytest.raises(RemoteError, match=r'a\.jsonl: .*503'):
            list(documents(piece))
        store.failures = 2
        assert len(corpus_files.retry(lambda: list(documents(piece)))) == 2
        assert 'trying again' in capsys.readouterr().err
        store.failures = 100
        with pytest.raises(RemoteError, match='503'):
            corpus_files.retry(lambda: list(documents(piece)))
        assert store.failures == 96


def test_failing_connection_is_no_broken_parquet(tmp_path, monkeypatch):
    write_formats(tmp_path, some_texts())
    files = find_files([f'{memory_copy(tmp_path)}/d.parquet'])
    (piece,) = cut_into_parts(files, 1 << 30)[0]

    def fail(self, *args):
        raise ConnectionResetError('gone')

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, 'read', fail)
    with pytest.raises(RemoteError, match=r'd\.parquet: ConnectionResetError: gone'):
        list(documents(piece))


def test_lost_local_file_is_no_bad_record(tmp_path):
    with pytest.raises(ConfigError, match=r'a\.parquet cannot be read \(No such file'):
        cut_into_parts([File('a.parquet', str(tmp_path / 'a.parquet'))], 1)


@pytest.mark.parametrize(
    ('package', 'name'),
    [('pyarrow', 'd.parquet'), ('zstandard', 'c.jsonl.zst'), ('fsspec', 'a.jsonl')],
)
def test_missing_package_names_the_remedy(tmp_path, monkeypatch, package, name):
    write_formats(tmp_path, ['x'] * 200)
    monkeypatch.setitem(sys.modules, package, None)
    url = f'file://{tmp_path}/{name}' if package == 'fsspec' else f'{tmp_path}/{name}'
    with pytest.raises(ConfigError, match=r'pip install -r requirements/data\.txt'):
        read(url)


def test_unknown_urls():
    with pytest.raises(ConfigError, match='no file matches --input=memory://nothing'):
        find_files(['memory://nothing/*.txt'])
    with pytest.raises(ConfigError, match='use a URL that fsspec knows'):
        find_files(['nosuch://bucket/*.txt'])
