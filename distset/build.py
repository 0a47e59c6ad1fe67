"""Objects from plain nested dicts: what a resolved configuration becomes, on a worker or from a run folder.

The convention is Hydra's (``_target_`` names a class or function, ``_partial_`` asks for a `functools.partial`), without
Hydra: a checkpoint is rebuilt where only torch is installed, dataclasses stay what they are, and a key that the target
does not take is an error that names the nearest one it does. Like Hydra's, it runs what the dict names: build only
configurations that you would also run.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["build", "locate", "nearest"]


def build(spec: Any, name: str = "config", **given: Any) -> Any:
    """Build ``spec``: a dict with ``_target_`` becomes the object, innermost first; lists and dicts are gone through.

    Args:
        spec: the plain dict; anything else (numbers, None, built objects) is returned as it is.
        name: what errors call it, for example ``"model"``.
        given: arguments that the configuration does not know, handed to the outermost target as they are.

    Raises:
        ValueError: for a target that cannot be imported, a key that it does not take, an argument that it lacks.

    Example:
        >>> build({"_target_": "distset.encode.Sampled", "m": 2})
        Sampled(2, choice='uniform')
        >>> build({"_target_": "distset.encode.Sampled", "n": 2}, "grad")
        Traceback (most recent call last):
        ...
        ValueError: grad.n: distset.encode.Sampled has no argument 'n'; it takes m, choice
    """
    if isinstance(spec, Mapping) and "_target_" in spec:
        return _call(spec, name, given)
    if isinstance(spec, Mapping):
        return {key: build(value, f"{name}.{key}") for key, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [build(value, f"{name}[{index}]") for index, value in enumerate(spec)]
    return spec


def locate(path: str, name: str = "config") -> Any:
    """The object at a dotted path, ``package.module.Class.method``.

    Raises:
        ValueError: if there is none.
    """
    module = str(path)
    rest: list[str] = []
    while module:
        try:
            found = importlib.import_module(module)
            for part in rest:
                found = getattr(found, part)
            return found
        except ModuleNotFoundError as error:
            if "." not in module or error.name is None or not (module + ".").startswith(error.name + "."):
                raise ValueError(
                    f"{name}._target_: there is no package {error.name!r}, which {path} needs; install it, or check the name"
                ) from error
        except AttributeError:
            break
        module, _, last = module.rpartition(".")
        rest.insert(0, last)
    raise ValueError(f"{name}._target_: found nothing at {path!r}, wanted the dotted path of a class or function")


def nearest(key: str, known: Iterable[str]) -> str:
    """``"did you mean 'slots'?"``, or the known keys where none is near."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known) or 'none'}"


def _call(spec: Mapping[str, Any], name: str, given: Mapping[str, Any]) -> Any:
    target = locate(spec["_target_"], name)
    if not callable(target):
        raise ValueError(f"{name}._target_: {spec['_target_']} is not callable, wanted a class or function")
    own = {key: value for key, value in spec.items() if key not in ("_target_", "_partial_")}
    _check_arguments(target, own, given, spec, name)
    built = {key: build(value, f"{name}.{key}") for key, value in own.items()}
    if spec.get("_partial_", False):
        return functools.partial(target, **built, **given)
    return target(**built, **given)


def _check_arguments(
    target: Any, own: Mapping[str, Any], given: Mapping[str, Any], spec: Mapping[str, Any], name: str
) -> None:
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some builtins have no signature
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    path = spec["_target_"]
    for key in own:
        if key in given:
            raise ValueError(f"{name}.{key}: is not for the configuration, it follows from the data; leave it out")
        if key not in takes and not takes_any:
            hint = nearest(key, [known for known in takes if known not in given])
            raise ValueError(f"{name}.{key}: {path} has no argument {key!r}; {hint}")
    if spec.get("_partial_", False):
        return
    missing = [key for key in takes if parameters[key].default is inspect.Parameter.empty and key not in {*own, *given}]
    if missing:
        raise ValueError(f"{name}: {path} lacks {', '.join(missing)}; add {name}.{missing[0]}=...")
