"""What a demo is asked to do: the flags of the tt-metal demo, under their names."""

from pathlib import Path
from typing import Literal

import msgspec

from api.errors import OptionError

DEFAULT_MAX_NEW_TOKENS = 32
DEFAULT_USERS_PER_ROW = 32
USERS_PER_ROW_UNIT = 8
"""Chips of a Galaxy row, each of which keeps the cache of as many users."""

Generator = Literal["bp", "pp"]
SingleLayer = Literal["mlp", "moe"]


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of one run; see `galaxyline demo --help` for each.

    Raises OptionError, with the texts of the tt-metal demo where it has one, where they do not go together.
    """

    prompts: list[str] = []
    prompts_file: Path | None = None
    num_prompts: int | None = None
    output_path: Path | None = None
    checkpoint_jsonl: Path | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    generator: Generator = "bp"
    random_weights: bool = False
    single_layer: SingleLayer | None = None
    override_num_layers: int | None = None
    token_accuracy: bool = False
    reference_files: list[Path] = []
    tf_prompt_len: int | None = None
    sampling_temperature: float = 0.0
    sampling_top_k: int = 0
    sampling_top_p: float = 1.0
    stop_at_eos: bool = True
    repeat_batches: int = 1
    max_users_per_row: int = DEFAULT_USERS_PER_ROW

    def __post_init__(self) -> None:
        self._check_prompts()
        self._check_accuracy()
        self._check_random_weights()
        if self.max_users_per_row < 1 or self.max_users_per_row % USERS_PER_ROW_UNIT:
            raise OptionError(
                f"--max-users-per-row {self.max_users_per_row} is no multiple of {USERS_PER_ROW_UNIT}: every chip of "
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
                'A prompt is required unless --random-weights is used: galaxyline demo "San Francisco is a".'
            )
        for name, value in (("--num-prompts", self.num_prompts), ("--output-path", self.output_path)):
            if value is not None and self.prompts_file is None:
                raise OptionError(f"{name} goes with --prompts-file: add it, or leave {name} out.")

    def _check_accuracy(self) -> None:
        if not self.token_accuracy:
            if self.reference_files:
                raise OptionError("--reference-file goes with --token-accuracy: add it, or leave the file out.")
            return
        if self.random_weights:
            raise OptionError("--token-accuracy requires full-model mode (disable --random-weights)")
        if not self.reference_files:
            raise OptionError("--token-accuracy requires --reference-file pointing to a .pt/.refpt file")
        if self.prompts or self.prompts_file is not None:
            raise OptionError("--token-accuracy takes its prompts from --reference-file: leave other prompts out.")
        if self.checkpoint_jsonl is not None:
            raise OptionError(
                "--checkpoint-jsonl keeps the completions of prompts: leave it out with --token-accuracy."
            )

    def _check_random_weights(self) -> None:
        if self.single_layer is not None and not self.random_weights:
            raise OptionError("--single-layer goes with --random-weights: add it, or leave --single-layer out.")
        if self.single_layer is not None and self.override_num_layers not in {None, 1}:
            raise OptionError(f"--single-layer is one layer, and --override-num-layers {self.override_num_layers}.")
