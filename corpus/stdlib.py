"""The running Python's standard library as a corpus, which is there without a download.

It is prepared once, in a cache folder, and serves the small configs and the tests.
"""

import contextlib
import fcntl
import glob
import os
import platform
import shutil
import tempfile
import time

from config import ConfigError
from corpus.files import File
from corpus.prepare import Job, prepare
from corpus.shards import MANIFEST, VERSION
from storage.stores import cache_folder
from tokenizer import fingerprint, get_encoding, stdlib_files

STDLIB_FILES = 2  # version of the choice that stdlib_files makes; raise it with that choice
BUILDING, LOCK = 'building-', 'lock'  # a folder that is being prepared, and the file in it
UNLOCKED_SECONDS = 3600.0  # then a folder without a lock is an older version's, and not alive


def stdlib_corpus(tokenizer: str, validation_share: float = 0.03) -> str:
    """Returns the path of the running Python's standard library as a prepared folder.

    The folder is prepared once, in $JAXFORMER_CACHE, else $XDG_CACHE_HOME/jaxformer, else
    ~/.cache/jaxformer. Several processes may do this at the same time. Raises ConfigError if the
    cache cannot be written.
    """
    cache = cache_folder()
    key = fingerprint(get_encoding(tokenizer))[:12]
    version = platform.python_version()
    folder = os.path.join(
        cache, f'stdlib-{version}-{key}-{validation_share:g}-v{VERSION}.{STDLIB_FILES}'
    )
    if os.path.exists(os.path.join(folder, MANIFEST)):
        return folder
    try:
        os.makedirs(cache, exist_ok=True)
        _remove_killed(cache)
        building = tempfile.mkdtemp(prefix=BUILDING, dir=cache)
    except OSError as error:
        raise ConfigError(
            f'the cache folder {cache} cannot be written ({error}): set JAXFORMER_CACHE to '
            'one that can'
        ) from error
    lock = os.path.join(building, LOCK)
    try:
        with open(lock + '.new', 'w') as f:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(f, fcntl.LOCK_EX)  # until this process ends, even by a kill
                os.rename(lock + '.new', lock)  # no other process sees it unlocked
            _prepare_stdlib(os.path.join(building, 'tokens'), folder, tokenizer, validation_share)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _prepare_stdlib(tokens: str, folder: str, tokenizer: str, validation_share: float) -> None:
    """Prepares the standard library in `tokens`, which becomes `folder` when it is complete.

    `tokens` lies below what mkdtemp made, because that one is unreadable for other users.
    """
    named, skipped = stdlib_files()
    left_out = f', without {skipped} files that are not UTF-8' if skipped else ''
    version = platform.python_version()
    print(f'preparing the standard library of Python {version} in {folder}{left_out}')
    files = [File(name, path) for name, path in named]
    prepare(files, Job(tokens, tokenizer, validation_share, max_bad_share=0.0))
    try:
        os.rename(tokens, folder)
    except OSError:
        # Another process was first. Its folder is complete, because it was renamed, too.
        if not os.path.exists(os.path.join(folder, MANIFEST)):
            raise


def _remove_killed(cache: str) -> None:
    """Removes the folders that killed processes were preparing in.

    One that is alive holds the lock in its folder. A folder without one may have been made this
    moment.
    """
    for building in glob.glob(os.path.join(glob.escape(cache), BUILDING + '*')):
        try:
            with open(os.path.join(building, LOCK)) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                if time.time() - os.stat(building).st_mtime < UNLOCKED_SECONDS:
                    continue
        except OSError:  # alive, or another user's
            continue
        shutil.rmtree(building, ignore_errors=True)
