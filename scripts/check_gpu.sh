#!/usr/bin/env bash
# All that only a GPU can tell, in ten minutes at most: builds for the GPU of this machine, runs the GPU tests,
# compute-sanitizer on a short list of them, and the benchmark report. Every step leaves its log in one folder; a step
# that fails does not stop the next.
#
#   scripts/check_gpu.sh [FOLDER]             default: check-gpu
#   scripts/check_gpu.sh --rehearse [FOLDER]  the same without a GPU: the processor's kernels take their place, and the
#                                             report measures small sizes
#
# PYTHON is the Python to use, with a torch for this machine's CUDA (default: python3).
set -uo pipefail
rehearse=false
if [ "${1:-}" = --rehearse ]; then
  rehearse=true
  shift
fi
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-check-gpu}"
out=$(cd "${1:-check-gpu}" && pwd)
python=${PYTHON:-python3}
failed=0
: >"$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

whole=590 # seconds of everything; a build and tests that took long leave less to the report

# step NAME SECONDS COMMAND...: runs it within the time, and within what is left of the whole; its output to NAME.log
step() {
  local name=$1 limit=$2 started=$SECONDS status=0
  shift 2
  if [ $limit -gt $((whole - SECONDS)) ]; then limit=$((whole - SECONDS)); fi
  if [ $limit -le 0 ]; then
    failed=1
    say "$name: NOT RUN: no time left"
    return 1
  fi
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  local verdict=ok
  if [ $status -eq 124 ]; then verdict="FAILED: longer than $limit s"; elif [ $status -ne 0 ]; then verdict="FAILED: status $status"; fi
  [ $status -eq 0 ] || failed=1
  say "$name: $verdict ($((SECONDS - started)) s)"
  return $status
}

# A function is read whole before it runs: the file may change meanwhile.
main() {
  if $rehearse; then
    export PYREWRITE_CUDA=OFF
    tests='not cuda' select=(-k 'projection or second_moment or threads') device=cpu
    sizes=(--sizes bench/rehearsal.toml)
  else
    export PYREWRITE_CUDA=ON PYREWRITE_CUDA_ARCHITECTURES=native
    tests=cuda select=() device=cuda sizes=()
  fi

  # Tests and benchmarks run from copies, beside which no source folder hides the installed package.
  rm -rf "$out/work" "$out/venv"
  mkdir "$out/work"
  cp -r "$here/tests" "$here/bench" "$here/csrc" "$here/pyproject.toml" "$out/work/"
  "$python" -m venv "$out/venv"
  venv=$out/venv/bin
  # What PYTHON has installed, torch above all, is used as it is, with what its own .pth files add.
  "$python" -c 'import site; print(*(f"import site; site.addsitedir({x!r})" for x in [*site.getsitepackages(), site.getusersitepackages()]), sep="\n")' \
    >"$("$venv/python" -c 'import site; print(site.getsitepackages()[0])')/outer.pth"
  # Where PYTHON can build already, nothing is fetched: many machines with a GPU have no way to a package index.
  local isolation=()
  if "$venv/python" -c 'import cmake, ninja, pybind11, setuptools; assert pybind11.version_info[0] >= 3 and int(setuptools.__version__.split(".")[0]) >= 77' 2>/dev/null; then isolation=(--no-build-isolation); fi
  step build 300 "$venv/pip" install "${isolation[@]}" "$here" pytest pytest-benchmark matplotlib || exit 1
  cd "$out/work"
  step diagnosis 30 "$venv/python" -m pyrewrite
  cat "$out/diagnosis.log"
  step tests 140 "$venv/python" -m pytest -q -m "$tests" "${select[@]}" --junitxml="$out/tests.xml" tests/ops tests/statistics/test_collect.py
  tail -n 3 "$out/tests.log"
  step whole-job 60 "$venv/python" -m pytest -q tests/test_another_device.py
  tail -n 3 "$out/whole-job.log"

  # Short runs of every kernel: a sanitizer makes them tens of times slower.
  short='test_what_a_projection_does or test_list_in_one_call or test_adds_to_what_is_there or test_chunks_carry'
  short+=' or test_a_difference_of_zero or test_threads or test_it_takes_its_turn or test_it_can_be_captured'
  if command -v compute-sanitizer >/dev/null && ! $rehearse; then
    for tool in memcheck racecheck; do
      step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$venv/python" -m pytest -q -p no:cacheprovider -m cuda -k "$short" tests/ops
    done
  elif $rehearse; then
    step short-list 60 "$venv/python" -m pytest -q -m "$tests" -k "$short" tests/ops
    say "memcheck, racecheck: not run (rehearsal)"
  else
    say "memcheck, racecheck: NOT RUN: no compute-sanitizer on PATH"
    failed=1
  fi

  step report 300 "$venv/python" -m bench.report --device "$device" "${sizes[@]}" --out "$out/report"
  tail -n 2 "$out/report.log"
  rm -rf "$out/work" "$out/venv"
  say "results in $out ($SECONDS s in all)"
}

main; exit $failed  # on one line: bash reads on in the file when main returns
