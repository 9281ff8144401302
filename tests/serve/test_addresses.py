"""Pictures at addresses: a real HTTP server that does what hosts on the web may do.

It listens at 127.0.0.2, which alone of all local addresses is made to pass for public; all else is as it is.
"""

import asyncio
import socket
import ssl
import time
from pathlib import Path

import pytest

from minimind_jax.errors import UserError
from minimind_jax.serve import addresses
from minimind_jax.serve.errors import ApiError
from tests.serve.web_host import CONTENT, HERE, serving

CERTIFICATE = Path(__file__).parents[1] / "fixtures" / "tls.pem"  # by openssl req -x509, valid for a hundred years
MOST = 1 << 20


@pytest.fixture(scope="module")
def hosts():
    """Servers at two local addresses."""
    with serving(HERE) as one, serving("127.0.0.1") as other:
        yield one, other


@pytest.fixture
def address(hosts, monkeypatch):
    checked = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda address: address == HERE or checked(address))
    for host in hosts:
        host.asked.clear()
    return hosts[0].url


def download(*urls, most=MOST):
    return asyncio.run(addresses.download({url: f"picture {n}" for n, url in enumerate(urls)}, most))


def refusal(*urls, most=MOST):
    with pytest.raises(ApiError) as found:
        download(*urls, most=most)
    assert found.value.status_code == 400 and not isinstance(found.value, UserError)
    return str(found.value.detail)


def test_content_comes_whatever_it_is_said_to_be(address):
    urls = f"{address}/picture", f"{address}/redirect?/redirect?picture", f"{address}/compressed?a=%20b#c"
    assert download(*urls) == dict.fromkeys(urls, CONTENT)


def test_names_and_paths_of_all_languages(address, hosts, monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: resolve(HERE, *rest, **more))
    url = f"http://bücher.例え:{hosts[0].port}/names"
    assert download(url) == {url: CONTENT}
    assert hosts[0].asked[-1] == "/picture?%E5%BA%84"
    assert hosts[0].host_header == f"xn--bcher-kva.xn--r8jz45g:{hosts[0].port}"


def test_an_address_without_a_host():
    assert "and a host" in refusal("http://") and "and a host" in refusal("https:///picture")


def test_proxies_of_the_environment_are_not_asked(address, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(download(f"{address}/picture")) == 1


@pytest.mark.parametrize(
    "target, words",
    [
        ("http://169.254.169.254/latest/meta-data/", "public internet"),
        ("http://localhost:{port}/picture", "public internet"),
        ("http://127.0.0.1:{port}/picture", "public internet"),
        ("http://2130706433:{port}/picture", "public internet"),
        ("http://0x7f.1:{port}/picture", "public internet"),
        ("http://0:{port}/picture", "public internet"),
        ("http://[::1]:{port}/picture", "public internet"),
        ("http://[::ffff:127.0.0.1]:{port}/picture", "public internet"),
        ("http://[64:ff9b::7f00:1]:{port}/picture", "public internet"),
        ("https://10.0.0.1/", "public internet"),
        ("//192.168.0.1/", "public internet"),
        ("file:///etc/passwd", "http:// or https://"),
        ("ftp://{here}/picture", "http:// or https://"),
        ("gopher://{here}/picture", "http:// or https://"),
        ("data:image/png;base64,AAAA", "http:// or https://"),
        ("http://user:secret@{here}:{port}/picture", "http:// or https://"),
        ("http://[", "cannot be fetched"),
        ("http://{here}:99999/", "cannot be fetched"),
        ("http://no.such.host.invalid/", "cannot be fetched"),
        ("http://a..b/", "cannot be fetched"),
    ],
)
def test_what_may_not_be_asked_is_not_asked_first_or_by_a_redirect(address, hosts, target, words):
    target = target.format(port=hosts[1].port, here=f"{HERE}:{hosts[0].port}")
    if "//" in target and not target.startswith("//"):
        assert words in refusal(target)
    assert words in refusal(f"{address}/redirect?{target}")
    assert not hosts[1].asked and all(path.startswith("/redirect") for path in hosts[0].asked)


@pytest.mark.parametrize(
    "path, words",
    [
        ("again", f"more than {addresses.MOST_REDIRECTS} redirects"),
        ("nowhere", "redirects"),
        ("huge", "bytes"),
        ("endless", "bytes"),
        ("bits", "too many pieces"),
        ("continue", "too many pieces"),
        ("headers", "cannot be fetched"),
        ("cut", "cannot be fetched"),
        ("nonsense", "cannot be fetched"),
        ("redirect?/missing", "cannot be fetched"),
    ],
)
def test_hosts_that_do_as_they_like(address, path, words):
    assert words in refusal(f"{address}/{path}")


@pytest.mark.parametrize("path", ["drip", "headers?0.05"])
def test_what_comes_too_slowly_ends_in_time(address, monkeypatch, path):
    monkeypatch.setattr(addresses, "SECONDS", 0.4)
    begin = time.monotonic()
    assert "within 0.4 seconds" in refusal(f"{address}/{path}", f"{address}/picture")
    assert time.monotonic() - begin < 2


def test_a_host_that_takes_connections_and_says_nothing(monkeypatch, address):
    monkeypatch.setattr(addresses, "SECONDS", 0.3)
    with socket.create_server((HERE, 0)) as silent:
        assert "within 0.3 seconds" in refusal(f"http://{HERE}:{silent.getsockname()[1]}/")


def test_a_name_server_that_does_not_answer_ends_in_time(monkeypatch):
    monkeypatch.setattr(addresses, "SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(1.5))
    begin = time.monotonic()
    assert "within 0.2 seconds" in refusal("http://slow.example/")
    assert time.monotonic() - begin < 1.2


def test_all_pictures_together_are_bounded(address):
    urls = [f"{address}/picture?{n}" for n in range(4)]
    assert len(download(*urls, most=4 * len(CONTENT))) == 4
    assert "together" in refusal(*urls, most=4 * len(CONTENT) - 1)


def test_a_name_is_resolved_once_and_its_checked_address_asked(address, hosts, monkeypatch):
    """A name that is a public address when it is checked, and this machine's own a moment later."""
    resolve, answers = socket.getaddrinfo, iter([HERE, "127.0.0.1"])

    def rebinding(host, port, *arguments, **options):
        name = next(answers) if host == "rebinding.example" else host
        return resolve(name, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    url = f"http://rebinding.example:{hosts[0].port}/picture"
    assert download(url) == {url: CONTENT}
    assert hosts[0].asked and not hosts[1].asked
    assert "public internet" in refusal(url)


def test_a_name_with_a_public_and_a_private_address_is_not_asked(address, hosts, monkeypatch):
    resolve = socket.getaddrinfo

    def both(host, port, *arguments, **options):
        names = (HERE, "127.0.0.1") if host == "both.example" else (host,)
        return [each for name in names for each in resolve(name, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert "public internet" in refusal(f"http://both.example:{hosts[0].port}/picture")
    assert not hosts[0].asked


def test_an_address_that_does_not_answer_is_followed_by_the_next(address, hosts, monkeypatch):
    resolve = socket.getaddrinfo

    def several(host, port, *arguments, **options):
        names = ("127.0.0.3", HERE) if host == "several.example" else (host,)
        return [each for name in names for each in resolve(name, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", several)
    monkeypatch.setattr(addresses, "is_public", {HERE, "127.0.0.3"}.__contains__)
    url = f"http://several.example:{hosts[0].port}/picture"
    assert download(url) == {url: CONTENT}


def test_the_name_is_what_a_certificate_must_be_for(hosts, address, monkeypatch):
    """The certificate is for tls.example, and its own authority."""
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: resolve(HERE, *rest, **more))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    with serving(HERE, context=context) as host:
        url = f"https://tls.example:{host.port}/picture"
        assert download(url) == {url: CONTENT}
        assert "SSLCertVerificationError" in refusal(f"https://other.example:{host.port}/picture")
        monkeypatch.delenv("SSL_CERT_FILE")
        assert "SSLCertVerificationError" in refusal(url)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2001:4860:4860::8888"])
def test_public_addresses(address):
    assert addresses.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "169.254.169.254", "172.16.0.1"),
        *("192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "224.0.0.1", "239.1.1.1"),
        *("240.0.0.1", "255.255.255.255", "168.63.129.16"),
        *("::", "::1", "::127.0.0.1", "::ffff:8.8.8.8", "::ffff:127.0.0.1", "64:ff9b::808:808", "64:ff9b:1::1"),
        *("fe80::1", "fe80::1%lo", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1"),
        *("2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "5f00::1"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not addresses.is_public(address)
