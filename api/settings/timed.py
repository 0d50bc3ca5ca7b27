"""What the engine's options mean on the timed device."""

from typing import TYPE_CHECKING

from api.errors import OptionError
from api.text.model_source import ModelSource
from api.text.tokenizer import TextTokenizer, has_tokenizer
from stages.timed.options import GivenTimes, PredictedTimes, TimedOptions
from weights.model_config import ModelConfig

if TYPE_CHECKING:
    from api.settings.engine import EngineSettings

MS = 1e-3
PARTIAL = "\ufffd"
"""Stands in texts for bytes that are no whole character."""


def check_timed(settings: "EngineSettings") -> None:
    """Raises OptionError where options of the timed device are given for another, or without each other."""
    for flag, given in (("--stage-time", settings.stage_time), ("--prompt-token-time", settings.prompt_token_time)):
        if given is not None and settings.device != "timed":
            raise OptionError(f"{flag} is for --device timed: the {settings.device} device takes its own time.")
    if settings.prompt_token_time is not None and settings.stage_time is None:
        raise OptionError("--prompt-token-time goes with --stage-time: without that, times are predicted.")


def timed_options(settings: "EngineSettings", source: ModelSource, config: ModelConfig, stages: int) -> TimedOptions:
    """Times, and tokens that the model's tokenizer knows; those that end a text, and special ones, are never made.

    Raises PlanError where there are not as many times as stages, and CheckpointError for a file that is no tokenizer.
    """
    vocabulary, never = config.vocab_size, set(config.eos_token_ids)
    directory = source.tokenizer or source.path
    if has_tokenizer(directory):
        text = TextTokenizer.load(directory)
        vocabulary = min(vocabulary, text.size)
        never |= set(text.special_ids)
        # Clients get no event for a token whose character is not whole yet, and would count too few.
        never |= {token for token in range(vocabulary) if PARTIAL in text.token_text(token)}
    times: GivenTimes | PredictedTimes = PredictedTimes(rows=settings.rows_per_stage)
    if settings.stage_time is not None:
        token_s = (settings.prompt_token_time or 0.0) * MS
        times = GivenTimes(step_s=[time * MS for time in settings.stage_time], prompt_token_s=token_s)
        times.check(stages)
    return TimedOptions(times=times, vocabulary=vocabulary, never=sorted(never))
