"""A build by a service that takes hours: it is asked once, beats its heart, calls back when it is done, and is told to stop when nobody waits any more."""

import os

import kwflow as kw
from kwflow import rest


@kw.activity
def build_token() -> dict[str, str]:
    """Runs where a request is sent; what it returns is stored nowhere."""
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
    """The response is the answer."""
    return rest.call("POST", f"{service}/results", body=result, callback=False, headers_from=build_token)


def main(opts):
    """`opts`: {"service", "labels"}.  Returns {"status", "revision"}; the service gets it, too, whatever became of the build."""
    try:
        built = yield build(opts["service"], opts["labels"])
        result = {"status": "SUCCESS", "revision": built.response["revision"]}
    except (rest.RestError, rest.RestCancelled) as error:
        result = {"status": error.outcome.status, "revision": None}
    yield kw.shield(tell(opts["service"], result))
    return result
