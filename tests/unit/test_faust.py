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
    """K17, M6.5: its timer runs while the table is being restored."""
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
    assert lines == ["no activity 'nowhere' in this engine; early and maybe others wait for it until an engine is started that has it"]
