"""with statements: several items, swallowing exits, every way out."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



class M:
    def __init__(self, name, swallow=False):
        self.name, self.swallow = name, swallow
        log(("init", name))

    def __enter__(self):
        log(("enter", self.name))
        return self.name

    def __exit__(self, cls, exc, tb):
        log(("exit", self.name, cls and cls.__name__, exc, tb is None))
        return self.swallow


class BadExit(M):
    def __exit__(self, cls, exc, tb):
        log("bad exit")
        raise RuntimeError("exit failed")


def g_with():
    with M("a") as a:
        log((yield a))
        yield 2
    return "end"


def g_with_two():
    with M("a") as a, M("b") as b:
        yield (a, b)
        log("body")
    yield "after"


def g_with_swallows():
    with M("a", True):
        yield "in"
        raise ValueError("v")
    yield "after"
    return "end"


def g_with_outer_swallows():
    with M("a", True), M("b"):
        yield "in"
        raise ValueError("v")
    return "end"


def g_with_return():
    with M("a"):
        return (yield "in")


def g_with_break_continue():
    for i in range(4):
        with M(i):
            if i == 1:
                continue
            if i == 3:
                break
            yield i
        log("tail")
    return i


def g_with_item_yields():
    with M((yield "name a")) as a, M((yield "name b"), True) as b:
        yield (a, b)
    return "end"


def g_with_target_subscript():
    d = {}
    with M("a") as d["x"], M("b") as d["y"]:
        yield d
    return d


def g_with_target_yields():
    d = {}
    with M("a", True) as d[(yield "key")]:
        yield len(d)
    return len(d)


def g_with_target_unpack_fails():
    with M("a", True) as (p, q):
        yield "never"
    yield "swallowed"


def g_with_exit_raises():
    try:
        with BadExit("a"):
            yield "in"
    except RuntimeError as e:
        yield ("caught", e.__context__)
    return "end"


def g_with_in_handler():
    try:
        raise ValueError("v")
    except ValueError:
        with M("a"):
            yield "in"
            raise


def g_with_in_finally():
    try:
        return (yield "body")
    finally:
        with M("f"):
            yield "in finally"


def g_finally_in_with():
    with M("a", True):
        try:
            yield "body"
            raise ValueError("v")
        finally:
            yield "f"
    return "end"


def g_with_manager_missing():
    try:
        with object():
            yield "never"
    except (AttributeError, TypeError):
        yield "refused"


def g_with_nested_loop():
    for i in range(2):
        with M(("o", i)):
            for j in range(2):
                with M(("i", i, j), True):
                    yield (i, j)
                    if j:
                        raise KeyError(j)


def g_with_library_managers():
    import contextlib
    with contextlib.suppress(KeyError), contextlib.nullcontext(5) as five:
        yield five
        raise KeyError("k")
    yield "after"


def g_with_manager_name_rebound():
    m = M("a")
    with m:
        m = M("other")
        yield m.name
    return m.name
