"""The model card of an output directory."""

from __future__ import annotations

from typing import Any, Final

AUTO: Final = (
    "`AutoModelForCausalLM.from_pretrained` opens the directory too, after `import quantine`."
)
SPQR: Final = (
    "The tensors are those of `quant_method: spqr`: the GPU kernels of SpQR's authors read them."
)


def model_card(report: dict[str, Any]) -> str:
    """README.md with the facts of ``report``; its code block runs as written."""
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

What was done to each layer, and how well it went, is in `quantine_report.json`.
"""
