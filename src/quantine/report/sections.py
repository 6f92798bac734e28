"""The sections of a page: a table of functions from facts to HTML, in their order."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from typing import Final

from quantine.calibrate.bos import SEGMENTS_BEGUN
from quantine.core.activation_spec import UNQUANTIZED
from quantine.eval.comparison_row import loss_of_quality
from quantine.eval.score_text import (
    IN_SHORT,
    JUDGED,
    beginnings,
    task_cells,
    text_cells,
    with_interval,
)
from quantine.report.byte_text import megabytes
from quantine.report.facts import Facts
from quantine.report.html_table import table
from quantine.report.plots.clusters import clusters_figure
from quantine.report.plots.group_axes import axis_figure
from quantine.report.plots.page_pictures import WIDTH as LAYERS_WIDTH
from quantine.report.plots.page_pictures import layers_figure, thumbnails_figure
from quantine.report.plots.pareto import pareto_figure
from quantine.report.stage_rows import stage_rows
from quantine.report.svg import embedded

PANELS: Final = 2
"""Number of panels of a picture side by side: more are illegible on a phone."""
Section = Callable[[Facts], str]
"""HTML of a section without its heading; empty if there is nothing to say."""


def verdict(facts: Facts) -> str:
    """Whether the model is good enough, and the numbers that decide it."""
    if not facts.checks:
        return ""
    passed = all(check.passed for check in facts.checks)
    unsure = [check for check in facts.checks if not check.sure]
    word = "Good enough" if passed else "Below the floor"
    rows = [
        [
            ("✓ " if check.passed else "✗ ") + check.name,
            with_interval(check.value, check.low, check.high, JUDGED),
            f"at least {check.floor:{JUDGED}}",
        ]
        for check in facts.checks
    ]
    doubt = (
        f"<p>{len(unsure)} of {len(facts.checks)} could lie on the other side of the floor, as far "
        "as their intervals tell: measure more text or questions to be sure.</p>"
        if unsure
        else ""
    )
    kind = "good" if passed else "bad"
    return f'<p class="verdict {kind}">{word}</p>{table(["", "measured", "floor"], rows)}{doubt}'


def headline(facts: Facts) -> str:
    """Size and quality in large type."""
    totals = facts.inventory["totals"]
    cards = [
        (f"{totals['bits_per_weight']:.2f}", "bits per quantized weight, from the file"),
        (f"{totals['file_bytes'] / 1e6:.0f} MB", "weight files"),
    ]
    for name, text in (facts.scores or {"texts": {}})["texts"].items():
        cells = text_cells(text, IN_SHORT)
        cards.append((cells.plain_perplexity, f"perplexity on {name}"))
        if text["recovery"] is not None:
            cards.append((cells.plain_recovery, f"of the float model's quality on {name}"))
            cards.append((cells.plain_agreement, f"same next token on {name}"))
    items = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in cards
    )
    note = (
        ""
        if facts.scores
        else "<p>Quality was not measured: "
        "<code>quantine eval OUT --reference MODEL --record</code> does it.</p>"
    )
    return f'<div class="cards">{items}</div>{note}'


def quality(facts: Facts) -> str:
    """A table of all scores, with what they were measured on."""
    if facts.scores is None:
        return ""
    heads = ["", "this model", "float model", "recovery (95%)", "KL, nats per token"]
    rows, begins = [], beginnings(facts.scores)
    for name, text in facts.scores["texts"].items():
        cells = text_cells(text)
        label = f"perplexity, {name}: {cells.windows} tokens"
        numbers = [cells.perplexity, cells.reference, cells.recovery, cells.divergence]
        rows.append([label, *numbers])
    for name, task in facts.scores["tasks"].items():
        asked = task_cells(task)
        label = f"{name} ({asked.metric}): {asked.questions}"
        rows.append([label, asked.score, asked.reference, asked.recovery, ""])
    return table(heads, rows) + (
        "<p>± is one standard error. Recovery is the float model's perplexity over this model's, "
        "or this model's score over the float model's; windows and questions are paired"
        f"{'; ' if begins else ''}{begins}.</p>"
    )


def pareto(facts: Facts) -> str:
    """The place of this plan among those of a comparison."""
    if facts.comparison is None:
        return ""
    rows = [row for row in facts.comparison["rows"] if row["plan"] is not None]
    points = [
        (row["name"], row["bits_per_weight"], loss)
        for row in rows
        if (loss := loss_of_quality(row)) is not None
    ]
    front = facts.comparison["pareto"]
    own = [row["name"] for row in rows if row["plan"] == facts.report["plan"]]
    if not points:
        return ""
    if not own:
        said = "This plan is not among those that were compared."
    elif own[0] in front:
        said = f"This model ({own[0]}): no other plan is both smaller and better."
    else:
        said = f"This model ({own[0]}) is beaten in both size and quality by another plan."
    return f"<p>{escape(said)}</p>" + embedded(
        pareto_figure(points, front), "Perplexity against size of every plan"
    )


def layers(facts: Facts) -> str:
    """A picture of the error and bits of each matrix, and a table of the largest errors."""
    figure = layers_figure(facts.layers)
    worst = sorted(
        (layer for layer in facts.layers if layer.output_error is not None),
        key=lambda layer: -(layer.output_error or 0.0),
    )[:5]
    rows = [
        [layer.name, f"{layer.bits_per_weight:.3f}", f"{layer.output_error:.3%}"] for layer in worst
    ]
    worst_rows = table(["largest errors", "bits per weight", "output error"], rows) if rows else ""
    picture = embedded(figure, "Error and bits of every matrix") if figure else ""
    return (
        "<p>The output error is the squared error of a matrix's output on calibration text, "
        f"relative to the float output.</p>{picture}{worst_rows}"
    )


def outliers(facts: Facts) -> str:
    """Maps of the weights that are kept in 16 bit, in the matrices with most of them."""
    figure = thumbnails_figure(facts.thumbnails)
    if figure is None:
        return ""
    shares = [layer.outlier_share for layer in facts.layers if layer.outlier_share is not None]
    return (
        f"<p>The matrices with most outliers, outputs downwards and inputs to the right; the mean "
        f"over all matrices is {sum(shares) / len(shares):.3%}.</p>"
        + embedded(figure, "Maps of outliers")
    )


def group_axes(facts: Facts) -> str:
    """The axis along which groups run, where it differs or was chosen."""
    figure = axis_figure(facts.layers, PANELS)
    if figure is None:
        return ""
    along = sum(layer.group_axis == "out" for layer in facts.layers)
    return (
        f"<p>Groups run along outputs in {along} of {len(facts.layers)} matrices. Where both axes "
        "were compared, the curves show what either would lose.</p>"
        + embedded(figure, "Axes of groups")
    )


def clusters(facts: Facts) -> str:
    """Clusters of channels with alike ranges, in the block in the middle."""
    if not facts.clusters:
        return ""
    path = list(facts.clusters)[len(facts.clusters) // 2]
    figure = clusters_figure(path, facts.clusters[path], LAYERS_WIDTH)
    return (
        "<p>Activations are rounded in clusters of channels with alike ranges; channels of a "
        "cluster are put side by side. Each point and each line is a channel on calibration text; "
        "colours tell clusters apart.</p>" + embedded(figure, "Channels in clusters")
    )


def memory(facts: Facts) -> str:
    """A table of the bytes of weights, and of the cache of keys and values."""
    totals = facts.inventory["totals"]
    plain = 2 * totals["quantized_weights"] + totals["kept_bytes"]
    activations = facts.report["plan"].get("activations") or {}
    each = [activations.get(site, UNQUANTIZED) for site in ("key", "value")]
    # Generating keeps codes of both or of none; those of tokens have grids of their own.
    packed = max(each) < UNQUANTIZED and activations["granularity"] != "token"
    bits = sum(each) / 2 if packed else UNQUANTIZED
    rows = [
        ["quantized matrices", megabytes(totals["quantized_bytes"])],
        ["embedding, norms and what else stays as it was", megabytes(totals["kept_bytes"])],
        ["weight files in all", megabytes(totals["file_bytes"])],
        ["the same tensors with 16 bit matrices", megabytes(plain)],
        *(
            [f"key-value cache of {tokens:,} tokens in 16 bit", megabytes(nbytes)]
            for tokens, nbytes in facts.cache.items()
        ),
        *(
            [
                f"the same in {bits:g} bit, as generating keeps it",
                megabytes(nbytes * bits / UNQUANTIZED),
            ]
            for nbytes in facts.cache.values()
            if bits < UNQUANTIZED
        ),
    ]
    return table(["", "size"], rows)


def stages(facts: Facts) -> str:
    """A table of the seconds that each stage of the run took."""
    rows = [[name, f"{seconds:.1f}"] for name, seconds in stage_rows(facts.report)]
    return table(["stage", "seconds"], rows) if rows else ""


def samples(facts: Facts) -> str:
    """Texts that both models wrote after the same prompts."""
    found = (facts.scores or {}).get("samples") or []
    parts = []
    for sample in found:
        tail = sample["prompt"][-300:]
        lead = "…" if len(sample["prompt"]) > len(tail) else ""
        parts.append(
            f"<h3>after {sample['prompt_tokens']} tokens: {_agreement(sample['same'])}</h3>"
            f'<p class="prompt">{lead}{escape(tail)}</p><div class="pair">'
            f"<div><h4>float</h4><p>{escape(sample['reference'])}</p></div>"
            f"<div><h4>quantized</h4><p>{escape(sample['model'])}</p></div></div>"
        )
    return "".join(parts)


def _agreement(same: int) -> str:
    """How many tokens of two texts are equal before the first that differs, in words."""
    if same == 0:
        return "they differ at once"
    return f"the first {same} agree" if same > 1 else "the first one agrees"


def reproduce(facts: Facts) -> str:
    """Everything needed to get the same numbers: hashes, calibration, versions, and the plan."""
    report = facts.report
    calibration = report["calibration"]
    rows = [
        ["source model", report["model"]],
        *([name, value] for name, value in report["identity"].items()),
        [
            "calibration",
            f"{calibration['samples']} segments of {calibration['seqlen']} tokens of "
            f"{calibration['source']}, seed {calibration['seed']}"
            f"{SEGMENTS_BEGUN.get(calibration.get('bos'), '')}",
        ],
    ]
    if facts.scores is not None:
        rows += [[f"tokens of {n}", t["digest"]] for n, t in facts.scores["texts"].items()]
        rows += [[f"measured file {n}", digest] for n, digest in facts.scores["files"].items()]
        rows += [[f"{n} (measuring)", v] for n, v in facts.scores["versions"].items()]
    plan = escape(json.dumps(report["plan"], indent=2))
    return (
        table(["", "hash or value"], rows, "wide hashes")
        + "<details><summary>the plan, every default spelled out</summary>"
        f"<pre>{plan}</pre></details>"
    )


SECTIONS: Final[tuple[tuple[str, Section], ...]] = (
    ("Verdict", verdict),
    ("In short", headline),
    ("Quality", quality),
    ("Among other plans", pareto),
    ("Matrices", layers),
    ("Outliers", outliers),
    ("Axes of groups", group_axes),
    ("Clusters of channels", clusters),
    ("Memory", memory),
    ("What quantizing took", stages),
    ("What it writes", samples),
    ("Reproduce", reproduce),
)
"""Title and content of every section; one that is empty is left out."""
