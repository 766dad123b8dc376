"""contextlib's exit stacks: entered and left while something is waited for."""

import contextlib

LOG = []


def log(x):
    LOG.append(repr(x))
    return x


class Pause:
    def __init__(self, value):
        self.value = value

    def __await__(self):
        return (yield self.value)


class Manager:
    """Fails or swallows as its name says."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        log(("enter", self.name))
        return self.name

    def __exit__(self, cls, error, tb):
        log(("exit", self.name, repr(error), repr(error and error.__context__)))
        if "fails" in self.name:
            raise KeyError(self.name)
        return "swallows" in self.name

    async def __aenter__(self):
        await Pause(("entering", self.name))
        if "refuses" in self.name:
            raise LookupError(self.name)
        return self.__enter__()

    async def __aexit__(self, cls, error, tb):
        await Pause(("leaving", self.name))
        return self.__exit__(cls, error, tb)


@contextlib.asynccontextmanager
async def managed(name):
    await Pause(("acquire", name))
    try:
        yield name
    finally:
        log(("release", name, await Pause(("releasing", name))))


@contextlib.contextmanager
def opened(name):
    log(("open", name))
    try:
        yield name
    finally:
        log(("close", name))


async def note(*args, **kwds):
    log(("note", args, kwds, await Pause("noting")))
    return True  # of a callback: not asked


async def on_exit(cls, error, tb):
    return log(("on_exit", repr(error), await Pause("on exit"))) and isinstance(error, ValueError)


async def g_enters_and_leaves_in_reverse():
    async with contextlib.AsyncExitStack() as stack:
        names = [await stack.enter_async_context(Manager(n)) for n in "ab"]
        names.append(await stack.enter_async_context(managed("m")))
        stack.push_async_callback(note, 1, k=2)
        stack.push_async_exit(on_exit)  # what is below waits before it does anything: natively a dropped coroutine would go on with it
        names.append(stack.enter_context(Manager("sync")))
        names.append(stack.enter_context(opened("o")))
        await Pause(names)
        stack.callback(log, "plain")
        await Pause("body")
    return await Pause("after")


async def g_an_error_in_the_body_is_shown_to_each():
    try:
        async with contextlib.AsyncExitStack() as stack:
            for name in ("a", "fails b", "c", "fails d"):
                await stack.enter_async_context(Manager(name))
            await Pause("body")
            raise RuntimeError("body")
    except (KeyError, RuntimeError) as error:
        found = []
        while error is not None:
            found.append(repr(error))
            error = error.__context__
        return await Pause(found)


async def g_one_swallows():
    async with contextlib.AsyncExitStack() as stack:
        for name in ("a", "swallows", "fails"):
            await stack.enter_async_context(Manager(name))
        await Pause("body")
        raise RuntimeError("body")
    return await Pause("after")


async def g_an_exit_function_swallows():
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(on_exit)
        stack.push(Manager("pushed"))
        raise ValueError(await Pause("body"))
    return "after"


async def g_one_that_cannot_be_entered():
    try:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(Manager("a"))
            await stack.enter_async_context(Manager("refuses"))
    except LookupError as error:
        return await Pause(repr(error))


async def g_no_manager():
    found = []
    async with contextlib.AsyncExitStack() as stack:
        for wrong in (3, contextlib.suppress()):
            try:
                await stack.enter_async_context(wrong)
            except TypeError as error:
                found.append(str(error))
            await Pause("next")
    return found


async def g_closed_by_hand_and_taken_over():
    stack = contextlib.AsyncExitStack()
    await stack.enter_async_context(Manager("a"))
    await stack.enter_async_context(Manager("b"))
    other = stack.pop_all()
    log(await stack.aclose())
    await Pause("still open")
    stack.push_async_callback(note, "first")
    log(await stack.aclose())
    log(await other.aclose())
    return await Pause("closed")


async def g_stacks_in_stacks():
    async with contextlib.AsyncExitStack() as outer:
        inner = await outer.enter_async_context(contextlib.AsyncExitStack())
        await inner.enter_async_context(Manager("in"))
        third = outer.enter_context(contextlib.ExitStack())
        third.enter_context(Manager("third"))
        third.callback(log, "called")
        await outer.enter_async_context(contextlib.nullcontext(5))
        await Pause("body")
    return "after"


async def g_a_stack_that_outlives_its_block():
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(Manager("a"))
        kept = stack.pop_all()
    await Pause("left")
    async with kept:
        await Pause("again")
        return "from inside"


def g_exit_stack_with_callbacks():
    with contextlib.ExitStack() as stack:
        stack.enter_context(Manager("swallows"))
        stack.callback(log, "first")
        stack.push(lambda *error: log(("lambda", repr(error[1]))) and None)
        stack.enter_context(opened("o"))
        log((yield "body"))
        raise RuntimeError("body")
    return (yield "after")


def g_exit_stack_callbacks_know_the_stack():
    stack = contextlib.ExitStack()
    stack.callback(lambda: log(len(stack._exit_callbacks)))
    stack.callback(stack.close)
    yield "open"
    stack.close()
    yield "closed"
