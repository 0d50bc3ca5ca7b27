"""What Hugging Face makes of the sample model's prompts."""

from collections.abc import Sequence

from tests.support.servers import Prompt
from weights.sample import SAMPLE_DIR
from weights.sample.train import Reference


def reference_texts(prompts: Sequence[Prompt]) -> list[str]:
    """The greedy text of every prompt, as long as it asks for."""
    reference = Reference(SAMPLE_DIR)
    completions = reference.complete([p.prompt for p in prompts], [p.max_tokens for p in prompts])
    return [str(reference.tokenizer.decode(c.tokens, skip_special_tokens=True)) for c in completions]
