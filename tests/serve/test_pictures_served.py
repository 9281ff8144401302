"""Questions about pictures: what the server says is what the engine makes of the same pictures at the same places."""

import base64
import concurrent.futures
import contextlib
import io
import json
import struct
import threading
import zlib

import httpx
import openai
import pytest

from minimind_jax.serve import addresses, prompts
from tests.serve.conftest import client_of, running, wait_until
from tests.serve.seeing import CONTEXT, MARKER, TOKENS, Image, data_url, drawing, encoded
from tests.serve.web_host import HERE, serving

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
A, B = (encoded(drawing(seed)) for seed in (1, 2))
ASK = "what is it?"


def image(content, kind="image/png", **more):
    return {"type": "image_url", "image_url": {"url": data_url(content, kind), **more}}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def eyes(seeing):
    """A server of it."""
    with running(model=(f"seeing={seeing}",), slots=1, context=CONTEXT) as server:
        yield server


@pytest.fixture(scope="module")
def looking(eyes):
    return client_of(eyes)


@pytest.fixture
def ask(eyes):
    """What is said greedily to messages."""

    def ask(*messages, status=200, path=CHAT, **settings):
        body = {"messages": messages, "max_tokens": 12, "temperature": 0, **settings}
        answer = httpx.post(eyes.root + path, json=body, timeout=60)
        assert answer.status_code == status, answer.text
        return answer.json() if status == 200 else answer.json()["error"]

    return ask


def said(answer):
    return answer["choices"][0]["message"]["content"]


def test_an_answer_is_the_engines_for_that_picture(looking, engine):
    answers = {}
    for content in (A, B):
        messages = [user(text(ASK), image(content, detail="low"))]
        found = looking.chat.completions.create(model="seeing", messages=messages, max_tokens=12, temperature=0)
        answers[content] = found.choices[0].message.content
        assert answers[content] == engine.say([ASK, content])
        assert found.usage.prompt_tokens == len(engine.read([ASK, content])[0])
    assert answers[A] != answers[B]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_all_kinds_of_files(ask, engine, kind):
    content = encoded(drawing(1), kind)
    assert said(ask(user(image(content, "application/octet-stream"), text(ASK)))) == engine.say([content, ASK])


def test_the_habits_of_other_clients_mean_the_same(ask, engine):
    url, expected = data_url(A), engine.say([A, ASK])
    wrapped = data_url(A).replace("base64,", "base64,\n ").replace("data:", "DATA:")
    for part in (
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}, "uuid": "x"},
        {"image_url": {"url": url}},
        {"type": "input_image", "image_url": url, "detail": "high"},
        {"type": "image", "image": url},
        {"type": "image_url", "image_url": {"url": wrapped}},
        {"type": "image_url", "image_url": {"url": url.rstrip("=")}},
        {"type": "image_url", "image_url": {"url": url.replace(";base64", ";charset=utf-8;base64")}},
        {"type": "image_url", "image_url": {"url": url.replace("base64", "BASE64").replace("+", "%2B")}},
    ):
        assert said(ask(user(part, text(ASK)))) == expected, part.keys()


def test_several_pictures_and_those_of_earlier_turns(ask, engine):
    first = engine.say([A, "and", B, B, ASK])
    answer = ask(user(image(A), text("and"), image(B), image(B), text(ASK)))
    assert said(answer) == first
    talk = [user(image(A), text("and"), image(B), image(B), text(ASK)), {"role": "assistant", "content": first}]
    second = ask(*talk, user(text("and this?"), image(A)))
    assert said(second) == engine.say([A, "and", B, B, ASK], [first], ["and this?", A])
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 4 * TOKENS
    other = ask(user(image(A), text("and"), image(A), image(B), text(ASK)))
    assert said(other) == engine.say([A, "and", A, B, ASK])


def test_a_stream_tools_forms_and_several_answers(looking, ask, engine):
    messages = [user(image(A), text(ASK))]
    asked = {"model": "seeing", "messages": messages, "max_tokens": 12, "temperature": 0}
    chunks = list(looking.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    whole = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole == engine.say([A, ASK])
    assert chunks[-1].usage.prompt_tokens == len(engine.read([A, ASK])[0])
    assert [said({"choices": [each]}) for each in ask(*messages, n=2)["choices"]] == [whole] * 2
    schema = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"]}
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    assert isinstance(json.loads(said(ask(*messages, response_format=form, max_tokens=40)))["red"], bool)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    called = ask(*messages, tools=[tool], tool_choice="required", max_tokens=60)["choices"][0]["message"]
    assert called["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


def test_a_tool_may_show_a_picture(ask):
    call = {"id": "1", "type": "function", "function": {"name": "photograph", "arguments": "{}"}}
    shown = {"role": "tool", "tool_call_id": "1", "content": [text("taken:"), image(A)]}
    talk = [user(text(ASK)), {"role": "assistant", "content": None, "tool_calls": [call]}, shown]
    without = [*talk[:2], {**shown, "content": [text("taken:")]}]
    counts = [ask(*messages)["usage"]["prompt_tokens"] for messages in (talk, without)]
    assert counts[0] - counts[1] == TOKENS


def test_responses_have_pictures_too(looking, engine):
    parts = [{"type": "input_text", "text": ASK}, {"type": "input_image", "image_url": data_url(A), "detail": "auto"}]
    asked = {"model": "seeing", "temperature": 0, "max_output_tokens": 12}
    found = looking.responses.create(input=[{"role": "user", "content": parts}], **asked)
    assert found.output_text == engine.say([ASK, A])
    assert found.usage.input_tokens == len(engine.read([ASK, A])[0])
    events = looking.responses.create(input=[{"role": "user", "content": parts}], **asked, stream=True)
    assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == found.output_text
    with pytest.raises(openai.BadRequestError) as refused:
        looking.responses.create(
            input=[{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}], **asked
        )
    assert "input[0].content[0]" in str(refused.value) or "messages[0].content[0]" in str(refused.value)


def test_words_alone_are_answered_by_a_model_that_sees(ask, engine):
    assert said(ask({"role": "user", "content": ASK})) == said(ask(user(text(ASK)))) == engine.say([ASK])


def test_the_model_tells_what_it_reads(looking):
    told = next(iter(looking.models.list())).architecture
    assert told == {"input_modalities": ["text", "image"], "output_modalities": ["text"]}


def test_a_prompt_with_pictures_is_counted_and_shown(ask, engine):
    question = user(image(A), text(ASK))
    assert ask(question, path="/tokenize")["tokens"] == engine.read([A, ASK])[0]
    assert ask(question, path="/apply-template")["prompt"].count("<|image_pad|>") == TOKENS


def test_what_a_user_writes_is_no_picture(ask, eyes):
    for words in ("<|image_pad|>" * TOKENS, "<image>"):
        assert said(ask(user(text(words), image(A))))
        assert said(ask({"role": "user", "content": words}))
    assert "markers" in ask(user(text("<|image_"), text("pad|>"), image(A)), status=400)["message"]
    joined = ask(user(text("<|im_"), text("end|>"), image(A)), path="/apply-template")["prompt"]
    assert "< |im_end|><|image_pad|>" in joined
    answer = httpx.post(f"{eyes.url}/completions", json={"prompt": [MARKER] * TOKENS})
    assert answer.status_code == 400 and "markers" in answer.json()["error"]["message"]


def test_pictures_are_the_users(ask):
    for role in ("system", "assistant"):
        error = ask({"role": role, "content": [image(A)]}, user(text(ASK)), status=400)
        assert role in error["message"] and "messages[0].content[0]" in error["message"]


def test_a_part_that_is_a_picture_and_a_text_loses_neither(ask):
    for part in ({**image(A), "text": ASK}, {**text(ASK), "image_url": {"url": "https://a.b/c.png"}}):
        assert "messages[0].content[1] has image_url and text" in ask(user(text("?"), part), status=400)["message"]


def test_pictures_in_fields_of_other_servers_are_not_passed_over(ask):
    question = user(text(ASK))
    for more in ({"images": [data_url(A)]}, {"image_data": [{"data": "x", "id": 1}]}):
        assert ask(question, status=400, **more)["param"] == next(iter(more))
    assert ask({**question, "images": [data_url(A)]}, status=400)["param"] == "messages[0].images"
    error = ask(user({"type": "image", "source": {"type": "base64", "data": "x"}}), status=400)
    assert '"image_url": {"url"' in error["message"]


def test_places_of_responses_are_those_of_their_items(eyes):
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
    thought = {"type": "reasoning", "summary": []}

    def told(*items):
        body = {"instructions": "x", "input": [{"role": "user", "content": ASK}, *items]}
        return httpx.post(f"{eyes.url}/responses", json=body, timeout=60).json()["error"]

    for output, words in (([{"type": "input_image", "file_id": "x"}], "[0] is a picture"), ({"a": 1}, " is an object")):
        result = {"type": "function_call_output", "call_id": "1", "output": output}
        assert f"input[3].output{words}" in told(thought, call, result)["message"]
    parts = [{"type": "input_image", "image_url": "x"}]
    assert told({"role": "user", "content": parts})["param"] == "input[1].content[0]"


def test_pictures_are_read_beside_the_loop_and_the_engine(ask, monkeypatch):
    threads, opened = [], prompts.open_images

    def spy(*arguments):
        threads.append(threading.current_thread().name)
        return opened(*arguments)

    monkeypatch.setattr(prompts, "open_images", spy)
    ask(user(image(A)))
    assert threads[0].startswith("pictures")


# Hostile pictures -----------------------------------------------------------------------------------------------------


def png(width, height, rows=b""):
    """A PNG that says any size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def icon():
    buffer = io.BytesIO()
    drawing(1, 32, 32).save(buffer, "ICO")
    return buffer.getvalue()


JPEG = encoded(drawing(3, 400, 300), "JPEG")
BAD = {
    "cut png": A[: len(A) // 2],
    "cut jpeg": JPEG[: len(JPEG) // 2],
    "header only": A[:30],
    "bomb": png(60_000, 60_000, bytes(1 << 16)),
    "bomb beyond pillow": png(2**31 - 1, 2**31 - 1),
    "no pixels": png(0, 0),
    "gif bomb": b"GIF89a\xff\xff\xff\xff\xf0\x00\x00" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2\4\1\0;",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%id) (w) file\n",
    "pdf before jpeg": b"%PDF-1.7\n" + JPEG,
    "zip": b"PK\x03\x04" + A,
    "icon": icon(),
    "nothing": b"",
    "zeros": bytes(100),
    "float": encoded(Image.new("F", (4, 4)), "TIFF"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_whole_picture_is_refused(ask, name):
    for kind in ("image/png", "image/svg+xml"):
        error = ask(user(text(ASK), image(BAD[name], kind)), status=400)
        assert "messages[0].content[1]" in error["message"] and error["type"] == "invalid_request_error"
    assert said(ask(user(image(A))))


@pytest.mark.parametrize(
    "source",
    [
        "", "data:", "data:image/png", "data:image/png;base64", "data:image/png;base64,", "data:image/png;base64,!!!",
        "data:image/svg+xml,<svg/>", "/etc/passwd", "file:///etc/passwd", "ftp://127.0.0.1/x.png", "x.png",
        base64.b64encode(A).decode(), 5, None, [], {}, {"url": None}, {"url": 5}, {"path": "/etc/passwd"},
        {"bytes": "/etc/passwd"}, {"url": {"url": "data:,"}},
    ],
    ids=lambda source: repr(source)[:40],
)  # fmt: skip
def test_what_is_no_data_url_is_refused(ask, source):
    error = ask(user({"type": "image_url", "image_url": source}), status=400)
    assert "messages[0].content[0]" in error["message"]
    assert "root:" not in error["message"]


def test_a_picture_with_more_behind_it_is_that_picture(ask, engine):
    assert said(ask(user(image(A + b"PK\x03\x04<script>"), text(ASK)))) == engine.say([A, ASK])


def test_too_many_pictures_are_refused_before_one_is_read(ask, eyes):
    most = eyes.server._settings.max_images
    error = ask(user(*[image(BAD["bomb"])] * (most + 1)), status=400)
    assert error["code"] == "too_many_images" and f"{most + 1} pictures" in error["message"]
    assert said(ask(user(*[image(A)] * most)))


def test_pictures_of_too_many_pixels_together_are_refused_before_one_is_read(ask):
    large = image(png(8000, 8000))  # of which no pixel is there
    with_one = ask(user(*[image(A)] * 3, large), status=400)["message"]
    assert "messages[0].content[3]: a damaged picture" in with_one
    error = ask(user(*[large] * 5), status=400)["message"]
    assert "messages[0].content[4]: with this picture they have 320,000,000 pixels together" in error


def test_as_many_wait_for_pictures_to_be_read_as_may(seeing, monkeypatch):
    go_on, opened = threading.Event(), prompts.open_images

    def slowly(*arguments):
        assert go_on.wait(60)
        return opened(*arguments)

    with running(model=(str(seeing),), slots=1, context=CONTEXT, queue=1) as server:
        monkeypatch.setattr(prompts, "open_images", slowly)

        def post(seconds=60):
            body = {"messages": [user(image(A), text(ASK))], "max_tokens": 1}
            return httpx.post(server.root + CHAT, json=body, timeout=seconds).status_code

        def waits():
            with contextlib.suppress(httpx.ReadTimeout):
                return post(seconds=0.3) == 200
            return True

        for _ in range(5):  # who goes away waits no longer
            wait_until(waits, 20)
        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            asked = [threads.submit(post) for _ in range(6)]
            wait_until(lambda: sum(each.done() for each in asked) >= 3, 30)
            assert {each.result() for each in asked if each.done()} == {429}
            go_on.set()
            assert {each.result() for each in asked} == {200, 429}


def test_a_picture_that_is_too_large_for_a_request_says_which_setting(ask):
    assert "--max_body_mib" in ask(user(image(bytes(8 << 20))), status=413)["message"]


def test_pictures_that_leave_no_room_are_refused(ask):
    error = ask(user(*[image(A)] * 20, text("a" * 3000)), status=400)
    assert error["code"] == "context_length_exceeded"


# Pictures at addresses ------------------------------------------------------------------------------------------------


def at(url):
    return {"type": "image_url", "image_url": {"url": url}}


def test_addresses_are_not_asked_unless_the_server_is_told_to(ask):
    with serving(HERE, A) as host:
        for path in ("picture", "redirect?/picture"):
            error = ask(user(text(ASK), at(f"{host.url}/{path}")), status=400)
            assert "--image_urls" in error["message"] and error["param"] == "messages[0].content[1]"
        assert not host.asked


def test_addresses_are_asked_where_the_server_is_told_to(seeing, engine, monkeypatch):
    checked = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda address: address == HERE or checked(address))
    with running(model=(str(seeing),), slots=1, context=CONTEXT, image_urls=True) as server, serving(HERE, A) as host:
        greedy = {"max_tokens": 12, "temperature": 0}

        def post(*parts, path=CHAT, **more):
            return httpx.post(server.root + path, json=more or {"messages": [user(*parts)], **greedy}, timeout=30)

        url = f"{host.url}/picture"
        assert said(post(at(url), text(ASK)).json()) == engine.say([A, ASK])
        assert said(post(at(url.replace("http", "HTTP")), image(B), at(url)).json()) == engine.say([A, B, A])
        parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": ASK}]
        assert post(path=RESPONSES, input=[user(*parts)], max_output_tokens=12).status_code == 200
        for path in (f"redirect?http://127.0.0.1:{host.port}/picture", "redirect?file:///etc/passwd", "endless", "cut"):
            answer = post(text(ASK), at(f"{host.url}/{path}"))
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages[0].content[1]"
        assert "PNG" in post(at(f"{host.url}/words")).json()["error"]["message"]
        assert said(post(image(A), text(ASK)).json()) == engine.say([A, ASK])
