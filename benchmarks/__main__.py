"""``python -m benchmarks [NAME] [ARGS]``: one benchmark, or all of them one after another, each in its own process."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import benchmarks


def names() -> list[str]:
    """The benchmarks: the modules of this package that are run, not imported."""
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name for name in found if name not in ("__main__", "report", "timing") and not name.startswith("_"))


def main(arguments: list[str]) -> int:
    named = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    if named and named[0] not in names():
        print(f"benchmark: got {named[0]!r}, wanted one of {', '.join(names())}", file=sys.stderr)
        return 2
    failed = []
    for name in named or names():
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments[len(named) :]]).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
