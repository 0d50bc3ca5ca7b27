"""What a demo is asked to do: the flags of the tt-metal demo, under their names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from api.errors import OptionError
from stages.wormhole import GALAXY_COLUMNS, USERS_PER_ROW

DEFAULT_MAX_NEW_TOKENS = 32

Generator = Literal["bp", "pp"]
SingleLayer = Literal["mlp", "moe"]
Count = Annotated[int, msgspec.Meta(ge=1)]

Options = TypeVar("Options", bound=msgspec.Struct)


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of one run; see `galaxyline demo --help` for each.

    Raises OptionError, with the texts of the tt-metal demo where it has one, where they do not go together.
    """

    prompts: list[str] = []
    prompts_file: Path | None = None
    num_prompts: Count | None = None
    output_path: Path | None = None
    checkpoint_jsonl: Path | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    generator: Generator = "bp"
    random_weights: bool = False
    single_layer: SingleLayer | None = None
    override_num_layers: Count | None = None
    token_accuracy: bool = False
    reference_files: list[Path] = []
    tf_prompt_len: Count | None = None
    sampling_temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    sampling_top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    sampling_top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    stop_at_eos: bool = True
    repeat_batches: int = 1
    chat_template: bool = False
    max_users_per_row: int = USERS_PER_ROW

    def __post_init__(self) -> None:
        self._check_prompts()
        self._check_accuracy()
        self._check_random_weights()
        if self.max_users_per_row < 1 or self.max_users_per_row % GALAXY_COLUMNS:
            raise OptionError(
                f"--max-users-per-row {self.max_users_per_row} is no multiple of {GALAXY_COLUMNS}: every chip of "
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


def read_options(kind: type[Options], given: Mapping[str, object]) -> Options:
    """Options of a `kind` from names and values of whatever types; paths may be strings.

    Raises OptionError for a name or a value that is none of its options'.
    """
    try:
        return msgspec.convert(given, kind, dec_hook=_read_path)
    except msgspec.ValidationError as error:
        raise OptionError(f"The demo has no such option: {error}.") from error


def _read_path(kind: Callable[[object], object], value: object) -> object:
    """The way msgspec reads the one type of an option that it does not know."""
    return kind(value)
