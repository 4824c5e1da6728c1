#!/usr/bin/env bash
# tensorstore 0.1.86: KvStore.url of an S3 store raises NotImplementedError as soon as the store has an
# `endpoint` of its own (MinIO, R2, Ceph and other S3-compatible servers), where the same store without
# one, gs://, file:// and memory:// all have a url. So a message that names a store by its url, such as
# that of a failed check, is lost exactly where somebody uses a bucket that is not Amazon's. The spec
# (KvStore.spec().to_json()) names every store. Nothing is connected to: stores open lazily.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tensorstore==0.1.86
HOME="$work" "$work/venv/bin/python" - 2>"$work/aws.log" <<'PYTHON' || { cat "$work/aws.log" >&2; exit 1; }
import importlib.metadata

import tensorstore as ts

s3 = {'driver': 's3', 'bucket': 'some-bucket', 'path': 'a/', 'aws_region': 'us-east-1'}
own = s3 | {'endpoint': 'http://127.0.0.1:9'}
print('tensorstore', importlib.metadata.version('tensorstore'))
assert ts.KvStore.open(s3).result().url == 's3://some-bucket/a/'
assert ts.KvStore.open({'driver': 'gcs', 'bucket': 'some-bucket', 'path': 'a/'}).result().url
store = ts.KvStore.open(own).result()
assert store.spec().to_json()['endpoint'] == own['endpoint']
try:
    url = store.url
except NotImplementedError as error:
    print(f'seen: NotImplementedError: {error}')
else:
    raise SystemExit(f'changed: the store has the url {url}')
PYTHON
