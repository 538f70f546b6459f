"""A real browser: pages in frames as wide as a phone and a desktop, and what is in them then."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Of a phone and a desktop; a headless window is never narrower than 500, but frames are.
WIDTHS = [390, 1280]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

_FRAMES = """<!doctype html><body><script>
const seen = [];
const asked = PAGES.flatMap((page) => WIDTHS.map((width) => [page, width]));
const next = () => {
  if (!asked.length) {
    document.body.innerHTML = "<pre id=seen></pre>";
    document.getElementById("seen").textContent = JSON.stringify(seen);
    return;
  }
  const [page, width] = asked.shift();
  const frame = document.createElement("iframe");
  Object.assign(frame.style, { width: width + "px", height: "800px", border: 0 });
  frame.onload = () => setTimeout(() => {
    const inside = frame.contentWindow;
    const root = inside.document.documentElement;
    seen.push({
      page,
      width: inside.innerWidth,
      taken: Math.max(root.scrollWidth, root.clientWidth),
      images: [...inside.document.images].map((image) => image.naturalWidth),
      probe: inside.document.getElementById("probe")?.textContent,
    });
    frame.remove();
    next();
  }, WAIT);
  frame.src = page;
  document.body.append(frame);
};
next();
</script>"""


def seen(folder: Path, pages: list[str], wait: int = 0) -> tuple[list[dict[str, Any]], str]:
    """What a browser sees of pages in a folder, in each of WIDTHS, and its log.

    Args:
        folder: it gets pages of ours, too.
        wait: milliseconds between the load of a page and the look at it.
    """
    wide = "<!doctype html><div style='width: 1500px'>wide</div>"
    (folder / "too-wide.html").write_text(wide, encoding="utf-8")
    text = _FRAMES.replace("PAGES", json.dumps([*pages, "too-wide.html"]))
    text = text.replace("WIDTHS", json.dumps(WIDTHS)).replace("WAIT", str(wait))
    (folder / "frames.html").write_text(text, encoding="utf-8")
    with _served(folder) as address:
        done = subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                *(["--no-sandbox"] if os.geteuid() == 0 else []),
                "--disable-gpu",
                "--enable-unsafe-swiftshader",
                "--use-angle=swiftshader",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--window-size=1400,900",
                f"--user-data-dir={folder / 'profile'}",
                "--virtual-time-budget=60000",
                "--enable-logging=stderr",
                "--dump-dom",
                f"{address}/frames.html",
            ],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
    *rows, phone, desktop = json.loads(found[1])
    assert [row["width"] for row in (*rows, phone, desktop)] == WIDTHS * (len(pages) + 1)
    assert phone["taken"] > phone["width"]  # the measure sees a page that is too wide
    assert desktop["taken"] > desktop["width"]
    return rows, done.stderr


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """A folder on the loopback network."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
