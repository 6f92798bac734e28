"""A kernel with which vLLM's own compressed-tensors path serves 2 to 8 bits on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import current_platform

from quantine.core.arithmetic import Arithmetic
from quantine.core.spec import QuantSpec
from quantine.engines.linear import FusedLinear, PackedPart
from quantine.engines.vllm.operators import linear, numbered
from quantine.errors import FormatError
from quantine.formats.foreign.compressed_tensors.layout import unpack_matrix
from quantine.formats.foreign.plain import qtensor_of


class NativeKernel(MPLinearKernel):
    """Products by quantine's native kernels; vLLM asks it where its own kernels do not fit.

    In a float32 model they are exact, in others inputs are rounded to 16 bits as they are there.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        """None is needed."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether ``c`` is on the CPU, with groups that divide inputs, and if not, why."""
        if not current_platform.is_cpu():
            return False, "quantine's kernel is for the CPU"
        if not QuantSpec(c.weight_type.size_bits, c.group_size).divides(
            c.partition_weight_shape[0]
        ):
            return False, f"groups of {c.group_size} do not divide the inputs"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the packed parameters by what the kernels read.

        Raises:
            FormatError: they are no matrix of that layout, or of GPTQ.
        """
        if self.w_q_name != "weight_packed":
            raise FormatError(
                f"quantine's kernel for vLLM's own models reads compressed-tensors, not "
                f"{self.w_q_name} of GPTQ: export --to compressed-tensors, or serve what quantine "
                "makes itself"
            )
        packed, scale, zero = self._get_weight_params(layer)
        columns, rows = self.config.partition_weight_shape
        sym = not self.config.zero_points
        spec = QuantSpec(self.config.weight_type.size_bits, self.config.group_size, sym)
        tensors = {"weight_packed": packed.data, "weight_scale": scale.data}
        if zero is not None:
            tensors["weight_zero_point"] = zero.data
        name = getattr(layer, "prefix", "matrix")
        matrix = unpack_matrix(name, tensors, spec, (rows, columns))
        arithmetic: Arithmetic = "exact" if self.config.act_type == torch.float32 else "fast"
        part = PackedPart(qtensor_of(name, matrix, sym), arithmetic)
        layer.quantine_linear = FusedLinear([part])
        layer.register_buffer("quantine_number", numbered(layer.quantine_linear), persistent=False)
        for parameter in (self.w_q_name, self.w_s_name, self.w_zp_name):
            self._transform_param(layer, parameter, lambda old: old.data.new_empty(0))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map ``x`` ``[..., in]`` to ``[..., out]`` of the same dtype."""
        rows = self.config.partition_weight_shape[1]
        found = linear(x.reshape(-1, x.shape[-1]), layer.quantine_number, rows)
        found = found.reshape(*x.shape[:-1], rows)
        return found if bias is None else found + bias
