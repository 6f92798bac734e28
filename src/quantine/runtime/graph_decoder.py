"""Decoding on a GPU of NVIDIA: one CUDA graph, replayed for each token.

A graph holds everything that the model's modules start on the GPU for one token, so that nothing
waits for Python. It reads the token and writes the logits in memory of its own, and its KV cache
has room for all tokens from the beginning, packed where the model rounds keys and values. Models
that read values on the host while they compute cannot be recorded, and are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantine.core.ambient import own_state
from quantine.errors import BackendUnavailable, cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UPS: Final = 2
"""Steps before one is recorded: programs are compiled and matrices arranged in the first."""
CHECKED: Final = 3
"""Tokens for which a recorded step has to compute what the model does."""
LEAST_ROOM: Final = WARM_UPS + 3
"""Tokens that a cache has room for at least: those of all steps before one may be replayed."""
WAITING: Final = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
"""Tags of operators whose results the host needs before it can go on."""

Step = Callable[[], Tensor]
"""Computes the logits of a token, which lies in memory, and returns where they are."""
Made = TypeVar("Made")


class StaticDecoder:
    """The interface of `quantine.runtime.decoder.Decoder`, by a step that is the same each time.

    Args:
        model: a model on one device.
        capacity: largest number of tokens it will see, prompt included.
        record: gets a step that may be repeated as it is, and returns what is called instead.

    Raises:
        BackendUnavailable: the step needs the host while it runs, or computes something else when
            it is repeated; or the model does not use the cache. Models raise errors of their own
            for one that is not of their kind.
    """

    @own_state()
    def __init__(
        self, model: PreTrainedModel, capacity: int, record: Callable[[Step], Step]
    ) -> None:
        from quantine.runtime.kv_cache import static_cache

        self._cache: Any = static_cache(model, max(capacity, LEAST_ROOM))
        self._model = model
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._position = 0
        self.capacity = capacity
        self._forward(self._token)  # allocates the cache, arranges matrices
        layers: Any = self._cache.layers
        if not any(layer.is_initialized for layer in layers):
            raise BackendUnavailable("it keeps what it has seen in no cache of keys and values")
        with NoHost():
            self._one()
        self._step = record(self._one)
        self._check()
        self.reset()

    @property
    def position(self) -> int:
        """Number of tokens seen since the last `reset`."""
        return self._position

    def reset(self) -> None:
        """Forget all tokens seen, so that a new text can begin."""
        for layer in self._cache.layers:
            layer.cumulative_length.zero_()
        self._position = 0

    @own_state()
    def append(self, tokens: Tensor) -> Tensor:
        """Run the model on further tokens.

        Args:
            tokens: ``[n]`` int64 token ids, on the CPU wherever the model is.

        Returns:
            Logits ``[vocabulary]`` float32 for the token after the last one, on the CPU.

        Raises:
            ValueError: there are more tokens than room, or none at all.
        """
        if not 0 < len(tokens) <= self.capacity - self._position:
            raise ValueError(
                f"{len(tokens)} tokens after {self._position}, with room for {self.capacity}"
            )
        self._position += len(tokens)
        if len(tokens) > 1:
            return self._forward(tokens.unsqueeze(0).to(self._token.device)).cpu()
        self._token.copy_(tokens.unsqueeze(0))
        return self._step().cpu()

    def _check(self) -> None:
        """Compare the recorded step with the model's own, token after token.

        What Python counts, such as a position, would stay in a recording as it was.

        Raises:
            BackendUnavailable: they differ.
        """
        found = []
        for step in (self._one, self._step):
            self.reset()
            found.append(torch.stack([step().clone() for _ in range(CHECKED)]))
        model, repeated = found
        near = 8 * torch.finfo(self._model.dtype).eps * float(model.abs().max())
        if not torch.allclose(repeated, model, rtol=0.0, atol=near):
            raise BackendUnavailable("a step that is repeated as it was computes something else")

    def _one(self) -> Tensor:
        return self._forward(self._token)

    def _forward(self, tokens: Tensor) -> Tensor:
        model: Any = self._model
        output = model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = output.logits[0, -1].float()
        return logits


class NoHost(TorchDispatchMode):
    """While entered, operators that make a GPU and the host wait for each other are refused."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """``func``, unless it needs values of tensors, or moves them between devices.

        Raises:
            BackendUnavailable: it does.
        """
        if WAITING & set(func.tags):
            raise BackendUnavailable(f"it reads values on the host ({func})")
        result = func(*args, **kwargs or {})
        devices = {leaf.device for leaf in tree_leaves((args, result)) if _is_moved(leaf)}
        if len(devices) > 1:
            raise BackendUnavailable(f"it moves values between devices ({func})")
        return result


def _is_moved(leaf: Any) -> bool:
    """Whether ``leaf`` is a tensor, and no number that PyTorch holds as one."""
    return isinstance(leaf, Tensor) and (leaf.ndim > 0 or leaf.device.type != "cpu")


def graph_decoder_for(model: PreTrainedModel, capacity: int) -> StaticDecoder:
    """Record a decoder that computes what the modules of ``model`` do.

    Hooks and changes put onto the model afterwards have no effect on it.

    Args:
        model: a model on a GPU of NVIDIA, packed or float.
        capacity: largest number of tokens it will see, prompt included.

    Raises:
        BackendUnavailable: it cannot be recorded; the message says why.
    """
    reason = _refusal(model)
    if reason is None:
        try:
            return StaticDecoder(model, capacity, partial(cuda_graph, model.device))
        except BackendUnavailable as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            raise
        # CUDA's own, for what it cannot record; and models', for a cache that is not of their kind.
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = cut(error)
    raise BackendUnavailable(f"no CUDA graph: {reason}")


def _refusal(model: PreTrainedModel) -> str | None:
    """Why a graph of ``model`` would not be what its modules compute, if that is so."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
    if len(set(places.values())) > 1:
        return "accelerate has spread the modules of the model over several places"
    if any(_has_hooks(module) for module in model.modules()):
        return "the model has hooks"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def cuda_graph(device: torch.device, step: Callable[[], Made]) -> Callable[[], Made]:
    """Record ``step``, which then runs with the same memory whenever the result is called.

    Args:
        device: where ``step`` computes: streams and graphs are those of the current device.
        step: what is recorded.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream for recordings is one of the GPU that it was first asked for, and
        # would make that the current one.
        with torch.cuda.graph(graph, stream=side):
            made = step()

    def replay() -> Made:
        with torch.cuda.device(device):
            graph.replay()
        return made

    return replay
