"""The chat page in a real browser, beside a server that wants a key, is killed and comes back."""

import pytest

from tests.serve.page_helpers import Process, answered, ask, free_port, opened, save_talker, sync_api, talk_of, unending

expect = sync_api.expect


@pytest.mark.slow
def test_key_and_a_server_that_is_killed(browser, compilation_cache, tmp_path, request):
    talker = save_talker(tmp_path, context=2048)

    def start(port):
        server = Process(str(talker), port, key="key of mine")
        request.addfinalizer(server.kill)
        return server

    port = free_port()
    server = start(port)
    with opened(browser, server.url, wait=False) as page:
        expect(page.locator("#question-text")).to_contain_text("API key")
        page.fill("#question-input", "wrong")
        page.click("#question-ok")
        expect(page.locator("#question-text")).to_contain_text("not one of this server's")
        page.fill("#question-input", "key of mine")
        page.press("#question-input", "Enter")
        expect(page.locator("#model option")).to_have_count(1)
        unending(page)
        ask(page, "say much")
        expect(page.locator(".answer .markdown")).not_to_be_empty()
        server.kill()
        answered(page)
        expect(page.locator(".notes")).to_contain_text("What came is kept")
        kept = talk_of(page)
        ask(page, "still there?")
        expect(page.locator(".fault.box")).to_contain_text("minimind serve")
        page.unroute_all()
        start(port)
        page.get_by_role("button", name="Try again").click()
        answered(page, 2)
        page.reload()
        answered(page, 2)
        assert talk_of(page)[:2] == kept
