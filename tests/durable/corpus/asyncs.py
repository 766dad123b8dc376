"""async def: await, async for, async with, comprehensions, async generators, contextlib's managers."""

import contextlib

LOG = []


def log(x):
    LOG.append(repr(x))
    return x


class Pause:
    """Yields its value to the driver and returns what the driver sends."""

    def __init__(self, value):
        self.value = value

    def __await__(self):
        return (yield self.value)


class Counted:
    def __init__(self, n):
        self.n = n

    def __aiter__(self):
        log("aiter")
        return self

    async def __anext__(self):
        if self.n == 0:
            raise StopAsyncIteration
        self.n -= 1
        await Pause(("next", self.n))
        return self.n


class Manager:
    def __init__(self, name, swallow=False, waits=True):
        self.name, self.swallow, self.waits = name, swallow, waits

    async def __aenter__(self):
        log(("enter", self.name))
        if self.waits:
            await Pause(("entering", self.name))
        return self.name

    async def __aexit__(self, cls, error, tb):
        log(("exit", self.name, cls and cls.__name__, repr(error)))
        if self.waits:
            await Pause(("leaving", self.name))
        return self.swallow and cls is not None and issubclass(cls, Exception)


async def child(n):
    got = await Pause(("child", n))
    return (n, got)


async def never_waits(x):
    return x


async def g_never_waits():
    return 5


async def g_await():
    a = await Pause("a")
    b = await child(1)
    return (a, b, await never_waits(7))


async def g_await_positions():
    x = [await Pause(1), await child(2)]
    y = {"k": await Pause(3), **{"m": (await Pause(4))}}
    z = f"{await Pause(5)}-{x}"
    w = (await Pause(6)) or (await Pause(7))
    return (x, y, z, w, log(await Pause(8)) if await Pause(9) else await Pause(10))


async def g_await_errors():
    found = []
    for bad in (5, None, [1], (x for x in "ab")):
        try:
            await bad
        except TypeError as error:
            found.append(str(error))
        await Pause(len(found))
    return found


async def g_await_in_try():
    try:
        return await Pause("try")
    except ValueError as error:
        log(repr(error))
        return await child("handled")
    finally:
        log("finally")
        await Pause("finally")


class Bad:
    def __await__(self):
        return 5


async def g_await_bad_await_method():
    try:
        await Bad()
    except TypeError as error:
        return (str(error), await Pause(1))


async def g_closure():
    total = 0

    async def add(n):
        nonlocal total
        total += n
        total += await Pause(total) or 0
        return lambda: total
    show = await add(1)
    await Pause("between")
    await add(2)
    return show()


async def g_recursion():
    async def down(n):
        if n == 0:
            return [await Pause("bottom")]
        return [n] + await down(n - 1)
    return await down(3)


class Thing:
    async def method(self, x):
        return (type(self).__name__, await Pause(x))

    @classmethod
    async def of_class(cls, x):
        return (cls.__name__, await Pause(x))

    @staticmethod
    async def of_none(x):
        return await Pause(x)


class Better(Thing):
    async def method(self, x):
        first = await super().method(x)
        return (first, await Pause("sub"))


async def g_methods():
    return (await Better().method(1), await Better.of_class(2), await Thing.of_none(3))


async def g_async_for():
    seen = []
    async for x in Counted(3):
        seen.append((x, await Pause(x)))
    else:
        seen.append(await Pause("else"))
    return seen


async def g_async_for_break_continue():
    seen = []
    async for x in Counted(5):
        if x == 3:
            continue
        if x == 1:
            break
        seen.append(await Pause(x))
    else:
        seen.append("else")
    return (x, seen)


async def g_async_for_target():
    box = {}
    async for box[await Pause("key")], *rest in Pairs(2):
        log(rest)
    return sorted(map(repr, box.items()))


class Pairs(Counted):
    async def __anext__(self):
        n = await super().__anext__()
        return (n, n + 1, n + 2)


async def g_async_for_error_in_body():
    try:
        async for x in Counted(3):
            try:
                await Pause(x)
            except ValueError:
                raise StopAsyncIteration("mine")
    except StopAsyncIteration as error:
        return ("left", repr(error), await Pause("after"))


class NoNext:
    def __aiter__(self):
        return 5


async def g_async_for_refusals():
    found = []
    for bad in ([1], 5):
        try:
            async for x in bad:
                pass
        except TypeError as error:
            found.append(str(error))
        await Pause(len(found))
    try:
        async for x in NoNext():
            pass
    except TypeError as error:
        found.append(str(error))
    return found


async def g_async_for_return_in_finally():
    try:
        async for x in Counted(3):
            try:
                await Pause(x)
            finally:
                log(("finally", x))
                await Pause("cleanup")
                if x == 1:
                    break
    finally:
        await Pause("outer")
    return "end"


async def g_async_with():
    async with Manager("m") as name:
        log(name)
        await Pause("body")
    return await Pause("after")


async def g_async_with_swallows():
    async with Manager("m", swallow=True):
        await Pause("body")
        raise ValueError("inside")
    return await Pause("after")


async def g_async_with_several():
    async with Manager("a") as a, Manager("b", swallow=True, waits=False) as b:
        log((a, b))
        await Pause("body")
    return "after"


async def g_async_with_no_wait_in_body():
    async with Manager("m") as x:
        log(x)
    return "after"


async def g_async_with_return():
    for n in range(3):
        async with Manager(n, swallow=True) as name:
            if n == 0:
                continue
            if n == 1:
                return await Pause(name)
    return "never"


async def g_async_with_break():
    while True:
        async with Manager("m"):
            if await Pause("break?"):
                break
    return "broke"


async def g_async_with_target():
    box = {}
    async with Manager("m") as box[await Pause("key")]:
        await Pause("body")
    return sorted(map(repr, box.items()))


class NoExit:
    async def __aenter__(self):
        return self


async def g_async_with_refusals():
    found = []
    for bad in (5, NoExit()):
        try:
            async with bad:
                log("never")
        except TypeError as error:
            found.append(str(error).replace(__name__ + ".", ""))
        await Pause(len(found))
    return found


class Raises:
    async def __aenter__(self):
        return 1

    async def __aexit__(self, *exc):
        await Pause("leaving")
        raise KeyError("from exit")


async def g_async_with_exit_raises():
    try:
        async with Raises():
            await Pause("body")
            raise ValueError("from body")
    except KeyError as error:
        return (repr(error), repr(error.__context__), await Pause("after"))


async def g_sync_with_and_for_inside():
    with contextlib.suppress(ValueError):
        for n in range(2):
            log(await Pause(n))
    return "end"


async def g_list_comprehension():
    k = 10
    return [x * k async for x in Counted(3) if x != await Pause(("skip", x))]


async def g_comprehension_awaits():
    return [await child(n) for n in range(3) if n or await Pause("zero?")]


async def g_set_and_dict_comprehension():
    a = {x % 2 async for x in Counted(3)}
    b = {await Pause(("key", n)): await Pause(("value", n)) for n in range(2)}
    return (sorted(a), sorted(map(repr, b.items())))


async def g_comprehension_scopes():
    x = "outer"
    fs = [(lambda: (x, y)) async for x in Counted(2) for y in "ab"]
    await Pause("made")
    last = [y := n async for n in Counted(2)]
    return (x, [f() for f in fs], last, y)


async def g_comprehension_nested():
    return [[(a, await Pause((a, b))) for b in range(2)] async for a in Counted(2)]


async def g_comprehension_first_iterable():
    return [x + 1 for x in await child(3) if isinstance(x, int)]


async def agen(n):
    log("begun")
    try:
        for i in range(n):
            got = yield (i, await Pause(("in agen", i)))
            log(("got", got))
    except KeyError as error:
        log(("agen caught", repr(error)))
        yield "recovered"
    finally:
        log("agen finally")
        await Pause("agen cleanup")


async def g_async_generator():
    seen = []
    async for x in agen(2):
        seen.append(x)
        await Pause("outside")
    return seen


async def g_async_generator_by_hand():
    gen = agen(3)
    first = await gen.asend(None)
    second = await gen.asend("hello")
    third = await gen.athrow(KeyError("thrown in"))
    await gen.aclose()
    try:
        await anext_of(gen)
    except StopAsyncIteration:
        return (first, second, third, await Pause("ended"))


async def anext_of(gen):
    return await gen.__anext__()


async def g_async_generator_close():
    gen = agen(3)
    first = await anext_of(gen)
    await gen.aclose()
    await gen.aclose()
    return first


async def g_async_generator_left():
    gen = agen(3)
    async for x in gen:
        await Pause(x)
        break
    rest = [x async for x in gen]
    return rest


async def g_async_generator_errors():
    async def bad(kind):
        yield await Pause("first")
        raise kind("mine")
    found = []
    for kind in (ValueError, StopAsyncIteration):
        try:
            async for x in bad(kind):
                log(x)
        except Exception as error:
            found.append((type(error).__name__, str(error), repr(error.__cause__)))
    gen = agen(1)
    try:
        await gen.asend("too early")
    except TypeError as error:
        found.append(str(error))
    return found


async def g_async_generator_ignores_close():
    async def stubborn():
        while True:
            try:
                yield 1
            except GeneratorExit:
                log("no")
    gen = stubborn()
    await anext_of(gen)
    try:
        await gen.aclose()
    except RuntimeError as error:
        return (str(error), await Pause("after"))


async def g_async_generator_arguments():
    async def many(a, /, b, *c, d=4, **e):
        """Doc."""
        yield (a, b, c, d, e)
        yield await Pause("many")
    return ([x async for x in many(1, 2, 3, d=5, f=6)], many.__doc__, many.__name__)


async def g_async_generator_expression():
    k = 2
    gen = (x * k async for x in Counted(3) if x)
    first = await gen.__anext__()
    k = 100
    await Pause("held")
    return (first, [x async for x in gen])


async def g_async_generator_expression_awaits():
    gen = (await Pause(n) for n in range(2))
    return [x async for x in gen]


@contextlib.asynccontextmanager
async def released(name):
    log(("acquire", name))
    await Pause(("acquiring", name))
    try:
        yield name
    finally:
        log(("release", name))
        await Pause(("releasing", name))


@contextlib.asynccontextmanager
async def resource(name, swallow=False):
    try:
        yield name
    except ValueError as error:
        log(("seen", repr(error)))
        await Pause("handling")
        if not swallow:
            raise


async def g_asynccontextmanager():
    async with released("r") as r:
        log(await Pause(r))
    return "after"


async def g_asynccontextmanager_swallows():
    async with resource("r", swallow=True) as r:
        await Pause(r)
        raise ValueError("inside")
    return await Pause("after")


@contextlib.asynccontextmanager
async def never():
    if await Pause("yield?") == "never":
        yield 1


@contextlib.asynccontextmanager
async def twice():
    yield 1
    yield 2


async def g_asynccontextmanager_wrong():
    found = []
    for manager in (never, twice):
        try:
            async with manager():
                await Pause("body")
        except RuntimeError as error:
            found.append(str(error))
    return found


async def g_aclosing_and_nullcontext():
    async with contextlib.aclosing(agen(3)) as gen, contextlib.nullcontext(5) as five:
        async for x in gen:
            await Pause((x, five))
            break
    return "closed"


class Delegates:
    def __await__(self):
        first = yield "by hand"
        return (first, (yield from Pause("inner").__await__()))


async def g_generator_awaits_coroutine():
    return await Delegates()


async def g_lambda_and_genexp_inside():
    f = lambda x: x + 1
    g = (f(x) for x in range(3))
    first = next(g)
    await Pause(first)
    return list(g)
