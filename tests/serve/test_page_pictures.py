"""Pictures in the chat page, in a real browser: what is answered is what the engine makes of that very picture."""

import base64
import io
import json

import pytest

from tests.serve.conftest import running
from tests.serve.page_helpers import answered, ask, opened, sent_by, sync_api
from tests.serve.seeing import CONTEXT, Image, data_url, drawing, encoded

expect = sync_api.expect
A, B = (encoded(drawing(seed)) for seed in (1, 2))
WORDS = "what is it?"
MOST = 3  # pictures that the server looks at in a request

STORED = """() => new Promise((resolve) => {
    indexedDB.open("minimind", 1).onsuccess = ({ target }) => {
        target.result.transaction("messages").objectStore("messages").getAll().onsuccess = ({ target }) =>
            resolve(target.result.sort((a, b) => a.created - b.created));
    };
})"""
DROP = """([bytes, name]) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    const drop = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer });
    document.querySelector("#thread").dispatchEvent(drop);
    return drop.defaultPrevented;
}"""
COPY = """(url) => fetch(url).then((found) => found.blob())
    .then((blob) => navigator.clipboard.write([new ClipboardItem({ [blob.type]: blob })]))"""


@pytest.fixture(scope="module")
def address(seeing, folder):
    settings = {"slots": 1, "context": CONTEXT, "max_images": MOST, "web": True}
    with running(model=(f"seeing={seeing}", f"blind={folder}"), **settings) as server:
        yield server.root


@pytest.fixture
def page(browser, address):
    """Whose answers are greedy and short."""
    with opened(browser, address, wait=False, permissions=["clipboard-read", "clipboard-write"]) as page:
        expect(page.locator("#model option")).to_have_count(2)
        page.click("#settings-button")
        page.fill("[name=temperature]", "0")
        page.fill("[name=max_tokens]", "12")
        page.click("#settings button[value=ok]")
        yield page


def choose(page, *contents, count=None):
    page.set_input_files(
        "#pictures", [{"name": "shed.png", "mimeType": "image/png", "buffer": each} for each in contents]
    )
    attached(page, len(contents) if count is None else count)


def attached(page, count):
    expect(page.locator("#attached img")).to_have_count(count)


def answers(page):
    """In the order in which they were made, all versions."""
    return [message["content"] for message in page.evaluate(STORED) if message["role"] == "assistant"]


def sent_picture(body, message=-1):
    """The content of the first picture of a message that the page has sent."""
    url = body["messages"][message]["content"][0]["image_url"]["url"]
    return base64.b64decode(url.partition("base64,")[2])


def test_pictures_are_chosen_pasted_and_dropped(page, engine):
    expect(page.get_by_role("button", name="Picture", exact=True)).to_be_visible()
    choose(page, A)
    ask(page, WORDS)
    answered(page)
    attached(page, 0)
    page.route("**/copied", lambda route: route.fulfill(body=B, content_type="image/png"))
    page.evaluate(COPY, "copied")
    page.press("#text", "Control+V")
    attached(page, 1)
    assert page.evaluate(DROP, [list(A), "dropped.png"])
    attached(page, 2)
    page.fill("#text", "")
    page.press("#text", "Enter")  # pictures need no words
    answered(page, 2)
    first = engine.say([A, "\n" + WORDS])
    assert answers(page) == [first, engine.say([A, "\n" + WORDS], [first], [B, "\n", A, "\n"])]
    assert page.locator("#list .title").all_inner_texts() == [WORDS]


def test_a_picture_is_shown_with_its_name_and_removed_by_the_keyboard(page):
    choose(page, A, B)
    expect(page.locator("#status")).to_have_text("Picture added: shed.png")
    expect(page.get_by_role("img", name="Picture 2: shed.png")).to_be_visible()
    page.get_by_role("button", name="Remove picture 2: shed.png").focus()
    page.keyboard.press("Enter")
    attached(page, 1)
    expect(page.locator("#text")).to_be_focused()
    sent = sent_by(page)
    ask(page, WORDS)
    answered(page)
    assert sent_picture(sent[0]) == A and len(sent[0]["messages"][-1]["content"]) == 3
    shown = page.get_by_role("article", name="You").get_by_role("img", name="Picture 1: shed.png")
    expect(shown).to_be_visible()
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 40


def test_another_answer_and_an_edited_question_keep_the_picture(page, engine):
    sent = sent_by(page)
    choose(page, A)
    ask(page, WORDS)
    answered(page)
    page.get_by_role("button", name="Another answer").click()
    expect(page.locator("article.assistant")).to_contain_text("2/2")
    page.reload()
    answered(page)
    page.get_by_role("button", name="Edit").click()
    page.fill(".question textarea", "and now?")
    expect(page.locator(".question img")).to_have_count(1)
    page.press(".question textarea", "Enter")
    expect(page.locator("article.user")).to_contain_text("2/2")
    answered(page)
    first = engine.say([A, "\n" + WORDS])
    assert answers(page) == [first, first, engine.say([A, "\nand now?"])]
    assert [sent_picture(body) for body in sent] == [A, A, A]


def test_a_large_picture_is_made_small_in_the_browser_and_waited_for(page, engine):
    large = drawing(3, 3000, 2000).convert("RGBA")
    large.putalpha(Image.linear_gradient("L").resize(large.size))
    sent = sent_by(page)
    page.fill("#text", WORDS)
    page.set_input_files("#pictures", {"name": "shed.png", "mimeType": "image/png", "buffer": encoded(large)})
    page.press("#text", "Enter")  # at once
    answered(page)
    content = sent_picture(sent[0])
    small = Image.open(io.BytesIO(content))
    assert (small.format, small.size) == ("JPEG", (1024, 683)) and len(content) < 200_000
    assert small.crop((0, 0, 1024, 4)).convert("L").getextrema()[0] > 230  # transparent there: white
    assert answers(page) == [engine.say([content, "\n" + WORDS])]


def test_what_is_no_picture_and_what_is_too_much_are_told(page):
    page.set_input_files("#pictures", {"name": "a.png", "mimeType": "image/png", "buffer": b"<svg onload=alert(1)>"})
    expect(page.locator("#banner")).to_contain_text("a.png is no picture that this browser can open.")
    choose(page, *[A] * 9, count=8)
    expect(page.locator("#banner")).to_contain_text("A message has at most 8 pictures.")
    ask(page, WORDS)
    expect(page.locator(".fault.box")).to_contain_text(f"8 pictures; this server looks at {MOST}")


def test_the_oldest_pictures_are_left_out_where_there_are_too_many(page, engine):
    for turn, contents in enumerate([(A, B), (B, A)], 1):
        choose(page, *contents)
        ask(page, WORDS)
        answered(page, turn)
    expect(page.locator("article.assistant").last).to_contain_text("The oldest turns (1) were left out")
    assert answers(page)[1] == engine.say([B, "\n", A, "\n" + WORDS])


def test_a_blind_model_is_shown_none(page):
    choose(page, A)
    ask(page, WORDS)
    answered(page)
    page.select_option("#model", "blind")
    expect(page.locator("#picture")).to_be_hidden()
    assert page.evaluate(DROP, [list(A), "dropped.png"])
    expect(page.locator("#banner")).to_contain_text("reads words alone")
    attached(page, 0)
    ask(page, "and now?")
    fault = page.locator(".fault.box")
    expect(fault).to_contain_text("messages[0].content[0] is a picture")
    expect(fault).to_contain_text("Choose another model")
    page.select_option("#model", "seeing")
    fault.get_by_role("button").click()
    answered(page, 2)


@pytest.mark.slow
def test_pictures_are_exported_and_imported_as_far_as_they_are_ours(page, browser, address, tmp_path):
    choose(page, A)
    ask(page, WORDS)
    answered(page)
    with page.expect_download() as download:
        page.click("#export")
    whole = json.loads(download.value.path().read_text())
    question = whole["conversations"][0]["messages"][0]
    assert question["pictures"] == [{"url": data_url(A), "name": "shed.png"}]
    svg = data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")
    others = [{"url": url} for url in ("http://127.0.0.1:9/x.png", "javascript:alert(1)", svg, "data:text/html,x", 5)]
    question["pictures"] = [*others, None, "x", *question["pictures"]]
    (tmp_path / "changed.json").write_text(json.dumps(whole))
    with opened(browser, address, wait=False) as other:
        elsewhere = []
        other.on("request", lambda request: elsewhere.append(request.url) if ":9/" in request.url else None)
        other.set_input_files("#file", tmp_path / "changed.json")
        other.locator("#list .title").click()
        expect(other.locator(".question img")).to_have_count(1)
        expect(other.locator(".question img")).to_have_attribute("src", data_url(A))
        assert not elsewhere
