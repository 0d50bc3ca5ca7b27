"""The clients of the chaos benchmark, which stream answers and compare every token with the fault-free one."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import httpx
import msgspec

from benchmarks.chaos.requests import Damage, Question, damage
from benchmarks.support.server_process import ServerError

TOKEN_SECONDS = 240.0
"""Seconds after which a client that gets no token considers the answer lost; recoveries take seconds."""
ABORTED_SHARE = 0.15
FAILURES_MAX = 50
"""Client errors after which the run ends, as more would tell nothing new."""
DATA = "data: "
LOGPROB_TOLERANCE = 1e-3

Tokens = list[list[int]]
"""Token ids by choice."""


class ClientError(Exception):
    """A client did not get what it asked for."""


class StreamedAnswer(msgspec.Struct):
    """An answer as far as it has come: its tokens by choice, and their log-probabilities if they were asked for."""

    tokens: Tokens
    logprobs: list[float]
    is_whole: bool = False

    @property
    def token_count(self) -> int:
        """The number of tokens of all choices."""
        return sum(map(len, self.tokens))


class Totals(msgspec.Struct):
    """What all clients got; `errors` are messages."""

    requests: int = 0
    aborted: int = 0
    tokens: int = 0
    lost: int = 0
    repeated: int = 0
    changed: int = 0
    errors: list[str] = []

    def count_answer(self, question: Question, reference: StreamedAnswer, answer: StreamedAnswer) -> None:
        """Counts an answer that has ended, by itself or by its client, and compares it with the reference."""
        self.requests += 1
        self.aborted += not answer.is_whole
        self.tokens += answer.token_count
        for expected, got in zip(reference.tokens, answer.tokens, strict=True):
            found = damage(expected, got, is_whole=answer.is_whole)
            self._note(question, found)
        for expected_logprob, logprob in zip(reference.logprobs, answer.logprobs, strict=False):
            if abs(expected_logprob - logprob) > LOGPROB_TOLERANCE:
                self._note(question, Damage(changed=1))

    def _note(self, question: Question, found: Damage) -> None:
        if found:
            self.lost += found.lost
            self.repeated += found.repeated
            self.changed += found.changed
            self.errors.append(f"{question}: {found}")


class Load:
    """Clients that each ask one question after the other until `stop`."""

    def __init__(self, url: str, questions: Sequence[Question], seed: int) -> None:
        self.totals = Totals()
        self.last_token_at = 0.0
        self._url = f"{url}/v1/completions"
        self._questions = questions
        self._seed = seed
        self._references: list[StreamedAnswer] = []
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
            if one.tokens != other.tokens:
                raise ClientError(f"Without any fault the server answered differently the second time: {question}.")

    async def _ask_all(self, http: httpx.AsyncClient, questions: Sequence[Question]) -> list[StreamedAnswer]:
        return list(await asyncio.gather(*(self._whole(http, question) for question in questions)))

    async def _whole(self, http: httpx.AsyncClient, question: Question) -> StreamedAnswer:
        answer = StreamedAnswer([[] for _ in range(question.choices)], [])
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
            is_aborted = draw.random() < ABORTED_SHARE
            most = draw.randrange(1, reference.token_count) if is_aborted else None
            answer = StreamedAnswer([[] for _ in range(question.choices)], [])
            try:
                await self._follow(http, question, answer, most)
            except (ClientError, httpx.HTTPError, asyncio.TimeoutError) as error:
                self.totals.errors.append(f"{question}, after {answer.token_count} tokens: {error!r:.300}")
            self.totals.count_answer(question, reference, answer)

    async def _follow(
        self, http: httpx.AsyncClient, question: Question, answer: StreamedAnswer, most: int | None
    ) -> None:
        """Asks a question and adds tokens to the answer, `most` at most. Raises ClientError or httpx.HTTPError."""
        async with http.stream("POST", self._url, json=question.body()) as response:
            if response.status_code != httpx.codes.OK:
                raise ClientError(f"{response.status_code}: {(await response.aread()).decode()}")
            async with aclosing(_events(response)) as events:
                async for event in events:
                    self._read_event(answer, event)
                    if most is not None and answer.token_count >= most:
                        return
        answer.is_whole = True

    def _read_event(self, answer: StreamedAnswer, event: str) -> None:
        body = json.loads(event)
        if "error" in body:
            raise ClientError(event)
        for choice in body["choices"]:
            tokens = choice["token_ids"]
            answer.tokens[choice["index"]] += tokens
            if choice.get("logprobs"):
                answer.logprobs += choice["logprobs"]["token_logprobs"]
            if tokens:
                self.last_token_at = asyncio.get_running_loop().time()
                self._token_came.set()


def client() -> httpx.AsyncClient:
    """An HTTP client that opens any number of connections."""
    return httpx.AsyncClient(timeout=TOKEN_SECONDS, limits=httpx.Limits(max_connections=None), trust_env=False)


async def _events(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The events of a stream without the last one, [DONE]. Raises ClientError if that is missing."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line:
            yield line.removeprefix(DATA)
    raise ClientError("The stream ended without [DONE].")
