"""axe-core, which judges a page's accessibility: npm installs it, once, from the registry that it is set to."""

from pathlib import Path
from typing import Any, Final

from tests.support import installing
from tests.support.chromium import Page
from tests.support.tools import missing, tool

VERSION: Final = "4.10.3"
# WCAG 2.2 at levels A and AA, and what axe's authors hold to be good practice.
_TAGS: Final = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


async def findings(page: Page) -> list[Any]:
    """What axe finds wrong with what the page shows now: rule, help, and the elements.

    But for the size of a waterfall's marks: they stand where their time is, and the table below it does the same as
    they do (WCAG 2.2 2.5.8, "Equivalent").
    """
    source = _source().read_text(encoding="utf-8")
    await page.evaluate(f"void (() => {{ {source} }})()")
    found = await page.evaluate(
        f"axe.run(document, {{runOnly: {_TAGS}}}).then((told) => told.violations.map("
        "(each) => [each.id, each.help, each.nodes.map((node) => node.html.slice(0, 200))]))"
    )
    return [one for one in found if one[0] != "target-size" or not all('class="mark"' in html for html in one[2])]


def _source() -> Path:
    tool("npm")
    try:
        home = installing.installed(f"axe-core-{VERSION}", _install)
    except installing.NotInstalledError as problem:
        missing(str(problem))
    return home / "node_modules" / "axe-core" / "axe.min.js"


def _install(home: Path) -> list[str]:
    return [*installing.NPM, f"--prefix={home}", f"axe-core@{VERSION}"]
