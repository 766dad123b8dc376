"""What generators hold in their locals while they wait: generators and iterators."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



def count(n):
    try:
        for i in range(n):
            log(("count", (yield i)))
    except KeyError:
        yield "caught key"
    return n


def g_generators_in_a_list():
    gens = [count(1), count(2), count(3)]
    r = []
    while gens:
        g = gens.pop(0)
        try:
            r.append((yield next(g)))
        except StopIteration as e:
            r.append(("end", e.value))
        else:
            gens.append(g)
    return r


def g_generators_in_a_dict():
    d = {"a": count(2), "b": count(1)}
    yield "created"
    yield next(d["a"])
    yield d["a"].send("hello")
    try:
        d["b"].throw(KeyError("x"))
    except KeyError:
        yield "not started"
    yield list(d["b"])
    d["a"].close()
    return list(d["a"])


def g_finished_generator_held():
    g = count(0)
    r = list(g)
    yield r
    yield list(g)
    return next(g, "finished")


def g_created_generator_held():
    g = count(2)
    yield "created"
    try:
        g.send(5)
    except TypeError as e:
        log(str(e))
    return list(g)


def g_same_generator_twice():
    a = b = count(4)
    yield next(a)
    yield next(b)
    return (a is b, next(a))


def g_throw_into_held():
    g = count(3)
    yield next(g)
    yield g.throw(KeyError("k"))
    return next(g, "end")


def g_zip_of_generators():
    a = zip(count(3), count(2))
    for pair in a:
        yield pair
    return "end"


def consume(it):
    r = []
    for x in it:
        r.append((yield x))
        if len(r) == 2:
            break
    yield "paused"
    r.extend([x for x in it])
    yield "exhausted"
    return (r, next(it, "none"))


def g_list_iterator():
    return (yield from consume(iter([1, 2, 3, 4])))


def g_list_iterator_alias():
    xs = [1, 2]
    it = iter(xs)
    yield next(it)
    xs.append(3)
    yield next(it)
    xs.append(4)
    return list(it)


def g_tuple_iterator():
    return (yield from consume(iter((1, 2, 3))))


def g_dict_iterators():
    d = {"a": 1, "b": 2, "c": 3}
    a = yield from consume(iter(d))
    b = yield from consume(iter(d.items()))
    c = yield from consume(iter(d.values()))
    return (a, b, c)


def g_set_iterator():
    s = {1, 2, 3}
    r = []
    for x in s:
        r.append((yield x))
    return len(r)


def g_range_iterator():
    return (yield from consume(iter(range(10, 0, -2))))


def g_big_range_iterator():
    return (yield from consume(iter(range(10**20, 10**20 + 4))))


def g_str_and_bytes_iterators():
    a = yield from consume(iter("héllo"))
    b = yield from consume(iter(b"bytes"))
    return (a, b)


def g_enumerate():
    for i, x in enumerate("abc", 5):
        log((i, x))
        yield (i, x)
    return (yield from consume(enumerate([7, 8, 9])))


def g_zip():
    for a, b in zip([1, 2, 3], "xyz"):
        yield (a, b)
    it = iter(range(6))
    return (yield from consume(zip(it, it)))


def double(x):
    log(("double", x))
    return x * 2


def g_map():
    for x in map(double, [1, 2, 3]):
        yield x
    k = 3
    return (yield from consume(map(lambda x: x + k, range(4))))


def g_filter():
    for x in filter(None, [0, 1, 2]):
        yield x
    k = 1
    return (yield from consume(filter(lambda x: x > k, range(6))))


def g_reversed():
    for x in reversed([1, 2, 3]):
        yield x
    a = yield from consume(reversed(range(4)))
    b = yield from consume(reversed((1, 2, 3)))
    c = yield from consume(reversed({"a": 1, "b": 2, "c": 3}))
    return (a, b, c)


def g_nested_iterators():
    return (yield from consume(enumerate(zip(map(double, [1, 2, 3]), reversed("abc")))))


def g_callable_iterator():
    xs = [1, 2, 3, 0]
    for x in iter(lambda: xs.pop(0), 0):
        yield x
    return xs


class Seq:
    def __getitem__(self, i):
        log(("getitem", i))
        if i > 3:
            raise IndexError(i)
        return i


class Once:
    """An iterator without __iter__ of its own kind: for accepts what iter() returns."""

    def __init__(self):
        self.n = 0

    def __next__(self):
        self.n += 1
        if self.n > 3:
            raise StopIteration
        return self.n


class Container:
    def __iter__(self):
        return Once()


def g_sequence_protocol():
    for x in Seq():
        yield x
    return "end"


def g_iterator_without_iter():
    for x in Container():
        yield x
    return "end"


def g_generator_expression_held():
    k = 10
    e = (x * k for x in [1, 2, 3])
    yield next(e)
    k = 100
    yield next(e)
    return list(e)


def g_generator_expression_nested_for():
    e = ((a, b) for a in range(2) if a >= 0 for b in "xy" if b)
    yield next(e)
    yield next(e)
    yield next(e)
    return list(e)


def g_generator_expression_looped():
    for x in (log(i) for i in range(3)):
        yield x
    return "end"


def g_generator_expression_unstarted():
    k = 2
    e = (x * k for x in log([1, 2]))
    yield "held"
    k = 3
    return list(e)


def g_generator_expression_exhausted():
    e = (x for x in "ab")
    seen = [*e]
    yield seen
    return (list(e), seen)


def g_generator_expression_shares_cells():
    fs = ((lambda: (x, k)) for x in range(3))
    k = 1
    first = next(fs)
    yield first()
    k = 2
    second = next(fs)
    yield (first(), second())
    return [f() for f in fs]


def g_generator_expression_in_generator_expression():
    e = (list(x + y for y in range(x)) for x in range(3))
    yield next(e)
    inner = (y for y in (z * 2 for z in range(4)) if y)
    yield next(inner)
    return (list(e), list(inner))


def g_generator_expression_in_lambda_and_comprehension():
    make = lambda n: (n * x for x in range(3))
    many = [(y + x for x in "ab") for y in "cd"]
    firsts = [next(e) for e in many]
    one = make(5)
    yield (firsts, next(one))
    return [list(e) for e in [*many, one]]


def g_generator_expression_walrus():
    e = (last := x for x in range(3))
    yield next(e)
    yield last
    return (list(e), last)


def g_generator_expression_iterables():
    seen = []
    for bad in (5, None):
        try:
            (x for x in bad)
        except TypeError as error:
            seen.append(str(error))
        yield len(seen)
    e = (x for x in [1] for y in x)
    try:
        next(e)
    except TypeError as error:
        seen.append(str(error))
    return seen


def g_generator_expression_send_and_close():
    e = (x for x in range(5))
    yield next(e)
    got = e.send("ignored")
    yield got
    e.close()
    return list(e)


def g_generator_expression_of_yields():
    e = (x + 1 for x in (yield "iterable") or [7])
    yield "held"
    return list(e) if not isinstance(e, str) else e


class Holder:
    factor = 10

    def __init__(self):
        self.__private = 3

    def values(self):
        return (self.__private * x for x in range(3))


def g_generator_expression_in_class():
    e = Holder().values()
    yield next(e)
    yield next(e)
    return list(e)


def g_generator_expression_from_elsewhere():
    yield from (log(x) for x in range(3))
    return sum(x for x in range(4))


def g_deque_and_containers():
    from collections import OrderedDict, defaultdict, deque
    q = deque([1, 2, 3])
    o, d = OrderedDict(a=1), defaultdict(list)
    while q:
        x = q.popleft()
        d[x].append((yield x))
    return (o, dict(d), list(q))
