"""The quantization method `quantine` of vLLM: which of its layers hold which matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from quantine.core.spec import FLOAT16
from quantine.engines.vllm.linear_method import PackedLinearMethod
from quantine.engines.vllm.stored import Stored, StoredMatrix, missing_claims
from quantine.engines.vllm.vocabulary_methods import (
    PackedEmbeddingMethod,
    PackedHeadMethod,
    TiedHeadMethod,
)
from quantine.errors import FormatError
from quantine.formats.description import METHOD


class EngineConfig(QuantizationConfig):
    """What vLLM asks about a directory whose ``quant_method`` is `quantine`.

    Args:
        settings: the ``quantization_config`` of ``config.json``.

    Raises:
        FormatError: docs/format.md does not allow it.
        PlanError: it asks for what vLLM cannot do.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.stored = Stored.of(settings)
        self._tied = False
        self._model = "model"
        self._claimed: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EngineConfig:
        """The method of a directory, from its ``quantization_config``."""
        return cls(config)

    def get_name(self) -> str:
        """`METHOD`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations that the kernels take."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """0: where a GPU has no kernels, PyTorch decodes the weights."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in ``config.json``."""
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """Read the headers of the weight files; vLLM calls it before it builds the model.

        Raises:
            FormatError: they cannot be read, or a tensor is missing.
            PlanError: vLLM cannot read a matrix.
        """
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        if not headers:
            raise FormatError(f"the headers of the weight files of {model_name} cannot be read")
        headers = {name: info for name, info in headers.items() if name != "__metadata__"}
        files = {name: (info["dtype"], tuple(info["shape"])) for name, info in headers.items()}
        self.stored = self.stored.with_files(hf_config.model_type, files)
        self._tied = bool(getattr(hf_config, "tie_word_embeddings", False))
        self._model = ", ".join(hf_config.architectures or ())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take over the names that vLLM's model has for the modules of the files."""
        self.stored = self.stored.renamed(hf_to_vllm_mapper.map_name)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Names under which vLLM reads tensors; called after a model is built, before it is read.

        Raises:
            PlanError: vLLM's model holds a packed matrix in floats only.
        """
        if get_pp_group().world_size == 1:  # else, other processes have the other layers
            missing_claims(self.stored, self._claimed, self._model)
        return WeightsMapper(orig_to_new_regex=self.stored.renamings())

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How ``layer``, which vLLM calls ``prefix``, holds its weights and computes.

        Raises:
            FormatError: the files hold only some of its matrices.
        """
        prefix = prefix.lstrip(".")
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if isinstance(layer, ParallelLMHead):
            return self._head_method(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._table_method()
        return None

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        matrices = self.stored.fused(prefix, self.packed_modules_mapping)
        bits = self.stored.bits_of_inputs(matrices[0].name) if matrices else FLOAT16
        if bits == FLOAT16 and all(matrix.spec is None for matrix in matrices):
            return UnquantizedLinearMethod()
        self._claimed.update(self._names_of(matrices))
        return PackedLinearMethod(prefix, matrices, self.stored, bits)

    def _head_method(self, prefix: str) -> QuantizeMethodBase | None:
        matrix = self.stored.matrices.get(prefix)
        if matrix is not None:
            self._claimed.add(prefix)
            found = self.stored.matrix(prefix)
            assert found is not None
            return PackedHeadMethod(found, self.stored.arithmetic)
        return TiedHeadMethod() if self._tied and self._table() is not None else None

    def _table_method(self) -> QuantizeMethodBase | None:
        name = self._table()
        if name is None:
            return None
        self._claimed.add(name)
        matrix = self.stored.matrix(name)
        assert matrix is not None
        return PackedEmbeddingMethod(matrix, self.stored.arithmetic)

    def _table(self) -> str | None:
        """The packed token embedding; vLLM does not always say which of its layers it is."""
        family = self.stored.family
        for name, matrix in self.stored.matrices.items():
            if family is not None and matrix.name == family.embedding:
                return name
        return None

    def _names_of(self, matrices: list[StoredMatrix]) -> set[str]:
        wanted = {matrix.name for matrix in matrices}
        return {name for name, one in self.stored.matrices.items() if one.name in wanted}
