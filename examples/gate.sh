#!/usr/bin/env bash
# A quality gate for CI: distil, and let the job fail when the student keeps too little of its teacher.
#
#   examples/gate.sh OUTPUT
#
# STEPS (default 60), KEEP (share of the teacher's token accuracy, default 0.70) and TEST_ROWS (default: all) tune it.
# About half a minute on two CPU cores.
set -euo pipefail

output=${1:?usage: gate.sh OUTPUT}
mkdir -p "$output"
code=0
kdtool distill package:kdtool/quickstart/stories260k --student layers:3 --data tinystories --method kd \
  --set method.temperature=1 --set method.ce_weight=0.5 --set method.kd_weight=0.5 \
  --set data.max_length=128 ${TEST_ROWS:+--set data.test_limit="$TEST_ROWS"} \
  --max-steps "${STEPS:-60}" --batch-size 16 --lr 2e-3 --set eval.latency=false \
  --fail-under "token-accuracy.retention=${KEEP:-0.70}" --json -o "$output/student" > "$output/result.json" || code=$?

case $code in
  0) echo "passed: $output/student" ;;
  3) echo "the student keeps too little of its teacher; it is in $output/student, see report.md there" ;;
  *) echo "the run failed with exit code $code" ;;
esac
exit "$code"
