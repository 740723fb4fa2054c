"""Completion of the command line in bash, zsh and fish.

``dense2conv completion bash`` prints a script that holds every word, so that a tab starts no Python, let
alone torch. Only what lies in folders, experiments and runs, is looked up then.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from dense2conv.configuration import closest, config_folder, config_keys
from dense2conv.shapes import InputError

SHELLS = ("bash", "zsh", "fish")


def completion(shell: str, words: Sequence[tuple[str, str]], groups: Sequence[str]) -> str:
    """The script of a shell.

    Args:
        shell: bash, zsh or fish.
        words: (command, word that may follow it).
        groups: commands that take the groups of ``conf/`` and run.name.

    Raises:
        InputError: another shell.
    """
    if shell not in SHELLS:
        raise InputError(f"completion {shell!r} is unknown{closest(shell, SHELLS)}")
    folders = sorted({file.parent for file in config_folder().glob("*/**/*.yaml")})
    chosen = [f"*:{folder.relative_to(config_folder()).as_posix()}=" for folder in folders]
    lines = "\n".join([*chosen, *(f"{command}:{word}" for command, word in words)])
    offer = _OFFER % (lines, shlex.quote(str(config_folder())), "|".join(groups))
    if shell == "fish":
        offer = offer.replace("\\", "\\\\").replace("'", "\\'")
    return _SCRIPTS[shell] % offer


def key_words(defaults: Any) -> list[str]:
    """``key=`` of every key, and ``key=value`` where its values can be told."""
    words = []
    for key, default, text in config_keys(defaults):
        words += [f"{key}=", *(f"{key}={choice}" for choice in choices(default, text))]
    return words


def choices(default: Any, text: str) -> list[str]:
    """The values of a key that is true or false, or whose help names them as ``a | b: why | c (why)``."""
    if isinstance(default, bool):
        return ["false", "true"]
    first, *others = re.sub(r" \([^)]*\)", "", text).split(" | ")
    # Before the first there may be what they are about: "if the folder is there: fail | …".
    head = re.match(r"[\w-]+(?=:|$)", first) or re.search(r"(?<=: )[\w-]+", first)
    named = [head.group()] if head and others else []
    for other in others:
        found = re.match(r"[\w-]+(, [\w-]+)*", other)
        named += found.group().split(", ") if found else []
    return named


# Of a command and a word so far, the keys that begin so; once there is a =, their values. POSIX sh.
_OFFER = r"""{
  printf '%%s\n' '%s'
  (cd %s && find . -mindepth 2 -name '*.yaml') | sed 's|^\./\(.*\)/\(.*\)\.yaml$|*:\1=\2|'
  find runs -mindepth 2 -maxdepth 2 -name config.yaml 2>/dev/null |
    sed 's|^runs/\(.*\)/config.yaml$|*:run.name=\1|'
} | sort -u | awk -F : -v command="$1" -v word="$2" '
  $1 == command || $1 == "*" && command ~ /^(%s)$/ {
    if (index($2, word) == 1 && (word ~ /=/) == ($2 ~ /=./)) print $2
  }'"""

_BASH = r"""# dense2conv completion bash >~/.local/share/bash-completion/completions/dense2conv
_dense2conv_offer() {
%s
}
_dense2conv() {
  local line="${COMP_LINE:0:COMP_POINT}" word before
  word="${line##*[[:space:]]}"
  read -r -a before <<<"${line%%"$word"}"
  [[ ${before[1]} == bench ]] || before=("${before[@]:0:2}")
  mapfile -t COMPREPLY < <(_dense2conv_offer "${before[*]:1:2}" "$word")
  [[ $word != *=* && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  # What readline replaces begins behind the =.
  [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}")
}
complete -o default -F _dense2conv dense2conv
"""

_ZSH = r"""#compdef dense2conv
# dense2conv completion zsh >FILE, FILE being _dense2conv in a folder of $fpath
_dense2conv_offer() {
%s
}
_dense2conv() {
  local -a before found
  before=("${(@)words[2,CURRENT-1]}")
  [[ ${before[1]} == bench ]] || before=("${before[1]}")
  found=("${(@f)$(_dense2conv_offer "${before[1,2]}" "$PREFIX")}")
  if [[ $PREFIX == *=* ]]; then
    compset -P 1 '*='
    compadd -- "${(@)found#*=}" || _files
  else
    compadd -S '' -- ${(M)found:#*=}
    compadd -- ${found:#*=}
  fi
}
if [[ $funcstack[1] == _dense2conv ]]; then _dense2conv "$@"; else compdef _dense2conv dense2conv; fi
"""

_FISH = r"""# dense2conv completion fish >~/.config/fish/completions/dense2conv.fish
function __dense2conv_offer
    set -l before (commandline -opc)[2..3]
    test "$before[1]" = bench; or set before $before[1]
    sh -c '%s' dense2conv "$before" (commandline -ct)
end
complete -c dense2conv -n 'count (__dense2conv_offer) >/dev/null' -f -a '(__dense2conv_offer)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
