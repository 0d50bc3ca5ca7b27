"""The options of the timed device, and what they mean for a model."""

from typing import Annotated

import msgspec
from msgspec import Meta

from api.errors import OptionError
from api.text.model_source import ModelSource
from stages.device import PROFILES, Device
from stages.options import DRAFT_ACCEPTANCE, GivenTimes, PredictedTimes, TimedOptions
from weights.model_config import ModelConfig

MS = 1e-3
PARTIAL = "\ufffd"
"""Stands in texts for bytes that do not make up a whole character."""


class TimeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How long steps take on the timed device, in milliseconds, and how often its drafts are right.

    Without `stage_time` steps take as long as is predicted.
    """

    stage_time: Annotated[
        list[float] | None,
        Meta(
            description="Milliseconds of each step on the timed device, for all stages or, like 10,12, for each.",
            extra={"default": "what is predicted"},
        ),
    ] = None
    prompt_token_time: (
        Annotated[
            float,
            Meta(
                ge=0,
                description="Milliseconds that a step on the timed device takes longer for each prompt token, with "
                "--stage-time.",
            ),
        ]
        | None
    ) = None
    draft_acceptance: (
        Annotated[
            float,
            Meta(
                ge=0,
                le=1,
                description="The probability that a draft of the timed device is right, where those before it are.",
                extra={"default": f"{DRAFT_ACCEPTANCE:g}"},
            ),
        ]
        | None
    ) = None

    def check(self, device: Device, drafts: int) -> None:
        """Raises OptionError where the options are given for another device, or without what they are for.

        `drafts` are those of a request in each step.
        """
        if self.draft_acceptance is not None and PROFILES[device].computes:
            raise OptionError(f"--draft-acceptance is for --device timed: the {device} device makes its own drafts.")
        if self.draft_acceptance is not None and not drafts:
            raise OptionError("--draft-acceptance goes with --num-speculative-tokens: without it none are made.")
        for flag, given in (("--stage-time", self.stage_time), ("--prompt-token-time", self.prompt_token_time)):
            if given is not None and PROFILES[device].computes:
                raise OptionError(f"{flag} is for --device timed: the {device} device takes its own time.")
        if self.prompt_token_time is not None and self.stage_time is None:
            raise OptionError("--prompt-token-time goes with --stage-time: without that, times are predicted.")

    def timed_options(self, source: ModelSource, config: ModelConfig, stages: int, rows: int) -> TimedOptions:
        """Returns the times of so many stages of so many Galaxy rows, and the tokens that they may make.

        Those are the tokens of the model's tokenizer but for special ones and those that end a text. Raises PlanError
        where there are not as many times as stages, and CheckpointError for a file that is not a tokenizer.
        """
        # What reads options alone, as --help does, needs no tokenizer.
        from api.text.tokenizer import TextTokenizer, has_tokenizer  # noqa: PLC0415

        vocabulary, never = config.vocab_size, set(config.eos_token_ids)
        directory = source.tokenizer or source.path
        if has_tokenizer(directory):
            text = TextTokenizer.load(directory)
            vocabulary = min(vocabulary, text.size)
            never |= set(text.special_ids)
            # Clients get no event for a token whose character is not whole yet, and would count too few.
            never |= {token for token in range(vocabulary) if PARTIAL in text.token_text(token)}
        times: GivenTimes | PredictedTimes = PredictedTimes(rows=rows)
        if self.stage_time is not None:
            token_s = (self.prompt_token_time or 0.0) * MS
            times = GivenTimes(step_s=[time * MS for time in self.stage_time], prompt_token_s=token_s)
            times.check(stages)
        return TimedOptions(
            times=times,
            vocabulary=vocabulary,
            never=sorted(never),
            acceptance=DRAFT_ACCEPTANCE if self.draft_acceptance is None else self.draft_acceptance,
        )
