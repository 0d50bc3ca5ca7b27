"""The options of a demo: the flags of the tt-metal demo, under their names."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from api.errors import OptionError
from stages.wormhole import GALAXY_COLUMNS, USERS_PER_ROW

DEFAULT_MAX_NEW_TOKENS = 32

Generator = Literal["bp", "pp"]
SingleLayer = Literal["mlp", "moe"]
MTP = Literal["on", "off"]


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of one run; see `galaxyline demo --help` for each.

    Raises OptionError, with the texts of the tt-metal demo where it has one, where they do not go together.
    """

    prompts: list[str] = []
    prompts_file: Annotated[Path | None, Meta(description="A JSON file of prompts, in place of PROMPTS.")] = None
    num_prompts: Annotated[int, Meta(ge=1, description="So many prompts of --prompts-file.")] | None = None
    output_path: Annotated[
        Path | None,
        Meta(
            description="Where the results of --prompts-file go.",
            extra={"path": "any", "default": "<prompts-file-stem>_output.json beside it"},
        ),
    ] = None
    checkpoint_jsonl: Annotated[
        Path | None, Meta(description="Append each prompt's result as it ends, and go on from what is there.")
    ] = None
    max_new_tokens: Annotated[int, Meta(ge=1, description="Tokens of each completion.")] = DEFAULT_MAX_NEW_TOKENS
    generator: Annotated[
        Generator, Meta(description="bp: one stage that owns all rows; pp: a pipeline of --stages.")
    ] = "bp"
    random_weights: Annotated[
        bool, Meta(description="Random weights, of a single dense layer unless told otherwise.")
    ] = False
    single_layer: Annotated[SingleLayer | None, Meta(description="The kind of layer of --random-weights.")] = None
    override_num_layers: Annotated[int, Meta(ge=1, description="Only the first layers of the model.")] | None = None
    token_accuracy: Annotated[bool, Meta(description="Follow references and report top-1 and top-5 accuracy.")] = False
    reference_files: Annotated[
        list[Path],
        Meta(description="A .pt/.refpt file; may be repeated.", extra={"flags": ("--reference-file",)}),
    ] = []
    tf_prompt_len: (
        Annotated[
            int,
            Meta(ge=1, description="Tokens of a reference that are its prompt.", extra={"default": "T // 2 + 1"}),
        ]
        | None
    ) = None
    sampling_temperature: Annotated[float, Meta(ge=0, le=2, description="0 is greedy.")] = 0.0
    sampling_top_k: Annotated[int, Meta(ge=0, description="0 is all.")] = 0
    sampling_top_p: Annotated[float, Meta(gt=0, le=1, description="1 is all.")] = 1.0
    stop_at_eos: Annotated[bool, Meta(description="End completions at EOS.")] = True
    chat_template: Annotated[
        bool,
        Meta(
            description="Put each prompt into the chat template of the model's tokenizer, as a user's message.",
            extra={"off": True},
        ),
    ] = False
    mtp: Annotated[
        MTP | None,
        Meta(
            description="Whether the model's multi-token-prediction layer drafts tokens; on: one for each step, unless "
            "--num-speculative-tokens says more.",
            extra={"default": "off, unless --num-speculative-tokens is given"},
        ),
    ] = None
    repeat_batches: Annotated[int, Meta(ge=1, description="Complete all prompts so often.")] = 1
    max_users_per_row: Annotated[
        int, Meta(ge=1, description="Users of a Galaxy row in one microbatch, a multiple of 8.")
    ] = USERS_PER_ROW

    def __post_init__(self) -> None:
        self._check_prompts()
        self._check_accuracy()
        self._check_random_weights()
        if self.max_users_per_row < 1 or self.max_users_per_row % GALAXY_COLUMNS:
            raise OptionError(
                f"--max-users-per-row {self.max_users_per_row} is not a multiple of {GALAXY_COLUMNS}: every chip of "
                "a row keeps the cache of as many users."
            )
        if self.checkpoint_jsonl is not None and self.repeat_batches > 1:
            raise OptionError("--checkpoint-jsonl keeps one completion of each prompt: leave out --repeat-batches.")
        if self.max_new_tokens < 1 or self.repeat_batches < 1:
            raise OptionError("--max-new-tokens and --repeat-batches must be at least 1.")

    def _check_prompts(self) -> None:
        has_prompts = bool(self.prompts) or self.prompts_file is not None
        if not (has_prompts or self.random_weights or self.token_accuracy):
            raise OptionError(
                'A prompt is required unless --random-weights is used. Give one: galaxyline demo "San Francisco is a".'
            )
        for name, value in (("--num-prompts", self.num_prompts), ("--output-path", self.output_path)):
            if value is not None and self.prompts_file is None:
                raise OptionError(f"{name} goes with --prompts-file: add it, or leave {name} out.")

    def _check_accuracy(self) -> None:
        if not self.token_accuracy:
            for name, value in (("--reference-file", self.reference_files), ("--tf-prompt-len", self.tf_prompt_len)):
                if value:
                    raise OptionError(f"{name} goes with --token-accuracy: add it, or leave {name} out.")
            return
        if self.random_weights:
            raise OptionError("--token-accuracy requires full-model mode (disable --random-weights)")
        if not self.reference_files:
            raise OptionError("--token-accuracy requires --reference-file pointing to a .pt/.refpt file")
        if self.prompts or self.prompts_file is not None:
            raise OptionError("--token-accuracy takes its prompts from --reference-file: leave other prompts out.")
        if self.chat_template:
            raise OptionError("--chat-template goes with prompts: leave it out with --token-accuracy.")
        if self.checkpoint_jsonl is not None:
            raise OptionError(
                "--checkpoint-jsonl keeps the completions of prompts: leave it out with --token-accuracy."
            )

    def _check_random_weights(self) -> None:
        if self.single_layer is not None and not self.random_weights:
            raise OptionError("--single-layer goes with --random-weights: add it, or leave --single-layer out.")
        if self.single_layer is not None and self.override_num_layers not in {None, 1}:
            raise OptionError(f"--single-layer is one layer, and --override-num-layers {self.override_num_layers}.")
