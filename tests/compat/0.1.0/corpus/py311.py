"""Syntax that 3.11 brought: star in subscripts, except* around (not across) a yield."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



class V:
    def __getitem__(self, i):
        log(("getitem", i))
        return i


def g_star_subscript():
    return V()[(yield "a"), *log([1, 2]), (yield "b")]


def g_except_star_body():
    r = []
    try:
        r.append((yield "body"))
        raise ExceptionGroup("g", [ValueError(1), KeyError(2)])
    except* ValueError as e:
        r.append(("v", len(e.exceptions)))
    except* KeyError as e:
        r.append(("k", len(e.exceptions)))
    yield "after"
    return r
