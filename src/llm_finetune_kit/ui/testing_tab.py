"""The fourth tab: base against tuned in figures and in conversation, and what there is to take home."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import KitError
from llm_finetune_kit.ui import views
from llm_finetune_kit.ui.answers import MOST_NEW_TOKENS, Turn
from llm_finetune_kit.ui.desk import Desk

NOTHING = "Nothing to test yet", "Runs that are finished appear here: ask them, compare them, take them home."
ASK = "Ask both"
KEYS = "Enter asks, Shift+Enter begins a new line."
SIDES = ({"key": "base", "title": "Base"}, {"key": "tuned", "title": "Tuned"})
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def testing_tab(desk: Desk, tab: Any, blocks: Any) -> None:
    """Lay out the tab inside the Blocks that are being built."""
    import gradio as gr

    run = gr.Dropdown([], label="Run", info="Runs that have a model, the newest first.", elem_id="tested")
    compared = gr.HTML(views.hint(*NOTHING), elem_id="comparison")
    turns = gr.State([])
    talk = gr.HTML(conversation([]), elem_id="chat")
    with gr.Row(equal_height=False):
        question = gr.Textbox(label="Question to both", info=KEYS, max_lines=6, scale=5, min_width=280, elem_id="question")
        with gr.Column(scale=1, min_width=160):
            ask = gr.Button(ASK, variant="primary", elem_id="ask")
            clear = gr.Button("Start over", elem_id="clear")
    with gr.Accordion("How they answer", open=False):
        tokens = gr.Slider(8, MOST_NEW_TOKENS, value=128, step=8, label="Longest answer in tokens", elem_id="longest")
        heat = gr.Slider(0, 2, value=0, step=0.1, label="Temperature", info="0 always takes the likeliest token.")

    def choices(chosen: str | None) -> Any:
        known = desk.tested()
        return gr.update(choices=known, value=chosen if chosen in known else next(iter(known), None))

    def answered(name: str | None, said: list[Turn], asked: str, longest: float, warmth: float) -> Iterator[tuple[Any, ...]]:
        try:
            how = GenerationSection(max_new_tokens=min(int(longest), MOST_NEW_TOKENS), temperature=float(warmth))
            for place, grown in enumerate(desk.answering.ask(desk.workspace.run(name or ""), said, asked, how)):
                at_work = ["", gr.update(value="Answering…", interactive=False), gr.update(interactive=False)]
                yield grown, conversation(grown), *([gr.skip()] * 3 if place else at_work)  # what is typed meanwhile stays
        except KitError as error:
            yield said, conversation(said) + views.error(error), asked, gr.skip(), gr.skip()

    def ready() -> tuple[Any, Any]:
        return gr.update(value=ASK, interactive=True), gr.update(interactive=True)

    def compare(name: str | None) -> str:
        try:
            return desk.comparison(name) if name else views.hint(*NOTHING)
        except KitError as error:
            return views.error(error)

    def fresh() -> tuple[list[Turn], str]:
        return [], conversation([])

    gr.on([tab.select, blocks.load], choices, run, run, **QUIET)
    run.change(compare, run, compared, **QUIET)
    run.change(fresh, None, [turns, talk], **QUIET)
    clear.click(fresh, None, [turns, talk], **QUIET)
    ways = [ask.click, question.submit]
    shown = [turns, talk, question, ask, clear]
    done = gr.on(ways, answered, [run, turns, question, tokens, heat], shown, concurrency_limit=4, **QUIET)
    done.then(ready, None, [ask, clear], **QUIET)


def conversation(turns: list[Turn]) -> str:
    """Both sides of a conversation, text as text."""
    return views.piece("chat", SIDES, [(turn.question, turn.answers | {"at": turn.at}) for turn in turns])
