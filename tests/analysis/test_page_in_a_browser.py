"""The report of many runs, as a browser shows it."""

import html
import json
import re

import pytest

from gnp import report
from tests.analysis.made_runs import seeds
from tests.browser import LISTEN, browse, needs_browser

# Writes what is seen of the page, with its folded parts open.
LOOK = """<script>
addEventListener("load", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  const box = (e) => e.getBoundingClientRect();
  const seen = {
    said,
    width: document.documentElement.scrollWidth,
    window: document.documentElement.clientWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    figures: [...document.querySelectorAll("figure")].map((e) => [
      box(e.querySelector("svg")).width,
      box(e.querySelector("svg")).height,
      box(e.querySelector("svg")).top - box(e.querySelector("figcaption")).bottom,
      getComputedStyle(e.querySelector("svg text") ?? e).color,
    ]),
    cells: [...document.querySelectorAll("td, th")].map((e) => box(e).width),
    links: [...document.querySelectorAll("a")].map((e) => e.getAttribute("href")),
  };
  const outcome = document.createElement("pre");
  outcome.id = "outcome";
  outcome.textContent = JSON.stringify(seen);
  document.body.append(outcome);
});
</script>"""
DARK = "--blink-settings=preferredColorScheme=0"


@needs_browser
@pytest.mark.slow
def test_in_a_browser(tmp_path):
    recipe = {"data__name": "cifar10", "lr__warmup": "2ep", "weight_decay__kind": "decoupled"}
    for policy, error in {"off": 0.2, "none": 0.21, "zero": 0.18}.items():
        errors = [error, error + 0.02, error + 0.01]
        seeds(tmp_path / "runs" / policy, errors, gr__policy=policy, **recipe)
    page = report.write_comparison([tmp_path / "runs"], tmp_path / "report")
    text = page.read_text()
    opened = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    assert opened != text
    acted = tmp_path / "acted.html"
    acted.write_text(
        opened.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{LOOK}</body>")
    )

    def look(*flags):
        dumped = browse(acted, "--dump-dom", *flags)
        (outcome,) = re.findall(r'<pre id="outcome">(.*?)</pre>', dumped, re.DOTALL)
        return json.loads(html.unescape(outcome))

    wide, narrow, dark = look(), look("--window-size=500,900"), look(DARK)
    for seen in (wide, narrow, dark):
        assert seen["said"] == []
        assert seen["width"] <= seen["window"]  # nothing sticks out
        assert len(seen["figures"]) > 3 and min(seen["cells"]) > 0
        for width, height, gap, _ in seen["figures"]:
            assert width > 200 and height > 80
            assert 0 <= gap < 30  # a figure stands under its caption
    assert narrow["window"] == 500 and wide["window"] == 1200
    assert (wide["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(21, 24, 28)")
    assert all((tmp_path / "report" / link).is_file() for link in wide["links"])
    browse(page, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,3000")
    browse(page, f"--screenshot={tmp_path / 'dark.png'}", "--window-size=500,3000", DARK)
