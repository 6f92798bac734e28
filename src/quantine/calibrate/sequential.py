"""One decoder block in memory at a time, fed with what the quantized blocks before it put out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from quantine.activations.attention import register
from quantine.activations.modules import rounded_inputs
from quantine.calibrate.activations import Activations
from quantine.calibrate.recording import Recording
from quantine.core.observe import Hessian, MinMax, is_finite
from quantine.errors import CalibrationError
from quantine.families.base import Family, block_list, is_transposed
from quantine.kernels.gram import add_gram

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.hooks import RemovableHandle
    from transformers import PretrainedConfig, PreTrainedModel

    from quantine.formats.checkpoint import Checkpoint

TOKENS_PER_BATCH: Final = 2048


def skeleton(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """The causal language model of ``config`` without weights: parameters on the meta device.

    Args:
        attention: name of an attention function; ``None`` lets transformers choose.
    """
    from transformers import AutoModelForCausalLM

    register()

    own = copy.deepcopy(config)  # which the model marks with its dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            own, dtype=torch.float32, attn_implementation=attention
        )
    model.eval()
    return model


def batch_samples(samples: int, seqlen: int) -> int:
    """Segments per batch: the largest divisor of ``samples`` within `TOKENS_PER_BATCH` tokens."""
    fitting = [
        n for n in range(1, samples + 1) if samples % n == 0 and n * seqlen <= TOKENS_PER_BATCH
    ]
    return max(fitting, default=1)


class Sequential:
    """Runs calibration segments through a model, block by block.

    Args:
        model: a `skeleton`; blocks get weights while they are worked on.
        family: its architecture.
        checkpoint: where weights come from.
        segments: ``[samples, seqlen]`` int64 token ids, without padding.
        spill: directory for hidden states, ``None`` to keep them in memory.
        replaced: float32 tensors by name that stand in for the checkpoint's, outside of blocks.
        bfloat16: multiply matrices in bfloat16, and take statistics of inputs rounded to it, in
            float32; weights, norms and hidden states stay in float32.
        resumes: keep what a block had computed when it stopped for `observe_next`; takes a few
            times the memory of the hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        checkpoint: Checkpoint,
        segments: Tensor,
        spill: Path | None,
        replaced: Mapping[str, Tensor],
        bfloat16: bool = False,
        resumes: bool = False,
    ) -> None:
        self._model = model
        self._bfloat16 = bfloat16
        self._family = family
        self._checkpoint = checkpoint
        self._blocks = block_list(model, family)
        size = batch_samples(*segments.shape)
        self._hidden = Activations(len(segments) // size, spill)
        self._recordings = [Recording() for _ in range(len(self._hidden))] if resumes else None
        # How the model calls each block, hidden states apart; the same for every batch.
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._enter(segments.split(size), replaced)

    def load(self, index: int) -> nn.Module:
        """Block ``index`` with its float32 weights."""
        block = self._blocks[index]
        materialize(self._model, block, f"{self._family.blocks}.{index}", self._checkpoint)
        return block

    def release(self, index: int) -> None:
        """Give the memory of block ``index`` back."""
        self._blocks[index].to("meta")

    @torch.no_grad()
    def observe(self, index: int, paths: Sequence[str]) -> list[Hessian]:
        """Statistics of the inputs of the matrices at ``paths`` in block ``index``, in one pass.

        The block runs only until all of them have been seen.
        """
        modules = [self._blocks[index].get_submodule(path) for path in paths]
        looks = [_Look(module, self._multiplied) for module in modules]

        def enough() -> None:
            if len({look.seen for look in looks}) == 1:
                raise _Enough

        handles = [look.register(enough) for look in looks]
        try:
            for batch in range(len(self._hidden)):
                try:
                    self.run(index, self._hidden[batch])
                except _Enough:
                    continue
                seen = [look.seen for look in looks]
                raise self._never_ran(index, paths[seen.index(min(seen))])
        finally:
            for handle in handles:
                handle.remove()
        return [look.hessian for look in looks]

    @torch.no_grad()
    def observe_next(self, index: int, path: str) -> Hessian:
        """Statistics of the input of the matrix at ``path`` in block ``index``.

        It must run after the matrices observed like this before, and what ran before those must
        not have been changed since.
        """
        if self._recordings is None:
            return self.observe(index, [path])[0]
        module = self._blocks[index].get_submodule(path)
        hessian = _hessian_of(module)
        for batch, recording in enumerate(self._recordings):

            def stop(_: nn.Module, args: tuple[Any, ...], recording: Recording = recording) -> None:
                recording.stop()
                raise _Reached(args[0])

            handle = module.register_forward_pre_hook(stop)
            try:
                with recording:
                    self.run(index, self._hidden[batch])
                raise self._never_ran(index, path)
            except _Reached as reached:
                hessian.update(self._multiplied(rounded_inputs(module, reached.x)))
            finally:
                handle.remove()
        return hessian

    @torch.no_grad()
    def ranges(self, index: int, paths: Sequence[str]) -> dict[str, MinMax]:
        """Ranges of what enters the modules at ``paths`` in block ``index``, by path."""
        found: dict[str, MinMax] = {}

        def recorder(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def record(_: nn.Module, args: tuple[Any, ...]) -> None:
                seen = found.setdefault(path, MinMax(args[0].shape[-1]))
                seen.update(args[0], samples)

            return record

        block = self._blocks[index]
        handles = [
            block.get_submodule(path).register_forward_pre_hook(recorder(path)) for path in paths
        ]
        try:
            for batch in range(len(self._hidden)):
                hidden = self._hidden[batch]
                samples = len(hidden)
                self.run(index, hidden)
        finally:
            for handle in handles:
                handle.remove()
        missing = [path for path in paths if path not in found]
        if missing:
            raise self._never_ran(index, missing[0])
        return found

    def _multiplied(self, x: Tensor) -> Tensor:
        """Input ``x`` as matrices multiply it."""
        return x.bfloat16() if self._bfloat16 else x

    def _never_ran(self, index: int, path: str) -> CalibrationError:
        return CalibrationError(
            f"{self._family.blocks}.{index}.{path} never ran: family {self._family.name!r} is "
            "described wrongly"
        )

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the hidden states by the outputs of block ``index`` as it now is.

        Raises:
            CalibrationError: an output is not finite.
        """
        for batch in range(len(self._hidden)):
            output = self._run_on(index, batch)
            if not is_finite(output):
                raise CalibrationError(
                    f"{self._family.blocks}.{index} puts out non-finite values on the calibration "
                    "text: more bits or another calibration text are needed"
                )
            self._hidden[batch] = output

    def _run_on(self, index: int, batch: int) -> Tensor:
        """Block ``index`` on a batch to its end, from where it stopped."""
        if self._recordings is None:
            return self.run(index, self._hidden[batch])
        recording, self._recordings[batch] = self._recordings[batch], Recording()
        with recording:
            return self.run(index, self._hidden[batch])

    @property
    def hidden(self) -> Activations:
        """What enters the block that is worked on."""
        return self._hidden

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Block ``index`` on one batch of hidden states ``[batch, tokens, width]``."""
        args, kwargs = self._calls[index]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            output = self._blocks[index](hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def _enter(self, batches: Iterable[Tensor], replaced: Mapping[str, Tensor]) -> None:
        """Compute the first block's inputs, and record how the model calls each block."""
        base = self._model.base_model
        prefix = self._model.base_model_prefix
        materialize(self._model, base, prefix, self._checkpoint, skip=f"{self._family.blocks}.")
        for name, tensor in replaced.items():
            set_tensor(self._model, name, tensor)
        blocks = list(self._blocks)
        recorders = [StandIn(block, self._family.returns_tuple) for block in blocks]
        try:
            for index, recorder in enumerate(recorders):
                self._blocks[index] = recorder
            for batch, tokens in enumerate(batches):
                base(input_ids=tokens, use_cache=False, output_attentions=False)
                self._hidden[batch] = recorders[0].hidden.clone()
        finally:
            for index, block in enumerate(blocks):
                self._blocks[index] = block
        self._calls = [(recorder.args, recorder.kwargs) for recorder in recorders]
        drop_weights(base)


class _Enough(Exception):
    """Raised inside a block when the observed inputs have been seen."""


class _Reached(Exception):
    """Raised inside a block when it reaches the matrix that is observed, whose input is ``x``."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class _Look:
    """Statistics of what enters ``module``, and how often it was entered.

    Args:
        module: the matrix.
        multiplied: what it makes of its input.
    """

    def __init__(self, module: nn.Module, multiplied: Callable[[Tensor], Tensor]) -> None:
        self._multiplied = multiplied
        self.hessian = _hessian_of(module)
        self.seen = 0
        self._module = module

    def register(self, after: Callable[[], None]) -> RemovableHandle:
        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            with torch.autocast("cpu", enabled=False):
                self.hessian.update(self._multiplied(rounded_inputs(self._module, args[0])))
            self.seen += 1
            after()

        return self._module.register_forward_pre_hook(look)


def _hessian_of(module: nn.Module) -> Hessian:
    """Nothing seen yet of the input of ``module``."""
    weight = module.get_parameter("weight")
    return Hessian(weight.shape[0 if is_transposed(module) else 1], add_gram)


class StandIn(nn.Module):
    """Stands in for a block: remembers the call, and passes the hidden states through.

    Args:
        block: whose attributes the model may look at.
        returns_tuple: whether the block returns a tuple.
        replay: what to return instead of the hidden states that come in.
    """

    def __init__(self, block: nn.Module, returns_tuple: bool, replay: Tensor | None = None) -> None:
        super().__init__()
        self._stand_in_for = [block]
        self._replay = [replay]
        self._returns_tuple = returns_tuple
        self.hidden = torch.empty(0)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stand_in_for"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """Remember and pass on."""
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        hidden = hidden if self._replay[0] is None else self._replay[0]
        return (hidden,) if self._returns_tuple else hidden


def materialize(
    model: PreTrainedModel, module: nn.Module, path: str, checkpoint: Checkpoint, skip: str = "-"
) -> None:
    """Give ``module``, found at ``path``, buffers and float32 weights, except below ``skip``."""
    for child in module.modules():
        missing = [name for name, b in child._buffers.items() if b is not None and b.is_meta]
        for name in missing:
            child._buffers[name] = torch.empty_like(child.get_buffer(name), device="cpu")
        if missing:
            # Buffers that no checkpoint holds (rotary frequencies, embedding scales) are computed
            # by the architecture's own initializer, as transformers does when it loads a model.
            model._init_weights(child)
    names = [name for name in module.state_dict(prefix=f"{path}.") if not name.startswith(skip)]
    for name, tensor in checkpoint.read(names).items():
        set_tensor(model, name, tensor.float() if tensor.is_floating_point() else tensor)


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the parameter or buffer ``name`` of ``model`` a value."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def drop_weights(module: nn.Module) -> None:
    """Give the memory of all parameters below ``module`` back."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
