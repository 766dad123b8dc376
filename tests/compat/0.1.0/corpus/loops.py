"""Branches and loops: where a yield may stand in them, and how each clause is left."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



def g_straight():
    a = yield 1
    b = yield log(a)
    c = yield
    return (a, b, c)


def g_if_elif_else():
    a = yield "a"
    if log(a):
        b = yield "then"
    elif log("elif") and a is None:
        b = yield "elif"
    else:
        b = yield "else"
    return (a, b)


def g_if_condition_yields():
    if (yield "c1"):
        log("one")
    elif (yield "c2"):
        log("two")
    else:
        log((yield "else"))
    return "end"


def g_if_nested():
    r = []
    for n in range(4):
        if n % 2:
            if (yield n):
                r.append((yield "in"))
            else:
                r.append((yield "out"))
        elif n:
            r.append((yield "even"))
    return r


def g_while_else():
    n = 0
    while n < 3:
        log(n)
        got = yield n
        n += 1
        if got is False:
            continue
        log("tail")
    else:
        log((yield "else"))
    return n


def g_while_break():
    n = 0
    while True:
        n += 1
        if n == 3:
            yield "breaking"
            break
        yield n
    else:
        yield "never"
    return n


def g_while_condition_yields():
    n = 0
    while (yield ("cond", n)) and n < 3:
        n += 1
        if n == 2:
            continue
        yield ("body", n)
    else:
        yield "else"
    return n


def g_while_yield_only_in_else():
    n = 0
    while log(n) < 2:
        n += 1
    else:
        n = yield "else1"
        log((yield "else2"))
    return n


def g_for_else():
    for i in [1, 2, 3]:
        if (yield i) is False:
            break
        log(("after", i))
    else:
        yield "else"
    return i


def g_for_else_only_yield_in_else():
    for i in log([1, 2]):
        log(i)
    else:
        yield "e1"
        yield "e2"
    return i


def g_for_continue():
    r = []
    for i in range(5):
        if i % 2:
            yield ("skip", i)
            continue
        r.append((i, (yield i)))
    return r


def g_for_iterable_yields():
    for i in (yield "iterable") or [7, 8]:
        yield i
    return "end"


def g_for_iterable_throws_on_int():
    for i in (yield "iterable"):
        yield i


def g_for_target_unpacks():
    d = {}
    for d["k"], (a, *b) in [(1, "xyz"), (2, "pq")]:
        yield (d["k"], a, b)
    return d


def g_for_target_yields():
    d = {}
    for d[(yield "key")] in "ab":
        yield sorted(map(str, d.items()))
    return len(d)


def g_nested_loops():
    r = []
    for i in range(3):
        j = 0
        while j < 2:
            if (yield (i, j)) is False:
                break
            j += 1
        else:
            r.append(i)
            continue
        r.append(-i)
        if i == 2:
            break
    else:
        yield "completed"
    return r


def g_nested_for_three():
    for a in "xy":
        for b in (1, 2):
            for c in [True, False]:
                yield (a, b, c)
            log("c done")
        else:
            yield ("else", a)
    return (a, b, c)


def g_loop_var_rebound():
    for i in [1, 2, 3]:
        i = i * 10
        got = yield i
        i = got
        log(i)
    return i


def g_for_empty():
    for i in []:
        yield "no"
    else:
        yield "else"
    try:
        i
    except UnboundLocalError as e:
        yield type(e).__name__


def g_unbound_after_restore():
    if (yield "bind?"):
        x = 1
    yield "check"
    try:
        log(x)
    except UnboundLocalError as e:
        return type(e).__name__
    del x
    yield "deleted"
    try:
        return x
    except UnboundLocalError:
        return "unbound"


def g_return_in_loops():
    for i in range(3):
        while True:
            if (yield i) is False:
                return ("left", i)
            if i:
                break
            i += 5
    return "all"


def g_list_grows_while_iterated():
    xs = [1, 2]
    for x in xs:
        if x < 4:
            xs.append(x + 2)
        yield x
    return xs
