"""A parser of command lines that answers a slip of the hand with the nearest word that would be right."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

# What people type first, by what other tools call it.
_OTHER_NAMES = {
    "compress": "run",
    "start": "run",
    "resume": "run",
    "prune": "run",
    "quantize": "run",
    "stop": "cancel",
    "kill": "cancel",
    "ls": "list",
    "clean": "gc",
    "show": "report",
    "check": "doctor",
    "decompress": "dequantize",
    "help": "--help",
    "version": "--version",
}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors name what was wrong, the nearest valid word, and where help is."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but what is unknown is told here, by the verb that does not know it."""
        found, extras = super().parse_known_args(args, namespace)
        if extras:
            self.error(self._unknown(extras))
        return found, extras

    def error(self, message: str) -> NoReturn:
        """Usage and one message on stderr, and exit code 2."""
        if message.endswith("arguments are required: VERB"):
            message = "a VERB is missing"
        self.print_usage(sys.stderr)
        more = "" if message.endswith("?") else f"; `{self.prog} --help` tells more"
        self.exit(2, f"{self.prog}: error: {message}{more}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """What argparse asks for every value with `choices`."""
        if action.choices is None or value in action.choices:
            return
        from ..spec.fields import nearest

        names = [str(choice) for choice in action.choices]
        other = _OTHER_NAMES.get(str(value)) if isinstance(action, argparse._SubParsersAction) else None
        hint = f"did you mean `{other}`?" if other else nearest(str(value), names)
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}")

    def _unknown(self, extras: Sequence[str]) -> str:
        from ..spec.fields import nearest

        option = next((word.partition("=")[0] for word in extras if word.startswith("-")), None)
        if option is None:
            return f"unexpected argument {extras[0]!r}"
        if " " not in self.prog:
            return f"unknown option {option}; options of a verb stand behind it"
        known = [name for name in self._option_string_actions if name.startswith("--")]
        return f"unknown option {option}; {nearest('--' + option.lstrip('-'), known)}"
