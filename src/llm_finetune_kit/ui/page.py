"""The page: four tabs of controls, wired to the desk. No HTML of a user's text and no decision is made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from llm_finetune_kit.config import GenerationSection, demo_values
from llm_finetune_kit.errors import KitError
from llm_finetune_kit.ui import form, uploads, views
from llm_finetune_kit.ui.answers import MOST_NEW_TOKENS, Turn
from llm_finetune_kit.ui.desk import Desk

SECTIONS = {  # headings of the folded settings
    "lora": "LoRA",
    "model": "Model",
    "training": "More about training",
    "evaluation": "Evaluation",
    "evaluation.generation": "Answers during evaluation",
    "output": "Output",
}
LIVE = '<div id="{}" aria-live="{}"></div>'
START_JS = "(...all) => { window.kit.follow(all[0]); return all; }"


def told(work: Callable[..., str]) -> Callable[..., str]:
    """A handler whose faults are shown as a card instead of being raised."""

    def handler(*values: Any) -> str:
        try:
            return work(*values)
        except KitError as error:
            return views.error(error)

    return handler


class Page:
    """Builds the Blocks; `controls` holds the gradio component of every knob by its path."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.known = form.controls()
        self.controls: dict[str, Any] = {}

    def build(self) -> Any:
        """The gradio Blocks."""
        import gradio as gr

        with gr.Blocks(title="LLM Finetune Kit", analytics_enabled=False) as blocks:
            gr.HTML('<header class="kit top"><h1>LLM Finetune Kit</h1><p class="soft">Model, dataset, training, testing: from the first tab to the last.</p></header>')  # fmt: skip
            with gr.Tabs(elem_id="tabs"):
                with gr.Tab("1 Model", id="model"):
                    self._model_tab()
                with gr.Tab("2 Dataset", id="dataset"):
                    self._dataset_tab()
                with gr.Tab("3 Training", id="training"):
                    self._training_tab()
                with gr.Tab("4 Testing", id="testing") as testing:
                    self._testing_tab(testing, blocks)
            self._remember(blocks)
        blocks.queue(default_concurrency_limit=8, max_size=500)
        return blocks

    # --- controls ------------------------------------------------------------------------------------------

    def _control(self, path: str) -> Any:
        """The gradio component of a knob."""
        import gradio as gr

        one = self.known[path]
        look: dict[str, Any] = {"label": one.label, "info": one.help, "value": one.value, "elem_id": f"knob-{path.replace('.', '-')}"}
        if one.kind == "switch":
            made = gr.Checkbox(**look)
        elif one.kind in ("choice", "choices"):
            made = gr.Dropdown(list(one.choices), multiselect=one.kind == "choices", **look)
        else:
            made = gr.Textbox(lines=3 if one.kind == "lines" else 1, max_lines=12, placeholder=one.placeholder, **look)
        self.controls[path] = made
        return made

    def _values(self, *given: Any) -> dict[str, Any]:
        return dict(zip(self.controls, given, strict=True))

    def _asks(self, button: Any, work: Callable[[dict[str, Any]], Any], outputs: Any, **more: Any) -> Any:
        """Call `work` with what the whole form holds."""
        inputs = list(self.controls.values())
        return button.click(lambda *given: work(self._values(*given)), inputs, outputs, api_visibility="private", **more)

    # --- tabs ----------------------------------------------------------------------------------------------

    def _model_tab(self) -> None:
        import gradio as gr

        rows = self.desk.model_rows()
        labels = {"no": "does not fit here"}
        choices = [(f"{row['name']} · {views.count(row['parameters'])} weights · {labels.get(row['fits'], row['fits'])}", row["name"]) for row in rows]  # fmt: skip
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                chosen = gr.Dropdown(choices, value=None, allow_custom_value=True, label="Model", elem_id="model-name",
                    info="A known name, a hub id such as owner/name, or a folder inside the folder where the page was started.")  # fmt: skip
                self.controls["model.name"] = chosen
                self.demo = gr.Button("Try the demo: a small model and sample data, under a minute", elem_id="demo")
                gr.HTML(self._machine())
            with gr.Column(scale=3, min_width=300):
                shown = gr.HTML(views.hint("No model chosen", "Choose one, and this place says whether fine-tuning it fits on this machine, and why."), elem_id="model-card")  # fmt: skip
        with gr.Accordion(f"All {len(rows)} known models, and what each takes here", open=False):
            gr.HTML(views.models(rows))
        look = told(lambda name: self.desk.model(name) if name else views.hint("No model chosen", "Choose one on the left."))
        chosen.change(look, chosen, shown, api_visibility="private", show_progress="minimal", concurrency_limit=2)

    def _machine(self) -> str:
        from llm_finetune_kit.hardware import this_machine

        found = this_machine(self.desk.workspace.root)
        return views.piece("machine", {"name": found.name, "free": found.free_memory, "disk": found.free_disk})

    def _dataset_tab(self) -> None:
        import gradio as gr

        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                sent = gr.File(label="Upload training data", file_count="single", height=150, elem_id="upload")
                said = gr.HTML("", elem_id="upload-said")
                data = gr.Dropdown(self.desk.data_sets(), value=None, allow_custom_value=True, label="Training data", elem_id="data-train",
                    info="An upload, a sample, a hub id, or a file inside the folder where the page was started.")  # fmt: skip
                held = gr.Dropdown(self.desk.data_sets(), value=None, allow_custom_value=True, label="Held-out data (if you have some)",
                    elem_id="data-eval", info="Without it, some training rows are held out.")  # fmt: skip
                self.controls |= {"data.train_file": data, "data.eval_file": held}
                check = gr.Button("Check the data", variant="primary", elem_id="check")
                with gr.Accordion("How the rows are read", open=False):
                    for control in form.sections(self.known)["data"]:
                        self._control(control.path)
            with gr.Column(scale=3, min_width=300):
                report = gr.HTML(views.hint("No data checked", "Upload a file or choose a sample, then check it: format, duplicates, leaks, cut answers, and what exactly is learned."), elem_id="data-report")  # fmt: skip
                xray = gr.HTML("", elem_id="xray")
        sent.upload(self._take, sent, [sent, data, held, said], api_visibility="private", concurrency_limit=2)
        self._check = (check, report, xray)

    def _take(self, path: str) -> tuple[Any, Any, Any, str]:
        import gradio as gr
        from pathlib import Path

        try:
            name = uploads.take(self.desk.workspace, Path(path), Path(path).name, self.desk.limits)
        except KitError as error:
            return None, gr.skip(), gr.skip(), views.error(error)
        known = self.desk.data_sets()
        return None, gr.update(choices=known, value=name), gr.update(choices=known), views.hint("Uploaded", f"It is {name} now, and chosen below.")

    def _training_tab(self) -> None:
        import gradio as gr

        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                with gr.Group(elem_classes="two"):
                    for path in form.COMMON:
                        self._control(path)
                for section, controls in form.sections(self.known).items():
                    if section != "data":
                        with gr.Accordion(SECTIONS.get(section, section.capitalize()), open=False):
                            for control in controls:
                                self._control(control.path)
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    plan = gr.Button("Show the plan", elem_id="plan")
                    start = gr.Button("Start training", variant="primary", elem_id="start")
                planned = gr.HTML("", elem_id="planned")
                started = gr.Textbox(visible="hidden", elem_id="started")
                gr.HTML(LIVE.format("live", "polite"), elem_id="live-box")
                gr.HTML(LIVE.format("history", "off"), elem_id="history-box")
        self._asks(plan, told(self.desk.plan), planned, concurrency_id="heavy", concurrency_limit=1)
        self._asks(start, self._start, [planned, started], concurrency_limit=4)
        started.change(None, started, None, js="(name) => { window.kit.follow(name); }", api_visibility="private")
        check, report, xray = self._check
        self._asks(check, self._look, [report, xray], concurrency_id="heavy", concurrency_limit=1)

    def _start(self, values: dict[str, Any]) -> tuple[str, str]:
        try:
            return "", self.desk.start(values)
        except KitError as error:
            return views.error(error), ""

    def _look(self, values: dict[str, Any]) -> tuple[str, str]:
        try:
            return self.desk.check(values)
        except KitError as error:
            return views.error(error), ""

    def _testing_tab(self, tab: Any, blocks: Any) -> None:
        import gradio as gr

        run = gr.Dropdown([], label="Run", info="Runs that have a model.", elem_id="tested")
        compared = gr.HTML(views.hint("Nothing to test yet", "Runs that are finished appear here: ask them, compare them, take them home."), elem_id="comparison")  # fmt: skip
        turns = gr.State([])
        talk = gr.HTML(self._chat([]), elem_id="chat")
        with gr.Row(equal_height=True):
            question = gr.Textbox(label="Question", lines=1, max_lines=6, scale=5, elem_id="question", placeholder="Ask both models the same")
            ask = gr.Button("Ask both", variant="primary", scale=1, min_width=120, elem_id="ask")
            clear = gr.Button("New conversation", scale=1, min_width=120, elem_id="clear")
        with gr.Accordion("How they answer", open=False):
            tokens = gr.Slider(8, MOST_NEW_TOKENS, value=128, step=8, label="Longest answer in tokens")
            heat = gr.Slider(0, 2, value=0, step=0.1, label="Temperature", info="0 always takes the likeliest token.")
        show = told(lambda name: self.desk.comparison(name) if name else views.hint("Nothing to test yet", "Train something first."))
        gr.on([tab.select, blocks.load], self._tested, run, run, api_visibility="private", show_progress="hidden")
        run.change(show, run, compared, api_visibility="private", show_progress="hidden")
        run.change(lambda: ([], self._chat([])), None, [turns, talk], api_visibility="private", show_progress="hidden")
        clear.click(lambda: ([], self._chat([])), None, [turns, talk], api_visibility="private")
        gr.on([ask.click, question.submit], self._ask, [run, turns, question, tokens, heat], [turns, talk, question],
            api_visibility="private", concurrency_limit=4, show_progress="hidden")  # fmt: skip

    def _tested(self, chosen: str | None) -> Any:
        import gradio as gr

        known = self.desk.tested()
        return gr.update(choices=known, value=chosen if chosen in known else next(iter(known), None))

    def _ask(self, run: str | None, turns: list[Turn], question: str, tokens: float, heat: float) -> Iterator[tuple[Any, str, Any]]:
        import gradio as gr

        try:
            how = GenerationSection(max_new_tokens=int(tokens), temperature=float(heat))
            for turns in self.desk.answering.ask(self.desk.workspace.run(run or ""), turns, question, how):
                yield gr.skip(), self._chat(turns), ""
            yield turns, self._chat(turns), ""
        except KitError as error:
            yield turns, self._chat(turns) + views.error(error), question

    def _chat(self, turns: list[Turn]) -> str:
        sides = [{"key": "base", "title": "Base"}, {"key": "tuned", "title": "Tuned"}]
        return views.piece("chat", sides, [(turn.question, turn.answers | {"at": turn.at}) for turn in turns])

    # --- what the browser remembers ------------------------------------------------------------------------

    def _remember(self, blocks: Any) -> None:
        """The form as it was left comes back with the page: it lies in the browser, not in the server."""
        import gradio as gr

        names, made = list(self.controls), list(self.controls.values())
        kept = gr.BrowserState({}, storage_key="llm-finetune-kit-form", secret="not-a-secret")
        keep = f"(...all) => Object.fromEntries({names!r}.map((name, place) => [name, all[place]]))"
        gr.on([one.change for one in made], None, made, kept, js=keep, api_visibility="private", show_progress="hidden")
        blocks.load(lambda held: [self._back(name, held) for name in names], kept, made, api_visibility="private", show_progress="hidden")
        demo = form.values_of(form.config_of({}).with_values(demo_values()))
        self.demo.click(lambda: [demo[name] for name in names], None, made, api_visibility="private")

    def _back(self, name: str, held: Any) -> Any:
        import gradio as gr

        known = isinstance(held, dict) and name in held and held[name] is not None
        listed = {"choices": self.desk.data_sets()} if name.startswith("data.") and name.endswith("_file") else {}
        return gr.update(**listed, **({"value": held[name]} if known else {})) if listed or known else gr.skip()
