"""What can be joined by one file and one decorator: methods, scores, allocations, estimators.

Each kind has a folder of the package, one function a file. The names are read off the folder, so
that `--help` and messages know them without importing what they are made of. A user's own function
joins by the same decorator, or is named as `package.module:function`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from robust_prune.errors import UsageError
from robust_prune.user_code import importable_folder

F = TypeVar("F", bound=Callable[..., Any])
PACKAGE = Path(__file__).parent


class Registry(Generic[F]):
    """Functions of one kind by name.

    Args:
        kind: what they are, in messages: `channel score`.
        folder: where in the package they lie, one a file, as `criteria/scores`.
        arguments: what every one of them is called with, by position: `model, graph`.
    """

    def __init__(self, kind: str, folder: str, arguments: str) -> None:
        self.kind, self.folder, self.arguments = kind, folder, arguments
        self._functions: dict[str, F] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[F], F]:
        """Let a function be asked for by a name.

        Args:
            name: what the command line and Python know it by.
            facts: what else is to be known of it, for `fact`.
        """

        def join(function: F) -> F:
            self._functions[name], self._facts[name] = function, facts
            return function

        return join

    def __iter__(self) -> Iterator[str]:
        files = (p.stem.replace("_", "-") for p in self._files())
        return iter(dict.fromkeys((*sorted(files), *self._functions)))

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __str__(self) -> str:
        return ", ".join(self)

    def find(self, asked: str, told: str = "") -> F:
        """Return the function of a name, or of `package.module:function`.

        Args:
            asked: the name or path.
            told: how messages call it, where it was asked for with something around it.

        Raises:
            UsageError: there is none, or it can't be called with what it will be called with.
        """
        if ":" in asked:
            return self._imported(asked, told or asked)
        if asked not in self:
            raise self._unknown(told or asked)
        if asked not in self._functions:
            self._module(asked)
        if asked not in self._functions:
            raise UsageError(f"the file of {self.kind} {asked!r} registers no such name")
        return self._functions[asked]

    def fact(self, name: str, fact: str) -> Any:
        """Return what was registered with a name beside the function, None where nothing was."""
        if name not in self:
            return None
        self.find(name)
        return self._facts[name].get(fact)

    def summary(self, name: str) -> str:
        """Return the first sentence of the file that a name of the package's own stands for."""
        path = PACKAGE / self.folder / f"{name.replace('-', '_')}.py"
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        return " ".join(doc.split("\n\n")[0].split())

    def _files(self) -> Iterator[Path]:
        return (p for p in (PACKAGE / self.folder).glob("*.py") if p.stem != "__init__")

    def _module(self, name: str) -> None:
        parts = ("robust_prune", *self.folder.split("/"), name.replace("-", "_"))
        importlib.import_module(".".join(parts))

    def _unknown(self, told: str) -> UsageError:
        return UsageError(
            f"{self.kind} {told!r} is not known; use one of {self}, or package.module:function"
        )

    def _imported(self, path: str, asked: str) -> F:
        module, _, name = path.partition(":")
        if not module or not name or module.startswith("."):
            raise self._unknown(asked)
        try:
            with importable_folder():
                function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise UsageError(f"{self.kind} {asked!r} can't be imported: {error}") from None
        if not callable(function):
            raise UsageError(
                f"{self.kind} {asked!r} is not a function but of type {type(function).__name__}"
            )
        self._check_arguments(asked, function)
        found: F = function
        return found

    def _check_arguments(self, asked: str, function: Callable[..., Any]) -> None:
        try:
            signature = inspect.signature(function)
        except ValueError:  # some builtins have no signature to read
            return
        try:
            signature.bind(*self.arguments.split(", "))
        except TypeError as error:
            raise UsageError(
                f"{self.kind} {asked!r} can't be called with ({self.arguments}): {error}"
            ) from None


METHODS: Registry[Callable[..., Any]] = Registry(
    "fine-tuning method", "finetune/methods", "model, images, labels, attack"
)
SCORES: Registry[Callable[..., Any]] = Registry(
    "score", "criteria/scores", "model, graph, adversarial"
)
ESTIMATORS: Registry[Callable[..., Any]] = Registry(
    "MRS estimator", "criteria/estimators", "graph, adversarial"
)
ALLOCATIONS: Registry[Callable[..., Any]] = Registry(
    "allocation", "allocation/rules", "problem, evidence"
)
training_method = METHODS.register
channel_score = SCORES.register
mrs_estimator = ESTIMATORS.register
allocation_rule = ALLOCATIONS.register
