"""The verdicts on many architectures, each found in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, Final

from quantine.errors import PlanError
from quantine.families import is_described
from quantine.survey.verdict import Verdict, examine

SECONDS: Final = 300
"""Longest time that one class may take, of which a small model needs a few seconds."""
MEMORY: Final = 16 * 2**30
"""Bytes of address space that a process may take for one class."""
PRELOADED: Final = ("quantine.survey.verdict", "transformers.modeling_utils", "quantine.runtime.hf")
"""Modules that the process is forked with, where processes are forked."""


def causal_classes() -> dict[str, str]:
    """All causal language models of the installed transformers: a model type by name of the class.

    Of the model types of a class, one that is described counts, or else the first.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: dict[str, str] = {}
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if class_name not in found or is_described(model_type):
            found[class_name] = model_type
    return dict(sorted(found.items()))


def chosen_classes(names: Iterable[str]) -> dict[str, str]:
    """Those of `causal_classes` whose class or model type is in ``names``; all if that is empty.

    Raises:
        PlanError: there is no such class.
    """
    every, names = causal_classes(), list(names)
    for name in names:
        if name not in every and name not in every.values():
            raise PlanError(f"transformers has no causal language model {name!r}")
    return {
        class_name: model_type
        for class_name, model_type in every.items()
        if not names or class_name in names or model_type in names
    }


def survey(classes: Mapping[str, str]) -> Iterator[Verdict]:
    """The verdicts on ``classes``, in their order, each as soon as it is found.

    Args:
        classes: a model type by name of the class.
    """
    ways = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if "forkserver" in ways:
        context.set_forkserver_preload(list(PRELOADED))
    for class_name, model_type in classes.items():
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_examine, args=(theirs, class_name, model_type))
        process.start()
        theirs.close()
        try:
            yield _received(ours, class_name)
        finally:
            process.kill()
            process.join()
            ours.close()


def _received(pipe: Connection, class_name: str) -> Verdict:
    try:
        if pipe.poll(SECONDS):
            verdict: Verdict = pipe.recv()
            return verdict
        return Verdict(class_name, reason=f"it takes more than {SECONDS} seconds")
    except EOFError:
        return Verdict(class_name, reason="its process ended without a result")


def _examine(pipe: Connection, class_name: str, model_type: str) -> None:
    """What the process of one class does."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send(examine(class_name, model_type))
