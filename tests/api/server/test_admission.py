"""The numbers of open and waiting completions, against a count kept by the test."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import OverloadedError, RequestError
from api.server.admission import RETRY_AFTER_S, RETRY_AFTER_S_MAX, AdmissionControl, Ticket
from api.settings.server import QueueLimits


class Clock:
    """A clock in seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def limits(slots: int = 2, requests: int = 3, tokens: int = 100) -> QueueLimits:
    return QueueLimits(slots=slots, requests=requests, tokens=tokens)


def test_defaults_follow_slots_and_the_models_length() -> None:
    assert QueueLimits.of(96, 4096) == QueueLimits(slots=96, requests=768, tokens=1 << 20)
    assert QueueLimits.of(1, 1 << 21) == QueueLimits(slots=1, requests=256, tokens=1 << 21)
    assert QueueLimits.of(8, 64, requests=0, tokens=5) == QueueLimits(slots=8, requests=0, tokens=5)


def test_more_than_slots_and_queue_hold_is_refused_until_one_ends() -> None:
    admission = AdmissionControl(limits())
    places = [admission.admit({0: 1}) for _ in range(5)]
    with pytest.raises(OverloadedError, match="3 completions wait already, with 5 tokens"):
        admission.admit({0: 1})
    with pytest.raises(OverloadedError):
        admission.refuse_if_full()
    places[3].ended(0)
    admission.refuse_if_full()
    admission.admit({0: 1})


def test_without_a_queue_only_free_slots_are_given() -> None:
    admission = AdmissionControl(limits(requests=0))
    admission.admit({0: 1})
    admission.admit({0: 1})
    with pytest.raises(OverloadedError):
        admission.admit({0: 1})


def test_a_large_request_is_taken_where_a_slot_is_free_and_nowhere_else() -> None:
    admission = AdmissionControl(limits())
    admission.admit({0: 1})
    large = admission.admit(dict.fromkeys(range(20), 1))
    with pytest.raises(OverloadedError):
        admission.refuse_if_full()
    large.release()
    admission.admit({0: 1})
    with pytest.raises(OverloadedError):
        admission.admit(dict.fromkeys(range(20), 1))
    admission.admit({0: 1, 1: 1, 2: 1})


def test_tokens_count_until_their_completion_has_begun() -> None:
    admission = AdmissionControl(limits(slots=1))
    first = admission.admit({0: 90})
    with pytest.raises(OverloadedError, match="90 tokens"):
        admission.admit({0: 11})
    first.began(0)
    first.began(0)
    admission.admit({0: 100})


def test_more_tokens_than_may_ever_wait_are_the_clients_mistake() -> None:
    admission = AdmissionControl(limits())
    with pytest.raises(RequestError, match="2 completions have 102 tokens of prompts together, more than the 100"):
        admission.admit({0: 51, 1: 51})
    # A request with one completion is bounded by the model's length alone.
    admission.admit({0: 102})


def test_what_generates_nothing_is_always_taken() -> None:
    admission = AdmissionControl(limits(slots=1, requests=0))
    admission.admit({0: 1})
    admission.admit({}).ended(0)
    assert admission.open == 1


def test_a_client_is_told_to_wait_as_long_as_the_queue_will_take() -> None:
    clock = Clock()
    admission = AdmissionControl(limits(slots=1, requests=10), clock)
    places = [admission.admit({0: 1}) for _ in range(11)]
    assert admission.retry_after_s() == RETRY_AFTER_S
    for place in places[:4]:
        clock.now += 2
        place.ended(0)
    # 7 completions are open and 6 of them wait; 4 ended in the 6 s since the first of these ends.
    assert admission.retry_after_s() == 9
    clock.now += 1e6
    assert admission.retry_after_s() == RETRY_AFTER_S_MAX
    for place in places:
        place.release()
    assert admission.retry_after_s() == 1


requests = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@given(st.lists(st.one_of(requests, st.integers(0, 9)), max_size=40))
def test_the_books_agree_with_a_count(events: list[list[int] | int]) -> None:
    """In the events, a list is a request's prompts; a number ends a completion of an open request, or releases it."""
    bounds = limits()
    admission = AdmissionControl(bounds)
    held: list[tuple[Ticket, dict[int, int]]] = []
    for event in events:
        unbegun = sum(sum(tokens.values()) for _, tokens in held)
        opened = sum(len(tokens) for _, tokens in held)
        assert (admission.open, admission.queued) == (opened, max(opened - bounds.slots, 0))
        if isinstance(event, list):
            fits = opened + len(event) <= bounds.slots + bounds.requests and unbegun + sum(event) <= bounds.tokens
            prompts = dict(enumerate(event))
            if sum(event) > bounds.tokens and len(event) > 1:
                with pytest.raises(RequestError):
                    admission.admit(prompts)
            elif opened < bounds.slots or fits:
                held.append((admission.admit(prompts), prompts))
            else:
                with pytest.raises(OverloadedError):
                    admission.admit(prompts)
        elif held:
            place, tokens = held[event % len(held)]
            if event % 2 and tokens:
                place.ended(next(iter(tokens)))
                del tokens[next(iter(tokens))]
            else:
                place.release()
                place.release()
                tokens.clear()
