"""What is compiled: moshi's small functions and ours, on a GPU, and not on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from moshi.utils.compile import no_compile, torch_compile_lazy
from torch import Tensor

_for_good = ExitStack()
Function = TypeVar("Function", bound=Callable[..., Any])


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


def fused(function: Function) -> Function:
    """One kernel or two in place of many, for a function of small operations.

    Compiled where its first argument, a tensor, is on a GPU and where moshi compiles its own.
    """
    compiled = torch_compile_lazy(function)

    @wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        return (compiled if first.is_cuda else function)(first, *others)

    return run  # type: ignore[return-value]
