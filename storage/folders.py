"""Local folders in which something may be a link: listed, and removed without following links."""

import os
import shutil
from collections.abc import Iterable

TEMPORARY = '.__lock'  # tensorstore writes NAME.__lock, then renames it; a kill leaves it behind


class LinkedError(OSError):
    """A link stands where something is to be listed or removed; the message names it."""


def described(link: str) -> str:
    """Describes a link for a message: where it leads, and whether there is something."""
    missing = '' if os.path.exists(link) else ', which is not there (is its disk mounted?)'
    return f'{link} is a link to {os.readlink(link)}{missing}'


def entries(folder: str) -> list[os.DirEntry]:
    """Lists a folder, which may be a link to one; [] if there is none.

    Raises LinkedError if it, or a folder above it, is a link that leads nowhere: what it held would
    count as lost.
    """
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        path = folder
        while path != os.path.dirname(path):
            if os.path.islink(path):
                raise LinkedError(f'{described(path)}: mount it, or remove the link') from None
            path = os.path.dirname(path)
        return []


def is_file(path: str) -> bool:
    """Returns True if there is a file, or a link to one; raises OSError if that cannot be told."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.isfile(path)


def own_entries(folder: str, names: Iterable[str]) -> list[os.DirEntry]:
    """Lists the entries with these names, in their order, and what killed writes left of them."""
    found = [(entry.name.removesuffix(TEMPORARY), entry) for entry in entries(folder)]
    return [entry for name in names for base, entry in found if base == name]


def refuse_links(folder: str, names: Iterable[str]) -> None:
    """Raises LinkedError if the folder is a link, or one of the entries is, or holds one."""
    links = [folder] if os.path.islink(folder) else []
    waiting = [] if links else own_entries(folder, names)
    while waiting and not links:
        entry = waiting.pop()
        if entry.is_symlink():
            links.append(entry.path)
        elif entry.is_dir():
            waiting += entries(entry.path)
    if links:
        raise LinkedError(
            f'{described(links[0])}: nothing is removed through links; mend what it leads to, or '
            f'remove {folder} by hand'
        )


def remove(folder: str, names: Iterable[str]) -> None:
    """Removes the entries with these names, in their order, and then the folder if it is empty.

    Links among them are removed as links: what they lead to stays.
    """
    for entry in own_entries(folder, names):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
