"""One decoder block in memory at a time, fed with what the quantized blocks before it put out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from quantine.calibrate.hidden_states import HiddenStates
from quantine.calibrate.replay import Replay
from quantine.calibrate.skeleton import StandIn, drop_weights, materialize, set_tensor
from quantine.core.device import CPU
from quantine.core.finite import is_finite
from quantine.errors import CalibrationError
from quantine.families.family import Family
from quantine.families.layers import Layer, block_list
from quantine.kernels.gram import add_gram
from quantine.statistics.channel_ranges import ChannelRanges
from quantine.statistics.hessian import Hessian

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from quantine.source.checkpoint import Checkpoint

TOKENS_PER_BATCH: Final = 2048


def batch_samples(samples: int, seqlen: int) -> int:
    """Segments per batch: the largest divisor of ``samples`` within `TOKENS_PER_BATCH` tokens."""
    fitting = [
        n for n in range(1, samples + 1) if samples % n == 0 and n * seqlen <= TOKENS_PER_BATCH
    ]
    return max(fitting, default=1)


@dataclass(frozen=True)
class CalibrationSetup:
    """What runs through which model, and how.

    Attributes:
        model: a `quantine.calibrate.skeleton.skeleton`; blocks get weights while they are worked
            on.
        family: its architecture.
        checkpoint: where weights come from.
        segments: ``[samples, seqlen]`` int64 token ids, without padding.
        spill: directory for hidden states, ``None`` to keep them in memory.
        replaced: float32 tensors by name that stand in for the checkpoint's, outside of blocks.
        bfloat16: multiply matrices in bfloat16, and take statistics of inputs rounded to it, in
            float32; weights, norms and hidden states stay in float32.
        resumes: keep what a block had computed when it stopped for `Sequential.observe_next`;
            takes a few times the memory of the hidden states.
        device: where blocks and hidden states are while they are worked on.
    """

    model: PreTrainedModel
    family: Family
    checkpoint: Checkpoint
    segments: Tensor
    spill: Path | None = None
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    bfloat16: bool = False
    resumes: bool = False
    device: torch.device = CPU

    def autocast(self) -> torch.autocast:
        """The context in which matrices are multiplied, whatever context the caller is in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)


class Sequential:
    """Runs calibration segments through a model, block by block."""

    def __init__(self, setup: CalibrationSetup) -> None:
        self._setup = setup
        self._family = setup.family
        self._blocks = block_list(setup.model, setup.family)
        size = batch_samples(*setup.segments.shape)
        batches = setup.segments.to(setup.device).split(size)
        self._hidden = HiddenStates(len(batches), setup.spill, setup.device)
        self._replays = [Replay() for _ in batches] if setup.resumes else None
        # How the model calls each block, hidden states apart; the same for every batch.
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._enter(batches)

    @property
    def setup(self) -> CalibrationSetup:
        """What runs through which model."""
        return self._setup

    def load(self, index: int) -> nn.Module:
        """Block ``index`` with its float32 weights."""
        setup, block = self._setup, self._blocks[index]
        path = f"{self._family.blocks}.{index}"
        materialize(setup.model, block, path, setup.checkpoint, setup.device)
        return block

    def release(self, index: int) -> None:
        """Give the memory of block ``index`` back."""
        self._blocks[index].to("meta")

    @torch.no_grad()
    def observe(self, index: int, layers: Sequence[Layer]) -> list[Hessian]:
        """Statistics of the inputs of ``layers`` of block ``index``, all in one pass.

        The block runs only until all of them have been seen.

        Args:
            layers: one of each group, as the others read the same input.
        """
        observers = [_InputObserver(layer, self._setup) for layer in layers]

        def enough() -> None:
            if len({observer.seen for observer in observers}) == 1:
                raise _Enough

        handles = [observer.register(enough) for observer in observers]
        try:
            for batch in range(len(self._hidden)):
                try:
                    self.run(index, self._hidden[batch])
                except _Enough:
                    continue
                seen = [observer.seen for observer in observers]
                raise self._never_ran(layers[seen.index(min(seen))].name)
        finally:
            for handle in handles:
                handle.remove()
        return [observer.hessian for observer in observers]

    @torch.no_grad()
    def observe_next(self, index: int, layer: Layer) -> Hessian:
        """Statistics of the input of ``layer`` in block ``index``.

        It must run after the layers observed like this before, and what ran before those must not
        have been changed since.
        """
        if self._replays is None:
            return self.observe(index, [layer])[0]
        hessian = Hessian(layer.in_features, add_gram, self._setup.device)
        for batch, replay in enumerate(self._replays):

            def stop(x: Tensor, replay: Replay = replay) -> None:
                replay.stop()
                raise _Reached(x)

            handle = layer.observe(self._setup.model, stop)
            try:
                with replay:
                    self.run(index, self._hidden[batch])
                raise self._never_ran(layer.name)
            except _Reached as reached:
                hessian.update(_as_multiplied(reached.x, self._setup))
            finally:
                handle.remove()
        return hessian

    @torch.no_grad()
    def ranges(self, index: int, paths: Sequence[str]) -> dict[str, ChannelRanges]:
        """Ranges of what enters the modules at ``paths`` in block ``index``, by path."""
        found: dict[str, ChannelRanges] = {}

        def recorder(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def record(_: nn.Module, args: tuple[Any, ...]) -> None:
                seen = found.setdefault(path, ChannelRanges(args[0].shape[-1], args[0].device))
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
            raise self._never_ran(f"{self._family.blocks}.{index}.{missing[0]}")
        return found

    def _never_ran(self, name: str) -> CalibrationError:
        return CalibrationError(
            f"{name} never ran: family {self._family.name!r} is described wrongly"
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
        if self._replays is None:
            return self.run(index, self._hidden[batch])
        replay, self._replays[batch] = self._replays[batch], Replay()
        with replay:
            return self.run(index, self._hidden[batch])

    @property
    def hidden(self) -> HiddenStates:
        """What enters the block that is worked on."""
        return self._hidden

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Block ``index`` on one batch of hidden states ``[batch, tokens, width]``."""
        args, kwargs = self._calls[index]
        with self._setup.autocast():
            output = self._blocks[index](hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def outputs(self, index: int, batches: int | None = None) -> list[Tensor]:
        """What block ``index`` puts out as it is now, without going on to the next block.

        Args:
            index: number of the block.
            batches: how many of the first batches run; all of them if ``None``.

        Returns:
            ``[batch, tokens, width]`` float32 for each batch.
        """
        count = len(self._hidden) if batches is None else batches
        return [self.run(index, self._hidden[batch]) for batch in range(count)]

    @torch.no_grad()
    def _enter(self, batches: Iterable[Tensor]) -> None:
        """Compute the first block's inputs, and record how the model calls each block."""
        setup = self._setup
        base, prefix = setup.model.base_model, setup.model.base_model_prefix
        inside = f"{self._family.blocks}."
        materialize(setup.model, base, prefix, setup.checkpoint, setup.device, skip=inside)
        for name, tensor in setup.replaced.items():
            set_tensor(setup.model, name, tensor.to(setup.device))
        blocks = list(self._blocks)
        recorders = [StandIn(block, self._family.returns_tuple) for block in blocks]
        try:
            for index, recorder in enumerate(recorders):
                self._blocks[index] = recorder
            for batch, tokens in enumerate(batches):
                base(input_ids=tokens, use_cache=False, output_attentions=False)
                self._hidden[batch] = recorders[0].entered().clone()
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


class _InputObserver:
    """Statistics of what enters ``layer``, and how often it was entered."""

    def __init__(self, layer: Layer, setup: CalibrationSetup) -> None:
        self._layer, self._setup = layer, setup
        self.hessian = Hessian(layer.in_features, add_gram, setup.device)
        self.seen = 0

    def register(self, after: Callable[[], None]) -> RemovableHandle:
        def look(x: Tensor) -> None:
            with torch.autocast(self._setup.device.type, enabled=False):
                self.hessian.update(_as_multiplied(x, self._setup))
            self.seen += 1
            after()

        return self._layer.observe(self._setup.model, look)


def _as_multiplied(x: Tensor, setup: CalibrationSetup) -> Tensor:
    """Input ``x`` in the dtype in which matrices are multiplied."""
    return x.bfloat16() if setup.bfloat16 else x
