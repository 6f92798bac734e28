"""A GGUF file whose packed head is the table once more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from quantine import Calibration, Plan, load, quantize
from quantine.formats.export import export
from quantine.formats.imported import import_model
from quantine.formats.tokenizer_files import copy_small_files
from quantine.runtime.load import load_model
from quantine.source.locate import locate
from tiny_models import logits_of

Tiny = Callable[[str], Path]
PACKED = {"method": "rtn", "bits": 8, "group_size": 32, "sym": True}


def test_it_is_read_once(tiny: Tiny, tmp_path: Path) -> None:
    model = load_model(locate(tiny("llama")), torch.float32)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "model")
    copy_small_files(tiny("llama"), tmp_path / "model")
    rules = [{**PACKED, "match": match} for match in ("@blocks", "@head", "@embedding")]
    plan = Plan.from_dict({"rules": rules, "arithmetic": "exact"})
    out = quantize(tmp_path / "model", tmp_path / "out", plan, Calibration(samples=0)).path
    exported = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    back = import_model(exported, tmp_path / "back").path
    found, wanted = (load(path, torch.float32, arithmetic="exact")[0] for path in (back, out))
    torch.testing.assert_close(logits_of(found), logits_of(wanted), rtol=1e-5, atol=1e-5)
