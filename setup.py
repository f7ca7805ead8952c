"""The C++ core, where it can be built; everything else is in pyproject.toml."""

import glob
import os
import sys

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension


class OptionalBuild(BuildExtension):
    """Without a compiler the package installs all the same and works on plain torch operators."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            print(f"normkit: installing without its C++ core: {error}", file=sys.stderr)


# Not the checks of scopes, nor all of UBSan's: GCC would spend most of its time on them.
SANITIZE = ["-fsanitize=address,bounds,shift,integer-divide-by-zero", "-fno-omit-frame-pointer"]
SANITIZE += ["-fno-sanitize-address-use-after-scope", "-O1"]
SANITIZE += ["--param", "asan-instrumentation-with-call-threshold=0"]
sanitize = SANITIZE if os.environ.get("NORMKIT_SANITIZE") == "1" else []

CORE = CppExtension(
    "normkit._cpu",
    ["csrc/ops.cpp", *sorted(glob.glob("csrc/kernels_*.cpp"))],
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
        "-fno-unswitch-loops",  # a fifth of the compile time, and gains nothing
        *("-Wall", "-Wextra", "-Wno-psabi"),
        *sanitize,
    ],
    extra_link_args=sanitize,
    py_limited_api=True,
    optional=True,
)

without = os.environ.get("NORMKIT_NO_EXTENSION") == "1"
setup(
    ext_modules=[] if without else [CORE],
    cmdclass={"build_ext": OptionalBuild},
    options={} if without else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
