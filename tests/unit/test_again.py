"""Which requests are repeated to a broker that was just started, and which are not (K4)."""

import pytest
from confluent_kafka import KafkaError, KafkaException

from kwflow.errors import FencedError
from kwflow.runners.kafka.environment import LIVE
from kwflow.runners.kafka.member import again


def answers(*codes: int) -> list[KafkaException]:
    return [KafkaException(KafkaError(code)) for code in codes]


def ask(left: list[KafkaException]) -> str:
    def call() -> str:
        if left:
            raise left.pop(0)
        return "told"

    return str(again(LIVE, call))


@pytest.mark.parametrize("code", [KafkaError._NOENT, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._STATE, KafkaError.LEADER_NOT_AVAILABLE, KafkaError._TIMED_OUT])
def test_what_passes_by_itself_is_asked_again(code: int) -> None:
    """_NOENT: "No leaders found" occurred after an outage of 40 s, and used to end the engine."""
    assert ask(answers(code, code)) == "told"


@pytest.mark.parametrize(("code", "raised"), [(KafkaError._FENCED, FencedError), (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaException)])
def test_what_does_not_is_told_at_once(code: int, raised: type[Exception]) -> None:
    left = answers(code, code)
    with pytest.raises(raised):
        ask(left)
    assert len(left) == 1
