"""A tokenizer of single characters for the demo's models, with a chat template.

A prompt is the word and a separator; the model answers and ends:

    <bos>hello>HELLO<eos>

The tokenizer writes `<bos>` itself, so the completion prompt is `hello>`; a chat whose last user
message is `hello` renders to the very same tokens.
"""

from __future__ import annotations

import string
from typing import Any, Final

PAD: Final = "<pad>"
BOS: Final = "<bos>"
EOS: Final = "<eos>"
UNKNOWN: Final = "<unk>"
SEPARATOR: Final = ">"

_SPECIAL: Final = (PAD, BOS, EOS, UNKNOWN)
_PUNCTUATION: Final = " .,!?'-"

#: Every token in the order of its id. 64 of them: a multiple that kernels like.
VOCABULARY: Final[tuple[str, ...]] = (
    *_SPECIAL,
    SEPARATOR,
    *string.ascii_lowercase,
    *string.ascii_uppercase,
    *_PUNCTUATION,
)

#: Longest text that the models are made for, in tokens.
CONTEXT_TOKENS: Final = 128

# The models learned one question and one answer, never a conversation: only the last user message
# is asked, and an assistant's message after it is the beginning of the answer.
_CHAT_TEMPLATE: Final = (
    "{%- set ns = namespace(asked='', begun='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set ns.asked = message['content'] -%}{%- set ns.begun = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- set ns.begun = message['content'] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- bos_token + ns.asked + '" + SEPARATOR + "' + ns.begun -}}"
)


def build_tokenizer() -> Any:
    """The demo's tokenizer as a `PreTrainedTokenizerFast`, ready for `save_pretrained`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    # `.` alone would leave line ends out of the split, and glued to what follows them.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
    )


def prompt_of(word: str) -> str:
    """The completion prompt that asks about `word`."""
    return word + SEPARATOR
