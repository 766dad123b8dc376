"""Read by type checkers and not run: the type of each wait's result. Lines marked `# wrong` must be reported."""

import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, assert_type

import kwflow as kw
from kwflow import rest
from kwflow.testing import WorkflowTester


@kw.activity
def price(city: str) -> int:
    return len(city)


@kw.activity(retry=kw.Retry(max_attempts=3), timeout=10)
async def fetch(city: str) -> bytes:
    return city.encode()


async def car(n: int) -> str:
    return f"{n}"


def hotel(n: int) -> kw.Gen[float]:
    got = yield kw.suspend()
    assert_type(got, Any)
    yield from kw.sleep(timedelta(days=1))
    named: kw.Suspension[bool] = kw.suspend("named")
    known = yield from named
    assert_type(known, bool)
    return float(n)


async def main(opts: dict[str, Any]) -> dict[str, Any]:
    assert_type(await car(1), str)
    assert_type(await kw.suspend(), Any)
    answer: kw.Suspension[int] = kw.suspend("answer")
    assert_type(await answer, int)
    assert_type(await kw.sleep(1.5), None)
    assert_type(await kw.all((car(1), hotel(2))), tuple[str, float])
    assert_type(await kw.all((car(1), hotel(2), price("x"))), tuple[str, float, int])
    assert_type(await kw.all((car(1), hotel(2), price("x"), fetch("y"))), tuple[str, float, int, bytes])
    assert_type(await kw.all([car(1), car(2)]), list[str])
    assert_type(await kw.all(car(n) for n in range(3)), list[str])
    assert_type(await kw.all({"a": hotel(1), "b": hotel(2)}), dict[str, float])
    assert_type(await kw.race((car(1), hotel(2))), str | float)
    assert_type(await kw.race([hotel(1), hotel(2)]), float)
    assert_type(await kw.race({1: car(1), 2: car(2)}), tuple[int, str])
    assert_type(await kw.timeout(car(1), 5), str)
    assert_type(await kw.timeout(kw.all((car(1), hotel(2))), timedelta(hours=1)), tuple[str, float])
    assert_type(await kw.shield(hotel(1)), float)
    assert_type(await kw.wait_condition(lambda: 5), int)
    assert_type(await price("vienna"), int)
    assert_type(await fetch("vienna"), bytes)
    task = kw.spawn(car(1))
    assert_type(task, kw.Task[str])
    assert_type(await task, str)
    other = kw.spawn(hotel(1))
    assert_type(await other, float)
    async with room("blue") as name:
        assert_type(name, str)
    async for n in numbers():
        assert_type(n, int)
    return {"all": [await car(n) async for n in numbers()]}


@contextlib.asynccontextmanager
async def room(name: str) -> AsyncIterator[str]:
    await kw.suspend()
    yield name


async def numbers() -> AsyncIterator[int]:
    yield await price("x")


@kw.workflow
async def talk(opts: object) -> str:
    inbox = kw.signals("said")
    assert_type(await inbox, Any)
    async for message in inbox:
        assert_type(message, Any)
        break
    said: kw.Awaitable[str] = kw.wait_signal("said")
    assert_type(await said, str)
    return await named(1)


@kw.workflow(name="other")
async def named(n: int) -> str:
    return await price_of(timedelta(seconds=n))


@kw.activity(retry=kw.Retry(first=timedelta(seconds=1), max=60))
def price_of(time: timedelta) -> str:
    return str(time)


@kw.activity
def secrets() -> dict[str, str]:
    return {"Authorization": "Bearer …"}


async def service(url: str) -> str:
    built = await rest.call("POST", url, body=lambda callback: {"url": callback.url}, headers_from=secrets, cancel=lambda response: rest.Request("DELETE", response["url"], headers_from=secrets))
    assert_type(built, rest.Outcome)
    text: int = built.status  # wrong
    return built.status


def tested(tester: WorkflowTester) -> list[str]:
    gone = tester.header("w") is None or tester.reply("r") is None
    return [tester.header("w")["status"], tester.command("w", "query")["status"], tester.reply("r")["message"]] if not gone else []


async def mistakes() -> None:
    await kw.sleep("tomorrow")  # wrong
    await kw.timeout(5, 1)  # wrong
    await kw.shield(car)  # wrong
    await car("one")  # wrong
    kw.spawn(kw.sleep(1))  # wrong
    one, two, three = await kw.all((car(1), hotel(2)))  # wrong
    text: str = await hotel(1)  # wrong
    await price(5)  # wrong
    await named("one")  # wrong
