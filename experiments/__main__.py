"""Lists the commands: python -m experiments."""

import ast
import pathlib


def main() -> None:
    files = sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py"))
    width = max(len(file.stem) for file in files)
    for file in files:
        words = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        print(f"{file.stem:{width}}  {' '.join(words.partition(chr(10) * 2)[0].split())}")
    print("\npython -m experiments.NAME --help says more of one.")


if __name__ == "__main__":
    main()
