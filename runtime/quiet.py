"""Loading small models without a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(hide: bool = True) -> Iterator[None]:
    """Within it, transformers shows no progress bars; with `hide=False` it does as it likes."""
    from transformers.utils import logging

    hide = hide and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()
