"""Functions in functions: shared cells, nonlocal, self reference, classes, methods, super, name mangling."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



def g_closure_reads():
    x = 1
    show = lambda: x
    yield show()
    x = 2
    yield show()
    x = yield "set"
    return show()


def g_closures_share_a_cell():
    n = 0

    def up():
        nonlocal n
        n += 1
        return n

    def get():
        return n
    yield up()
    yield get()
    up()
    n += 10
    yield (n, get(), up())
    return n


def g_saga():
    undo = []

    def book(kind):
        item = yield ("book", kind)
        undo.append(lambda: log(("undo", kind, item)))
        return item
    try:
        for k in ("car", "hotel"):
            yield from book(k)
        raise ValueError("no flight")
    except ValueError:
        for u in reversed(undo):
            u()
            yield "undone"
        raise


def g_generators_share_a_cell():
    total = 0

    def adder():
        nonlocal total
        while total < 6:
            total += 1
            yield total
    a, b = adder(), adder()
    yield next(a)
    yield next(b)
    yield (next(a), next(b), total)
    total = 5
    return (list(a), list(b), total)


def g_self_reference_function():
    def down(n):
        return [n] + (down(n - 1) if n else [])
    yield down(2)
    yield "saved"
    return down(3)


def g_self_reference_generator():
    def walk(n):
        yield n
        if n:
            yield from walk(n - 1)
    w = walk(3)
    yield next(w)
    yield next(w)
    return list(w)


def g_generator_in_its_own_local():
    holder = {}

    def me():
        mine = holder["me"]
        yield mine is holder["me"]
        yield "still"
        yield mine is holder["me"]
    holder["me"] = me()
    yield next(holder["me"])
    yield next(holder["me"])
    return next(holder["me"])


def g_lambdas_in_a_list():
    fs = [lambda x, i=i: x + i for i in range(3)] + [lambda x: -x, lambda x: x * x]
    yield len(fs)
    return [f(5) for f in fs]


def g_late_binding():
    fs = []
    for i in range(3):
        fs.append(lambda: i)
        yield [f() for f in fs]
    return [f() for f in fs]


def g_defaults_and_attributes():
    box = []

    def f(a, b=box, *, c=3):
        b.append(a)
        return (a, list(b), c)
    f.tag = "t"
    yield f(1)
    box.append("shared")
    yield f(2, c=4)
    return (f.tag, f.__name__, f.__qualname__, f.__defaults__[0] is box)


def deco(tag):
    log(("deco", tag))

    def wrap(f):
        log(("wrap", tag))
        return f
    return wrap


def g_def_with_yields():
    @deco((yield "d1"))
    @deco((yield "d2"))
    def f(a=(yield "default"), *, k=(yield "kw")):
        return (a, k)
    yield f()
    return f(1)


def g_same_named_siblings():
    if (yield "which"):
        def f():
            return "first"
    else:
        def f():
            return "second"
    yield f()
    g = f

    def f():
        return "third"
    yield g()
    return (g(), f())


def g_three_levels():
    a = 1

    def mid():
        b = 2

        def low():
            nonlocal a, b
            a, b = a + 1, b + 1
            return (a, b)
        return low
    low = mid()
    yield low()
    yield low()
    return (low(), a)


def g_empty_cell():
    def f():
        return later
    try:
        f()
    except NameError as e:
        log(type(e).__name__)
    yield "unset"
    later = 5
    yield f()
    del later
    yield "deleted"
    try:
        return f()
    except NameError:
        return "unset"


def g_parameter_cell():
    def make(x):
        def get():
            return x
        x = yield get()
        yield get()
        return get
    get = yield from make("p")
    return get()


def g_nested_comprehension_cell():
    k = 2
    fs = [(lambda: (i, k)) for i in range(2)]
    yield fs[0]()
    k = 9
    return [f() for f in fs]


def g_comprehensions_that_capture_a_captured_name():
    """Restored, `x` is free in its frame; CPython 3.12 and 3.13 took a comprehension's for it from then on."""
    x = 5
    more = lambda: x
    yield [(lambda: x)() for x in range(3)], x
    yield {(lambda: x)(): x for x in range(3)}, {sum(x + n for n in (1, 2)) for x in range(3)}, x, more()
    x = 6
    rows = [[(lambda: x + y)() for x in (y, 1)] + [x] for y in (x, 2) if y > 1]
    yield rows, x, more()
    y = 7
    fs = [[lambda: (x, y) for x in (y, 1)] for y in (x, 2) if (z := x)]
    yield x, y, z, more(), (lambda: y)()
    x += 1
    return [[f() for f in row] for row in fs], x, y, z, more()


class Base:
    def greet(self, x):
        return ("base", x)

    def steps(self):
        yield "base step"
        return "base end"


class Child(Base):
    __secret = "s"

    def __init__(self):
        self.__own = 1

    def greet(self, x):
        r = super().greet((yield "arg"))
        yield r
        return __class__.__name__

    def steps(self):
        r = yield from super().steps()
        self.__own += 1
        yield (self.__own, self.__secret)
        __local = yield "mangled local"
        show = lambda: (__local, self.__own)
        yield show()
        try:
            self.__missing
        except AttributeError as e:
            log(str(e))
        return r

    def super_spilled(self):
        return [super().greet(1), (yield "a"), super(Child, self).greet((yield "b"))]

    @classmethod
    def made(cls, x=1):
        yield cls.__name__
        return (yield x)

    @staticmethod
    def static():
        got = yield "static"
        return got

    @property
    def prop(self):
        yield "prop"
        return self.__own

    def keyword(self, __k=3):
        d = dict(__k=(yield "kw"))
        yield d
        return __k


def g_method_super():
    return Child().greet(5)


def g_method_mangled():
    return Child().steps()


def g_method_super_spilled():
    return Child().super_spilled()


def g_classmethod():
    return Child.made()


def g_staticmethod():
    return Child.static()


def g_property():
    return Child().prop


def g_method_keyword_mangled():
    return Child().keyword()


def g_bound_methods_held():
    c = Child()
    m, xs = c.steps, []
    add = xs.append
    yield "held"
    add(1)
    g = m()
    yield next(g)
    add(2)
    return (xs, next(g), m.__self__ is c)


def g_partial_held():
    import functools
    n = 5

    def add(a, b):
        return a + b + n
    p = functools.partial(add, 1)
    yield p(2)
    n = 10
    return p(2)


def g_class_over_yields():
    base = (yield "base") or object

    class K(object if isinstance(base, (int, bool)) else base, **{}):
        attr = 1

        def m(self):
            return self.attr
    r = K().m()
    del K
    yield r
    return r


def outer_make():
    x = 1

    def gen():
        nonlocal x
        x += 1
        yield x
        x += 1
        yield (x, look())

    def look():
        return x
    return gen()


def g_made_by_plain_function():
    return outer_make()


def g_function_not_a_generator_keeps_cells():
    def counter():
        n = 0

        def step():
            nonlocal n
            n += 1
            return n
        return step
    c = counter()
    yield c()
    yield c()
    return c()


g_lambda_generator_expression_free = lambda: outer_make()


def g_class_bases_and_decorator_yield():
    @deco((yield "decorator"))
    class K((yield "base") and Base or Base, metaclass=(yield "meta") and type or type):
        def m(self):
            return self.greet(1)
    return (K().m(), K.__name__)


def g_recursive(n=3):
    yield ("down", n)
    if n:
        yield from g_recursive(n - 1)
    yield ("up", n)


def g_recursive_inner():
    def inner(n):
        yield n
        if n:
            yield from inner(n - 1)
        yield "g_recursive_inner inner"
    yield from inner(2)
    return inner.__name__, inner.__qualname__


class Recursive:
    def __deep(self, n):
        yield n
        if n:
            yield from self.__deep(n - 1)

    def deep(self, n):
        yield from self.__deep(n)


def g_recursive_method():
    yield from Recursive().deep(2)


def plain_recursive(n):
    return n * plain_recursive(n - 1) if n else 1


def g_recursive_function_held():
    f = plain_recursive
    yield f(3)
    yield f(4)


def g_mutually_recursive(n=2):
    yield n
    if n:
        yield from other_recursive(n - 1)


def other_recursive(n):
    yield ("other", n)
    yield from g_mutually_recursive(n)


def g_lambda_that_yields():
    f = lambda x, *, y=2: [x, (yield x), (yield y)]
    a = yield from f(1)
    b = yield from f(3, y=4)
    return (a, b)


def g_lambda_that_yields_closes_over():
    n = 1
    f = lambda: (n, (yield n), n)
    g = f()
    yield next(g)
    n = 5
    try:
        g.send("sent")
    except StopIteration as stop:
        return stop.value


def g_lambda_that_yields_default():
    f = lambda x=(yield "default"): (x, (yield x))
    return (f.__name__, f.__qualname__, f.__defaults__, (yield from f()))


def g_lambda_that_yields_branches():
    f = lambda x: (yield "true") if x and (yield "and") else (yield from "xy")
    a = yield from f(1)
    b = yield from f(0)
    return (a, b)


def g_lambda_that_yields_in_comprehension():
    fs = [lambda: (n, (yield n)) for n in range(2)]
    out = []
    for f in fs:
        out.append((yield from f()))
    return out


class Secret:
    __hidden = 4
    reveal = lambda self, __x=1: (self.__hidden, __x, (yield self.__hidden))


def g_lambda_that_yields_in_class():
    return (yield from Secret().reveal())


def g_lambda_that_yields_held():
    f = lambda: (yield "inner")
    yield "held"
    return (yield from f())


class Base:
    def hello(self, x=0):
        log(("base hello", x))
        return ("base", x)


class Derived(Base):
    def hello(self, x=0):
        yield "before"
        a = (yield super)().hello((yield 1)) if (yield 0) is super else super().hello(1)
        other = super
        yield a
        b = other().hello(2)
        self.attribute = 1
        yield b
        return other(__class__, self).hello(3)


def g_super_by_another_name():
    r = yield from Derived().hello()
    return r


class Rebound(Base):
    def hello(self, x=0):
        keep = lambda: self
        other = super
        yield 1
        a = other().hello(1)
        yield a
        return type(keep()).__name__

    @staticmethod
    def still(self):
        other = super
        yield 1
        return other().hello(4)


def g_super_of_captured_self():
    r = yield from Rebound().hello()
    s = yield from Rebound.still(Rebound())
    return (r, s)


def g_global_definitions_are_named_as_such():
    global Everywhere, everywhere
    yield 1

    class Everywhere:
        def method(self):
            return self

    def everywhere():
        def inner():
            return 1
        return inner
    yield (Everywhere.__qualname__, Everywhere.method.__qualname__, everywhere.__qualname__, everywhere().__qualname__)


def g_locals_are_kept():
    a = 1
    found = locals()
    yield "one"
    yield found["a"]
    return "a" in found


def g_names_like_those_of_the_runtime():
    def managers(x):
        return (yield x)

    def kw(x):
        yield x
        return [k for k in (1, 2)]

    def iter(x):
        return x

    def factory():
        yield iter(5)
    a = yield from managers(1)
    b = yield from kw(2)
    yield from factory()
    return (a, b, managers.__name__, managers.__qualname__)
