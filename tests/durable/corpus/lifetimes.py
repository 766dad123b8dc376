"""How long objects live: nothing that a statement needed on its way is held after it."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



class Thing:
    def __init__(self, name):
        self.name = name

    def __del__(self):
        log(("gone", self.name))

    def same(self, x):
        return x

    def pair(self, x):
        return [x, 2]

    def __iadd__(self, x):
        return Thing(self.name + "+")

    def __eq__(self, other):
        return True

    def __enter__(self):
        return Thing(self.name + " entered")

    def __exit__(self, *error):
        return False


class Failed(Exception):
    def __del__(self):
        log(("gone", "error"))


def g_argument_and_object():
    x = Thing("object").same((yield 1))
    log(("after", x))
    yield 2
    return "end"


def g_sent_value_and_display():
    [Thing("first"), (yield 1), Thing("last")]
    log("after")
    x = {"k": Thing("kept"), "y": (yield 2)}
    log("held")
    x = yield 3
    log("after")


def g_comparisons_and_choices():
    Thing("a") == (yield 1)
    log("compared")
    (yield 2) or Thing("b")
    log("or")
    (Thing("c") if (yield 3) else Thing("d"))
    log("if")
    yield 4


def g_test_of_if():
    if Thing("test").same((yield 1)):
        log("body")
        yield 2
    else:
        log("else")
        yield 3
    if Thing("test without else").same((yield 4)):
        log("body")
    log("after")
    yield 5


def g_test_of_while():
    n = 0
    while Thing("test").same((yield n)) and n < 3:
        log("body")
        n += 1
        yield "body"
    log("after")
    yield "end"


def g_source_of_for():
    for x in Thing("source").pair((yield 1)):
        log(x)
    for x in Thing("source that waits").pair((yield 2)):
        log(x)
        yield 3
    log("after")
    yield 4


def g_loop_variable_deleted():
    for x in map(Thing, "ab"):
        yield x.name
        del x
        log("deleted")
    yield "end"


def g_manager():
    with Thing("manager") as x:
        yield x.name
        del x
        log("deleted")
        yield 2
    log("after")
    yield 3


def g_manager_left_early():
    for n in range(2):
        with Thing("manager"):
            if (yield n):
                break
        log("after")
    log("out")
    try:
        with Thing("failing"):
            yield "in"
            raise ValueError
    except ValueError:
        log("handler")
        yield "handler"


def g_subject():
    match Thing("subject").pair((yield 1)):
        case [0, _]:
            log("zero")
        case [x, _]:
            log("matched")
            yield 2
    log("after")
    yield 3


def g_targets():
    a = {}
    a[Thing("key").same((yield 1))] = 1
    log("set")
    a[(yield 2)], b = Thing("x"), (yield 3)
    log("unpacked")
    a.clear()
    log("cleared")
    t = Thing("old")
    t += yield 4
    log("augmented")
    del t
    log("deleted")
    yield 5


def g_raised():
    try:
        raise Failed(1) if (yield 0) else Failed(2)
    except Exception as e:
        log(type(e).__name__)
        del e
    log("handled")
    yield 1
    try:
        raise Failed("x")
    except Failed:
        yield 2
    log("handled again")
    yield 3


def g_finally_that_waits():
    try:
        x = Thing("in body")
        yield 1
        del x
        log("deleted")
        yield 2
        raise Failed("x")
    except Failed:
        log("caught")
    finally:
        yield 3
    try:
        try:
            raise Failed("y")
        finally:
            yield 4
            raise Failed("z")
    except Failed as error:
        error.__context__ = None
        log("z")
    log("after")
    yield 5


def ending(name):
    try:
        yield 1
        yield 2
    finally:
        log(("ends", name))


def g_iterators_end_where_they_are_left():
    try:
        for x in ending("raise"):
            yield x
            raise ValueError
    except ValueError:
        log("handler")
        yield "handler"
    try:
        for x in ending("finally"):
            yield x
            if x == 1:
                raise KeyError
        yield "not here"
    except KeyError:
        yield "caught"
    finally:
        log("finally")
        yield "finally"
    with Swallowing():
        for x in ending("with"):
            yield x
            raise ValueError
    yield "after"
    while True:
        with Swallowing():
            for x in ending("break"):
                yield x
                break
            break
    try:
        for x in ending("return"):
            yield x
            return "returned"
    finally:
        log("last")


class Swallowing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        log("exit")
        return True
