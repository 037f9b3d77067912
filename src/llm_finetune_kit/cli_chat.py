"""`finetune chat`: talk with a model, and hear its base and its tuned side. Holds no logic of its own."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from llm_finetune_kit.arguments import Parser
from llm_finetune_kit.cli_evaluate import checked_model, decoding, decoding_arguments
from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import KitError, nearest

NEW_TOKENS = 256  # of an answer in a talk
LONGEST_WORD = 30  # letters that are waited for: what is longer is no word, or a script without spaces

TEXT = """\
talk with a model, answer by answer

Answers are shown as they are made, and the model sees what was said before. Where it is a tuned model, /base and /tuned
switch its adapter off and on in the middle of a talk. What is written through a pipe is answered line by line.
"""
EXAMPLES = (
    "finetune chat outputs/final",
    "finetune chat demo --system 'Answer in one sentence.'",
    "finetune chat outputs/demo --temperature 0.7 --seed 1",
    "printf '%s\\n' 'Hello' 'Who are you?' | finetune chat demo",
)
WORDS = {
    "/base": "let the base answer: the adapter is switched off",
    "/tuned": "let the tuned model answer again",
    "/system TEXT": "what the model is told before the talk (no TEXT: nothing)",
    "/reset": "forget what was said",
    "/help": "these words",
    "/quit": "end (as Ctrl-D)",
    "//...": "say something that begins with /",
}


def chat_command(words: list[str]) -> int:
    """`finetune chat [MODEL]`; returns the exit code."""
    parser = Parser(prog="finetune chat", description=TEXT, examples=EXAMPLES, exits=(0, 2, 4, 5))
    help_text = "a model name, a run, a folder (default outputs/final: the newest run's)"
    parser.add_argument("model", nargs="?", default="outputs/final", help=help_text)
    parser.add_argument("--system", default="", help="what the model is told before the talk")
    decoding_arguments(parser, str(NEW_TOKENS))
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="number format (default: by machine)")
    asked = parser.parse_all(words)
    model = checked_model(asked.model)
    how = GenerationSection(**{"max_new_tokens": NEW_TOKENS} | decoding(asked))
    _tell(f"loading {model}")
    from llm_finetune_kit.generation.conversation import Conversation
    from llm_finetune_kit.opening import open_here

    talk = Conversation(open_here(model, asked.dtype), how, system=asked.system, seed=asked.seed)
    _Chat(talk).go_on()
    return 0


class _Chat:
    """The dialogue at the terminal or through a pipe: answers go to stdout, all else to stderr."""

    def __init__(self, talk: Any) -> None:
        self.talk = talk
        self.live = sys.stdin.isatty() and sys.stdout.isatty()
        self.warned = False  # that each side reads what the other one said

    def go_on(self) -> None:
        """Until /quit or the end of what is typed."""
        if self.live:
            with suppress(ImportError):
                import readline  # noqa: F401  (input() then has a history and the usual keys)
            _tell(f"{self._who()}. /help lists what you can say, Ctrl-C stops an answer, Ctrl-D ends.")
        for line in self._lines():
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    self._obey(text)
                elif text:
                    self._answer(text.removeprefix("/") if text.startswith("//") else text)
            except KitError as error:
                from llm_finetune_kit.terminal import folded

                _tell(folded(error))

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield input("\nyou: " if self.live else "")
            except EOFError:
                if self.live:
                    print()
                return
            except KeyboardInterrupt:
                if not self.live:
                    raise
                _tell("\nCtrl-D or /quit ends")

    def _answer(self, text: str) -> None:
        lost = self.talk.hear(text)
        if lost:
            _tell(f"(the model reads {self.talk.reads:,} tokens: the first {lost} messages of the talk are forgotten)")
        if self.talk.overflows:
            _tell(f"(this is longer than the {self.talk.reads:,} tokens that the model reads: its beginning is cut off)")
        if self.live:
            print(f"{self.talk.answers}: ", end="", flush=True)
        pieces = self.talk.answer()
        try:
            _print_pieces(pieces, len(f"{self.talk.answers}: ") if self.live else None)
            print("" if self.live else "\n", flush=True)
        except KeyboardInterrupt:
            if not self.live:
                raise
            _tell("\n(stopped)")
        finally:
            pieces.close()

    def _obey(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        known = [name.partition(" ")[0] for name in WORDS]
        if word in ("/base", "/tuned"):
            self._switch(word == "/tuned")
        elif word == "/system":
            self.talk.system = rest.strip()
            _tell(f"(system message: {self.talk.system or 'none'})")
        elif word == "/reset":
            self.talk.forget()
            _tell("(all that was said is forgotten)")
        elif word == "/help":
            width = max(map(len, WORDS))
            _tell("\n".join(f"  {name:<{width}}  {means}" for name, means in WORDS.items()))
        else:
            near = nearest(word, known)
            _tell(f"({word} is not known; {f'did you mean {near[0]}?' if near else '/help lists what is'})")

    def _switch(self, tuned: bool) -> None:
        if not self.talk.opened.is_adapter:
            _tell("(this model has one side only: there is no adapter to switch)")
            return
        self.talk.tuned = tuned
        who = "the tuned model" if tuned else "the base, with the adapter switched off,"
        mixed = bool(self.talk.messages) and not self.warned
        self.warned = self.warned or mixed
        _tell(f"({who} answers from here on{'; it reads what the other side said as well, /reset forgets it' if mixed else ''})")

    def _who(self) -> str:
        sides = f" (tuned from {self.talk.opened.base.name})" if self.talk.opened.is_adapter else ""
        return f"{self.talk.opened.name}{sides} reads {self.talk.reads:,} tokens"


def _print_pieces(pieces: Iterator[str], column: int | None = None) -> None:
    """Show an answer as it comes, without white space before and after it.

    With the `column` of a terminal it begins at, a word is shown once it is whole, on the next line where it does not fit.
    """
    held, begun = "", False
    try:
        for piece in pieces:
            held = held + piece if begun else (held + piece).lstrip()
            shown = held.rstrip() if column is None else _whole_words(held)
            if shown:
                column = _print_words(shown, column)
                held, begun = held[len(shown) :], True
    finally:
        _print_words(held.rstrip(), column)


def _whole_words(text: str) -> str:
    """What of a text can be shown: all but a last word that may go on, and the white space around it."""
    last = re.search(r"\s*\S*$", text)
    start = last.start() if last else 0
    return text.rstrip() if len(text.rstrip()) - start > LONGEST_WORD else text[:start].rstrip()


def _print_words(text: str, column: int | None) -> int | None:
    """Print a text, which may begin with white space, from a column of the terminal on; returns where it ended."""
    if column is None:
        print(text, end="", flush=True)
        return None
    from rich.cells import cell_len

    from llm_finetune_kit.terminal import width

    columns = width()
    for space, word in re.findall(r"(\s*)(\S*)", text):
        _, newline, indent = space.rpartition("\n")
        start = (0 if newline else column) + cell_len(indent.expandtabs(8))
        if word and start and start + cell_len(word) > columns:
            space, start = "\n", 0
        print(space + word, end="", flush=True)
        column = (start + cell_len(word) - 1) % columns + 1  # a full line is no empty one: the cursor waits at its end
    sys.stdout.flush()
    return column


def _tell(text: str) -> None:
    """Say something beside the talk, on a terminal in lines that break between words."""
    if sys.stderr.isatty():
        from llm_finetune_kit.terminal import width

        text = "\n".join(textwrap.fill(line, max(40, width(sys.stderr))) for line in text.split("\n"))
    print(text, file=sys.stderr, flush=True)
