"""The model card of an output directory."""

from __future__ import annotations

from typing import Any, Final

from quantine.notation import recovery, with_error

AUTO: Final = (
    "`AutoModelForCausalLM.from_pretrained` opens the directory too, after `import quantine`."
)
SPQR: Final = (
    "The tensors are those of `quant_method: spqr`: the GPU kernels of SpQR's authors read them."
)


def model_card(report: dict[str, Any], scores: dict[str, Any] | None = None) -> str:
    """README.md with the facts of ``report``; its code block runs as written.

    Args:
        scores: what was measured, see `quantine.record.record`.
    """
    totals, calibration = report["totals"], report["calibration"]
    spqr = all(layer["scheme"]["format"] == "spqr" for layer in report["layers"])
    rows = "\n".join(
        f"| {key} | {value} |"
        for key, value in {
            "source model": report["model"],
            "plan": report["plan"]["name"],
            "bits per quantized weight": f"{totals['bits_per_weight']:.3f} (counted from the file)",
            "arithmetic": report["plan"]["arithmetic"],
            "quantized weights": f"{totals['quantized_weights']:,}",
            "calibration": f"{calibration['tokens']:,} tokens of {calibration['source']}",
            "written by": f"quantine {report['versions']['quantine']}",
        }.items()
    )
    return f"""---
library_name: transformers
tags:
- quantine
- quantized
---

# {report["model"]}, quantized

These weights are packed. Loading them needs the package `quantine`.

| | |
|---|---|
{rows}

## Use

Run this beside the files, or give the directory's path instead of `"."`.

```python
import quantine

model, tokenizer = quantine.load(".")
inputs = tokenizer("The capital of France is", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

{SPQR if spqr else AUTO}
{_quality(scores) if scores else ""}
What was done to each layer, and how well it went, is in `quantine_report.json`.
"""


def _quality(scores: dict[str, Any]) -> str:
    """The section about what was measured."""
    compared = scores["reference"] is not None
    heads = ["", "this model", *(["float model", "recovery"] if compared else [])]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    notes = []
    for name, text in scores["texts"].items():
        cells = [f"perplexity on {name}", with_error(text["perplexity"], text["stderr"], ".3f")]
        if compared:
            cells += [f"{text['reference_perplexity']:.3f}", recovery(text)]
        lines.append(_row(cells))
        notes.append(f"{name}: {text['windows']} windows of {text['window']} tokens")
    for name, task in scores["tasks"].items():
        score = with_error(task["score"], task["stderr"], ".1%")
        cells = [f"{name} ({task['metric']})", score]
        if compared:
            cells += [f"{task['reference_score']:.1%}", recovery(task)]
        lines.append(_row(cells))
        notes.append(f"{name}: {task['questions']} questions, {task['fewshot']} examples each")
    meaning = (
        "Recovery is the float model's perplexity over this model's, or this model's score over "
        "the float model's, with its 95% interval. " * compared
    )
    return f"""
## Quality

{chr(10).join(lines)}

{"; ".join(notes)}. ± is one standard error. {meaning}
"""


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
