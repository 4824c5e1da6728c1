"""Runs in processes of their own, and the arrays that they save."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import tensorstore as ts

WORKER = pathlib.Path(__file__).with_name('training_worker.py')
TIMEOUT = 300  # seconds, for what would otherwise hang


class Worker:
    """A process of a training run, its output in a file beside the workdir, or in `folder`."""

    def __init__(
        self, workdir: pathlib.Path, setup: dict, folder: pathlib.Path | None = None, **options
    ):
        options = setup | {'workdir': str(workdir)} | options
        self.file = (folder or workdir.parent) / f'output-{time.monotonic_ns()}.txt'
        with open(self.file, 'w') as f:
            self.process = subprocess.Popen(
                [sys.executable, WORKER, json.dumps(options)], stdout=f, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self.file.read_text()

    def wait_for(self, text: str, count: int = 1) -> None:
        """Returns once the output holds the text so many times."""
        deadline = time.monotonic() + TIMEOUT
        while self.output.count(text) < count:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait(TIMEOUT)

    def succeed(self) -> str:
        assert self.end() == 0, self.output
        return self.output


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the leaves of a step by their zarr.json, without the code under test."""
    found = {}
    for path in sorted((folder / 'arrays').iterdir()):
        spec = {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': f'{path}/'}}
        found[path.name] = ts.open(spec).result().read().result()
    return found


def assert_bit_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
