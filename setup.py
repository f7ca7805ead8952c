"""The C++ extensions, where they can be built; everything else is in pyproject.toml."""

import copy
import glob
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension


class OptionalBuild(BuildExtension):
    """Without a compiler the package installs all the same and works on plain torch operators."""

    def build_extensions(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._build_one, self.extensions))

    def _build_one(self, extension: Extension) -> None:
        """By a command of its own: torch's writes one file of orders into its folder."""
        own = copy.copy(self)
        own.extensions, own.compiler = [extension], copy.copy(self.compiler)
        own.build_temp = os.path.join(self.build_temp, extension.name)
        try:
            BuildExtension.build_extensions(own)
        except Exception as error:
            print(f"normkit: installing without {extension.name}: {error}", file=sys.stderr)

    def get_ext_filename(self, name: str) -> str:
        """What is of one torch says so; normkit.runtime.eager looks for this name."""
        filename: str = super().get_ext_filename(name)
        return filename.replace("_eager.", f"_eager.torch-{torch.version.git_version[:12]}.")


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
    depends=glob.glob("csrc/*.h"),
    py_limited_api=True,
    optional=True,
)

EAGER = CppExtension(
    "normkit._eager",
    ["csrc/eager.cpp"],
    define_macros=[("AT_PER_OPERATOR_HEADERS", None)],
    extra_compile_args=["-O2", "-g0", "-fvisibility=hidden", "-Wall", *sanitize],
    extra_link_args=sanitize,
    optional=True,
)

without = os.environ.get("NORMKIT_NO_EXTENSION") == "1"
setup(
    ext_modules=[] if without else [CORE, EAGER],
    cmdclass={"build_ext": OptionalBuild},
    options={} if without else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
