"""The scripts of the shells, and their installation.

Each script calls `kimi-mlx __complete SHELL LINE` with the line up to the cursor. The first line of the output has the
paths that the shell adds (`none`, `files`, `folders`), a tab, and the beginning of the word that they do not have. Each
further line has a candidate: the word, a tab, and its description.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from kimi_mlx.errors import KimiMlxError, UsageError
from kimi_mlx.files import write_atomically
from kimi_mlx.folders import data_folder

Shell = Literal["zsh", "bash", "fish"]
SHELLS: Sequence[Shell] = ("zsh", "bash", "fish")

ZSH = r"""#compdef kimi-mlx
_kimi_mlx() {
  local head line
  local -a lines items
  lines=("${(@f)$(kimi-mlx __complete zsh "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
  head=${lines[1]}
  for line in "${(@)lines[2,-1]}"; do
    items+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
  done
  (( $#items )) && _describe -V 'kimi-mlx' items
  case $head in
    files*|folders*)
      compset -P "${(b)${head#*$'\t'}}"
      if [[ $head = files* ]]; then _files; else _files -/; fi ;;
  esac
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _kimi_mlx kimi-mlx
"""

BASH = r"""_kimi_mlx() {
  local current=${COMP_WORDS[COMP_CWORD]} head= line
  COMPREPLY=()
  while IFS= read -r line; do
    if [ -z "$head" ]; then head=$line; continue; fi
    COMPREPLY+=("${line%%$'\t'*}")
  done < <(kimi-mlx __complete bash "${COMP_LINE:0:$COMP_POINT}" 2>/dev/null)
  [ "$current" != '=' ] || current=
  case $head in
    files*) while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$current") ;;
    folders*) while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -d -- "$current") ;;
  esac
  case $head in
    f*) type compopt >/dev/null 2>&1 && compopt -o filenames ;;
  esac
}
complete -F _kimi_mlx kimi-mlx
"""

FISH = r"""function __kimi_mlx_complete
    set -l lines (kimi-mlx __complete fish (commandline -cp) 2>/dev/null)
    set -l head (string split \t -- $lines[1])
    printf '%s\n' $lines[2..-1]
    set -l part (string replace -- "$head[2]" '' (commandline -ct))
    switch "$head[1]"
        case files
            string replace -r '^' -- "$head[2]" (__fish_complete_path $part)
        case folders
            string replace -r '^' -- "$head[2]" (__fish_complete_directories $part)
    end
end
complete --command kimi-mlx --no-files --keep-order --arguments '(__kimi_mlx_complete)'
"""

SCRIPTS: dict[Shell, str] = {"zsh": ZSH, "bash": BASH, "fish": FISH}


def find_shell(name: str) -> Shell:
    """Return a shell by its name; for an empty name that of the user.

    Raises:
        UsageError: it is another shell.
    """
    name = name or Path(os.environ.get("SHELL") or pwd.getpwuid(os.getuid()).pw_shell).name
    for shell in SHELLS:
        if name == shell:
            return shell
    raise UsageError(f"there is no completion for `{name}`", hint=f"name a shell: {', '.join(SHELLS)}")


def install_script(shell: Shell) -> tuple[Path, ...]:
    """Write the script of a shell, and for zsh and bash a line in the file that the shell reads at its start.

    Returns:
        the files that were written.

    Raises:
        KimiMlxError: there is no home folder.
        OSError: a file cannot be written.
    """
    if shell == "fish":
        config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
        path = Path(config).expanduser() / "fish" / "completions" / "kimi-mlx.fish"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, FISH.encode())
        return (path,)
    folder = data_folder()
    if folder is None:
        raise KimiMlxError("there is no home folder to install the completion in", hint="set HOME")
    path = folder / f"completion.{shell}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, SCRIPTS[shell].encode())
    start = _start_file(shell)
    line = f"[ ! -r '{path}' ] || . '{path}'  # completion of kimi-mlx\n"
    text = start.read_text(encoding="utf-8") if start.exists() else ""
    if line in text:
        return (path,)
    with start.open("a", encoding="utf-8") as file:
        file.write(("" if not text or text.endswith("\n") else "\n") + line)
    return path, start


def _start_file(shell: Shell) -> Path:
    """Return the file that an interactive shell reads at its start; on macOS, a bash in a window is a login shell."""
    if shell == "zsh":
        return Path(os.environ.get("ZDOTDIR") or "~").expanduser() / ".zshrc"
    home = Path.home()
    is_login_only = (home / ".bash_profile").exists() and not (home / ".bashrc").exists()
    return home / (".bash_profile" if is_login_only else ".bashrc")
