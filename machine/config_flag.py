"""Loads the file that --config names, and sets the fields that --config.FIELD flags name.

--config=tiny stands for configs/tiny.py. A field keeps the type of its default; a tuple of texts
may be written as it is typed: a,b or ('a', 'b') or ["a", "b"] or a alone.
"""

import ast
import difflib
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import traceback
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from config import ConfigError, as_tuples, flat
from configs import default

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = 'configs'
RECORDS = ('data.sources',)  # tuples of tuples; all other tuple fields hold texts
TRUE, FALSE = ('true', 't', '1', 'yes'), ('false', 'f', '0', 'no')


class ConfigFlag(flags.Flag):
    """The flag --config: a path on the command line, the loaded ConfigDict after it is parsed."""

    path = ''  # of the loaded file


class NameParser(flags.ArgumentParser):
    """Parses the name of a config, as it is."""

    metavar = 'NAME'


def did_you_mean(name: str, known: Iterable[str], prefix: str = '') -> str:
    """Returns ' (did you mean ...?)' with the known name that is most alike, '' without one."""
    known = list(known)
    alike = [k for k in known if k.rpartition('.')[2] == name]
    alike = alike or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f' (did you mean {prefix}{alike[0]}?)' if alike else ''


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def find_config(name: str) -> str:
    """Returns the path of a config's file, given as a path or as the name of one in configs/.

    A relative path is looked up from the working directory, then from the project's folder.
    """
    path = os.path.expanduser(name)
    named = ROOT / CONFIGS / f'{path}.py'
    for candidate in (path, ROOT / path, *([named] if os.sep not in path else [])):
        if os.path.isfile(candidate):
            return os.path.relpath(candidate) if candidate == named else str(candidate)
    folder = ROOT / CONFIGS
    there = ', '.join(sorted(p.stem for p in folder.glob('*.py') if p.stem != '__init__'))
    shown = path if os.sep in path or '.' in path else f'{CONFIGS}/{path}.py'
    hint = did_you_mean(pathlib.Path(path).stem, there.split(', '), f'{CONFIGS}/')
    raise ConfigError(
        f'there is no {shown}{hint.replace("?", ".py?")}; {CONFIGS}/ has {there}, and --config '
        f'also takes the path of another file'
    )


def load_config(name: str) -> tuple[str, ConfigDict]:
    """Returns the path of a config's file, and what its get_config() returns.

    NAME.py:TEXT calls get_config(TEXT). Raises ConfigError, with file and line, if there is no such
    file, if it fails, or if the fields are not those of configs/default.py.
    """
    file, colon, argument = name.partition(':')
    path = find_config(file)
    loader = importlib.machinery.SourceFileLoader('config_file', path)  # whatever its ending
    spec = importlib.util.spec_from_loader('config_file', loader)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, 'get_config'):
            raise ConfigError(f'{path} defines no get_config(), which returns the ConfigDict')
        config = module.get_config(*([argument] if colon else []))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f'{where(path, module, error)}: {error_text(error)}') from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f'{path}: get_config() returns {type(config).__name__}, where a ConfigDict is needed; '
            f'end it with `return c`'
        )
    known, found = (set(flat(c.to_dict())) for c in (default.get_config(), config))
    if known != found:
        wrong = [f'without {x}' for x in sorted(known - found)]
        wrong += [f'with the unknown {x}{did_you_mean(x, known)}' for x in sorted(found - known)]
        raise ConfigError(
            f'{path}: get_config() returns a config {", ".join(wrong[:5])}; start from '
            f'configs.default.get_config(), and change its fields'
        )
    return path, config


def where(path: str, module: ModuleType, error: Exception) -> str:
    """Returns 'FILE, line N', the place in the config's file that an error comes from."""
    if isinstance(error, SyntaxError):
        return f'{error.filename}, line {error.lineno}'
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == module.__file__]
    return f'{path}, line {frames[-1].lineno}' if frames else path


def error_text(error: Exception) -> str:
    """Returns the kind and the message of an error in one line."""
    said = error.msg if isinstance(error, SyntaxError) else error.args[0] if error.args else ''
    said = ' '.join(str(said).split())
    if len(said) > 240:  # a locked ConfigDict lists all its fields before it says which is meant
        said = f'{said[:120]} ... {said[-100:]}'
    return f'{type(error).__name__}: {said}'


# ---------------------------------------------------------------------------------------------
# The fields
# ---------------------------------------------------------------------------------------------


def split_overrides(
    arguments: Sequence[str],
) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Splits arguments into (field, value) of the --config.FIELD flags, and all others.

    A value may be the next argument, except for a bool, which may do without: then it is None. A
    field that is switched off by --noconfig.FIELD has the value 'false'.
    """
    types = {name: type(value) for name, value in flat(default.get_config().to_dict()).items()}
    fields: list[tuple[str, str | None]] = []
    rest: list[str] = []
    left = iter(arguments)
    for argument in left:
        match = re.fullmatch(r'--?(no)?config\.([^=]*)(=.*)?', argument, re.DOTALL)
        if argument == '--':
            rest += [argument, *left]
        elif not match:
            rest.append(argument)
        elif match[1]:
            if match[3] or types.get(match[2], bool) is not bool:
                raise ConfigError(
                    f'{argument}: --noconfig.FIELD is for fields that are true or false'
                )
            fields.append((match[2], 'false'))
        elif match[3]:
            fields.append((match[2], match[3][1:]))
        elif types.get(match[2], bool) is bool:
            fields.append((match[2], None))
        else:
            fields.append((match[2], next(left, None)))
    return fields, rest


def override(config: ConfigDict, fields: Iterable[tuple[str, str | None]]) -> None:
    """Sets fields by their full names to values as typed; the last one counts.

    A tuple field that is given several times holds all that it is given since the last empty one.
    Raises ConfigError for an unknown field or a value that does not fit.
    """
    defaults, seen = flat(config.to_dict()), set()
    for name, text in fields:
        if name not in defaults:
            raise ConfigError(unknown_field(name, defaults))
        value = parse_value(name, text, defaults[name])
        group, _, field = name.rpartition('.')
        holder = config[group] if group else config
        if isinstance(value, tuple) and value and name in seen:
            value = (*holder[field], *value)
        holder[field] = value
        seen.add(name)


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Returns the message for a field that there is not, or that is a group of fields."""
    inside = [k for k in known if k.startswith(f'{name}.')]
    if inside:
        return f'--config.{name} is a group of fields; set one, as in --config.{inside[0]}'
    hint = did_you_mean(name, known, '--config.')
    return f'--config.{name}: there is no such field{hint}; configs/default.py explains all'


def parse_value(name: str, text: str | None, example: Any) -> Any:
    """Returns the value of a field, of the type of `example`, its default; None is a bare flag."""
    if isinstance(example, bool):
        if text is None or text.lower() in TRUE:
            return True
        if text.lower() in FALSE:
            return False
        raise ConfigError(f'--config.{name}={text} is neither true nor false')
    if text is None:
        raise ConfigError(f'--config.{name} has no value; write --config.{name}={example}')
    if isinstance(example, tuple):
        return parse_records(name, text) if name in RECORDS else parse_texts(name, text)
    if isinstance(example, str):
        return text
    try:
        return type(example)(text)
    except ValueError:
        kind = 'whole number' if isinstance(example, int) else 'number'
        raise ConfigError(
            f'--config.{name}={text} is no {kind}; write one as in --config.{name}={example}'
        ) from None


def literal(text: str) -> Any:
    """Returns the Python value that a text writes out, or None."""
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def parse_texts(name: str, text: str) -> tuple[str, ...]:
    """Returns a tuple of texts: a,b or ('a', 'b') or ["a"] or a; 1,2 are texts as well."""
    value = literal(text)
    if isinstance(value, str):
        return (value,)
    if isinstance(value, tuple | list) and all(isinstance(entry, str) for entry in value):
        return tuple(value)
    if text.lstrip().startswith(('(', '[')):
        raise ConfigError(
            f"--config.{name}={text} is no list of texts; write a,b or \"('a', 'b')\", and a text "
            f'that has commas or starts with a bracket as "(\'(a, b)\',)"'
        )
    first, *others = text.split(',')
    return (first, *(entry.lstrip() for entry in others)) if text else ()


def parse_records(name: str, text: str) -> tuple:
    """Returns a tuple of tuples; a single record may stand alone."""
    value = literal(text or '()')
    if isinstance(value, tuple | list):
        records = as_tuples(list(value))
        records = records if any(isinstance(x, tuple) for x in records) else (records,)
        return records if value else ()
    raise ConfigError(
        f"--config.{name}={text} is no list of records; write \"(('web', 'tokens/web', 0.7), "
        f"('code', 'tokens/code', 0.3))\""
    )
