"""Starts a command: its flags, its --help, and one message for a mistake of the user.

    def main(words: list[str]) -> None: ...
    if __name__ == '__main__':
        command.run(main, define_flags)

Flags are absl's, --name=value, and --config with a flag per field (machine/config_flag.py). Paths
expand a leading ~, which a shell leaves alone after `=`.
"""

import contextlib
import faulthandler
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags

from config import ConfigError, flat
from configs import default
from machine.config_flag import (
    ConfigFlag,
    NameParser,
    did_you_mean,
    load_config,
    override,
    split_overrides,
)

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # flags defined here belong to the command that asks for them

HELP = ('--help', '-help', '-h', '--helpshort', '--helpfull')
INTERRUPTED = 130  # the exit code that shells use for Ctrl-C
NAME_WIDTH = 24  # columns of --help for the names of flags

# ---------------------------------------------------------------------------------------------
# Starting and ending
# ---------------------------------------------------------------------------------------------


def run(
    main: Callable[[list[str]], Any],
    define_flags: Callable[[], None] | None = None,
    takes_words: bool = False,
) -> None:
    """Runs a command: defines and parses its flags, then calls main(words).

    `words` are the arguments that belong to no flag; they are an error unless `takes_words`. --help
    prints the first paragraph and the examples of the docstring of main's file, and the flags.
    """
    with contextlib.suppress(OSError, ValueError):  # where standard error is no file
        faulthandler.enable()
    with messages():
        if define_flags:
            define_flags()
        if asked := [argument for argument in sys.argv[1:] if argument in HELP]:
            print(help_text(main, '--helpfull' in asked))
            return
        words = parse(sys.argv[1:])
        if words and not takes_words:
            refuse(words)
        main(words)
        sys.stdout.flush()


@contextlib.contextmanager
def messages(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the process with code 1 and the message alone for a mistake of the user.

    These are ConfigError, the given kinds, and operating-system errors that name a file. Ctrl-C
    ends it with code 130. A bug keeps its traceback.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe, as in `| head`, has all that it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ConfigError, *kinds) as error:
        sys.exit(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f'{error.filename}: {error.strerror}')
    except KeyboardInterrupt as error:  # with what stands, and how to go on
        print(': '.join(['interrupted', *map(str, error.args)]), file=sys.stderr)
        sys.exit(INTERRUPTED)


def refuse(words: Sequence[str]) -> NoReturn:
    """Raises ConfigError for words that belong to no flag."""
    raise ConfigError(
        f'{shlex.join(words)} belongs to no flag; flags are --name=value, fields of the config '
        f'--config.NAME=value, and values with spaces or brackets are quoted'
    )


def parse(arguments: Sequence[str]) -> list[str]:
    """Parses the flags; returns the words that belong to none.

    Raises ConfigError for an unknown flag or field, a value that does not fit, and a config that
    cannot be loaded.
    """
    try:
        given = FLAGS.read_flags_from_files(arguments, force_gnu=False)  # --flagfile
        fields, rest = split_overrides(given) if 'config' in FLAGS else ([], given)
        FLAGS.set_gnu_getopt(True)  # flags may stand behind words
        words = FLAGS([sys.argv[0], *rest])[1:]
    except flags.UnrecognizedFlagError as error:
        hint = did_you_mean(error.flagname, list(FLAGS), '--')
        raise ConfigError(f'--{error.flagname} is no flag{hint}{see_help()}') from error
    except (flags.Error, ValueError) as error:  # ValueError: --noflag=value
        raise ConfigError(f'{error}{see_help()}') from error
    if 'config' in FLAGS:
        use_config(fields)
    return words


def see_help() -> str:
    """Returns the end of a message on flags."""
    return f'; python {sys.argv[0]} --help lists the flags'


def use_config(fields: list[tuple[str, str | None]]) -> None:
    """Loads the file that --config names, with these overrides, as the flag's value."""
    flag = FLAGS['config']
    if flag.value is None:
        if fields:
            raise ConfigError(
                f'--config.{fields[0][0]} changes a field of no config; add '
                f'--config=configs/NAME.py'
            )
        return
    flag.path, config = load_config(flag.value)
    override(config, fields)
    FLAGS.config = config.lock()


# ---------------------------------------------------------------------------------------------
# Flags of our own kinds
# ---------------------------------------------------------------------------------------------


class PathParser(flags.ArgumentParser):
    """Parses a path or URL, and expands a leading ~."""

    metavar = 'PATH'

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


class PathsParser(flags.ListParser):
    """Parses paths separated by commas, and expands a leading ~ of each."""

    metavar = 'PATH,...'

    def parse(self, argument: str | list[str]) -> list[str]:
        return [os.path.expanduser(path) for path in super().parse(argument)]


def DEFINE_path(name: str, default: str | None, help: str) -> None:  # as absl names its own
    """Defines a flag whose value is a path or URL."""
    flags.DEFINE(PathParser(), name, default, help)


def DEFINE_paths(name: str, default: list[str] | None, help: str) -> None:
    """Defines a flag whose value is a list of paths or URLs."""
    flags.DEFINE(PathsParser(), name, default, help, serializer=flags.CsvListSerializer(','))


def define_process_flags() -> None:
    """Defines --coordinator, --num_processes and --process_id, for `processes.start`."""
    flags.DEFINE_string(
        'coordinator', None, "HOST:PORT of process 0, for several processes; 'auto' on Cloud TPU."
    )
    flags.DEFINE_integer(
        'num_processes', None, 'With --coordinator: number of processes.', lower_bound=1
    )
    flags.DEFINE_integer(
        'process_id', None, 'With --coordinator: number of this one, from 0.', lower_bound=0
    )
    mark_rare('coordinator', 'num_processes', 'process_id')


def mark_rare(*names: str) -> None:
    """Lets --helpfull alone explain these flags, which are defined; --help names them."""
    for name in names:
        FLAGS[name].rare = True


def DEFINE_config(name: str, help: str) -> None:
    """Defines the flag --config; after parsing, FLAGS.config is the locked ConfigDict."""
    flags.DEFINE_flag(ConfigFlag(NameParser(), flags.ArgumentSerializer(), name, None, help))


# ---------------------------------------------------------------------------------------------
# --help
# ---------------------------------------------------------------------------------------------


def help_text(main: Callable, every: bool = True) -> str:
    """Returns the text of --help for the command whose main function this is.

    `every` is for --helpfull, with the flags that `mark_rare` took.
    """
    module = sys.modules[main.__module__]
    width = min(shutil.get_terminal_size().columns, 100)
    about, *more = (module.__doc__ or '').strip().split('\n\n')
    examples = [paragraph for paragraph in more if paragraph.startswith(' ')]
    lines = ['\n\n'.join([about, *examples]), '']
    named_flags = FLAGS.get_key_flags_for_module(module)
    rare = [f'--{flag.name}' for flag in named_flags if getattr(flag, 'rare', False)]
    for flag in named_flags:
        if not every and f'--{flag.name}' in rare:
            continue
        text = re.sub('^<.*>: ', '', flag.help) + default_text(flag)  # of a choice: the choices
        text = re.sub(r';\s+repeat this option to specify a list of values', '', text)
        lines += help_lines(named(flag), text, width)
    if rare and not every:
        lines += help_lines('--helpfull', f'Also {", ".join(rare)}.', width)
    if 'config' in FLAGS:
        groups = [name for name, value in default.get_config().items() if hasattr(value, 'items')]
        fields = (
            f'A flag sets each of the {len(flat(default.get_config().to_dict()))} fields of a '
            f'config, which configs/default.py explains: --config.steps=500, '
            f'--config.optimizer.peak_lr=3e-4. Groups: {", ".join(groups)}.'
        )
        lines += ['', *textwrap.wrap(fields, width, break_on_hyphens=False)]
    return '\n'.join(lines)


def help_lines(name: str, text: str, width: int) -> list[str]:
    """Returns the lines of a flag: its name and, beside or below, its text."""
    first, space = f'  {name}', ' ' * NAME_WIDTH
    own = [first] if len(first) > NAME_WIDTH - 2 else []
    indent = space if own else f'{first:<{NAME_WIDTH}}'
    wrapped = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=space, break_on_hyphens=False
    )
    return own + wrapped


def named(flag: flags.Flag) -> str:
    """Returns a flag as it is written: '--workdir=PATH', '--[no]json'."""
    if isinstance(flag.parser, flags.BooleanParser):
        return f'--[no]{flag.name}' if flag.default else f'--{flag.name}'
    kinds = {'int': 'N', 'float': 'X', 'multi string': 'TEXT', 'string enum': '|', 'string': 'TEXT'}
    value = getattr(flag.parser, 'metavar', kinds.get(flag.flag_type(), 'A,B'))
    if value == '|':
        value = '|'.join(x for x in flag.parser.enum_values if x)
    return f'--{flag.name}[={value}]' if flag.boolean else f'--{flag.name}={value}'


def default_text(flag: flags.Flag) -> str:
    """Returns the default as the end of a help text; nothing where nothing is the default."""
    if flag.default in (None, '', 0, []) or isinstance(flag.default, bool):
        return ''
    value = ','.join(flag.default) if isinstance(flag.default, list) else flag.default
    return f' Default: {value}.'
