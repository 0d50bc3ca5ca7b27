"""The route POST /v1/messages/count_tokens."""

from starlette.requests import Request
from starlette.responses import Response

from api.openai.anthropic.answer import TokenCount
from api.openai.anthropic.messages import counted_chat, parse_count_request
from api.openai.bodies import encode
from api.openai.chat import ChatModel, chat_turn
from api.openai.prompts import refuse_other_model
from api.server.request import CLIENT_LEFT, Bodies, Check, ClientDisconnectedError, RequestDeadline


class TokenCounts:
    """Counts the tokens of conversations, with the model's template and tokenizer: the engine need not be ready."""

    def __init__(self, model: ChatModel, bodies: Bodies) -> None:
        self._model = model
        self._bodies = bodies

    async def count(self, request: Request) -> Response:
        """Answers with the number of tokens of a conversation. Raises RequestError."""
        try:
            # On a thread, as a body may bring a template, which takes long.
            answer = await self._bodies.parse(request, self._counted, RequestDeadline(None), inline=False)
        except ClientDisconnectedError:
            return Response(status_code=CLIENT_LEFT)
        return Response(answer, media_type="application/json")

    def _counted(self, body: bytes, check: Check) -> bytes:
        request = parse_count_request(body)
        served = self._model.served
        refuse_other_model(request.model, served)
        prompt = chat_turn(counted_chat(request), self._model).prompt
        tokens = served.tokenizer.encode(prompt, add_special_tokens=False, check=check)
        return encode(TokenCount(input_tokens=len(tokens)))
