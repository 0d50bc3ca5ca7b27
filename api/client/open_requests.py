"""The requests that an engine has, as its front end knows them."""

from api.client.load import Load
from api.client.request_stream import RequestStream
from api.messages.engine import AddRequest


class OpenRequests:
    """Requests that have not ended, by id: `streams` is for looking up only."""

    def __init__(self) -> None:
        self.streams: dict[int, RequestStream] = {}
        self._tokens = 0

    @property
    def load(self) -> Load:
        """What the engine has to do."""
        return Load(len(self.streams), self._tokens)

    def add(self, stream: RequestStream) -> None:
        """Takes a request in. Raises ValueError for an id that is in use."""
        request_id = stream.request.request_id
        if request_id in self.streams:
            raise ValueError(f"Request {request_id} is running already.")
        self.streams[request_id] = stream
        self._tokens += _tokens(stream.request)

    def remove(self, request_id: int) -> None:
        """A request has ended, or is another engine's from now on."""
        self._tokens -= _tokens(self.streams.pop(request_id).request)

    def unanswered(self) -> list[RequestStream]:
        """Those of whose answers nothing has come yet, in the order of their beginning."""
        return [stream for stream in self.streams.values() if not stream.has_begun]


def _tokens(request: AddRequest) -> int:
    return len(request.tokens) + request.max_tokens
