"""The model card, ``README.md``, of an output directory."""

from __future__ import annotations

from typing import Any, Final

from quantine.calibrate.bos import SEGMENTS_BEGUN
from quantine.formats import format_named

AUTO: Final = (
    "`AutoModelForCausalLM.from_pretrained` opens the directory too, after `import quantine`."
)
"""Sentence of the card for directories that transformers can open."""
OTHER_READERS: Final = (
    "The tensors are those of `quant_method: spqr`: the GPU kernels of SpQR's authors read them."
)
"""Sentence of the card for directories in a format that other programs read."""


def model_card(report: dict[str, Any], quality: str = "") -> str:
    """The text of the model card; its code block runs as written.

    Args:
        report: the content of ``quantine_report.json``.
        quality: a section about what was measured, see `quantine.report.record`; empty for none.
    """
    totals, calibration = report["totals"], report["calibration"]
    formats = [format_named(layer["scheme"]["format"]) for layer in report["layers"]]
    others_read = bool(formats) and all(layout.exclusive for layout in formats)
    begun = SEGMENTS_BEGUN.get(calibration.get("bos"), "")
    rows = "\n".join(
        f"| {key} | {value} |"
        for key, value in {
            "source model": report["model"],
            "plan": report["plan"]["name"],
            "bits per quantized weight": f"{totals['bits_per_weight']:.3f} (counted from the file)",
            "arithmetic": report["plan"]["arithmetic"],
            "quantized weights": f"{totals['quantized_weights']:,}",
            "calibration": f"{calibration['tokens']:,} tokens of {calibration['source']}"
            f"{' in segments' * bool(begun)}{begun}",
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

{OTHER_READERS if others_read else AUTO}
{quality}
What was done to each layer, and how well it went, is in `quantine_report.json`.
"""
