"""Targets and simple statements that hold a yield: evaluation order and state."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



class O:
    def __init__(self, name):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "d", {})

    def __setattr__(self, k, v):
        log(("setattr", self.name, k, v))
        self.d[k] = v

    def __getattr__(self, k):
        if k.startswith("__") or k == "d":
            raise AttributeError(k)
        log(("getattr", self.name, k))
        return self.d.get(k, 0)

    def __delattr__(self, k):
        log(("delattr", self.name, k))

    def __setitem__(self, k, v):
        log(("setitem", self.name, k, v))
        self.d[str(k)] = v

    def __getitem__(self, k):
        log(("getitem", self.name, k))
        return self.d.get(str(k), 0)

    def __delitem__(self, k):
        log(("delitem", self.name, k))


class L(list):
    def __iadd__(self, other):
        log(("iadd", list(self), other))
        return L([*self, other])


def ob(name):
    log(("ob", name))
    return O(name)


def g_subscript_target():
    ob("a")[(yield "i")] = log("v")
    ob("b")[log("j")] = yield "w"
    return "end"


def g_attribute_target():
    ob("a").x = yield "v"
    o = ob("b")
    o.y = o.z = yield "w"
    return o.d


def g_multiple_targets():
    o = O("o")
    x = o[(yield "i")] = y = o.k = yield "v"
    return (x, y)


def g_unpack_targets():
    o = O("o")
    o[(yield "i")], *rest, o.last = log((1, 2, 3, 4))
    return rest


def g_unpack_nested():
    (a, [b, *c]), d = (yield "v") or ((1, "xyz"), 2)
    return (a, b, c, d)


def g_unpack_fails():
    try:
        a, b = (yield "v")
    except (TypeError, ValueError) as e:
        return str(e)


def g_slice_target():
    xs = [0, 1, 2, 3, 4]
    xs[(yield "lo") or 1:3] = [log("n"), (yield "v")]
    return xs


def g_augmented_name():
    x = 1
    x += yield x
    x *= (yield x) or 2
    return x


def g_augmented_name_rebound_meanwhile():
    x = 1

    def change():
        nonlocal x
        x = 100
        return 1
    x += (yield "v") and change() or change()
    return x


def g_augmented_iadd():
    xs = same = L([1])
    xs += yield "v"
    return (xs, same, xs is same)


def g_augmented_list_in_place():
    xs = same = [1]
    xs += [(yield "v")]
    return (xs is same, same)


def g_augmented_subscript():
    o = O("o")
    o[(yield "i")] += log(1)
    ob("p")[log("k")] += (yield "v") or 5
    return o.d


def g_augmented_attribute():
    o = O("o")
    o.n += (yield "v") or 3
    o.n -= yield "w"
    return o.d


def g_augmented_error():
    x = "s"
    try:
        x += yield "v"
    except TypeError as e:
        return str(e)
    return x


def g_annotated():
    x: int = yield "x"
    o = O("o")
    o[(yield "i")]: str = log("v")
    y: "unused"
    return x


def g_del():
    o = O("o")
    x = 1
    del o[(yield "i")], o.attr, x, o[(yield "j")]
    try:
        return x
    except UnboundLocalError:
        return "unbound"


COUNT = 0


def g_global():
    global COUNT
    COUNT = 0
    COUNT += (yield COUNT) or 7
    yield COUNT
    return COUNT


def g_import():
    import math
    from os.path import join as j, basename
    yield math.floor(2.5)
    import collections.abc as abc
    yield j("a", "b").replace("\\", "/")
    return (basename("x/y"), abc.__name__)


def g_docstring():
    "the docstring"
    yield 1
    return "end"


def g_parameters(a=1, /, b=2, *args, c=3, **kw):
    a = yield (a, b, args, c, kw)
    b += 1
    yield (a, b)
    kw["k"] = args
    return (a, b, args, c, kw)


def g_keeps_line_and_pass():
    pass
    ...
    yield ...
    return NotImplemented


def g_identity_of_values():
    a = []
    b = [a, a]
    t = (a, b)
    yield 1
    a.append(1)
    yield (b, t)
    return (b[0] is b[1], t[0] is a)


def g_recursive_list():
    a = [1]
    a.append(a)
    yield len(a)
    return a[1] is a and a[1][1] is a


def g_many_locals():
    a, b, c, d, e = 1, "two", 3.0, b"4", (5, frozenset({6}), {7: [8]})
    yield "saved"
    import datetime, decimal
    f, g = datetime.timedelta(days=1), decimal.Decimal("1.5")
    yield "saved more"
    return (a, b, c, d, e, f, g)
