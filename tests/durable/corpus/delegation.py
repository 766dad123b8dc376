"""yield from: generators, iterators, values, errors on the way down and up."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



def inner(tag, n=2):
    try:
        for i in range(n):
            log((tag, (yield (tag, i))))
        return tag * 2
    finally:
        log(("inner ends", tag))


def catching(tag):
    while True:
        try:
            got = yield tag
        except ValueError as e:
            log(e)
            got = yield "caught"
        if got is False or len(LOG) > 8:
            return "left"
        log(got)


def g_from_generator():
    a = yield from inner("a")
    log(a)
    b = yield from inner("b", 1)
    return a + b


def g_from_statement():
    yield from inner("a")
    yield "between"
    yield from ()


def g_from_list():
    r = yield from [1, 2, 3]
    return r


def g_from_iterators():
    yield from range(2)
    yield from "ab"
    yield from {"k": 1}
    yield from iter((1, 2))
    return "end"


def g_from_catching():
    return (yield from catching("c"))


def g_from_in_try():
    try:
        r = yield from inner("a")
    except ValueError as e:
        r = yield ("caught", e.args)
    else:
        yield "else"
    finally:
        yield "f"
    return r


def g_from_nested():
    def level(n):
        log(("down", n))
        if n:
            r = yield from level(n - 1)
        else:
            r = yield "bottom"
        log(("up", n, r))
        return (n, r)
    return (yield from level(4))


def g_from_in_expression():
    return [log("first"), (yield from inner("x", 1)), log("last"), (yield from inner("y", 1))]


def g_from_in_loop():
    r = []
    for t in ("a", "b"):
        r.append((yield from inner(t, 1)))
    return r


def g_from_iterable_yields():
    yield from (yield "iterable") or [1]


def g_from_in_with_and_handler():
    try:
        raise KeyError("k")
    except KeyError:
        yield from inner("h")
        raise


def g_from_in_finally():
    try:
        return "r"
    finally:
        yield from inner("f")


class It:
    def __init__(self):
        self.n = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.n += 1
        if self.n > 3:
            raise StopIteration("it value")
        return self.n


class Full(It):
    def send(self, value):
        log(("send", value))
        return next(self)

    def throw(self, cls, exc=None, tb=None):
        log(("throw", cls if exc is None else exc))
        return "thrown"

    def close(self):
        log("close")


def g_from_class():
    return (yield from It())


def g_from_full_class():
    return (yield from Full())


def g_from_shared_iterator():
    it = iter([1, 2, 3, 4])
    for x in it:
        yield ("for", x)
        if x == 1:
            yield next(it)
            yield from it
    return list(it)


def g_from_generator_kept_in_local():
    g = inner("kept")
    yield next(g)
    r = yield from g
    yield list(g)
    return r


class Broken:
    def __iter__(self):
        return self

    def __next__(self):
        return 1

    def __getattr__(self, name):
        log(name)
        raise ZeroDivisionError(name)


def g_from_a_broken_iterator():
    try:
        yield from Broken()
    except Exception as error:
        log(error)
        yield "caught"
    yield "end"
