"""Kafka in memory, in virtual time: the broker, and clients with confluent-kafka's surface.

    broker = Broker()
    broker.create("numbers", partitions=2)
    producer = SimulatedEnvironment(broker).producer({"transactional.id": "me"})
"""

from kwflow.testing.kafka.broker import Broker
from kwflow.testing.kafka.consumer import SimulatedConsumer
from kwflow.testing.kafka.environment import Disk, SimulatedEnvironment
from kwflow.testing.kafka.producer import SimulatedProducer
from kwflow.testing.kafka.time import Host, VirtualTime
from kwflow.testing.kafka.transactions import Refused

__all__ = ["Broker", "Disk", "Host", "Refused", "SimulatedConsumer", "SimulatedEnvironment", "SimulatedProducer", "VirtualTime"]
