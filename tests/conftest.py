"""Fixtures shared by all tests: tiny models and their quantized versions, made once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

# Before anything imports Triton: its programs run in an interpreter, which needs no GPU. `make gpu`
# sets the variable to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Before anything imports PyTorch, and for the processes that tests start: several share the
# machine, and what is tested is small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

from quantine import Calibration, Plan, quantize
from quantine.calibrate.text import read_text
from tiny_models import FAMILIES, build, matrices_of, mixed_rules, tiny_config

SENTENCES = 400
PROSE = 20_000
"""Characters."""

# The verdict on a commit must not depend on luck: its examples are the same in every run.
# `--hypothesis-profile=random` draws others. How long an example takes says nothing on a machine
# that does other things, too.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
# For processors that a program imitates.
settings.register_profile(
    "emulated",
    deadline=None,
    derandomize=True,
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin: at the end, one process would wait for the other's."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _swift_interpreter() -> Iterator[None]:
    """Spare Triton's interpreter two things that it does for each call; `make explore` does not.

    It wraps integers as a GPU does without a look at each: a sum that should not have wrapped makes
    another result than the reference's. And it prepares its language anew for each function that a
    program calls, half of its time: once for each module that has such functions is enough, as it
    never takes those preparations back.
    """
    if find_spec("triton") is None or settings.get_current_profile_name() == "random":
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    interpreter_builder.options = options
    prepare_and_call = InterpretedFunction.__call__
    prepared = set()

    def call(function: InterpretedFunction, *args: object, **named: object) -> object:
        module = function.fn.__module__
        if module not in prepared:
            prepared.add(module)
            return prepare_and_call(function, *args, **named)
        return function.rewrite()(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_alone() -> None:
    """Tiny matrices are fastest on one thread, and several processes share the machine."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny float model by its name in `FAMILIES`, built at first use."""
    root = tmp_path_factory.mktemp("models")

    def directory(name: str) -> Path:
        path = root / name
        return path if path.exists() else build(tiny_config(name), path)

    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some ten thousand bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"Line {n}: {n * n % 97} apples and {n * 7 % 13} pears.\n" for n in range(SENTENCES)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the built-in text, all of which takes a second to tokenize by bytes."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(read_text("builtin", "calibration")[:PROSE], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def short(text_file: Path) -> Calibration:
    """A calibration that takes a moment on a tiny model."""
    return Calibration(str(text_file), samples=4, seqlen=32)


@pytest.fixture(scope="session")
def packed(
    tiny: Callable[[str], Path], short: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A quantized tiny model by name and kind, made at first use.

    Kinds: ``gptq`` (3 bit), ``rtn`` (4 bit), a scheme such as ``W4A8``, and ``mixed`` (every matrix
    another width and grid, some with a stored input order). All compute in exact arithmetic.
    """
    root = tmp_path_factory.mktemp("packed")

    def plan(name: str, kind: str) -> Plan:
        if kind == "gptq":
            return Plan.preset("gptq", bits=3, group_size=32, arithmetic="exact")
        if kind.startswith("W"):
            return Plan.scheme(kind, arithmetic="exact")
        if kind == "rtn":
            return Plan.preset("rtn", bits=4, group_size=32, arithmetic="exact")
        rules = mixed_rules(matrices_of(tiny(name)), groups="refit", clip="minmax")
        return Plan.from_dict({"rules": rules, "arithmetic": "exact"})

    def directory(name: str, kind: str) -> Path:
        assert name in FAMILIES
        path = root / f"{name}-{kind}"
        if not path.exists():
            calibration = Calibration(samples=0) if kind == "rtn" else short
            quantize(tiny(name), path, plan(name, kind), calibration)
        return path

    return directory
