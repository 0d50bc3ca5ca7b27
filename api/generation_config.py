"""generation_config.json: what a model's makers advise where a request does not say."""

import json
from pathlib import Path

import msgspec

from weights.errors import CheckpointError

GENERATION_CONFIG_FILE = "generation_config.json"


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that change what is generated, under their names in the file; None where it does not say."""

    eos_token_id: int | list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a completion, as a list."""
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @classmethod
    def load(cls, directory: Path) -> "GenerationConfig":
        """Reads the file in a model's directory; without one, nothing is advised.

        Raises CheckpointError where the file cannot be read, is no JSON, or a key has the wrong type.
        """
        path = directory / GENERATION_CONFIG_FILE
        try:
            return msgspec.convert(json.loads(path.read_bytes()), cls)
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is no generation config: {error}.") from error
