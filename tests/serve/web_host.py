"""A real HTTP server that does what hosts on the web may do."""

import contextlib
import http.server
import itertools
import threading
import time

HERE = "127.0.0.2"  # a local address that a test may let pass for public
CONTENT = bytes(range(256)) * 40


class Host(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.host_header = self.headers["Host"]
        kind, _, rest = self.path[1:].partition("?")
        with contextlib.suppress(OSError):
            getattr(self, f"_{kind}")(rest)

    def _picture(self, rest):
        self._begin(200, ("Content-Length", str(len(self.server.content))), ("Content-Type", "text/html"))
        self.wfile.write(self.server.content)

    def _words(self, rest):
        self._begin(200, ("Content-Type", "image/png"))
        self.wfile.write(b"<html>no picture</html>")

    def _redirect(self, rest):
        self._begin(302, ("Location", rest))

    def _names(self, rest):
        self._begin(302, ("Location", "/picture?庄"))

    def _again(self, rest):
        self._begin(302, ("Location", f"/again?{int(rest or 0) + 1}"))

    def _nowhere(self, rest):
        self._begin(302)

    def _huge(self, rest):
        self._begin(200, ("Content-Length", str(1 << 40)))
        self._endless_body()

    def _endless(self, rest):
        self._begin(200)
        self._endless_body()

    def _endless_body(self):
        while True:
            self.wfile.write(bytes(1 << 16))

    def _drip(self, rest):
        self._begin(200)
        for _ in itertools.count():
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def _headers(self, rest):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in itertools.count():
            self.wfile.write(b"X-%d: %s\r\n" % (number, b"y" * 100))
            time.sleep(float(rest or 0))

    def _bits(self, rest):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            self.wfile.write(b"1\r\nx\r\n" * 1000)

    def _continue(self, rest):
        while True:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

    def _cut(self, rest):
        self._begin(200, ("Content-Length", "1000"))
        self.wfile.write(b"short")

    def _nonsense(self, rest):
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

    def _compressed(self, rest):
        assert self.headers["Accept-Encoding"] == "identity"
        self._picture(rest)

    def _begin(self, status, *headers):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value.encode().decode("latin-1"))
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(address, content=CONTENT, context=None):
    """A server at a local address. asked: the paths."""
    host = http.server.ThreadingHTTPServer((address, 0), Host)
    host.daemon_threads, host.asked, host.content, host.port = True, [], content, host.server_port
    host.url = f"http://{address}:{host.port}"
    if context:
        host.socket = context.wrap_socket(host.socket, server_side=True)
    threading.Thread(target=host.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield host
    finally:
        host.shutdown()
        host.server_close()
