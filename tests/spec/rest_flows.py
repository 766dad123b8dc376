"""Workflows for test_rest.py: the process of jBPM's example, and one call that the test shapes."""

import kwflow as kw
from kwflow import rest


@kw.activity
def secret_headers():
    return {"Authorization": "Bearer from-the-engine"}


@kw.activity
async def bad_secret_headers():
    return {"Authorization": "hush\n"}


def as_told(outcome):
    """What a test looks at."""
    error = outcome.error
    return {
        "status": outcome.status, "response": outcome.response, "initial": outcome.initial_response, "called_back": outcome.callback_response,
        "cancel": outcome.cancel_response, "error": error and error.type, "http": error and error.status, "attempts": outcome.attempts,
    }  # fmt: skip


def job(order, path, cookies=()):
    """A task of the example's service, cancelled at the URL that it has answered with."""
    return rest.call(
        "POST",
        order["base"] + path,
        body=lambda callback: {"labels": order.get("labels"), "callbackUrl": callback.url, "heartBeatUrl": callback.heartbeat_url},
        headers={"Authorization": "Bearer abc=="},
        cookies=cookies,
        retry=kw.Retry(jitter=0, **order.get("retry", {})),
        timeout=order.get("timeout"),
        heartbeat_timeout=order.get("heartbeat"),
        cancel=(lambda response: rest.Request("POST", order["base"] + response["cancelPath"], {"why": "cancelled"})) if order.get("cancel", True) else None,
        cancel_timeout=order.get("cancel_timeout", 30),
        success=(lambda response: response["status"] == "SUCCESS") if order.get("success", True) else None,
    )


def release(order):
    """prebuild, build, and a result that is sent whatever became of them."""
    said = {}
    try:
        prebuild = yield job(order, "/prebuild")
        said["prebuild"] = as_told(prebuild)
        build = yield job(order, "/build", prebuild.cookies)
        said["build"] = as_told(build)
    except (rest.RestError, rest.RestCancelled) as error:
        said["failed"] = as_told(error.outcome)
    completion = yield kw.shield(rest.call("POST", order["base"] + "/complete", body={"labels": order.get("labels")}, callback=False))
    return {**said, "completion": as_told(completion)}


def one(order):
    try:
        return as_told((yield job(order, "/build")))
    except (rest.RestError, rest.RestCancelled) as error:
        return as_told(error.outcome)


def uncaught(order):
    return (yield job(order, "/build"))


def cancelled_by_signal(order):
    """The call goes on as a task of its own; a signal cancels it."""
    call = job(order, "/build")
    yield kw.wait_signal("stop")
    kw.cancel(call)
    try:
        return as_told((yield call))
    except (rest.RestError, rest.RestCancelled) as error:
        return as_told(error.outcome)


def cancelled_at_once(order):
    call = job(order, "/build")
    kw.cancel(call)
    try:
        yield call
    except rest.RestCancelled as cancelled:
        return as_told(cancelled.outcome)


def within(order):
    """The author's own limit."""
    try:
        yield kw.timeout(job(order, "/build"), 10)
    except TimeoutError:
        return "too late"


def shielded(order):
    try:
        yield kw.shield(job(order, "/build"))
    except kw.Cancelled:
        return "cancelled after it"


def both(order):
    return [as_told(outcome) for outcome in (yield kw.all([job(order, "/build"), job(order, "/build")]))]


async def awaited(order):
    return as_told(await job(order, "/build"))


def asked(order):
    """A call whose response is the answer; `order` are its arguments."""
    given = {name: value for name, value in order.items() if name not in ("method", "url")}
    try:
        return as_told((yield rest.call(order.get("method", "POST"), order["url"], callback=False, retry=kw.Retry(max_attempts=1), **given)))
    except rest.RestError as error:
        return as_told(error.outcome)


def with_secrets(url):
    return (yield rest.call("POST", url, body={}, callback=False, headers_from=secret_headers)).status


def with_bad_secrets(url):
    yield rest.call("POST", url, callback=False, headers_from=bad_secret_headers)


def too_large(_):
    try:
        yield rest.call("POST", "https://builder.example", body="x" * 300_000, callback=False, timeout=10)
    except kw.UsageError as error:
        yield kw.sleep(0)
        return str(error)


def held(url):
    from functools import partial

    from kwflow import rest as module

    call = partial(module.call, "POST", url, callback=False)
    yield kw.sleep(1)
    return (yield call(body={"labels": 7})).response


def with_static_cancel(order):
    try:
        yield rest.call(
            "POST", order["base"] + "/build", body=lambda callback: {"callbackUrl": callback.url}, timeout=10, retry=kw.Retry(first=60, max_attempts=9),
            cancel=rest.Request("DELETE", order["base"] + "/jobs/7", headers_from="secret_headers", headers=lambda callback: {"X-Callback": callback.url}),
        )  # fmt: skip
    except rest.RestError as error:
        return as_told(error.outcome)


def wrong(order):
    """Calls that are refused; what each is told."""
    told = []
    for arguments in (
        {"method": ""}, {"url": "builder.example"}, {"body": {}}, {"callback": False, "body": lambda callback: {}}, {"timeout": 0}, {"retry": 3}, {"headers_from": 7},
        {"callback": False, "body": {}, "heartbeat_timeout": 3}, {"success": job_that_waits},
    ):  # fmt: skip
        try:
            rest.call(**{"method": "POST", "url": "https://builder.example", "body": lambda callback: {"url": callback.url}, **arguments})
        except kw.UsageError as error:
            told.append(str(error))
    return told
    yield


def job_that_waits(response):
    yield kw.sleep(1)


def unsendable(order):
    told = []
    for body, headers in (
        (lambda callback: object(), {}), (lambda callback: {}, {"X": "two\nlines"}), (lambda callback: {}, {"a b": "x"}),
        (lambda callback: {}, {"X": "x" * 100_000}), (lambda callback: kw.sleep(1), {}),
    ):  # fmt: skip
        try:
            yield rest.call("POST", "https://builder.example", body=body, headers=headers)
        except kw.UsageError as error:
            told.append(str(error))
    return told
