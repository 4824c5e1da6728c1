"""The output of a run on a terminal and in a file."""

import io
import re

import jax.numpy as jnp

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
