"""The model that the server serves: its name, its limits, its tokenizer and its generation config."""

import time

import msgspec

from api.text.generation_config import MODELS_OWN, GenerationConfig
from api.text.model_source import ModelSource
from api.text.tokenizer import TextTokenizer
from weights.model_config import ModelConfig

DEFAULT_MAX_LOGPROBS = 20
WHOLE_VOCABULARY = -1
"""The number of log-probabilities that stands for those of all tokens."""


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The model as the front end needs it.

    `name` is its name in requests, and `root` where it came from. A prompt and its completion have at most
    `max_model_len` tokens, and log-probabilities of at most `max_logprobs` tokens at each position, or of all with
    WHOLE_VOCABULARY. `eos_token_ids` end a completion. `created` is in seconds since 1970.
    """

    name: str
    root: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    tokenizer: TextTokenizer
    generation: GenerationConfig
    created: int
    max_logprobs: int = DEFAULT_MAX_LOGPROBS

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
        text = TextTokenizer.load(source.tokenizer or source.path)
        generation = GenerationConfig.named(generation_config, source.path)
        eos = {*config.eos_token_ids, *generation.eos_token_ids}
        if text.eos_token_id is not None:
            eos.add(text.eos_token_id)
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
        )
