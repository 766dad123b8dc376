"""What 3.14 brought: template strings, except without parentheses."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x


def parts(template):
    return (template.strings, [(i.value, i.expression, i.conversion, i.format_spec) for i in template.interpolations])


def g_template_string():
    made = parts(t"a{log(1)}b{(yield 'wait')!r:>{log(3)}}c{log(4)}")
    yield "held"
    return made


def g_template_string_spec_waits():
    made = parts(t"{log(1):>{(yield 'width') or 3}}{log(2)}")
    return made


def g_except_without_parentheses():
    try:
        yield 1
    except ValueError, KeyError:
        yield 2
    return 3


def g_template_is_held():
    name = ["n"]
    made = t"a{name}b{1!r:>3}"
    yield "held"
    name.append("more")
    return (parts(made), made.values[0] is name)


def g_annotations_that_mean_nothing_yet():
    import dataclasses

    @dataclasses.dataclass
    class Point:
        x: int
        next: Missing = None

    point = Point(1)
    yield "held"
    return (point, Point(2, point), [field.name for field in dataclasses.fields(Point)])


def g_union_is_held():
    either = int | str
    yield "held"
    return (isinstance(1, either), either == str | int)
