"""The id that a client gives its request, to find it in its own log and ours."""

import re
import uuid

REQUEST_ID_HEADER = "x-request-id"

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def given_request_id(text: str | None) -> str | None:
    """The id, or None where none was given that can stand in a header and a log."""
    return text if text is not None and _REQUEST_ID.fullmatch(text) else None


def new_request_id() -> str:
    """An id for a request that brings none."""
    return uuid.uuid4().hex
