"""The studies: one file each, with its claim, its source, its arms, and its verdict's rule."""

import importlib
import pkgutil

from normkit.lab.study import Study


def all_studies() -> dict[str, Study]:
    """Return every study by name: each module of this package holds one, named STUDY."""
    modules = (
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
    )
    return {module.STUDY.name: module.STUDY for module in modules}
