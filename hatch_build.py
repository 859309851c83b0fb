"""Build hook: compiles `csrc/*.cpp` into the package where a C++ compiler is found.

Without one the install succeeds all the same and the kernels written in PyTorch run: slower, same
results. `BFMOE_NO_COMPILE=1` skips the compilation, `CXX` names the compiler and `CXXFLAGS` adds
flags. `python hatch_build.py` compiles in place, for work on `csrc/`.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # `python hatch_build.py` needs no hatchling
    BuildHookInterface = object

ROOT = Path(__file__).parent
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY = f"lightning_bfmoe/kernels/_bfmoe_cpu{SUFFIX}"

# No errno and no traps, so that loops vectorise; NaN and infinity keep their meaning.
FLAGS = "-std=c++17 -O3 -fPIC -shared -pthread -fvisibility=hidden -fno-math-errno"
FLAGS += " -fno-trapping-math -ffp-contract=fast -Wno-psabi"


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: `CXX`, else the first of c++, g++, clang++ in the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def compile_library(target: Path) -> str | None:
    """Compile to `target`; returns why not, in a line, or None when it is there."""
    if os.environ.get("BFMOE_NO_COMPILE", "0") not in ("", "0"):
        return "BFMOE_NO_COMPILE is set"
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found (CXX, c++, g++, clang++)"
    sources = sorted(str(path) for path in (ROOT / "csrc").glob("*.cpp"))
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [*compiler, *FLAGS.split(), *extra, "-o", str(made), *sources]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler[0]} did not run: {error}"
        if done.returncode or not made.exists():
            first = next((x for x in done.stderr.splitlines() if "error" in x), "no message")
            return f"{compiler[0]} failed: {first.strip()}"
        made.replace(target)  # at once: a process that has the old file mapped keeps it
    return None


def report(problem: str | None) -> None:
    """Say what came of it; pip shows this with -v, and when the build fails."""
    text = f"not compiled, the PyTorch kernels will run: {problem}" if problem else "compiled"
    print(f"lightning-bfmoe: CPU kernels {text}", file=sys.stderr, flush=True)


class CustomBuildHook(BuildHookInterface):
    """Puts the compiled library into the wheel, or beside the sources for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it writes a wheel; `version` is standard or editable."""
        if self.target_name != "wheel":
            return
        if version == "editable":
            problem = compile_library(ROOT / LIBRARY)
            if problem:
                (ROOT / LIBRARY).unlink(missing_ok=True)  # it would be that of other sources
        else:
            self._folder = tempfile.TemporaryDirectory()
            made = Path(self._folder.name) / Path(LIBRARY).name
            problem = compile_library(made)
            if not problem:
                build_data["force_include"][str(made)] = LIBRARY
        if not problem:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag()}"
        report(problem)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is written."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def platform_tag() -> str:
    """This machine's platform, without a promise (manylinux) that nobody has checked."""
    from packaging.tags import sys_tags  # comes with hatchling

    platforms = (tag.platform for tag in sys_tags())
    return next(p for p in platforms if "manylinux" not in p and "musllinux" not in p)


if __name__ == "__main__":
    failure = compile_library(ROOT / LIBRARY)
    report(failure)
    sys.exit(1 if failure else 0)
