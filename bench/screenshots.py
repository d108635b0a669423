"""The pictures of the page that evaluate.py rollout writes, as docs/ shows them, by headless Chromium.

    python bench/screenshots.py
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "class" / "pages"
# picture: page, token to choose, what to colour by
PICTURES = {"rollout.png": ("hacked.html", 1, "advantage")}


def take(browser, page: Path, token: int, quantity: str, picture: Path) -> None:
    """What a reader sees on a small laptop."""
    opened = browser.new_page(viewport={"width": 1180, "height": 640})
    opened.goto(page.as_uri())
    opened.select_option("#quantity", quantity)
    opened.locator("#tokens button").nth(token).click()
    opened.mouse.move(0, 0)
    opened.screenshot(path=picture)
    opened.close()


def main() -> None:
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("screenshots.py: there is no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (page, token, quantity) in PICTURES.items():
            take(browser, PAGES / page, token, quantity, PAGES.parent / name)
            print(f"written: {PAGES.parent / name}")


if __name__ == "__main__":
    main()
