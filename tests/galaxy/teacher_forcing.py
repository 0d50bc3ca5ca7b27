"""`python -m tests.galaxy.teacher_forcing DIRECTORY`: the sample model with the weights in that directory.

Prints as JSON how often its best token is that of Hugging Face's model in float32, after the same tokens.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from stages.backend import ttnn
from stages.converted_weights import ConvertedWeights, ModelPart
from stages.run_config import WeightConfig
from tests.support.checkpoints import reference_model
from tests.support.stage_driver import Driver, cache_options, stage_options
from weights.sample import SAMPLE_DIR
from weights.sample.spans import texts

USERS = 8
LENGTH = 129
"""The number of tokens of each user: the first is given, the others are predicted."""


def load_from(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes stages load their weights from `directory` from here on."""
    stored = json.loads((directory / "parts.json").read_text(encoding="utf-8"))
    numbers = {path: number for number, path in enumerate(stored["files"])}

    def load(_: ConvertedWeights, part: ModelPart) -> WeightConfig:
        files: WeightConfig = stored["parts"][part.name]
        return files

    def load_tensor(path: str, *, device: ttnn.MeshDevice) -> ttnn.Tensor:
        values = torch.load(directory / f"{numbers[path]}.pt").float()
        # The routing weights are float32 on chips too.
        dtype = ttnn.float32 if "gate" in path or "route" in path else ttnn.bfloat16
        # Gains of hidden states are rows of a tile's width.
        layout = ttnn.ROW_MAJOR_LAYOUT if values.shape[-2] > 1 and "norm" in path else ttnn.TILE_LAYOUT
        return ttnn.from_torch(values, dtype=dtype, layout=layout, device=device)

    monkeypatch.setattr(ConvertedWeights, "load", load)
    monkeypatch.setattr(ttnn, "load_tensor", load_tensor)


def texts_of_users() -> torch.Tensor:
    """Token ids [users, length] of the text that the sample model was trained on, cut at equal distances."""
    ids = AutoTokenizer.from_pretrained(SAMPLE_DIR).encode("\n\n".join(texts()))
    starts = torch.linspace(0, len(ids) - LENGTH, USERS).long()
    return torch.stack([torch.tensor(ids[start : start + LENGTH]) for start in starts.tolist()])


def probabilities(tokens: torch.Tensor, cache_dir: Path) -> torch.Tensor:
    """Logits [users, length - 1, vocabulary] after each token but the last, from a decode step for each position."""
    cache = cache_options(slots=USERS, max_model_len=LENGTH + 31)
    driver = Driver.load(stage_options(SAMPLE_DIR, cache_dir, cache=cache))
    for user in range(USERS):
        driver.admit(user)
    logits = [driver.prefill({user: [int(tokens[user, 0])] for user in range(USERS)})]
    for at in range(1, LENGTH - 1):
        logits.append(driver.decode({user: (at, int(tokens[user, at])) for user in range(USERS)}))
    driver.close()
    return torch.stack(logits, 1).softmax(-1)


def reference_probabilities(tokens: torch.Tensor) -> torch.Tensor:
    """The same logits by Hugging Face's model."""
    model: Any = reference_model(SAMPLE_DIR)
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens[:, :-1], use_cache=False).logits
    return logits.float().softmax(-1)


def main(directory: Path) -> None:
    tokens = texts_of_users()
    with pytest.MonkeyPatch.context() as patch:
        load_from(directory, patch)
        found = probabilities(tokens, directory / "embedded")
    expected = reference_probabilities(tokens)
    best = expected.argmax(-1)
    likelihoods = [probability.gather(-1, best[..., None]) for probability in (found, expected)]
    result = {
        "positions": best.numel(),
        "top1": float((found.argmax(-1) == best).float().mean()),
        "difference": float((likelihoods[0] - likelihoods[1]).abs().mean()),
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
