"""The messages that travel through a pipeline, as msgpack.

A `Step` enters at the first stage and travels with the hidden states; the last stage samples and sends a
`StepResult` to the engine. A stage that fails sends a `StageFailure` the same way. Both ends of every link compare
`PROTOCOL_VERSION` before the first frame, so the structs themselves carry no version.
"""

from typing import Literal

import msgspec

PROTOCOL_VERSION = 1

Mode = Literal["prefill", "decode"]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all messages: positional on the wire, checked on decoding, never changed after sending."""


class SamplingParams(Message, frozen=True, kw_only=True):
    """How to choose the tokens of one request: a function of the request alone.

    `temperature` 0 is greedy; `top_k` 0 means all; `top_p` in (0, 1]. Random numbers are keyed by (`seed`, `choice`,
    position), where `choice` counts the `n` answers of one request.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    choice: int


GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM (its _SAMPLING_EPS)."""


class Admission(Message, frozen=True, kw_only=True):
    """A request takes a slot: the stage forgets whatever the slot held before."""

    slot: int
    sampling: SamplingParams


class Segment(Message, frozen=True, kw_only=True):
    """A run of one request's tokens in a step.

    `start` is the position of `tokens[0]`; `new_blocks` are appended to the slot's page table before the step runs;
    `sample` asks the last stage for the token after the segment's last one. A decode is a segment of one token.
    Prefill segments start at a multiple of the block size.
    """

    slot: int
    start: int
    tokens: list[int]
    new_blocks: list[int]
    sample: bool


class Step(Message, frozen=True, kw_only=True):
    """One pass of one microbatch through all stages. `epoch` marks the pipeline's life: older ones are dropped.

    `ended` lists slots whose requests ended or were aborted since the last step; it is applied before `admissions`.
    Hidden states travel beside a step as [tokens, hidden_size], in the order of `segments`.
    """

    epoch: int
    step_id: int
    mode: Mode
    segments: list[Segment]
    admissions: list[Admission]
    ended: list[int]

    @property
    def token_count(self) -> int:
        """Tokens of all segments: the first dimension of the hidden states beside this step."""
        return sum(len(segment.tokens) for segment in self.segments)


class StepResult(Message, frozen=True, kw_only=True):
    """The tokens sampled by a step: one for each segment with `sample`, in the order of its segments."""

    epoch: int
    step_id: int
    tokens: list[int]


class StageFailure(Message, frozen=True, kw_only=True):
    """A stage cannot go on. `step_id` is the step it worked on, or -1 where it failed between steps."""

    epoch: int
    stage: int
    host: str
    step_id: int
    cause: str


class Host(Message, frozen=True, kw_only=True):
    """A node of the cluster: Ray's node id, its name and address, and the Galaxy rows it offers."""

    node_id: str
    name: str
    address: str
    rows: int


class Topology(Message, frozen=True, kw_only=True):
    """The live cluster, as far as placement needs it."""

    hosts: list[Host]
