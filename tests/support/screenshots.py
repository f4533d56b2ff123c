"""``python tests/support/screenshots.py [FOLDER]``: the playground's pictures for the documentation, from a real run.

Needs the extra ``ui``, selenium and Chromium (``make chromium``). FOLDER is docs/figures by default.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.integration.conftest import start_service  # noqa: E402
from tests.support.browser import Browser, open_browser  # noqa: E402
from tests.support.playground import explain_generated, guide, predict  # noqa: E402

PROMPT = "How do bees make honey?"
LARGEST = 200_000  # bytes of one picture


def picture(page: Browser, path: Path) -> Path:
    """A screenshot with few colours, which the page has anyway."""
    from PIL import Image

    with Image.open(page.screenshot(path)) as image:
        image.convert("RGB").quantize(96).save(path, optimize=True)
    return path


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        service = start_service(Path(scratch), "--ui")
        try:
            with open_browser() as page:
                page.open(f"{service.url}/ui/")
                predict(page, PROMPT)
                made = [picture(page, folder / "playground_predict.png")]
                explain_generated(page, PROMPT, 96)
                made.append(picture(page, folder / "playground_explain.png"))
                guide(page, PROMPT, target=64, limit=160)
                made.append(picture(page, folder / "playground_guide.png"))
        finally:
            service.process.kill()
            service.process.wait()
    for path in made:
        print(f"{path} {path.stat().st_size:,} bytes")
    return int(any(path.stat().st_size > LARGEST for path in made))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "figures"))
