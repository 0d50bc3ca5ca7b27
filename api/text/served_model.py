"""The model that a server serves: its name, tokenizer and eos tokens, and what its generation_config.json advises."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from api.text.model_source import ModelSource
from stages.options import VocabularyOptions
from weights.errors import CheckpointError
from weights.model_config import ModelConfig, read_bounded

if TYPE_CHECKING:
    from api.text.grammar_checker import GrammarChecker
    from api.text.tokenizer import TextTokenizer

GENERATION_CONFIG_FILE = "generation_config.json"

GENERATION_CONFIG_BYTES_MAX = 1 << 20

MODELS_OWN = "auto"

NO_ADVICE = "vllm"

"""The values of --generation-config that are not directories: the model's own file, or none and vLLM's defaults."""


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that change what is generated, under their names in the file; None where the file has none."""

    eos_token_id: int | list[int] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a completion, as a list."""
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @classmethod
    def named(cls, name: str, model: Path) -> "GenerationConfig":
        """Loads what --generation-config `name` stands for, with a model in the directory `model`.

        Raises CheckpointError where a directory has no such file, and like `load`.
        """
        if name == NO_ADVICE:
            return cls()
        if name == MODELS_OWN:
            return cls.load(model)
        if not (Path(name) / GENERATION_CONFIG_FILE).is_file():
            raise CheckpointError(f"--generation-config: {name} has no {GENERATION_CONFIG_FILE}.")
        return cls.load(Path(name))

    @classmethod
    def load(cls, directory: Path) -> "GenerationConfig":
        """Reads the file in a model's directory; without one, nothing is advised.

        Raises CheckpointError where the file cannot be read, is not JSON, or a key has the wrong type or range.
        """
        path = directory / GENERATION_CONFIG_FILE
        content = read_bounded(path, GENERATION_CONFIG_BYTES_MAX)
        if content is None:
            return cls()
        try:
            return msgspec.convert(json.loads(content), cls)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a generation config: {error}.") from error


DEFAULT_MAX_LOGPROBS = 20

WHOLE_VOCABULARY = -1

"""The number of log-probabilities that stands for those of all tokens."""


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The model as the front end needs it.

    `name` is its name in answers, `root` where it came from; requests may call it by one of `aliases` too. A prompt
    and its completion have at most `max_model_len` tokens, and log-probabilities of at most `max_logprobs` tokens at
    each position, or of all with WHOLE_VOCABULARY. `eos_token_ids` end a completion. `created` is in seconds since
    1970. `vocabulary` is where the last stage finds the tokenizer, and `grammars` tries out what is to be followed
    there; without both no request can have a grammar.
    """

    name: str
    root: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    tokenizer: "TextTokenizer"
    generation: GenerationConfig
    created: int
    max_logprobs: int = DEFAULT_MAX_LOGPROBS
    aliases: list[str] = []
    vocabulary: VocabularyOptions | None = None
    grammars: "GrammarChecker | None" = None

    @property
    def names(self) -> list[str]:
        """All names that requests may have, the main one first."""
        return [self.name, *self.aliases]

    @property
    def prompt_characters_max(self) -> int:
        """The most characters that a prompt's tokens can stand for."""
        return self.max_model_len * self.tokenizer.characters_per_token_max

    @classmethod
    def load(
        cls,
        source: ModelSource,
        config: ModelConfig,
        max_model_len: int,
        max_logprobs: int = DEFAULT_MAX_LOGPROBS,
        generation_config: str = MODELS_OWN,
    ) -> "ServedModel":
        """Reads the tokenizer and the generation config, which `GenerationConfig.named` finds.

        A token that is EOS in any of the model's files ends a completion. Raises CheckpointError.
        """
        # The options of a server come from this module too, and --help needs no tokenizer.
        from api.text.grammar_checker import GrammarChecker  # noqa: PLC0415
        from api.text.tokenizer import TextTokenizer  # noqa: PLC0415

        text = TextTokenizer.load(source.tokenizer or source.path)
        generation = GenerationConfig.named(generation_config, source.path)
        eos = {*config.eos_token_ids, *generation.eos_token_ids}
        if text.eos_token_id is not None:
            eos.add(text.eos_token_id)
        vocabulary = VocabularyOptions(tokenizer=str(source.tokenizer or source.path), eos_token_ids=sorted(eos))
        return cls(
            name=source.name,
            root=source.root,
            max_model_len=max_model_len,
            vocab_size=config.vocab_size,
            eos_token_ids=sorted(eos),
            tokenizer=text,
            generation=generation,
            created=int(time.time()),
            max_logprobs=max_logprobs,
            aliases=source.aliases,
            vocabulary=vocabulary,
            grammars=GrammarChecker(vocabulary),
        )
