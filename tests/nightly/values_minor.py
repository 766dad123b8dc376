"""Run by another interpreter: `values_minor.py write FILE` saves every case of value_cases.py at its first yield, `resume FILE` goes on from there.

It needs only the standard library and kwflow.durable.
"""

import json
import pathlib
import re
import sys
import warnings

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from kwflow import durable  # noqa: E402

CASES = ROOT / "tests/unit/durable/value_cases.py"
_ENDED = object()
HOLDERS = "groups copies watches_its_dict watches_its_set dict_with_its_own_iterator values local_classes classes_set_up exceptions exceptions_set_up managers".split()


def generators() -> dict[str, object]:
    source = CASES.read_text(encoding="utf-8")
    module = durable.load_source("value_cases", source, "value_cases.py")
    names = re.findall(r'^    "([\w. ]+)": lambda', source, re.MULTILINE)
    return {**{name: module.over(name) for name in names}, **{name: getattr(module, name)() for name in HOLDERS}}


def rest(gen: object) -> list[str]:
    """What the generator does from here, saved at every yield."""
    met = []
    while True:
        try:
            met.append(repr(next(gen)))  # type: ignore[call-overload]
        except StopIteration as stop:
            return [*met, repr(stop.value)]
        gen = durable.loads(durable.dumps(gen))


def write(path: pathlib.Path) -> None:
    written = {}
    for name, gen in generators().items():
        if next(gen, _ENDED) is _ENDED:  # type: ignore[call-overload]  # an iterator that was at its end
            continue
        data = durable.dumps(gen)
        written[name] = [data.hex(), rest(durable.loads(data))]
    path.write_text(json.dumps(written))


def resume(path: pathlib.Path) -> list[str]:
    """The snapshots of another minor that do something else here."""
    found = []
    generators()
    for name, (data, expected) in json.loads(path.read_text()).items():
        try:
            got = rest(durable.loads(bytes.fromhex(data)))
        except Exception as error:
            got = [f"{type(error).__name__}: {error}"]
        if [_one(text) for text in got] != [_one(text) for text in expected]:
            found.append(f"{name}: {expected} there, {got} here")
    return found


def _one(text: str) -> str:
    """The text without what Python itself shows differently on another minor."""
    text = text.replace("typing.Union[int, str]", "int | str")  # since 3.14 these are one class, before they are two equal ones
    text = re.sub(r"OrderedDict\((\[.*?\]|\{.*?\})\)", "OrderedDict", text)
    return re.sub(r"set\(\{[^}]*\}\)|\{[\w, ']*\}", "a set", text)


if __name__ == "__main__":
    warnings.simplefilter("error")
    print(json.dumps(resume(pathlib.Path(sys.argv[2])) if sys.argv[1] == "resume" else write(pathlib.Path(sys.argv[2]))))
