"""Imports of one module of a large library without what its packages and decorators would import with it."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_lock = threading.Lock()


class LazyPackage(ModuleType):
    """Stands in for a package in `sys.modules` until it is asked for a name that it does not have.

    Then the package itself is imported in its place, modules of it that were imported before are its own, and every
    name comes from it: to a program nothing differs but the time at which its `__init__` runs.
    """

    def __getattr__(self, name: str) -> Any:
        own = self.__name__
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {own!r} has no attribute {name!r}")
        with _lock:
            if sys.modules.get(own) is self:
                del sys.modules[own]
        package = importlib.import_module(own)
        for child, module in list(vars(self).items()):
            if isinstance(module, ModuleType):
                vars(package).setdefault(child, module)
        return getattr(package, name)


class _Finder:
    """Finds the packages of these names as stand-ins; those that a version of the library lacks are passed over."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path) if name in self.names else None
        if found is None or found.submodule_search_locations is None:
            return None
        spec = ModuleSpec(name, self, origin=found.origin, is_package=True)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return LazyPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def import_lazily(names: Collection[str]) -> Iterator[None]:
    """Within the block, packages of these names that are not imported yet become stand-ins, see LazyPackage."""
    finder = _Finder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Replay:
    """Applies a module's decorator, when the module is imported, to what it would have decorated before."""

    def __init__(self, name: str, decorator: str) -> None:
        self.name, self.decorator, self.decorated = name, decorator, []

    def __call__(self, value: Any) -> Any:
        module = sys.modules.get(self.name)
        if hasattr(module, "__path__"):
            return getattr(module, self.decorator)(value)
        self.decorated.append(value)
        return value

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == self.name else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_replay(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            for value in self.decorated:
                getattr(module, self.decorator)(value)

        spec.loader.exec_module = execute_and_replay
        return spec


@contextmanager
def defer_decorator(name: str, decorator: str) -> Iterator[None]:
    """Within the block, importing a decorator from the package `name` does not import the package.

    What is decorated with it is so when the package is imported, by whomever. Within the block the package has no
    other names.
    """
    if name in sys.modules:
        yield
        return
    stand_in, replay = ModuleType(name), _Replay(name, decorator)
    setattr(stand_in, decorator, replay)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]
        sys.meta_path.insert(0, replay)
