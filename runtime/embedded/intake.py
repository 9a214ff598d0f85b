"""From a request for labels or vectors to a task: its variant held, its input read, who is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from deltafold.compress import DeltafoldError
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.embedded.batcher import Task
from deltafold.runtime.embedded.checks import check_prompt
from deltafold.runtime.embedded.heads import Head, Heads, no_head
from deltafold.runtime.embedded.images import ImageFronts, is_picture
from deltafold.runtime.embedded.own import OwnModel
from deltafold.runtime.embedded.text import TextFront, TextFronts
from deltafold.runtime.embedded.trunk import Encoder, Way
from deltafold.runtime.host import Variant
from deltafold.runtime.pooled import PoolRequest

#: What is wanted of a request: hidden states, or what the variant's own class makes of them.
Want: TypeAlias = Literal["states", "answer"]


class Intake:
    """Reads requests by each variant's own tokenizer, image processor and head. Thread-safe.

    Args:
        encoder: the shared trunk.
        deltas: of its variants.
        heads: of its variants.
        max_tokens: most tokens of a text.
    """

    def __init__(self, encoder: Encoder, deltas: Deltas, heads: Heads, max_tokens: int) -> None:
        self._encoder, self._deltas, self._heads = encoder, deltas, heads
        self._max_tokens = max_tokens
        self._fronts = TextFronts(deltas.base_name, deltas.base_folder)
        self._pictures = ImageFronts(deltas.base_folder)

    def task(self, request: PoolRequest, want: Want, finish: Callable[[Task, Any], Any]) -> Task:
        """A task that holds its variant; whoever takes it releases that.

        Raises:
            DeltafoldError: `variant-not-found`; `bad-argument` for what the model cannot read, or
                where an answer is wanted of a variant without a head; `context-length`; and every code
                that loading a delta can give.
        """
        info = self._deltas.resolve(request.variant)
        holder = self._deltas.acquire(request.variant)
        try:
            digest = info.digest if holder is None else holder.digest
            own = _own(holder)
            asked = self._encoder if own is None else _part(own, want, self.folder(holder))
            way, inputs = self._inputs(request.input, holder, asked)
            head = self._head(holder) if want == "answer" and own is None else None
            return Task(
                variant=info.name,
                digest=digest,
                holder=holder,
                asked=asked,
                way=way,
                inputs=inputs,
                head=head,
                finish=finish,
                lacks_pooler=self._lacks_pooler(digest, holder),
            )
        except BaseException:
            self._deltas.release(holder)
            raise

    def folder(self, holder: Variant | None) -> Path:
        """Where a variant's (the base's) configuration and tokenizer are."""
        return self._deltas.base_folder if holder is None else holder.folder

    def with_front(self, name: str, use: Callable[[TextFront], Any]) -> Any:
        """What `use` makes of a variant's tokenizer.

        Raises:
            DeltafoldError: `bad-argument` where the model reads no texts.
        """
        self._need(self._encoder, "text")
        holder = self._deltas.acquire(name)
        try:
            return use(self._front(holder))
        finally:
            self._deltas.release(holder)

    def _head(self, holder: Variant | None) -> Head:
        if holder is None:
            return self._heads.get(self._deltas.base_digest, None)
        return self._heads.get(holder.digest, holder.folder)

    def _lacks_pooler(self, digest: str, holder: Variant | None) -> bool:
        folder = None if holder is None else holder.folder
        return any(n.startswith("pooler.") for n in self._heads.without(digest, folder))

    def _inputs(
        self, given: Any, holder: Variant | None, asked: Encoder
    ) -> tuple[Way, Mapping[str, torch.Tensor]]:
        if is_picture(given):
            self._need(asked, "image")
            return "image", {"pixel_values": self._pictures.pixels(self.folder(holder), given)}
        self._need(asked, "text")
        front, types = self._front(holder), None
        if isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, str) for x in given):
            ids, types = front.encode_pair(*given)
        else:
            ids = front.encode(given)
        check_prompt(ids, front.vocabulary or int(asked.config.get_text_config().vocab_size))
        _check_length(len(ids), min(self._max_tokens, asked.max_tokens))
        inputs = {"input_ids": torch.tensor(ids, dtype=torch.int64)}
        if types is not None and "token_type_ids" in asked.named:
            inputs["token_type_ids"] = torch.tensor(types, dtype=torch.int64)
        return "text", inputs

    def _need(self, asked: Encoder, way: Way) -> None:
        if way not in asked.ways:
            what = {"text": "texts", "image": "pictures"}[way]
            raise DeltafoldError(
                "bad-argument",
                f"{self._deltas.base_name} ({type(asked.model).__name__}) does not read {what}.",
            )

    def _front(self, holder: Variant | None) -> TextFront:
        if holder is None:
            return self._fronts.base()
        return self._fronts.get(holder.digest, holder.name, holder.folder)


def _own(holder: Variant | None) -> OwnModel | None:
    found = None if holder is None else holder.model
    assert found is None or isinstance(found, OwnModel)
    return found


def _part(own: OwnModel, want: Want, folder: Path) -> Encoder:
    """What of a dense model is asked."""
    if want == "answer":
        if own.whole is None:
            raise no_head(folder)
        return own.whole
    if own.trunk is None:
        raise DeltafoldError(
            "bad-argument",
            f"{folder.name} gives labels and no vectors: its class cannot be asked for hidden states.",
            fix="classify with it, or name another variant",
        )
    return own.trunk


def _check_length(tokens: int, most: int) -> None:
    if tokens > most:
        raise DeltafoldError(
            "context-length",
            "the text is longer than the model reads.",
            facts=[("tokens", tokens), ("most", most)],
            fix="shorten the text",
        )
