# What the doctor wants to know of a host, in one trip. POSIX sh: macOS and Linux, no Python needed.
# Prints lines of KEY=VALUE; a key that comes again adds a line to its value. See facts.py, which sets before:
#   facts_pythons   interpreters to look at first, one a line        facts_search   1: look for others too
#   facts_versions  versions.py                                      facts_linux_hints   a script of interfaces.py
export LC_ALL=C
PATH=$PATH:/usr/bin:/bin:/usr/sbin:/sbin
system=$(uname -s)

# limit SECONDS COMMAND...: runs it without input and without error output, and kills it when its time is over.
limit() {
  limit_s=$1
  shift
  "$@" </dev/null 2>/dev/null &
  limit_child=$!
  (
    trap 'kill "$nap"; exit 0' TERM
    sleep "$limit_s" &
    nap=$!
    wait "$nap"
    kill -KILL "$limit_child"
  ) >/dev/null 2>&1 &
  limit_watch=$!
  wait "$limit_child" 2>/dev/null
  limit_code=$?
  kill "$limit_watch" 2>/dev/null
  wait "$limit_watch" 2>/dev/null
  return "$limit_code"
}
has() { command -v "$1" >/dev/null 2>&1; }
say() { printf '%s=%s\n' "$1" "$(printf '%s' "$2" | tr '\n' ' ')"; } # KEY VALUE
lines() { sed "s/^/$1=/"; }                                          # KEY: input becomes values of it

now() {
  time=$(date +%s.%N)
  case $time in
    *[!0-9.]*) # no %N here
      time=$(limit 5 perl -MTime::HiRes=time -e 'printf "%.6f", time')
      [ -n "$time" ] || time=$(date +%s)
      ;;
  esac
  say "$1" "$time"
}

machine() {
  say hostname "$(uname -n)"
  say system "$system"
  say release "$(uname -r)"
  say machine "$(uname -m)"
  if [ "$system" = Darwin ]; then
    say macos_version "$(limit 5 sw_vers -productVersion)"
    say macos_build "$(limit 5 sw_vers -buildVersion)"
    say chip "$(limit 5 sysctl -n machdep.cpu.brand_string)"
    say memory_bytes "$(limit 5 sysctl -n hw.memsize)"
    say wired_limit_mb "$(limit 5 sysctl -n iogpu.wired_limit_mb)"
    limit 5 vm_stat | lines vm_stat
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
  say home "$HOME"
  say data_folder "$data"
  say stores_folder "$stores"
  place=$stores # or what of the way to it is there
  while [ -n "$place" ] && ! [ -d "$place" ]; do place=${place%/*}; done
  limit 5 df -Pk "${place:-/}" | sed -n '$p' | lines disk
}

# A line for each complete store, the newest first: its place, repository, commit (both as in JSON), kilobytes; tabs between them.
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

# PATH: looks at an interpreter, if it is one and has not been looked at.
look_at() {
  [ -n "$1" ] && [ -x "$1" ] && [ ! -d "$1" ] || return 0
  case $looked in *"<$1>"*) return 0 ;; esac
  looked="$looked<$1>"
  if [ "$system" = Darwin ] && [ "$1" = /usr/bin/python3 ]; then
    limit 5 xcode-select -p >/dev/null || return 0 # a stub, which would open a window
  fi
  limit 20 "$1" -c "$facts_versions" "$1" || say broken_interpreter "$1"
}
pythons() {
  looked=
  while IFS= read -r python; do look_at "$python"; done <<END
$facts_pythons
END
  [ "$facts_search" = 1 ] || return 0
  look_at "$data/venv/bin/python"
  look_at "$(command -v python3)"
  for uv in "$(command -v uv)" "$HOME/.local/bin/uv" /opt/homebrew/bin/uv /usr/local/bin/uv; do
    if [ -x "$uv" ] && [ ! -d "$uv" ]; then
      say uv "$uv"
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
    limit 5 sh -c "$facts_linux_hints" | lines linux_hints
  fi
}

printf '\nkimi_mlx_facts=1\n' # what a login shell may have printed comes before
now clock
machine
folders
stores
pythons
network
now clock_end
echo complete=1
