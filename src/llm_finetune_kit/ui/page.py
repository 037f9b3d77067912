"""The page: four tabs of controls, wired to the desk. No HTML of a user's text and no decision is made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import demo_values
from llm_finetune_kit.errors import KitError
from llm_finetune_kit.ui import form, uploads, views
from llm_finetune_kit.ui.desk import Desk
from llm_finetune_kit.ui.testing_tab import QUIET, testing_tab
from llm_finetune_kit.ui.workspace import HERE

SECTIONS = {  # headings of the folded settings; others are called by their name
    "lora": "LoRA",
    "training": "More about training",
    "evaluation.generation": "Answers during evaluation",
}
HEAD = (
    '<header class="kit top"><h1>LLM Finetune Kit</h1><p class="soft">Fine-tune a model, and see whether it helped.</p>'
    '<p class="soft" id="kit-status" role="status" aria-live="polite"></p></header>'
)
LIVE = '<div id="live" aria-live="off"></div><div id="history"></div>'
DEMO = "Try the demo: small model, sample data"
START = "Start training"
OF_TABS = {"model.name": "Model", "data.train_file": "Training data"}
NO_MODEL = "No model chosen", "Choose one, and this place says whether fine-tuning it fits on this machine, and why."
NO_DATA = (
    "No data checked",
    "Upload a file or choose a sample, then check it: format, duplicates, leaks, cut answers, and what exactly is learned.",
)
OF_MODEL = f"A known name, a hub id such as owner/name, or a folder {HERE}."
OF_DATA = f"An upload, a sample, a hub id, or a file {HERE}."
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
HEAVY: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "heavy", "concurrency_limit": 1}


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
            gr.HTML(HEAD)
            with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
                with gr.Tab("Model", id="model"):
                    demo = self._model_tab()
                with gr.Tab("Dataset", id="dataset"):
                    check, found = self._dataset_tab()
                with gr.Tab("Training", id="training"):
                    self._training_tab()
                with gr.Tab("Testing", id="testing") as testing:
                    testing_tab(self.desk, testing, blocks)
            self._asks(check.click, self._checked, found, **HEAVY)
            self._remember(blocks, demo)
        blocks.queue(default_concurrency_limit=8, max_size=500)
        return blocks

    # --- controls ------------------------------------------------------------------------------------------

    def _control(self, path: str) -> None:
        """Lay out the control of a knob."""
        import gradio as gr

        one = self.known[path]
        look: dict[str, Any] = {"label": one.label, "info": one.help, "value": one.value, "elem_id": name_of(path)}
        if one.kind == "switch":
            made = gr.Checkbox(**look)
        elif one.kind in ("choice", "choices"):
            made = gr.Dropdown(list(one.choices), multiselect=one.kind == "choices", **look)
        else:
            most = 12 if one.long or one.kind == "lines" else 1
            made = gr.Textbox(lines=3 if one.kind == "lines" else 1, max_lines=most, placeholder=one.placeholder, **look)
        self.controls[path] = made

    def _controls(self, paths: list[str]) -> None:
        """Two to a row."""
        import gradio as gr

        for place in range(0, len(paths), 2):
            with gr.Row(equal_height=True):
                for path in paths[place : place + 2]:
                    self._control(path)

    def _named(self, path: str, label: str, info: str, choices: list[tuple[str, str]]) -> Any:
        """A control of a name: one of a list, or typed."""
        import gradio as gr

        look: dict[str, Any] = {"label": label, "info": info, "elem_id": name_of(path)}
        self.controls[path] = gr.Dropdown(choices, value=None, allow_custom_value=True, **look)
        return self.controls[path]

    def _asks(self, event: Any, work: Callable[[dict[str, Any]], Any], outputs: Any, **how: Any) -> Any:
        """Call `work` with what the whole form holds."""
        names = list(self.controls)
        inputs = list(self.controls.values())
        return event(lambda *given: work(dict(zip(names, given, strict=True))), inputs, outputs, **how)

    # --- tabs ----------------------------------------------------------------------------------------------

    def _model_tab(self) -> Any:
        import gradio as gr

        rows = self.desk.model_rows()
        takes = {"no": "does not fit here", "with recompute": "LoRA with recompute"}
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                labels = [
                    f"{row['name']} · {views.count(row['parameters'])} · {takes.get(row['fits'], row['fits'])}" for row in rows
                ]
                names = [row["name"] for row in rows]
                chosen = self._named("model.name", "Model", OF_MODEL, list(zip(labels, names, strict=True)))
                demo = gr.Button(DEMO, elem_id="demo")
                tried = gr.HTML("", elem_id="demo-said")
                gr.HTML(self._machine())
            with gr.Column(scale=3, min_width=300):
                shown = gr.HTML(views.hint(*NO_MODEL), elem_id="model-card")
        with gr.Accordion(f"All {len(rows)} known models, and what each takes here", open=False):
            gr.HTML(views.models(rows))
        chosen.change(self._seen, chosen, shown, show_progress="minimal", concurrency_limit=2, **PRIVATE)
        return demo, tried

    def _machine(self) -> str:
        from llm_finetune_kit.hardware import this_machine

        found = this_machine(self.desk.workspace.root)
        return views.piece("machine", {"name": found.name, "free": found.free_memory, "disk": found.free_disk})

    def _dataset_tab(self) -> tuple[Any, list[Any]]:
        import gradio as gr

        known = self.desk.data_sets()
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                sent = gr.File(label="Upload training data", height=150, elem_id="upload")
                said = gr.HTML("", elem_id="upload-said")
                with gr.Group():
                    data = self._named("data.train_file", "Training data", OF_DATA, known)
                    held = self._named("data.eval_file", "Held-out data", "Without it, some training rows are held out.", known)
                check = gr.Button("Check the data", variant="primary", elem_id="check")
                with gr.Accordion("How the rows are read", open=False):
                    self._controls([control.path for control in form.sections(self.known)["data"]])
            with gr.Column(scale=3, min_width=300):
                report = gr.HTML(views.hint(*NO_DATA), elem_id="data-report")
                xray = gr.HTML("", elem_id="xray")
        sent.upload(self._taken, sent, [sent, data, held, said, report, xray], concurrency_limit=2, **PRIVATE)
        stale = f"() => [{json.dumps(views.piece('stale'))}, '']"
        gr.on([data.change, held.change], None, None, [report, xray], js=stale, **QUIET)
        return check, [report, xray]

    def _training_tab(self) -> None:
        import gradio as gr

        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                with gr.Group():
                    self._controls(list(form.COMMON))
                for section, controls in form.sections(self.known).items():
                    if section != "data":
                        with gr.Accordion(SECTIONS.get(section, section.capitalize()), open=False):
                            self._controls([control.path for control in controls])
            with gr.Column(scale=3, min_width=300, elem_id="training-side"):
                chosen = gr.HTML(views.piece("chosen", "", ""), elem_id="chosen")
                with gr.Row():
                    plan = gr.Button("Show the plan", elem_id="plan", min_width=140)
                    start = gr.Button(START, variant="primary", elem_id="start", min_width=140)
                planned = gr.HTML("", elem_id="planned")
                started = gr.Textbox(visible="hidden", elem_id="started")
                gr.HTML(LIVE, elem_id="live-box")
        named = [self.controls["model.name"], self.controls["data.train_file"]]
        gr.on([one.change for one in named], lambda *both: views.piece("chosen", *both), named, chosen, **QUIET)
        self._asks(plan.click, self._planned, planned, **HEAVY)
        pressed = start.click(lambda: gr.update(value="Starting…", interactive=False), None, start, **QUIET)
        asked = self._asks(pressed.then, self._started, [planned, started], concurrency_limit=4, **PRIVATE)
        asked.then(lambda: gr.update(value=START, interactive=True), None, start, **QUIET)
        started.change(None, started, None, js="(name) => { window.kit.follow(name); }", **QUIET)

    # --- what the buttons do -------------------------------------------------------------------------------

    def _seen(self, name: str | None) -> str:
        try:
            return self.desk.model(name) if name else views.hint(*NO_MODEL)
        except KitError as error:
            return views.error(error)

    def _taken(self, path: str) -> tuple[Any, ...]:
        import gradio as gr

        try:
            name = uploads.take(self.desk.workspace, Path(path), Path(path).name, self.desk.limits)
        except KitError as error:
            error.where = error.where or Path(path).name
            return None, gr.skip(), gr.skip(), views.error(error), views.hint(*NO_DATA), ""
        known = self.desk.data_sets()
        chosen = gr.update(choices=known, value=name)
        return None, chosen, gr.update(choices=known), views.piece("uploaded", name), gr.skip(), gr.skip()

    def _checked(self, values: dict[str, Any]) -> tuple[str, str]:
        try:
            return self.desk.check(values)
        except KitError as error:
            return _marked(error), ""

    def _planned(self, values: dict[str, Any]) -> str:
        try:
            return self.desk.plan(values)
        except KitError as error:
            return _marked(error)

    def _started(self, values: dict[str, Any]) -> tuple[str, str]:
        try:
            return "", self.desk.start(values)
        except KitError as error:
            return _marked(error), ""

    # --- what the browser remembers ------------------------------------------------------------------------

    def _remember(self, blocks: Any, demo: Any) -> None:
        """The form as it was left comes back with the page: it lies in the browser, not in the server."""
        import gradio as gr

        names, made = list(self.controls), list(self.controls.values())
        kept = gr.BrowserState({}, storage_key="llm-finetune-kit-form", secret="kept in the browser alone")
        keep = f"(...all) => Object.fromEntries({json.dumps(names)}.map((name, place) => [name, all[place]]))"
        gr.on([one.change for one in made], None, made, kept, js=keep, **QUIET)
        blocks.load(lambda held: [self._back(name, held) for name in names], kept, made, **QUIET)
        self._demo(*demo)

    def _demo(self, button: Any, tried: Any) -> None:
        """The demo's settings at a press, and a word on what was set. Its run name goes when something else is chosen."""
        import gradio as gr

        asked = demo_values()
        values = form.values_of(form.config_of({}).with_values(asked))
        said = views.piece("tried", [(OF_TABS.get(path, self.known[path].label), value) for path, value in asked.items()])
        button.click(lambda: [*(values[name] for name in self.controls), said], None, [*self.controls.values(), tried], **PRIVATE)
        named = [self.controls[path] for path in ("model.name", "data.train_file", "output.run_name")]
        own = json.dumps([asked["model.name"], asked["data.train_file"], asked["output.run_name"]])
        elsewhere = "run === own[2] && (model !== own[0] || data !== own[1])"
        other = f"(model, data, run) => {{ const own = {own}; return {elsewhere} ? '' : run; }}"
        gr.on([one.change for one in named[:2]], None, named, named[2], js=other, **QUIET)

    def _back(self, name: str, held: Any) -> Any:
        import gradio as gr

        news: dict[str, Any] = {}
        if name in ("data.train_file", "data.eval_file"):
            news["choices"] = self.desk.data_sets()
        if isinstance(held, dict) and held.get(name) is not None:
            news["value"] = held[name]
        return gr.update(**news) if news else gr.skip()


def _marked(error: KitError) -> str:
    """A fault, and the controls that it is of."""
    return views.error(error, [name_of(path) for path in form.faulty(error)])


def name_of(path: str) -> str:
    """The id of a knob's control in the page."""
    return f"knob-{path.replace('.', '-')}"
