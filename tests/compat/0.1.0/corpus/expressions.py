"""Expressions that hold a yield: every position, with a log of the evaluation order."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



def f(*a, **k):
    log(("call", a, k))
    return (a, k)


class It:
    def __init__(self, name, *items):
        self.name, self.items = name, items

    def __iter__(self):
        log(("iter", self.name))
        return iter(self.items)


class Map:
    def __init__(self, **items):
        self.items = items

    def keys(self):
        log("keys")
        return list(self.items)

    def __getitem__(self, k):
        log(("get", k))
        return self.items[k]


class V:
    def __init__(self, n):
        self.n = n

    def __repr__(self):
        return f"V({self.n!r})"

    def __hash__(self):
        log(("hash", self.n))
        return 1

    def __eq__(self, other):
        log(("eq", self.n))
        return isinstance(other, V) and self.n == other.n

    def __bool__(self):
        log(("bool", self.n))
        return bool(self.n)

    def __add__(self, other):
        log(("add", self, other))
        return V((self.n, "+", other))

    __sub__ = __matmul__ = __mul__ = __add__

    def __radd__(self, other):
        log(("radd", other, self))
        return V((other, "r+", self.n))

    def __iadd__(self, other):
        log(("iadd", self, other))
        self.n = (self.n, "+=", other)
        return self

    def __neg__(self):
        return log(("neg", self.n))

    def __lt__(self, other):
        log(("lt", self, other))
        return V(self.n < 5) if isinstance(self.n, int) else True

    def __gt__(self, other):
        log(("gt", self, other))
        return True

    def __contains__(self, x):
        log(("contains", x))
        return True

    def __format__(self, spec):
        log(("format", self.n, spec))
        return f"<{self.n}>"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        log(("getattr", name))
        return V(name)

    def __getitem__(self, i):
        log(("getitem", i))
        return V(i)

    def m(self, *a):
        log(("m", a))
        return self


def g_call_args():
    return (log("f") and f)(log(1), (yield "a"), log(2), k=log(3), j=(yield "j"), z=log(4))


def g_call_function_yields():
    return ((yield "fn") or f)(log(1))


def g_call_single_star():
    return f(*It("a", 1, 2), k=(yield "k"))


def g_call_star_then_yield():
    return f(*It("a", 1), (yield "y"), *It("b", 2))


def g_call_star_yield():
    return f(*((yield "s") or (9,)), *It("b", 2), **{"z": (yield "z")})


def g_call_keyword_before_star():
    return f(k=(yield "k"), *It("a", 1))


def g_call_double_star():
    return f(**Map(a=1, b=2), k=(yield "k"), **Map(c=3))


def g_call_double_star_duplicate():
    try:
        return f(**{"k": 1}, k=(yield "k"))
    except TypeError:
        return "duplicate"


def g_method():
    v = V(1)
    return v.m((yield "a"), log(2)).m((yield "b")).n


def g_method_attribute_order():
    return V(0).missing.also[(yield "i")].n


def g_method_bound_before_rebind():
    xs = [1]
    xs.append((xs := (yield "x")))
    return xs


def g_operators():
    a = V(1) + (yield "r") - V(2) * (yield "rr")
    b = ((yield "l") or 0) + V(3)
    b += yield "iadd"
    c = (yield "x") in V(4)
    return (a, b, c, -V((yield "neg")), not (yield "not"))


def g_operator_error():
    try:
        return log(1) + (yield "operand")
    except TypeError as e:
        return str(e)


def g_compare():
    return (log(1) == (yield "eq"), (yield "in") in [1, 10, 11], log(None) is (yield "is"))


def g_compare_chain():
    return V(1) < (yield "mid") < (yield "last")


def g_compare_chain_short():
    return V(9) < V((yield "m")) < (yield "never")


def g_compare_chain_middle():
    return V(1) < V((yield "m")) > log(3) < V((yield "end"))


def g_and_or():
    a = (yield 1) and (yield 2) and log("x")
    b = (yield 3) or (yield 4) or log("y")
    return (a, b, log(0) or (yield 5) and log(6))


def g_boolean_truth_once():
    return V(1) and (yield "a") or V(0) or (yield "b")


def g_conditional():
    a = (yield "t") if (yield "c") else (yield "f")
    b = log("then") if log(a) else (yield "else")
    return (a, b)


def g_subscripts():
    v = V(1)
    return (log(v)[(yield "i")], v[log(1):(yield "u"):log(2)], v[(yield "a"), log("b"), ...])


def g_attribute():
    return ((yield "o") or V(5)).real


def g_list_tuple():
    return [log(1), (yield "a"), *It("x", 2), (yield "b"), *It("y", 3)], (*It("z", 4), (yield "c"))


def g_set_hashes_at_end():
    s = {V(1), (yield "a"), V(2)}
    return len(s)


def g_set_star():
    s = {*It("x", V(1)), (yield "a"), V(1)}
    return len(s)


def g_dict_hashes_at_end():
    d = {V(1): log("v"), V(2): (yield "a"), (yield "k"): log(2)}
    return len(d)


def g_dict_double_star():
    d = {V(1): log("v"), **Map(a=1), "b": (yield "b"), **Map(c=3), V(2): (yield "d")}
    return list(d)[1:3]


def g_fstring():
    return f"{V(1)}{(yield 'a')}{V(2):>{(yield 'w') or 4}}{(yield 'r')!r:>6}{log(3)=}"


def g_fstring_formats_before_yield():
    xs = [1]
    return f"{xs} {xs.append((yield 'x'))} {xs}"


def g_walrus():
    r = [(x := (yield "a")), x, (x := (yield "b")), x]
    return (r, x)


def g_walrus_earlier_load():
    x = 1
    return [x, (x := (yield "a")), x, (yield "b"), x]


def g_name_loads_keep_order():
    x = 1

    def bump():
        nonlocal x
        x += 1
        return x
    return [x, bump(), (yield x), x, bump(), (yield x), x]


def g_nested_yields():
    r = yield (yield (yield 1))
    s = yield (yield "p"), (yield "q"), *((yield "star") or (1,))
    return (r, s)


def g_lambda_default():
    h = lambda a, b=(yield "b"), *, c=(yield "c"): (a, b, c)
    yield "made"
    return h(1)


def g_comprehension_over_yield():
    a = [log(x) for x in (yield "list") or (1, 2)]
    b = {x: x for x in (yield "dict") or "ab"}
    c = sum(x for x in ((yield "gen") or (1, 2)))
    return (a, b, c)


def g_comprehension_error_in_iterable():
    try:
        return [x for x in (yield "it")]
    except TypeError as e:
        return str(e)


def g_comprehension_captures():
    n = yield "n"
    k = 3
    return [(n, k, x, (lambda: (x, k))()) for x in range(k) if x != n]


def g_deep_mixed():
    return f(log(1), [(yield "a"), {"k": (yield "b") and log(2)}], *It("x", (yield "c")), k=-((yield "d") or 1))


def g_conditional_in_call():
    return f(log("a"), (yield "t") if (yield "c") else log("f"), log("z"))


def g_await_like_unary_and_slices():
    xs = list(range(20))
    return xs[(yield "lo") or 0:((yield "hi") or 5):(1 if (yield "s") else 2)]


def g_builtin_and_method_functions():
    return max(len("abc"), (yield "n") or 0, key=abs), "x".join([str((yield "s")), "b"])


def g_spilled_dict_and_generator():
    def items():
        yield 1
        yield 2
    return [list(items()), (yield "a"), [*items()], (yield "b")]
