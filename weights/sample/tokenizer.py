"""The sample model's tokenizer: byte-level BPE with DeepSeek's special tokens and chat format."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"

CONTROL_TOKENS = (BOS, EOS, PAD)
"""Tokens that `skip_special_tokens` drops; their ids are 0, 1 and 2, as in DeepSeek-V3."""

FORMAT_TOKENS = (
    USER,
    ASSISTANT,
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
"""Tokens that `skip_special_tokens` keeps in decoded text, as with DeepSeek: parsers of reasoning look for them."""

CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='', outputs=false) -%}"
    "{%- for message in messages if message['role'] == 'system' -%}"
    "{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message['content'] -%}"
    "{%- endfor -%}"
    "{%- if tools is defined and tools -%}"
    "{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + '## Tools\\n"
    "You have access to the following tools:\\n' -%}"
    "{%- for tool in tools -%}"
    "{%- set ns.system = ns.system + '\\n### ' + tool['function']['name'] + '\\nDescription: ' "
    "+ (tool['function']['description'] or '') + '\\n\\nParameters: ' "
    "+ ((tool['function']['parameters'] or {}) | tojson) + '\\n' -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ bos_token + ns.system }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ ('<｜tool▁outputs▁end｜>' if ns.outputs else '') + '<｜User｜>' + message['content'] }}"
    "{%- set ns.outputs = false -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<｜tool▁outputs▁end｜>' if ns.outputs else '<｜Assistant｜>' }}"
    "{%- set ns.outputs = false -%}"
    "{{ (message['content'] or '').split('</think>')[-1].lstrip('\\n') }}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{ '<｜tool▁calls▁begin｜>' if loop.first else '\\n' }}"
    "{%- set arguments = call['function']['arguments'] -%}"
    "{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' "
    "+ (arguments if arguments is string else arguments | tojson) + '\\n```<｜tool▁call▁end｜>' }}"
    "{{ '<｜tool▁calls▁end｜>' if loop.last else '' }}"
    "{%- endfor -%}"
    "{{ eos_token }}"
    "{%- elif message['role'] == 'tool' -%}"
    "{{ ('\\n' if ns.outputs else '<｜tool▁outputs▁begin｜>') "
    "+ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}"
    "{%- set ns.outputs = true -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{ '<｜tool▁outputs▁end｜>' if ns.outputs else '' }}"
    "{%- if add_generation_prompt -%}"
    "{{ '' if ns.outputs else '<｜Assistant｜>' }}"
    "{%- if thinking is defined and thinking -%}{{ '<think>\\n' }}{%- endif -%}"
    "{%- endif -%}"
)
"""A Jinja template: system text and the list of tools first, then the turns.

Thoughts of former turns are left out, as in DeepSeek-R1. Calls and what the tools returned are written as in
DeepSeek-V3-0324, where the answer follows the tools' outputs with no token between them.
"""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a tokenizer of exactly `vocabulary` tokens on `texts`; encoding puts BOS first.

    The alphabet contains all 256 bytes, so that any text can be encoded and decoded without loss.

    Raises:
        ValueError: the texts are too short to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*CONTROL_TOKENS, *FORMAT_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"The corpus gives {tokenizer.get_vocab_size()} tokens; {vocabulary} are wanted: add text.")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return _with_visible_format_tokens(tokenizer)


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `directory`; `max_length` is in tokens."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": max_length,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _with_visible_format_tokens(tokenizer: Tokenizer) -> Tokenizer:
    # The trainer marks all its tokens as special; the library can change that only through the serialised tokenizer.
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(state))
