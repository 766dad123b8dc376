"""A real Kafka for the tests: an existing one, one by Docker, or one from Maven jars; else skipped, or failed if required."""

import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

import pytest

from tests.integration.broker import Broker, can_start
from tests.integration.lab import Lab, stop


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its bootstrap servers."""
    given = os.environ.get("KWFLOW_TEST_BOOTSTRAP")
    if given:
        yield given
    elif can_start():
        started = Broker(tmp_path_factory.mktemp("kafka"))
        started.start()
        yield started.bootstrap
        started.kill()
    elif shutil.which("docker"):
        from testcontainers.kafka import KafkaContainer

        with KafkaContainer("confluentinc/cp-kafka:8.0.0").with_kraft() as container:
            yield container.get_bootstrap_server()
    else:
        reason = "NOT TESTED: no Kafka (KWFLOW_TEST_BOOTSTRAP, Docker, or java with mvn)"
        if os.environ.get("KWFLOW_REQUIRE_KAFKA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def application() -> str:
    """A fresh application id; its topics carry it."""
    return f"app-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def lab(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Lab]:
    lab = Lab(broker, application, tmp_path)
    yield lab
    for runner in lab.runners:
        stop(runner)
