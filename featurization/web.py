"""The network: how the program speaks to servers of data. The only import of requests.

Certificates are always checked, and plain http is spoken to this machine alone. A server that is
busy (429), fails (5xx), stalls or cuts its answer short is asked again, after the time that it
names or ever longer pauses. No answer is held that is larger than a limit, after unpacking.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import orjson
import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from cluster.errors import RunFailed
from featurization.addresses import checked_url, host_of, plain

# Seconds to connect, and between two pieces of an answer. A query of a database can take a minute.
TIMEOUT = (20.0, 120.0)
# And for all pieces of an answer's head, and of a body that is asked for as a whole: a server may
# drip for ever.
LONGEST = 1200.0
# An answer that is asked for as a whole, B: ten times a page of a thousand large structures.
MAX_ANSWER = 256 << 20
ATTEMPTS = 5
# Seconds before the second attempt; it doubles.
PAUSE = 1.0
# A server that asks for a longer pause, s, is asked again by another command.
MAX_PAUSE = 600.0
# What a request raises while an answer is read.
CUT = (requests.RequestException, HTTPError)
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
AGAIN = "give the same command again: it goes on with what is missing"

Say = Callable[[str], None]
Progress = Callable[[int, int], None]  # how much is there, of how much; 0 where nobody knows


class KeyRefused(Exception):
    """A server answers that the key which came with the request is not good (401 or 403)."""


class Refused(RunFailed):
    """A server answers a request with 4xx, for a reason that another attempt will not change."""


class Web(requests.Session):
    """A session under the rules of this module; with a key, it follows no redirects.

    The key goes out alone: where an answer echoes it, `(the key)` stands in its place.

    `say` is told of each pause.
    """

    def __init__(self, say: Say = lambda text: None, key: str = "") -> None:
        super().__init__()
        self.say = say
        self.max_redirects = 5
        self.headers["user-agent"] = "crystal-genome (https://arxiv.org/abs/2101.01773)"
        if key:
            self.headers["x-api-key"] = key
        for scheme in ("https://", "http://"):
            self.mount(scheme, _Patient(say, key))

    def document(self, url: str, **parameters: str) -> dict[str, Any]:
        """The JSON object at an address.

        Raises:
            Refused: the server answers 4xx; the message has what it says about it.
            RunFailed: it gives no such answer, after several attempts.
        """
        try:
            response = self.get(url, params=parameters or None)
        except requests.RequestException as error:
            raise RunFailed(
                f"{host_of(url)}: {reason_of(error)}", remedy="check the address"
            ) from None
        if response.status_code != 200:
            raise Refused(
                f"{host_of(url)} answers HTTP {response.status_code}: {_reason(response.content)}",
                remedy="check the request; the server's documentation says what it takes",
            )
        answer = orjson.loads(response.content)
        if not isinstance(answer, dict):
            raise RunFailed(f"{host_of(url)} gives no JSON object", remedy="check the address")
        return answer


class _Patient(HTTPAdapter):
    """The transport: rules for addresses, sizes and times, and more than one attempt."""

    def __init__(self, say: Say, key: str) -> None:
        super().__init__()
        self._say = say
        self._key = key

    def get_connection_with_tls_context(self, *words: Any, **named: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*words, **named)
        if not issubclass(pool.ConnectionCls, _Punctual):
            pool.ConnectionCls = type("Connection", (_Punctual, pool.ConnectionCls), {})
        return pool

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        url = checked_url(str(request.url))
        host = host_of(url)
        for attempt in range(ATTEMPTS):
            pause = PAUSE * 2**attempt
            try:
                response = super().send(request, True, TIMEOUT, verify or True, cert, proxies)
                if response.status_code in _BUSY:
                    reason = f"HTTP {response.status_code}"
                    pause = _asked(response, pause)
                    response.close()
                elif response.status_code in (401, 403) and self._key:
                    response.close()
                    raise KeyRefused(f"HTTP {response.status_code}")
                elif response.is_redirect and self._key:
                    response.close()
                    raise RunFailed(
                        f"{host} sends the request elsewhere, where the key must not go",
                        remedy="check the address",
                    )
                else:
                    if not stream:
                        _read(response, self._key)
                    return response
            except requests.exceptions.SSLError as error:
                raise RunFailed(
                    f"{host}: its certificate is not accepted ({reason_of(error)})",
                    remedy="behind a proxy of your site, REQUESTS_CA_BUNDLE names its certificate",
                ) from None
            except (requests.RequestException, _Broken) as error:
                reason = reason_of(error)
            if pause > MAX_PAUSE:
                raise RunFailed(
                    f"{host} is busy ({reason}) and asks to wait {pause / 60:,.0f} min",
                    remedy=f"then {AGAIN}",
                )
            if attempt < ATTEMPTS - 1:
                self._say(f"{host}: {reason}; again in {pause:.0f} s")
                time.sleep(pause)
        raise RunFailed(f"{host} fails {ATTEMPTS} times: {reason}", remedy=f"later, {AGAIN}")


class _Punctual:
    """Mixed into a connection: the head of an answer comes in time, or none."""

    sock: Any

    def getresponse(self) -> Any:
        late = threading.Event()

        def hang_up() -> None:
            late.set()
            with suppress(OSError):  # the server was faster
                self.sock.shutdown(0)  # for reading

        try:
            with _ends(hang_up):
                return super().getresponse()  # type: ignore[misc]
        finally:
            if late.is_set():  # half a head would pass for a whole one
                raise TimeoutError("timed out") from None


@contextmanager
def _ends(hang_up: Callable[[], Any]) -> Iterator[None]:
    """Call `hang_up` if what is within takes too long."""
    deadline = threading.Timer(LONGEST, hang_up)
    deadline.daemon = True
    deadline.start()
    try:
        yield
    finally:
        deadline.cancel()


class _Broken(Exception):
    """An answer that came whole, but is no answer."""


def _read(response: requests.Response, key: str) -> None:
    """Read a whole answer, which is kept in `response.content`, but for the key.

    Raises:
        RunFailed: larger than the limit.
        requests.RequestException: it does not come whole.
        _Broken: a good status, and no JSON.
    """
    with _ends(response.raw.shutdown):
        response.raw = _Limited(response.raw, str(response.url))
        content = response.content
    if key:
        content = response._content = content.replace(key.encode(), b"(the key)")
    if response.status_code == 200:  # a redirect or a refusal may be anything
        try:
            orjson.loads(content)
        except orjson.JSONDecodeError:
            raise _Broken("the answer is no JSON") from None


class _Limited:
    """The body of an answer, which breaks off where it becomes too large."""

    def __init__(self, raw: Any, url: str) -> None:
        self._raw = raw
        self._url = url

    def stream(self, amount: int, decode_content: bool = True) -> Iterator[bytes]:
        size = 0
        for piece in self._raw.stream(amount, decode_content=decode_content):
            size += len(piece)
            if size > MAX_ANSWER:
                raise too_large(self._url, MAX_ANSWER)
            yield piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


def too_large(url: str, limit: int) -> RunFailed:
    return RunFailed(
        f"{host_of(url)} sends more than {limit >> 20} MiB at once", remedy="check the address"
    )


def _asked(response: requests.Response, pause: float) -> float:
    """The pause that a busy server asks for, else `pause`."""
    try:
        return max(pause, Retry().parse_retry_after(response.headers.get("retry-after", "")))
    except Exception:  # it is neither seconds nor a date
        return pause


def _reason(content: bytes) -> str:
    """What an answer says of its failure: JSON:API's `errors`, or `detail` or `message`."""
    try:
        answer = orjson.loads(content)
        errors = answer.get("errors") or [answer]
        said = [e.get("detail") or e.get("message") or e.get("title") for e in errors]
        return plain("; ".join(map(str, filter(None, said))) or "no reason given")
    except (orjson.JSONDecodeError, AttributeError, TypeError):
        return plain(content.decode("utf-8", "replace"), 100) or "no reason given"


def reason_of(error: Exception) -> str:
    """What went wrong, without addresses and objects of the libraries."""
    if isinstance(error, _Broken):
        return str(error)
    if isinstance(error, requests.exceptions.SSLError):
        found = re.search(r"CERTIFICATE_VERIFY_FAILED\] ([^()]*)", str(error))
        return found[1].strip() if found else "no TLS"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    cut = requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError
    if isinstance(error, cut | HTTPError):
        return "the answer was cut short"
    return "no connection" if isinstance(error, requests.ConnectionError) else type(error).__name__
