"""Pictures at addresses of the web, fetched for a request where the settings allow it.

Who names an address has this machine connect to it, which may reach what he cannot. So connections are made to
addresses of the public internet alone: of each URL and each redirect the host is resolved once, what comes out is
checked, and the connection goes to that very address, by no proxy.
"""

import asyncio
import contextlib
import functools
import ipaddress
import socket
import ssl
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11
import psutil

from minimind_jax import __version__
from minimind_jax.serve.errors import refused

SECONDS = 10.0  # for all pictures of a request to arrive
MOST_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_UNICAST = ipaddress.ip_network("2000::/3")  # outside are IPv6's local addresses and IPv4's within IPv6, as of NAT64
# What Python's own list lacks in some versions, or altogether: protocols' and documentation's, Azure's metadata.
_CLOSED = [
    ipaddress.ip_network(each)
    for each in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "3fff::/20")
]

_RESOLVERS = ThreadPoolExecutor(4, "names")  # of their own: who asks for names that nobody answers holds up no others


async def download(urls: Mapping[str, str], most_bytes: int) -> dict[str, bytes]:
    """What is at each URL, at the same time. urls: with the field that names each, for messages. most_bytes: of all
    together. Raises ApiError."""
    room = _Room(most_bytes)
    try:
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            tasks = {url: group.create_task(_follow(url, where, room)) for url, where in urls.items()}
    except TimeoutError:
        raise refused(f"the pictures that the request names have not arrived within {SECONDS:g} seconds") from None
    except ExceptionGroup as faults:
        raise faults.exceptions[0] from None
    return {url: task.result() for url, task in tasks.items()}


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and none that is this machine's, a private network's or a group's;
    IPv4 addresses within IPv6 ones (mapped, NAT64, 6to4, Teredo) are not."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6 and (ip not in _UNICAST or ip.sixtofour):
        return False
    own = {each.address for addresses in psutil.net_if_addrs().values() for each in addresses}
    is_closed = ip.is_multicast or str(ip) in own or any(ip in network for network in _CLOSED)
    return ip.is_global and not is_closed


class _Room:
    """Bytes that may still come, and in how many pieces: each takes a while, and others wait for the loop."""

    def __init__(self, most: int):
        self._most = self._left = most
        self._pieces = 1000 + most // 1000

    def take(self, count: int, where: str) -> None:
        self._left, self._pieces = self._left - count, self._pieces - 1
        if self._pieces < 0:
            raise refused(f"{where}: the pictures at addresses come in too many pieces", where)
        if self._left < 0:
            raise refused(f"{where}: the pictures at addresses have more than {self._most:,} bytes together", where)


async def _follow(url: str, where: str, room: _Room) -> bytes:
    """The content at a URL, or at where it redirects to."""
    try:
        for _ in range(MOST_REDIRECTS + 1):
            parts = urlsplit(url)
            reader, writer = await _connect(parts, where)
            try:
                status, location, body = await _get(parts, reader, writer, where, room)
            finally:
                writer.transport.abort()
            if status not in _REDIRECTS:
                break
            url = urljoin(url, location)
        else:
            raise refused(f"{where}: more than {MOST_REDIRECTS} redirects", where)
    except (OSError, h11.ProtocolError, ValueError) as error:
        raise refused(f"{where}: the picture cannot be fetched ({type(error).__name__})", where) from error
    if status != 200:
        raise refused(f"{where}: the picture cannot be fetched: {parts.hostname} answers with status {status}", where)
    return body


async def _connect(parts: SplitResult, where: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first address of the host that takes one, all of them being public."""
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc:
        words = "addresses of pictures, redirects too, begin with http:// or https:// and a host, without a user's name"
        raise refused(f"{where}: {words}", where)
    host, port = parts.hostname, parts.port or _PORTS[parts.scheme]
    loop, resolve = asyncio.get_running_loop(), functools.partial(socket.getaddrinfo, type=socket.SOCK_STREAM)
    found = await loop.run_in_executor(_RESOLVERS, resolve, host, port)
    addresses = list(dict.fromkeys(address[0] for *_, address in found))
    if not all(map(is_public, addresses)):
        raise refused(f"{where}: {host[:100]} is no host of the public internet, and is not asked", where)
    is_secure = parts.scheme == "https"
    secure = {"ssl": _trusting(ssl.get_default_verify_paths()), "server_hostname": host} if is_secure else {}
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            return await asyncio.open_connection(address, port, **secure)
    return await asyncio.open_connection(addresses[-1], port, **secure)


@functools.cache  # reading all certificates takes long for a loop that others wait for
def _trusting(paths: ssl.DefaultVerifyPaths) -> ssl.SSLContext:
    """What trusts the authorities at the system's paths."""
    return ssl.create_default_context()


async def _get(
    parts: SplitResult, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, where: str, room: _Room
) -> tuple[int, str, bytes]:
    """(status, where it redirects to, body) of what is asked for by HTTP/1.1; a body only of the status 200."""
    http = h11.Connection(h11.CLIENT)
    host, colon, port = parts.netloc.partition(":")  # in brackets an address has colons, and is ASCII
    headers = {
        "Host": host.encode("idna").decode() + colon + port,
        "User-Agent": f"minimind_jax/{__version__}",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    target = quote(parts._replace(scheme="", netloc="", fragment="").geturl() or "/", safe="%/:?&=+$,;@!*'()[]~")
    asked = h11.Request(method="GET", target=target, headers=list(headers.items()))
    writer.write(http.send(asked) + http.send(h11.EndOfMessage()))
    body = bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            await asyncio.sleep(0)  # for what is here already `read` does not let others have their turn
            http.receive_data(await reader.read(1 << 14))
        elif isinstance(event, h11.InformationalResponse):
            room.take(0, where)
        elif isinstance(event, h11.Response) and event.status_code != 200:
            return event.status_code, dict(event.headers).get(b"location", b"").decode("utf-8", "replace"), b""
        elif isinstance(event, h11.Data):
            room.take(len(event.data), where)
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return 200, "", bytes(body)
