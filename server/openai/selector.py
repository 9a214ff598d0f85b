"""The `model` field: `sql`, `sql@3f2a`, `base`, `org/base:sql`.

    [BASE:]NAME[@DIGEST]

BASE is the base's own name; NAME a served variant or the base; DIGEST the first hexadecimal digits
(four or more) of the delta's digest, for clients that must not be given another upload under the
same name. A served name that itself has `:` or `@` wins over the syntax.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.engine import Served, VariantInfo

_DIGEST: Final = re.compile(r"(?P<name>.+)@(?:sha256:)?(?P<digest>[0-9a-fA-F]{4,64})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed `model` field; an empty digest matches every digest."""

    name: str
    digest: str = ""

    def check(self, info_name: str, digest: str) -> None:
        """Refuse a variant whose digest is not the one that was asked for."""
        if bare(digest).startswith(self.digest):
            return
        raise DeltafoldError(
            "variant-not-found",
            f"'{info_name}' is not served with the digest that was asked for",
            facts=[("asked", self.digest), ("served", bare(digest))],
            fix=f"ask for '{info_name}@{bare(digest)[:8]}', or for '{info_name}' of any digest",
        )


def bare(digest: str) -> str:
    """The digest's hexadecimal digits."""
    return digest.rpartition(":")[2].lower()


def parse(text: str, base_names: Collection[str]) -> Selector:
    """Take a `model` field apart; never fails, unknown names are the engine's to refuse."""
    match = _DIGEST.fullmatch(text)
    name, digest = (match["name"], match["digest"].lower()) if match else (text, "")
    for base in base_names:
        if name.startswith(f"{base}:") and len(name) > len(base) + 1:
            return Selector(name[len(base) + 1 :], digest)
    return Selector(name, digest)


def find(engine: Served, text: str, served_model_name: str | None) -> tuple[Selector, VariantInfo]:
    """The variant that a `model` field means. May block: the engine may look at the zoo.

    Raises:
        DeltafoldError: `variant-not-found`.
    """
    base_names = {"base", engine.base_name, served_model_name or "base"}
    selector = Selector(text)
    try:
        return selector, _resolve(engine, text, base_names)
    except DeltafoldError as error:
        selector = parse(text, base_names)
        if error.code != "variant-not-found" or selector == Selector(text):
            raise
    info = _resolve(engine, selector.name, base_names)
    selector.check(info.name, info.digest)
    return selector, info


def _resolve(engine: Served, name: str, base_names: Collection[str]) -> VariantInfo:
    return engine.resolve("base" if name in base_names else name)


def fingerprint(base_digest: str, info: VariantInfo) -> str:
    """`df-<base>-<delta>`: what answered, in eight digits each; `base` where no delta did."""
    delta = "base" if info.parent is None else bare(info.digest)[:8]
    return f"df-{bare(base_digest)[:8]}-{delta}"
