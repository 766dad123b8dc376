"""What locals may hold: each kind of value, saved at a yield in the middle of its use, goes on as it would have done natively."""

import importlib
import itertools
import pathlib
import re
import subprocess
import sys
import warnings
from typing import Any

import pydantic
import pytest

from kwflow import durable
from kwflow.durable import iters
from kwflow.durable.iters import product
from kwflow.errors import UnsavableError

CASES = pathlib.Path(__file__).with_name("value_cases.py")
SOURCE = CASES.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def code() -> Any:
    return durable.load_source("value_cases", SOURCE, "value_cases.py")


@pytest.fixture(scope="module")
def native() -> Any:
    space: dict[str, Any] = {"__name__": "value_cases_native"}
    sys.modules["value_cases_native"] = type(sys)("value_cases_native")
    exec(compile(SOURCE, "value_cases.py", "exec"), space)
    return space


def outcome(gen: Any, every: bool) -> list[str]:
    """Everything the generator yields and returns, as text. With `every`, it is saved and restored at each yield."""
    met: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while True:
            try:
                value = next(gen)
            except StopIteration as stop:
                return [*met, repr(stop.value).replace("_native", "")]
            met.append(repr(value).replace("_native", ""))
            if every:
                gen = durable.loads(durable.dumps(gen))


NAMES = re.findall(r'^    "([\w. ]+)": lambda', SOURCE, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_an_iterator_goes_on_where_it_was(code: Any, native: Any, name: str) -> None:
    """It is saved at every item, and Python gives no warning about it."""
    assert outcome(code.over(name), True) == outcome(native["over"](name), False)


ERRORS = "binascii:Error json.decoder:JSONDecodeError sqlite3:OperationalError urllib.error:URLError asyncio:QueueEmpty subprocess:CalledProcessError zlib:error msgspec:ValidationError".split()


@pytest.mark.parametrize("of", ERRORS)
def test_an_exception_of_the_standard_library_or_msgspec_loads_where_its_module_was_not_imported(of: str, code: Any, tmp_path: pathlib.Path) -> None:
    module, name = of.split(":")
    cls = getattr(importlib.import_module(module), name)
    made = cls.__new__(cls)
    made.args = ("told",)
    (tmp_path / "saved").write_bytes(durable.dumps(made))
    script = "import sys, pathlib\nfrom kwflow import durable\nprint(durable.loads(pathlib.Path(sys.argv[1]).read_bytes()).args)"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "saved")], capture_output=True, text=True, check=False, cwd=CASES.parents[3])
    assert done.stdout.strip() == "('told',)", done.stderr


def test_an_error_of_a_library_is_refused_with_what_to_keep_of_it() -> None:
    """Authors who compensate in an except block hold the error over waits."""
    with pytest.raises(UnsavableError, match=r"ValidationError; list its module under \[snapshot\] modules in kwflow.toml, .* or wait after the except block and keep only the error's text"):
        durable.dumps(pydantic.ValidationError.from_exception_data("order", []))


HOLDERS = "groups copies watches_its_dict watches_its_set changed_before_the_yield dict_with_its_own_iterator values local_classes classes_set_up exceptions exceptions_set_up managers".split()


@pytest.mark.parametrize("name", HOLDERS)
def test_what_a_generator_holds_is_the_same_after_each_restore(code: Any, native: Any, name: str) -> None:
    assert outcome(code.__dict__[name](), True) == outcome(native[name](), False)


def test_what_is_imported_from_itertools_has_a_twin_for_each_name_and_the_module() -> None:
    """Since 3.14 a durable module gets these twins. Its other names are left alone."""
    public = {name: value for name, value in vars(itertools).items() if name[0] != "_"}
    found = iters.twins({"it": itertools, "other": 1, "product": product, **{f"my_{name}": value for name, value in public.items()}})
    assert found == {"it": iters, **{f"my_{name}": getattr(iters, name) for name in public}}


MIXINS = """
import collections
def main():
    seen, letters, prices = [], collections.UserList("ab"), collections.UserDict(a=1, b=2)
    unstarted, view, held = iter(letters), prices.items(), iter(prices.values())
    letters.append(iter(letters))
    yield
    for letter in letters:
        if len(seen) == 1:
            letters.append("late")
        yield
        seen.append(letter if isinstance(letter, str) else next(letter))
    prices["b"] = 3
    seen += [next(held), next(unstarted)]
    yield
    try:
        for key, value in view:
            yield
            seen.append([key, value])
            prices["new"] = 4
    except RuntimeError as error:
        seen.append(str(error))
    yield seen + [[*held] if len(prices) == 2 else prices["b"], len(view)]
"""


def test_what_goes_over_a_class_of_collections_abc_sees_later_changes_as_it_would_have(code: Any) -> None:
    """docs/LOCALS.md. It is a generator of the standard library, which has no twin in the snapshot."""
    native: dict[str, Any] = {}
    exec(MIXINS, native)
    module = durable.load_source("mixins", MIXINS, "mixins.py")
    assert outcome(module.main(), True) == outcome(native["main"](), False)
