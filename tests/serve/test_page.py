"""The chat page in a real browser, against `minimind serve --web`.

The model is tiny and knows nothing. Where a test needs certain words, the engine is given a constraint under which the
model can only say them (`Prompter`); all else is what the page, the server and the engine do.
"""

import json
import re

import pytest

from minimind_jax.tools.toolbox import Toolbox
from tests.serve.conftest import running
from tests.serve.page_helpers import (
    CALL,
    HOSTILE,
    THINKING,
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
CONTEXT, LONG_CONTEXT = 2048, 16384


@pytest.fixture(scope="module")
def talker(compilation_cache, tmp_path_factory):
    return save_talker(tmp_path_factory.mktemp("talker"), LONG_CONTEXT)


@pytest.fixture(scope="module")
def serving(talker):
    settings = {"model": (str(talker),), "web": True, "tools": ("calculator",), "slots": 2, "context": CONTEXT}
    with Toolbox(settings["tools"]) as tools, running((), tools, **settings) as server:
        yield server, Prompter(server)


@pytest.fixture
def address(serving):
    return serving[0].root


@pytest.fixture
def model(serving):
    """The model of the page: `says` are its next answers."""
    prompter = serving[1]
    prompter.says, prompter.pause, prompter.prompts = [], 0.0, []
    return prompter


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def test_talk_is_streamed_and_kept(page, model):
    model.says = ["One.", "Two."]
    sent = sent_by(page)
    page.click("#settings-button")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0")
    page.fill("[name=seed]", "7")
    page.press("[name=seed]", "Enter")
    ask(page, "first")
    answered(page)
    expect(page.locator(".speed")).to_contain_text("tokens")
    ask(page, "second")
    answered(page, 2)
    assert [message["role"] for message in sent[0]["messages"]] == ["system", "user"]
    assert [(m["role"], m["content"]) for m in sent[1]["messages"]] == [
        ("system", "Be brief."), ("user", "first"), ("assistant", "One."), ("user", "second"),
    ]  # fmt: skip
    assert (
        sent[1]["temperature"] == 0 and sent[1]["seed"] == 7 and "top_k" not in sent[1] and "max_tokens" not in sent[1]
    )
    page.reload()
    answered(page, 2)
    shows(page, "first", "One.", "second", "Two.")
    assert page.locator("#list .title").all_inner_texts() == ["first"]


def test_what_the_model_writes_is_no_html(page, model):
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url) if ":9/" in request.url else None)
    page.on("dialog", lambda dialog: elsewhere.append(dialog.message))
    model.says = [HOSTILE]
    ask(page, "<b>and</b> <script>window.hacked = 6</script>")
    answered(page)
    shown = page.locator(".markdown")
    assert shown.locator("script, img, iframe, style, [onerror], [onclick]").count() == 0
    expect(shown).to_contain_text("<script>window.hacked = 1</script>")
    expect(page.locator(".question")).to_have_text("<b>and</b> <script>window.hacked = 6</script>")
    links = shown.locator("a").evaluate_all("all => all.map(a => [a.textContent, a.getAttribute('href'), a.rel])")
    safe = "noopener noreferrer nofollow"
    assert links == [["click", None, ""], ["[seen]", "http://127.0.0.1:9/seen.png", safe], ["data", None, ""]]
    shown.get_by_text("click", exact=True).click()
    page.reload()
    answered(page)
    assert page.evaluate("window.hacked") is None and not elsewhere


def test_thinking_is_folded(page, model):
    model.says = [THINKING]
    sent = sent_by(page)
    page.click("#thinking")
    ask(page, "hi")
    answered(page)
    assert sent[0]["chat_template_kwargs"]["enable_thinking"] is True
    thoughts = page.get_by_text("The user greets.")
    expect(thoughts).not_to_be_visible()
    page.click(".thinking summary")
    expect(thoughts).to_be_visible()
    expect(page.locator(".markdown strong")).to_have_text("you")


def test_tools_are_called_and_shown(page, model):
    model.says = [CALL, "It is 9472."]
    sent = sent_by(page)
    ask(page, "What is 256 times 37?")
    answered(page)
    expect(page.locator(".call summary")).to_contain_text("calculate_math")
    expect(page.locator(".call summary")).to_contain_text('{"result": "9472"}')
    expect(page.locator(".markdown").last).to_have_text("It is 9472.")
    *_, call, result = sent[1]["messages"]
    assert result == {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": '{"result": "9472"}'}
    page.click("#tools")
    ask(page, "and without?")
    answered(page, 2)
    assert sent[0]["tools"][0]["function"]["name"] == "calculate_math" and "tools" not in sent[2]


def test_a_model_that_only_calls_is_ended(page, model):
    model.says = [CALL] * 9
    sent = sent_by(page)
    ask(page, "again and again")
    answered(page)
    assert [body["tool_choice"] for body in sent] == ["auto"] * 5 + ["none"]


def test_stop_again_and_edit_lose_nothing(page, model):
    model.says, model.pause = ["word " * 60, "Another.", "Edited."], 0.02
    ask(page, "count")
    expect(page.locator(".markdown")).to_contain_text("word")
    page.click("#stop")
    answered(page)
    kept = page.locator(".markdown").inner_text()
    assert kept.count("word") < 60
    expect(page.locator(".notes")).to_contain_text("Stopped")
    model.pause = 0.0
    page.get_by_role("button", name="Another answer").click()
    expect(page.locator(".markdown")).to_have_text("Another.")
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".markdown")).to_have_text(kept)
    page.locator("article.user").get_by_role("button", name="Edit").click()
    page.locator(".question textarea").fill("count less")
    page.locator(".question textarea").press("Enter")
    expect(page.locator(".markdown")).to_have_text("Edited.")
    answered(page)
    page.reload()
    shows(page, "count less", "Edited.")
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".question")).to_have_text("count")


def test_answers_go_on_beside_what_is_shown(page, model):
    model.says, model.pause = ["slow " * 30, "Quick."], 0.01
    ask(page, "one")
    expect(page.locator(".markdown")).to_contain_text("slow")
    page.click("#new")
    expect(page.locator("article")).to_have_count(0)
    ask(page, "two")
    answered(page)
    page.locator("#list").get_by_text("one").click()
    shows(page, "one", ("slow " * 30).strip())
    answered(page)

    model.says = ["never kept " * 30]
    ask(page, "three")
    expect(page.locator(".markdown").last).to_contain_text("never")
    page.get_by_role("button", name="Delete").first.click()
    page.click("#question-ok")
    expect(page.locator("#list .title")).to_have_text(["two"])
    page.reload()
    expect(page.locator("#list .title")).to_have_text(["two"])


def test_two_tabs_of_one_conversation(page, model):
    model.says, model.pause = ["first " * 20, "Second."], 0.02
    ask(page, "one")
    expect(page.locator(".markdown")).to_contain_text("first")
    tab = page.context.new_page()
    tab.goto(page.url)
    expect(tab.locator(".question")).to_have_text("one")
    answered(page)
    answered(tab)
    shows(page, "one", ("first " * 20).strip())
    shows(tab, "one", ("first " * 20).strip())
    ask(tab, "two")
    answered(page, 2)
    shows(page, "one", ("first " * 20).strip(), "two", "Second.")


def test_list_search_rename_delete_export_import(page, model, browser, address, tmp_path):
    model.says = ["apples", "pears"]
    ask(page, "one")
    answered(page)
    page.click("#new")
    ask(page, "two")
    answered(page)
    page.fill("#search", "APPLE")
    expect(page.locator("#list .title")).to_have_text(["one"])
    page.get_by_role("button", name="Rename").click()
    page.fill("#question-input", "fruit")
    page.press("#question-input", "Enter")
    page.fill("#search", "")
    expect(page.locator("#list .title")).to_have_text(["two", "fruit"])
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "talks.json"
    download.value.save_as(file)
    page.get_by_role("button", name="Delete").first.click()
    page.keyboard.press("Enter")  # of a careless hand: deletes nothing
    expect(page.locator("#question")).to_be_hidden()
    expect(page.locator("#list .title")).to_have_text(["two", "fruit"])
    page.get_by_role("button", name="Delete").first.click()
    page.click("#question-ok")
    expect(page.locator("#list .title")).to_have_text(["fruit"])
    expect(page.locator("article")).to_have_count(0)

    with opened(browser, address) as other:
        other.set_input_files("#file", file)
        expect(other.locator("#banner")).to_contain_text("Messages added: 4 (conversations: 2)")
        other.get_by_text("fruit").click()
        shows(other, "one", "apples")
        bad = json.loads(file.read_text("utf-8"))
        bad["conversations"][0]["messages"][0]["parent"] = bad["conversations"][0]["messages"][0]["id"]
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        other.set_input_files("#file", tmp_path / "bad.json")
        expect(other.locator("#banner")).to_contain_text("conversations[0].messages[0]")


def test_phone_chinese_dark(browser, address, model):
    with opened(browser, address, viewport={"width": 360, "height": 640}, locale="zh-CN", color_scheme="dark") as page:
        wide = " | ".join("列" * 9)
        model.says = [f"你好。`{'long' * 20}`\n\n```\n{'code ' * 20}\n```\n\n| {wide} |\n|{'---|' * 9}\n| {wide} |"]
        expect(page.locator("#send")).to_have_text("发送")
        page.fill("#text", "你好")
        # The Enter that ends a word of an input method.
        page.dispatch_event("#text", "keydown", {"key": "Enter", "isComposing": True})
        page.dispatch_event("#text", "keydown", {"key": "Enter", "keyCode": 229})
        assert page.locator("article").count() == 0
        page.press("#text", "Shift+Enter")
        page.keyboard.type("吗")
        page.press("#text", "Enter")
        answered(page)
        assert talk_of(page)[0] == "你好\n吗"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("[...document.querySelectorAll('article')].every(a => a.scrollWidth <= innerWidth)")
        assert brightness(page) < 60
        expect(page.locator("#new")).not_to_be_visible()
        page.click("#menu")
        expect(page.locator("#new")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#new")).not_to_be_visible()
        page.click("#theme")
        assert brightness(page) > 200
        page.click("#language")
        expect(page.locator("#send")).to_have_text("Send")
        page.reload()
        expect(page.locator("#send")).to_have_text("Send")
        assert brightness(page) > 200


def brightness(page):
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return max(map(int, re.findall(r"\d+", colour)[:3]))


def test_everything_has_a_name(page, model):
    """Whatever can be reached by Tab says what it is."""
    model.says = ["```\ncode\n```"]
    ask(page, "hi")
    answered(page)
    for opens in (None, "#settings-button"):
        if opens:
            page.click(opens)
        nameless = page.locator("button, input:not([type=file]), textarea, select, summary").evaluate_all(
            "all => all.filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim() ||"
            " e.getAttribute('aria-labelledby') || !e.checkVisibility())).map(e => e.outerHTML)"
        )
        assert not nameless


def test_growing_markdown_is_the_whole(page):
    """Shown bit by bit, a text gives what it gives at once; nothing is lost or doubled where a block is settled."""
    text = "# T\n\na\r\nb\n\n- x\n- y\n\n  more\n\n1. q\n\n   ```py\n   z = 1\n   ```\n> c\n\n"
    text += "| a | b |\n|--|--|\n| 1 | 2 |\n\n<p>\n\nend 中"
    whole, grown, nested = page.evaluate(
        """async (text) => {
            const { Markdown } = await import("/js/markdown.js");
            const rest = () => new Promise((resolve) => setTimeout(resolve, 70));
            const [whole, grown, nested] = [new Markdown(), new Markdown(), new Markdown()];
            document.body.append(grown.element);
            whole.finish(text);
            for (let end = 1; end <= text.length; end += 5) { grown.grow(text.slice(0, end)); await rest(); }
            grown.grow(text);
            await rest(); await rest();
            nested.finish(">".repeat(20000) + " deep");
            return [whole.element.innerText, grown.element.innerText, nested.element.innerText];
        }""",
        text,
    )
    assert re.sub(r"\s+", "", grown) == re.sub(r"\s+", "", whole)
    assert "deep" in nested


def test_a_model_that_repeats_itself_does_not_freeze_the_page(page):
    """Texts for which the libraries' expressions take 4 to 40 seconds each, and one for which their stack ends."""
    seconds = page.evaluate(
        """async () => {
            const { Markdown } = await import("/js/markdown.js");
            const code = "```c\\n" + "a_".repeat(20000);
            return ["_a__b".repeat(20000), "~~a~".repeat(20000), code, ">".repeat(20000)].map((text) => {
                const [shown, started] = [new Markdown(), performance.now()];
                shown.finish(text);
                if (shown.element.textContent.length < 19000) throw new Error("a part is lost");
                return (performance.now() - started) / 1000;
            });
        }"""
    )
    assert max(seconds) < 2


@pytest.mark.slow
def test_a_long_answer_does_not_freeze_the_page(page):
    text = (
        "\n\n".join(f"Paragraph {n} with **words** and `code`." for n in range(4000)) + "\n\n```py\n" + "x = 1\n" * 9000
    )
    stream(page, text)
    page.evaluate("""() => {
        window.longest = 0; let last = performance.now();
        setInterval(() => { longest = Math.max(longest, performance.now() - last); last = performance.now(); }, 10);
    }""")
    ask(page, "long")
    answered(page)
    expect(page.locator(".markdown")).to_contain_text("Paragraph 3999")
    assert page.evaluate("window.longest") < 3000


def test_a_setting_that_is_emptied_is_the_models_own_again(page, model):
    model.says = ["One.", "Two.", "Three."]
    sent = sent_by(page)
    for number, value in enumerate(("0", "", None)):
        page.click("#settings-button")
        if value is None:
            page.fill("[name=top_k]", "5")
            page.click("#forget")
        else:
            page.fill("[name=temperature]", value)
        page.press("[name=seed]", "Enter")
        ask(page, f"question {number}")
        answered(page, number + 1)
    given = [("temperature" in body, "top_k" in body) for body in sent]
    assert given == [(True, False), (False, False), (False, False)]


def test_errors_of_the_server_are_shown_as_it_says_them(page):
    page.click("#settings-button")
    page.fill("[name=max_tokens]", "100000000")
    page.click("#settings button[value=ok]")
    ask(page, "x" * 5000)
    expect(page.locator(".fault.box")).to_contain_text("maximum context length")
    expect(page.locator(".fault.box")).to_contain_text("Shorten the message")
    shows(page, "x" * 5000)


def test_turns_that_no_longer_fit_are_left_out_and_told(page, model):
    model.says = ["One.", "Two."]
    sent = sent_by(page)
    ask(page, "a" * 1200)
    answered(page)
    ask(page, "b" * 1200)
    answered(page, 2)
    expect(page.locator(".notes").last).to_contain_text("oldest turns (1)")
    assert [len(body["messages"]) for body in sent] == [1, 3, 1]


@pytest.mark.slow
def test_a_long_conversation_is_not_sent_hundreds_of_times(page, model, tmp_path):
    said = [
        {"id": str(n), "parent": str(n - 1) if n else None, "role": ("user", "assistant")[n % 2], "created": n + 1}
        for n in range(400)
    ]
    whole = {"id": "long", "title": "long", "messages": [{**each, "content": "a cat " * 5} for each in said]}
    file = tmp_path / "long.json"
    file.write_text(json.dumps({"format": "minimind-conversations", "version": 1, "conversations": [whole]}), "utf-8")
    page.set_input_files("#file", file)
    page.locator("#list .title").click()
    expect(page.locator("article.user")).to_have_count(200)
    model.says = ["Yes."]
    sent = sent_by(page)
    ask(page, "still there?")
    answered(page, 201)
    expect(page.locator(".markdown").last).to_have_text("Yes.")
    left = 201 - sum(message["role"] == "user" for message in sent[-1]["messages"])
    expect(page.locator(".notes").last).to_contain_text(f"oldest turns ({left})")
    assert len(sent) < 25
