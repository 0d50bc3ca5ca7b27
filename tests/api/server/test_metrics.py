"""The text of GET /metrics, made of measurements that the test chose."""

from api.client.request_metrics import RequestMetrics
from api.messages.engine import DraftCounts
from api.server.metrics import Measured, MetricsText
from tests.support.demo_figures import metrics
from tests.support.reporting_engine import DRAFTS
from tests.support.scrape import MODEL, Scrape

NAMES = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")


def scraped(*engines: DraftCounts) -> Scrape:
    text = MetricsText(MODEL)
    measured = [
        Measured(requests=RequestMetrics(256), metrics=metrics(1.0, 2.0, 3.0, drafts=drafts), pid=None)
        for drafts in engines
    ]
    return Scrape(text.encode(text.families(measured), measured).decode())


def test_what_drafts_came_to_has_vllms_names() -> None:
    scrape = scraped(DRAFTS, DraftCounts(num_speculative_tokens=2, accepted_per_position=[0, 0]))
    counted = ("drafts_total", "draft_tokens_total", "accepted_tokens_total")
    assert [scrape.model(f"vllm:spec_decode_num_{name}") for name in counted] == [1000, 2000, 1500]
    per_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [scrape.model(per_position, position=position) for position in "01"] == [900, 600]
    assert {scrape.families[f"vllm:spec_decode_{name}"].type for name in NAMES} == {"counter"}
    assert scrape.model("galaxyline:drafts_on") == 1
    other = {"model_name": MODEL, "engine": "1"}
    assert scrape.of("galaxyline:drafts_on", **other) == scrape.of(per_position, **other, position="1") == 0


def test_where_no_drafts_are_asked_for_nothing_is_said_of_them() -> None:
    families = scraped(DraftCounts()).families
    assert not [name for name in families if "spec_decode" in name or "drafts" in name]
