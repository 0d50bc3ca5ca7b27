"""The sample model: a tiny checkpoint of DeepSeek-V3's architecture that comes with the project.

`python -m weights.sample.train --seed 0 --out DIR` trains it again from the text in `corpus/`.
"""

from pathlib import Path

SAMPLE_DIR: Path = Path(__file__).parent / "checkpoint"
"""The directory of the checkpoint, in the layout of a Hugging Face snapshot."""

SAMPLE_NAME = "galaxyline-sample"

PROMPTS_FILE: Path = Path(__file__).parent / "prompts.json"
"""Prompts whose greedy continuation the model is certain of, and the text that Hugging Face's model gives for each.

A model that is trained anew needs new texts: tests/weights/sample/ holds them against Hugging Face's model.
"""
