# Brings kimi-mlx to this host. POSIX sh: macOS and Linux. Sends messages as kimi_mlx.cluster.channel.messages has them: `step`
# says what is being done, `failed` why it ends, `installed` what there is now. See install.py, which sets before:
#   install_data      the user's data folder        install_wheel     the wheel's name; its bytes are our input
#   install_minor     of Python, such as 3.12       install_bytes     the wheel's size
#   install_uv        path of uv, or nothing        install_pins      versions to take, lines for pip
#   install_renew     1: only kimi-mlx is to be renewed, if that is possible
#   install_versions  versions.py
# A virtual environment cannot be moved, so each is made in a folder of its own. `venv` is a link to one that is
# complete: whoever finds the link may use it, whatever was killed at any time.
exec 3<&0 4>&1 </dev/null >&2
cd / # Python would import from where we are
export LC_ALL=C PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off UV_NO_PROGRESS=1
unset PYTHONPATH PYTHONHOME # what these lead to is not part of the environment that is made
PATH=$PATH:/usr/bin:/bin:/usr/sbin:/sbin
link=$install_data/venv
all=$install_data/installed

tell() { printf '{"kind":"%s","text":"%s"}\n' "$1" "$2" >&4; } # KIND TEXT, without quotes or backslashes
step() { tell step "$1"; }
fail() {
  [ -z "$watch" ] || kill "$watch"
  [ -z "$place" ] || rm -rf "$place"
  tell failed "$1"
  exit 1
}

# The folder of the environment that is in use; nothing if there is none, or if it is not ours.
used_place() {
  target=$(readlink "$link")
  case $target in
    installed/*/venv) printf '%s\n' "$install_data/${target%/venv}" ;;
  esac
}

# Removes what is not in use: former environments, and what was killed before it was complete.
clean() {
  for old in "$all"/*; do
    [ -d "$old" ] && [ "$old" != "$1" ] || continue
    kill -0 "${old##*-}" 2>/dev/null || rm -rf "$old" # unless it is being made at this moment
  done
}

# A Python of the wanted minor version, else one that is new enough; for the processor, and able to make environments.
find_python() {
  places="$PATH:$HOME/.local/bin:/opt/homebrew/bin:/usr/local/bin"
  places="$places:/Library/Frameworks/Python.framework/Versions/Current/bin"
  for name in "python$install_minor" python3 python3.13 python3.12 python3.11 python3.10; do
    rest=$places:
    while [ -n "$rest" ]; do
      python=${rest%%:*}/$name
      rest=${rest#*:}
      [ -x "$python" ] && [ ! -d "$python" ] || continue
      if [ "$(uname -s)" = Darwin ] && [ "$python" = /usr/bin/python3 ]; then
        xcode-select -p >/dev/null 2>&1 || continue # a stub, which would open a window
      fi
      minor=$("$python" -c "$suits" 2>/dev/null) || continue
      "$python" -c 'import ensurepip, venv' 2>/dev/null && return
      lacking=$minor
    done
  done
  [ -z "$lacking" ] || fail "no venv for Python $lacking"
  fail "no Python"
}
suits='
import platform, sys
if sys.version_info < (3, 10) or (sys.platform, platform.machine()) == ("darwin", "x86_64"):
    sys.exit(1)
print("%d.%d" % sys.version_info[:2])
'

make_venv() {
  if [ -n "$install_uv" ]; then
    step "making an environment with uv and Python $install_minor"
    "$install_uv" venv --python "$install_minor" "$place/venv" || fail "no environment"
    return
  fi
  find_python
  step "making an environment with Python $minor"
  "$python" -m venv "$place/venv" || fail "no environment"
}

# Whether kimi-mlx can be renewed in the environment that is in use.
can_renew() {
  [ "$install_renew" = 1 ] && [ -n "$used" ] && "$used/venv/bin/python" -c '' || return 1
  [ -n "$install_uv" ] || "$used/venv/bin/python" -m pip --version >/dev/null
}

# with_pip VERB ARGUMENTS...: of uv if it is there, else of the environment.
with_pip() {
  if [ -n "$install_uv" ]; then
    verb=$1
    shift
    "$install_uv" pip "$verb" --python "$place/venv/bin/python" "$@"
  else
    "$place/venv/bin/python" -m pip "$@"
  fi
}

step "sending kimi-mlx"
place= watch= lacking=
if [ -e "$link" ] && [ ! -L "$link" ]; then fail "not ours"; fi
mkdir -p "$all" || fail "no folder"
used=$(used_place)
clean "$used"
new=$all/$(date +%Y%m%d-%H%M%S)-$$
mkdir "$new" && place=$new || fail "no folder"
head -c "$install_bytes" <&3 >"$place/$install_wheel" || fail "no wheel"
printf '%s\n' "$install_pins" >"$place/pins.txt" || fail "no wheel"

# When our input ends, whoever has sent us is gone: nothing goes on then.
(
  cat
  kill -TERM 0
) <&3 3<&- 4>&- >/dev/null 2>&1 &
watch=$!

# What pip and uv put aside goes with the environment, whatever is killed.
own_tmp() { mkdir -p "$place/tmp" && export TMPDIR="$place/tmp" || fail "no folder"; }

if can_renew; then
  mv "$place/$install_wheel" "$place/pins.txt" "$used" && rmdir "$place" || fail "no wheel"
  place=$used
  own_tmp
  rm -f "$link" || fail "no folder"
  step "renewing kimi-mlx"
  cd "$place" || fail "no folder" # pip takes a path with blanks for something else
  with_pip install --no-deps --force-reinstall "./$install_wheel" || fail "pip"
else
  own_tmp
  make_venv
  step "installing kimi-mlx, MLX and what they need"
  cd "$place" || fail "no folder"
fi
with_pip install --constraint pins.txt "./$install_wheel" || fail "pip"
step "looking at what is there now"
rm -rf "$place/tmp"
unset TMPDIR
cd /
"$place/venv/bin/python" -c 'import mlx.core, kimi_mlx' || fail "no start"
found=$("$place/venv/bin/python" -c "$install_versions" "$link/bin/python") || fail "no start"
ln -s "installed/${place##*/}/venv" "$place/link" &&
  "$place/venv/bin/python" -c 'import os, sys; os.replace(*sys.argv[1:])' "$place/link" "$link" || fail "no folder"
printf '{"kind":"installed","found":%s}\n' "$(printf '%s\n' "$found" | sed -n 's/^interpreter=//p')" >&4
kill "$watch"
wait "$watch" 2>/dev/null
exit 0
