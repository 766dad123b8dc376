"""What 3.15 brought: unpacking in comprehensions, frozen dictionaries, lazy imports."""

lazy import json as js
lazy from collections import OrderedDict

LOG = []
NAMES = sentinel("NAMES")


def log(x):
    LOG.append(repr(x))
    return x


class Pause:
    def __init__(self, value):
        self.value = value

    def __await__(self):
        return (yield self.value)


def g_lists_unpacked():
    made = [*log(each) for each in [[1], (2, 3), (yield "more") or []]]
    yield made
    return ([*"ab" for _ in range(2)], {*each for each in [[1], [1, 2]]}, {**each for each in [{"a": 1}, {"a": 2, "b": 3}]})


def g_generator_unpacked():
    held = (*log(each) for each in [[1, 2], "ab", ()])
    yield next(held)
    yield next(held)
    yield next(held)
    return list(held)


def g_generator_unpacked_with_clauses():
    suffix = "!"
    held = (*(part, part + suffix) for word in ("ab", "cd") if word for part in word if part != "c")
    for each in held:
        suffix = yield each
        suffix = str(suffix)


def g_generator_unpacked_sent_to():
    inner = iter((1, 2, 3))
    held = (*each for each in [inner])
    yield next(held)
    yield next(inner)
    return list(held)


def g_generator_of_what_is_none():
    held = (*each for each in [[1], 2, [3]])
    yield next(held)
    try:
        yield next(held)
    except TypeError as error:
        yield str(error)
    return list(held)


def g_unpacking_captures():
    made = [lambda: (each, more) for each, more in [(1, 2)]]
    yield "held"
    return ([*(one() for one in made) for _ in range(2)], [*(lambda: (n, n))() for n in range(2)])


def g_unpacking_captures_a_captured_name():
    x = [5]
    more = lambda: x
    yield [*(lambda: x)() for x in ([1], [2])], x
    yield {*(lambda: x)() for x in ([1], [2])}, {**(lambda: x)() for x in ({"a": 1}, {"a": 2, "b": 3})}, x, more()
    x = [6]
    return [*(*(lambda: (x, y))() for x in y) for y in ([1], [2])], x, more()


async def g_unpacks_awaited():
    async def of(value):
        log(await Pause(value))
        return value

    a = [*(await of(each)) for each in ("ab", "c")]
    b = {*(await of(each)) for each in ("ab", "bc")}
    c = {**(await of(each)) for each in ({"k": 1}, {"k": 2, "m": 3})}
    return (a, sorted(b), c)


async def g_unpacks_wrongly():
    said = []
    for make in (one, two, three):
        try:
            await make()
        except TypeError as error:
            said.append(str(error))
    return said


async def one():
    return [*(await Pause(5)) for _ in range(1)]


async def two():
    return {*(await Pause(1) or 5) for _ in range(1)}


async def three():
    return {**(await Pause(1) or 5) for _ in range(1)}


async def g_unpacked_later():
    async def numbers():
        for each in ([1, 2], (), "c"):
            await Pause(each)
            yield each

    held = (*each async for each in numbers())
    found = [await anext(held)]
    await Pause("between")
    found += [each async for each in held]
    return (found, [*each async for each in numbers()])


def g_frozen_dictionary_is_held():
    held = frozendict(a=[1], b=2)
    same = held
    yield "held"
    held["a"].append(3)
    return (held, same is held, held | {"c": 4})


def g_frozen_dictionary_is_looked_through():
    held = frozendict(a=1, b=2, c=3)
    names, views, back = iter(held), (held.keys(), held.items(), held.values()), reversed(held.items())
    yield next(names)
    yield next(back)
    return ([*names], [*map(list, views)], [*back], [type(view).__name__ for view in views])


def g_frozen_dictionary_in_a_ring():
    ring = []
    ring.append(frozendict(ring=ring))
    yield "held"
    return ring[0]["ring"] is ring


def g_lazy_imports():
    yield js.dumps([1])
    return (OrderedDict(a=1), js.loads("[2]"))


def g_sentinel_is_held():
    held = NAMES
    yield repr(held)
    return held is NAMES
