# shellcheck shell=bash disable=SC2016
# Sourced by demo, test and check: `prepare runtime` or `prepare dev` makes .venv once; after that it only compares
# files. Works with the bash 3.2 of macOS. Sets $root, $venv and $python. (SC2016: backquotes around literals.)

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
unfinished=$venv/.kimi-mlx-unfinished # there while packages are being installed
place=$venv/.kimi-mlx-root            # the folder it was made for: an environment does not survive a move
unset PYTHONHOME PYTHONPATH

die() { # MESSAGE [HINT]
  printf 'error: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
  exit 1
}

has_uv() { command -v uv >/dev/null 2>&1; }

fingerprint() { # what an installation depends on
  cat "$root/pyproject.toml" "$root/scripts/lib.sh" | cksum
}

stamp() { printf '%s/.kimi-mlx-%s' "$venv" "$1"; } # LEVEL: runtime or dev

is_ready() { # LEVEL
  [ -x "$python" ] && [ ! -e "$unfinished" ] && [ -f "$(stamp "$1")" ] &&
    [ "$(cat "$(stamp "$1")")" = "$(fingerprint)" ] && [ "$(cat "$place")" = "$root" ]
}

fits() { # PYTHON: new enough, and on a Mac not the Intel build, for which there is no MLX
  "$1" -c 'import platform, sys
sys.exit(sys.version_info < (3, 10) or (sys.platform == "darwin" and platform.machine() != "arm64"))' >/dev/null 2>&1
}

can_make_venv() { has_uv || "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; } # PYTHON

find_python() { # prints a path; a name on the path may be a shim that cannot run, so each one is tried
  local name path
  for name in python3.13 python3.14 python3.12 python3.11 python3.10 python3 python; do
    path=$(command -v "$name") || continue
    if fits "$path" && can_make_venv "$path"; then
      printf '%s\n' "$path"
      return 0
    fi
  done
  return 1
}

explain_python() { # ends with why no Python on the path will do
  local path version
  if ! path=$(command -v python3); then
    die 'kimi-mlx needs Python 3.10 or newer, and there is no `python3`' \
      'install Python 3.13 (macOS: `brew install python@3.13`), or uv, which brings its own'
  fi
  version=$("$path" -c 'import platform; print(platform.python_version(), platform.machine())' 2>/dev/null) ||
    version='a version that does not run'
  if fits "$path"; then
    die "\`$path\` ($version) lacks the venv module" 'install it (Debian, Ubuntu: `apt install python3-venv`), or uv'
  fi
  die "kimi-mlx needs Python 3.10 or newer (on a Mac built for arm64), but \`$path\` is $version" \
    'install Python 3.13 (macOS: `brew install python@3.13`), or uv, which brings its own'
}

make_venv() {
  local base
  if ! base=$(find_python); then
    has_uv || explain_python
    base=3.13 # uv downloads it
  fi
  rm -rf "$venv"
  mkdir "$venv" || die "cannot write to $root"
  : >"$unfinished"
  if has_uv; then
    uv venv --quiet --allow-existing --python "$base" "$venv" || die "uv could not make $venv"
  else
    "$base" -m venv "$venv" || die "$base could not make $venv"
  fi
  printf '%s\n' "$root" >"$place"
}

install_packages() { # LEVEL
  cd "$root" || return
  local what=.
  [ "$1" = runtime ] || what=".[$1]"
  if has_uv; then
    uv pip install --quiet --python "$python" --editable "$what"
  else
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || return
    # like uv, which does not compile 900 MB of which little is ever imported
    "$python" -m pip install --quiet --disable-pip-version-check --no-compile --editable "$what"
  fi
}

is_usable() { # an environment that more can be installed into
  [ -x "$python" ] && [ ! -e "$unfinished" ] && fits "$python" &&
    { [ ! -e "$place" ] || [ "$(cat "$place")" = "$root" ]; }
}

prepare() { # LEVEL
  ! is_ready "$1" || return 0
  is_usable || make_venv
  local size='260 MB'
  [ "$1" = runtime ] || size='970 MB'
  printf 'kimi-mlx: installing the %s packages into .venv, once (about %s, a minute or two)\n' "$1" "$size" >&2
  local interrupted=
  trap 'interrupted=1' INT TERM
  : >"$unfinished"
  if (install_packages "$1") && [ -z "$interrupted" ]; then
    printf '%s\n' "$root" >"$place"
    fingerprint >"$(stamp "$1")"
    [ "$1" != dev ] || fingerprint >"$(stamp runtime)"
    rm "$unfinished"
  elif [ -n "$interrupted" ]; then
    die 'the installation was interrupted' 'run the same command again: it starts afresh'
  else
    rm "$unfinished" # an installer that says no leaves things as they were
    die 'the packages could not be installed' 'see above; is the network there? Run the same command again'
  fi
  trap - INT TERM
}
