"""The entry point that vLLM calls, in each of its processes, before it reads a model's config."""

from __future__ import annotations

from functools import cache


@cache
def register() -> None:
    """Register quantine's quantization method and kernel with vLLM, once in a process."""
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.platforms import PlatformEnum

    from quantine.engines.vllm.config import EngineConfig
    from quantine.engines.vllm.mixed_kernel import NativeKernel
    from quantine.formats.description import METHOD

    register_quantization_config(METHOD)(EngineConfig)
    register_linear_kernel(NativeKernel, PlatformEnum.CPU)
