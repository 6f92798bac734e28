"""What a process of its own computes with quantized directories."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

READER = """
import json, sys
import torch, transformers
import quantine
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
request = json.load(open(sys.argv[1]))
tokens = load_file(request["tokens"])["tokens"]
logits = {}
for directory in request["directories"]:
    for dtype in request["dtypes"]:
        model, _ = quantine.load(directory, getattr(torch, dtype))
        with torch.no_grad():
            logits[f"{directory} {dtype}"] = model(input_ids=tokens).logits.contiguous()
save_file(logits, request["answer"])
"""


def logits_elsewhere(
    directories: Iterable[Path], tokens: Tensor, dtypes: Iterable[str], scratch: Path
) -> dict[str, Tensor]:
    """Logits of ``tokens`` by ``"DIRECTORY DTYPE"``, all from one process: it takes long to begin.

    Args:
        directories: quantized models.
        tokens: ``[batch, time]``.
        dtypes: names of the dtypes that each is loaded in.
        scratch: a directory for what is handed over.
    """
    save_file({"tokens": tokens}, scratch / "tokens.safetensors")
    request = {
        "tokens": str(scratch / "tokens.safetensors"),
        "directories": [str(directory) for directory in directories],
        "dtypes": list(dtypes),
        "answer": str(scratch / "logits.safetensors"),
    }
    (scratch / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-c", READER, str(scratch / "request.json")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return load_file(scratch / "logits.safetensors")
