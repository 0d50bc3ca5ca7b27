"""The files of the demo: prompts, results, and references; and what goes together."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from api.demo.files import (
    LoggedResult,
    ResultsLog,
    default_results_path,
    read_prompts_file,
    write_results,
)
from api.demo.generation import Generation, statistics
from api.demo.options import DemoOptions
from api.demo.reference import Reference, accuracy, read_reference_file
from api.errors import OptionError, exit_code
from api.messages.engine import DraftCounts
from tests.support.demo_figures import MTP_STATISTICS, metrics

PROMPTS = [{"prompt": "First prompt"}, {"prompt": "Zweiter Ärger"}]


# Prompts


@pytest.mark.parametrize("content", [PROMPTS, {"prompts": PROMPTS}, [*PROMPTS, {"other": 1}, 7, {"prompt": ""}]])
def test_both_layouts_of_prompts_are_read(content: Any, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_prompts_file(tmp_path / "p.json") == ["First prompt", "Zweiter Ärger"]
    assert read_prompts_file(tmp_path / "p.json", 1) == ["First prompt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Prompts file does not exist: '"),
        ("{", "is not valid JSON"),
        ("[]", "No valid prompts found in '"),
        ('{"prompts": []}', "No valid prompts found in '"),
        ('{"texts": ["a"]}', "No valid prompts found in '"),
        ("3", "No valid prompts found in '"),
    ],
)
def test_a_file_without_prompts_is_one_sentence(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(OptionError) as refusal:
        read_prompts_file(tmp_path / "p.json")
    assert message in str(refusal.value)
    assert exit_code(refusal.value) == 2


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "A prompt is required unless --random-weights is used"),
        (
            {"token_accuracy": True, "random_weights": True},
            "--token-accuracy requires full-model mode (disable --random-",
        ),
        ({"token_accuracy": True}, "--token-accuracy requires --reference-file pointing to a .pt/.refpt file"),
        ({"prompts": ["a"], "reference_files": [Path("r")]}, "--reference-file goes with --token-accuracy"),
        ({"prompts": ["a"], "single_layer": "moe"}, "--single-layer goes with --random-weights"),
        ({"prompts": ["a"], "num_prompts": 3}, "--num-prompts goes with --prompts-file"),
        ({"prompts": ["a"], "output_path": Path("o")}, "--output-path goes with --prompts-file"),
        ({"prompts": ["a"], "max_users_per_row": 12}, "--max-users-per-row 12 is not a multiple of 8"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "--max-new-tokens"),
        ({"prompts": ["a"], "checkpoint_jsonl": Path("c"), "repeat_batches": 2}, "leave out --repeat-batches"),
        ({"random_weights": True, "single_layer": "mlp", "override_num_layers": 2}, "--single-layer is one layer"),
        ({"prompts": ["a"], "token_accuracy": True, "reference_files": [Path("r")]}, "leave other prompts out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as refusal:
        DemoOptions(**options)
    assert message in str(refusal.value)


# Results


def logged(index: int, settings: str = "s") -> LoggedResult:
    return LoggedResult(index=index, prompt=f"prompt {index}", settings=settings, tokens=[index, 7], text="tëxt\n")


def test_results_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    with ResultsLog(path) as log:
        log.add(logged(1))
        log.add(logged(2, settings="other"))
    assert len(path.read_bytes().splitlines()) == 2
    with ResultsLog(path) as log:
        assert log.done("s") == {(1, "prompt 1"): logged(1)}
        log.add(logged(3))
    with ResultsLog(path) as log:
        assert log.results == [logged(1), logged(2, settings="other"), logged(3)]


@given(cut=st.integers(0, 200))
def test_a_line_that_a_kill_cut_off_is_dropped(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    with ResultsLog(path) as log:
        for index in (1, 2, 3):
            log.add(logged(index))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    with ResultsLog(path) as log:
        assert log.results == [logged(index) for index in range(1, complete + 1)]
        log.add(logged(9))
    with ResultsLog(path) as log:
        assert log.results[complete:] == [logged(9)]


def test_a_log_belongs_to_one_demo_at_a_time(tmp_path: Path) -> None:
    with ResultsLog(tmp_path / "log"), pytest.raises(OptionError, match="Another demo writes to"):
        ResultsLog(tmp_path / "log")
    ResultsLog(tmp_path / "log").__exit__()


def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("my notes\nand more\n")
    with pytest.raises(OptionError, match="is not a file of --checkpoint-jsonl"):
        ResultsLog(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "my notes\nand more\n"
    with pytest.raises(OptionError, match="Cannot write --checkpoint-jsonl"):
        ResultsLog(tmp_path)


def test_results_are_written_as_the_tt_metal_demo_writes_them(tmp_path: Path) -> None:
    results = {
        "generations": [{"tokens": [1], "text": "ö"}, {"tokens": [2], "text": "b", "accuracy_top1": 0.5}],
        "statistics": {"decode_t/s": 1.5},
        "model_params": {"layers": 6},
    }
    write_results(tmp_path / "out.json", ["a", "ß"], results)
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert json.loads(text) == {
        "prompts": ["a", "ß"],
        "generations": [
            {"index": 1, "prompt": "a", "text": "ö"},
            {"index": 2, "prompt": "ß", "text": "b", "accuracy_top1": 0.5},
        ],
        "statistics": {"decode_t/s": 1.5},
        "model_params": {"layers": 6},
    }
    assert "ß" in text
    assert text.startswith('{\n  "prompts": [\n    "a"')
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_results_go_beside_the_prompts_unless_told_otherwise(tmp_path: Path) -> None:
    assert default_results_path(Path("dir/test_prompts.json")) == Path("dir/test_prompts_output.json")


# References


def reference_file(path: Path, **content: Any) -> Path:
    torch.save(content, path)
    return path


def test_references_of_both_writers_are_read(tmp_path: Path) -> None:
    tokens = torch.arange(10)[None]
    rows = torch.arange(50).view(10, 5)
    whole = read_reference_file(reference_file(tmp_path / "a", reference_tokens=tokens, top5_tokens=rows))
    assert (whole.tokens, whole.prompt_length) == (list(range(10)), 6)
    assert whole.top5 == rows.tolist()
    # tt_transformers' helper: a row for what follows each token but the last.
    shifted = read_reference_file(reference_file(tmp_path / "b", reference_tokens=tokens, top5_tokens=rows[1:]), 3)
    assert shifted.prompt_length == 3
    assert shifted.top5 is not None
    assert shifted.top5[1:] == rows[1:].tolist()
    plain = read_reference_file(reference_file(tmp_path / "c", reference_tokens=tokens[0]))
    assert (plain.tokens, plain.top5) == (list(range(10)), None)


class Payload:
    """What a malicious file could hold."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


def write_payload(path: Path) -> None:
    torch.save({"reference_tokens": Payload()}, path)


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload()))


def write_text(path: Path) -> None:
    path.write_text("no reference")


@pytest.mark.parametrize("write", [write_payload, write_pickle, write_text])
def test_a_file_that_is_no_reference_is_refused_and_never_run(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "r")
    with pytest.raises(OptionError, match="not a reference file that can be read safely"):
        read_reference_file(tmp_path / "r")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no 'reference_tokens'"),
        ({"reference_tokens": torch.zeros(1, 9)}, "reference_tokens is not a tensor of token ids"),
        ({"reference_tokens": torch.zeros(2, 9, dtype=torch.long)}, "has shape [2, 9] where [1, T] is expected"),
        ({"reference_tokens": torch.zeros(1, 1, dtype=torch.long)}, "leaves none to predict"),
        (
            {
                "reference_tokens": torch.zeros(1, 9, dtype=torch.long),
                "top5_tokens": torch.zeros(7, 5, dtype=torch.long),
            },
            "top5_tokens has shape [7, 5] where [9, 5] is expected",
        ),
    ],
)
def test_a_reference_of_another_shape_is_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as refusal:
        read_reference_file(reference_file(tmp_path / "r", **content))
    assert message in str(refusal.value)


def test_a_reference_that_is_not_there_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Reference file does not exist"):
        read_reference_file(tmp_path / "r")
    path = reference_file(tmp_path / "r", reference_tokens=torch.arange(9)[None])
    with pytest.raises(OptionError, match="holds 9 tokens: a prompt of 9 leaves none to predict"):
        read_reference_file(path, 9)


@given(st.data())
def test_accuracy_counts_matches(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 20))
    begin = data.draw(st.integers(1, 10))
    token = st.integers(0, 6)
    tokens = data.draw(st.lists(token, min_size=begin + length, max_size=begin + length))
    rows = data.draw(st.lists(st.lists(token, min_size=5, max_size=5), min_size=len(tokens), max_size=len(tokens)))
    predicted = data.draw(st.lists(token, min_size=length, max_size=length))
    told = accuracy(Reference(path=Path("r"), tokens=tokens, top5=rows, prompt_length=begin), predicted)
    assert told.top1 * length == pytest.approx(sum(p == rows[begin + i][0] for i, p in enumerate(predicted)))
    assert told.top5 is not None
    assert told.top5 * length == pytest.approx(sum(p in rows[begin + i] for i, p in enumerate(predicted)))
    alone = accuracy(Reference(path=Path("r"), tokens=tokens, top5=None, prompt_length=begin), predicted)
    assert alone.top1 * length == pytest.approx(sum(p == tokens[begin + i] for i, p in enumerate(predicted)))
    assert alone.top5 is None


def generation(prompt_tokens: int, first: float, gap: float, count: int) -> Generation:
    times = [first + gap * place for place in range(count)]
    return Generation(prompt_tokens=prompt_tokens, tokens=[1] * count, text="", submitted=100.0, times=times)


def test_statistics_are_what_their_keys_say() -> None:
    generations = [generation(10, 101.0, 0.5, 130), generation(30, 103.0, 0.25, 5)]
    told = statistics(generations, metrics(2.0, 8.0, 5.0, 2.5), seconds_to_ready=3.0, runtime=20.0)
    assert told == {
        "preparing_prefill_config": 3.0,
        "preparing_decode_config": 0.0,
        "inference_prefill": 2.0,
        "inference_decode": 8.0,
        "prefill_time_to_token": 1.0,
        "prefill_time_to_first_token": 1.0,
        "prefill_t/s": 20.0,
        "decode_t/s/u": pytest.approx(3.0),
        "decode_t/s": (129 + 4) / 8.0,
        "trace_execution_t/s/u @128th token": pytest.approx(2.0),
        "Full demo runtime": 20.0,
        "time_to_first_token_p50": 2.0,
        "time_to_first_token_p99": pytest.approx(2.98),
        "inter_token_latency_p50": pytest.approx(0.5),
        "inter_token_latency_p99": pytest.approx(0.5),
        "stage_busy_share": [0.5, 0.25],
    }


def test_tokens_that_come_together_have_one_time_and_one_gap() -> None:
    times = [101.0] + [102.0 + place // 3 for place in range(129)]
    together = Generation(prompt_tokens=10, tokens=[1] * 130, text="", submitted=100.0, times=times)
    told = statistics([together], metrics(2.0, 8.0), seconds_to_ready=3.0, runtime=20.0)
    assert (told["inter_token_latency_p50"], told["inter_token_latency_p99"]) == (1.0, 1.0)
    assert told["trace_execution_t/s/u @128th token"] == 3.0
    assert (told["decode_t/s"], told["decode_t/s/u"]) == (129 / 8.0, 3.0)


def test_speed_needs_something_that_came_before() -> None:
    assert generation(10, 101.0, 0.0, 130).speed_at(128) is None
    assert generation(10, 101.0, 0.5, 127).speed_at(128) is None


def test_what_drafts_came_to_is_told_under_the_tt_metal_demos_names() -> None:
    counts = DraftCounts(num_speculative_tokens=2, drafts=5, draft_tokens=10, accepted_tokens=7)
    run = [generation(10, 101.0, 0.5, 4)]
    told = statistics(run, metrics(2.0, 8.0, drafts=counts), seconds_to_ready=3.0, runtime=20.0)
    assert {name: told[name] for name in MTP_STATISTICS} == {
        "mtp_verifies": 10,
        "mtp_accepts": 7,
        "mtp_accept_rate": 0.7,
    }
    unused = metrics(2.0, 8.0, drafts=DraftCounts(num_speculative_tokens=2))
    assert statistics(run, unused, seconds_to_ready=3.0, runtime=20.0)["mtp_accept_rate"] is None
    assert not MTP_STATISTICS & set(statistics(run, metrics(2.0, 8.0), seconds_to_ready=3.0, runtime=20.0))


def test_what_was_not_measured_is_none() -> None:
    told = statistics([generation(10, 101.0, 0.5, 1)], metrics(2.0, 0.0), seconds_to_ready=3.0, runtime=20.0)
    assert told["trace_execution_t/s/u @128th token"] is None
    assert (told["decode_t/s"], told["decode_t/s/u"], told["inter_token_latency_p50"]) == (None, None, None)
