"""vLLM serves quantine's directories: a quantization method that vLLM finds by itself.

Only `quantine.engines.vllm.plugin` may be imported where vLLM is not installed, and the modules
that do not name it: `stored`, `operators`.
"""
