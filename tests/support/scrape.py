"""The samples of GET /metrics, by name and labels."""

from prometheus_client.parser import text_string_to_metric_families

MODEL = "org/small"
"""Name of the model that the tests of the routes serve."""
Labels = frozenset[tuple[str, str]]


class Scrape:
    """The samples of one answer of GET /metrics."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples: dict[tuple[str, Labels], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.samples
                self.samples[key] = sample.value

    def of(self, name: str, **labels: str) -> float:
        """Returns the sample with exactly these labels. Raises KeyError if there is none."""
        return self.samples[name, frozenset(labels.items())]

    def model(self, name: str, **labels: str) -> float:
        """Returns the sample of the first engine's model."""
        return self.of(name, model_name=MODEL, engine="0", **labels)
