"""The generator protocol itself, driven from inside so that every step is compared."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



def g_yields_none_first():
    got = yield
    while got is not None and len(LOG) < 6:
        got = yield log(got)
    return "end"


def g_empty():
    return "nothing"
    yield


def g_return_none():
    yield 1


def g_return_exception_instance():
    yield 1
    return ValueError("as a value")


def g_raises_at_once():
    raise ValueError("at once")
    yield


def g_name_and_qualname():
    def named():
        yield 1
        yield 2
    g = named()
    g.__name__, g.__qualname__ = "mine", "my.qual"
    yield next(g)
    yield (g.__name__, g.__qualname__)
    return next(g)


def g_running():
    box = []

    def me():
        try:
            next(box[0])
        except ValueError as e:
            yield str(e)
        yield "end"
    box.append(me())
    yield next(box[0])
    return next(box[0])


def g_context_of_thrown():
    def inner():
        try:
            raise KeyError("handled inside")
        except KeyError:
            try:
                yield "waiting"
            except ValueError as e:
                yield ("context", repr(e.__context__))
    g = inner()
    yield next(g)
    try:
        raise TypeError("callers")
    except TypeError:
        r = g.throw(ValueError("thrown"))
    return r


def g_caller_context():
    def inner():
        yield 1
        raise ValueError("inner")
    g = inner()
    yield next(g)
    try:
        try:
            raise TypeError("callers")
        except TypeError:
            next(g)
    except ValueError as e:
        return repr(e.__context__)


def g_stop_value():
    def inner():
        yield 1
        return (1, 2)
    g = inner()
    yield next(g)
    try:
        next(g)
    except StopIteration as e:
        return e.value
