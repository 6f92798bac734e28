"""The entry point that vLLM calls, in each of its processes, before it reads a model's config."""

from __future__ import annotations


def register() -> None:
    """Register quantine's quantization method with vLLM; calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from quantine.engines.vllm.config import EngineConfig
    from quantine.formats.description import METHOD

    register_quantization_config(METHOD)(EngineConfig)
