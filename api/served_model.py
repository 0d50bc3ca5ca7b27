"""The model as clients see it: its name, its limits and its text."""

import msgspec

from api.generation_config import GenerationConfig
from api.tokenizer import TextTokenizer


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the front end knows of the model.

    `name` is what requests call it, `root` where it came from. A prompt and its completion have at most
    `max_model_len` tokens. `eos_token_ids` end a completion. `created` is in seconds since 1970.
    """

    name: str
    root: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    tokenizer: TextTokenizer
    generation: GenerationConfig
    created: int
