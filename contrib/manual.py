#!/usr/bin/env python3
"""Writes the man page of tun6, or the completion of its command line for bash, both from the parser itself:

python3 contrib/manual.py man > /usr/local/share/man/man8/tun6.8
python3 contrib/manual.py bash > /etc/bash_completion.d/tun6
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tun6

FILES = {
    tun6.CONFIG_FILES[0]: f"Configuration, where there is one; otherwise {tun6.CONFIG_FILES[1]} in the current folder.",
    str(tun6.STATE_FOLDER): "Of the service: assignments, keys and certificate.",
}
BASH = r"""# Completion of tun6 for bash, made by contrib/manual.py from the parser.
declare -gA _tun6_words=(
%s
)
_tun6() {
    local path=tun6 word current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        [[ $word == -* || -z ${_tun6_words[$path $word]} ]] || path+=" $word"
    done
    mapfile -t COMPREPLY < <(compgen -W "${_tun6_words[$path $previous]-${_tun6_words[$path]}}" -- "$current")
}
complete -o default -F _tun6 tun6"""


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the subcommands of a parser by name."""
    return {name: each for action in subparsers_of(parser) for name, each in action.choices.items()}


def subparsers_of(parser: argparse.ArgumentParser) -> list[argparse._SubParsersAction[argparse.ArgumentParser]]:
    return [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Returns what a parser takes and shows, but for --help and subcommands."""
    hidden = (argparse._HelpAction, argparse._SubParsersAction)
    return [action for action in parser._actions if not isinstance(action, hidden) and action.help is not argparse.SUPPRESS]


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yields a parser and all below it."""
    yield parser
    for each in commands_of(parser).values():
        yield from walk(each)


def roff(text: str) -> str:
    """Returns text as roff has to see it."""
    text = " ".join(text.split()).replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


def man_page() -> str:
    """Returns the page, in man(7)."""
    parser = tun6.build_parser()
    description = (tun6.__doc__ or "").split("\n\n")[1]
    lines = [f'.TH TUN6 8 "" "tun6 {tun6.__version__}"', ".SH NAME", rf"tun6 \- {roff(str(parser.description).rstrip('.'))}"]
    lines += [
        ".SH SYNOPSIS",
        ".B tun6",
        roff(parser.format_usage().partition("tun6 ")[2]),
        ".SH DESCRIPTION",
        roff(description).replace("tun6.py", "tun6"),
    ]
    common = {flag for action in arguments_of(parser) for flag in action.option_strings}
    for each in walk(parser):
        lines += [".SH OPTIONS"] if each is parser else [f".SS {roff(each.prog)}", roff(str(each.description)) + "."]
        for action in arguments_of(each):
            if each is not parser and common.intersection(action.option_strings):
                continue
            value = "|".join(map(str, action.choices or ())) or str(action.metavar or action.dest)
            forms = [rf"\fB{roff(flag)}\fR" + ("" if action.nargs == 0 else rf" \fI{roff(value)}\fR") for flag in action.option_strings]
            lines += [".TP", ", ".join(forms) or rf"\fI{roff(value)}\fR", roff(str(action.help))]
        lines += [".SH COMMANDS"] if each is parser else []
    lines.append(".SH FILES")
    for path, text in FILES.items():
        lines += [".TP", rf"\fI{roff(path)}\fR", roff(text)]
    lines += [".SH EXIT STATUS", roff("0 after SIGTERM or SIGINT, 2 for wrong usage or configuration, 1 for what fails later.")]
    return "\n".join(lines)


def bash_completion() -> str:
    """Returns a script that bash may source: for each subcommand and each option with a choice, the words that may follow."""
    words: dict[str, list[str]] = {}
    for each in walk(tun6.build_parser()):
        flags = [flag for action in arguments_of(each) for flag in action.option_strings]
        values = [str(choice) for action in arguments_of(each) if not action.option_strings for choice in action.choices or ()]
        words[each.prog] = [*commands_of(each), *values, *flags, "--help"]
        for action in arguments_of(each):
            if action.nargs != 0:  # it takes a value: one of its choices, or else a file, which is what readline completes
                words.update({f"{each.prog} {flag}": list(map(str, action.choices or ())) for flag in action.option_strings})
    return BASH % "\n".join(f'    ["{path}"]="{" ".join(each)}"' for path, each in words.items())


if __name__ == "__main__":
    kinds = {"man": man_page, "bash": bash_completion}
    if sys.argv[1:2] == [] or sys.argv[1] not in kinds:
        sys.exit(f"usage: {sys.argv[0]} {' | '.join(kinds)}")
    print(kinds[sys.argv[1]]())
