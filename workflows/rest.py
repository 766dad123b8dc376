"""A build that takes a service hours: it is requested once, sends heartbeats, calls back when it is done, and is stopped when nobody waits any more."""

import os

import kwflow as kw
from kwflow import rest


@kw.activity
def build_token() -> dict[str, str]:
    """Runs in the process that sends the request; the token is not stored anywhere."""
    return {"Authorization": f"Bearer {os.environ.get('BUILD_TOKEN', '')}"}


def build(service, labels):
    return rest.call(
        "POST",
        f"{service}/builds",
        body=lambda callback: {"labels": labels, "callbackUrl": callback.url, "heartbeatUrl": callback.heartbeat_url},
        headers_from=build_token,
        retry=kw.Retry(max_attempts=6, first=5, factor=3, max=300),
        timeout=6 * 3600,
        heartbeat_timeout=300,
        success=lambda answer: answer["status"] == "SUCCESS",
        cancel=lambda response: rest.Request("DELETE", f"{service}/builds/{response['id']}", headers_from=build_token),
    )


def tell(service, result):
    """Call without a callback: the response is the answer."""
    return rest.call("POST", f"{service}/results", body=result, callback=False, headers_from=build_token)


def main(opts):
    """`opts`: {"service", "labels"}.  Returns {"status", "revision"}, and sends it to the service, whatever the build's outcome."""
    try:
        built = yield build(opts["service"], opts["labels"])
        result = {"status": "SUCCESS", "revision": built.response["revision"]}
    except (rest.RestError, rest.RestCancelled) as error:
        result = {"status": error.outcome.status, "revision": None}
    yield kw.shield(tell(opts["service"], result))
    return result
