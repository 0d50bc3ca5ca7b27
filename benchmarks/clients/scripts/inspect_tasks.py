"""inspect-ai: two questions with a scorer, and an agent with a tool."""

import json
import sys
from pathlib import Path

from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

TASK = json.loads(Path("task.json").read_text(encoding="utf-8"))


@tool
def get_weather():
    async def execute(city: str):
        """Get the weather in a city.

        Args:
            city: The name of the city.
        """
        return TASK["weather"] if city == "Oslo" else "unknown"

    return execute


def chat():
    samples = [
        Sample(input=TASK["question"], target="a row of stages"),
        Sample(input=TASK["next_question"], target="one part of the pipeline"),
    ]
    return Task(dataset=samples, solver=generate(), scorer=includes())


def tools():
    samples = [
        Sample(input=TASK["weather_question"], target=TASK["weather"]),
        Sample(input=TASK["question"], target="a row of stages"),
    ]
    return Task(dataset=samples, solver=[use_tools(get_weather()), generate()], scorer=includes())


PARTS = [chat, tools]

task = {part.__name__: part for part in PARTS}[sys.argv[1]]()
model = get_model(f"openai-api/galaxyline/{TASK['model']}", base_url=f"{TASK['url']}/v1", api_key="-")
(log,) = evaluate(task, model=model, temperature=0, display="none", log_dir="logs")
assert log.status == "success", log.error
accuracy = log.results.scores[0].metrics["accuracy"].value
assert accuracy == 1, [(sample.output.completion, sample.scores) for sample in log.samples]
print("passed")
