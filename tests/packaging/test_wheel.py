"""The wheel holds one top-level package, works away from the source tree, and lets Hugging Face's kernels be.

Nothing here needs a network: the installed setuptools builds the wheel, and it goes without its dependencies
into a bare environment that borrows those of the running one.
"""

import os
import site
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "torch-ext" / "adacache_kernels"
PACKAGE = ROOT / "adacache_triton"


def run(*command, cwd):
    # PYTHONPATH may name the source tree and PYTHONSAFEPATH hides the current directory: both falsify this.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command} failed with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    source.mkdir()
    # A copy: a build leaves build/ and egg-info behind, and would pick up stale files from an earlier one.
    for entry in ("adacache_triton", "kernels"):
        copytree(ROOT / entry, source / entry, ignore=ignore_patterns("__pycache__", ".*"))
    for path in ROOT.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", tmp / "out", source, cwd=tmp)
    (built,) = (tmp / "out").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of a fresh environment with the wheel installed."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    offline = ("--no-deps", "--no-index", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, cwd=home)
    # After the install, or pip would take the package of the running environment for this one's. Path files
    # inside a borrowed folder are not read, so an editable install over there stays out.
    borrowed = [path for path in sys.path if path in {*site.getsitepackages(), site.getusersitepackages()}]
    here = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (here / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


def test_wheel_holds_one_package_and_all_of_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    top = {PurePosixPath(name).parts[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"adacache_triton"}

    weights = PACKAGE / "testbed" / "weights"
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    files |= {path.relative_to(PACKAGE) for path in weights.rglob("*") if path.is_file()}
    files |= {"kernels" / path.relative_to(KERNELS) for path in KERNELS.rglob("*.py")}
    expected = {f"adacache_triton/{path.as_posix()}" for path in files}
    assert "adacache_triton/kernels/__init__.py" in expected
    assert {name for name in names if not PurePosixPath(name).parts[0].endswith(".dist-info")} == expected


def test_installed_wheel_imports_away_from_the_source(installed, tmp_path):
    code = """
import adacache_triton, adacache_triton.kernels
from importlib.metadata import version
print(adacache_triton.__file__, adacache_triton.kernels.__file__, version("adacache-triton"), sep="\\n")
"""
    package, kernels, version = run(installed, "-c", code, cwd=tmp_path).splitlines()[-3:]
    inside = installed.parent.parent.resolve()
    assert Path(package).resolve().is_relative_to(inside)
    assert Path(kernels).resolve() == Path(package).resolve().parent / "kernels" / "__init__.py"
    assert version == metadata.version("adacache-triton")


@pytest.fixture
def hub_kernels():
    """Where Hugging Face's package must be found."""
    try:
        return Path(metadata.distribution("kernels").locate_file("kernels/__init__.py")).resolve()
    except metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's kernels is not installed")


@pytest.mark.parametrize("folder", ["repository", "elsewhere"])
@pytest.mark.parametrize("environment", ["running", "fresh"])
def test_hub_kernels_is_not_shadowed(environment, folder, hub_kernels, request, tmp_path):
    python = sys.executable if environment == "running" else request.getfixturevalue("installed")
    code = "import kernels; print(kernels.__file__)"
    out = run(python, "-c", code, cwd=ROOT if folder == "repository" else tmp_path)
    assert Path(out.splitlines()[-1]).resolve() == hub_kernels


def test_hub_kernels_is_not_shadowed_under_pytest(hub_kernels, tmp_path):
    # "python -m pytest" puts the current directory, here the repository, on sys.path.
    test = tmp_path / "test_shadow.py"
    test.write_text(
        "from pathlib import Path\n"
        "import adacache_triton.kernels\n"
        "import kernels\n"
        "def test_shadow():\n"
        f"    assert Path(kernels.__file__).resolve() == Path({str(hub_kernels)!r})\n"
        "    assert adacache_triton.kernels is not kernels\n"
    )
    run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={ROOT}", test, cwd=ROOT)
