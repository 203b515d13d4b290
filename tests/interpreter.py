"""Triton's interpreter, faster: what it puts into the language for a launch is found once, and not again for every function that is called.

It looked through all of `triton.language` at each launch and each call of a function within one, which took a third of the time of tests.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class Patch(interpreter._LangPatchScope):
    """What a launch has put into the language until it ends."""

    running = False

    def restore(self) -> None:
        super().restore()
        Patch.running = False


def patch_once() -> None:
    """For the whole process."""
    find = interpreter._patch_lang
    # Of kernels and of the language's own functions, such as tl.max.
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    found: list[tuple[object, str, Any]] = []

    def patched(fn: object) -> interpreter._LangPatchScope:
        del fn
        if Patch.running:
            return interpreter._LangPatchScope()
        scope = Patch()
        if found:
            for place, name, value in found:
                scope.set_attr(place, name, value)
        else:
            scope._changes = find(everywhere)._changes
            found.extend((place, name, vars(place)[name]) for place, name, _ in scope._changes)
        Patch.running = True
        return scope

    interpreter._patch_lang = patched
