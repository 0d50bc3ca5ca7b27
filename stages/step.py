"""The messages that travel through a pipeline, as msgpack.

A `Step` enters at the first stage and travels with the hidden states; the last stage samples and sends a
`StepResult` to the engine. A stage that fails sends a `StageFailure` the same way. Both ends of every link compare
`PROTOCOL_VERSION` before the first frame, so the structs themselves carry no version.
"""

from typing import Literal, get_args

import msgspec

from stages.mesh_spec import HiddenShard

PROTOCOL_VERSION = 9

Mode = Literal["prefill", "decode", "load"]
"""What a step does: it computes prompts, or the next tokens of requests, or brings blocks back into the caches."""

MODES: tuple[Mode, ...] = get_args(Mode)

FailureKind = Literal["error", "lost_link"]
"""Whether a stage failed by an error of its own, or only because the link to a neighbour was lost."""


class Message(
    msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True, forbid_unknown_fields=True, gc=False
):
    """Base of all messages: positional on the wire, checked on decoding, never changed after sending.

    They hold plain values and each other in one direction, so the cycle collector need not look at them: it took a
    tenth of a stage actor's time.
    """


class Grammar(Message, frozen=True, kw_only=True):
    """What an answer has to look like: a grammar that llguidance compiles, as its list of grammars in JSON."""

    source: str


class Thought(Message, frozen=True, kw_only=True):
    """How the thought of an answer begins and ends, by token ids, and how long it may be.

    `opening` are the tokens of `<think>`, `closing` those of `</think>`. Where the prompt has opened the thought
    (`is_open`) the answer begins inside it, else it may open one with its first tokens. After `budget` tokens of it
    `closing` is forced, and `after_budget` behind it. A budget of 0 closes an open thought at once, and forbids to open
    one.
    """

    opening: list[int]
    closing: list[int]
    is_open: bool
    budget: int | None = None
    after_budget: list[int] = []


class SamplingParams(Message, frozen=True, kw_only=True):
    """How to choose the tokens of one request: a function of the request alone. Defaults change nothing.

    `temperature` 0 is greedy; `top_k` 0 means all; `top_p` in (0, 1]. Random numbers are keyed by (`seed`, `choice`,
    position, token id), where `choice` counts the `n` answers of one request.

    `min_p` is a share of the best token's probability. The penalties are vLLM's: repetition divides or multiplies the
    logits of tokens in prompt or answer, presence and frequency are subtracted for those of the answer.
    `logit_bias` is added by token id. Only `allowed_token_ids` are drawn, unless empty; none that would complete one of
    `bad_words`, each a sequence of token ids, within the answer; and before the answer has `min_tokens`, none of
    `stop_token_ids`. Ids outside the vocabulary change nothing.

    With a `grammar` only tokens are drawn with which the answer can still become what it describes, and the model's EOS
    tokens only where it is that. A `thought` stands before it: the grammar describes what follows `closing`.

    `logprobs` asks for the log-probability of each sampled token and of so many best ones (0: of the token alone),
    `prompt_logprobs` for those of the prompt's tokens; None asks for none, and VOCABULARY for all tokens.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    choice: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []
    bad_words: list[list[int]] = []
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    thought: Thought | None = None

    @property
    def reads_tokens(self) -> bool:
        """Whether the last stage needs the request's tokens, and not only its logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.bad_words)
            or self.prompt_logprobs is not None
            or self.grammar is not None
            or self.thought is not None
        )


VOCABULARY = -1
"""The value of `logprobs` or `prompt_logprobs` that asks for the log-probabilities of all tokens."""


GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM (its _SAMPLING_EPS)."""


class Admission(Message, frozen=True, kw_only=True):
    """A request takes a slot: the stage forgets whatever the slot held before.

    Its first tokens are in the cache already: in the blocks `cached`, which begin its page table.

    `tokens` are all that the request has so far, and empty unless its sampling reads them; the first `prompt_tokens` of
    a request's tokens are its prompt, the others its answer from before it was preempted or replayed.
    """

    slot: int
    sampling: SamplingParams
    tokens: list[int] = []
    prompt_tokens: int = 0
    cached: list[int] = []


class Segment(Message, frozen=True, kw_only=True):
    """A run of one request's tokens in a step.

    `start` is the position of `tokens[0]`; `new_blocks` are appended to the slot's page table before the step runs;
    `sample` asks the last stage for the token after the segment's last one. Prefill segments start at a multiple of the
    block size. `keys` are those of the last blocks that are full with it, in order: a block is full once its last token
    is in it.

    A decode is a segment of one token and the drafts that follow it, which count as tokens only once they are accepted.
    The last stage is asked for as many `drafts` of what follows; with any it keeps its draft layer's cache up to date,
    for which `next_token` is the one after the segment, NO_TOKEN where that is not known yet.
    """

    slot: int
    start: int
    tokens: list[int]
    new_blocks: list[int]
    sample: bool
    keys: list[bytes] = []
    drafts: int = 0
    next_token: int = -1


class ShrunkSlot(Message, frozen=True, kw_only=True):
    """A slot that gives back all but its first `blocks` blocks, as they would have held drafts that were rejected."""

    slot: int
    blocks: int


class BlockLoad(Message, frozen=True, kw_only=True):
    """A block that is to hold what the key stands for: it does already, or a tier beside the device has it."""

    pool: int
    block: int
    key: bytes


class StageTiming(Message, frozen=True, kw_only=True):
    """The times when a step reached one stage, began and was done: nanoseconds since 1970, of `actors.clock.now_ns`.

    Where its tokens were drawn beside the next step, that was done at `sampled_ns`, else 0. The thread that computes
    took `cpu_ns` of processor time for the step, the one that samples `sampling_cpu_ns`.
    """

    received_ns: int
    began_ns: int
    ended_ns: int
    sampled_ns: int = 0
    cpu_ns: int = 0
    sampling_cpu_ns: int = 0

    @property
    def left_ns(self) -> int:
        """When the step was ready to leave the stage."""
        return max(self.ended_ns, self.sampled_ns)


class SentHidden(Message, frozen=True, kw_only=True):
    """The hidden states of a step have gone from mesh to mesh: as the `sequence`-th tensor of that socket."""

    sequence: int
    step_id: int
    tensor: HiddenShard

    def __str__(self) -> str:
        return f"{self.tensor} as tensor {self.sequence}, of step {self.step_id}"


class Step(Message, frozen=True, kw_only=True):
    """One pass of one microbatch through all stages. `epoch` marks the pipeline's life: older ones are dropped.

    `ended` lists slots whose requests ended or were aborted since the last step; it is applied before `admissions`.
    Hidden states travel beside a step as [tokens, hidden_size], in the order of `segments`, or from mesh to mesh,
    where `sent` says so. Every stage that is done with a step adds its timing.

    A "load" step has no segments but `loads`; every stage adds those that it could not bring to `missed`, by their
    indices. What is kept by the keys `forgotten` is not to be found again; that is applied before the rest, and then
    what slots that `shrunk` give back.
    """

    epoch: int
    step_id: int
    mode: Mode
    segments: list[Segment]
    admissions: list[Admission]
    ended: list[int]
    timings: list[StageTiming] = []
    sent: SentHidden | None = None
    loads: list[BlockLoad] = []
    missed: list[int] = []
    forgotten: list[bytes] = []
    shrunk: list[ShrunkSlot] = []

    @property
    def token_count(self) -> int:
        """Tokens of all segments: the first dimension of the hidden states beside this step."""
        return sum([len(segment.tokens) for segment in self.segments])


class TokenLogprobs(Message, frozen=True, kw_only=True):
    """Natural log-probabilities at one position, from the model's logits before any sampling option changes them.

    `logprob` is that of the token that stands there, `rank` its place among all tokens (1 is the best). `top_logprobs`
    are those of `top_tokens`, the best first, as many as were asked for; equal ones rank by token id.
    """

    logprob: float
    rank: int
    top_tokens: list[int]
    top_logprobs: list[float]


NO_TOKEN = -1
"""Stands for a token that could not be drawn, as the logits are not numbers."""

GRAMMAR_FAILED = -2
"""Stands for a token that could not be drawn, as the request's grammar could not be followed any further."""


class StepResult(Message, frozen=True, kw_only=True):
    """The tokens sampled by a step: for each segment with `sample`, in the order of its segments, a token, NO_TOKEN or
    GRAMMAR_FAILED, behind as many drafts as were accepted.

    `accepted` has that number for each of these segments, or is empty where no segment has drafts. `drafts` are those
    that were made for each of them, or empty where none were asked for. `logprobs` has an entry for each token, None
    where its request asks for none, or is empty where all would be None.
    `prompt_logprobs` has a list for each segment of a prefill step whose request asks for them, in the order of
    segments: entries for the prompt's tokens at positions start + 1 to start + len(tokens), as far as the prompt goes.
    `timings` has an entry for each stage. `missed` are the indices of those loads that a stage could not bring. So many
    tokens, `fallbacks`, took logits of the whole vocabulary on the host, where candidates were at hand.
    """

    epoch: int
    step_id: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] = []
    prompt_logprobs: list[list[TokenLogprobs]] = []
    timings: list[StageTiming] = []
    missed: list[int] = []
    accepted: list[int] = []
    drafts: list[list[int]] = []
    fallbacks: int = 0


class StageFailure(Message, frozen=True, kw_only=True):
    """A failure that ends a stage's work. `step_id` is the step it worked on, or -1 where it failed between steps."""

    epoch: int
    stage: int
    host: str
    step_id: int
    kind: FailureKind
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
