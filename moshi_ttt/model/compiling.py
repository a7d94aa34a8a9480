"""Whether moshi compiles its small functions: on a GPU, and not on a CPU."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import cache

import torch
from moshi.utils.compile import no_compile

_for_good = ExitStack()


@cache
def compile_on_gpu_only() -> None:
    """Keep moshi from compiling in this process if it has no GPU; called wherever models are made.

    On a CPU its first forward would otherwise spend 30 to 45 s in torch.compile, for a gain that a
    short run never sees. It asks moshi at the time of each call, so that nothing depends on who
    imported moshi when. `NO_TORCH_COMPILE`, which moshi itself reads when it is imported, decides
    wherever it is set: 1 never compiles, an empty one compiles on a CPU too.
    """
    if not torch.cuda.is_available() and "NO_TORCH_COMPILE" not in os.environ:
        _for_good.enter_context(no_compile())
