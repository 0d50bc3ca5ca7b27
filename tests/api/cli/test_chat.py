"""`galaxyline chat` against a server that answers what the test wants, in pipes and on a terminal."""

import asyncio
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import Result
from fastapi import FastAPI
from rich.console import Console
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from api.cli.chat import Piece, Terminal
from tests.support.api_server import DEADLINE_S, AppServer
from tests.support.command_line import run

Answer = list[dict[str, Any]]
"""The deltas of an answer."""


class ChatServer:
    """A server of two models that gives each request the next of its answers, and keeps what was asked."""

    def __init__(self, *answers: Answer | Response, pause_s: float = 0.0, ends: bool = True) -> None:
        self.asked: list[dict[str, Any]] = []
        self._answers = list(answers)
        self._pause_s = pause_s
        self._ends = ends
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})

    async def chat(self, request: Request) -> Response:
        self.asked.append(await request.json())
        answer = self._answers.pop(0)
        return answer if isinstance(answer, Response) else StreamingResponse(self._events(answer))

    async def _events(self, answer: Answer) -> AsyncIterator[bytes]:
        yield b": a comment\n\n"
        for delta in answer:
            yield b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"
            await asyncio.sleep(self._pause_s)
        if self._ends:
            yield b"data: [DONE]\n\n"


@contextmanager
def serving(chat: ChatServer) -> Iterator[str]:
    server = AppServer(chat.app)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


def talk(chat: ChatServer, lines: str, *arguments: str) -> Result:
    with serving(chat) as url:
        return run("chat", "--url", url, *arguments, stdin=lines)


def said(*texts: str) -> Answer:
    return [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]


def test_every_line_is_a_question_and_the_conversation_grows() -> None:
    chat = ChatServer(said("Good ", "morning."), said("Rain."))
    result = talk(chat, "Hello\nWhat is\\\nit like?\n", "--temperature", "0", "--seed", "3", "--max-tokens", "9")
    assert (result.exit_code, result.stdout) == (0, "Good morning.\nRain.\n")
    first, second = chat.asked
    assert first == {
        "model": "first",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "temperature": 0.0,
        "seed": 3,
        "max_tokens": 9,
    }
    assert second["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good morning."},
        {"role": "user", "content": "What is\nit like?"},
    ]


def test_commands_change_the_conversation_and_are_not_sent() -> None:
    chat = ChatServer(said("a"), said("b"), said("c"))
    first = ["/system Be brief.", "/system", "one", "/history", "/reset", "/think on", "two", "/think maybe"]
    lines = [*first, "/nonsense", "/system Other.", "three", "/exit", "four"]
    result = talk(chat, "\n".join(lines), "--model", "second")
    assert result.exit_code == 0
    assert [len(asked["messages"]) for asked in chat.asked] == [2, 2, 2]
    assert [asked["messages"][0]["content"] for asked in chat.asked] == ["Be brief.", "Be brief.", "Other."]
    assert [asked.get("chat_template_kwargs") for asked in chat.asked] == [
        None,
        *[{"thinking": True, "enable_thinking": True}] * 2,
    ]
    assert {asked["model"] for asked in chat.asked} == {"second"}
    for line in ("user: one", "assistant: a", "/think is on or off.", "/nonsense is not a command: /help lists them."):
        assert line in result.stdout.splitlines()


def test_a_thought_is_dimmed_and_not_part_of_the_conversation() -> None:
    chat = ChatServer([{"reasoning": "Hm", "reasoning_content": "Hm"}, {"content": "Yes."}], said("No."))
    result = talk(chat, "one\ntwo\n", "--think")
    assert result.stdout == "Hm\n\nYes.\nNo.\n"
    assert chat.asked[1]["messages"][1] == {"role": "assistant", "content": "Yes."}
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    Terminal(console, is_interactive=False).show([Piece("Hm", is_thought=True), Piece("Yes.", is_thought=False)])
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "\x1b[2mHm\x1b[0m\n\nYes."


def test_a_question_that_is_refused_is_not_kept_and_the_conversation_goes_on() -> None:
    refusal = JSONResponse({"error": {"message": "Too long.", "type": "x", "param": None, "code": 400}}, 400)
    failure = StreamingResponse(iter([b'data: {"error": {"message": "A stage died."}}\n\n']))
    chat = ChatServer(refusal, failure, said("Yes."))
    result = talk(chat, "one\ntwo\nthree\n")
    assert result.exit_code == 0
    assert "answers: Too long." in result.stdout
    assert "The server ends the answer: A stage died." in result.stdout
    assert chat.asked[2]["messages"] == [{"role": "user", "content": "three"}]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--model", "third"], 2, "has no model 'third': it has first, second."),
        (["--temperature", "-1"], 2, "temperature"),
    ],
)
def test_what_cannot_be_followed_is_one_sentence(arguments: list[str], code: int, sentence: str) -> None:
    result = talk(ChatServer(), "one\n", *arguments)
    assert result.exit_code == code
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_that_breaks_off_ends_the_command() -> None:
    result = talk(ChatServer(said("So"), ends=False), "one\ntwo\n")
    assert result.exit_code == 1
    assert "has ended its answer early" in result.stderr


TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A program that makes its input its terminal, and then becomes another one."""


class OnTerminal:
    """The command as a process on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._screen, theirs = pty.openpty()
        command = [sys.executable, "-m", "api.cli", "chat", *arguments]
        # A session of its own makes the terminal the one whose Ctrl-C reaches the process.
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                TAKE_TERMINAL,
                *command,
            ],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def wait_for(self, text: str) -> None:
        """Reads until the text was shown since the last wait."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            ready, _, _ = select.select([self._screen], [], [], max(deadline - time.monotonic(), 0))
            assert ready, self.shown
            self.shown += os.read(self._screen, 4096).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_only() -> None:
    chat = ChatServer(said(*["word "] * 10_000), said("Yes."), pause_s=0.05)
    with serving(chat) as url:
        terminal = OnTerminal("--url", url)
        terminal.wait_for("This is first.")
        terminal.wait_for("> ")
        terminal.type("one\n")
        terminal.wait_for("word word")
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        terminal.type("two\n")
        terminal.wait_for("Yes.")
        terminal.wait_for("> ")
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C stops an answer")
        # A Ctrl-D between two prompts is lost: the terminal forgets it when line editing begins.
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(DEADLINE_S) == 0
    assert [message["role"] for message in chat.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert chat.asked[1]["messages"][1]["content"].startswith("word word")
