"""Addresses of servers: which may be asked, where their links may lead, what they say."""

import ipaddress
from typing import Any
from urllib.parse import urljoin, urlsplit

from cluster.errors import RunFailed, UserError


def checked_url(url: str, what: str = "the address") -> str:
    """`url`, if it is https, or http on this machine, and holds no password.

    Raises:
        UserError: it is not.
    """
    try:
        parts = urlsplit(url)
        host, password = parts.hostname or "", parts.password or parts.username
    except ValueError:
        parts, host, password = urlsplit(""), "", None
    if password:
        raise UserError(f"{what} holds a password", remedy="give an address without one")
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and _loopback(host))):
        raise UserError(
            f"{what} {plain(url)!r} is not https://HOST/…: what is fetched must not be "
            "changed on its way",
            remedy="give an https address (http is for servers on this machine)",
        )
    return url


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(url: str) -> str:
    """Host, and port if there is one, of an address."""
    return urlsplit(url).netloc


def next_url(url: str, link: str) -> str:
    """Where a link found at `url` leads; to the same host, and as safe as `url` is.

    Raises:
        RunFailed: it leads elsewhere, or is no address.
    """
    here = urlsplit(url)
    try:
        target = urlsplit(urljoin(url, link))
        port = target.port if target.scheme == "https" else None
    except ValueError as error:  # of brackets, or of a port
        raise RunFailed(
            f"{here.netloc} continues at {plain(link)!r}, which is no address: {error}",
            remedy="tell those who run that server",
        ) from None
    if target.hostname == here.hostname and here.scheme == "https":  # proxies forget their s
        target = target._replace(scheme="https", netloc=f"{here.hostname}:{port or 443}")
        if (port or 443) == (here.port or 443):
            target = target._replace(netloc=here.netloc)
    if (target.scheme, target.netloc) != (here.scheme, here.netloc):
        raise RunFailed(
            f"{here.netloc} continues at {plain(target.netloc)!r}, another server",
            remedy="give that server's address, if you trust it",
        )
    return target.geturl()


def plain(text: Any, most: int = 300) -> str:
    """What a server said, fit for a terminal: one line without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= most else line[: most - 1] + "…"
