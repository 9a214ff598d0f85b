"""The demo zoo: a tiny base, five full fine-tunes of it, and how both are made."""

from __future__ import annotations
