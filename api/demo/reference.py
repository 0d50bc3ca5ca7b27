"""`galaxyline reference`: a reference file of teacher forcing, made by Hugging Face's own model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from api.client.progress import LongWork
from api.errors import OptionError
from api.text.model_source import ModelSource, check_model_files
from api.text.tokenizer import TextTokenizer
from weights.errors import CheckpointError
from weights.model_config import ModelConfig
from weights.sample.documents import texts

if TYPE_CHECKING:
    import torch

TOP = 5
CHUNK_TOKENS = 512
"""Tokens of one forward pass: bounds the logits that are held at a time."""


class ReferenceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `reference`: the first `total_length` tokens of the text in `text_file` go to `output_file`.

    Without a text it is the one that comes with the program, which the sample model was trained on.
    """

    source: ModelSource
    text_file: Path | None
    output_file: Path
    total_length: int


def write_reference(settings: ReferenceSettings, work: LongWork) -> int:
    """Writes `reference_tokens` [1, T] and `top5_tokens` [T, 5], the model's best tokens for each position; returns T.

    Row 0 of the latter has no meaning: nothing stands before the first token. The model computes in float32. Raises
    OptionError where the text cannot be read or is too short, or the file cannot be written, and CheckpointError where
    the model cannot be loaded.
    """
    check_model_files(settings.source, needs_weights=True)
    tokens = _tokens(settings)
    # Imports of seconds, which no other command of this process needs.
    import torch  # noqa: PLC0415

    model = _load(settings.source.path)
    best = torch.zeros(len(tokens), TOP, dtype=torch.long)
    starts = range(0, len(tokens) - 1, CHUNK_TOKENS)
    with work.steps("Predicting", len(starts)) as done:
        for start, logits in zip(starts, _logits(model, tokens[:-1]), strict=True):
            best[start + 1 : start + 1 + len(logits)] = logits.topk(TOP, dim=-1).indices
            done(f"{start + len(logits)} tokens")
    try:
        settings.output_file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"reference_tokens": torch.tensor([tokens]), "top5_tokens": best}, settings.output_file)
    except (OSError, RuntimeError) as error:
        raise OptionError(f"Cannot write '{settings.output_file}': {error}.") from error
    return len(tokens)


def _tokens(settings: ReferenceSettings) -> list[int]:
    text = "\n\n".join(texts()) if settings.text_file is None else _text(settings.text_file)
    tokenizer = TextTokenizer.load(settings.source.tokenizer or settings.source.path)
    positions = ModelConfig.from_file(settings.source.path / "config.json").max_position_embeddings
    tokens = tokenizer.encode(text)[: min(settings.total_length, positions)]
    if len(tokens) < TOP:
        raise OptionError(f"'{settings.text_file}' gives {len(tokens)} tokens: a reference takes at least {TOP}.")
    return tokens


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"Cannot read the text '{path}': {error.strerror}.") from error
    except UnicodeDecodeError:
        raise OptionError(f"'{path}' is not a UTF-8 text.") from None


def _load(path: Path) -> Any:
    import torch  # noqa: PLC0415 - as above
    from transformers import DeepseekV3ForCausalLM  # noqa: PLC0415

    try:
        model: Any = DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"Hugging Face's model cannot be loaded from '{path}': {first}") from error
    return model.eval()


def _logits(model: Any, tokens: list[int]) -> "Iterator[torch.Tensor]":
    """Yields logits [n, vocabulary] of what follows each token, for each chunk of `tokens`."""
    import torch  # noqa: PLC0415 - as above

    cache = None
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = torch.tensor([tokens[start : start + CHUNK_TOKENS]])
        with torch.inference_mode():
            output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield output.logits[0]
