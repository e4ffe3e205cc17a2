# Print facts about this host. POSIX sh for macOS and Linux; needs no Python.
# Each output line is KEY=VALUE; a repeated key adds a line to its value. facts.py sets these variables first:
#   facts_pythons               interpreters to check first, one per line
#   facts_search                1: look for other interpreters too
#   facts_versions              source of versions.py
#   facts_interface_properties  INTERFACE_PROPERTIES of facts.py
export LC_ALL=C
system=$(uname -s)

# limit SECONDS COMMAND...: run a command without input and without error output, and kill it after SECONDS.
limit() {
  limit_s=$1
  shift
  "$@" </dev/null 2>/dev/null &
  limit_child=$!
  ( # short sleeps, of which a killed one is soon over
    while [ "$limit_s" -gt 0 ]; do
      sleep 1
      limit_s=$((limit_s - 1))
    done
    kill -KILL "$limit_child"
  ) >/dev/null 2>&1 &
  limit_watch=$!
  wait "$limit_child" 2>/dev/null
  limit_code=$?
  kill -KILL "$limit_watch" 2>/dev/null # a start-up file may make all our processes ignore SIGTERM
  wait "$limit_watch" 2>/dev/null
  return "$limit_code"
}
has() { command -v "$1" >/dev/null 2>&1; }
put() { printf '%s=%s\n' "$1" "$(printf '%s' "$2" | tr '\n' ' ')"; } # KEY VALUE: print as one line
lines() { sed "s/^/$1=/"; }                                          # KEY: print each line of the input as KEY=line

now() {
  time=$(date +%s.%N)
  case $time in
    *[!0-9.]*) # `date` without %N
      time=$(limit 5 perl -MTime::HiRes=time -e 'printf "%.6f", time')
      [ -n "$time" ] || time=$(date +%s)
      ;;
  esac
  put "$1" "$time"
}

machine() {
  put hostname "$(uname -n)"
  put system "$system"
  put release "$(uname -r)"
  put machine "$(uname -m)"
  if [ "$system" = Darwin ]; then
    put macos_version "$(limit 5 sw_vers -productVersion)"
    put macos_build "$(limit 5 sw_vers -buildVersion)"
    put chip "$(limit 5 sysctl -n machdep.cpu.brand_string)"
    put memory_bytes "$(limit 5 sysctl -n hw.memsize)"
    put wired_limit_mb "$(limit 5 sysctl -n iogpu.wired_limit_mb)"
    limit 5 vm_stat | lines vm_stat
    limit 10 top -l 1 -stats pid,mem | lines top
  else
    sed -n 's/^model name[^:]*: */chip=/p' /proc/cpuinfo | sed -n 1p
    sed -n -e '/^MemTotal:/p' -e '/^MemAvailable:/p' /proc/meminfo | lines meminfo
  fi
}

folders() {
  case ${XDG_DATA_HOME-} in
    /*) data=$XDG_DATA_HOME/kimi-mlx ;;
    *)
      if [ "$system" = Darwin ]; then data="$HOME/Library/Application Support/kimi-mlx"; else data=$HOME/.local/share/kimi-mlx; fi
      ;;
  esac
  stores=${KIMI_MLX_STORES:-$data/stores}
  case $stores in
    '~') stores=$HOME ;;
    '~/'*) stores=$HOME/${stores#'~/'} ;;
  esac
  put home "$HOME"
  put data_folder "$data"
  put stores_folder "$stores"
  existing=$stores # or its nearest existing parent
  while [ -n "$existing" ] && ! [ -d "$existing" ]; do existing=${existing%/*}; done
  limit 5 df -Pk "${existing:-/}" | sed -n '$p' | lines disk
}

# Print a line for each complete store, newest first: folder, repository, commit (both as in JSON) and kilobytes, tab-separated.
stores() {
  ls -t "$stores"/*/*/*/rank-*/manifest.json 2>/dev/null | while IFS= read -r manifest; do
    [ -f "$manifest" ] || continue
    store=${manifest#"$stores"/}
    head=$(limit 5 dd if="$manifest" bs=4096 count=1)
    value() { printf '%s\n' "$head" | sed -n "s/^.*\"$1\": *\"\\([^\"]*\\)\".*\$/\\1/p" | sed -n 1p; }
    size=$(limit 5 du -sk "${manifest%/manifest.json}" | sed 's/[^0-9].*//')
    printf 'store=%s\t%s\t%s\t%s\n' "${store%/manifest.json}" "$(value repository)" "$(value commit)" "$size"
  done
}

# PATH: print the facts of an interpreter, unless it is missing or already checked.
check_python() {
  [ -n "$1" ] && [ -x "$1" ] && [ ! -d "$1" ] || return 0
  case $checked in *"<$1>"*) return 0 ;; esac
  checked="$checked<$1>"
  if [ "$system" = Darwin ] && [ "$1" = /usr/bin/python3 ]; then
    limit 5 xcode-select -p >/dev/null || return 0 # without the developer tools this is a stub that opens a window
  fi
  limit 20 "$1" -c "$facts_versions" "$1" || put broken_interpreter "$1"
}
pythons() {
  checked=
  IFS='
'
  set -f # not a here-document, for which some shells need a temporary file
  for python in $facts_pythons; do check_python "$python"; done
  set +f
  unset IFS
  [ "$facts_search" = 1 ] || return 0
  check_python "$data/venv/bin/python"
  check_python "$(command -v python3)"
  for uv in "$(command -v uv)" "$HOME/.local/bin/uv" /opt/homebrew/bin/uv /usr/local/bin/uv; do
    if [ -x "$uv" ] && [ ! -d "$uv" ]; then
      put uv "$uv"
      break
    fi
  done
}

network() {
  if [ "$system" = Darwin ]; then
    limit 5 ifconfig -a | lines ifconfig
    limit 10 networksetup -listallhardwareports | lines hardware_ports
    limit 15 system_profiler SPThunderboltDataType -json | lines thunderbolt
    limit 5 /usr/libexec/ApplicationFirewall/socketfilterfw --getglobalstate | lines firewall
    ! has rdma_ctl || limit 5 rdma_ctl status | lines rdma_ctl
    ! has ibv_devices || limit 5 ibv_devices | lines ibv_devices
    ! has ibv_devinfo || limit 5 ibv_devinfo | lines ibv_devinfo
  else
    limit 5 ip -j addr | lines ip_addr
    limit 5 sh -c "$facts_interface_properties" | lines interface_properties
  fi
}

now clock
machine
folders
stores
pythons
network
now clock_end
echo complete=1
