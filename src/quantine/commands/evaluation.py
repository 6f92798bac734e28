"""The verb `eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantine.commands.arguments import (
    DTYPES,
    MODEL_HELP,
    TEXT_FILES_HELP,
    add_bos,
    add_device,
    add_verb,
    comma_list,
)
from quantine.commands.json_output import check_writable, json_numbers, write_json_output

if TYPE_CHECKING:
    from quantine.eval.tasks import TaskRequest
    from quantine.ranks.ranks import Ranks


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "eval",
        _run,
        "Perplexity and task scores of a model, float or quantized, and its closeness to another.",
        "  quantine eval demo --window 1024 --limit 8\n"
        "  quantine eval out --text wiki.test.txt --json out.json\n"
        "  quantine eval out --reference demo --record\n"
        "  quantine eval out --reference ./Llama-3.2-1B --text wikitext2,ptb,c4 --limit 256\n"
        "  quantine eval out --reference demo --tasks piqa,winogrande --task-limit 200",
    )
    parser.add_argument("model", metavar="MODEL|OUT", help=MODEL_HELP)
    add_texts(parser)
    add_tasks(parser)
    add_bos(parser, "windows and questions")
    add_device(parser)
    parser.add_argument("--reference", metavar="MODEL", help="also closeness to this model")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the reference's predictions here, so that it runs once for many models",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="keep the numbers in OUT, for its model card and page, with samples of both models",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Add the options that say on which texts a model is scored."""
    parser.add_argument(
        "--text",
        type=comma_list,
        default=["builtin"],
        metavar="NAME|FILE,...",
        help="builtin (its held-out part), wikitext2, ptb, c4, ptb-validation, pile-val, or "
        f"{TEXT_FILES_HELP}; default builtin",
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens per window; default 2048")
    parser.add_argument("--limit", type=int, metavar="N", help="windows of each text at most")


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which questions are asked."""
    parser.add_argument(
        "--tasks",
        type=comma_list,
        metavar="NAME,...",
        help="also tasks of lm-eval, such as winogrande,piqa,hellaswag,arc_easy,arc_challenge,"
        "lambada_openai,openbookqa,boolq,mmlu,gsm8k,humaneval",
    )
    parser.add_argument(
        "--task-limit", type=int, metavar="N", help="questions of each task at most"
    )
    parser.add_argument(
        "--task-path", type=Path, metavar="DIR", help="further task definitions for lm-eval"
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="allow tasks that run programs which the model wrote, such as humaneval; they have "
        "limits of time and memory, but no sandbox",
    )


def tasks_of(arguments: argparse.Namespace) -> TaskRequest | None:
    """The request for tasks in the options of `add_tasks`; ``None`` if they ask for none."""
    from quantine.eval.tasks import TaskRequest

    if not arguments.tasks:
        return None
    return TaskRequest(
        tuple(arguments.tasks), arguments.task_limit, arguments.task_path, arguments.run_code
    )


def _run(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    if arguments.record:
        from quantine.report.record import check_recordable

        check_recordable(Path(arguments.model))
    from quantine.ranks.start import started

    with started(arguments.device) as (ranks, arguments.device):
        _evaluate(arguments, ranks)


def _evaluate(arguments: argparse.Namespace, ranks: Ranks) -> None:
    import torch

    from quantine.eval.evaluate import evaluate
    from quantine.report.tables.console import make_console
    from quantine.report.tables.scores import print_scores, window_line

    console = make_console(arguments.quiet or not ranks.first)
    live = console.is_terminal

    def on_window(text: str, done: int, count: int, perplexity: float) -> None:
        if live or done == count or done % 8 == 0:
            line = window_line(text, done, count, perplexity)
            console.print(line, end="\r" if live else "\n")

    scores = evaluate(
        arguments.model,
        arguments.text,
        window=arguments.window,
        limit=arguments.limit,
        reference=arguments.reference,
        cache=arguments.cache,
        dtype=getattr(torch, arguments.dtype),
        tasks=tasks_of(arguments),
        bos=arguments.bos,
        device=arguments.device,
        on_window=on_window,
        ranks=ranks,
    )
    if not ranks.first:
        return
    print_scores(scores, console)
    write_json_output(arguments.json, scores)
    if arguments.record:
        _record(arguments, scores)


def _record(arguments: argparse.Namespace, scores: dict[str, Any]) -> None:
    import torch

    from quantine.eval.samples import decode_samples
    from quantine.report.record import record
    from quantine.runtime.load import load_model
    from quantine.source.locate import locate

    source = locate(arguments.model)
    samples = []
    if arguments.reference is not None:
        model = load_model(source, torch.float32)
        reference = load_model(locate(arguments.reference), torch.float32)
        samples = decode_samples(model, reference, source.tokenizer())
    record(source.directory, json_numbers(scores), samples, source.file_digests())
