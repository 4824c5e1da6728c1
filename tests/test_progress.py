"""Progress of long work: a line that is rewritten on a terminal, a few lines elsewhere."""

import io
import threading
import time

import pytest

from machine import progress as module
from machine.progress import CLEAR, Progress, hours, interruptible, patiently, track


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])
    return now


def test_a_file_receives_a_line_for_each_tenth(clock):
    file = io.StringIO()
    with Progress('reading', 40, stream=file) as progress:
        for i in range(1, 41):
            clock[0] += 0.5
            progress.show(i, f'{i} files')
    lines = file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[4] == 'reading  [##########          ]  50%  20 files  ETA 0:00:10'
    assert lines[-1] == 'reading  [####################] 100%  40 files  ETA 0:00:00'


def test_work_of_less_than_a_second_says_nothing(clock):
    for stream in (io.StringIO(), Screen()):
        with Progress('reading', 2, stream=stream) as progress:
            clock[0] += 0.4
            progress.add(1)
            clock[0] += 0.4
            progress.add(1)
        assert stream.getvalue() == ''


def test_a_terminal_has_one_line(clock, monkeypatch):
    monkeypatch.setenv('COLUMNS', '30')
    screen = Screen()
    with Progress('reading', 1000, silent=0, stream=screen) as progress:
        for _ in range(1000):
            clock[0] += 0.01
            progress.add(1)
    *drawn, last = screen.getvalue().split(CLEAR)[1:]
    assert 90 <= len(drawn) <= 101  # ten in a second
    assert all(len(line) == 29 for line in drawn)  # none that the terminal would break
    assert last == 'reading  [###################\n'


def test_what_was_done_before_does_not_count_for_the_time(clock):
    file = io.StringIO()
    progress = Progress('', 100, before=80, silent=0, stream=file)
    clock[0] += 10
    progress.show(90)
    assert file.getvalue() == '[##################  ]  90%  ETA 0:00:10\n'


def test_streams_that_cannot_be_written_end_no_work(clock):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        progress = Progress('', 2, silent=0, stream=stream)
        progress.add(1)
        progress.close()


def test_items_are_tracked(clock, capsys):
    def slow():
        for i in range(4):
            clock[0] += 1
            yield i

    assert list(track(slow(), 'checking', 4)) == [0, 1, 2, 3]
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_hours():
    assert [hours(s) for s in (0, 59.6, 3600, 360_000)] == [
        '0:00:00',
        '0:01:00',
        '1:00:00',
        '100:00:00',
    ]


def test_patience(monkeypatch, capsys):
    monkeypatch.setattr(module, 'SILENT_SECONDS', 0.05)
    with patiently('quick'):
        pass
    with patiently('slow'):
        time.sleep(0.3)
    assert capsys.readouterr().err == 'slow\n'


def test_a_call_in_a_thread():
    assert interruptible(lambda a, b: (a + b, threading.current_thread().daemon), 1, 2) == (3, True)
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)
