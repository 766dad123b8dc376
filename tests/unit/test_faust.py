"""The Faust agent without a broker: what it does while Faust restores its table."""

import asyncio
import importlib.util

import pytest

from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.core.dispatch import PREFIX, Dispatch, encode, state_key
from kwflow.runners.loop import WorkflowProcessor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("faust") is None, reason="NOT TESTED: faust-streaming is not installed (kwflow[faust])")


def test_what_a_rebalance_restores_late_is_found_and_activities_begin_after_it() -> None:
    """K17, M6.5: the agent's timer runs while the table is being restored."""
    import faust

    from kwflow.runners.faust import Agent

    config, lines = Config(application_id="restoring"), list[str]()
    processor = WorkflowProcessor(config, Workflows({}), frozenset(), on_log=lines.append)
    app = faust.App("restoring", broker="kafka://localhost:9", store="memory://", autodiscover=False)
    agent = Agent(app, config, processor, 1, lines.append)
    calls = {state_key(id, "0:1"): encode(Dispatch(id, "0:1", "nowhere", 1, "0:1", b"{}")) for id in ("early", "late")}

    async def rebalance() -> None:
        await app.on_partitions_assigned.send(set())
        for key, entry in sorted(calls.items()):
            agent.table.data[key] = entry
            await agent._turn()
        assert lines == [], "nothing is begun yet"
        await agent.table.call_recover_callbacks()
        await agent._turn()

    asyncio.run(rebalance())
    assert [key for key, _ in agent._state.scan(PREFIX)] == sorted(calls)
    assert lines == ["no activity 'nowhere' in this engine; early and perhaps others wait until an engine with this activity is started"]


def test_a_result_that_the_broker_does_not_take_now_is_sent_again_and_one_it_never_takes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """M6.3: after a long outage, a workflow used to get the error for a result that is too large."""
    import faust
    from aiokafka.errors import KafkaTimeoutError, MessageSizeTooLargeError
    from faust.exceptions import ProducerSendError

    from kwflow.runners.faust import Agent

    config = Config(application_id="delivering")
    app = faust.App("delivering", broker="kafka://localhost:9", store="memory://", autodiscover=False)
    agent = Agent(app, config, WorkflowProcessor(config, Workflows({}), frozenset()), 1, print)
    failures: list[Exception] = []

    async def send(*_: object, **__: object) -> asyncio.Future[None]:
        sent = asyncio.get_running_loop().create_future()
        if failures:
            error = ProducerSendError("not sent")
            error.__cause__ = failures.pop(0)
            sent.set_exception(error)
        else:
            sent.set_result(None)
        return sent

    async def deliver(*errors: Exception) -> str | None:
        failures[:] = errors
        agent._loop = asyncio.get_running_loop()
        told: asyncio.Future[str | None] = agent._loop.create_future()
        agent._deliver(0, b"w", b"{}", (), told.set_result)
        return await asyncio.wait_for(told, 10)

    monkeypatch.setattr(app, "send", send)
    assert asyncio.run(deliver(KafkaTimeoutError(), KafkaTimeoutError())) is None
    assert asyncio.run(deliver(MessageSizeTooLargeError("it has 9 bytes"))) == "[Error 10] MessageSizeTooLargeError: it has 9 bytes"
