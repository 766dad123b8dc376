"""What 3.12 brought: type parameters, nested quotes in f-strings."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x


def typed[T, *Ts, **P](x: T, *rest) -> list[T]:
    got = yield x
    return [x, got, *rest]


class Box[T]:
    def __init__(self, value: T):
        self.value = value

    def items[U](self, other: U):
        yield self.value
        self.value = yield other
        return self.value


def g_type_parameters_of_def():
    first = yield from typed(1, 2)
    return (first, [p.__name__ for p in typed.__type_params__])


def g_type_parameters_of_class_and_method():
    box = Box("a")
    got = yield from box.items("b")
    return (got, box.value, Box.__type_params__[0].__name__)


def g_type_parameters_of_inner():
    k = 3

    def inner[T](x: T):
        nonlocal k
        k += 1
        return (x, k, (yield k))
    a = yield from inner("x")
    b = yield from inner("y")
    return (a, b, k)


def g_type_parameter_used_in_body():
    def inner[T](x):
        name = T.__name__
        got = yield name
        return (name, got)
    return (yield from inner(1))


async def g_async_type_parameters():
    async def inner[T](x: T):
        return x
    return await inner(5)


def g_type_alias():
    type Pair = tuple[int, str]
    name = Pair.__name__
    del Pair
    got = yield name
    return got


def g_f_string_same_quotes():
    d = {"k": 1}
    return f"{d["k"]} {(yield f"{d["k"]:>{(yield "width") or 3}}")} {log("x")}"


def g_comprehension_in_class_body():
    xs = [1, 2]

    class C:
        made = [x + len(xs) for x in xs]
    made = C.made
    del C
    yield made
    return [x for x in made if x in xs or (yield_ := x)]
