"""The stages of a run: each part of the output that is missing is made and committed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Final

from quantine.budget.allocation import Allocation
from quantine.budget.probe import Budgeted, Options, probe
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.compensation import Compensation
from quantine.calibrate.loss_weights import loss_weights
from quantine.calibrate.sequential import Sequential
from quantine.calibrate.setup import CalibrationSetup
from quantine.core.device import CPU
from quantine.core.process_memory import return_freed_memory
from quantine.families.layers import block_list
from quantine.plan.decision import Decision
from quantine.ranks.ranks import ALONE
from quantine.run.block import Adjustment, BlockRun, kept_tensors
from quantine.run.block_costs import BlockCosts
from quantine.run.estimate import Estimate
from quantine.run.job import Job
from quantine.run.layer import packed_tensors, solve, unpack
from quantine.run.progress import Progress
from quantine.run.rank_checks import check_same_weights
from quantine.run.restored import restore_quantized
from quantine.run.store import RunStore
from quantine.run.used_source import SOURCE
from quantine.source.checkpoint import Checkpoint

PROBE: Final = "probe"
"""Name under which a run stores the table of `quantine.budget.probe.probe`."""


@dataclass(frozen=True)
class Stages:
    """What makes the parts of an output directory.

    Attributes:
        job: the checked request.
        store: gets the parts; it is open.
        checkpoint: the float weights of the source, which records what is read.
        size: says where hidden states are.
        progress: is told about layers and blocks.
        adjust: changes the solved matrices of each block together; ``None`` leaves them as they
            are.
    """

    job: Job
    store: RunStore
    checkpoint: Checkpoint
    size: Estimate
    progress: Progress
    adjust: Adjustment | None = None

    def all_committed(self) -> list[str]:
        """Commit every part of the output that is missing; returns all parts in file order.

        Ranks work together; the first one writes.
        """
        outside = self.job.ranks.of_first(self.stage_outside)
        count = len(block_list(self.job.model, self.job.family))
        blocks = [f"block-{index:05}" for index in range(count)]
        missing = self.job.ranks.of_first(lambda: self._missing(blocks))
        self.progress.start(count, count - len(missing))
        if missing:
            self._stage_blocks(blocks, missing)
        return [*outside, *blocks]

    def stage_outside(self) -> list[str]:
        """Commit what is outside of blocks and missing; returns the parts in file order."""
        loose = self._stage_loose()
        return [*self._stage_tables(), *loose]

    def _missing(self, blocks: list[str]) -> list[int]:
        """Numbers of the blocks that no earlier process committed."""
        return [i for i, part in enumerate(blocks) if not self.store.is_committed(part)]

    def _stage_blocks(self, parts: list[str], missing: list[int]) -> None:
        """Quantize and commit the ``missing`` blocks."""
        job, setup, costs = self.job, self.setup(), BlockCosts(self.store)
        with BlockLoader(job.model, job.family, self.checkpoint, job.device) as loader:
            setup = None if setup is None else self.weighted(setup, loader)
            allocation = None if setup is None else self._allocation(setup, loader)
            self._spend(allocation, [part for part in parts if self.store.is_committed(part)])
            sequential = None if setup is None else self._entered(setup, missing[0])
            compensation = None
            if setup is not None and job.plan.compensate:
                compensation = Compensation(setup, missing[0])
                self._note_lost("the float model's hidden states", compensation.lost, missing[0])
            # Calibration also runs through finished blocks that hidden states have not passed.
            passes = [one.block for one in (sequential, compensation) if one is not None]
            indices = range(min(passes), len(parts)) if passes else missing
            for index, then in zip_longest(indices, indices[1:]):
                costs.begin()
                with job.times.stage("reading"):
                    loader.load(index, then if self.size.residence.reads_ahead else None)
                if compensation is not None:
                    compensation.advance(index)
                if index in missing:
                    self.stage_block(parts[index], index, sequential, allocation, compensation)
                else:
                    self._restore(index, parts[index])
                if sequential is not None:
                    sequential.advance(index)
                loader.release(index)
                return_freed_memory()
                if index not in missing:
                    continue
                if job.ranks.first:
                    costs.end(index)
                self.progress.block(index)
        job.ranks.meet()  # hidden states may be those of other ranks
        if job.ranks.first:
            self.store.drop_states()

    def _entered(self, setup: CalibrationSetup, done: int) -> Sequential:
        """The calibration segments, as far as an earlier process brought them."""
        sequential = Sequential(setup, done)
        self._note_lost("the hidden states", sequential.lost, done)
        return sequential

    def _note_lost(self, what: str, lost: str | None, done: int) -> None:
        """Say that the hidden states of an earlier process are ``lost``, and why, if they are."""
        if lost is not None:
            self.progress.note(
                f"{what} of the unfinished run {lost}: they are computed again, through the {done} "
                "blocks that are finished"
            )

    def stage_block(
        self,
        part: str,
        index: int,
        sequential: Sequential | None,
        allocation: Allocation | None = None,
        compensation: Compensation | None = None,
    ) -> None:
        """Quantize and commit a block whose weights are loaded."""
        assert self.checkpoint.record is not None
        check_same_weights(self.job, self.checkpoint.record, index)
        run = BlockRun(
            self.job,
            self.checkpoint,
            sequential,
            index,
            allocation,
            self.progress,
            self.adjust,
            self.store.couplings(index),
            compensation,
        )
        result = run.quantize()
        if self.job.ranks.first:
            with self.job.times.stage("writing"):
                self._remember_source()
                self.store.commit(part, result.tensors, result.reports, result.maps)
        # Before hidden states pass a block, it is committed.
        self.job.ranks.meet()

    def _restore(self, index: int, part: str) -> None:
        """Give a block that an earlier process committed its quantized weights."""
        reports = self.store.layer_reports([part])
        restore_quantized(self.job, self.store.tensors(part), index, reports)

    def _remember_source(self) -> None:
        """Store what has been read, before anything is stored that was made of it."""
        assert self.checkpoint.record is not None
        self.store.remember(SOURCE, self.checkpoint.record.as_plain())

    def _spend(self, allocation: Allocation | None, committed: list[str]) -> None:
        """Subtract from the budget, if there is one, what the layers of finished blocks took."""
        if allocation is not None:
            for report in self.store.layer_reports(committed):
                allocation.spend(report["name"], report["bytes"])

    def _stage_loose(self) -> list[str]:
        """Commit each float tensor outside of blocks as a part; returns the names of the parts."""
        parts = self.job.loose_names()
        for name in parts:
            if not self.store.is_committed(name):
                with self.job.times.stage("writing"):
                    tensors = kept_tensors(self.job, self.checkpoint, [name])
                    self._remember_source()
                    self.store.commit(name, tensors, [])
        return parts

    def _stage_tables(self) -> list[str]:
        """Quantize and commit embedding and head, where the plan says so; returns their names."""
        outside = [d for d in self.job.scheme_layers() if d.layer.role != "block"]
        for decision in outside:
            layer = decision.layer
            if not self.store.is_committed(layer.name):
                weight, times = self.job.float_weight(self.checkpoint, layer), self.job.times
                solved = solve(decision, weight, None, times)
                with times.stage("writing"):
                    self._remember_source()
                    self.store.commit(layer.name, packed_tensors(solved), [solved.report()])
        return [decision.layer.name for decision in outside]

    def setup(self) -> CalibrationSetup | None:
        """The calibration segments and the model they run through; ``None`` without calibration.

        If the embedding is quantized, segments are embedded with its quantized table.
        """
        job = self.job
        if job.segments is None:
            return None
        replaced = {}
        for decision in job.scheme_layers():
            if decision.layer.role == "embedding" and not job.plan.float_inputs:
                packed = self.store.tensors(decision.layer.name)
                packed = {name: tensor.to(job.device) for name, tensor in packed.items()}
                # A device would hold the table during the whole run.
                table = unpack(decision, packed).dequantize().cpu()
                replaced[decision.layer.stored_name] = table
        residence = self.size.residence
        kept_on = CPU if residence.hidden == "memory" else None
        saved = self.store.states
        return job.calibration_setup(
            self.checkpoint,
            saved if self.size.spills else None,
            saved,
            replaced,
            residence.resumes,
            kept_on,
            residence.batch_tokens,
        )

    def weighted(self, setup: CalibrationSetup, loader: BlockLoader) -> CalibrationSetup:
        """``setup`` with the weights of tokens if the plan asks for them; found once per run."""
        if not self.job.plan.loss_weights:
            return setup
        job, store = self.job, self.store
        found = store.token_weights()
        if found is None:
            layers = [d.layer for d in job.scheme_layers() if d.layer.role == "block"]
            read, scratch = partial(job.read, self.checkpoint), store.scratch / "gradients"
            timed = replace(setup, times=job.times.part("loss weights"))
            seed, note = job.calibration.seed, self.progress.note
            keep = store.keep_couplings
            found = loss_weights(timed, loader, layers, read, scratch, seed, note, keep)
            shutil.rmtree(scratch)
            self._remember_source()
            store.keep_token_weights(found)
        return replace(setup, token_weights=found)

    def _allocation(self, setup: CalibrationSetup, loader: BlockLoader) -> Allocation | None:
        """The budget of bits, for plans that have one; it is probed once per run, see `PROBE`."""
        job, plan = self.job, self.job.plan
        if plan.bits_per_weight is None:
            return None
        decisions = [d for d in job.scheme_layers() if d.by_budget]
        table = job.ranks.of_first(lambda: self._probed(setup, loader, decisions))
        weights = sum(decision.layer.weights for decision in decisions)
        return Allocation(plan.name, plan.bits_per_weight, weights, table)

    def _probed(
        self, setup: CalibrationSetup, loader: BlockLoader, decisions: list[Decision]
    ) -> dict[str, Options]:
        """The table of the budget, which one rank makes, by itself."""
        job = self.job
        table: dict[str, Options] | None = self.store.recall(PROBE)
        if table is None:
            read = partial(job.read, self.checkpoint)
            budgeted = [Budgeted(d.layer, d.choices) for d in decisions]
            scratch, seed = self.store.scratch / "probe", job.calibration.seed
            note = self.progress.note
            alone = replace(setup, shards=1, ranks=ALONE, times=job.times.part("budget"))
            table = probe(alone, loader, budgeted, job.observed, read, scratch, seed, note)
            self._remember_source()
            self.store.remember(PROBE, table)
        return table
