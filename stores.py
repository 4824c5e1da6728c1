"""The key-value store below a path: a local folder, or a URL that tensorstore knows."""

import os
import urllib.parse

import tensorstore as ts


def local_folder(path: str) -> str | None:
    """The absolute path of a local folder, also one given as file://; None for another store."""
    if path.startswith('file://'):
        return path.removeprefix('file://')
    return None if '://' in path else os.path.abspath(path)


def open_store(path: str, context: ts.Context | None = None) -> ts.KvStore:
    """The store below a folder or a URL such as gs://bucket/folder.

    s3:// is Amazon's, or the compatible one (MinIO, R2, Ceph) whose address the variables
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL give, as to Amazon's own tools.
    """
    where: str | dict[str, str] = path.rstrip('/') + '/'
    endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
    if folder := local_folder(path):
        where = {'driver': 'file', 'path': folder.rstrip('/') + '/'}
    elif path.startswith('s3://') and endpoint:
        bucket, _, key = urllib.parse.unquote(where.removeprefix('s3://')).partition('/')
        region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION')
        where = {'driver': 's3', 'bucket': bucket, 'path': key, 'endpoint': endpoint}
        where['aws_region'] = region or 'us-east-1'
    return ts.KvStore.open(where, context=context).result()
