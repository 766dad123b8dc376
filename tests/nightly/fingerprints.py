"""Run by another interpreter: prints, as JSON, the hash of every def and class of the Python files named on stdin.

It needs only the standard library and kwflow.durable.fingerprint.
"""

import ast
import json
import pathlib
import sys
import warnings

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from kwflow.durable.fingerprint import canonical_hash, unit_hash  # noqa: E402


def hashes(path: str) -> dict[str, str]:
    """The hashes by line and name. Empty for a file that this interpreter cannot parse."""
    try:
        tree = ast.parse(pathlib.Path(path).read_bytes())
    except (SyntaxError, ValueError):
        return {}
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[f"{node.lineno} {node.name}"] = unit_hash(node)
        elif isinstance(node, ast.ClassDef):
            found[f"{node.lineno} {node.name}"] = canonical_hash(node, annotations=True)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps({path: hashes(path) for path in sys.stdin.read().split("\n") if path}))
