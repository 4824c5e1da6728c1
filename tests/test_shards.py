"""Token shards are what was written, open elsewhere, and say so when they are damaged."""

import json

import numpy as np
import pytest
from common_data import contents, prepared, split_of_length

from config import ConfigError
from corpus import shards
from corpus.shards import Split


def test_arrays_open_with_zarr(tmp_path):
    zarr = pytest.importorskip('zarr')
    split_of_length(tmp_path, 2500)
    output = str(tmp_path / 'tokens')
    split = Split(output, 'train')
    manifest = json.loads(contents(output)['manifest.json'])
    arrays = [zarr.open(f'{output}/{s["path"]}') for s in manifest['splits']['train']['shards']]
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}
    found = np.concatenate([array[:] for array in arrays])
    np.testing.assert_array_equal(found, split.read(0, split.n_tokens))


def test_array_of_several_objects_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'CHUNK_TOKENS', 16)
    monkeypatch.setattr(shards, 'OBJECT_TOKENS', 64)
    split = split_of_length(tmp_path, 2001)
    assert 'train/00000/c/1' in contents(tmp_path / 'tokens')
    ids = split.read(0, 2001)
    assert (ids[:699] == 33 + np.arange(699) * 7 % 90).all()


def test_damaged_shard_is_an_error(tmp_path):
    split_of_length(tmp_path, 500)
    path = tmp_path / 'tokens/train/00000/c/0'
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(OSError, match=r'train/00000.*Digest mismatch'):
        Split(str(tmp_path / 'tokens'), 'train').read(0, 500)


def test_lost_chunk_is_an_error(tmp_path):
    split_of_length(tmp_path, 500)
    (tmp_path / 'tokens/train/00000/c/0').unlink()
    with pytest.raises(OSError, match=r'train/00000.*is missing'):
        Split(str(tmp_path / 'tokens'), 'train').read(0, 500)


def test_chunks_of_the_fill_value_are_written(tmp_path):
    split = Split(prepared(tmp_path, {'a.txt': '\0' * (shards.CHUNK_TOKENS + 9)}), 'train')
    assert not split.read(0, split.n_tokens - 1).any()


def test_read_across_shards(tmp_path):
    split = split_of_length(tmp_path, 2500)
    everything = split.read(0, 2500)
    for start, stop in [(0, 1), (699, 701), (650, 2200), (2499, 2500), (5, 5), (2500, 2500)]:
        np.testing.assert_array_equal(split.read(start, stop), everything[start:stop])
    for start, stop in [(-1, 3), (0, 2501), (4, 3)]:
        with pytest.raises(ValueError, match='no range of the 2500 tokens'):
            split.read(start, stop)


def test_split_of_a_url(tmp_path):
    split = split_of_length(tmp_path, 900)
    url = Split(f'file://{tmp_path}/tokens', 'train')
    np.testing.assert_array_equal(url.read(0, 900), split.read(0, 900))


def test_split_errors(tmp_path):
    with pytest.raises(ConfigError, match=r'holds no manifest\.json.*python data\.py'):
        Split(str(tmp_path / 'nothing'), 'train')
    folder = prepared(tmp_path, {'a.txt': 'text'})
    with pytest.raises(ConfigError, match='no document in its validation split'):
        Split(folder, 'validation')
    with pytest.raises(ValueError, match="not 'test'"):
        Split(folder, 'test')
    path = tmp_path / 'tokens/manifest.json'
    manifest = json.loads(path.read_text())
    manifest['tokenizer']['fingerprint'] = '0'
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match='another vocabulary than bytes'):
        Split(folder, 'train').encoding()
    path.write_text(json.dumps({**manifest, 'version': 99}))
    with pytest.raises(ConfigError, match='format version 99'):
        Split(folder, 'train')
    path.write_text('[')
    with pytest.raises(ConfigError, match='not a manifest'):
        Split(folder, 'train')


# Inspection


def test_inspect_prints_and_verifies(tmp_path, capsys):
    folder = prepared(tmp_path, {f'{i}.txt': f'document {i} of text' for i in range(30)}, share=0.3)
    assert shards.inspect(folder, 2) == []
    out = capsys.readouterr().out
    splits = [Split(folder, name) for name in shards.SPLITS]
    for split in splits:
        assert f'{split.name}: {split.n_documents} documents, {split.n_tokens} tokens' in out
        assert out.count(f'--- {split.name} document') == 2
    assert "b'o'" in out
    assert 'document 0 of text\n' in out
    assert '"fingerprint": "' in out
    assert 'all shards are as the manifest says' in out


def test_inspect_reads_urls_and_arrays_of_several_objects(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, 'CHUNK_TOKENS', 16)
    monkeypatch.setattr(shards, 'OBJECT_TOKENS', 64)
    split_of_length(tmp_path, 2001)
    assert shards.inspect(f'file://{tmp_path}/tokens') == []
    assert 'train: 3 documents, 2,001 tokens' in capsys.readouterr().out


@pytest.mark.parametrize('damage', ['flip', 'lose', 'swap', 'count'])
def test_inspect_names_damaged_shards(tmp_path, damage, capsys):
    split_of_length(tmp_path, 2500)
    tokens = tmp_path / 'tokens'
    path = tokens / 'train/00001/c/0'
    manifest = json.loads((tokens / 'manifest.json').read_text())
    if damage == 'flip':
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
    elif damage == 'lose':
        path.unlink()
    elif damage == 'swap':  # its own checksums fit
        path.write_bytes((tokens / 'train/00002/c/0').read_bytes())
    else:
        manifest['splits']['train']['shards'][1]['documents'] += 1
        (tokens / 'manifest.json').write_text(json.dumps(manifest))
    (found,) = shards.inspect(str(tokens))
    assert found.startswith(f'{tokens}/train/00001 is damaged: ')
    assert '1 damaged shards' in capsys.readouterr().out


def test_folders_without_digests_can_be_read_and_inspected(tmp_path):
    split = split_of_length(tmp_path, 900)
    path = tmp_path / 'tokens/manifest.json'
    manifest = json.loads(path.read_text())
    for shard in manifest['splits']['train']['shards']:
        del shard['digest']
    del manifest['input']
    path.write_text(json.dumps(manifest))
    assert shards.inspect(str(tmp_path / 'tokens')) == []
    again = Split(str(tmp_path / 'tokens'), 'train')
    np.testing.assert_array_equal(again.read(0, 900), split.read(0, 900))
