"""What a snapshot may name: one list for saving and for loading, so that nothing is saved that will not load.

A name gives access to code, so the list is short: our own constructors, harmless builtins, value classes of the standard library,
and what durable modules and the modules of `allow_modules` define *themselves*.  A name never leads through a module that one of
them imported (`flow` + `os.system`), nor to a class or function that could not be named in the module that now defines it.
"""

from __future__ import annotations

import builtins
import collections
import re
import struct
import sys
import types
from collections.abc import Iterable
from typing import Any

from kwflow.durable import registry
from kwflow.durable.fingerprint import imports_of
from kwflow.errors import UsageError

__all__ = [
    "CONSTRUCTORS", "DICTS", "ITERTOOLS", "LAZY", "Refused", "allow_classes_by_value", "allow_modules", "allowed", "classes_by_value", "defined_in",
    "find", "importable", "is_allowed_module", "is_bound", "is_module_value", "is_nameable", "several",
]  # fmt: skip

DICTS: tuple[type[dict[Any, Any]], type[dict[Any, Any]]] = (dict, getattr(builtins, "frozendict", dict))  # frozendict: 3.15, PEP 814
LAZY: Any = getattr(types, "LazyImportType", ())  # 3.15, PEP 810; on an older Python nothing is an instance of it
_BUILTINS = frozenset(
    "object type int float complex str bytes bytearray bool list tuple dict frozendict set frozenset range slice memoryview enumerate zip map filter reversed "
    "iter NotImplemented Ellipsis property staticmethod classmethod super len min max sum abs sorted repr str print all any isinstance issubclass callable round hash id next "
    "ord chr divmod pow bin hex oct ascii format".split()
)
ITERTOOLS = frozenset(  # of the original and of iters.py
    "count cycle repeat accumulate chain compress dropwhile takewhile filterfalse groupby islice starmap tee zip_longest product permutations combinations "
    "combinations_with_replacement pairwise batched _grouper _tee _tee_dataobject".split()
)
CONSTRUCTORS = frozenset(  # of rebuild.py
    "bound cell class_by_value custom exception exit_callback function generator global_of imported_module instance iterator_at local_class logger mapping_proxy match memory "
    "method named nothing numpy_array path set_class set_contents super_of view Wrapped zone".split()
)
_CLASSES: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "_collections": "_deque_iterator _deque_reverse_iterator deque defaultdict OrderedDict",
        "_datetime": "date datetime time timedelta timezone",
        "_decimal": "Decimal Context",
        "_io": "BytesIO StringIO",
        "_struct": "Struct",
        "abc": "ABC ABCMeta",
        "array": "array",
        "collections": "ChainMap Counter OrderedDict UserDict UserList UserString defaultdict deque _deque_iterator _deque_reverse_iterator",
        "collections.abc": "ItemsView KeysView ValuesView",
        "contextlib": "AsyncExitStack ExitStack _AsyncGeneratorContextManager _GeneratorContextManager aclosing closing nullcontext suppress",
        "dataclasses": "Field InitVar",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Context Decimal DecimalTuple",
        "enum": "Enum Flag IntEnum IntFlag StrEnum",
        "fractions": "Fraction",
        "functools": "partial partialmethod",
        "http": "HTTPMethod HTTPStatus",
        "io": "BytesIO StringIO",
        "ipaddress": "IPv4Address IPv4Interface IPv4Network IPv6Address IPv6Interface IPv6Network",
        "itertools": " ".join(ITERTOOLS),
        "numbers": "Complex Integral Number Rational Real",
        "operator": "itemgetter",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "pydantic_core._pydantic_core": "TzInfo",
        "random": "Random",
        "re": "Match Pattern RegexFlag",
        "statistics": "NormalDist",
        "string": "Formatter Template",
        "string.templatelib": "Interpolation Template",
        "struct": "Struct",
        "time": "struct_time",
        "types": "GenericAlias SimpleNamespace UnionType",
        "typing": "Union",
        "urllib.parse": "DefragResult DefragResultBytes ParseResult ParseResultBytes SplitResult SplitResultBytes",
        "uuid": "SafeUUID UUID",
        "xml.etree.ElementTree": "Element ElementTree QName",
        "zoneinfo": "ZoneInfo",
    }.items()
}
_FUNCTIONS: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "array": "_array_reconstructor",
        "base64": "b64decode b64encode urlsafe_b64decode urlsafe_b64encode",
        "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
        "contextlib": "ExitStack.__exit__ _GeneratorContextManager.__exit__ closing.__exit__ nullcontext.__exit__ suppress.__exit__ "
        "AsyncExitStack.__aexit__ AsyncExitStack.aclose ExitStack.close _AsyncGeneratorContextManager.__aexit__ aclosing.__aexit__ nullcontext.__aexit__",  # held by exit stacks
        "copy": "copy deepcopy",
        "copyreg": "__newobj__ __newobj_ex__ _reconstructor",
        "dataclasses": "asdict astuple fields is_dataclass replace",
        "functools": "reduce",
        "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
        "html": "escape unescape",
        "json": "dumps loads",
        "math": "ceil comb copysign cos dist exp fabs floor fmod fsum gcd hypot isclose isfinite isinf isnan lcm log log10 log2 prod sin sqrt tan trunc",
        "operator": "abs add and_ concat contains countOf eq floordiv ge getitem gt index indexOf inv invert is_ is_not le lshift lt matmul mod mul ne neg not_ or_ "
        "pos pow rshift sub truediv truth xor",
        "msgspec._core": "UNSET",
        "msgspec._utils": "rebuild",
        "ntpath": "basename commonprefix dirname isabs join normcase normpath split splitdrive splitext",
        "posixpath": "basename commonpath commonprefix dirname isabs join normcase normpath split splitdrive splitext",
        "re": "_compile compile escape fullmatch match search split sub",
        "statistics": "fmean geometric_mean harmonic_mean mean median median_high median_low mode multimode pstdev pvariance quantiles stdev variance",
        "string.templatelib": "_template_unpickle",
        "textwrap": "dedent fill indent shorten wrap",
        "urllib.parse": "parse_qs parse_qsl quote quote_plus unquote unquote_plus urldefrag urlencode urljoin urlparse urlsplit urlunparse urlunsplit",
    }.items()
}
for _told, _real in {"_operator": "operator", "_functools": "functools", "_heapq": "heapq", "_bisect": "bisect"}.items():  # the modules that functions written in C name as theirs
    _FUNCTIONS[_told] = _FUNCTIONS[_real]
# Modules whose exceptions a snapshot may name although nobody has imported them yet: the standard library, and msgspec, which rebuilds the inputs of workflows.
_EXCEPTIONS = frozenset(
    "_csv argparse asyncio.exceptions asyncio.queues binascii calendar concurrent.futures._base concurrent.futures.process concurrent.futures.thread configparser copy csv dataclasses decimal "
    "email.errors fractions ftplib getopt graphlib gzip http.client http.cookiejar http.cookies imaplib importlib.metadata ipaddress json.decoder locale mailbox msgspec netrc plistlib poplib queue "
    "re re._constants selectors shutil smtplib socket sqlite3 ssl statistics struct subprocess tarfile tokenize tomllib tomllib._parser urllib.error uuid xml.dom xml.etree.ElementTree "
    "xml.parsers.expat xml.sax._exceptions xmlrpc.client zipfile zipimport zlib zoneinfo zoneinfo._common".split()
)
_OURS_REFUSED = ("kwflow.cli", "kwflow.client", "kwflow.runners", "kwflow.testing", "kwflow.gateway", "kwflow.worker", "kwflow.config", "kwflow.durable.lower")
_DURABLE = frozenset("kwflow.durable.awaiting kwflow.durable.iters kwflow.durable.mixins kwflow.durable.pools kwflow.durable.resources kwflow.durable.runtime kwflow.durable.stacks".split())
_modules: set[str] = set()
_by_value = False


class Refused(Exception):
    """Why one object cannot be saved."""


def several(names: Iterable[str]) -> Iterable[str]:
    """Return these names.  Raises UsageError for a single str, which would count as a list of letters."""
    if isinstance(names, str):
        raise UsageError(f"a list of names goes here: [{names!r}]")
    return names


def allow_modules(names: Iterable[str]) -> None:
    """Let snapshots hold classes of these modules and their submodules, besides durable ones (config `snapshot_modules`).

    Raises UsageError for a single str.
    """
    _modules.update(several(names))


def allow_classes_by_value(allowed: bool) -> None:
    """Set whether snapshots may hold classes as cloudpickle's bytes, which are code (config `snapshot_cloudpickle`)."""
    global _by_value
    _by_value = allowed


def classes_by_value() -> bool:
    return _by_value


def is_allowed_module(module: str) -> bool:
    return registry.is_durable(module) or any(module == name or module.startswith(name + ".") for name in _modules)


def importable(module: str) -> bool:
    """Whether naming this module in a snapshot may import it, which runs code because bytes say so."""
    return module in _CLASSES or module in _FUNCTIONS or module in _EXCEPTIONS or module in _DURABLE or (not registry.is_durable(module) and is_allowed_module(module))


_RUN_BY_IMPORT = frozenset("__main__ antigravity idlelib test this turtledemo".split())


def is_module_value(name: str) -> bool:
    """Whether a variable may hold this module: one that is loaded or allowed, of the standard library, or imported in the source of a durable module."""
    top = name.partition(".")[0]
    if top == "kwflow":
        return name in ("kwflow", "kwflow.api", "kwflow.durable.iters", "kwflow.rest")
    if name in sys.modules or is_allowed_module(name) or (top in sys.stdlib_module_names and top not in _RUN_BY_IMPORT):
        return True
    return any(name.rpartition(".")[2] in module.source and _imports(module, name) for module in registry.known())


def _imports(module: registry.Module, name: str) -> bool:
    try:
        return name in imports_of(module.source, module.package)
    except SyntaxError:  # it was given as a tree with names that no source can have, as pytest's trees are
        return False


def allowed(module: str, qualname: str, value: object) -> bool:
    """Whether a snapshot may name this object: value classes of known modules, and functions only from fixed tables or allowed modules."""
    if module == "builtins":
        return qualname in _BUILTINS or (isinstance(value, type) and issubclass(value, BaseException))
    if module == "kwflow.durable.rebuild":
        return qualname in CONSTRUCTORS
    if module.split(".")[0] == "kwflow":
        return _ours(module, qualname, value)
    if is_allowed_module(module):
        return defined_in(module, qualname, value)
    if isinstance(value, type):
        if qualname in _CLASSES.get(module, ()):
            return True
        known = module in _EXCEPTIONS or module.partition(".")[0] in sys.stdlib_module_names
        return known and issubclass(value, BaseException) and defined_in(module, qualname, value)
    return qualname in _FUNCTIONS.get(module, ()) or (module == "typing" and type(value).__module__ == "typing")


def is_nameable(value: object) -> bool:
    """Whether a snapshot may name this class or function by its own `__module__` and `__qualname__`, wherever it was found."""
    return isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) and isinstance(value.__module__, str) and allowed(value.__module__, value.__qualname__, value)


def _ours(module: str, qualname: str, value: object) -> bool:
    if any(module == name or module.startswith(name + ".") for name in _OURS_REFUSED) or not defined_in(module, qualname, value):
        return False
    if module.startswith("kwflow.durable."):
        return module in _DURABLE and isinstance(value, type)
    return isinstance(value, type) or module in ("kwflow.api", "kwflow.rest")


_BOUND_OF = (list, dict, set, frozenset, tuple, str, bytes, bytearray, int, float, complex, range, collections.deque, re.Pattern, struct.Struct)
_MORE_BOUND_OF = ("datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "decimal.Decimal", "random.Random", "array.array")
_DUNDERS = frozenset("__getitem__ __setitem__ __delitem__ __contains__ __len__ __eq__ __lt__ __add__ __mul__ __and__ __or__".split())


def is_bound(owner: Any, name: str) -> bool:
    """Whether a snapshot may hold this attribute of a builtin value or class."""
    cls = owner if isinstance(owner, type) else type(owner)
    if (name.startswith("_") and name not in _DUNDERS) or name == "mro":
        return False
    return issubclass(cls, _BOUND_OF) or any(f"{base.__module__}.{base.__qualname__}" in _MORE_BOUND_OF for base in cls.__mro__)


def defined_in(module: str, qualname: str, value: object) -> bool:
    """Whether this is the object's own module and name, and not something that the module has imported."""
    if isinstance(value, types.ModuleType):
        return False
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return value.__module__ == module and value.__qualname__ == qualname
    return True


def find(module: Any, qualname: str) -> Any:
    """Return the attribute at the end of a dotted name that leads through classes only.  Raises AttributeError."""
    found = module
    first = True
    for part in qualname.split("."):
        if not first and not isinstance(found, type):
            raise AttributeError(qualname)
        found, first = getattr(found, part), False
    return found
