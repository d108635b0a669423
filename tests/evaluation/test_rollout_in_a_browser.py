"""The page of one response, as a reader uses it: in headless Chromium, with mouse, finger and keyboard."""

import json
import math
import re
import shutil

import pytest
from runs import settings, start

from evaluation import rollout

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is clicked through with playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine to open the page in", allow_module_level=True)

PROMPT = "Tell me about <b>copper</b> & tin."


@pytest.fixture(scope="module")
def file(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    start(settings(world, folder / "run", evaluation=None, estimator="bregman", beta=0.3, steps=2, lr_steps=9))
    args = rollout_args(folder / "run", folder / "page.html")
    rollout.show(args)
    return args.out


def rollout_args(run, out):
    import argparse

    parser = argparse.ArgumentParser()
    rollout.add_flags(parser)
    return parser.parse_args([str(run), "--prompt", PROMPT, "--out", str(out)])


@pytest.fixture(scope="module")
def content(file):
    """What the page was given: ppo.py's tensors, as test_rollout.py shows."""
    return json.loads(file.read_text(encoding="utf-8").split('id="content">')[1].split("</script>")[0])


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, file):
    """At the width of a laptop; an error in its script fails the test."""
    opened = opened_page(browser, file, 1200)
    yield opened
    assert opened.errors == []
    opened.close()


def opened_page(browser, file, width, scheme="light"):
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 500)
    page.errors, page.asked = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(file.as_uri())
    return page


def value(text: str) -> float:
    return float(text.replace("−", "-"))


def tiles(page) -> list[float]:
    return [value(text) for text in page.locator("#tokens .number").all_inner_texts()]


def test_it_asks_the_network_for_nothing(page, file):
    assert page.asked == [file.as_uri()]


def test_a_text_of_markup_is_shown_as_text(page):
    assert page.inner_text("#instruction") == PROMPT and page.locator("#instruction b").count() == 0


@pytest.mark.parametrize(("quantity", "expected"), [
    ("bare", lambda m, by: by["penalty"]), ("penalty", lambda m, by: [m["beta"] * x for x in by["penalty"]]),
    ("reward", lambda m, by: by["reward"]), ("advantage", lambda m, by: by["advantage"]),
    ("returns", lambda m, by: by["returns"]), ("true_kl", lambda m, by: [t["true_kl"] for t in m["tokens"]]),
    ("gap", lambda m, by: [t["logprob"] - t["ref_logprob"] for t in m["tokens"]]),
    ("logprob", lambda m, by: [t["logprob"] for t in m["tokens"]]), ("value", lambda m, by: [t["value"] for t in m["tokens"]]),
    ("ref_logprob", lambda m, by: [t["ref_logprob"] for t in m["tokens"]]),
    ("ratio", lambda m, by: [t["ratio"] for t in m["tokens"]])])
@pytest.mark.parametrize("estimator", ["bregman", "kl"])
def test_each_token_shows_the_chosen_number(page, content, quantity, expected, estimator):
    page.select_option("#quantity", quantity)
    page.select_option("#estimator", estimator)
    moment = content["moments"][-1]
    assert tiles(page) == pytest.approx(expected(moment, moment["by"][estimator]), rel=6e-3)


def test_the_equations_hold_with_the_numbers_that_are_put_in(page, content):
    """What stands left of the last equals sign comes to what stands right of it, for every token and estimator."""
    n = len(content["moments"][-1]["tokens"])
    for estimator in content["estimators"]:
        page.select_option("#estimator", estimator)
        for t in (0, n // 2, n - 1):
            page.locator("#tokens button").nth(t).click()
            for equation in page.locator("#detail .numbers").all_inner_texts():
                left, _, right = equation.rpartition(" = ")
                if left:
                    assert evaluated(left) == pytest.approx(value(right), rel=0.02, abs=3e-3), equation


def evaluated(text: str) -> float:
    for written, python in (("−", "-"), ("·", "*"), ("²", "**2"), ("½ *", "0.5 *"), ("½", "0.5 *")):
        text = text.replace(written, python)
    assert re.fullmatch(r"[-+*/().,0-9e expmina]+", text), text
    return eval(text, {"exp": math.exp, "min": min, "max": max})


def test_the_numbers_beside_a_token_are_its_own(page, content):
    page.locator("#tokens button").nth(1).click()
    own = content["moments"][-1]["by"]["bregman"]
    shown = [value(text.rpartition("= ")[2]) for text in page.locator("#detail .numbers").all_inner_texts()]
    expected = [own[name][1] for name in ("penalty", "shaped", "reward", "delta", "gae", "advantage", "returns")]
    assert shown[:7] == pytest.approx(expected, rel=1e-3)
    row = page.locator('#detail tr[data-estimator="kl"] td').all_inner_texts()
    assert value(row[1]) == pytest.approx(content["moments"][-1]["by"]["kl"]["penalty"][1], rel=1e-3)


def test_pointing_shows_and_leaving_goes_back_to_the_chosen_one(page):
    page.locator("#tokens button").nth(0).click()
    page.locator("#tokens button").nth(2).hover()
    assert page.get_attribute("#detail h2", "data-token") == "2"
    page.hover("h1")
    assert page.get_attribute("#detail h2", "data-token") == "0"


def test_keys_go_from_token_to_token(page, content):
    last = len(content["moments"][-1]["tokens"]) - 1
    page.locator("#tokens button[tabindex='0']").focus()
    for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", last), ("ArrowRight", last), ("Home", 0)):
        page.keyboard.press(key)
        assert page.get_attribute("#detail h2", "data-token") == str(at)
        assert page.evaluate("[...document.querySelectorAll('#tokens button')].indexOf(document.activeElement)") == at


def test_the_slider_goes_through_the_checkpoints(page, content):
    page.select_option("#quantity", "logprob")
    page.focus("#step")
    page.keyboard.press("Home")
    assert page.inner_text("#stepname") == "Before the first PPO step"
    assert tiles(page) == pytest.approx([t["logprob"] for t in content["moments"][0]["tokens"]], rel=6e-3)
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#stepname") == "After PPO step 1"
    assert tiles(page) == pytest.approx([t["logprob"] for t in content["moments"][1]["tokens"]], rel=6e-3)


def test_on_a_phone_nothing_is_wider_than_the_screen_or_too_small(browser, file):
    page = opened_page(browser, file, 390)
    page.locator("#tokens button").nth(1).tap()
    assert page.get_attribute("#detail h2", "data-token") == "1"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.evaluate("[...document.querySelectorAll('main *')].filter(e => e.innerText).map(e => "
                          "parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 12
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_token_can_be_read_on_its_colour(browser, file, scheme):
    """WCAG's contrast of text, 4.5 or more, for the strongest colours and in both schemes."""
    page = opened_page(browser, file, 1200, scheme)
    for quantity in ("advantage", "logprob", "reward"):
        page.select_option("#quantity", quantity)
        for ink, paper in page.evaluate("[...document.querySelectorAll('#tokens button')].map(b => { const s = "
                                        "getComputedStyle(b); return [s.color, s.backgroundColor]; })"):
            light, dim = sorted((luminance(ink), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dim + 0.05) >= 4.5
    page.close()


def luminance(css: str) -> float:
    channels = [int(c) / 255 for c in re.findall(r"\d+", css)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_the_docs_pictures_are_taken_of_the_page(browser, file, tmp_path):
    from bench.screenshots import take

    take(browser, file, 1, "advantage", tmp_path / "rollout.png")
    assert (tmp_path / "rollout.png").read_bytes()[16:24] == (1180).to_bytes(4, "big") + (640).to_bytes(4, "big")
