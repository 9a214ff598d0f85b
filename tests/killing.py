"""Runs that end at a chosen change of the disk, as if the process had been killed there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


class Killed(BaseException):
    """The process is gone: nothing happens from here on."""


@contextlib.contextmanager
def killed_at(
    step: int, *others: tuple[object, str], counted: list[str] | None = None
) -> Iterator[list[bool]]:
    """Let the n-th change of the disk be the last; says afterwards whether it came to that.

    Args:
        step: how many changes are made.
        others: further functions that change the disk, by where they are and their name.
        counted: gets the name of each change that was made.
    """
    left, killed, opened = [step], list[bool](), set[int]()
    os_open, os_close = os.open, os.close

    def guarded(work):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            found = work(*args, **options)
            if counted is not None:
                counted.append(work.__name__)
            return found

        return call

    def noted_open(*args, **options):
        opened.add(descriptor := os_open(*args, **options))
        return descriptor

    def noted_close(descriptor):
        opened.discard(descriptor)
        os_close(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "symlink_to"):
            patch.setattr(Path, name, guarded(getattr(Path, name)))
        patch.setattr(os, "link", guarded(os.link))
        patch.setattr(shutil, "rmtree", guarded(shutil.rmtree))
        for owner, name in others:
            patch.setattr(owner, name, guarded(getattr(owner, name)))
        patch.setattr(os, "open", noted_open)
        patch.setattr(os, "close", noted_close)
        try:
            yield killed
        except Killed:
            killed.append(True)
    # A process that has ended holds no locks.
    for descriptor in opened:
        os_close(descriptor)
