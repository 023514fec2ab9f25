"""python -m benchmarks NAME [options]: runs benchmarks/NAME.py; without a name, lists them."""

import ast
import importlib
import os
import sys
from pathlib import Path


def benchmarks() -> dict[str, str]:
    """Name and first docstring line of every benchmark: the files beside this one that define main(argv)."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    found.pop("__main__", None)
    return found


def main() -> int:
    names = benchmarks()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [options]\n")
        for name, summary in names.items():
            print(f"  {name:18} {summary}")
        return 0
    name = sys.argv[1]
    if name not in names:
        print(f"no benchmark is called {name!r}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    # torch's profiler, which measures memory on the CPU, tells its every start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    result = importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:])
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
