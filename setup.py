"""What pyproject.toml cannot say: the operators in C are compiled with the package, where that is possible.

Where it is not, the package is installed without them and says at its first use why (`dynatree_core.ops`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = "dynatree_core.ops.native"
FOLDER = Path(__file__).parent / Path(*PACKAGE.split("."))


def build_module():
    """The module that compiles, by its file: the package itself needs torch."""
    spec = importlib.util.spec_from_file_location("dynatree_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildOperators(build_ext):
    """Compiles the libraries with a command of their own: they are plain C that ctypes loads, not Python modules."""

    made: list[Path] = []  # noqa: RUF012  # of this process, for the wheel's name

    def run(self):
        build = build_module()
        in_place = self.inplace or self.editable_mode
        folder = FOLDER if in_place else Path(self.build_lib, *PACKAGE.split("."))
        try:
            BuildOperators.made = build.build(folder, say=self.announce_line)
        except build.BuildError as error:
            self.warn(f"the operators in C were not compiled, so the native runner is left out: {error}")

    def announce_line(self, text):
        print(text, flush=True)

    def get_outputs(self):
        return [] if self.inplace or self.editable_mode else list(map(str, BuildOperators.made))

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return sorted(str(file.relative_to(Path(__file__).parent)) for file in (FOLDER / "source").iterdir())


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of one platform, or, without the libraries, of any platform."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        if not BuildOperators.made:
            return "py3", "none", "any"
        build = build_module()
        _, _, platform = super().get_tag()
        machine = platform.partition("_")[2]
        _, name = build.compiler(machine)
        if name == "zig":  # which links for an old glibc; a system's compiler links for the system's
            platform = f"manylinux_{build.GLIBC.replace('.', '_')}_{machine}"
        return "py3", "none", platform


setup(
    ext_modules=[Extension(f"{PACKAGE}.operators", sources=[])],
    cmdclass={"build_ext": BuildOperators, "bdist_wheel": PlatformWheel},
)
