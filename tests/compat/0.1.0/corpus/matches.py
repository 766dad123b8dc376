"""match statements: guards, bindings of failed cases, yields in subject, guard and body."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



class P:
    __match_args__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


def g_match_body():
    for v in (1, "s", [1, 2, 3], {"k": 5, "z": 6}, P(1, 2), None, 3.5):
        match v:
            case 1:
                yield "one"
            case str(s):
                log((yield s))
            case [a, *rest]:
                yield (a, rest)
            case {"k": k, **others}:
                yield (k, others)
            case P(x, y=yy):
                yield (x, yy)
            case None:
                log("none")
            case _:
                yield "default"
    return "end"


def g_match_subject_yields():
    match (yield "subject"):
        case 10 | 11:
            yield "ten"
        case None:
            yield "none"
        case bool(b):
            yield ("bool", b)
        case other:
            yield other
    return "end"


def g_match_guard():
    for v in range(4):
        match log(v):
            case n if log(n) > 2:
                yield ("big", n)
            case 1 | 2 as n if n == 2:
                yield "two"
            case n:
                yield ("rest", n)


def g_match_guard_yields():
    match [1, 2]:
        case [a, b] if (yield ("g1", a)):
            r = yield "first"
        case [a, c] if (yield ("g2", c)):
            r = yield "second"
        case _:
            r = yield "third"
    return (r, a, b)


def g_match_loop_control():
    for v in "abcd":
        match v:
            case "b":
                yield "b"
                continue
            case "d":
                yield "d"
                break
            case x:
                log(x)
        yield "tail"
    return v


def g_match_no_case():
    match (yield "v"):
        case "never":
            yield "no"
    return "end"


def g_match_in_try():
    try:
        match (yield "v"):
            case 10:
                raise ValueError("ten")
            case v:
                return v
    except ValueError:
        yield "h"
    finally:
        yield "f"
