"""One call of the user's code on the training side, with what goes wrong in it said in one line.

Owns loading a hook and turning an exception inside it into a PluginError that names option, path, file and
line. Knows nothing of what a hook is for.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from asyncrl.errors import PluginError
from asyncrl.topology.plugins import load_checked


class UserHook:
    """A function of the user's, loaded and checked; call it as the function itself."""

    def __init__(self, path: str, *, kind: str, option: str) -> None:
        """Raises PluginError when `path` cannot be loaded or is no hook of this kind."""
        self.option = option
        self.path = path
        self._function, self.form = load_checked(path, kind=kind, option=option)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook returns. Raises PluginError, the hook's exception as its cause."""
        return self.run(self._function, *args, **kwargs)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same for a function that the hook returned."""
        try:
            return function(*args, **kwargs)
        # User code may raise anything; whatever it is, the operator needs to know where it came from.
        except Exception as error:
            raise PluginError(
                f"{self.option}: {self.path} failed{_place(error)}: {type(error).__name__}: {error}"
            ) from error


def _place(error: Exception) -> str:
    """Where in the hook's own file the exception passed last; "" where the call itself failed."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    if not frames:
        return ""
    last = [frame for frame in frames if frame.filename == frames[0].filename][-1]
    return f" at {last.filename}:{last.lineno} ({last.name})"
