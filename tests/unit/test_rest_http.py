"""One request of rest.call, as the activity sends it: what goes out, and how each response is reported."""

import asyncio
import email.utils
import time
from collections.abc import Iterator
from typing import Any

import pytest

import kwflow as kw
from kwflow import rest
from kwflow.rest import values
from kwflow.running import ActivityInfo, running_as
from tests.spec import rest_service
from tests.spec.rest_service import Answer, Service


@pytest.fixture
def service() -> Iterator[Service]:
    with rest_service.service() as made:
        yield made


def sent(service: Service, answer: Answer | None = None, **given: Any) -> Any:
    """Send a request with these fields and return the Response."""
    service.answers["/"] = answer or Answer({})
    with running_as(ActivityInfo(rest.request.name, "w", 1, "w|1")):
        return asyncio.run(rest.request.function(rest.Sent(**{"method": "POST", "url": service.base + "/", **given})))  # type: ignore[arg-type]  # its type is that of a call of the Activity


def test_an_error_status_tells_what_the_service_said(service: Service) -> None:
    """LR-8."""
    told = sent(service, Answer({"detail": "no such branch"}, 422))
    assert (told.failure.type, told.failure.status, told.failure.body) == ("StatusError", 422, {"detail": "no such branch"})
    assert told.failure.message.startswith(f"POST {service.base}/ was answered with 422 Unprocessable")
    assert sent(service, Answer(b"x" * 10_000, 500)).failure.body == "x" * 2_000
    assert sent(service, Answer(b"{", 500, {"Content-Type": "application/json"})).failure.body == "{"
    assert sent(service, Answer(b"x" * 10_000, 500), response_bytes_max=100).failure.status == 500


def test_retry_after_is_seconds_or_a_date_of_at_most_a_day(service: Service) -> None:
    """RFC 9110 §10.2.3. A value that is neither means nothing."""
    date = email.utils.formatdate(time.time() + 1000, usegmt=True)
    found = [sent(service, Answer(status=503, headers={"Retry-After": text})).retry_after_s for text in ("7", "999999999", date, "Thu, 01 Jan 1970 00:00:00 GMT", "soon")]
    assert found[:2] == [7, 86_400]
    assert 900 < found[2] <= 1000
    assert found[3:] == [0, None]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(b"\xff", headers={"Content-Type": "text/plain"}),
        Answer(b"x", headers={"Content-Type": "text/plain; charset=klingon"}),
        Answer(b"a-b", headers={"Content-Type": "text/plain; charset=punycode"}),
        Answer(b"+2AA-", headers={"Content-Type": "text/plain; charset=utf-7"}),  # a surrogate, which no record can hold
        Answer(b"[" * 9000 + b"]" * 9000, headers={"Content-Type": "application/json"}),
        Answer(b"[" * 9000 + b"]" * 9000, headers={"Content-Type": "application/octet-stream"}),
        Answer(b'{"a": NaN}', headers={"Content-Type": "application/json"}),
    ],
)
def test_what_is_not_as_its_content_type_says_is_final(service: Service, answer: Answer) -> None:
    """LR-8."""
    told = sent(service, answer)
    assert (told.failure.type, told.final, told.body) == ("ResponseError", True, None)
    assert answer.headers["Content-Type"] in told.failure.message


def test_an_error_whose_text_no_record_can_hold_is_told_with_its_bytes_as_text(service: Service) -> None:
    assert sent(service, Answer(b"+2AA-", 422, {"Content-Type": "text/plain; charset=utf-7"})).failure.body == "+2AA-"


def test_a_failure_quotes_only_the_beginning_of_what_the_service_says(service: Service) -> None:
    """The failure is kept with the workflow and logged; a header may have 100 KB."""
    long = "x" * 60_000
    for kind in (long, f"text/plain; charset={long}"):
        told = sent(service, Answer(b"\xff", headers={"Content-Type": kind}))
        assert (told.failure.type, len(told.failure.message) < 1_000) == ("ResponseError", True)


def test_a_response_that_breaks_off_is_tried_again(service: Service) -> None:
    told = sent(service, Answer(b"{}", headers={"Content-Length": "10", "Connection": "close"}))
    assert (told.failure.type, told.final) == ("ConnectionError", False)


def test_a_response_as_large_as_the_limit_is_taken_and_one_byte_more_is_not(service: Service) -> None:
    assert sent(service, Answer(b"7" * 100), response_bytes_max=100).failure is None
    assert "has more than 99 bytes (limit activity_bytes_max)" in sent(service, Answer(b"7" * 100), response_bytes_max=99).failure.message


def test_more_cookies_than_travel_with_each_request_are_refused(service: Service) -> None:
    cookies = [rest.Cookie(f"c{n}", "x", "127.0.0.1") for n in range(49)]
    assert len(sent(service, Answer({}, headers={"Set-Cookie": "a=b"}), cookies=cookies).cookies) == 50
    assert "sets more than 50 cookies" in sent(service, Answer({}, headers={"Set-Cookie": "a=b"}), cookies=[*cookies, rest.Cookie("d", "x", "127.0.0.1")]).failure.message
    assert "or 16384 characters" in sent(service, Answer({}), cookies=[rest.Cookie("long", "x" * 16_384, "127.0.0.1")]).failure.message


def test_cookies_go_to_those_that_they_are_for(service: Service) -> None:
    """LR-7: not to another host or another path, not in plain text if they are secure, and not after they have expired."""
    for_others = [
        rest.Cookie("host", "x", "builder.example"),
        rest.Cookie("path", "x", "127.0.0.1", "/other"),
        rest.Cookie("tls", "x", "127.0.0.1", secure=True),
        rest.Cookie("old", "x", "127.0.0.1", expires=1),
    ]
    told = sent(service, cookies=[*for_others, rest.Cookie("ours", "x", "127.0.0.1")])
    assert service.asked[-1].headers["cookie"] == "ours=x"
    assert {cookie.name for cookie in told.cookies} == {"host", "path", "tls", "ours"}


def test_what_the_author_says_in_a_header_is_not_overruled(service: Service) -> None:
    sent(service, headers={"accept": "text/plain", "IDEMPOTENCY-KEY": "mine", "Content-Type": "application/vnd.x+json", "User-Agent": "builds"}, body="text")
    asked = service.asked[-1]
    assert [asked.headers[name] for name in ("accept", "idempotency-key", "content-type", "user-agent")] == ["text/plain", "mine", "application/vnd.x+json", "builds"]
    assert asked.data == b'"text"'
    sent(service, method="GET")
    assert "idempotency-key" not in service.asked[-1].headers


@pytest.mark.parametrize("url", ["http://[::1", "http://a\u2024b\udc80/", "gopher://example/"])
def test_what_can_never_be_sent_is_final(service: Service, url: str) -> None:
    told = sent(service, url=url)
    assert (told.failure.type, told.final) == ("RequestError", True)


def test_headers_from_an_activity_that_is_not_there_or_gives_none_is_final(service: Service) -> None:
    with pytest.raises(Exception, match=r"this engine has no activity of that name") as missing:
        sent(service, headers_from="nobody")
    assert getattr(missing.value, "final", False)
    with pytest.raises(Exception, match="what activity kwflow.rest.token returned cannot be sent: headers must be a mapping of str to str, not a str"):
        sent(service, headers_from="kwflow.rest.token")


@kw.activity
def padded_secret() -> dict[str, str]:
    return {"Authorization": "Bearer hush "}


def test_a_secret_that_cannot_be_sent_is_in_no_message(service: Service) -> None:
    """h11 quotes what it refuses."""
    with pytest.raises(Exception, match="header 'Authorization': its value begins or ends with a space; strip it") as refused:
        sent(service, headers_from="padded_secret")
    assert "hush" not in repr(refused.value)
    told = sent(service, cookies=[rest.Cookie("session", "hush ", "127.0.0.1")])
    assert told.failure.message.endswith("cannot be sent: LocalProtocolError: Illegal header value")
    with pytest.raises(kw.UsageError, match="not 'https://x y/'") as wrong:
        values.checked(rest.Request("GET", "https://me:hush@x y/?token=hush"))
    assert "hush" not in str(wrong.value)


def test_a_cookie_that_no_request_can_carry_is_not_kept(service: Service) -> None:
    """RFC 6265 §4.1.1. With such a cookie, neither a retry nor the cancelling request could be sent."""
    told = sent(service, Answer({}, headers={"Set-Cookie": "a=\xff"}))
    assert (told.failure, told.cookies) == (None, [])
