"""`oauth_cb` of [kafka]: the author's function that gets a token for the brokers (SASL OAUTHBEARER), for all clients that share a Config.

A client of Kafka asks when it is created, and whenever its token has used up most of its life, on a thread of its own.
1. Tokens are shared: twenty clients are one request, and one that is created while the token service is down uses the last token.
2. The function runs on a thread that nobody waits for longer than `_WAIT_S`, not even a client that is being closed.
3. What it returns is checked here: confluent-kafka would never ask again after a value of another kind.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias

from kwflow.errors import KwflowError, TransportError, UsageError

__all__ = ["Token", "Tokens"]

Token: TypeAlias = tuple[str, float, str, dict[str, str]]  # what confluent-kafka expects: token, expiry in seconds since 1970, principal, extensions
_WAIT_S = 8.0
_USED = 0.5  # of a token's life, after which it is given to no more clients; so whoever asks at 0.8, as librdkafka does, gets a new one
_LEFT_S = 2.0  # a token that expires sooner is of no use
_AGAIN_S = 10.0  # after a failure, until the function is called again while the last token lives: many clients that are created would each wait for a service that hangs
_EXPIRY_S_MAX = 1e11  # more than that are milliseconds
_NAME = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")  # RFC 7628 3.1, as librdkafka checks it; the same for the next two
_KEY = re.compile(r"(?!auth$)[A-Za-z]+")
_VALUE = re.compile(r"[\x20-\x7e\t\r\n]*")
_REASON_MAX = 300


class Tokens:
    """A callable for `oauth_cb` of confluent-kafka.  No token is in its `repr`, nor in its errors."""

    def __init__(self, given: Any) -> None:
        """`given` is "module:function" or, in a program, the function itself.  Raises ValueError."""
        if not callable(given) and not (isinstance(given, str) and _NAME.fullmatch(given)):
            raise ValueError('oauth_cb must be "module:function", such as "shop.tokens:token", or in a program the function itself')
        self._given = given
        self._name = given if isinstance(given, str) else getattr(given, "__qualname__", type(given).__qualname__)
        self._lock = threading.Lock()
        self._known: dict[str | None, tuple[float, Token]] = {}  # by sasl.oauthbearer.config: when to renew it, and the token
        self._asked: dict[str | None, Future[Token]] = {}

    def __repr__(self) -> str:
        return f"<tokens of {self._name}>"

    def __call__(self, config: str | None, told: Callable[[str], None] = lambda _: None) -> Token:
        """Return a token for this `sasl.oauthbearer.config`; `told` is why there is no new one.  Raises UsageError, TransportError if there is none at all."""
        renew_s, token = self._known.get(config, (0.0, ("", 0.0, "", {})))
        if time.time() < renew_s:
            return token
        try:
            return self._call(config).result(_WAIT_S)
        except TimeoutError:
            error: KwflowError = TransportError(f"{self._said} has not returned within {_WAIT_S:g} s")
        except KwflowError as failed:
            error = failed
        told(str(error))
        if time.time() + _LEFT_S > token[1]:
            raise error
        with self._lock:
            if self._known[config][1] is token:  # if not, there is a new one, a moment too late
                self._known[config] = min(time.time() + _AGAIN_S, token[1] - _LEFT_S), token
        return token

    @property
    def _said(self) -> str:
        return f"config [kafka]: oauth_cb {self._name}"

    def _call(self, config: str | None) -> Future[Token]:
        """Return the call of the function that is running; without one, begin it."""
        with self._lock:
            if config not in self._asked:
                self._asked[config] = Future()
                threading.Thread(target=self._run, args=(config, self._asked[config]), name="kwflow-oauth", daemon=True).start()
            return self._asked[config]

    def _run(self, config: str | None, asked: Future[Token]) -> None:
        failed: KwflowError | None = None
        begun = time.time()
        try:
            token = self._checked(self._function()(config))
        except KwflowError as error:
            failed = error
        except BaseException as error:  # it may raise anything, even SystemExit
            said = " ".join(f"{type(error).__name__}: {error}".split())
            failed = TransportError(f"{self._said} raised {said[:_REASON_MAX]}")
        with self._lock:
            del self._asked[config]
            if failed is None:
                self._known[config] = begun + _USED * (token[1] - begun), token
        if failed is None:
            asked.set_result(token)
        else:
            asked.set_exception(failed)

    def _function(self) -> Callable[[str | None], object]:
        """Raises UsageError if the name leads to no function."""
        if not isinstance(self._given, str):
            return self._given  # type: ignore[no-any-return]
        module, _, path = self._given.partition(":")
        directory = os.environ.get("KWFLOW_APP_DIR") or "."
        if directory not in sys.path:  # commands without MODULEs add none; not earlier, as any optional import of a library would be looked up there
            sys.path.append(directory)
        try:
            found: Any = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except Exception as error:  # the module's own code may raise anything
            where = "; modules are looked up in --app-dir or KWFLOW_APP_DIR, by default the current directory, and on Python's path" if isinstance(error, ModuleNotFoundError) else ""
            raise UsageError(f"{self._said} cannot be imported: {type(error).__name__}: {error}{where}") from None
        if not callable(found):
            raise UsageError(f"{self._said} is not a function")
        return found  # type: ignore[no-any-return]

    def _checked(self, made: object) -> Token:
        """Raises UsageError for anything but (token, expiry[, principal[, extensions]]), without showing what it is."""
        if not isinstance(made, tuple) or not 2 <= len(made) <= 4:
            raise self._unusable(f"returned a {type(made).__name__} that is not (token, expiry[, principal[, extensions]])")
        token, expiry, principal, extensions = made + ("", {})[len(made) - 2 :]
        if not isinstance(token, str) or not _PRINTABLE.fullmatch(token) or not isinstance(expiry, (int, float)):
            raise self._unusable(f"returned a token of type {type(token).__name__} with an expiry of type {type(expiry).__name__}")
        if expiry > _EXPIRY_S_MAX:
            raise self._unusable("returned an expiry in milliseconds, it seems: divide it by 1000")
        if not expiry > time.time() + _LEFT_S:
            raise self._unusable("returned a token that has expired, or does within two seconds; is this machine's clock right?")
        if not isinstance(principal, str) or not isinstance(extensions, dict):
            raise self._unusable("returned a principal that is not a str, or extensions that are not a dict")
        if not all(isinstance(key, str) and isinstance(value, str) and _KEY.fullmatch(key) and _VALUE.fullmatch(value) for key, value in extensions.items()):
            raise self._unusable("returned extensions that are not a dict of str, with ASCII letters only in its keys")
        return token, float(expiry), principal, extensions

    def _unusable(self, what: str) -> UsageError:
        return UsageError(f"{self._said} {what}; it must return the token as a str of ASCII characters, and its expiry in seconds since 1970")
