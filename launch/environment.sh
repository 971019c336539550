# shellcheck shell=bash
# Makes the environment that famjax runs in. Sourced from the repository root by scripts that have
# `set -euo pipefail`: launch/quickstart.sh, tests/run.sh.
#
#   source launch/environment.sh
#   famjax_environment base     # what training needs
#   famjax_environment test     # and extras of setup.py: test, hf, tpu, cuda, or several: test,hf
#
# PYTHON: interpreter to use (default: the one that the environment has, else python3).
# VENV:   folder of the environment (default: .venv).
#
# Once installed, nothing is fetched again until setup.py, this file, the interpreter or the
# checkout's folder changes.

say() { printf '[famjax %4ds] %s\n' "$SECONDS" "$*"; }

fail() {
  printf 'famjax: error: %s\n' "$*" >&2
  exit 2
}

# An interpreter's version and installation, "3.11.7 /usr"; nothing if it fails or lacks module $2.
famjax_interpreter() {
  "$1" -c "import os, sys, ${2:-os}
print('%d.%d.%d' % sys.version_info[:3], os.path.realpath(sys.base_prefix))" 2>/dev/null || true
}

# Runs pip, keeps all it says in a log, and shows the large downloads and the errors. Python compiles
# a module when it is first imported; to compile all of them here is over a third of pip's work.
famjax_pip() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --prefer-binary --no-compile "$@" \
    2>&1 |
    tee -a "$log" |
    awk '/^ERROR/ || /^Installing collected/ || /\([0-9][0-9]+\.[0-9]+ MB\)/ {
      print "    " substr($0, 1, 96); fflush() }'
}

famjax_environment() {
  local extras="${1:-}" venv="${VENV:-.venv}" python="${PYTHON:-python3}"
  local have want hash stamp log recorded="" installed="" wanted name pair

  have="$(famjax_interpreter "$venv/bin/python" pip)"
  if [[ -n "$have" && -z "${PYTHON:-}" ]]; then
    python="$venv/bin/python"
  fi
  want="$(famjax_interpreter "$python")"
  case "$want" in
    3.11.* | 3.12.*) ;;
    "") fail "$python does not run; install Python 3.11 or 3.12 and name it: PYTHON=python3.12" ;;
    *) fail "$python is Python ${want%% *}, famjax needs 3.11 or 3.12: try PYTHON=python3.12" ;;
  esac

  if [[ "$have" != "$want" ]]; then
    if [[ -e "$venv" && ! -e "$venv/pyvenv.cfg" ]]; then
      fail "$venv is not a Python environment; move it away or choose another folder: VENV=folder"
    fi
    say "making $venv with Python ${want%% *}"
    "$python" -m venv --clear "$venv" ||
      fail "$python cannot make an environment; install its venv module (Debian: python3-venv)"
  fi
  venv="$(cd -- "$venv" && pwd)"
  stamp="$venv/famjax-installed"
  log="$venv/famjax-install.log"

  # The stamp: a hash of all that decides what gets installed, and what was installed ("base,test").
  hash="$({ cat setup.py launch/environment.sh && printf '%s\n' "$want" "$PWD"; } |
    "$venv/bin/python" -c 'import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
  if [[ -r "$stamp" ]]; then
    read -r recorded installed <"$stamp" || true
  fi
  [[ "$recorded" == "$hash" ]] || installed=""
  wanted="${installed:-base}"
  for name in ${extras//,/ }; do
    [[ ",$wanted," == *",$name,"* ]] || wanted+=",$name"
  done

  if [[ "$wanted" == "$installed" ]]; then
    say "environment ready: $venv (Python ${want%% *})"
  else
    rm -f "$stamp" "$log"
    extras="${wanted#base}"
    extras="${extras:+[${extras#,}]}"
    say "installing famjax$extras (up to three minutes and 4 GB); pip writes to $log"
    famjax_pip --editable ".$extras" || fail "the installation stopped; the end of $log says why"
    # t5 brings seqio-nightly and tfds-nightly, which own the same files as seqio and
    # tensorflow-datasets: the pair that is written last wins. The nightly pair stays on pip's
    # books, so that no later install brings it again.
    pair="$("$venv/bin/python" -c 'from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in ("seqio", "tensorflow-datasets")))')"
    say "writing $pair once more, over the nightly files that t5 brings"
    # shellcheck disable=SC2086  # two words
    famjax_pip --force-reinstall --no-deps $pair ||
      fail "the installation stopped; the end of $log says why"
    printf '%s %s\n' "$hash" "$wanted" >"$stamp"
    say "installed"
  fi
  export PATH="$venv/bin:$PATH"
  # A step's temporaries come in huge pages: on a CPU it takes up to a third less (docs/results/cpu.md).
  [[ "${GLIBC_TUNABLES:-}" == *malloc.hugetlb=* ]] ||
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1"
}
