# Install kimi-mlx on this host. POSIX sh, for macOS and Linux. Prints messages in the format of
# kimi_mlx.cluster.channel.messages: `step` (the current step), `failed` (the reason), `installed` (the interpreter).
# install.py sets these variables:
#   install_data      the user's data folder        install_wheel     file name of the wheel; standard input has its bytes
#   install_minor     Python version, e.g. 3.12     install_bytes     size of the wheel
#   install_uv        path of uv, or empty          install_pins      pinned versions, as pip constraints
#   install_upgrade   1: replace only kimi-mlx, if possible
#   install_versions  source of versions.py
# A virtual environment cannot be moved, so each one gets a new folder. `venv` is a link that always leads to a complete
# environment, even if an installation is killed.
exec 3<&0 4>&1 </dev/null >&2
cd / # Python would import from the current folder
export LC_ALL=C PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off UV_NO_PROGRESS=1
unset PYTHONPATH PYTHONHOME # packages outside the environment must not count
link=$install_data/venv
all=$install_data/installed

send() { printf '%s{"kind":"%s","text":"%s"}\n' "$KIMI_MLX_PREFIX" "$1" "$2" >&4; } # KIND TEXT; the text must not contain quotes or backslashes
step() { send step "$1"; }
fail() {
  [ -z "$watcher" ] || kill "$watcher"
  [ -z "$folder" ] || rm -rf "$folder"
  send failed "$1"
  exit 1
}

# Print the folder of the current environment; nothing if there is none, or if the link is not ours.
current_folder() {
  target=$(readlink "$link")
  case $target in
    installed/*/venv) printf '%s\n' "$install_data/${target%/venv}" ;;
  esac
}

# Remove old environments and unfinished ones, except the folder $1.
remove_old() {
  for old in "$all"/*; do
    [ -d "$old" ] && [ "$old" != "$1" ] || continue
    kill -0 "${old##*-}" 2>/dev/null || rm -rf "$old" # keep the folder of a running installation
  done
}

# Find a Python of our minor version, else a new enough one. It must be native to the processor and able to create
# virtual environments. Sets python and minor.
find_python() {
  search_path="$PATH:$HOME/.local/bin:/opt/homebrew/bin:/usr/local/bin"
  search_path="$search_path:/Library/Frameworks/Python.framework/Versions/Current/bin"
  for name in "python$install_minor" python3 python3.13 python3.12 python3.11 python3.10; do
    rest=$search_path:
    while [ -n "$rest" ]; do
      python=${rest%%:*}/$name
      rest=${rest#*:}
      [ -x "$python" ] && [ ! -d "$python" ] || continue
      if [ "$(uname -s)" = Darwin ] && [ "$python" = /usr/bin/python3 ]; then
        xcode-select -p >/dev/null 2>&1 || continue # a stub that would open a window
      fi
      minor=$("$python" -c "$check_python" 2>/dev/null) || continue
      "$python" -c 'import ensurepip, venv' 2>/dev/null && return
      minor_without_venv=$minor
    done
  done
  [ -z "$minor_without_venv" ] || fail "no venv for Python $minor_without_venv"
  fail "no Python"
}
check_python='
import platform, sys
if sys.version_info < (3, 10) or (sys.platform, platform.machine()) == ("darwin", "x86_64"):
    sys.exit(1)
print("%d.%d" % sys.version_info[:2])
'

make_venv() {
  if [ -n "$install_uv" ]; then
    step "creating a virtual environment with uv and Python $install_minor"
    "$install_uv" venv --python "$install_minor" "$folder/venv" || fail "no environment"
    return
  fi
  find_python
  step "creating a virtual environment with Python $minor"
  "$python" -m venv "$folder/venv" || fail "no environment"
}

# Check whether kimi-mlx can be replaced in the current environment.
can_upgrade() {
  [ "$install_upgrade" = 1 ] && [ -n "$current" ] && "$current/venv/bin/python" -c '' || return 1
  [ -n "$install_uv" ] || "$current/venv/bin/python" -m pip --version >/dev/null
}

# run_pip COMMAND ARGUMENTS...: run `uv pip` if uv exists, else pip of the environment.
run_pip() {
  if [ -n "$install_uv" ]; then
    command=$1
    shift
    "$install_uv" pip "$command" --python "$folder/venv/bin/python" "$@"
  else
    "$folder/venv/bin/python" -m pip "$@"
  fi
}

step "sending kimi-mlx"
folder= watcher= minor_without_venv=
if [ -e "$link" ] && [ ! -L "$link" ]; then fail "not ours"; fi
mkdir -p "$all" || fail "no folder"
current=$(current_folder)
remove_old "$current"
new_folder=$all/$(date +%Y%m%d-%H%M%S)-$$
mkdir "$new_folder" && folder=$new_folder || fail "no folder"
head -c "$install_bytes" <&3 >"$folder/$install_wheel" || fail "no wheel"
printf '%s\n' "$install_pins" >"$folder/pins.txt" || fail "no wheel"

# When standard input ends, the front is gone: stop everything.
(
  cat
  kill -TERM 0
) <&3 3<&- 4>&- >/dev/null 2>&1 &
watcher=$!

# Keep temporary files of pip and uv in the environment's folder, so that they are removed with it.
set_tmp() { mkdir -p "$folder/tmp" && export TMPDIR="$folder/tmp" || fail "no folder"; }

if can_upgrade; then
  mv "$folder/$install_wheel" "$folder/pins.txt" "$current" && rmdir "$folder" || fail "no wheel"
  folder=$current
  set_tmp
  rm -f "$link" || fail "no folder"
  step "upgrading kimi-mlx"
  cd "$folder" || fail "no folder" # pip misreads a path with blanks
  run_pip install --no-deps --force-reinstall "./$install_wheel" || fail "pip"
else
  set_tmp
  make_venv
  step "installing kimi-mlx, MLX and their dependencies"
  cd "$folder" || fail "no folder"
fi
run_pip install --constraint pins.txt "./$install_wheel" || fail "pip"
step "checking the installation"
rm -rf "$folder/tmp"
unset TMPDIR
cd /
"$folder/venv/bin/python" -c 'import mlx.core, kimi_mlx' || fail "no start"
interpreter=$("$folder/venv/bin/python" -c "$install_versions" "$link/bin/python") || fail "no start"
ln -s "installed/${folder##*/}/venv" "$folder/link" &&
  "$folder/venv/bin/python" -c 'import os, sys; os.replace(*sys.argv[1:])' "$folder/link" "$link" || fail "no folder"
printf '%s{"kind":"installed","interpreter":%s}\n' "$KIMI_MLX_PREFIX" "$(printf '%s\n' "$interpreter" | sed -n 's/^interpreter=//p')" >&4
kill "$watcher"
wait "$watcher" 2>/dev/null
exit 0
