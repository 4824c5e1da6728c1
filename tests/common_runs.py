"""Reads what runs leave behind, for the tests that compare them."""

import json
import pathlib
from typing import Any

MEASURED = {'tokens_per_second', 'mfu', 'host_bytes'}  # on this machine, at this time


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl, without what was measured on the machine."""
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]
