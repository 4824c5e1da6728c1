"""Tables, JSON files, tar archives and text of any ending, plain and compressed."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pathlib
import random
import shutil
import subprocess
import sys
import tarfile

import pytest
from common_commands import run_command
from common_data import ROOT, as_lines, contents, some_texts

import data
from config import ConfigError
from corpus import files as corpus_files
from corpus import text_files
from corpus.documents import cut_into_parts, documents
from corpus.files import find_files
from corpus.prepare import Job, prepare
from corpus.records import Bad, Binary, Document
from corpus.shards import Split

GOLDEN = pathlib.Path(ROOT, 'tests/golden/text_files')
TEXTS = json.loads((GOLDEN / 'texts.json').read_text())
TOOLS = {'.gz': 'gzip', '.bz2': 'bzip2', '.xz': 'xz', '.zst': 'zstd'}


def read(*patterns: object, field: str = 'text', as_text: bool = False, **more) -> list:
    files = find_files([str(pattern) for pattern in patterns], as_text=as_text, **more)
    parts = cut_into_parts(files, 1 << 30, field)
    return [item for part in parts for piece in part for item in documents(piece, field)]


def texts(found: list) -> list[str]:
    assert not [item for item in found if isinstance(item, Bad | Binary)]
    assert all(item.n_bytes == len(item.text.encode()) for item in found)
    return [item.text for item in found]


def pack(content: bytes, ending: str) -> bytes:
    """Compresses by the program that people compress with, in two parts, one after the other."""
    if not ending:
        return content
    if not shutil.which(TOOLS[ending]):
        pytest.skip(f'{TOOLS[ending]} is not installed')
    if ending == '.zst':
        pytest.importorskip('zstandard')
    half = len(content) // 2
    call = [TOOLS[ending], '-c']
    return b''.join(
        subprocess.run(call, input=part, check=True, capture_output=True).stdout
        for part in (content[:half], content[half:])
    )


# ---------------------------------------------------------------------------------------------
# Files that other programs wrote
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', [p for p in sorted(GOLDEN.iterdir()) if 'versions' not in p.name])
def test_files_of_other_programs(path):
    if path.suffix == '.zst':
        pytest.importorskip('zstandard')
    found = read(path)
    if '.txt' in path.name:
        assert texts(found) == ['\n'.join(TEXTS)]
        assert found[0].id == path.stem
        return
    assert texts(found) == TEXTS
    numbers = [f'{i + 1}' for i in range(len(TEXTS))]
    if '.tar' in path.name:
        form = 'a/{:03}.txt' if 'texts' in path.name else '{:03}.json'
        numbers = [form.format(i) for i in range(len(TEXTS))]
    name = path.name.removesuffix('.gz').removesuffix('.bz2')
    assert [item.id for item in found] == [f'{name}:{n}' for n in numbers]


# ---------------------------------------------------------------------------------------------
# Every kind, plain and compressed
# ---------------------------------------------------------------------------------------------


def table(found: list[str], delimiter: str = ',') -> bytes:
    out = io.StringIO(newline='')
    csv.writer(out, delimiter=delimiter).writerows([['text', 'n'], *([t, 1] for t in found)])
    return out.getvalue().encode()


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return out.getvalue()


KINDS = {
    'a.txt': lambda found: ''.join(found).encode(),
    'a.c': lambda found: ''.join(found).encode(),
    'a.jsonl': as_lines,
    'a.json': lambda found: json.dumps([{'text': text} for text in found], indent=2).encode(),
    'a.csv': table,
    'a.tsv': lambda found: table(found, '\t'),
    'a.tar': lambda found: tar({f'{i}.txt': text.encode() for i, text in enumerate(found)}),
}


@pytest.mark.parametrize('ending', ['', *TOOLS])
@pytest.mark.parametrize('kind', KINDS)
def test_compression_changes_no_document(tmp_path, kind, ending):
    given = some_texts(60)
    whole = KINDS[kind](given)
    (tmp_path / f'{kind}{ending}').write_bytes(pack(whole, ending))
    found = read(tmp_path / f'{kind}{ending}', extensions=('c',))
    if kind in ('a.txt', 'a.c'):
        assert found == [Document(kind, ''.join(given), len(whole))]
        return
    numbers = [f'{i}.txt' if kind == 'a.tar' else f'{i + 1}' for i in range(60)]
    expected = [(f'{kind}:{n}', text) for n, text in zip(numbers, given, strict=True)]
    assert [(item.id, item.text) for item in found] == expected


@pytest.mark.parametrize('ending', TOOLS)
@pytest.mark.parametrize('kind', KINDS)
def test_damaged_compressed_files(tmp_path, kind, ending):
    given = some_texts(60)
    whole = pack(KINDS[kind](given), ending)
    path = tmp_path / f'{kind}{ending}'
    middle = len(whole) * 3 // 4  # within the second stream
    # A second stream that is damaged where it begins is no end of the file.
    second = len(pack(KINDS[kind](given)[: len(KINDS[kind](given)) // 2], ending))
    damaged = {
        'flipped': whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :],
        'second': whole[: second // 2] + b'rubbish' + whole[second // 2 :],
        'behind': whole + b'rubbish',
        'none': b'rubbish',
    }
    for what, content in damaged.items():
        path.write_bytes(content)
        (bad,) = read(path, extensions=('c',))
        assert (bad.place, bad.broken, bad.lost_bytes) == ('', True, len(content)), what
    for kept in (len(whole) - 1, middle, 0):
        path.write_bytes(whole[:kept])
        *good, bad = read(path, extensions=('c',))
        assert bad.broken
        assert bad.lost_bytes > 0
        assert [item.text for item in good] == given[: len(good)]
        assert not good or kind not in ('a.txt', 'a.c')


def test_xz_with_padding_between_streams(tmp_path):
    content = lzma.compress(b'one, ') + b'\0' * 8 + lzma.compress(b'two') + b'\0' * 4
    (tmp_path / 'a.txt.xz').write_bytes(content)
    assert texts(read(tmp_path / 'a.txt.xz')) == ['one, two']
    (tmp_path / 'a.txt.bz2').write_bytes(bz2.compress(b'one') + b'\0' * 8)
    (bad,) = read(tmp_path / 'a.txt.bz2')
    assert bad.broken


def test_what_expands_much_is_read_by_blocks(tmp_path, monkeypatch):
    """Of a bzip2 or xz file that expands a million times, as much as is asked for is held."""
    from corpus import compression

    monkeypatch.setattr(compression, 'READ_BYTES', 1 << 16)
    for name, packed in {'a.xz': lzma.compress, 'a.bz2': bz2.compress}.items():
        (tmp_path / name).write_bytes(packed(bytes(1 << 24)))
        with open(tmp_path / name, 'rb') as raw:
            content, _ = compression.decompressed(raw, name)
            sizes, total = set(), 0
            while n := content.raw.readinto(bytearray(1 << 20)):
                sizes.add(n)
                total += n
        assert total == 1 << 24
        assert max(sizes) <= 1 << 16


# ---------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------


def json_file(tmp_path, content: str | bytes, **more) -> list:
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / 'a.json').write_bytes(content)
    return read(tmp_path / 'a.json', **more)


@pytest.mark.parametrize('block', [1, 2, 3, 7, 50, 1000])
def test_json_values_are_found_however_they_are_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text_files, 'READ_BYTES', block)
    rng = random.Random(block)
    given = ['', '"]', '[{', '\\', 'é\U0001f642', *rng.sample(some_texts(), 12)]
    for ascii_only in (True, False):
        for indent in (None, 1):
            values = [text if i % 3 else {'text': text, 'n': [1.5e3, -2, None, True]}
                      for i, text in enumerate(given)]  # fmt: skip
            whole = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
            assert texts(json_file(tmp_path, f' \n{whole}\n ')) == given
            objects = [json.dumps({'text': text}, indent=2) for text in given]
            assert texts(json_file(tmp_path, '\n'.join(objects))) == given
            lines = [json.dumps({'text': text}) for text in given]
            assert texts(json_file(tmp_path, '\n'.join(lines))) == given


def test_json_of_few_values(tmp_path):
    assert json_file(tmp_path, '[]') == json_file(tmp_path, '') == json_file(tmp_path, ' \n') == []
    assert texts(json_file(tmp_path, '"one text"')) == ['one text']
    assert texts(json_file(tmp_path, '\ufeff[{"doc": {"body": "x"}}]', field='doc.body')) == ['x']
    assert texts(json_file(tmp_path, '[{"text": null}]')) == ['']


@pytest.mark.parametrize('block', [1, 16, 4 << 20])
@pytest.mark.parametrize(
    ('content', 'good', 'place', 'error'),
    [
        ('["a", 3, "b"]', 2, 'value 2', 'no text in a field'),
        ('["a", {"x": 1}]', 1, 'value 2', 'no text in a field'),
        (b'["a", "\\ud800", "b"]', 2, 'value 2', 'surrogates not allowed'),
        ('["a" "b"]', 1, 'value 1', 'Expecting , or ] after a value of the array at character 5'),
        ('["a", "b"', 2, 'value 2', 'Expecting , or ] after'),
        ('["a", "b', 1, 'value 1', 'Unterminated string starting at at character 6'),
        ('["a",]', 1, 'value 1', 'Expecting value at character 5'),
        ('["a", nul]', 1, 'value 1', 'Expecting value at character 6'),
        ('["a"] ["b"]', 1, 'value 1', 'Extra data after the array at character 6'),
        ('{"text": "a"}, 3', 1, 'value 1', 'Expecting value at character 13'),
        ('{\n"text": "a"}\n{,', 1, 'value 1', 'Expecting property name'),
        (b'["a", "\xff"]', None, None, 'utf-8'),
        ('["a", ' + '[' * 100_000, 1, 'value 1', 'recursion'),
    ],
)
def test_bad_json(tmp_path, monkeypatch, block, content, good, place, error):
    if len(content) > 1000 and block == 1:
        pytest.skip('reads the file once for each bracket')
    monkeypatch.setattr(text_files, 'READ_BYTES', block)
    found = json_file(tmp_path, content)
    (bad,) = [item for item in found if isinstance(item, Bad)]
    assert error in bad.error
    if place is not None:
        assert bad.place == place
        assert len(found) - 1 == good
        assert bad.broken == (found[-1] is bad and 'no text' not in bad.error)


def test_an_error_at_the_start_of_large_json_is_found_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, 'READ_BYTES', 1000)
    (tmp_path / 'a.json').write_text('["a", {"text" 1}' + ', "x"' * 100_000 + ']')
    with open(tmp_path / 'a.json', 'rb') as f:
        stream = text_files.json_stream(f)
        assert next(stream)[0] == 'a'
        with pytest.raises(ValueError, match="Expecting ':' delimiter at character 14"):
            next(stream)
        assert f.tell() < 20_000


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def csv_file(tmp_path, content: bytes, name: str = 'a.csv', **more) -> list:
    (tmp_path / name).write_bytes(content)
    return read(tmp_path / name, **more)


def test_rows_of_tables(tmp_path):
    content = b'\xef\xbb\xbfid,body\r\n1,"a ""b""\r\nc"\r\n\r\n2,\r\n3,d'
    found = csv_file(tmp_path, content, field='body')
    assert [(item.id, item.text) for item in found] == [
        ('a.csv:1', 'a "b"\r\nc'), ('a.csv:2', ''), ('a.csv:3', 'd'),
    ]  # fmt: skip
    long = 'x' * 500_000  # beyond the csv module's own limit
    assert texts(csv_file(tmp_path, f'text\n{long}\n'.encode())) == [long]
    assert texts(csv_file(tmp_path, b'n\ttext\n1\ta, b\n', 'a.tsv')) == ['a, b']
    assert csv_file(tmp_path, b'') == csv_file(tmp_path, b'text\n') == []


@pytest.mark.parametrize(
    ('content', 'places', 'error'),
    [
        (b'id,body\n1,a\n', [''], "no column 'text' (--text_field) in id, body"),
        (b'text,text\na,b\n', [''], "the column 'text' (--text_field) occurs 2 times"),
        (b'text,n\na,1\nb\nc,2\n', ['line 3'], '1 fields in place of 2'),
        (b'text,n\n"a\nb",1\nb,2,3\nc,2\n', ['line 4'], '3 fields in place of 2'),
        (b'text,n\na,1\n"b"x,1\nc,2\n', ['line 3'], "',' expected after '\"'"),
        (b'text,n\na,1\n\xff,1\nc,2\n', ['line 3'], 'not UTF-8'),
        (b'text,n\na,1\nb,1\n"c,2\nd,3\n', ['line 3'], 'a quote that opens in line 4 has no end'),
        (b'"text,n\na,1\n', [''], 'the row of names: unexpected end of data'),
    ],
)
def test_bad_rows_of_tables(tmp_path, content, places, error):
    found = csv_file(tmp_path, content)
    bad = [item for item in found if isinstance(item, Bad)]
    assert [item.place for item in bad] == places
    assert error in bad[0].error
    if places != ['']:
        assert len(found) == 3
        open_quote = 'quote' in error
        assert bad[0].broken == open_quote
        assert bad[0].lost_bytes == (9 if open_quote else 0)
    else:
        assert bad[0].lost_bytes == len(content)


# ---------------------------------------------------------------------------------------------
# Tar archives
# ---------------------------------------------------------------------------------------------


def test_members_of_tar_archives(tmp_path):
    members = {
        './b/1.txt': b'one', 'b/1.json': b'{"caption": 1}', 'b/1.jpg': b'\xff\0', '.x/a.txt': b'',
        'c.py': b'\xef\xbb\xbfx = 1', 'd.json': b'{"text": "two"}', 'e.md': b'\xff',
        'f.json': b'{"text": 3}', 'n' * 200 + '.txt': 'é'.encode(),
    }  # fmt: skip
    (tmp_path / 'a.tgz').write_bytes(gzip.compress(tar(members)))
    found = read(tmp_path / '*.tgz')
    good = [(item.id, item.text) for item in found if isinstance(item, Document)]
    assert good == [
        ('a.tar:b/1.txt', 'one'), ('a.tar:c.py', 'x = 1'), ('a.tar:d.json', 'two'),
        (f'a.tar:{"n" * 200}.txt', 'é'),
    ]  # fmt: skip
    bad = [(item.place, item.broken) for item in found if isinstance(item, Bad)]
    assert bad == [('member e.md', False), ('member f.json', False)]
    found = read(tmp_path / 'a.tgz', as_text=True)
    assert [item.name for item in found if isinstance(item, Binary)] == ['b/1.jpg', 'e.md']
    assert '{"caption": 1}' in [item.text for item in found if isinstance(item, Document)]


def test_damaged_tar_archives(tmp_path):
    """tarfile itself ends at a damaged header, and at a missing end, as if all were well."""
    members = {f'{i}.txt': b'text %d' % i for i in range(4)}
    whole = tar(members)
    path = tmp_path / 'a.tar'
    for at, error in [(2 * 1024 + 3, 'a bad header: bad checksum'), (3, 'a bad header')]:
        path.write_bytes(whole[:at] + b'\xff' + whole[at + 1 :])
        *good, bad = read(path)
        # The sample right before the damage may have had more members.
        assert [item.text for item in good] == ['text 0'][: at // 1024]
        assert error in bad.error
        assert bad.broken
    for kept, n in [(4 * 1024, 4), (3 * 1024, 3), (3 * 1024 + 100, 3), (2 * 1024 + 514, 2), (0, 0)]:
        path.write_bytes(whole[:kept])
        *good, bad = read(path)
        assert bad.broken
        assert n - 1 <= len(good) <= n
    path.write_bytes(whole + tar({'5.txt': b'of a second archive'}))
    assert texts(read(path)) == [*(f'text {i}' for i in range(4)), 'of a second archive']
    path.write_bytes(tar({}))
    assert read(path) == []


# ---------------------------------------------------------------------------------------------
# Text of any ending
# ---------------------------------------------------------------------------------------------

FILES = {
    'main.c': b'int main() { return 0; }', 'Makefile': b'all:\n', 'page.html': '<p>é'.encode(),
    'paper.tex': b'\\section{a}', 'sub/notes.rst.gz': gzip.compress(b'notes'), 'empty.h': b'',
    'lines.jsonl': b'{"text": "kept as it is"}\n', 'a.csv': b'a,b\n', 'a.json': b'{"a": 1}',
    'picture.png': b'\x89PNG\r\n\x1a\n\0', 'old.tex': 'é'.encode('latin-1'),
    'wide.txt': 'a'.encode('utf-16'), 'module.o': b'\x7fELF\0', '.git/config': b'hidden',
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    for name, content in FILES.items():
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).write_bytes(content)
    return tmp_path / 'in'


def test_files_of_any_ending_as_text(folder):
    found = read(folder, as_text=True)
    binary = {item.name for item in found if isinstance(item, Binary)}
    assert binary == {'picture.png', 'old.tex', 'wide.txt', 'module.o'}
    expected = {
        name.removesuffix('.gz'): gzip.decompress(content) if name.endswith('.gz') else content
        for name, content in FILES.items()
        if name not in binary and not name.startswith('.')
    }
    got = {item.id: item.text.encode() for item in found if isinstance(item, Document)}
    assert got == expected


def test_what_is_binary():
    assert not text_files.is_binary(b'')
    assert not text_files.is_binary(b'\x1b[31m\x07 \x7f')
    long = 'é'.encode() * text_files.FIRST_BYTES
    assert not text_files.is_binary(long)
    assert not text_files.is_binary(b'a' + long)  # a character that the first bytes cut
    assert text_files.is_binary(b'a\0')
    assert text_files.is_binary(b'a\xe9')
    assert not text_files.is_binary(b'a' * text_files.FIRST_BYTES + b'\0')


def test_binary_files_are_counted(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ['--input=in', '--as_text', '--tokenizer=bytes', '--output=out']
    run_command(data, *given, takes_words=True)
    said = capsys.readouterr().out
    assert (
        '\n4 files left out as binary (NUL bytes, or no UTF-8): 1 .o, 1 .png, 1 .tex, 1 .txt\n'
        in said
    )
    first = contents('out')
    manifest = json.loads(first['manifest.json'])
    assert manifest['input']['binary'] == {'.o': 1, '.png': 1, '.tex': 1, '.txt': 1}
    assert (manifest['input']['records'], manifest['input']['empty']) == (9, 1)
    run_command(data, *given, takes_words=True)  # is recognized as finished
    assert 'prepared already' in capsys.readouterr().out
    assert contents('out') == first
    # The same files by their kinds are another job.
    with pytest.raises(SystemExit, match='prepared already, with another value of the input'):
        run_command(data, '--input=in', '--tokenizer=bytes', '--output=out', takes_words=True)


def test_workers_and_parts_change_nothing(folder, tmp_path):
    files = find_files([str(folder)], as_text=True)
    for i, workers in enumerate((1, 2)):
        prepare(files, Job(str(tmp_path / f'{i}'), 'bytes', 0.2), workers, part_bytes=1)
    assert contents(tmp_path / '0') == contents(tmp_path / '1')


def test_only_binary_files(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'\0')
    files = find_files([f'{tmp_path}/a.png'], as_text=True)
    with pytest.raises(
        ConfigError, match=r'no text in 1 input files: .*\n  1 files left out as bin'
    ):
        prepare(files, Job(str(tmp_path / 'out'), 'bytes'))


def test_a_lone_compressed_text_gives_its_end(tmp_path):
    (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'word ' * 1000))
    prepare(find_files([f'{tmp_path}/a.txt.gz']), Job(str(tmp_path / 'out'), 'bytes'))
    splits = [Split(str(tmp_path / 'out'), name) for name in ('train', 'validation')]
    assert [split.n_documents for split in splits] == [1, 1]
    assert sum(split.n_bytes for split in splits) == 5000


def test_kinds_that_folders_hold_beside_text_are_named(folder, capsys):
    def names(*patterns: str, **more) -> list[str]:
        return [file.name for file in find_files([f'{folder}{p}' for p in patterns], **more)]

    assert names('') == ['lines.jsonl', 'wide.txt']
    said = capsys.readouterr().err
    assert '1 .json' in said
    assert ".csv, .json by an --input that names the ending, as in '*.csv'" in said
    assert names('/a.json') == names('/*.json*')[:1] == ['a.json']
    assert names('/*.csv', '/*.txt') == ['a.csv', 'wide.txt']
    with pytest.raises(ConfigError, match=r"1 \.csv.*as in '\*\.csv'"):
        names('/a.c?v')
    # An ending that is named as text is text.
    (file,) = find_files([f'{folder}/a.csv'], extensions=('csv',))
    assert file.kind == '.txt'
    (folder / 'spark.csv').mkdir()
    shutil.copy(folder / 'a.csv', folder / 'spark.csv/part-0.csv')
    assert names('/*.csv') == ['a.csv', 'spark.csv/part-0.csv']
    assert names('/spark.csv') == ['part-0.csv']


def test_remote_files_are_read_as_local_ones(folder):
    fsspec = pytest.importorskip('fsspec')
    (folder / 'a.json').write_bytes(KINDS['a.json'](TEXTS))
    (folder / 'a.csv.xz').write_bytes(lzma.compress(KINDS['a.csv'](TEXTS)))
    (folder / 'a.tar.bz2').write_bytes(bz2.compress(KINDS['a.tar'](TEXTS)))
    (folder / 'cut.tar.bz2').write_bytes(bz2.compress(KINDS['a.tar'](TEXTS))[:-9])
    system = fsspec.filesystem('memory')
    for path in folder.iterdir():
        if path.is_file():
            system.pipe(f'/kinds/{path.name}', path.read_bytes())
    for pattern in ('*.json', '*.csv.xz', '*.tar.bz2', '*.txt'):
        assert read(f'memory://kinds/{pattern}') == read(folder / pattern)
    local = [item for item in read(folder / '*', as_text=True) if 'rst' not in str(item)]
    assert read('memory://kinds/*', as_text=True) == local


def test_a_failing_server_is_no_broken_compression(monkeypatch, tmp_path):
    fsspec = pytest.importorskip('fsspec')
    fsspec.filesystem('memory').pipe('/kinds/a.txt.bz2', bz2.compress(b'x'))
    (file,) = find_files(['memory://kinds/a.txt.bz2'])
    ((piece,),) = cut_into_parts([file], 1)

    def fail(self, *args):
        raise ConnectionResetError('gone')

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, 'read', fail)
    with pytest.raises(corpus_files.RemoteError, match='gone'):
        list(documents(piece))


def test_missing_zstandard_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / 'a.txt.zst').write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'zstandard', None)
    with pytest.raises(ConfigError, match=r'pip install -r requirements/data\.txt'):
        read(tmp_path / 'a.txt.zst')
