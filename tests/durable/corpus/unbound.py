"""Variables that hold nothing, shared with closures or not."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x


def g_reads_what_was_deleted():
    x = 1
    f = lambda: x
    yield f()
    del x
    try:
        yield x
    except UnboundLocalError as error:
        yield str(error)
    try:
        f()
    except NameError as error:
        yield (type(error).__name__, str(error))
    x = 2
    yield f() + x


def g_reads_what_was_never_bound():
    def f():
        return later
    try:
        yield [later for _ in range(1)] if (yield "ask") == "comprehension" else f"{later}"
    except NameError as error:
        yield isinstance(error, NameError)
    for name in [(yield "x")]:
        try:
            log(later.attribute)
        except UnboundLocalError as error:
            yield str(error)
    later = 3
    yield (f(), later, [later + n for n in range(2)], {later: later}, later if later else None)


def g_iterates_what_is_unbound():
    f = lambda: rows
    yield 1
    try:
        yield [row for row in rows]
    except UnboundLocalError as error:
        yield str(error)
    rows = [1]
    yield [row for row in rows]


def g_patterns_name_shared_variables():
    class Point:
        __match_args__ = ("x",)
        ORIGIN = 0

        def __init__(self, x):
            self.x = x

    def make(x):
        return Point(x)

    yield "made"
    match make((yield "x")):
        case Point(Point.ORIGIN):
            yield "origin"
        case Point(x) if Point:
            yield ("point", x)


def g_changes_shared_variables():
    n, box = 0, []
    f = lambda: (n, box)
    yield f()
    n += 1
    box.append((yield n))
    box[0:1] = [n]
    n += (yield box) or 2
    yield f()


def g_changes_what_is_unbound():
    f = lambda: (a, b, c)
    yield 1
    for number in range(4):
        try:
            if number == 0:
                a += 1
            elif number == 1:
                b -= (yield "value")
            elif number == 2:
                del c
            else:
                c, b = 1, 2
                del c, b, a
        except UnboundLocalError as error:
            log((yield str(error)))


def g_comprehension_of_what_is_unbound():
    f = lambda: (c, d)
    for number in range(3):
        yield number
        try:
            if number == 0:
                log([c for n in (1, 2)])
            elif number == 1:
                log([[d for m in (n, 0) if (c := 1)] for n in (1, 2)])
            else:
                log({n: (d if n else c) for n in (0, 1)})
        except NameError as error:
            said = type(error).__name__, str(error)  # not waited for in here: a minor has words of its own, which would be saved with the error
        log((yield said))
    yield len(f.__closure__)
