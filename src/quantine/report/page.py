"""The HTML page about a quantized directory: one file that needs no other."""

from __future__ import annotations

from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from quantine.errors import PlanError, QuantineError
from quantine.formats.directory import encoded
from quantine.formats.shards import write_atomically
from quantine.report.facts import Facts
from quantine.report.sections import SECTIONS

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5c6670; --back: #ffffff;
  --card: #f3f5f7; --line: #dde1e5; --good: #1a7f4b; --bad: #b3261e;
  --strong: #1b3a6b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a0aab4; --back: #14181c;
  --card: #1f252b; --line: #353d45; --good: #58c48b; --bad: #ff8a80;
  --strong: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 60rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
h4 { margin: 0; color: var(--soft); font-size: .85rem; font-weight: 600; }
p { margin: .5rem 0; }
.soft, .cards span { color: var(--soft); }
.verdict { font-size: 1.5rem; font-weight: 700; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; }
.cards div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.cards b { display: block; font-size: 1.4rem; }
.cards span { font-size: .85rem; line-height: 1.3; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
td:first-child { min-width: 8.5rem; overflow-wrap: anywhere; }
td:not(:first-child) { white-space: nowrap; }
.hashes td:not(:first-child) { white-space: normal; overflow-wrap: anywhere; }
figure { margin: .8rem 0; }
svg { width: 100%; max-width: 44rem; height: auto; color: var(--ink); }
@media (max-width: 40rem) { figure { overflow-x: auto; } svg { min-width: 36rem; } }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
  gap: .7rem; }
.pair div { background: var(--card); border-radius: .5rem; padding: .6rem .9rem; }
.pair p, .prompt { white-space: pre-wrap; font-size: .9rem; }
.prompt { color: var(--soft); }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; font-size: .8rem;
  overflow-x: auto; overflow-wrap: normal; }
"""


def page(facts: Facts) -> str:
    """The HTML of the page about ``facts``; sections that have nothing to say are left out."""
    parts = []
    for title, section in SECTIONS:
        content = section(facts)
        if content:
            parts.append(f"<section><h2>{escape(title)}</h2>{content}</section>")
    report = facts.report
    title = f"{Path(report['model']).name}, quantized"
    about = f"plan {report['plan']['name']}, quantine {report['versions']['quantine']}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(about)}</p></header>'
        f"<main>{''.join(parts)}</main></body></html>\n"
    )


def write_page(facts: Facts, path: Path) -> None:
    """Write the page about ``facts`` to ``path``, whole or not at all.

    Raises:
        QuantineError: matplotlib is missing.
        PlanError: the file cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise QuantineError("the page needs matplotlib: pip install 'quantine[plot]'")
    try:
        write_atomically(path, encoded(page(facts)))
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error}") from error
