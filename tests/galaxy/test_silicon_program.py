"""The program of the tests on chips also runs on the mock Galaxy, where all values are zero."""

from pathlib import Path

from tests.silicon.run_model import LENGTHS, STEPS, logits_on
from tests.support.checkpoints import write_checkpoint


def test_the_program_of_the_tests_on_chips_runs(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", overrides={"num_attention_heads": 128, "num_hidden_layers": 2})
    logits = logits_on("ttnn", model, tmp_path, (1, 8))
    assert logits.shape == (len(LENGTHS) * (1 + STEPS), 512)
