"""What the chat page keeps: through reloads, failures, several tabs, files of others, and its own settings."""

import json

import pytest

from minimind_jax.tools.toolbox import Toolbox
from tests.serve.conftest import running
from tests.serve.page_helpers import (
    CALL,
    Prompter,
    answered,
    ask,
    opened,
    save_talker,
    sent_by,
    shows,
    stream,
    sync_api,
    talk_of,
)

expect = sync_api.expect
FAULT = {"status": 500, "json": {"error": {"message": "broken", "type": "server_error"}}}


@pytest.fixture(scope="module")
def serving(compilation_cache, tmp_path_factory):
    talker = save_talker(tmp_path_factory.mktemp("talker"), 2048)
    with (
        Toolbox(("calculator",)) as tools,
        running((), tools, model=(str(talker),), web=True, tools=("calculator",), slots=2) as server,
    ):
        yield server, Prompter(server)


@pytest.fixture
def model(serving):
    prompter = serving[1]
    prompter.says, prompter.pause, prompter.prompts = [], 0.0, []
    return prompter


@pytest.fixture
def page(browser, serving):
    with opened(browser, serving[0].root) as page:
        yield page


def settings(page, **values):
    """Sets fields of the dialog; `button` ends it."""
    button = values.pop("button", "ok")
    page.click("#settings-button")
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.click(f"#settings button[value='{button}']")


def begin(page):
    page.click("#new")
    expect(page.locator("article")).to_have_count(0)


def test_a_reload_within_a_round_of_tools_hides_nothing(page, model):
    model.says = ["One."]
    ask(page, "hello")
    answered(page)
    model.says, model.pause = [CALL, "nine " * 60], 0.04
    ask(page, "256 times 37?")
    expect(page.locator(".markdown").last).to_contain_text("nine " * 40)
    page.reload()
    expect(page.locator(".call")).to_have_count(1)
    assert talk_of(page)[:3] == ["hello", "One.", "256 times 37?"]
    expect(page.locator(".notes").last).to_contain_text("Not complete")


def test_a_click_while_nothing_has_come_loses_nothing(page, model):
    model.says = ["One."]
    ask(page, "hello")
    answered(page)
    page.route("**/v1/chat/completions", lambda route: None)  # which is never answered
    ask(page, "and now?")
    expect(page.locator(".notes").last).to_contain_text("Waiting")
    page.click("#thinking")
    tab = page.context.new_page()
    tab.goto(page.url)
    shows(tab, "hello", "One.", "and now?")
    expect(tab.get_by_role("button", name="Answer this")).to_be_visible()


def test_another_answer_that_fails_takes_no_earlier_one(page, model):
    model.says = ["Good."]
    ask(page, "hello")
    answered(page)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**FAULT))
    page.get_by_role("button", name="Another answer").click()
    expect(page.locator(".fault.box")).to_contain_text("broken")
    shows(page, "hello", "Good.")
    page.reload()
    shows(page, "hello", "Good.")


def test_a_fault_is_of_the_version_that_it_happened_to(page, model):
    model.says = ["Good."]
    ask(page, "hello")
    answered(page)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**FAULT))
    page.get_by_role("button", name="Edit").click()
    page.fill(".question textarea", "hullo")
    page.press(".question textarea", "Enter")
    expect(page.locator(".fault.box")).to_contain_text("broken")
    page.get_by_role("button", name="Earlier version").click()
    shows(page, "hello", "Good.")
    expect(page.locator(".fault.box")).to_have_count(0)


def test_cancel_changes_nothing_and_settings_stay_with_their_conversation(page, model):
    model.says = ["One.", "Two.", "Three."]
    sent = sent_by(page)
    settings(page, system="A", temperature="0.1")
    ask(page, "a")
    answered(page)
    begin(page)
    settings(page, system="B", temperature="1.5")
    ask(page, "b")
    answered(page)
    page.locator("#list .title", has_text="a").click()
    shows(page, "a", "One.")
    settings(page, button="")
    page.click("#thinking")  # of this one, and of the next: with no other setting of this
    page.click("#settings-button")
    page.go_back()
    expect(page.locator("#settings")).not_to_be_visible()
    shows(page, "b", "Two.")
    page.click("#settings-button")
    expect(page.locator("[name=temperature]")).to_have_value("1.5")
    page.keyboard.press("Escape")
    begin(page)
    ask(page, "c")
    answered(page)
    assert [(body["messages"][0]["content"], body["temperature"]) for body in sent] == [
        ("A", 0.1), ("B", 1.5), ("B", 1.5),
    ]  # fmt: skip
    assert [body["chat_template_kwargs"]["enable_thinking"] for body in sent] == [False, False, True]


def test_two_tabs_undo_nothing_of_each_other(page, model):
    model.says, model.pause = ["first " * 60], 0.04
    ask(page, "one")
    expect(page.locator(".markdown")).to_contain_text("first")
    tab = page.context.new_page()
    tab.goto(page.url)
    settings(tab, temperature="0.3")
    tab.get_by_role("button", name="Rename").click()
    tab.fill("#question-input", "new name")
    tab.click("#question-ok")
    answered(page)
    for each in (page, tab):
        expect(each.locator("#list .title")).to_have_text("new name")
        each.reload()
        expect(each.locator("#list .title")).to_have_text("new name")
        each.click("#settings-button")
        expect(each.locator("[name=temperature]")).to_have_value("0.3")
        shows(each, "one", ("first " * 60).strip())


def test_what_another_tab_deletes_is_gone(page, model):
    model.says, model.pause = ["first " * 60], 0.04
    ask(page, "one")
    expect(page.locator(".markdown")).to_contain_text("first " * 20)
    tab = page.context.new_page()
    tab.goto(page.url)
    tab.get_by_role("button", name="Delete").click()
    tab.click("#question-ok")
    expect(page.locator("#banner")).to_contain_text("deleted in another tab")
    expect(page.locator("#list .title")).to_have_count(0)
    expect(page.locator("#send")).to_be_visible()
    page.wait_for_timeout(1500)
    page.reload()
    expect(page.locator(".empty")).to_be_visible()
    expect(page.locator("#list .title")).to_have_count(0)


def export(page, place):
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(place)
    return place


def test_a_file_goes_on_where_the_earlier_one_ended(page, model, browser, serving, tmp_path):
    model.says = ["One.", "Two."]
    ask(page, "one")
    answered(page)
    first = export(page, tmp_path / "1.json")
    ask(page, "two")
    answered(page, 2)
    second = export(page, tmp_path / "2.json")
    with opened(browser, serving[0].root) as other:
        other.set_input_files("#file", first)
        other.locator("#list .title").click()
        shows(other, "one", "One.")
        other.set_input_files("#file", second)
        shows(other, "one", "One.", "two", "Two.")
        other.get_by_role("button", name="Close").click()
        expect(other.locator("#banner")).not_to_be_visible()
        other.reload()
        shows(other, "one", "One.", "two", "Two.")


def test_a_file_from_anybody_neither_hangs_the_page_nor_hides(page, model, tmp_path):
    made = [("x", "z", "10"), ("y", "x", "9"), ("z", "y", 9.5)]
    messages = [{"id": i, "parent": p, "role": "user", "content": i, "created": c} for i, p, c in made]
    file = {"format": "minimind-conversations", "version": 1, "conversations": [{"id": "r", "messages": messages}]}
    (tmp_path / "ring.json").write_text(json.dumps(file))
    page.set_input_files("#file", tmp_path / "ring.json")
    expect(page.locator("#banner")).to_contain_text("conversations[0].messages[0]")
    whole = [{"id": "m", "parent": None, "role": "user", "content": "said", "created": 1}]
    file["conversations"] = [{"id": "an id of 100 %", "messages": whole, "settings": {"system": None}}]
    (tmp_path / "odd.json").write_text(json.dumps(file))
    page.set_input_files("#file", tmp_path / "odd.json")
    page.get_by_role("button", name="Untitled").click()
    shows(page, "said")
    page.reload()
    shows(page, "said")
    page.click("#settings-button")
    expect(page.locator("[name=system]")).to_have_value("")


def test_drafts_stay_where_they_were_written(page, model):
    model.says = ["One."]
    ask(page, "one")
    answered(page)
    page.fill("#text", "of one")
    begin(page)
    expect(page.locator("#text")).to_have_value("")
    page.fill("#text", "of a new one")
    page.locator("#list .title").click()
    shows(page, "one", "One.")
    expect(page.locator("#text")).to_have_value("of one")
    page.click("#new")
    expect(page.locator("#text")).to_have_value("of a new one")


def test_an_edit_that_cannot_be_sent_yet_stays(page, model):
    model.says, model.pause = ["One.", "first " * 60], 0.0
    ask(page, "one")
    answered(page)
    page.get_by_role("button", name="Edit").click()
    page.fill(".question textarea", "one, written anew")
    model.pause = 0.04
    ask(page, "two")
    expect(page.locator(".markdown").last).to_contain_text("first")
    page.press(".question textarea", "Enter")
    expect(page.locator(".question textarea")).to_have_value("one, written anew")
    answered(page, 2)
    expect(page.locator(".question textarea")).to_have_value("one, written anew")


def test_names_of_others_and_a_browser_that_keeps_nothing(browser, serving, model):
    with opened(browser, serving[0].root) as page:
        page.evaluate("localStorage.setItem('theme', 'oled-dark'); localStorage.setItem('minimind-theme', 'none')")
        page.reload()
        expect(page.locator("#model option")).to_have_count(1)
    with opened(browser, serving[0].root) as page:
        page.add_init_script("""
            for (const name of ["localStorage", "sessionStorage", "indexedDB"])
                Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
        """)
        page.reload()
        expect(page.locator("#model option")).to_have_count(1)
        expect(page.locator("#banner")).to_contain_text("keeps nothing")
        model.says = ["One."]
        ask(page, "one")
        answered(page)
        shows(page, "one", "One.")


def test_lists_tables_and_right_to_left_keep_their_form(page):
    stream(page, "1. one\n\n```\ncode\n```\n\n2. two\n\n| a | b |\n|:--|--:|\n| Jupiter | 142984 |\n")
    ask(page, "שלום")
    answered(page)
    assert page.locator(".markdown ol").nth(1).get_attribute("start") == "2"
    assert page.locator(".markdown td").nth(1).get_attribute("align") == "right"
    assert page.locator(".question .plain").evaluate("e => getComputedStyle(e).direction") == "rtl"


def test_the_last_words_are_kept_whenever_they_come(page, model):
    """An answer is saved while it grows, and what comes while it is saved is not lost."""
    for number, count in enumerate((1, 30, 52, 55, 58)):
        model.says, model.pause = [f"{number} " * count], 0.02
        ask(page, f"question {number}")
        answered(page, number + 1)
    said = talk_of(page)
    assert said[1::2] == [(f"{number} " * count).strip() for number, count in enumerate((1, 30, 52, 55, 58))]
    page.reload()
    shows(page, *said)


def test_who_writes_on_is_not_disturbed_by_an_answer_or_another_tab(page, model):
    model.says, model.pause = ["first " * 30], 0.03
    ask(page, "one")
    expect(page.locator(".markdown")).to_contain_text("first")
    page.locator("#text").press_sequentially("a long draft ", delay=30)
    tab = page.context.new_page()
    tab.goto(page.url)
    tab.click("#thinking")
    page.locator("#text").press_sequentially("goes on", delay=30)
    answered(page)
    assert page.evaluate("[document.activeElement.id, document.activeElement.selectionEnd]") == ["text", 20]
    expect(page.locator("#text")).to_have_value("a long draft goes on")


def test_what_has_come_is_kept_while_nothing_more_comes(page, model):
    model.says, model.pause = [CALL], 0.0
    page.route("**/tools/call", lambda route: None)  # a tool that takes for ever
    ask(page, "256 times 37?")
    expect(page.locator(".call")).to_have_count(1)
    page.wait_for_timeout(1500)
    page.reload()
    expect(page.locator(".call")).to_have_count(1)


def test_an_editor_keeps_its_focus_when_an_answer_ends(page, model):
    model.says = ["One."]
    ask(page, "one")
    answered(page)
    page.get_by_role("button", name="Edit").click()
    model.says, model.pause = ["first " * 40], 0.03
    ask(page, "two")
    expect(page.locator(".markdown").last).to_contain_text("first")
    page.fill(".question textarea", "")
    page.locator(".question textarea").press_sequentially("x" * 60, delay=30)
    answered(page, 2)
    page.keyboard.type("y")
    expect(page.locator(".question textarea")).to_have_value("x" * 60 + "y")


def test_a_file_completes_an_answer_that_was_not(page, model, browser, serving, tmp_path):
    model.says, model.pause = ["first " * 60], 0.04
    ask(page, "one")
    expect(page.locator(".markdown")).to_contain_text("first " * 40)
    part = export(page, tmp_path / "part.json")
    answered(page)
    whole = export(page, tmp_path / "whole.json")
    with opened(browser, serving[0].root) as other:
        other.set_input_files("#file", part)
        other.locator("#list .title").click()
        expect(other.locator(".notes")).to_contain_text("Not complete")
        other.set_input_files("#file", whole)
        shows(other, "one", ("first " * 60).strip())


def test_a_browser_that_is_full_follows_the_theme(browser, serving):
    with opened(browser, serving[0].root) as page:
        full = "throw new DOMException('full', 'QuotaExceededError')"
        page.evaluate(f"() => {{ Storage.prototype.setItem = () => {{ {full}; }}; }}")
        themes = []
        for _ in range(3):
            page.click("#theme")
            themes.append(page.evaluate("document.documentElement.dataset.theme"))
        assert themes == ["light", "dark", "auto"]
