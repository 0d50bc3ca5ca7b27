"""The answers of /v1/responses and /v1/messages: whole ones, and the events of their streams, each with its type."""

from collections.abc import Iterator, Mapping
from typing import Any

LAST_EVENTS = frozenset({"message_stop", "response.completed", "response.incomplete"})
"""The types of the events that end a stream whose answer is complete."""

Parts = Iterator[tuple[str, str]]
"""Kinds and texts for a transcript."""


def is_failure(event: Mapping[str, Any]) -> bool:
    """Whether the event, of any route, says that the answer failed."""
    return bool(event.get("error")) or event.get("type") in {"error", "response.failed"}


def parts_of(event: Mapping[str, Any]) -> Parts:
    """What an event or a whole answer adds to its message; nothing where it only repeats or frames the rest."""
    kind = str(event.get("type") or event.get("object"))
    if kind in {"message", "response"}:
        for place, item in enumerate(event["content" if kind == "message" else "output"]):
            yield from _item(place, item)
        yield "end", event["stop_reason" if kind == "message" else "status"]
    elif kind.startswith("response."):
        yield from _of_response(kind, event)
    else:
        yield from _of_message(kind, event)


def _of_response(kind: str, event: Mapping[str, Any]) -> Parts:
    if kind == "response.output_item.added":
        yield from _item(event["output_index"], event["item"])
    elif kind.endswith(".delta"):
        yield f"item {event['output_index']}", event["delta"]
    elif kind in LAST_EVENTS:
        yield "end", event["response"]["status"]


def _of_message(kind: str, event: Mapping[str, Any]) -> Parts:
    if kind == "content_block_start":
        yield from _item(event["index"], event["content_block"])
    elif kind == "content_block_delta":
        delta = event["delta"]
        yield f"item {event['index']}", "".join(delta.get(key, "") for key in ("text", "thinking", "partial_json"))
    elif kind == "message_delta":
        yield "end", event["delta"]["stop_reason"]


def _item(place: int, item: Mapping[str, Any]) -> Parts:
    """An item, or the beginning of one: its type, and all that it says."""
    yield f"begin {place}", f"{item['type']} {item.get('name', '')}"
    content = item.get("content") or []
    said = [item.get(key) or "" for key in ("text", "thinking", "arguments")] + [part["text"] for part in content]
    yield f"item {place}", "".join([*map(str, said), str(item.get("input") or "")])
