"""Finding user code by its path, and checking its signature before a run depends on it.

Owns the three spellings of a path (`package.module:function`, `package.module.function`,
`path/to/file.py:function`) and the names of built-in rewards; the documented signatures are in `hook_kinds`.
It never calls a hook. User code may import anything, so processes that must stay light (the supervisor) use
`check_plugins`, which imports in a child: `python -m asyncrl.topology.plugins CHECK...`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

from asyncrl.errors import AsyncrlError, PluginError
from asyncrl.topology.hook_kinds import KINDS, Hook

BUILTIN_REWARDS = ("math", "exact", "random", "deterministic_random", "remote_rm", "none")
"""Rewards that need no code of the user's."""
PLANNED_REWARDS = ("deepscaler", "gemma_math", "dapo", "f1", "gpqa", "ifbench")
"""Names of the references that are known and not built in yet."""
BOXED = "boxed_"
"""Prefix of a built-in reward: it sees the content of the last \\boxed{} instead of the response."""

CHECK_TIMEOUT_S = 120.0
"""Importing a plug-in may import torch, which takes long on a cold disk."""


def is_plugin_path(use: str) -> bool:
    """Whether `use` names a function rather than a built-in."""
    return ":" in use or "." in use


def check_reward_name(use: str, *, option: str = "reward.use") -> list[str]:
    """Problems with the name of a built-in reward; none for a path."""
    if is_plugin_path(use):
        return []
    name = use.removeprefix(BOXED)
    allowed = (
        f'built in: {", ".join(BUILTIN_REWARDS)} (each also as {BOXED}NAME); or "package.module:function"'
    )
    if name in PLANNED_REWARDS:
        return [f'{option}: reward "{use}" is known but not built in yet; {allowed}']
    if name not in BUILTIN_REWARDS:
        return [
            f'{option}: unknown reward "{use}"{_close(name, (*BUILTIN_REWARDS, *PLANNED_REWARDS))}; {allowed}'
        ]
    return []


def _close(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, [k for k in known if not k.startswith("_")], n=3)
    return f" (close to it: {', '.join(matches)})" if matches else ""


def load(path: str, *, what: str) -> object:
    """What `path` names. `what` is the option, for the error. Raises PluginError.

    A file's directory is appended to sys.path, so that it may import its neighbours.
    """
    place, colon, name = path.partition(":") if ":" in path else _split_dotted(path)
    if not place or not name:
        raise PluginError(
            f'{what}: "{path}" names no function; "package.module:function" or "path/to/file.py:function" do'
        )
    is_file = place.endswith(".py") and bool(colon)
    module = _load_file(place, what=what) if is_file else _load_module(place, what=what)
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(module).items() if callable(value)]
            raise PluginError(f'{what}: "{path}": {place} has no "{name}"{_close(name, known)}')
        found = getattr(found, part)
    return found


def _split_dotted(path: str) -> tuple[str, str, str]:
    module, _, name = path.rpartition(".")
    return module, "", name


def _load_module(name: str, *, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise PluginError(
                f'{what}: no module "{error.name}"{_close_modules(error.name)}; the current directory, '
                "the topology's directory and PYTHONPATH are searched"
            ) from error
        raise PluginError(_import_failure(name, error, what=what)) from error
    # SystemExit too: a script without a main guard must not end the process that only looks at it.
    except (Exception, SystemExit) as error:
        raise PluginError(_import_failure(name, error, what=what)) from error


def _load_file(name: str, *, what: str) -> ModuleType:
    file = _find_file(name, what=what)
    module_name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there while it loads
    try:
        spec.loader.exec_module(module)
    # SystemExit too: see _load_module.
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise PluginError(_import_failure(name, error, what=what)) from error
    return module


def _find_file(name: str, *, what: str) -> Path:
    for folder in ("", *sys.path):
        candidate = Path(folder, name).resolve()
        if candidate.is_file():
            return candidate
    parent = Path(name).resolve().parent
    beside = [file.name for file in parent.glob("*.py")] if parent.is_dir() else []
    raise PluginError(f'{what}: no file "{name}"{_close(Path(name).name, beside)} in {parent}')


def _close_modules(name: str) -> str:
    parent, _, last = name.rpartition(".")
    places = list(sys.modules[parent].__path__) if parent in sys.modules else None
    return _close(last, (info.name for info in pkgutil.iter_modules(places)))


def _import_failure(name: str, error: BaseException, *, what: str) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{what}: importing {name} failed{at}: {type(error).__name__}: {error}"


def check_signature(hook: object, *, kind: str, option: str) -> tuple[str, ...]:
    """The form of `kind` by which `hook` is to be called: the names of its positional arguments.

    Raises PluginError showing the accepted signatures and the one found.
    """
    expected = KINDS[kind]
    if expected.methods:
        return _check_class(hook, expected, option=option)
    if not callable(hook) or inspect.isclass(hook):
        raise PluginError(f"{option}: expected a function {expected.describe()}; found {_found(hook)}")
    form = _matching_form(hook, expected, option=option)
    if form is None or expected.is_async not in {None, is_coroutine_function(hook)}:
        raise PluginError(f"{option}: expected {expected.describe()}; found {_found(hook)}")
    return form


def is_coroutine_function(hook: object) -> bool:
    """Whether calling `hook`, a function or an object with __call__, gives a coroutine."""
    return inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(getattr(hook, "__call__", None))  # noqa: B004


def _matching_form(hook: Callable[..., object], expected: Hook, *, option: str) -> tuple[str, ...] | None:
    try:
        signature = inspect.signature(hook)
    except ValueError as error:
        raise PluginError(f"{option}: {hook!r} has no Python signature; wrap it in a function") from error
    names = list(signature.parameters)
    # The longer form wins only by name: fn(sample, strict=False) is no (args, sample).
    forms = [f for f in expected.forms if _binds(signature, f, keywords=expected.keywords)]
    named = [f for f in forms if tuple(names[: len(f)]) == f or (names[:1] == ["args"] and len(f) > 1)]
    return max(named, key=len) if named else (forms[0] if forms else None)


def _binds(signature: inspect.Signature, form: tuple[str, ...], *, keywords: tuple[str, ...] = ()) -> bool:
    try:
        signature.bind(*form, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def _check_class(hook: object, expected: Hook, *, option: str) -> tuple[str, ...]:
    if not inspect.isclass(hook):
        raise PluginError(f"{option}: expected a {expected.describe()}; found {_found(hook)}")
    if _matching_form(hook, expected, option=option) is None:
        raise PluginError(f"{option}: expected a {expected.describe()}; found {_found(hook)}")
    if missing := [m for m in expected.methods if not callable(getattr(hook, m, None))]:
        raise PluginError(
            f"{option}: expected a {expected.describe()}; {hook.__qualname__} has no {', '.join(missing)}"
        )
    return expected.forms[0]


def _found(hook: object) -> str:
    if not callable(hook):
        return f"{type(hook).__name__} {hook!r:.80}"
    prefix = "class" if inspect.isclass(hook) else "async def" if is_coroutine_function(hook) else "def"
    return f"{prefix} {getattr(hook, '__name__', type(hook).__name__)}{inspect.signature(hook)}"


def load_checked(path: str, *, kind: str, option: str) -> tuple[Callable[..., object], tuple[str, ...]]:
    """`load` and `check_signature` in one: the hook and the form to call it by. Raises PluginError."""
    hook = load(path, what=option)
    form = check_signature(hook, kind=kind, option=option)
    assert callable(hook)
    return hook, form


Check = tuple[str, str, str]
"""(option, kind, path)."""


def check_plugins(
    checks: Sequence[Check], *, search_paths: Sequence[str] = (), timeout_s: float = CHECK_TIMEOUT_S
) -> list[str]:
    """Problems of user code, found without importing it here: at most one line for each check, in order.

    Blocks for up to `timeout_s` per import that hangs. A child that dies or hangs is a problem of the check
    it was at; a new child does the rest.
    """
    problems: list[str] = []
    remaining = list(checks)
    while remaining:
        lines, ending = _run_checks(remaining, search_paths=search_paths, timeout_s=timeout_s)
        problems += [problem for problem in lines if problem]
        remaining = remaining[len(lines) :]
        if remaining:
            option, _, path = remaining.pop(0)
            problems.append(f'{option}: importing "{path}" {ending}')
    return problems


def _run_checks(
    checks: Sequence[Check], *, search_paths: Sequence[str], timeout_s: float
) -> tuple[list[str], str]:
    """One child: a line per finished check ("" is fine), and how the child ended."""
    # -c instead of -m would hide the command from people who look at a process list.
    command = [sys.executable, "-m", "asyncrl.topology.plugins", *(json.dumps(check) for check in checks)]
    path = os.pathsep.join(p for p in (*search_paths, os.environ.get("PYTHONPATH", "")) if p)
    with subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    ) as child:
        try:
            out, err = child.communicate(timeout=timeout_s)
            ending = (
                f"ended its process (exit {child.returncode}): {err.decode(errors='replace').strip()[-400:]}"
            )
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            out, _ = child.communicate()
            ending = f"did not finish within {timeout_s:g} s"
    complete = out.decode(errors="replace").splitlines()[: out.count(b"\n")]
    return [str(json.loads(line)) for line in complete], ending


def _check_one(check: Check) -> str:
    option, kind, path = check
    try:
        load_checked(path, kind=kind, option=option)
    except AsyncrlError as error:
        return str(error)
    return ""


def main(arguments: Sequence[str]) -> None:
    """Check each `["option", "kind", "path"]` (JSON) in turn; write one JSON string per check."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)  # user code that prints must not write between our lines
        for argument in arguments:
            output.write(json.dumps(_check_one(tuple(json.loads(argument)))) + "\n")
            output.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
