"""On a CPU nothing is compiled, on a GPU moshi does as it likes, whoever imported moshi when."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys, torch
first, gpu = sys.argv[1:]
torch.cuda.is_available = lambda: gpu == "gpu"
compiled = []
torch.compile = lambda function: compiled.append(function) or function
importlib.import_module(first)
from moshi_ttt.model.source import open_source
lm = open_source("tiny").lm()
with torch.no_grad():
    lm(torch.zeros(1, 17, 4, dtype=torch.long))
print("compiled" if compiled else "as it is")
"""


@pytest.mark.parametrize(
    ("first", "gpu", "setting", "expected"),
    [
        ("moshi.models", "none", {}, "as it is"),
        ("moshi_ttt.model.source", "none", {}, "as it is"),
        ("moshi_ttt.model.source", "gpu", {}, "compiled"),
        ("moshi.models", "gpu", {"NO_TORCH_COMPILE": "1"}, "as it is"),
    ],
)
def test_whether_moshi_compiles_does_not_depend_on_the_order_of_imports(
    first: str, gpu: str, setting: dict[str, str], expected: str
) -> None:
    environment = {key: os.environ[key] for key in os.environ if key != "NO_TORCH_COMPILE"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, first, gpu],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)} | setting,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
