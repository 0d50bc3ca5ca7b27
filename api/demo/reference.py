"""Reference files of teacher forcing: written with Hugging Face's model, read, and compared with predictions."""

import pickle  # nosec B403 # its error alone, which torch.load raises
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from api.client.progress import LongWork
from api.errors import OptionError
from api.settings.paths import prepare_file
from api.text.model_source import ModelSource, check_model_files
from api.text.tokenizer import TextTokenizer
from weights.errors import CheckpointError
from weights.model_config import ModelConfig
from weights.sample.spans import texts

if TYPE_CHECKING:
    import torch


TOP = 5

"""How many best tokens of each position a file may hold."""


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """`tokens` [T]; `top5[position]`, where the file has them, are the best tokens for that position, best first.

    `prompt_length` of the tokens are the prompt, the others what the model should predict.
    """

    path: Path
    tokens: list[int]
    top5: list[list[int]] | None
    prompt_length: int


def read_reference_file(path: Path, prompt_length: int | None = None) -> Reference:
    """Reads a file that torch.save wrote: a dict of `reference_tokens` [1, T] and perhaps `top5_tokens`.

    `top5_tokens` has a row for each position, [T, 5], or, as tt_transformers' helpers write it, one for the position
    after each token, [T - 1, 5]. The prompt is the first T // 2 + 1 tokens unless `prompt_length` says otherwise.
    Nothing in the file is executed. Raises OptionError where it is not there, is something else, or leaves nothing to
    predict.
    """
    content = _load(path)
    tokens = _integers(content, "reference_tokens", path)
    if tokens is None:
        raise OptionError(f"'{path}' has no 'reference_tokens': it is not a reference file.")
    if tokens.dim() not in {1, 2} or tokens.numel() != tokens.shape[-1]:
        raise OptionError(f"'{path}': reference_tokens has shape {list(tokens.shape)} where [1, T] is expected.")
    count = tokens.numel()
    length = count // 2 + 1 if prompt_length is None else prompt_length
    if not 1 <= length < count:
        raise OptionError(f"'{path}' holds {count} tokens: a prompt of {length} leaves none to predict.")
    return Reference(
        path=path, tokens=tokens.reshape(-1).tolist(), top5=_top5(content, count, path), prompt_length=length
    )


def _load(path: Path) -> dict[Any, Any]:
    import torch  # noqa: PLC0415 - no other part of the command line needs it

    if not path.is_file():
        raise OptionError(f"Reference file does not exist: '{path}'.")
    try:
        with warnings.catch_warnings():
            # The error has what torch warns of in files that it refuses.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        first = str(error).partition("\n")[0]
        raise OptionError(f"'{path}' is not a reference file that can be read safely: {first}") from error
    if not isinstance(content, dict):
        raise OptionError(
            f"'{path}' holds {type(content).__name__} where a dict is expected: it is not a reference file."
        )
    return content


def _top5(content: dict[Any, Any], count: int, path: Path) -> list[list[int]] | None:
    rows = _integers(content, "top5_tokens", path)
    if rows is None:
        return None
    if tuple(rows.shape) not in {(count, TOP), (count - 1, TOP)}:
        raise OptionError(f"'{path}': top5_tokens has shape {list(rows.shape)} where [{count}, {TOP}] is expected.")
    listed: list[list[int]] = rows.tolist()
    return listed if len(listed) == count else [[], *listed]


def _integers(content: dict[Any, Any], key: str, path: Path) -> Any:
    """The tensor `key`, or None. Raises OptionError unless it holds whole numbers."""
    import torch  # noqa: PLC0415 - as above

    found = content.get(key)
    if found is None:
        return None
    if not isinstance(found, torch.Tensor) or found.is_floating_point() or found.is_complex():
        raise OptionError(f"'{path}': {key} is not a tensor of token ids.")
    return found


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Shares in [0, 1]; `top5` is None where the reference has no best tokens."""

    top1: float
    top5: float | None


def accuracy(reference: Reference, predicted: Sequence[int]) -> Accuracy:
    """Compares predictions for the positions from the reference's prompt on.

    Top-1 counts those that equal the best token of their position, or the reference's own where best ones are not
    given; top-5 those among the five best.
    """
    begin = reference.prompt_length
    total = len(predicted)
    if reference.top5 is None:
        truth = reference.tokens[begin : begin + total]
        return Accuracy(top1=_share(map(int.__eq__, predicted, truth), total), top5=None)
    rows = reference.top5[begin : begin + total]
    return Accuracy(
        top1=_share((token == row[0] for token, row in zip(predicted, rows, strict=True)), total),
        top5=_share((token in row for token, row in zip(predicted, rows, strict=True)), total),
    )


def _share(matches: Iterable[bool], total: int) -> float:
    return sum(matches) / total


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
    prepare_file(settings.output_file, "--output-file")
    tokens = _tokens(settings)
    # Imports of seconds, which no other command of this process needs.
    import torch  # noqa: PLC0415

    model = _load_model(settings.source.path)
    best = torch.zeros(len(tokens), TOP, dtype=torch.long)
    starts = range(0, len(tokens) - 1, CHUNK_TOKENS)
    with work.steps("Predicting", len(starts)) as done:
        for start, logits in zip(starts, _logits(model, tokens[:-1]), strict=True):
            best[start + 1 : start + 1 + len(logits)] = logits.topk(TOP, dim=-1).indices
            done(f"{start + len(logits)} tokens")
    try:
        torch.save({"reference_tokens": torch.tensor([tokens]), "top5_tokens": best}, settings.output_file)
    except (OSError, RuntimeError) as error:
        raise OptionError(f"Cannot write --output-file '{settings.output_file}': {error}.") from error
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


def _load_model(path: Path) -> Any:
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
