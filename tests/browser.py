"""A page in a headless Chromium, where there is one."""

import pathlib
import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)

# Runs before the page's own scripts.
LISTEN = """<script>
const said = [];
window.onerror = (...what) => said.push(String(what));
for (const level of ["error", "warn"]) console[level] = (...what) => said.push(what.join(" "));
document.addEventListener("securitypolicyviolation", (e) => said.push("blocked " + e.blockedURI));
</script>"""


def browse(page: pathlib.Path, *flags: str) -> str:
    """What a headless browser prints of a page once its scripts have run for a while."""
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", "--hide-scrollbars", "--window-size=1200,900"),
        *(f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=20000"),
    ]
    done = subprocess.run([*command, *flags, page.as_uri()], capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode()
