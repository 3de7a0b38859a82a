"""An OpenAI-compatible endpoint: chat completions, paced and retried.  It knows HTTP; it knows nothing of what is asked.

A request that fails for a passing reason (timeout, broken connection, 408, 409, 425, 429, 5xx, a body that is not the JSON it should be)
is sent again after a growing pause, or after the pause that the endpoint asks for (Retry-After), which then holds for all requests.
Anything else ends the run: the first such error is kept, no further request is sent, and those under way are waited for, since they
are paid for.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2 as httpx

from lqa.errors import LqaError

LONGEST_PAUSE = 600.0  # seconds; an endpoint that asks for more has run out of quota: better told than waited for


@dataclass(frozen=True)
class Reply:
    """What a chat completion brought.  `usage` is the endpoint's report of tokens, or {}; `failures` counts what was resent, by cause."""

    text: str
    finish: str  # "stop", "length", "refusal", "content_filter", ...
    model: str
    usage: dict
    seconds: float  # of the request that succeeded
    failures: dict[str, int] = field(default_factory=dict)


class _Passing(Exception):
    """A failure that another try may not meet; `pause` in seconds if the endpoint named one."""

    def __init__(self, name: str, text: str, pause: float | None = None):
        super().__init__(text)
        self.name, self.pause = name, pause


def _line(text: str, limit: int = 300) -> str:
    text = " ".join(str(text).split()).rstrip(". ")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _pause(response) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None without one."""
    value = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _error(response) -> tuple[str, str]:
    """(code, message) of an error response, in whichever of the usual forms it comes."""
    try:
        error = response.json()
    except ValueError:
        return "", _line(response.text)
    error = error.get("error", error) if isinstance(error, dict) else error
    if not isinstance(error, dict):
        return "", _line(error)
    return str(error.get("code") or error.get("type") or ""), _line(error.get("message") or error.get("detail") or error)


class Endpoint:
    """An async context manager over one endpoint.

    `url` is the base that ends in /v1; `key` may be None (`key_name` is the variable that errors name); `rpm` bounds the requests started
    in a minute; `timeout` is in seconds; `retries` is how often one request is sent again.
    """

    def __init__(self, url: str, key: str | None, *, key_name: str, concurrency=8, rpm=None, timeout=120.0, retries=6):
        self.url, self.key, self.key_name, self.retries = url.rstrip("/"), key, key_name, retries
        self.interval = 60 / rpm if rpm else 0.0
        self.error: LqaError | None = None
        self.answered = 0
        self._free = asyncio.Semaphore(concurrency)
        self._stopped = asyncio.Event()
        self._next = 0.0  # monotonic time before which no request starts
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=concurrency)
        try:
            self._client = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(timeout, pool=None), limits=limits)
            if httpx.URL(self.url).scheme not in ("http", "https") or not httpx.URL(self.url).host:
                raise ValueError("it must look like https://host/v1")
        except (ValueError, httpx.InvalidURL, UnicodeError) as error:
            raise LqaError(f"The endpoint {url!r} with the key of {key_name} cannot be used: {_line(error)}.") from error

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *exc) -> None:
        await self._client.aclose()

    def stop(self, error: LqaError) -> LqaError:
        """Lets no further request start; those under way go on.  Returns the error that every waiting `complete` raises: the first one."""
        self.error = self.error or error
        self._stopped.set()
        return self.error

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)
        if self.error:
            raise self.error

    async def _turn(self) -> None:
        """Waits until this request may start."""
        while (wait := self._next - time.monotonic()) > 0:
            await self._sleep(wait)
        if self.error:
            raise self.error
        self._next = time.monotonic() + self.interval  # no await since the check: two requests cannot take one slot

    async def complete(self, body: dict) -> Reply:
        """One chat completion; `body` is the request's JSON.  Raises LqaError when it cannot be had, and after `stop`."""
        failures: Counter[str] = Counter()
        async with self._free:
            while True:
                await self._turn()
                start = time.monotonic()
                try:
                    text, finish, model, usage = await self._post(body)
                    self.answered += 1
                    return Reply(text, finish, model, usage, time.monotonic() - start, dict(failures))
                except LqaError as error:
                    self.stop(error)
                    raise
                except _Passing as failure:
                    failures[failure.name] += 1
                    tries = sum(failures.values())
                    if failure.name == "unreachable" and not self.answered:  # it was never there: no use in waiting for it to come back
                        raise self.stop(LqaError(f"{self.url} cannot be reached ({failure}); check --endpoint.")) from failure
                    if tries > self.retries:
                        reasons = ", ".join(f"{name} {n}" for name, n in sorted(failures.items()))
                        text = f"{self.url} failed {tries} times in a row ({reasons}; the last: {failure})"
                        raise self.stop(LqaError(f"{text}; try again when it works.")) from failure
                    if failure.pause is not None:
                        self._next = max(self._next, time.monotonic() + failure.pause)
                    else:
                        await self._sleep(min(60.0, 0.5 * 2 ** (tries - 1)) * random.uniform(0.5, 1.0))

    async def _post(self, body: dict) -> tuple[str, str, str, dict]:
        try:
            response = await self._client.post(f"{self.url}/chat/completions", json=body)
        except httpx.ConnectError as error:
            raise _Passing("unreachable", _line(error) or "no connection") from error
        except httpx.TimeoutException as error:
            raise _Passing("timeout", "no answer in time; see --timeout") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Passing("disconnected", _line(error) or type(error).__name__) from error
        status = response.status_code
        if status != 200:
            return self._refuse(status, response)
        try:
            document = response.json()
            choice = document["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content") or "", message.get("refusal")
            if not isinstance(text, str):
                raise TypeError("the content is not text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Passing("broken", f"the body is not a chat completion: {_line(response.text, 80)!r}") from error
        usage = document.get("usage")
        finish = "refusal" if refusal else str(choice.get("finish_reason") or "stop")
        text = (text or str(refusal or "")).encode(errors="replace").decode()  # JSON may hold half a surrogate pair, which no file takes
        return text, finish, str(document.get("model") or body["model"]), usage if isinstance(usage, dict) else {}

    def _refuse(self, status: int, response) -> tuple[str, str, str, dict]:
        code, message = _error(response)
        said = f"{status}: {message}" if message else f"status {status}"
        if code == "content_filter":  # a refusal by the provider's filter, not an error of ours
            return message, "content_filter", "", {}
        if code == "insufficient_quota" or status == 402:
            raise LqaError(f"The account at {self.url} has no quota left ({said}); top it up.")
        if status in (408, 409, 425, 429) or status >= 500:
            pause = _pause(response)
            if pause is not None and pause > LONGEST_PAUSE:
                raise LqaError(f"{self.url} asks to wait {pause / 60:.0f} minutes ({said}); come back then.")
            raise _Passing(str(status), said, pause)
        if status in (401, 403):
            remedy = f"check the key in {self.key_name}" if self.key else f"put a key into the environment variable {self.key_name}"
            raise LqaError(f"{self.url} refused access ({said}); {remedy}.")
        if status == 404:
            raise LqaError(f"{self.url} knows no such model or path ({said}); check --model, and that --endpoint ends in /v1.")
        raise LqaError(f"{self.url} rejected a request ({said}); check --model and --request.")
