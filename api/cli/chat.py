"""`galaxyline chat`: a conversation in the terminal with the model of a running server."""

import contextlib
import http.client
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from api.cli.parameters import LoggedCommand, result_console
from api.cli.server import Server, server_key, server_url
from api.errors import EngineError, OptionError

if TYPE_CHECKING:
    from rich.console import Console

SILENCE_TIMEOUT_S = 600.0
"""How long the server may take for the next token: before the first one, a long prompt is computed."""

PROMPT = "> "
MORE = ". "
"""What is shown before a line that goes on where the one before ended with a backslash."""

HELP = """\
/system TEXT    begin again with these instructions; /system alone shows them
/reset          begin again, with the same instructions
/history        show the conversation so far
/think on|off   ask the model to think before it answers, or not to
/help           show this
/exit           end, as does Ctrl-D
A line that ends with a backslash goes on in the next one. Ctrl-C stops an answer, and keeps what came of it."""

EVENT = b"data:"
DONE = b"[DONE]"


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Error | None = None


class Piece(msgspec.Struct, frozen=True):
    """The next text of an answer, or of the thought before it."""

    text: str
    is_thought: bool


class Conversation:
    """The messages so far, and the server that goes on with them."""

    def __init__(self, server: Server, model: str, options: dict[str, Any], system: str | None = None) -> None:
        """`options` are fields of every request, such as its temperature."""
        self._server = server
        self._model = model
        self._options = options
        self.thinks: bool | None = None
        self.system = system
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forgets all messages but the instructions."""
        self.messages.clear()

    def ask(self, question: str) -> Generator[Piece, None, None]:
        """Gives the answer to a question as it comes. Closed early, what has come counts as the answer.

        A question that is refused, or gets no answer, is not part of the conversation. Raises GalaxylineError.
        """
        asked = {"role": "user", "content": question}
        answer: list[str] = []
        self.messages.append(asked)
        try:
            with contextlib.closing(self._pieces()) as pieces:
                for piece in pieces:
                    if not piece.is_thought:
                        answer.append(piece.text)
                    yield piece
        finally:
            if text := "".join(answer):
                self.messages.append({"role": "assistant", "content": text})
            else:
                self.messages.remove(asked)

    def _pieces(self) -> Generator[Piece, None, None]:
        instructions = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self._model, "messages": instructions + self.messages, "stream": True, **self._options}
        if self.thinks is not None:
            body["chat_template_kwargs"] = {"thinking": self.thinks, "enable_thinking": self.thinks}
        path = "/v1/chat/completions"
        with self._server.open(path, msgspec.json.encode(body), SILENCE_TIMEOUT_S) as response:
            try:
                yield from _read_events(response)
            except (OSError, http.client.HTTPException) as error:
                raise self._server.lost(error, SILENCE_TIMEOUT_S) from error


def _read_events(response: http.client.HTTPResponse) -> Iterator[Piece]:
    """Reads server-sent events up to the last one. Raises EngineError with the server's sentence."""
    for line in response:
        if not line.startswith(EVENT):
            continue
        data = line.removeprefix(EVENT).strip()
        if data == DONE:
            return
        try:
            event = msgspec.json.decode(data, type=_Event)
        except msgspec.DecodeError as error:
            raise EngineError(f"The server sends an event that is not one of a chat: {error}.") from error
        if event.error is not None:
            raise EngineError(f"The server ends the answer: {event.error.message}")
        for choice in event.choices:
            delta = choice.delta
            if thought := delta.reasoning or delta.reasoning_content:
                yield Piece(thought, is_thought=True)
            if delta.content:
                yield Piece(delta.content, is_thought=False)
    raise http.client.IncompleteRead(b"")


class Terminal:
    """Reads questions and shows answers; on a terminal with a prompt, line editing, and the thought dimmed."""

    def __init__(self, console: "Console", *, is_interactive: bool) -> None:
        self._console = console
        self._is_interactive = is_interactive
        if is_interactive:
            # Gives `input` its line editing, and the lines before.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401, PLC0415 - not where Python was built without it

    def read(self) -> str | None:
        """Reads a question; None at the end of the input. Raises KeyboardInterrupt where Ctrl-C is pressed."""
        lines: list[str] = []
        while True:
            line = self._line(MORE if lines else PROMPT)
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line.removesuffix("\\"))

    def tell(self, text: str) -> None:
        """Shows a line that is not the model's."""
        self._console.print(text, style="italic", markup=False, highlight=False, soft_wrap=True)

    def show(self, pieces: Iterable[Piece]) -> None:
        """Shows an answer as it comes, with an empty line between its thought and the rest."""
        was_thought = False
        for piece in pieces:
            if was_thought and not piece.is_thought:
                self._console.print("\n")
            was_thought = piece.is_thought
            style = "dim" if piece.is_thought else None
            self._console.print(piece.text, style=style, end="", markup=False, highlight=False, soft_wrap=True)
            self._console.file.flush()

    def end_line(self) -> None:
        """Ends the line of an answer."""
        self._console.print()

    def _line(self, prompt: str) -> str | None:
        if self._is_interactive:
            try:
                return input(prompt)
            except EOFError:
                self.end_line()
                return None
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None


class Chat:
    """The loop of questions, answers and commands."""

    def __init__(self, conversation: Conversation, terminal: Terminal) -> None:
        self._conversation = conversation
        self._terminal = terminal
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/reset": lambda _: self._reset(),
            "/history": lambda _: self._history(),
            "/think": self._think,
            "/help": lambda _: self._terminal.tell(HELP),
        }

    def run(self) -> None:
        """Answers until /exit or the end of the input."""
        while True:
            try:
                question = self._terminal.read()
            except KeyboardInterrupt:
                self._terminal.end_line()
                self._terminal.tell("Ctrl-D or /exit ends; Ctrl-C stops an answer.")
                continue
            if question is None or question.strip() == "/exit":
                return
            if question.strip():
                self._follow(question)

    def _follow(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
        elif word.startswith("/"):
            self._terminal.tell(f"{word} is not a command: /help lists them.")
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        with contextlib.closing(self._conversation.ask(question)) as pieces:
            try:
                self._terminal.show(pieces)
            except KeyboardInterrupt:
                self._terminal.end_line()
                self._terminal.tell("(stopped)")
            except EngineError as error:
                # The conversation can go on, as after a prompt that was too long, or when a stage has come back.
                self._terminal.end_line()
                self._terminal.tell(str(error))
            else:
                self._terminal.end_line()

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
            self._reset()
        else:
            self._terminal.tell(self._conversation.system or "Nothing is set: /system TEXT sets instructions.")

    def _reset(self) -> None:
        self._conversation.reset()
        self._terminal.tell("A new conversation.")

    def _history(self) -> None:
        for message in self._conversation.messages:
            self._terminal.tell(f"{message['role']}: {message['content']}")

    def _think(self, given: str) -> None:
        if given not in {"on", "off"}:
            self._terminal.tell("/think is on or off.")
            return
        self._conversation.thinks = given == "on"


@click.command("chat", cls=LoggedCommand)
@server_url
@server_key
@click.option("--model", help="The model to talk with.  [default: the first that the server has]")
@click.option("--system", help="Instructions that come before the conversation.")
@click.option("--think/--no-think", default=None, help="Ask the model to think first, or not to.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="The longest answer.  [default: what the model allows]")
@click.option("--temperature", type=click.FloatRange(min=0), help="How freely tokens are drawn.")
@click.option("--seed", type=int, help="The seed of every answer.")
def chat_command(
    url: str,
    api_key: str | None,
    model: str | None,
    system: str | None,
    think: bool | None,
    **options: Any,
) -> None:
    """Talk with the model of a running server.

    /help lists the commands of the conversation. Without a terminal, every line of the input is a question.
    """
    server = Server(url, api_key)
    models = [entry.id for entry in server.get("/v1/models", _Models).data]
    if model is not None and model not in models:
        raise OptionError(f"The server at {server.base} has no model {model!r}: it has {', '.join(models)}.")
    if model is None and not models:
        raise EngineError(f"The server at {server.base} has no model.")
    given = {name: value for name, value in options.items() if value is not None}
    conversation = Conversation(server, model or models[0], given, system)
    conversation.thinks = think
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    terminal = Terminal(result_console(), is_interactive=is_interactive)
    if is_interactive:
        # Elsewhere a second Ctrl-C ends the process at once; here each one ends an answer.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        terminal.tell(f"This is {model or models[0]}. /help lists the commands; Ctrl-D ends.")
    Chat(conversation, terminal).run()
