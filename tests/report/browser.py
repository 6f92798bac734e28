"""Headless Chromium: what a page measures and says when it is really shown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any, Final

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
PROBE: Final = """
<script>
window.problems = [];
const keep = e => window.problems.push(String(e.message || e.target.src));
window.addEventListener("error", keep, true);
window.addEventListener("load", () => {
  const root = document.documentElement;
  const found = {
    width: window.innerWidth,
    overflow: root.scrollWidth - window.innerWidth,
    problems: window.problems,
    resources: performance.getEntriesByType("resource").map(r => r.name),
    headings: [...document.querySelectorAll("h2")].map(h => h.textContent),
    text: document.body.innerText,
    pictures: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width),
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    strokes: [...document.querySelectorAll("svg path")].map(p => getComputedStyle(p).stroke),
  };
  const out = document.createElement("script");
  out.type = "application/json";
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


def browser() -> str | None:
    """Path of the browser, ``None`` where there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def shown(page: Path, width: int, scratch: Path, *, dark: bool = False) -> dict[str, Any]:
    """Open a copy of ``page`` that measures itself in a window ``width`` pixels wide.

    Chromium's window is no narrower than 500 pixels, so the page is shown in a frame.
    """
    scratch.mkdir(exist_ok=True)
    inner = page.read_text(encoding="utf-8").replace("<head>", f"<head>{PROBE}", 1)
    (scratch / "page.html").write_text(inner, encoding="utf-8")
    style = f"width:{width}px;height:900px;border:0"
    frame = (
        "<!DOCTYPE html><body style='margin:0'>"
        f"<iframe id='frame' src='page.html' style='{style}'></iframe>"
        "<script>window.addEventListener('load', () => { document.body.append(document.importNode("
        "document.getElementById('frame').contentDocument.getElementById('found'), true)); });"
        "</script></body>"
    )
    (scratch / "frame.html").write_text(frame)
    command = [
        str(browser()),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        f"--user-data-dir={scratch / 'profile'}",
        f"--window-size={max(width, 800)},1000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        "--dump-dom",
        f"file://{scratch / 'frame.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'id="found">(.*?)</script>', done.stdout, re.DOTALL)
    assert match, done.stdout[-500:]
    found: dict[str, Any] = json.loads(unescape(match[1]))
    found["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return found
