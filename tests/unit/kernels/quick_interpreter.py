"""Triton's CPU interpreter without what takes most of its time and changes no result; for programs that have set
TRITON_INTERPRET. See interpreted.py."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Patch the interpreter of this process."""
    builder = interpreter.interpreter_builder
    # It computes each sum of integers a second time, in 64 bits, for an assertion that only `debug` looks at.
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _make_no_table_for_each_value()
    _prepare_the_language_once_for_each_launch()


def _make_no_table_for_each_value() -> None:
    """The table from Triton's types to numpy's is made again for each value that is cast."""
    of_scalar = functools.cache(interpreter._get_np_dtype)

    def numpys(dtype: Any) -> np.dtype:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    interpreter._get_np_dtype = numpys


def _prepare_the_language_once_for_each_launch() -> None:
    """Each call of a device function replaces the language's functions, which its kernel has replaced already."""
    prepared: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def call(function: Any, *args: Any, **options: Any) -> Any:
        names = function.fn.__globals__
        if id(names) not in prepared:
            prepared.add(id(names))
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **options)

    def launch_anew(executor: Any, *args: Any, **options: Any) -> None:
        prepared.clear()  # at the end of a launch they are put back
        launch(executor, *args, **options)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = launch_anew
