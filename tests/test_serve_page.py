"""The start page in a real browser: it shows what was drafted, and nothing that a model writes can run."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import ENTER, PHONE, TAB, WIDE, Browser, browser  # noqa: F401
from serving import Running, chat_text, expected_text, new_engine, new_service, running
from test_grammar import target, tokenizer

from dynatree_core import Engine
from dynatree_core.serve.keys import Keys
from dynatree_core.serve.service import Service
from dynatree_core.serve.start_page import start_page

AXE = Path(__file__).parents[1] / "viewer" / "node_modules" / "axe-core" / "axe.min.js"
ESCAPE, SHIFT = "\ue00c", "\ue008"
in_browser = pytest.mark.slow  # a browser is another process, and takes seconds to start


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(new_service({"prompt_lookup": new_engine(), "other": new_engine()}, max_tokens=120)) as server:
        yield server


@pytest.fixture
def tab(browser: Browser) -> Iterator[Browser]:  # noqa: F811
    """The browser, which must not have complained when a test is done."""
    browser.resize(*WIDE)
    browser.prefer()
    yield browser
    assert browser.console() == []


def say(tab: Browser, text: str) -> None:
    tab.js("document.getElementById('question').focus()")
    tab.press(text, ENTER)


def ask(tab: Browser, text: str) -> str:
    """The answer to this, when it is there."""
    say(tab, text)
    tab.wait("document.getElementById('said').textContent.startsWith('The answer is there')")
    return tab.texts(".words")[-1]


def set_length(tab: Browser, length: int) -> None:
    tab.js("document.getElementById('length').value = arguments[0]", length)


# what the server sends


def test_the_page_comes_with_a_policy_that_its_parts_fulfil(server):
    with server.http() as http:
        answer = http.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for name, kind in (("script-src", "script"), ("style-src", "style")):
        (text,) = re.findall(f"<{kind}>(.*?)</{kind}>", answer.text, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"


def test_the_page_loads_nothing():
    found = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend((tag, name, value) for name, value in attrs if name in ("src", "href", "style", "onclick"))

    Loads().feed(start_page().html)
    assert found == [("link", "href", "data:,"), ("a", "href", "#question")]
    assert set(re.findall(r"\w+://[\w./]+", start_page().html)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", start_page().html)


def test_models_say_what_a_request_may_choose(server):
    with server.http() as http:
        told = http.get("/v1/models").json()["data"][0]["dynatree"]
    assert told == {
        "policies": ["fixed(depth=3)", "autoregressive"],
        "drafters": ["prompt_lookup", "other"],
        "max_tokens": 120,
        "has_chat_template": True,
        "shows_trees": True,
    }


# in the browser


@in_browser
def test_an_answer_is_the_models_and_says_what_was_drafted(tab, server):
    tab.open(server.address)
    set_length(tab, 60)
    text = ask(tab, "the cat sat on the mat. the cat")
    assert text == expected_text(chat_text("the cat sat on the mat. the cat"), 60)
    drafted, bonus = tab.texts(".turn .drafted"), tab.texts(".turn .bonus")
    assert drafted
    assert bonus
    assert "".join(tab.texts(".turn .words span")) == text
    taken, tried = map(int, tab.text("#taken").split(" of "))
    assert len(drafted) == taken <= tried
    assert int(tab.text("#tokens")) == len(drafted) + len(bonus)
    assert float(tab.text("#rate")) == round(int(tab.text("#tokens")) / int(tab.text("#iterations")), 2) > 1
    look = (
        "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.textDecorationLine, s.fontWeight]"
    )
    assert tab.js(look, ".turn .drafted") != tab.js(look, ".turn .bonus")  # also without colours


@in_browser
def test_the_trees_of_an_answer_are_shown_as_it_comes(tab, server):
    tab.open(server.address)
    set_length(tab, 60)
    ask(tab, "the cat sat on the mat. the cat")
    count = int(tab.text("#iterations"))
    number = "return document.getElementById('tree-number').textContent"
    tab.wait(f"document.getElementById('tree-number').textContent === '{count - 1} of 0 to {count - 1}'")
    accepted = tab.js("return document.querySelectorAll('#tree-of .node.accepted').length")
    assert tab.text("#tree-about").startswith(f"{accepted} of ")
    for _ in range(count + 2):
        tab.click("#tree-previous")
    tab.wait(f"document.getElementById('tree-number').textContent === '0 of 0 to {count - 1}'")
    seen = []
    tab.js("document.getElementById('tree-next').focus()")
    for place in range(count):
        tab.wait(f"document.getElementById('tree-number').textContent.startsWith('{place} ')")
        seen.append(tab.js("return document.querySelectorAll('#tree-of .node.accepted').length"))
        tab.press("right")
    assert sum(seen) == int(tab.text("#taken").split(" of ")[0]) > 0
    # the next answer has trees of its own, and the newest is followed again
    tab.click("#new")
    ask(tab, "a man")
    again = int(tab.text("#iterations"))
    tab.wait(f"document.getElementById('tree-number').textContent === '{again - 1} of 0 to {again - 1}'")
    tab.js("document.querySelector('#tree-of .node.root').focus()")
    assert "the last committed token" in tab.text(".node-facts")
    assert tab.js(number)


@in_browser
def test_trees_that_nobody_looks_at_are_not_asked_for(tab, server):
    tab.resize(*PHONE)
    tab.open(server.address)
    assert not tab.js("return document.getElementById('trees').open")
    set_length(tab, 10)
    ask(tab, "the cat")
    assert tab.text("#tree-number") == "none yet"
    tab.click("#trees summary")
    ask(tab, "the cat")
    tab.wait("document.getElementById('tree-number').textContent !== 'none yet'")


@in_browser
def test_a_server_that_shows_no_trees_has_none_on_its_page(tab):
    with running(new_service(shows_trees=False)) as server:
        tab.open(server.address)
        assert tab.js("return document.getElementById('trees').checkVisibility()") is False
        set_length(tab, 5)
        assert ask(tab, "the cat") == expected_text(chat_text("the cat"), 5)


@in_browser
def test_a_conversation_goes_on_and_begins_anew(tab, server):
    tab.open(server.address)
    set_length(tab, 10)
    first = ask(tab, "the cat")
    second = ask(tab, "a man")
    assert second == expected_text(chat_text("the cat", first, "a man"), 10)
    tab.click("#new")
    assert tab.texts(".words") == []
    assert ask(tab, "the cat") == first


@in_browser
def test_a_policy_is_chosen_and_the_text_stays(tab, server):
    tab.open(server.address)
    set_length(tab, 30)
    texts, rates = [], []
    for policy in ("fixed(depth=3)", "autoregressive"):
        tab.js("document.getElementById('policy').value = arguments[0]", policy)
        tab.click("#new")
        texts.append(ask(tab, "the cat sat on the mat. the cat"))
        rates.append(float(tab.text("#rate")))
    assert texts[0] == texts[1]
    assert rates[0] > rates[1] == 1.0
    assert tab.texts("#drafter option") == ["prompt_lookup", "other"]


@in_browser
def test_what_a_model_writes_is_text(tab):
    """The model is made to write markup."""
    markup = '<img src=x onerror=alert(1)><script>document.title="no"</script>'
    tokens = tokenizer()
    tokens.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    engine = Engine(target(), "prompt_lookup", tokenizer=tokens)
    with running(new_service({"prompt_lookup": engine})) as server:
        tab.open(server.address)
        # the page's own request, with one field more: an answer that has to be this markup
        tab.js(
            """const plain = window.fetch;
            window.fetch = (route, options) => {
              if (!options.body) return plain(route, options);
              const body = {...JSON.parse(options.body), structured_outputs: {regex: arguments[0]}};
              return plain(route, {...options, body: JSON.stringify(body)});
            }""",
            re.sub(r"([().])", r"\\\1", markup),
        )
        assert ask(tab, markup) == markup
        assert tab.texts(".words")[0] == markup
        assert tab.js("return document.querySelectorAll('#talk img, #talk script').length") == 0
        assert "no" not in tab.driver.title


@in_browser
def test_escape_stops_an_answer_and_frees_its_place(tab, server):
    tab.open(server.address)
    set_length(tab, 120)
    # the answer's second half never comes: the page is told of the first records alone
    tab.js(
        """const plain = window.fetch;
        window.fetch = async (route, options) => {
          const answer = await plain(route, options);
          if (!options.body) return answer;
          const reader = answer.body.getReader();
          const stream = new ReadableStream({
            async start(out) {
              out.enqueue((await reader.read()).value);
              options.signal.addEventListener('abort', () => out.error(new DOMException('', 'AbortError')));
            },
          });
          return new Response(stream, answer);
        }"""
    )
    say(tab, "the cat")
    tab.wait("!document.getElementById('stop').disabled")
    tab.press(ESCAPE)
    tab.wait("document.getElementById('said').textContent === 'The answer was stopped.'")
    assert tab.texts(".cut") == ["Stopped."]
    assert not tab.js("return document.getElementById('send').disabled")


@in_browser
def test_an_error_of_the_server_is_shown(tab, server):
    tab.open(server.address)
    set_length(tab, 119)
    say(tab, "the cat sat on the mat. " * 4)
    tab.wait("document.getElementById('error').textContent !== ''")
    assert "context length is 160 tokens" in tab.text("#error")
    assert any("400" in line for line in tab.console())  # the browser's own word about the answer


@in_browser
def test_a_server_with_keys_is_asked_with_one(tab):
    service = new_service()
    keyed = Service(service.loop.engines, service.settings, Keys.of(["secret-key-of-alice"]))
    with running(keyed) as server:
        tab.open(server.address)
        assert tab.js("return document.getElementById('key-part').hidden") is False
        assert "API key" in tab.text("#error")
        tab.driver.find_element("css selector", "#key").send_keys("secret-key-of-alice", TAB)
        tab.wait("document.querySelectorAll('#policy option').length === 2")
        set_length(tab, 5)
        assert ask(tab, "the cat") == expected_text(chat_text("the cat"), 5)
    assert any("401" in line for line in tab.console())


@in_browser
def test_a_model_without_a_chat_template_goes_on_with_the_text(tab):
    engine = new_engine()
    engine.tokenizer.chat_template = None
    with running(new_service({"prompt_lookup": engine})) as server:
        tab.open(server.address)
        assert "goes on with what you write" in tab.text("#hint")
        set_length(tab, 12)
        assert ask(tab, "the cat sat") == expected_text("the cat sat", 12)


@in_browser
def test_all_of_it_is_reached_by_the_keyboard(tab, server):
    tab.open(server.address)
    reached = set()
    for _ in range(24):
        tab.press(TAB)
        reached.add(tab.js("return document.activeElement.id || document.activeElement.className"))
    wanted = {"skip", "policy", "drafter", "temperature", "length", "talk", "question", "send", "new"}
    wanted |= {"tree-first", "tree-previous", "tree-next", "tree-last", "tree"}
    assert reached >= wanted


@in_browser
@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed: `make viewer` does that, with npm")
@pytest.mark.parametrize(("size", "dark"), [(WIDE, False), (PHONE, True)], ids=["wide, light", "phone, dark"])
def test_axe_finds_no_violation(tab, server, size, dark):
    tab.resize(*size)
    tab.prefer(dark=dark)
    tab.open(server.address)
    set_length(tab, 20)
    ask(tab, "the cat sat on the mat. the cat")
    tab.js(AXE.read_text(encoding="utf-8"))
    found: Any = tab.driver.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
    assert len(found["passes"]) > 20
    said = [(one["id"], one["help"], [node["html"][:120] for node in one["nodes"][:3]]) for one in found["violations"]]
    assert said == []


@in_browser
@pytest.mark.parametrize("width", [320, 800, 2560])
def test_no_width_makes_the_page_scroll_sideways(tab, server, width):
    tab.resize(width, 900)
    tab.open(server.address)
    assert tab.js("return document.documentElement.scrollWidth") <= width
