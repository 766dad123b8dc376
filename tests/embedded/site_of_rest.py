"""A long job at a service, for tests that kill engines."""

import kwflow as kw
from kwflow import rest


@kw.workflow
def build(base):
    built = yield rest.call(
        "POST",
        f"{base}/build",
        body=lambda callback: {"callbackUrl": callback.url, "heartBeatUrl": callback.heartbeat_url},
        timeout=3600,
        heartbeat_timeout=600,
        success=lambda answer: answer["status"] == "SUCCESS",
        cancel=lambda response: rest.Request("POST", f"{base}/cancel", {"id": response["id"]}),
        cancel_timeout=60,
    )
    return {"response": built.response, "attempts": built.attempts}
