"""Without `import quantine`, transformers must stop instead of inventing weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM

STRANGER = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

answers = []
for directory in sys.argv[1:]:
    answer = {"type": AutoConfig.from_pretrained(directory).model_type}
    answer["ids"] = AutoTokenizer.from_pretrained(directory)("abc")["input_ids"]
    for kind in (AutoModelForCausalLM, AutoModel):
        try:
            kind.from_pretrained(directory)
            answer[kind.__name__] = None
        except Exception as error:
            answer[kind.__name__] = str(error)
    answers.append(answer)
assert "quantine" not in sys.modules
print(json.dumps(answers))
"""


def test_a_stranger_is_told_to_import_quantine(
    packed: Callable[[str, str], Path], tmp_path: Path
) -> None:
    directories = [packed("llama", "gptq"), packed("llama_tied", "gptq")]
    for source in list(directories):
        copy = tmp_path / f"copy of {source.name}"
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(copy, max_shard_size="30KB")
        for file in source.glob("tokenizer*"):
            (copy / file.name).write_bytes(file.read_bytes())
        directories.append(copy)
    command = [sys.executable, "-c", STRANGER, *map(str, directories)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answers = json.loads(done.stdout)
    assert len(answers) == 4, answers
    for answer in answers:
        assert answer["type"] == "llama"
        assert len(answer["ids"]) == 4
        for kind in ("AutoModelForCausalLM", "AutoModel"):
            assert answer[kind] is not None, "random weights were loaded"
            assert "import quantine" in answer[kind]
