"""Showing the chat page on this machine."""

import os
import sys
import webbrowser


def open_page(url: str) -> bool:
    """Opens an address in the browser, if there is one with windows; a terminal's would take the server's terminal."""
    places = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")  # the last: what editors set that forward to another machine
    if sys.platform not in ("win32", "darwin") and not any(os.environ.get(place) for place in places):
        return False
    return webbrowser.open(url.replace("//0.0.0.0", "//127.0.0.1"))
