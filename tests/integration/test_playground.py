"""The playground in headless Chromium, on a real ``lenvm serve --ui``."""

from __future__ import annotations

import base64
import importlib.util
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from lenvm_service.keys import new_key
from tests.integration.conftest import ServiceProcess, start_service
from tests.support.browser import Browser, find_chromium, open_browser
from tests.support.playground import explain_generated, explain_pasted, guide, predict

PROMPT = "How do bees make honey?"
SHORT = "What is the capital of France?"
HOSTILE = "<b>bold</b> ${6*7} {{6*7}} `tick` <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chromium(real_parts_required: bool) -> None:
    """What these tests need beside the service; where real parts are required, a missing one is a failure."""
    missing = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
    if find_chromium() is None:
        missing.append("chromium")
    if missing and not real_parts_required:
        pytest.skip(f"{', '.join(missing)} not installed: run make install chromium")
    assert not missing


@pytest.fixture(scope="module")
def playground(
    chromium: None, real_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    running = start_service(tmp_path_factory.mktemp("playground"), "--ui")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def page(playground: ServiceProcess) -> Iterator[Browser]:
    """The open page. Whatever the test did: the console is silent, and nothing came from elsewhere."""
    with open_browser() as browser:
        browser.open(f"{playground.url}/ui")
        yield browser
        assert browser.complaints() == []
        assert browser.hosts() == {playground.url.removeprefix("http://")}


def test_predict(page: Browser) -> None:
    said = predict(page, PROMPT)
    for name in ("mean", "p50", "p90", "p95", "horizon"):
        assert name in said
    assert "smollm2-135m-instruct at temperature 0.7" in said
    assert len(page.driver.find_elements("css selector", "#predict-out svg rect")) == 60
    page.type("#predict-prompt textarea", " ")
    page.click("#predict-run")
    assert "the prompt is empty" in page.text("#predict-out [role=alert]")


def test_explain(page: Browser) -> None:
    tokens = explain_pasted(page, PROMPT, f"From nectar. {HOSTILE}")
    shown = "".join(token for _, token, _ in tokens)
    assert shown == f"From nectar. {HOSTILE}■"  # as text, whatever it looks like
    assert tokens[0][0] == "237"  # the README's numbers
    assert "length shift −0.0094" in tokens[0][2]
    assert tokens[-1][2].startswith("end of the answer")
    assert page.driver.find_elements("css selector", "#explain-out img") == []
    page.click("#explain-out summary")
    assert "length shift" in page.text("#explain-out details table")

    generated = explain_generated(page, PROMPT, 32)
    text = page.find("#explain-completion textarea").get_attribute("value")
    assert text
    assert "".join(token for _, token, _ in generated).replace("⏎", "\n").rstrip("■") == text
    assert 8 <= len(generated) <= 33


def test_guide(page: Browser, playground: ServiceProcess) -> None:
    guided, unguided = guide(page, SHORT, target=24, limit=48)
    assert [guided[0], unguided[0]] == ["guided", "unguided"]
    assert unguided[3] == "0.00"
    assert float(guided[3]) > 0.5
    assert float(guided[2]) > float(unguided[2])
    assert abs(int(guided[1]) - 24) < abs(int(unguided[1]) - 24)
    assert len(page.driver.find_elements("css selector", "#guide-out .lv-tokens")) == 2

    hard, same = guide(page, SHORT, target=24, limit=48, method="paper, in lengths")
    assert same == unguided  # the same seed
    assert hard[3] != "0.00"

    page.choose("#guide-kind", "tilt")
    page.find("#guide-beta")
    page.choose("#guide-method", "posterior")
    page.find("#guide-tilt")
    page.until(lambda driver: not driver.find_elements("css selector", "#guide-target input"), "the target stays")

    # A long one, which is stopped: the sampler does not go on to the end that nobody waits for.
    before = playground.metric("lenvm_rows_total", kind="candidates")
    _start_long(page)
    page.click("#guide-stop")
    page.choose("#guide-kind", "equal_to")
    guide(page, SHORT, target=11, limit=16)
    assert playground.metric("lenvm_rows_total", kind="candidates") - before < 400


def test_a_closed_tab_ends_its_generation(chromium: None, playground: ServiceProcess) -> None:
    before = playground.metric("lenvm_rows_total", kind="candidates")
    with open_browser() as browser:
        browser.open(f"{playground.url}/ui")
        _start_long(browser)
    seen, since, end = before, time.monotonic(), time.monotonic() + 240
    while time.monotonic() - since < 5:  # until nothing is generated any more
        assert time.monotonic() < end
        now = playground.metric("lenvm_rows_total", kind="candidates")
        seen, since = now, since if now == seen else time.monotonic()
        time.sleep(0.1)
    assert 2 <= seen - before < 400


def _start_long(page: Browser) -> None:
    """A guided answer of at least 400 tokens, begun."""
    page.tab("Guide")
    page.choose("#guide-kind", "at_least")
    page.type("#guide-target input[type=number]", "400")
    page.type("#guide-limit input[type=number]", "512")
    page.click("#guide-run")
    page.until(lambda _: _count(page) > 2, "nothing is generated")


def _count(page: Browser) -> int:
    """Tokens of the guided answer so far."""
    said = page.text("#guide-out").partition(" of at most ")[0].split()
    return int(said[-1]) if said and said[-1].isdigit() else 0


def test_keys_and_an_open_tab(chromium: None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A browser asks for the key; who has none sees nothing. And a tab that stays open does not hold up the end."""
    key, table = new_key("browser-1", "team")
    keys = tmp_path / "keys.toml"
    keys.write_text(table)
    service = start_service(tmp_path, "--ui", "--model", str(tiny_checkpoint), "--api-keys", str(keys), wait=False)
    try:
        with open_browser() as browser:
            host = service.url.removeprefix("http://")
            _wait_until_ready(service, key)
            browser.open(f"{service.url}/ui/")
            assert "Predict" not in browser.driver.page_source
            browser.complaints()  # the refusal
            # What a visitor types into the browser's own dialogue; it is remembered from then on.
            browser.open(f"http://anybody:{key}@{host}/ui/theme.css")
            browser.open(f"{service.url}/ui/")
            assert "mean" in predict(browser, "abc")
            # A text that is opened by itself makes Chromium ask for an icon at the root, which is not the page's.
            assert [one for one in browser.complaints() if f"{host}/favicon.ico" not in one] == []
            assert browser.hosts() == {host}
            assert service.stop() == 0
        log = service.log.read_text()
        assert "key=browser-1" in log
        assert key not in log
        assert "ERROR" not in log
        assert "cut short" not in log
    finally:
        service.process.kill()
        service.process.wait()


def _wait_until_ready(service: ServiceProcess, key: str) -> None:
    end = time.monotonic() + 120
    credentials = base64.b64encode(f":{key}".encode()).decode()
    while True:
        try:
            request = Request(f"{service.url}/health/ready", headers={"x-api-key": key})
            with urlopen(request, timeout=10):
                break
        except OSError:
            assert service.process.poll() is None, service.log.read_text()
            assert time.monotonic() < end, service.log.read_text()
            time.sleep(0.1)
    page = Request(f"{service.url}/ui/", headers={"authorization": f"Basic {credentials}"})
    with urlopen(page, timeout=60) as answer:
        assert answer.status == 200


def test_a_browser_is_where_make_chromium_puts_it(chromium: None) -> None:
    found = find_chromium()
    assert found
    assert all(shutil.which(path) for path in found)
