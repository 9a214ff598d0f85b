"""Zoos of models that do not generate: heads of many kinds on one base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from arch_encoders import _PICTURE, _TEXT
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deltafold.compress import Recipe, compress_checkpoint, parse_spec, restore_checkpoint

# Threads of a pool cost more than they bring on matrices this small.
torch.set_num_threads(1)

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "good",
    "bad",
    "film",
    "was",
    "very",
    "not",
    "hello",
    "world",
    "one",
    "two",
]
ACCEPT = ["new-tensors", "missing-tensors"]


@dataclass(frozen=True)
class Made:
    """A base and its zoo; each variant's restored dense model stands beside them."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def zoo(self) -> Path:
        return self.folder / "zoo"

    def dense(self, name: str) -> Any:
        """A variant as transformers loads it: its own class, float32."""
        folder = self.folder / name
        config = json.loads((folder / "config.json").read_text())
        cls = getattr(transformers, config["architectures"][0])
        return cls.from_pretrained(folder, dtype=torch.float32).eval()

    def tune(
        self,
        cls: Any,
        name: str,
        codec: str,
        files: Any = None,
        moved: Any = None,
        against: str | None = None,
        **config: Any,
    ) -> None:
        """Make, pack and restore a fine-tune of another class.

        Every tensor is moved (`moved`: these are), and taken against the base, quantised or not.
        """
        torch.manual_seed(len(name))
        model = cls.from_pretrained(self.base, **config)
        jitter(model, 0.05, moved)
        full = self.folder / f"{name}-full"
        model.save_pretrained(full)
        if files is not None:
            files(full)
        recipe = Recipe(default=parse_spec(codec))
        compress_checkpoint(
            self.base,
            full,
            self.zoo / name,
            recipe=recipe,
            accept=ACCEPT,
            base_quantization=against,
        )
        restore_checkpoint(self.zoo / name, self.base, self.folder / name, dtype=torch.float32)


def jitter(model: Any, size: float, moved: Any = None) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if moved is None or moved(name):
                value.add_(torch.randn(value.shape) * size)


def tokenizer(folder: Path) -> None:
    """Words and pairs of texts, as BERT has them: `[CLS] a [SEP] b [SEP]`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def texts(folder: Path) -> Made:
    """A BERT that was saved with its masked-language head and without a pooler."""
    made = Made(folder)
    save(transformers.BertForMaskedLM, transformers.BertConfig(**_TEXT), made.base)
    tokenizer(made.base)
    classify = transformers.BertForSequenceClassification
    two = {0: "bad", 1: "good"}
    made.tune(classify, "two", "int:bits=8", tokenizer, num_labels=2, id2label=two)
    several = {"num_labels": 5, "problem_type": "multi_label_classification"}
    made.tune(classify, "five", "lossless", tokenizer, **several)
    made.tune(classify, "grade", "bitdelta", num_labels=1, problem_type="regression")
    made.tune(transformers.BertForTokenClassification, "words", "lossless", num_labels=3)
    made.tune(transformers.BertForMaskedLM, "fill", "lossless")
    made.tune(transformers.BertModel, "bare", "lossless")
    return made


def roberta(folder: Path) -> Made:
    """A RoBERTa with its masked-language head; its classifiers read the first token, without a pooler.

    Positions are counted from the padding token on.
    """
    made = Made(folder)
    sizes = {**_TEXT, "pad_token_id": 1, "max_position_embeddings": 40}
    save(transformers.RobertaForMaskedLM, transformers.RobertaConfig(**sizes), made.base)
    cls = transformers.RobertaForSequenceClassification
    made.tune(cls, "two", "int:bits=8", num_labels=2)
    made.tune(cls, "five", "lossless", num_labels=5)
    return made


def rewards(folder: Path) -> Made:
    """A decoder, and reward models whose configuration knows no padding."""
    made = Made(folder)
    sizes = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": None}
    save(transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes), made.base)
    made.tune(transformers.LlamaForSequenceClassification, "reward", "lossless", num_labels=1)
    made.tune(transformers.LlamaForSequenceClassification, "judge", "int:bits=8", num_labels=3)
    return made


def pictures(folder: Path) -> Made:
    """A bare vision transformer; one variant scales its pictures in a way of its own."""
    made = Made(folder)
    save(transformers.ViTModel, transformers.ViTConfig(**_PICTURE), made.base)
    processor(made.base)
    cls = transformers.ViTForImageClassification
    made.tune(cls, "two", "int:bits=8", processor, num_labels=2)
    made.tune(cls, "five", "lossless", lambda to: processor(to, 0.25), num_labels=5)
    return made


def pairs(folder: Path) -> Made:
    """Texts and pictures in one space."""
    made = Made(folder)
    config = transformers.CLIPConfig(
        text_config={**_TEXT, "projection_dim": 16},
        vision_config={**_PICTURE, "projection_dim": 16},
        projection_dim=16,
    )
    save(transformers.CLIPModel, config, made.base)
    processor(made.base)
    tokenizer(made.base)
    made.tune(transformers.CLIPModel, "art", "lossless", processor)
    return made


def save(cls: Any, config: Any, folder: Path) -> None:
    torch.manual_seed(0)
    model = cls(config).to(torch.float32)
    jitter(model, 0.1)
    model.save_pretrained(folder)


def processor(folder: Path, mean: float = 0.5, side: int = 32) -> None:
    """Pictures to `side` x `side`, then `(x - mean) / 0.5`."""
    content = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
