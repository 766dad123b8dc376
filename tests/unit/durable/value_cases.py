"""Values that generators of durable modules hold while they wait. test_values.py runs them natively and restored at every yield."""

import abc
import array
import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import io
import ipaddress
import itertools
import logging
import math
import operator
import pathlib
import random
import re
import struct
import types
import typing
import uuid
import zoneinfo
from collections import OrderedDict, deque

ITERATORS = {
    "list": lambda: iter([1, 2, 3, 4]),
    "list reversed": lambda: reversed([1, 2, 3, 4]),
    "tuple": lambda: iter((1, 2, 3, 4)),
    "range": lambda: iter(range(4)),
    "long range": lambda: iter(range(2**70, 2**70 + 4)),
    "range reversed": lambda: reversed(range(4)),
    "str": lambda: iter("abcd"),
    "str not ascii": lambda: iter("aéîo"),
    "bytes": lambda: iter(b"abcd"),
    "bytearray": lambda: iter(bytearray(b"abcd")),
    "array": lambda: iter(array.array("i", [1, 2, 3, 4])),
    "callable": lambda: iter(functools.partial(next, iter([1, 2, 3, 0])), 0),
    "sequence": lambda: iter(Sequence()),
    "dict keys": lambda: iter({"a": 1, "b": 2, "c": 3}),
    "dict values": lambda: iter({"a": 1, "b": 2, "c": 3}.values()),
    "dict items": lambda: iter({"a": 1, "b": 2, "c": 3}.items()),
    "dict reversed": lambda: reversed({"a": 1, "b": 2, "c": 3}),
    "dict items reversed": lambda: reversed({"a": 1, "b": 2, "c": 3}.items()),
    "dict values reversed": lambda: reversed({"a": 1, "b": 2, "c": 3}.values()),
    "OrderedDict": lambda: iter(OrderedDict(a=1, b=2, c=3)),
    "OrderedDict items": lambda: iter(OrderedDict(a=1, b=2, c=3).items()),
    "mappingproxy": lambda: iter(types.MappingProxyType({"a": 1, "b": 2})),
    "set": lambda: iter({3, 1, 2}),
    "frozenset": lambda: iter(frozenset([3, 1, 2])),
    "deque": lambda: iter(deque([1, 2, 3, 4])),
    "deque reversed": lambda: reversed(deque([1, 2, 3, 4])),
    "enumerate": lambda: enumerate("abc", 5),
    "zip": lambda: zip("abc", [1, 2, 3]),
    "zip strict": lambda: zip("abc", [1, 2, 3], strict=True),
    "zip of one iterator twice": lambda: (lambda it: zip(it, it))(iter(range(8))),
    "map": lambda: map(str.upper, "abc"),
    "map of two": lambda: map(operator.add, [1, 2, 3], [4, 5, 6]),
    "filter": lambda: filter(None, [1, 0, 2, 3]),
    "filter with a lambda": lambda: filter(lambda n: n % 2, range(9)),
    "StringIO": lambda: iter(io.StringIO("a\nb\nc\n")),
    "BytesIO": lambda: iter(io.BytesIO(b"a\nb\nc\n")),
    "nested": lambda: enumerate(zip(map(str, range(5)), iter({"x": 1, "y": 2, "z": 3}.items()))),
    "count": lambda: itertools.islice(itertools.count(5, 2), 4),
    "count of Decimal": lambda: itertools.islice(itertools.count(decimal.Decimal("1.5")), 4),
    "cycle": lambda: itertools.islice(itertools.cycle("ab"), 7),
    "repeat": lambda: itertools.repeat("x", 4),
    "repeat for ever": lambda: itertools.islice(itertools.repeat("x"), 4),
    "accumulate": lambda: itertools.accumulate([1, 2, 3, 4]),
    "accumulate with a function": lambda: itertools.accumulate([1, 2, 3, 4], operator.mul, initial=10),
    "accumulate of None": lambda: itertools.accumulate([None, 1, None, 2], lambda a, b: b),
    "chain": lambda: itertools.chain([1, 2], "ab", []),
    "chain.from_iterable": lambda: itertools.chain.from_iterable([[1, 2], "ab"]),
    "compress": lambda: itertools.compress("abcdef", [1, 0, 1, 0, 1, 1]),
    "dropwhile": lambda: itertools.dropwhile(lambda n: n < 3, [1, 2, 3, 1, 4]),
    "takewhile": lambda: itertools.takewhile(lambda n: n < 3, [1, 2, 3, 1, 4]),
    "filterfalse": lambda: itertools.filterfalse(lambda n: n % 2, range(9)),
    "islice": lambda: itertools.islice("abcdefgh", 1, 7, 2),
    "islice to the end": lambda: itertools.islice("abcdefgh", 3, None),
    "starmap": lambda: itertools.starmap(pow, [(2, 5), (3, 2), (10, 3)]),
    "tee": lambda: itertools.tee(range(70))[0],
    "zip_longest": lambda: itertools.zip_longest("abc", [1], fillvalue="-"),
    "product": lambda: itertools.product("ab", range(2)),
    "product of nothing": lambda: itertools.product(),
    "permutations": lambda: itertools.permutations("abc", 2),
    "all permutations": lambda: itertools.permutations("abc"),
    "combinations": lambda: itertools.combinations("abcd", 2),
    "combinations of none": lambda: itertools.combinations("abcd", 0),
    "combinations_with_replacement": lambda: itertools.combinations_with_replacement("abc", 2),
    "genexp of a function": lambda: squares(4),
    "UserList": lambda: collections.UserList("abc"),
    "reversed UserList": lambda: reversed(collections.UserList("abc")),
    "UserString": lambda: iter(collections.UserString("abc")),
    "UserDict items": lambda: collections.UserDict(a=1, b=2, c=3).items(),
    "ChainMap values": lambda: iter(collections.ChainMap({"a": 1}, {"b": 2}, {"c": 3}).values()),
    "UserDict keys": lambda: iter(collections.UserDict(a=1, b=2).keys()),
    "an ended UserList": lambda: (lambda ended: [*ended] and ended)(iter(collections.UserList("abc"))),
}


class Sequence:
    def __getitem__(self, n):
        if n > 3:
            raise IndexError
        return n * n


def squares(n):
    for i in range(n):
        yield i * i


def over(name):
    for item in ITERATORS[name]():
        yield item


def groups():
    for key, group in itertools.groupby([1, 3, 2, 4, 6, 5], key=lambda n: n % 2):
        yield key, next(group)
        for item in group:
            yield item
            break


def copies():
    a, b = itertools.tee(iter("abc" * 30))
    yield next(a), next(a)
    yield list(b)[:3]
    yield list(a)[:3]


def watches_its_dict():
    held = {"a": 1, "b": 2, "c": 3}
    got = []
    for key, value in held.items():
        got.append((key, value))
        yield key
        held["c"] = 30
    yield got
    try:
        for key in held:
            yield key
            held[key + "!"] = 0
    except RuntimeError as error:
        yield str(error)


def watches_its_set():
    held = {1, 2, 3}
    seen = set()
    try:
        for item in held:
            seen.add(item)
            yield len(seen)
            if len(seen) == 2:
                held.add(9)
    except RuntimeError as error:
        yield str(error)


def changed_before_the_yield():
    held = {"a": 1, "b": 2, "c": 3}
    it = iter(held)
    yield next(it)
    del held["a"]
    held["z"] = 0
    yield "put another in"
    try:
        list(it)  # natively it first gives what is left of the old keys; restored it raises at once
    except RuntimeError as error:
        yield str(error)


def dict_with_its_own_iterator():
    held = {"a": 1, "b": 2}
    held["it"] = None
    it = held["it"] = iter(held)
    del it
    yield next(held["it"])
    yield next(held["it"])


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Plan(typing.NamedTuple):
    name: str
    days: int = 3


class Order(typing.TypedDict):
    id: str


@dataclasses.dataclass
class Item:
    name: str
    tags: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: int


class Slots:
    __slots__ = ("a", "__b")

    def __init__(self):
        self.a, self.__b = 1, 2

    def both(self):
        return self.a, self.__b


class Meta(abc.ABC):
    @abc.abstractmethod
    def f(self): ...


class Concrete(Meta):
    def f(self):
        return 5


Amount = typing.NewType("Amount", int)


class Way(enum.Enum):
    ROUND = enum.member(functools.partial(round, ndigits=1))
    UNSET = object()
    SLOTS = Slots()


def values():
    import json
    import os.path as path
    from os.path import basename

    pattern = re.compile("(?P<word>[a-z]+)-([0-9]*)", re.I)
    found = pattern.search("see AB-12 there", 2)
    whole = re.fullmatch("a*", "aaa")
    last = list(re.finditer("[a-z]", "a b c"))[-1]
    shared = [1]
    d = {"k": 1, "j": 2}
    keys, items, vals = d.keys(), d.items(), d.values()
    proxy = types.MappingProxyType(d)
    q = deque([1], maxlen=2)
    colour, access, plan, order, item, frozen, slots, concrete = Colour.RED, Access.READ | Access.WRITE, Plan("p"), Order(id="1"), Item("n", ["t"]), Frozen(3), Slots(), Concrete()
    number, ratio, when, zone = decimal.Decimal("1.10"), fractions.Fraction(1, 3), dt.datetime(2024, 1, 2, tzinfo=dt.UTC), zoneinfo.ZoneInfo("Europe/Berlin")
    local = dt.datetime(2024, 7, 2, tzinfo=zone)
    who, net, where = uuid.UUID(int=5), ipaddress.ip_network("10.0.0.0/8"), pathlib.PurePosixPath("/a") / "b"
    here = pathlib.Path("x/y")
    space = types.SimpleNamespace(a=1)
    hint, either = list[int], int | str
    log = logging.getLogger("some.where")
    view, head = memoryview(b"abc"), struct.Struct("<i")
    partial = functools.partial(int, base=2)
    add, pick, upper, get, join, has, put = operator.add, operator.itemgetter(1), str.upper, d.get, ",".join, d.__contains__, functools.partial(d.__setitem__, "put")
    fromkeys, search, roots = dict.fromkeys, pattern.search, math.sqrt
    method, amount, ways = item.tags.append, Amount, [*Way]
    chance = random.Random(7)
    deflt = lambda a, b=shared, *, c=shared: (a, b, c)
    odd = (Ellipsis, NotImplemented, slice(1, 2), range(3), 1j, bytearray(b"x"), frozenset("a"))
    text = io.StringIO("abc")
    text.read(1)
    counter = collections.Counter("aab")
    chainmap, default, ordered = collections.ChainMap({"a": 1}, d), collections.defaultdict(list, a=[1]), OrderedDict(a=1)
    null, suppress = contextlib.nullcontext(3), contextlib.suppress(KeyError)
    yield "waiting"
    method("more")
    d["new"] = 3
    put(4)
    return [
        json.dumps([1]),
        path.join("a", "b"),
        basename("/x/y"),
        found.groups(),
        found["word"],
        found.span(),
        found.pos,
        whole.group(),
        last.span(),
        list(keys),
        list(items),
        list(vals),
        dict(proxy),
        q,
        colour is Colour.RED,
        access,
        plan,
        plan.name,
        order,
        item,
        frozen,
        slots.both(),
        concrete.f(),
        number,
        ratio,
        when,
        when.tzinfo is dt.UTC,
        local.utcoffset(),
        zone.key,
        who,
        net,
        where,
        here,
        space,
        hint,
        either,
        log.name,
        log is logging.getLogger("some.where"),
        view.tobytes(),
        head.unpack(b"\1\0\0\0"),
        partial("101"),
        amount is Amount,
        [way is Way[way.name] for way in ways],
        add(1, 2),
        pick("xyz"),
        upper("a"),
        get("new"),
        get("put"),
        join("ab"),
        has("k"),
        fromkeys("ab"),
        search("q-1").group(),
        roots(4),
        chance.random(),
        deflt(0)[1] is shared,
        deflt(0)[2] is shared,
        odd,
        text.read(),
        counter,
        dict(chainmap),
        default["zz"],
        ordered,
        null.enter_result,
        type(suppress).__name__,
    ]


def local_classes():
    shared = []

    class Base:
        made = 0

        def __init__(self, x):
            self.x = x
            shared.append(x)

        @property
        def double(self):
            return self.x * 2

        @staticmethod
        def three():
            return 3

        @classmethod
        def make(cls, x):
            cls.made += 1
            return cls(x)

    class Sub(Base):
        def __init__(self, x):
            super().__init__(x + 1)

        def __eq__(self, other):
            return isinstance(other, Sub) and self.x == other.x

        __hash__ = None

    class Rejected(Exception):
        pass

    @dataclasses.dataclass(order=True)
    class Point:
        x: int
        y: int = 2
        z: list = dataclasses.field(default_factory=list, compare=False)

        def norm(self):
            return self.x + self.y

    one, point = Sub(1), Point(1)
    try:
        raise Rejected("no")
    except Rejected as error:
        kept = error
    yield "waiting"
    other = Sub.make(5)
    try:
        raise kept
    except Rejected as error:
        text = str(error)
    return [
        one.x,
        one.double,
        Sub.three(),
        other.x,
        Sub.made,
        Base.made,
        shared,
        one == other,
        one == Sub(1),
        type(one) is Sub,
        isinstance(kept, Rejected),
        text,
        point,
        point < Point(2),
        point.norm(),
        Point(3).z,
        Sub.__qualname__,
        Point.__qualname__,
        dataclasses.astuple(point),
    ]


class Odd(Exception):
    def __init__(self, a, *, b):
        super().__init__(f"{a}-{b}")
        self.b = b


class Slotted(Exception):
    __slots__ = ("code",)


class Plugin(abc.ABC):
    known = {}

    def __init_subclass__(cls, *, key, **options):
        super().__init_subclass__(**options)
        cls.key = key
        cls.known[key] = cls.label


class Labelled(Exception):
    def __init_subclass__(cls):
        cls.shown = cls.label.upper()


def classes_set_up():
    class Mail(Plugin, key="mail"):
        label = "m"

    class Failed(Labelled):
        label = "f"

    class Again(Failed):
        __slots__ = ()
        label = "a"

    mail, failed = Mail(), Again("x")
    yield "waiting"
    return [mail.key, type(mail) is Mail, Mail.__bases__ == (Plugin,), Mail.label, failed.shown, failed.args, isinstance(failed, Failed), Failed.shown, Again.__mro__ == (Again, Failed, *Labelled.__mro__)]


def exceptions():
    def chain():
        try:
            try:
                {}["k"]
            except KeyError as error:
                raise Odd(1, b=2) from error
        except Odd as error:
            error.add_note("noted")
            return error

    odd = chain()
    slotted = Slotted("s")
    slotted.code = 5
    group = ExceptionGroup("several", [ValueError(1), ExceptionGroup("inner", [odd])])
    system = OSError(2, "gone", "file.txt")
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        decode = error
    try:
        import json

        json.loads("{")
    except json.JSONDecodeError as error:
        parse = error
    try:
        None.nothing
    except AttributeError as error:
        attribute = error
    hidden = ValueError("h")
    hidden.__context__ = KeyError("c")
    hidden.__suppress_context__ = True
    yield "waiting"
    return [
        repr(odd),
        odd.b,
        odd.__notes__,
        repr(odd.__cause__),
        type(odd.__cause__.__context__),
        slotted.code,
        repr(group),
        group.exceptions[1].exceptions[0] is odd,
        type(system).__name__,
        system.errno,
        system.filename,
        str(system),
        decode.start,
        decode.reason,
        str(decode),
        parse.pos,
        str(parse),
        attribute.name,
        attribute.obj,
        repr(hidden.__context__),
        hidden.__suppress_context__,
        hidden.__cause__,
    ]


@dataclasses.dataclass(frozen=True)
class Sealed(Exception):
    code: int


class Unset(Exception):
    __slots__ = ("code", "never", "why")

    def __init__(self, code, why=None):
        super().__init__(code)
        self.code, self.why = code, why


class Several(ExceptionGroup):
    def __new__(cls, errors, code):
        made = super().__new__(cls, "several", errors)
        made.code = code
        return made

    def __init__(self, errors, code):
        super().__init__(f"code {code}")

    def derive(self, errors):
        return Several(errors, code=self.code)


class Missing(OSError):
    def __new__(cls, *, code):
        made = super().__new__(cls, 2, "missing", f"/{code}")
        made.code = code
        return made

    def __init__(self, *, code):
        super().__init__(2, "missing")


class Passes:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def fails(log):
    with Passes():
        try:
            yield "before"
            raise Sealed(3)
        except Sealed:
            log.append((yield "cleaning"))
            raise


def exceptions_set_up():
    log = []
    unset, several, missing = Unset(1), Several([ValueError(1), KeyError(2)], code=5), Missing(code=7)
    try:
        raise Several([ValueError(1), KeyError(2)], code=6)
    except* KeyError as error:
        part = error
    except* ValueError as error:
        other = error
    try:
        yield from fails(log)
    except Sealed as error:
        yield "caught"
        try:
            raise LookupError from error
        except LookupError as outer:
            yield "caught again"
            log += [outer.__cause__ is error, outer.__context__ is error, error.code, error.args, error.__context__]
    log += [unset.code, unset.why, hasattr(unset, "never"), str(missing), missing.errno, missing.filename, missing.code]
    return [log, several.args, several.code, repr(several.exceptions), part.code, repr(part.exceptions), other.message, repr(other.exceptions)]


@contextlib.contextmanager
def opened(log, name):
    log.append("enter " + name)
    try:
        yield name
    except KeyError:
        log.append("swallowed")
    finally:
        log.append("exit " + name)


def managers():
    log = []
    with opened(log, "a") as a, contextlib.ExitStack() as stack:
        stack.enter_context(opened(log, "b"))
        yield a
        unused = opened(log, "c")
        yield "created"
        with unused:
            yield "in c"
            raise KeyError
    return log


def bad(value, extra=None):
    fine = 1
    yield
    return fine, value, extra
