"""The output of a run on a terminal and in a file."""

import io
import os
import pathlib
import re
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from machine import startup
from runtime.terminal import CLEAR, Terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


class Loss:
    """Stands for an array whose value is ready when the test sets it."""

    def __init__(self):
        self.ready, self.waited = False, False

    def is_ready(self) -> bool:
        return self.ready

    def block_until_ready(self) -> None:
        self.waited = self.ready = True


def test_a_file_receives_plain_lines_and_waits_for_nothing():
    file = io.StringIO()
    terminal, loss = Terminal(20, stream=file), Loss()
    terminal.say('hello')
    terminal.follow(10, loss)
    terminal.catch_up(10)
    terminal.log(10, 'loss 2.0', seconds=0.5)
    terminal.close()
    assert file.getvalue() == 'hello\nstep 10/20  loss 2.0  ETA 0:00:05\n'
    assert not loss.waited
    silent = Terminal(20, active=False, stream=Screen())
    silent.say('hello')
    silent.log(10, 'loss', seconds=1)
    silent.close()
    assert silent.stream.getvalue() == ''


def test_the_bar_follows_the_devices(monkeypatch):
    monkeypatch.setenv('COLUMNS', '100')
    monkeypatch.setattr('runtime.terminal.REDRAW_SECONDS', 0)
    screen = Screen()
    terminal = Terminal(20, stream=screen)
    losses = {step: Loss() for step in range(1, 8)}
    for step in (1, 2, 3):
        terminal.follow(step, losses[step])
    assert screen.getvalue() == ''  # none is finished
    losses[1].ready = losses[2].ready = True
    terminal.follow(4, losses[4])
    assert last_line(screen).startswith('step  2/20 ')
    terminal.catch_up(3)
    assert losses[3].waited
    assert not losses[4].waited
    terminal.log(3, 'loss 2.0', seconds=2)
    line = last_line(screen)
    assert re.fullmatch(r'step  3/20 ━{4}─{26}  loss 2\.0  ETA 0:00:34', line), line
    terminal.say('evaluated')
    assert f'{CLEAR}evaluated\n' in screen.getvalue()
    assert last_line(screen) == line  # below it
    monkeypatch.setenv('COLUMNS', '20')
    terminal.log(3, 'loss 2.0', seconds=2)
    assert len(last_line(screen)) == 19
    terminal.close()
    assert screen.getvalue().endswith(f'{CLEAR}step 3/20  loss 2.0\n')


def last_line(screen: Screen) -> str:
    return screen.getvalue().split(CLEAR)[-1]


def test_a_loss_is_an_array():
    """Arrays have the methods that `Loss` has."""
    x = jnp.zeros(())
    x.block_until_ready()
    assert x.is_ready()


def test_a_narrow_terminal_shows_whole_fields(monkeypatch):
    screen = Screen()
    terminal = Terminal(200, stream=screen)
    for columns, last in [(120, '0.4 GB'), (80, '12,345 tokens/s'), (45, 'loss 2.0000')]:
        monkeypatch.setenv('COLUMNS', str(columns))
        status = 'loss 2.0000  grad norm 1.234  12,345 tokens/s  MFU 21.3%  0.4 GB'
        terminal.log(100, status, seconds=2)
        line = last_line(screen)
        assert len(line) < columns
        assert re.fullmatch(rf'step 100/200 ━{{2,15}}─{{3,15}}  .*{last}  ETA 0:03:20', line), line


def test_what_takes_long_is_said(monkeypatch):
    monkeypatch.setattr('runtime.terminal.WORD_SECONDS', 0.05)
    file = io.StringIO()
    terminal = Terminal(20, stream=file)
    with terminal.patiently('soon over'):
        pass
    with terminal.patiently('evaluating after step 3'):
        deadline = time.monotonic() + 10
        while not file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert file.getvalue() == 'evaluating after step 3\n'


class Broken(Screen):
    """Fails by this error once it is to write."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text: str) -> int:
        self.tries += 1
        raise self.error


@pytest.mark.parametrize(
    'error', [BrokenPipeError(), OSError(28, 'No space left'), ValueError('closed file')], ids=repr
)
def test_a_terminal_that_fails_is_left_alone(error):
    terminal = Terminal(20, stream=Broken(error))
    stream, loss = terminal.stream, Loss()
    terminal.say('hello')
    terminal.log(1, 'loss 2.0', seconds=1)
    terminal.follow(2, loss)
    terminal.catch_up(2)
    terminal.close()
    assert stream.tries == 1


def test_a_closed_stream_prints_nothing(monkeypatch):
    monkeypatch.setattr('sys.stdout', None)  # as Python has it for `>&-`
    terminal = Terminal(20)
    terminal.say('hello')
    terminal.close()
    closed = io.StringIO()
    closed.close()
    Terminal(20, stream=closed).say('hello')


def test_characters_that_the_terminal_lacks_are_replaced():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding='ascii')
    stream.isatty = lambda: True
    terminal = Terminal(20, stream=stream)
    terminal.say('a · b')
    terminal.log(10, 'loss 2.0', seconds=0.5)
    said = raw.getvalue().decode('ascii')
    assert 'a ? b\n' in said
    assert 'step 10/20 ===============---------------  loss 2.0  ETA 0:00:05' in said


STREAMS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from machine import startup
startup.PATIENCE_SECONDS = 0.2
startup.prepare()
with open(sys.argv[2], 'w') as f:  # must not get the number of a closed stream
    print('x · y' * 40_000)
    print('error', file=sys.stderr)
    f.write('content')
"""


@pytest.mark.parametrize(
    ('encoding', 'redirection'),
    [
        ('utf-8', '>/dev/full 2>/dev/full'),
        ('utf-8', '<&- >&- 2>&-'),
        ('utf-8', '| true'),
        ('utf-8', '| sleep 2'),  # who does not read
        ('ascii', '>/dev/null'),
    ],
)
def test_a_program_does_not_depend_on_its_streams(encoding, redirection, tmp_path):
    (tmp_path / 'program.py').write_text(STREAMS)
    root = pathlib.Path(startup.__file__).parent.parent
    shell = f'{sys.executable} {tmp_path}/program.py {root} {tmp_path}/file {redirection}'
    environment = {**os.environ, 'PYTHONIOENCODING': encoding}
    done = subprocess.run(
        ['bash', '-c', f'{shell}; exit ${{PIPESTATUS[0]}}'], env=environment, timeout=30
    )
    assert done.returncode == 0
    assert (tmp_path / 'file').read_text() == 'content'


def test_output_reaches_its_reader(tmp_path):
    (tmp_path / 'program.py').write_text(STREAMS)
    root = pathlib.Path(startup.__file__).parent.parent
    command = [sys.executable, tmp_path / 'program.py', root, tmp_path / 'file']
    done = subprocess.run(command, capture_output=True, encoding='utf-8', timeout=30)
    assert done.stdout == 'x · y' * 40_000 + '\n'
    assert done.stderr == 'error\n'
