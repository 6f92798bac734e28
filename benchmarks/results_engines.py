"""Engines and other programs' quantizers in docs/results.md."""

from __future__ import annotations

from statistics import median

from results_tables import closeness, head, line, read

ENGINES = """
## Engines

Perplexity of exported directories in the real engines and in quantine, on the same tokens of the
held-out text, by `benchmarks/engines.py`. Plans round to the nearest: what is compared is engines.
Weights are the same numbers; "here" is float32 with exact products, and so is the plug-in with
directories that ask for `exact`, as these do. vLLM's own kernels compute in 16 bits, and
llama.cpp rounds activations to 8 bits when it multiplies with blocks; "decoded" is the same file
after llama.cpp has made floats of it itself. "Transformers with the library" has no quantine: the
library compressed-tensors decodes the file. Of tiny models, the plug-in has plans with another
width and grid for every matrix, and the others 4 bits in groups of 32, symmetric but in GGUF. For
vLLM's own kernels, which want AVX-512, they have heads 32 wide, and bfloat16 where it refuses
float16. GPTQ files of families that the plug-in does not serve are read by quantine's own `import`:
these rows show that files say what the directory does, and no engine.
"""
ENGINE_TABLES = {
    "demo": "SmolLM2-135M",
    "qwen": "Qwen2.5-Coder-0.5B",
    "families": "Tiny random models of each family",
}
"""Files of `benchmarks/engines.py` (``engines-NAME.json``), and what the models are."""
LLAMA_CPP = """
### Solved in llama.cpp's types, against its own quantizer

Files of the same types at the same bytes, from the same float weights and the same calibration
text: of it, llama.cpp's quantizer gets the mean square of each input (its importance matrix).
Perplexity and KL divergence from the float model are quantine's, on held-out text, of either file
opened as floats; "served" are those of llama.cpp, which rounds activations to 8 bits.

```sh
QUANTINE_LLAMA_CPP_PYTHON=... python benchmarks/llama_cpp_types.py demo OUT.json \\
    --work DIR --windows 8
```
"""
LLAMA_CPP_TABLES: dict[str, str] = {
    "demo": """SmolLM2-135M. Rows of 576 inputs, six of seven matrices, are no whole blocks of the
types with a K: Q4_0, Q5_0, Q5_1 and Q8_0 stand in there.""",
    "qwen": """Qwen2.5-Coder-0.5B. Only the 4864 inputs of `down_proj` are whole blocks of the types
with a K; 896 inputs are not. The float weights are those of a Q4_K_M file of llama.cpp, so they
lie on the grids that Q4_K_M gives them once more: there perplexity is 0.002 above that of
llama.cpp's own file, with a lower KL, and 0.021 below where tokens count by the loss
(`--loss-weights`); in all other rows both are lower.""",
    "wide": """SmolLM2-135M made 768 wide, with 1536 inputs of `down_proj`: all rows are whole
blocks of the types with a K. What is added is zeros, and predictions stay what they are
(`python benchmarks/widened.py demo DIR`).""",
}
"""Files of `benchmarks/llama_cpp_types.py` (``llama-cpp-NAME.json``), and what the models are."""
LLM_COMPRESSOR = """
### GPTQ, against that of llm-compressor

The same grids, float weights and calibration text; both write `compressed-tensors` files, which are
imported here and scored by one evaluation. llm-compressor 0.14 orders by activation, with static
groups. Its norms are stored in 16 bit, ours in 32: 0.06% of a file of SmolLM2. Qwen2.5-Coder's
float weights are those of a Q4_K_M file.

```sh
QUANTINE_LLM_COMPRESSOR_PYTHON=... python benchmarks/against_llm_compressor.py demo OUT.json \\
    --work DIR
```

"""
LLM_COMPRESSOR_MODELS = {"demo": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
"""Models of `benchmarks/against_llm_compressor.py`, by what ``llm-compressor-NAME.json`` says."""
THROUGHPUT = """
### vLLM: tokens per second

New tokens of all requests per second of processor time, after prompts of 4 tokens, in vLLM on the
CPU: the float model in bfloat16, and the same engine with packed matrices, by turns, by
`benchmarks/vllm_throughput.py`. Medians of the rounds; the ratio is taken within a round, with the
smallest and largest in brackets. One thread, while others worked on the machine, which costs
caches: of an Intel Xeon with AMX for SmolLM2, of an AMD EPYC with AVX-512 for Qwen2.5.

"""
THROUGHPUT_TABLES = {
    "demo": "SmolLM2-135M, 4.25 bits by rounding to nearest, table and head of 8 bits",
    "qwen": "Qwen2.5-Coder-0.5B, a budget of 4.25 bits (SpQR), table and head of 6 bits",
}
"""Files of `benchmarks/vllm_throughput.py` (``vllm-throughput-NAME.json``), and the models."""


def engines(name: str) -> str:
    """Perplexities of exports in other engines and in quantine."""
    lines = head(["plan", "export", "engine", "windows", "there", "here", "difference"])
    refused = []
    for row in read(f"engines-{name}"):
        to = row["to"] or "(own)"
        if "refused" in row:
            refused.append(f"Refused, {row['plan']} to {to}: {row['refused']}.\n")
            continue
        there, here = row["there"], row["here"]
        cells = [row["plan"], to, row["engine"], row["windows"], f"{there:.4f}", f"{here:.4f}"]
        lines.append(line([*cells, f"{there / here - 1:+.4%}"]))
    return "\n".join(["\n".join(lines) + "\n", *dict.fromkeys(refused)])


def llama_cpp(name: str) -> str:
    """Files solved here and by llama.cpp's quantizer, side by side."""
    found = read(f"llama-cpp-{name}")
    first = ["file", "by", "bytes", "perplexity", "KL", "same top word"]
    lines = head([*first, "served: perplexity", "served: KL"])
    for row in found["rows"]:
        here, there = row["here"], row["there"]
        lines.append(
            line(
                [
                    row["target"],
                    f"**{row['by']}**" if row["by"].startswith("quantine") else row["by"],
                    f"{row['file_bytes']:,}",
                    f"{here['perplexity']:.3f} ± {here['stderr']:.2f}",
                    f"{here['kl']:.4f} ± {here['kl_stderr']:.4f}",
                    f"{here['top1']:.1%}",
                    f"{there['perplexity']:.3f}",
                    f"{there['divergence']:.4f}",
                ]
            )
        )
    said = f"{found['windows']} windows of {found['window']} tokens; {found['samples']} segments"
    return "\n".join(lines) + f"\n\n{said} of calibration text. ± is one standard error.\n"


def llm_compressor() -> str:
    """GPTQ of both programs, side by side."""
    lines = head(["model", "grid", "by", "bytes", "perplexity", "KL"])
    for name, model in LLM_COMPRESSOR_MODELS.items():
        found = read(f"llm-compressor-{name}")
        for row in found["rows"]:
            by = f"**{row['by']}**" if row["by"] == "quantine" else row["by"]
            cells = [model, row["grid"], by, f"{row['bytes']:,}", *closeness(row["here"])]
            lines.append(line(cells))
    said = f"{found['windows']} windows of {found['window']} tokens; {found['samples']} segments"
    return "\n".join(lines) + f"\n\n{said} of calibration text. ± is one standard error.\n"


def throughput() -> str:
    """Tokens per second in vLLM, packed against float, by number of requests."""
    lines = head(["", "graphs", "requests", "rounds", "bfloat16", "packed", "ratio"])
    for name, shown in THROUGHPUT_TABLES.items():
        found = read(f"vllm-throughput-{name}")
        graphs = "eager" if found["eager"] else "compiled"
        for requests in dict.fromkeys(row["requests"] for row in found["rows"]):
            floats, packed = (row["speeds"] for row in found["rows"] if row["requests"] == requests)
            ratios = [two / one for one, two in zip(floats, packed, strict=True)]
            medians = [f"{median(speeds):.1f}" for speeds in (floats, packed)]
            ratio = f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(line([shown, graphs, str(requests), str(len(ratios)), *medians, ratio]))
    return "\n".join(lines) + "\n"


def sections() -> list[str]:
    """Engines and other programs' quantizers, in order."""
    parts = [ENGINES]
    parts += [f"\n### {shown}\n\n{engines(name)}" for name, shown in ENGINE_TABLES.items()]
    parts.append(LLAMA_CPP)
    parts += [f"\n{shown}\n\n{llama_cpp(name)}" for name, shown in LLAMA_CPP_TABLES.items()]
    return [*parts, LLM_COMPRESSOR, llm_compressor(), THROUGHPUT, throughput()]
