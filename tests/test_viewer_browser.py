"""The page of `dynatree view` in a real browser: what it shows, how it is used, and that nothing in a trace can run."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import END, ENTER, HOME, PAGE_DOWN, PHONE, TAB, WIDE, Browser, browser  # noqa: F401
from made_traces import made_trace

from dynatree_core.trace.reading import read
from dynatree_core.trace.summary import run_of
from dynatree_core.trace.view import page

pytestmark = pytest.mark.slow  # a browser is another process, and takes seconds to start

AXE = Path(__file__).parents[1] / "viewer" / "node_modules" / "axe-core" / "axe.min.js"

Opened = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pages: of one trace, of two, and of one with several sequences."""
    root = tmp_path_factory.mktemp("traces")
    one = made_trace(root / "phase3.jsonl", num_iterations=30)
    other = made_trace(root / "fixed.jsonl", num_iterations=30, max_depth=2, seed=1, policy="fixed(depth=2)")
    several = made_trace(root / "batch.jsonl", num_iterations=5, num_sequences=3)
    for name, files in {"one": [one], "two": [one, other], "several": [several], "again": [one, one]}.items():
        write(root / f"{name}.html", *files)
    return root


def write(out: Path, *files: Path) -> list[dict[str, Any]]:
    """Write the page of some traces, and give their runs."""
    made = [run_of(file.name, read(file)) for file in files]
    out.write_text(page(made), encoding="utf-8")
    return [run for run, _ in made]


@pytest.fixture
def tab(browser: Browser) -> Iterator[Browser]:  # noqa: F811
    """The browser, which must not have complained when a test is done."""
    browser.resize(*WIDE)
    browser.prefer()
    yield browser
    assert browser.console() == []


def run_in(tab: Browser, which: int = 0) -> dict[str, Any]:
    """What the page was given."""
    return tab.js("return JSON.parse(document.getElementById('runs').textContent)[arguments[0]]", which)


def test_the_text_is_shown_by_iteration_and_by_who_drafted_it(tab, traces):
    tab.open(traces / "one.html")
    run = run_in(tab)
    [sequence] = run["sequences"]
    options = tab.js(
        """return [...document.querySelectorAll('[role=option]')].map(option =>
            [...option.children].map(token => [token.className, token.textContent]))"""
    )
    assert [
        [("drafted" if place < accepted else "bonus", run["texts"][str(token)][0].replace("\n", "↵\n"))
         for place, token in enumerate(committed)]
        for committed, accepted in zip(sequence["committed"], sequence["accepted"], strict=True)
    ] == [[tuple(token) for token in option] for option in options]  # fmt: skip
    assert tab.text(".prompt") == " the committee met"


def test_keys_clicks_and_the_address_lead_to_an_iteration(tab, traces):
    tab.open(traces / "one.html", "#iteration=12")
    number = "return document.getElementById('number').value"
    assert tab.js(number) == "12"
    assert tab.text(".iteration-view h3") == "Iteration 12"
    tab.press("right")
    assert tab.js(number) == "13"
    tab.press("left", "left")
    assert tab.js(number) == "11"
    tab.press(PAGE_DOWN)
    assert tab.js(number) == "21"
    tab.wait("location.hash === '#iteration=21'")
    tab.press(END)
    assert tab.js(number) == "29"
    tab.press("right", HOME)
    assert tab.js(number) == "0"
    tab.click("#run-0-iteration-3")
    assert tab.js(number) == "3"
    assert tab.texts("[aria-selected=true]") == tab.texts("#run-0-iteration-3")
    tab.click("#next")
    assert tab.js(number) == "4"
    tab.js("location.hash = '#iteration=7'")
    tab.wait("document.getElementById('number').value === '7'")
    tab.wait("document.getElementById('live').textContent.startsWith('Iteration 7: ')")


def test_the_tree_is_drawn_with_its_path_and_the_targets_wish(tab, traces):
    tab.open(traces / "one.html")
    [sequence] = run_in(tab)["sequences"]
    for place in range(6):
        kinds = tab.js("return [...document.querySelectorAll('.tree .node')].map(node => node.classList[1])")
        assert kinds.count("root") == 1
        assert kinds.count("accepted") == sequence["accepted"][place]
        assert kinds.count("accepted") + kinds.count("rejected") == sequence["nodes"][place]
        wishes = tab.js("return document.querySelectorAll('.tree .wish, .tree .node.bonus').length")
        assert wishes == 1
        tab.press("right")


def test_a_node_tells_its_details_on_hover_focus_and_tap(tab, traces):
    tab.open(traces / "one.html", "#iteration=2")
    assert "Point at a node" in tab.text(".node-facts")
    tab.hover(".tree .node.rejected .mark")
    facts = tab.text(".node-facts")
    assert "draft probability" in facts
    assert "verified, and not the target's choice" in facts
    tab.hover("h1")
    assert "Point at a node" in tab.text(".node-facts")
    tab.js("document.querySelector('.tree .node.root').focus()")
    assert "the last committed token" in tab.text(".node-facts")
    tab.press("right")
    assert "rank0 (the drafter's first choice)" in tab.text(".node-facts")
    first = tab.js("return document.activeElement.getAttribute('aria-label')")
    tab.press("down")
    assert tab.js("return document.activeElement.getAttribute('aria-label')") != first
    tab.press(ENTER)  # pinned
    pinned = tab.text(".node-facts")
    tab.js("document.activeElement.blur()")
    tab.hover("h1")
    assert tab.text(".node-facts") == pinned
    assert tab.js("return document.getElementById('number').value") == "2", "arrow keys in the tree are the tree's"


def test_kinds_of_nodes_can_be_left_out(tab, traces):
    tab.open(traces / "one.html", "#iteration=2")
    count = "return document.querySelectorAll('.tree .node.refused').length"
    before = tab.js(count)
    tab.click("#shown input[value=refused]")
    assert tab.js(count) < before
    assert tab.js(count) <= 1, "what the target wanted stays"
    tab.click("#shown input[value=refused]")
    assert tab.js(count) == before


def test_a_filter_leaves_the_iterations_of_a_kind(tab, traces):
    tab.open(traces / "one.html")
    [sequence] = run_in(tab)["sequences"]
    wanted = [place for place, accepted in enumerate(sequence["accepted"]) if accepted == 0]
    assert len(wanted) > 1
    tab.js(
        """const filter = document.getElementById('filter');
        filter.value = 'none'; filter.dispatchEvent(new Event('change'));"""
    )
    assert tab.text("#found") == f"{len(wanted)} iterations"
    seen = [int(tab.js("return document.getElementById('number').value"))]
    tab.js("document.body.focus()")
    for _ in wanted[1:]:
        tab.press("right")
        seen.append(int(tab.js("return document.getElementById('number').value")))
    assert seen == wanted
    tab.click("#figures button.link")  # why paths ended: the most frequent reason
    reason = tab.text("#figures button.link")
    ended = sum(sequence["endings"][index] == reason for index in sequence["ended"])
    assert tab.text("#found") == f"{ended} iterations"


def test_curves_tables_and_figures_are_there(tab, traces):
    tab.open(traces / "one.html", "#iteration=5")
    run = run_in(tab)
    [sequence] = run["sequences"]
    titles = tab.texts("#charts h3")
    assert titles == ["Tokens per iteration", "Depth", "Nodes", "Time by stage", "confidence.high"]
    legend = tab.js("return [...document.querySelectorAll('.chart output')].map(e => e.textContent)")
    assert legend[:2] == [str(len(sequence["committed"][5])), str(sequence["oracle"][5])]
    assert legend[2:4] == [str(sequence["accepted"][5]), str(sequence["depth"][5])]
    assert tab.js("return document.querySelectorAll('canvas').length") == len(titles)
    cells = tab.js(
        "return [...document.querySelectorAll('#acceptance table:first-child tr')].map(r => r.innerText.split('\\t'))"
    )
    depth, reached, accepted = sequence["by_depth"][0]
    assert cells[1][:3] == [depth, str(reached), str(accepted)]
    figures = dict(
        tab.js(
            """return [...document.querySelectorAll('#figures table:first-child tbody tr')].map(row =>
                [...row.children].map(cell => cell.textContent))"""
        )
    )
    tokens = sum(map(len, sequence["committed"]))
    assert figures["new tokens"] == str(tokens)
    assert figures["tokens per iteration"] == f"{tokens / 30:.2f}"
    # a click on a curve goes there
    tab.click(".chart .u-over")
    assert tab.js("return document.getElementById('number').value") in ("14", "15")


def test_two_runs_stand_side_by_side(tab, traces):
    tab.open(traces / "two.html")
    runs = [run_in(tab, 0), run_in(tab, 1)]
    first, second = (run["sequences"][0] for run in runs)
    assert tab.texts("#texts h3") == ["A: phase3.jsonl", "B: fixed.jsonl"]
    assert "The same text" in tab.text("#parted")
    for _ in range(6):
        tab.press("right")
    position = first["start"][6]
    place = max(place for place, start in enumerate(second["start"]) if start <= position)
    assert tab.texts(".iteration-view h3") == ["Iteration 6 of A", f"Iteration {place} of B"]
    head = tab.texts("#figures table:first-child th[scope=col]")
    assert head == ["figure", "A", "B", "B against A"]
    tab.click("#parted button")
    parted = int(tab.js("return document.getElementById('number').value"))
    assert first["nodes"][:parted] == second["nodes"][:parted]
    tab.click("#run-1-iteration-4")  # B leads
    assert tab.texts(".iteration-view h3")[1] == "Iteration 4 of B"
    tab.wait("location.hash === '#run=B&iteration=4'")
    tab.open(traces / "two.html", "#run=B&iteration=4")
    assert tab.texts(".iteration-view h3")[1] == "Iteration 4 of B"


def test_equal_runs_part_nowhere(tab, traces):
    tab.open(traces / "again.html")
    assert "Their trees are the same in every iteration of A." in tab.text("#parted")
    assert set(tab.texts("#figures table:first-child td:last-child")) <= {"the same", "–"}


def test_a_sequence_is_chosen(tab, traces):
    tab.open(traces / "several.html", "#sequence=2&iteration=3")
    assert tab.js("return document.getElementById('sequence').value") == "2"
    shown = tab.text(".committed")
    tab.js("const s = document.getElementById('sequence'); s.value = '0'; s.dispatchEvent(new Event('change'));")
    assert tab.text(".committed") != shown
    assert tab.js("return document.getElementById('number').value") == "0"
    tab.wait("location.hash === '#sequence=0&iteration=0'")


def test_one_sequence_needs_no_chooser(tab, traces):
    tab.open(traces / "one.html")
    assert not tab.js("return document.getElementById('sequence-part').checkVisibility()")


HOSTILE = (
    "<script>window.ran = 1</script>", "</script><script>window.ran = 2</script>", "<img src=x onerror='window.ran=3'>",
    "<!-- <script>", "]]></script>", "${window.ran = 4}", "{{constructor.constructor('window.ran = 5')()}}",
    "'\"><svg onload=ran=6>", "\u202eevil\u202c", "\u2066a\u2069", "\u2028", "\ud83d", "\x00\x1b[31m",
    "javascript:window.ran=7", "&lt;b&gt;", "\ufeff\u200b",
)  # fmt: skip


def test_nothing_in_a_trace_runs_or_hides(tab, tmp_path):
    trace = made_trace(
        tmp_path / "<b>&amp;.jsonl",
        words=[*HOSTILE, "x" * 1_000_000],
        num_iterations=40,
        prompt=range(len(HOSTILE)),
        policy=HOSTILE[1],
        drafters=[HOSTILE[2], HOSTILE[7]],
    )
    write(tmp_path / "page.html", trace)
    tab.open(tmp_path / "page.html")
    for _ in range(5):
        tab.press("right")
    tab.hover(".tree .node.root .mark")
    assert tab.js("return window.ran") is None
    assert tab.js("return document.querySelectorAll('img, script:not([type]), svg [onload], iframe').length") == 1
    prompt = tab.text(".prompt")
    for text in ("</script><script>window.ran = 2</script>", "<img src=x", "{{constructor", "&lt;b&gt;", "${window"):
        assert text in prompt
    for hidden in ("\u202e", "\u2066", "\u2028", "\x00", "\x1b", "\ufeff", "\u200b"):
        assert hidden not in prompt
        assert f"‹U+{ord(hidden):04X}›" in prompt
    assert "‹U+D83D›" in prompt
    assert tab.text("#title") == "<b>&amp;.jsonl"
    assert "1,000,000 characters" in tab.text(".committed")
    assert tab.js("return document.documentElement.scrollWidth <= window.innerWidth")


def test_the_policy_stops_what_would_run_in_the_page(browser, traces):  # noqa: F811
    """Not the escaping but the Content-Security-Policy: even an element that got in would not run."""
    browser.open(traces / "one.html")
    browser.js(
        """const script = document.createElement('script');
        try { script.textContent = 'window.ran = 1' } catch (error) { window.refused = error.name }
        document.body.append(script);
        const image = new Image(); image.src = 'https://example.invalid/x.png'; document.body.append(image);"""
    )
    browser.wait("document.images.length")
    assert browser.js("return window.ran") is None
    complaints = "\n".join(browser.console())
    assert "Content Security Policy" in complaints or browser.js("return window.refused") == "TypeError"
    assert "example.invalid" in complaints


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed: `make viewer` does that, with npm")
@pytest.mark.parametrize(
    ("name", "size", "dark"),
    [("one", WIDE, False), ("two", WIDE, True), ("several", PHONE, False), ("one", PHONE, True)],
    ids=["wide, light", "two, dark", "phone, light", "phone, dark"],
)
def test_axe_finds_no_violation(tab, traces, name, size, dark):
    tab.resize(*size)
    tab.prefer(dark=dark)
    tab.open(traces / f"{name}.html", "#iteration=3")
    tab.js("for (const one of document.querySelectorAll('details')) one.open = true")
    tab.js(AXE.read_text(encoding="utf-8"))
    found = tab.driver.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
    assert len(found["passes"]) > 20
    said = [(one["id"], one["help"], [node["html"][:120] for node in one["nodes"][:3]]) for one in found["violations"]]
    assert said == []


@pytest.mark.parametrize("width", [320, 800, 2560])
def test_no_width_makes_the_page_scroll_sideways(tab, traces, width):
    tab.resize(width, 900)
    for name in ("one", "two"):
        tab.open(traces / f"{name}.html")
        assert tab.js("return document.documentElement.scrollWidth") <= width


def test_all_of_it_is_reached_by_the_keyboard(tab, traces):
    tab.open(traces / "one.html")
    reached = set()
    for _ in range(40):
        tab.press(TAB)
        reached.add(
            tab.js(
                """const at = document.activeElement;
                return at.id || at.getAttribute('role') || at.value || at.className || at.tagName"""
            )
        )
    assert {
        "skip", "SUMMARY", "previous", "number", "next", "slider", "filter", "listbox", "rejected", "pruned", "refused",
        "region", "treeitem", "link",
    } <= reached  # fmt: skip


def test_it_prints_whole_and_light(tab, traces):
    tab.prefer(dark=True)
    tab.open(traces / "one.html", "#iteration=4")
    dark = tab.js("return getComputedStyle(document.body).backgroundColor")
    pdf = base64.b64decode(tab.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 20_000
    tab.prefer(dark=True, media="print")
    tab.js("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.js("return getComputedStyle(document.body).backgroundColor") != dark
    assert not tab.js("return document.getElementById('controls').checkVisibility()")
    assert tab.js("const s = document.querySelector('.story'); return s.scrollHeight <= s.clientHeight + 1")
    tab.js("window.dispatchEvent(new Event('afterprint'))")


def test_curves_are_drawn_anew_for_another_scheme(tab, traces):
    tab.open(traces / "one.html")
    tab.js("window.light = document.querySelector('canvas').toDataURL()")
    tab.prefer(dark=True)
    tab.wait("document.querySelector('canvas').toDataURL() != window.light")  # a page draws when it gets to it
    assert tab.js("return matchMedia('(prefers-color-scheme: dark)').matches")


def test_empty_and_broken_traces_are_shown_with_a_note(tab, tmp_path):
    trace = made_trace(tmp_path / "run.jsonl", num_iterations=6)
    whole = trace.read_bytes()
    for name, content in {"cut": whole[:-900], "empty": b"".join(whole.splitlines(keepends=True)[:3])}.items():
        trace.write_bytes(content)
        write(tmp_path / f"{name}.html", trace)
        tab.open(tmp_path / f"{name}.html")
        assert "The generation has no end in the file" in tab.text("#notes")
        tab.press("right", "left")
    assert tab.text(".iteration-view h3") == "No iteration"
