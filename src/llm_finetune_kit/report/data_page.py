"""The quality report of a data set as one HTML file that needs no network and no scripts."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from llm_finetune_kit.data.quality.findings import KINDS
from llm_finetune_kit.report.figures import legible
from llm_finetune_kit.report.templates import templates
from llm_finetune_kit.report.words import name

TONES = {"error": "bad", "warning": "flat", "note": "open"}
MEANING = {"error": "must be corrected", "warning": "worth a look", "note": "good to know"}


def page(report: dict[str, Any], samples: list[str] | None = None, xray_html: str = "") -> str:
    """`quality.QualityReport.to_dict()` to look at; `samples` are texts to show.

    Everything is escaped but `xray_html`, the mask X-ray, which is inserted as it is.
    """
    environment = templates("assets")
    environment.filters |= {"count": lambda number: f"{number:,}", "short": name}
    worst = next((found["severity"] for found in report["findings"]), "")
    return legible(
        environment.get_template("data_report.html.jinja").render(
            report=report,
            tone=TONES.get(worst, "good") if worst != "note" else "good",
            findings=[
                (found, KINDS[found["kind"]].title, TONES[found["severity"]], MEANING[found["severity"]], share(found["share"]))
                for found in report["findings"]
            ],
            tiles=tiles(report),
            scripts=_scripts(report["scripts"]),
            samples=samples or [],
            xray=Markup(xray_html),
        )
    )


def share(part: float) -> str:
    """A share from 0 to 1 in percent."""
    percent = 100 * part
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %" if percent >= 0.1 else "under 0.1 %"


def tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, and one sentence for a learner."""
    left_out = sum(reason["count"] for reason in report["dropped"])
    found = [("Rows", f"{report['rows']:,}", f"{left_out:,} left out." if left_out else "All of them can be used.")]
    length = report["lengths"].get("tokens")
    unit = "Tokens" if length else "Characters"
    length = length or report["lengths"]["characters"]
    found.append((f"{unit} per example", f"{length['p50']:,}", f"in the middle; 95 % have at most {length['p95']:,}."))
    cut = report["truncation"]
    if cut:
        lost = cut["learned_tokens_cut"] / max(1, cut["learned_tokens"])
        found.append(
            ("Answers cut off", share(lost) if lost else "none", f"of what is to be learned, at {cut['max_length']:,} tokens.")
        )
    serious = sum(one["severity"] != "note" for one in report["findings"])
    found.append(("To look at", f"{serious}", f"and {len(report['findings']) - serious} remarks."))
    return found


def _scripts(scripts: dict[str, int]) -> list[tuple[str, int, float]]:
    total = max(1, sum(scripts.values()))
    return [(name, count, 100 * count / total) for name, count in scripts.items()]
