"""The clients of the chaos benchmark, which compare every token and message with the fault-free one."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import httpx
import msgspec

from benchmarks.chaos.answers import Answer
from benchmarks.chaos.requests import Asked, Damage, damage
from benchmarks.chaos.typed_events import LAST_EVENTS, is_failure
from benchmarks.support.server_process import ServerError

TOKEN_SECONDS = 240.0
"""Seconds after which a client that gets no token considers the answer lost; recoveries take seconds."""
ABORTED_SHARE = 0.15
FAILURES_MAX = 50
"""Client errors after which the run ends, as more would tell nothing new."""
NAME, DATA = "event: ", "data: "
COMPLETIONS = "/v1/completions"
LOGPROB_TOLERANCE = 1e-3


class ClientError(Exception):
    """A client did not get what it asked for."""


class Totals(msgspec.Struct):
    """What all clients got; `errors` are sentences. Damaged messages need not have damaged tokens."""

    requests: int = 0
    chats: int = 0
    aborted: int = 0
    tokens: int = 0
    lost: int = 0
    repeated: int = 0
    changed: int = 0
    messages: int = 0
    errors: list[str] = []

    def count_answer(self, question: Asked, reference: Answer, answer: Answer) -> None:
        """Counts an answer that has ended, by itself or by its client, and compares it with the reference."""
        self.requests += 1
        self.chats += question.path != COMPLETIONS
        self.aborted += not answer.is_whole
        self.tokens += answer.token_count
        for expected, got in zip(reference.tokens, answer.tokens, strict=True):
            self._note(question, damage(expected, got, is_whole=answer.is_whole))
        for text, got_text in zip(reference.texts, answer.texts, strict=True):
            if found := damage(text, got_text, is_whole=answer.is_whole):
                self.messages += 1
                self.errors.append(f"The message of {question}, in characters: {found}")
        for expected_logprob, logprob in zip(reference.logprobs, answer.logprobs, strict=False):
            if abs(expected_logprob - logprob) > LOGPROB_TOLERANCE:
                self._note(question, Damage(changed=1))

    def _note(self, question: Asked, found: Damage) -> None:
        if found:
            self.lost += found.lost
            self.repeated += found.repeated
            self.changed += found.changed
            self.errors.append(f"{question}: {found}")


class Load:
    """Clients that each ask one question after the other until `stop`."""

    def __init__(self, url: str, questions: Sequence[Asked], seed: int) -> None:
        self.totals = Totals()
        self.last_token_at = 0.0
        self._url = url
        self._questions = questions
        self._seed = seed
        self._references: list[Answer] = []
        self._token_came = asyncio.Event()
        self._stopping = False
        self._clients: list[asyncio.Task[None]] = []

    @property
    def has_given_up(self) -> bool:
        """Whether the clients have stopped after FAILURES_MAX errors."""
        return len(self.totals.errors) >= FAILURES_MAX

    async def learn(self) -> None:
        """Gets the reference answers: asks every question twice, in another order, without faults.

        Raises ClientError if the answers differ.
        """
        async with client() as http:
            self._references = await self._ask_all(http, self._questions)
            again = await self._ask_all(http, self._questions[::-1])
        for question, one, other in zip(self._questions, self._references, again[::-1], strict=True):
            if (one.tokens, one.texts) != (other.tokens, other.texts):
                raise ClientError(f"Without any fault the server answered differently the second time: {question}.")

    async def _ask_all(self, http: httpx.AsyncClient, questions: Sequence[Asked]) -> list[Answer]:
        return list(await asyncio.gather(*(self._whole(http, question) for question in questions)))

    async def _whole(self, http: httpx.AsyncClient, question: Asked) -> Answer:
        answer = Answer.of(question.choices)
        await self._follow(http, question, answer, None)
        return answer

    def start(self, clients: int, http: httpx.AsyncClient) -> None:
        """Starts the clients."""
        self._clients = [
            asyncio.create_task(self._ask_on(http, random.Random(f"{self._seed}-{number}")))
            for number in range(clients)
        ]

    async def stop(self) -> None:
        """Stops the clients when each has got its last answer."""
        self._stopping = True
        await asyncio.gather(*self._clients)

    async def next_token(self, seconds: float) -> float:
        """Waits for the next token; returns its time by the loop. Raises ServerError if none comes within `seconds`."""
        self._token_came.clear()
        try:
            await asyncio.wait_for(self._token_came.wait(), seconds)
        except asyncio.TimeoutError:
            raise ServerError(f"No client got a token within {seconds:g} s.") from None
        return self.last_token_at

    async def _ask_on(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        while not self._stopping and not self.has_given_up:
            number = draw.randrange(len(self._questions))
            question, reference = self._questions[number], self._references[number]
            is_aborted = draw.random() < ABORTED_SHARE and question.is_streamed and reference.token_count > 1
            most = draw.randrange(1, reference.token_count) if is_aborted else None
            answer = Answer.of(question.choices)
            try:
                await self._follow(http, question, answer, most)
            except (ClientError, httpx.HTTPError, asyncio.TimeoutError) as error:
                self.totals.errors.append(f"{question}, after {answer.token_count} tokens: {error!r:.300}")
            self.totals.count_answer(question, reference, answer)

    async def _follow(self, http: httpx.AsyncClient, question: Asked, answer: Answer, most: int | None) -> None:
        """Asks a question and adds what comes to the answer, `most` at most. Raises ClientError or httpx.HTTPError."""
        async with http.stream("POST", f"{self._url}{question.path}", json=question.body()) as response:
            if response.status_code != httpx.codes.OK:
                raise ClientError(f"{response.status_code}: {(await response.aread()).decode()}")
            if not question.is_streamed:
                self._read_event(answer, (await response.aread()).decode())
                answer.is_whole = True
                return
            async with aclosing(_events(response)) as events:
                async for event in events:
                    self._read_event(answer, event)
                    if most is not None and answer.token_count >= most:
                        return
        answer.is_whole = True

    def _read_event(self, answer: Answer, event: str) -> None:
        body = json.loads(event)
        if is_failure(body):
            raise ClientError(event)
        if answer.add_event(body):
            self.last_token_at = asyncio.get_running_loop().time()
            self._token_came.set()


def client() -> httpx.AsyncClient:
    """An HTTP client that opens any number of connections."""
    return httpx.AsyncClient(timeout=TOKEN_SECONDS, limits=httpx.Limits(max_connections=None), trust_env=False)


async def _events(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The events of a stream. Raises ClientError if the last one is missing: [DONE], or one of LAST_EVENTS."""
    name = ""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith(NAME):
            name = line.removeprefix(NAME)
        elif line:
            yield line.removeprefix(DATA)
            if name in LAST_EVENTS:
                return
    raise ClientError("The stream ended before its last event.")
