"""The options of drafts by multi-token prediction, in the two spellings that vLLM's users have."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api.errors import OptionError
from api.settings.option import again
from stages.options import DRAFTS_MAX, DraftOptions
from weights.model_config import ModelConfig

METHODS = ("mtp", "deepseek_mtp")
"""What vLLM calls drafts by a model's own layers, and what it called those of this family before."""

EXAMPLE = '{"method": "mtp", "num_speculative_tokens": 1}'


class DraftSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens are drafted for each request and step: two ways to say it, None where one is not used.

    Raises OptionError where `speculative_config` asks for what is not served, or the two do not agree.
    """

    num_speculative_tokens: Annotated[int, again(DraftOptions, "num_speculative_tokens", default="0")] | None = None
    speculative_config: (
        Annotated[str, Meta(description=f"The same as vLLM has it, a JSON object: '{EXAMPLE}'.")] | None
    ) = None

    def __post_init__(self) -> None:
        _ = self.count

    @property
    def count(self) -> int:
        """The drafts of a request in each step, 0 for none."""
        given = self.num_speculative_tokens
        if self.speculative_config is None:
            return given or 0
        count = configured_drafts(self.speculative_config)
        if given not in {None, count}:
            raise OptionError(
                f"--speculative-config asks for {count} speculative tokens and --num-speculative-tokens for {given}: "
                "leave one of them out."
            )
        return count

    def options(self, config: ModelConfig) -> DraftOptions:
        """What all stages are told. Raises OptionError where the model has no layer for drafts."""
        count = self.count
        if count and not config.num_nextn_predict_layers:
            raise OptionError(
                "The model has no multi-token-prediction layer to draft tokens with (num_nextn_predict_layers is 0 in "
                "its config.json): run it without drafts."
            )
        return DraftOptions(num_speculative_tokens=count)


def configured_drafts(text: str) -> int:
    """The drafts that a value of --speculative-config asks for, by default one: the layers that such models have.

    Raises OptionError where it is not a JSON object, or asks for what is not served.
    """
    fields = _object(text)
    method, count = fields.pop("method", METHODS[0]), fields.pop("num_speculative_tokens", 1)
    if method not in METHODS:
        raise OptionError(
            f'--speculative-config: the method {method!r} is not served, only "mtp", drafts by the model\'s own '
            "multi-token-prediction layer."
        )
    if fields:
        raise OptionError(
            f"--speculative-config: {' and '.join(map(repr, sorted(fields)))} cannot be set: it takes method and "
            "num_speculative_tokens."
        )
    if type(count) is not int or not 1 <= count <= DRAFTS_MAX:
        raise OptionError(
            f"--speculative-config: num_speculative_tokens is {count!r}: give a whole number from 1 to {DRAFTS_MAX}."
        )
    return count


def _object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.ValidationError:
        raise OptionError(f"--speculative-config {text!r} is not a JSON object: write it like '{EXAMPLE}'.") from None
    except msgspec.DecodeError as error:
        raise OptionError(f"--speculative-config {text!r} is not JSON ({error}): write it like '{EXAMPLE}'.") from error
