"""Fields of the OpenAI and vLLM APIs that are understood only as far as they change nothing.

Clients and frameworks send many fields at their defaults. Those are accepted here; any other value
is refused, because ignoring a wish silently is worse than refusing it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pydantic_core import PydanticCustomError

#: Marks fields that never change an answer, whatever their value.
ANY: Final = object()

#: Field -> the values that are accepted besides null.
GENERATE: Final[dict[str, Any]] = {
    "user": ANY,
    "metadata": ANY,
    "safety_identifier": ANY,
    "prompt_cache_key": ANY,
    "prompt_cache_options": ANY,
    "prompt_cache_retention": ANY,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (True,),
    "prompt_logprobs": (),
}

CHAT: Final[dict[str, Any]] = {
    **GENERATE,
    "parallel_tool_calls": ANY,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
}

COMPLETION: Final[dict[str, Any]] = {**GENERATE, "suffix": ("",)}

#: What a client that keeps a conversation sends back of our own replies.
MESSAGE: Final[dict[str, Any]] = {
    "refusal": (),
    "audio": (),
    "tool_calls": ([],),
    "function_call": (),
    "annotations": ([],),
}

#: `/v1/embeddings` and `/classify`.
POOL: Final[dict[str, Any]] = {
    "user": ANY,
    "priority": (0,),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (True,),
}

TOKENIZE: Final[dict[str, Any]] = {
    "add_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "return_token_strs": (False,),
}

STREAM: Final[dict[str, Any]] = {"include_obfuscation": (False,)}


def drop_neutral(body: Any, table: Mapping[str, Any]) -> Any:
    """The body without the fields of the table.

    Raises:
        PydanticCustomError: `unsupported_value`, when a field asks for something.
    """
    if not isinstance(body, dict):
        return body  # pydantic says what is wrong with it
    for name in body.keys() & table.keys():
        value, accepted = body[name], table[name]
        if value is not None and accepted is not ANY and value not in accepted:
            raise PydanticCustomError(
                "unsupported_value",
                "only {accepted} is supported; leave the field out",
                {"param": name, "accepted": _spelled(accepted)},
            )
    return {name: value for name, value in body.items() if name not in table}


def _spelled(accepted: tuple[Any, ...]) -> str:
    return " or ".join(json.dumps(value) for value in (*accepted, None))
