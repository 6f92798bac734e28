"""One decoder block of a run: its matrices are solved, adjusted together, packed and reported.

Groups of matrices that read the same input are solved in running order, each on the calibration
inputs that the quantized matrices before it produce. An `Adjustment` then sees the whole block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor, nn

from quantine.budget.allocation import Allocation
from quantine.calibrate.compensation import Compensation
from quantine.calibrate.sequential import Sequential
from quantine.calibrate.submodules import SubmoduleOutputs, judged_module
from quantine.core.device import CPU
from quantine.core.process_memory import KEPT_FREE, return_freed_memory
from quantine.core.qtensor import QTensor
from quantine.families.heads import Heads
from quantine.families.layers import Layer
from quantine.formats.floats import as_stored
from quantine.methods.adadim import Candidate, output_losses
from quantine.plan.decision import Decision, with_clusters
from quantine.rptq.blocks import float_tensors, reorder_block
from quantine.rptq.reordering import Reordering
from quantine.run.job import Job
from quantine.run.layer import (
    Solved,
    known_to_all,
    packed_tensors,
    sensitivity,
    solve,
    solve_choice,
)
from quantine.run.progress import Progress
from quantine.run.store import Reports
from quantine.source.checkpoint import Checkpoint
from quantine.statistics.hessian import Hessian
from quantine.statistics.losses import RelativeLoss
from quantine.statistics.output_covariance import reordered, turned


@dataclass(frozen=True)
class SolvedBlock:
    """A block whose matrices are solved, with all that an `Adjustment` may need.

    Attributes:
        index: number of the block, from 0.
        module: the block; it computes with the solved matrices.
        solved: the results for its matrices, in running order.
        weights: what each matrix was to become, ``[out, in]`` float32, by layer name: the float
            weight, or that changed by a `Compensation`.
        hessians: the Hessian of the input of each matrix, by layer name.
        sequential: runs the block on the calibration segments; it has advanced to this block.
        float_outputs: the block's outputs on the same inputs before any of its matrices was
            quantized, one tensor per batch.
    """

    index: int
    module: nn.Module
    solved: Sequence[Solved]
    weights: Mapping[str, Tensor]
    hessians: Mapping[str, Hessian]
    sequential: Sequential
    float_outputs: Sequence[Tensor]


class Adjustment(Protocol):
    """A step after solving that changes the solved matrices of a block together."""

    def __call__(self, block: SolvedBlock) -> Sequence[Solved]:
        """Change the results of a block.

        Args:
            block: the block with its solved matrices.

        Returns:
            One `Solved` for each of ``block.solved``, in that order; `Solved.adjusted` makes
            changed ones.
        """
        ...


@dataclass(frozen=True)
class BlockResult:
    """What the output directory gets from one block.

    Attributes:
        tensors: packed and float tensors, by full name.
        reports: the entries of the block's layers in ``quantine_report.json``.
        maps: tensors for pictures, such as sensitivity maps, by name.
    """

    tensors: dict[str, Tensor]
    reports: Reports
    maps: dict[str, Tensor]


@dataclass
class BlockRun:
    """The work on one decoder block.

    Attributes:
        job: the checked request.
        checkpoint: the float weights of the source model.
        sequential: runs the block on the calibration segments; it has advanced to this block.
            ``None`` without calibration.
        index: number of the block, from 0, which has its float weights.
        allocation: the budget of bits, where the plan has one.
        progress: is told about each solved layer.
        adjust: changes the solved matrices together; ``None`` leaves them as they are.
        couplings: how the outputs of matrices make up for each other, by layer name, see
            `quantine.statistics.output_covariance.OutputCovariance`; others' do not. Outputs are in
            the model's own order, and in that of activations once these have reordered channels.
        compensation: changes the matrices that write to hidden states before they are solved;
            ``None`` leaves them as they are.
    """

    job: Job
    checkpoint: Checkpoint
    sequential: Sequential | None
    index: int
    allocation: Allocation | None
    progress: Progress
    adjust: Adjustment | None = None
    couplings: Mapping[str, Tensor] = field(default_factory=dict)
    compensation: Compensation | None = None
    _maps: dict[str, Tensor] = field(default_factory=dict)
    _weights: dict[str, Tensor] = field(default_factory=dict)
    _hessians: dict[str, Hessian] = field(default_factory=dict)

    def quantize(self) -> BlockResult:
        """Solve the matrices of the block, adjust them together, and pack them.

        Raises:
            SolverError: a matrix cannot be solved; the message names the layer.
            FormatError: a layout cannot hold a result; the message names the layer.
        """
        decisions, floats = self._prepared()
        adjust, sequential = self.adjust, self.sequential
        before: list[Tensor] = []
        if adjust is not None:
            assert sequential is not None, "an adjustment needs calibration inputs"
            before = sequential.outputs(self.index)
        solved: Iterable[Solved] = self._solved(decisions)
        if adjust is not None and sequential is not None:
            solved = self._adjusted(adjust, sequential, list(solved), before)
        tensors, reports = dict(floats), []
        # Without an adjustment each matrix is packed before the next one is solved: only its packed
        # tensors stay in memory.
        for one in solved:
            tensors.update(packed_tensors(one))
            reports.append(one.report())
        return BlockResult(tensors, reports, self._maps)

    def _prepared(self) -> tuple[list[Decision], dict[str, Tensor]]:
        """The decisions about the block's layers, and its float tensors that are not quantized.

        Where the plan quantizes activations, channels are reordered first.
        """
        job, sequential, spec = self.job, self.sequential, self.job.plan.activations
        if spec is None or sequential is None:
            kept = kept_tensors(job, self.checkpoint, job.block_names(self.index))
            return job.block_schemes(self.index), kept
        path = f"{job.family.blocks}.{self.index}"
        block, family = job.model.get_submodule(path), job.family.in_block(self.index)
        heads = Heads.of(job.config, job.family)
        with job.times.stage("reordering"):
            reordering = reorder_block(sequential, self.index, block, family, heads, spec)
            self._move_couplings(reordering, block)
        decisions = []
        for decision in job.block_schemes(self.index):
            layer = decision.layer
            clusters = reordering.input_clusters(layer.name.removeprefix(f"{path}."))
            sizes = (layer.in_features,) if clusters is None else clusters.sizes
            decisions.append(with_clusters(decision, sizes))
        self._maps.update({f"{path}.{kind}": m.cpu() for kind, m in reordering.maps().items()})
        packed = [decision.layer.name for decision in decisions]
        return decisions, float_tensors(block, path, self.checkpoint, packed)

    def _move_couplings(self, reordering: Reordering, block: nn.Module) -> None:
        """Let `couplings` be those of outputs that were turned and then reordered."""
        if not self.couplings:
            return
        turns, orders = reordering.turns_of_outputs(block), reordering.orders_of_outputs(block)
        path, found = f"{self.job.family.blocks}.{self.index}", {}
        for name, coupling in self.couplings.items():
            inside = name.removeprefix(f"{path}.")
            if inside in turns:
                coupling = turned(coupling, turns[inside])
            if inside in orders:
                coupling = reordered(coupling, orders[inside].to(CPU))
            found[name] = coupling
        self.couplings = found

    def _solved(self, decisions: Sequence[Decision]) -> Iterator[Solved]:
        """Solve the matrices group after group; the block computes with each result thereafter.

        Of the matrices whose inputs are observed at once, each rank solves every so many-th.
        """
        with self.job.times.stage("choices"):
            losses = self.job.ranks.of_first(self._choice_losses)
        count = self.job.ranks.count
        for observed in self._observed():
            work = [
                (decision, hessian)
                for layer, hessian in observed
                for decision in decisions
                if self._reads(decision.layer, layer)
            ]
            return_freed_memory(KEPT_FREE)  # of forward passes: solving takes most memory
            for start in range(0, len(work), count):
                for solved in self._solved_together(work[start : start + count], losses):
                    self._install(solved.layer, solved.qtensor)
                    self.progress.layer(solved.report())
                    yield solved

    def _solved_together(
        self,
        work: Sequence[tuple[Decision, Hessian | None]],
        losses: Mapping[str, list[RelativeLoss]],
    ) -> Iterator[Solved]:
        """Solve at most as many matrices as there are ranks, at once, each on one of them."""
        job = self.job
        # The first rank alone knows what is left of a budget.
        owners = [
            0 if decision.by_budget else job.ranks.owner(number)
            for number, (decision, _) in enumerate(work)
        ]
        own = [
            self._solve(decision, hessian, losses) if owner == job.ranks.index else None
            for (decision, hessian), owner in zip(work, owners, strict=True)
        ]
        for (decision, _), owner, found in zip(work, owners, own, strict=True):
            solved, maps = known_to_all(job.ranks, owner, decision, found, job.device)
            self._maps.update(maps)
            yield solved

    def _solve(
        self,
        decision: Decision,
        hessian: Hessian | None,
        losses: Mapping[str, list[RelativeLoss]],
    ) -> tuple[Solved, dict[str, Tensor]]:
        """Solve a matrix; also returns its tensors for pictures."""
        weight, made_up = self._wanted(decision.layer)
        coupling = self.couplings.get(decision.layer.name)
        if hessian is not None and coupling is not None:
            hessian.coupling = coupling.to(self.job.device)
        solved = replace(self._solve_one(decision, weight, hessian, losses), made_up=made_up)
        if self.adjust is not None and hessian is not None:
            self._weights[decision.layer.name] = weight
            self._hessians[decision.layer.name] = hessian
        with self.job.times.stage("pictures"):
            return solved, sensitivity(solved, weight, hessian)

    def _wanted(self, layer: Layer) -> tuple[Tensor, float | None]:
        """The weight to be quantized, and how much of the errors before it that takes off.

        It is the float weight, unless it makes up for such errors.
        """
        weight = layer.read(self.job.model)
        if self.compensation is None or not self.compensation.reaches(layer):
            return weight, None
        assert self.sequential is not None, "there is text"
        with self.job.times.stage("compensation"):
            changed = self.compensation.changed(self.sequential, layer, weight)
        return changed or (weight, 0.0)

    def _solve_one(
        self,
        decision: Decision,
        weight: Tensor,
        hessian: Hessian | None,
        losses: Mapping[str, list[RelativeLoss]],
    ) -> Solved:
        if self.allocation is not None and decision.by_budget:
            return self._solve_in_budget(self.allocation, decision, weight, hessian)
        if decision.choices:
            return solve_choice(decision, weight, hessian, losses, self.job.times)
        return solve(decision, weight, hessian, self.job.times)

    def _solve_in_budget(
        self, allocation: Allocation, decision: Decision, weight: Tensor, hessian: Hessian | None
    ) -> Solved:
        name = decision.layer.name

        def solved_with(number: int, without_outliers: bool) -> Solved:
            scheme = decision.choices[number]
            scheme = scheme.without_outliers() if without_outliers else scheme
            return solve(replace(decision, scheme=scheme), weight, hessian, self.job.times)

        solved, in_vain = allocation.solve(name, solved_with)
        if in_vain:
            self.progress.note(f"{name}: {in_vain} choices exceeded what is left of the budget")
        return solved

    def _adjusted(
        self,
        adjust: Adjustment,
        sequential: Sequential,
        solved: Sequence[Solved],
        before: Sequence[Tensor],
    ) -> list[Solved]:
        """Apply ``adjust``; the block computes with the adjusted matrices from then on."""
        block = SolvedBlock(
            self.index,
            self._module(),
            solved,
            self._weights,
            self._hessians,
            sequential,
            before,
        )
        adjusted = list(adjust(block))
        assert [one.layer for one in adjusted] == [one.layer for one in solved]
        for one in adjusted:
            self._install(one.layer, one.qtensor)
        # What the block computed while it was observed was computed with the matrices before.
        sequential.forget()
        if self.allocation is not None:
            for one, other in zip(solved, adjusted, strict=True):
                if one.decision.by_budget:
                    self.allocation.give_back(one.nbytes - other.nbytes)
        return adjusted

    def _choice_losses(self) -> dict[str, list[RelativeLoss]]:
        """The losses of choices that are compared by outputs of the block, by layer name."""
        job, sequential = self.job, self.sequential
        decisions = [d for d in job.block_schemes(self.index) if d.objective == "output"]
        if sequential is None or not decisions:
            return {}
        inside, groups = f"{job.family.blocks}.{self.index}.", job.family.groups_in(self.index)
        candidates = [
            Candidate(
                d.layer.name,
                d.layer.read(job.model),
                d.choices,
                judged_module(groups, d.layer.name.removeprefix(inside)),
            )
            for d in decisions
        ]
        paths = list(dict.fromkeys(candidate.judged_by for candidate in candidates))
        judged = SubmoduleOutputs(sequential, self.index, self._module(), paths)
        layers = {d.layer.name: d.layer for d in decisions}

        def install(name: str, qtensor: QTensor) -> None:
            layers[name].write(job.model, qtensor.dequantize())

        losses = output_losses(candidates, judged.outputs, install)
        for candidate in candidates:
            layers[candidate.name].write(job.model, candidate.weight)
        return losses

    def _reads(self, layer: Layer, observed: Layer) -> bool:
        """Whether the Hessian that was ``observed`` for one layer is that of ``layer``, too."""
        return layer == observed or (
            layer.group == observed.group and not self.job.plan.loss_weights
        )

    def _observed(self) -> Iterator[list[tuple[Layer, Hessian | None]]]:
        """Observed layers with the Hessians of inputs, in running order; ``None`` for no text.

        If the plan is true-sequential, each list has what is observed at once, only when it is
        asked for, so that the groups before it are already quantized.
        """
        job, sequential, stages = self.job, self.sequential, self.job.block_stages(self.index)
        layers = [layer for stage in stages for layer in stage]
        if sequential is None:
            yield [(layer, None) for layer in layers]
        elif job.plan.float_inputs or not job.plan.true_sequential:
            hessians = sequential.observe(self.index, layers)
            yield list(zip(layers, hessians, strict=True))
        else:
            for stage in stages:
                hessians = sequential.observe_next(self.index, stage)
                yield list(zip(stage, hessians, strict=True))

    def _install(self, layer: Layer, qtensor: QTensor) -> None:
        """Let the block compute with a result, unless the plan wants inputs of the float model."""
        if self.sequential is not None and not self.job.plan.float_inputs:
            layer.write(self.job.model, qtensor.dequantize())

    def _module(self) -> nn.Module:
        return self.job.model.get_submodule(f"{self.job.family.blocks}.{self.index}")


def kept_tensors(job: Job, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Tensor]:
    """Read float tensors that are not quantized, in the dtypes in which the output stores them.

    Args:
        job: the checked request.
        checkpoint: the float weights of the source model.
        names: what the model calls the tensors.
    """
    dtype = job.float_dtype()
    return {name: as_stored(name, job.read(checkpoint, name), dtype) for name in names}
