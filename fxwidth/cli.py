"""The `fxwidth` command's entry point."""

from __future__ import annotations

import sys

_DEMO_PACKAGES = frozenset({"matplotlib", "rich", "sklearn", "torchvision", "typer"})


def main() -> None:
    """Run the `fxwidth` command; when a package of the `demo` extra is missing, exit and name the extra."""
    try:
        from fxwidth.commands.app import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_PACKAGES:
            raise
        sys.exit(f"fxwidth: this command needs {package}, which the demo extra installs: pip install 'fxwidth[demo]'")


if __name__ == "__main__":
    main()
