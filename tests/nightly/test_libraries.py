"""Libraries that nobody here wrote, made durable: their own tests pass, with every generator restored before each resume (H1, docs/LOCALS.md "Libraries")."""

import os
import pathlib
import re
import subprocess
import sys
import tarfile

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]
ROOT = pathlib.Path(__file__).parents[2]
LIBRARIES = {"boltons": (".", "tests", 100), "parso": (".", "test", 100_000), "simpy": ("src", "tests", 5)}  # where its package is, where its tests are, and how many restores at least


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_tests_of_a_library_pass_with_its_generators_restored(name: str, tmp_path: pathlib.Path) -> None:
    package, tests, restores = LIBRARIES[name]
    got = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-q", "-d", str(tmp_path), name], capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"NOT TESTED: {name} cannot be downloaded: {got.stderr[-200:]}")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = (path for path in tmp_path.iterdir() if path.is_dir())
    env = {**os.environ, "KWFLOW_LIBRARY": name, "PYTHONPATH": os.pathsep.join(map(str, (pathlib.Path(__file__).parent, source / package, ROOT)))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "restored_library", "-o", "addopts=", "-m", "not benchmark", "--ignore", f"{tests}/test_benchmark.py", tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=source, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = re.search(r"restores: (\d+)", done.stdout)
    assert found is not None and int(found[1]) >= restores
