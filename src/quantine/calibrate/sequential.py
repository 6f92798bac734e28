"""Calibration block by block, as in GPTQ and SpQR.

One decoder block is in memory at a time. It is run on what the blocks before it, already
quantized, put out for the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantine.calibrate.expert_tokens import lend_tokens
from quantine.calibrate.hidden_states import HiddenStates
from quantine.calibrate.input_observer import Enough, InputObserver, Reached, as_multiplied
from quantine.calibrate.replay import Replay
from quantine.calibrate.setup import CalibrationSetup
from quantine.calibrate.shards import batch_samples, cut
from quantine.calibrate.skeleton import (
    drop_weights,
    fill,
    make_buffers,
    set_tensor,
    weight_names,
)
from quantine.core.device import CPU
from quantine.core.finite import is_finite
from quantine.errors import CalibrationError
from quantine.families.base import base_of
from quantine.families.layers import Layer, block_list, multiplied_input
from quantine.families.stand_in import standing_in
from quantine.kernels.gram import add_gram
from quantine.statistics.channel_ranges import ChannelRanges
from quantine.statistics.hessian import Hessian

if TYPE_CHECKING:
    pass


class Sequential:
    """Runs calibration segments through a model, block by block.

    It holds the hidden states that enter the current block, those of the shards of this process.
    Statistics are those of all shards, on every rank. Each block in turn gets its weights
    (see `quantine.calibrate.block_loader`), is observed, quantized by the caller, and passed by
    `advance` before it is released.

    Args:
        setup: model, weights and segments.
        done: number of blocks, from the first, that an earlier process finished. Where that is not
            0, the hidden states that it left are taken over.

    Attributes:
        block: number of the block that comes first: all before it have been passed.
        lost: what is wrong with the hidden states that the earlier process left; ``None`` if they
            were taken over, or there was no such process.
        batches: number of batches of all ranks.
        shards: the numbers of the batches of each shard of this rank.
        judged: number of the batches of the first shard: what is decided by outputs of the block is
            decided by these, on the first rank, whose first batches they are.
    """

    def __init__(self, setup: CalibrationSetup, done: int = 0) -> None:
        self._setup = setup
        self._family = setup.family
        self._blocks = block_list(setup.model, setup.family)
        samples, seqlen = setup.segments.shape
        size = batch_samples(samples, seqlen, setup.batch_tokens, setup.shards)
        shards = [shard.split(size) for shard in cut(setup.segments, setup.shards)]
        own = setup.ranks.share(setup.shards)
        batches = [batch.to(setup.device) for shard in own for batch in shards[shard]]
        ends = [0, *accumulate(len(shards[shard]) for shard in own)]
        self.shards = [range(*pair) for pair in pairwise(ends)]
        starts = [0, *accumulate(batch.numel() for batch in batches)]
        # The numbers of the tokens of each batch.
        self._tokens = [slice(*pair) for pair in pairwise(starts)]
        in_memory, directory = setup.spill is None, setup.spill or setup.saved
        self.batches, self.judged = sum(map(len, shards)), len(shards[0])
        before = sum(map(len, shards[: own.start]))
        self._hidden = HiddenStates(
            len(batches), directory, setup.device, setup.kept_on, in_memory, before
        )
        self._replays = [Replay() for _ in batches] if setup.resumes else None
        # How the model calls each block, hidden states apart; the same for every batch.
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.lost = self._enter(batches, done)
        enters = min(self._hidden.enters(batch) for batch in range(len(batches)))
        self.block = min(setup.ranks.gather(enters))

    @property
    def setup(self) -> CalibrationSetup:
        """Model, weights and segments, and how they are computed with."""
        return self._setup

    @torch.no_grad()
    def observe(self, index: int, layers: Sequence[Layer]) -> list[Hessian]:
        """The Hessians ``x x.T`` of the inputs of several matrices, all from one forward pass.

        For each batch the block runs only until all of these inputs have been computed.

        Args:
            index: number of the block.
            layers: one matrix of each group of the block, as all of a group read the same input.

        Returns:
            One Hessian for each of ``layers``, over all calibration tokens. Those of an expert are
            the tokens that chose it, see `quantine.calibrate.expert_tokens`.

        Raises:
            CalibrationError: a matrix was never reached.
        """
        hessians = self._summed(
            layers, (self._observed(index, layers, batches) for batches in self.shards)
        )
        lend_tokens(layers, hessians)
        return hessians

    def _observed(
        self, index: int, layers: Sequence[Layer], batches: Sequence[int]
    ) -> list[Hessian]:
        """The result of `observe` for some batches."""
        observers = [InputObserver(layer, self._setup) for layer in layers]

        chosen = any(layer.experts for layer in layers)  # some by no token of a batch

        def enough() -> None:
            if not chosen and len({observer.seen for observer in observers}) == 1:
                raise Enough

        handles = [observer.register(enough) for observer in observers]
        try:
            for batch in batches:
                for layer, observer in zip(layers, observers, strict=True):
                    observer.weights = self._weights(layer, batch)
                try:
                    self.run(index, self._hidden[batch])
                except Enough:
                    continue
        finally:
            for handle in handles:
                handle.remove()
        for layer, observer in zip(layers, observers, strict=True):
            if not layer.experts and observer.seen < len(batches):
                raise self._never_ran(layer.name)
        return [observer.hessian for observer in observers]

    def _summed(
        self, layers: Sequence[Layer], shards: Iterable[Sequence[Hessian]]
    ) -> list[Hessian]:
        """The Hessians of the inputs of ``layers`` over all shards, of which some are given."""

        def parts() -> Iterator[list[Tensor]]:
            for hessians in shards:
                tokens = [hessian.tokens for hessian in hessians]
                counts = torch.tensor(tokens, dtype=torch.int64, device=self._setup.device)
                yield [*(hessian.matrix for hessian in hessians), counts]

        *sums, counts = self._setup.ranks.total(parts())
        return [
            Hessian.of(total, int(tokens), add_gram, self._setup.times)
            for total, tokens in zip(sums, counts.tolist(), strict=True)
        ]

    @torch.no_grad()
    def observe_next(self, index: int, layers: Sequence[Layer]) -> list[Hessian]:
        """The Hessians ``x x.T`` of what runs next, with the block as it is now.

        Where the setup has ``resumes``, forward passes continue where the previous call stopped
        them: the matrix must then run after the one observed before, and nothing that ran before
        that one may have been changed since. Experts are observed by running the whole block.

        Args:
            index: number of the block.
            layers: one matrix, or one of each expert.

        Raises:
            CalibrationError: the matrix was never reached.
        """
        layer = layers[0]
        if self._replays is None or layer.experts:
            return self.observe(index, layers)
        return self._summed(
            layers, ([self._continued(index, layer, batches)] for batches in self.shards)
        )

    def _continued(self, index: int, layer: Layer, batches: Sequence[int]) -> Hessian:
        """The result of `observe_next` for some batches, where forward passes continue."""
        assert self._replays is not None
        hessian = Hessian(layer.in_features, add_gram, self._setup.device, self._setup.times)
        for batch in batches:
            replay = self._replays[batch]

            def stop(x: Tensor, replay: Replay = replay) -> None:
                replay.stop()
                raise Reached(x)

            handle = layer.observe(self._setup.model, stop)
            try:
                with replay:
                    self.run(index, self._hidden[batch])
                raise self._never_ran(layer.name)
            except Reached as reached:
                x = as_multiplied(reached.x, self._setup)
                hessian.update(x, self._weights(layer, batch))
            finally:
                handle.remove()
        return hessian

    def _weights(self, layer: Layer, batch: int) -> Tensor | None:
        """How much the tokens of a batch count in the Hessian of the input of ``layer``."""
        weights = self._setup.token_weights
        if not weights:
            return None
        return weights[layer.name][self._tokens[batch]].to(self._setup.device)

    @torch.no_grad()
    def ranges(self, index: int, paths: Sequence[str]) -> dict[str, ChannelRanges]:
        """Ranges of the channels, rotated if inputs are, that enter modules of a block.

        Args:
            index: number of the block.
            paths: paths of the modules inside the block.

        Returns:
            The ranges by path, over all calibration tokens.

        Raises:
            CalibrationError: a module never ran.
        """
        found: dict[str, ChannelRanges] = {}

        def recorder(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def record(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = multiplied_input(module, args[0])
                seen = found.setdefault(path, ChannelRanges(x.shape[-1], x.device))
                seen.update(x, samples)

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
        if self._setup.ranks.count == 1:
            return found
        sent = {path: seen.to(CPU) for path, seen in found.items()}  # ranks have other devices
        whole, *others = self._setup.ranks.gather(sent)
        for other in others:
            for path in paths:
                whole[path].merge(other[path])
        return {path: seen.to(self._setup.device) for path, seen in whole.items()}

    def _never_ran(self, name: str) -> CalibrationError:
        return CalibrationError(
            f"{name} never ran: family {self._family.name!r} is described wrongly"
        )

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the hidden states by the outputs of block ``index``, as it is now.

        Those that passed it in an earlier process stay as they are.

        Raises:
            CalibrationError: an output is infinite or NaN.
        """
        for batch in range(len(self._hidden)):
            if self._hidden.enters(batch) > index:
                continue
            output = self._run_on(index, batch)
            if not is_finite(output):
                raise CalibrationError(
                    f"{self._family.blocks}.{index} puts out non-finite values on the calibration "
                    "text: more bits or another calibration text are needed"
                )
            with self._setup.times.stage("hidden states"):
                self._hidden.put(batch, output, index + 1)

    def _run_on(self, index: int, batch: int) -> Tensor:
        """The output of block ``index`` for batch number ``batch``.

        A forward pass that `observe_next` stopped is continued.
        """
        if self._replays is None:
            return self.run(index, self._hidden[batch])
        replay, self._replays[batch] = self._replays[batch], Replay()
        with replay:
            return self.run(index, self._hidden[batch])

    def forget(self) -> None:
        """Let the block that is worked on run from its start again.

        Needed where a matrix was changed after a later one had been observed by `observe_next`.
        """
        if self._replays is not None:
            self._replays = [Replay() for _ in self._replays]

    @property
    def hidden(self) -> HiddenStates:
        """The hidden states that enter the current block."""
        return self._hidden

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """The output of block ``index`` for one batch of hidden states.

        Args:
            index: number of the block, whose weights are loaded.
            hidden: ``[batch, tokens, width]`` float32, the shape of the result.
        """
        args, kwargs = self._calls[index]
        with self._setup.times.stage("forwards"), self._setup.autocast():
            output = self._blocks[index](hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple | list) else output
        return result

    @torch.no_grad()
    def outputs(self, index: int, batches: int | None = None) -> list[Tensor]:
        """The outputs of block ``index``, as it is now; hidden states stay as they are.

        Args:
            index: number of the block.
            batches: number of batches to run, from the first; ``None`` runs all.

        Returns:
            ``[batch, tokens, width]`` float32 for each batch.
        """
        count = len(self._hidden) if batches is None else batches
        return [self.run(index, self._hidden[batch]) for batch in range(count)]

    @torch.no_grad()
    def _enter(self, batches: Sequence[Tensor], done: int) -> str | None:
        """Record how the model calls each block, and compute the first block's inputs.

        Args:
            batches: token ids of the segments, ``[batch, tokens]`` each.
            done: see the class; the inputs are computed only where nothing can be taken over.

        Returns:
            What is wrong with what an earlier process left.
        """
        setup = self._setup
        path, base = base_of(setup.model, self._family)
        inside = f"{self._family.blocks}."
        make_buffers(setup.model, base, setup.device)
        names = weight_names(base, path, skip=inside)
        later = self._read_later(names) if done else []
        fill(setup.model, setup.checkpoint.read([n for n in names if n not in later]), setup.device)
        for name, tensor in setup.replaced.items():
            set_tensor(setup.model, name, tensor.to(setup.device))
        lost: str | None = None
        with (
            setup.times.stage("forwards"),
            standing_in(self._blocks, self._family.outputs) as recorders,
        ):

            def entered(tokens: Tensor) -> Tensor:
                base(input_ids=tokens, use_cache=False, output_attentions=False)
                return recorders[0].entered().clone()

            first = entered(batches[0])
            if done:
                lost = self._hidden.restore([len(tokens) for tokens in batches], first, done)
                lost = next(filter(None, setup.ranks.gather(lost)), None)
            if not done or lost is not None:
                fill(setup.model, setup.checkpoint.read(later), setup.device)
                for batch, tokens in enumerate(batches):
                    known = batch == 0 and not later
                    self._hidden.put(batch, first if known else entered(tokens), 0)
        self._calls = [(recorder.args, recorder.kwargs) for recorder in recorders]
        drop_weights(base)
        return lost

    def _read_later(self, names: Sequence[str]) -> list[str]:
        """The token table among the tensors ``names``, which zeros then stand for.

        What blocks are called with is the same for every text, so the table, often the largest
        tensor of all, is needed only where hidden states turn out to be lost.
        """
        setup, table = self._setup, f"{self._family.embedding}.weight"
        if table not in names or table in setup.replaced:
            return []
        shape = setup.model.get_parameter(table).shape
        zeros = torch.zeros(shape, dtype=torch.float32, device=setup.device)
        set_tensor(setup.model, table, zeros)
        return [table]
