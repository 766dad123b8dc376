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
