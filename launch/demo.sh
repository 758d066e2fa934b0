#!/usr/bin/env bash
# The whole way on a CPU, minutes (sdxl: an hour), nothing to download:  bash launch/demo.sh [sd3|sdxl] [OUT]
#
# Takes a shipped teacher (default: the SD3-shaped one), trains a 4-step generator (cold start, then distribution
# matching and rewards together), samples, evaluates on prompts not trained on, exports to diffusers format and
# writes OUT/report.html (default OUT: runs/demo, runs/demo_sdxl). Stop it whenever you like; the same command goes on.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
world=sd3
case "${1:-}" in
  sd3 | sdxl) world="$1" && shift ;;
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' launch/demo.sh && exit ;;
esac
default=runs/demo
[ "$world" = sd3 ] || default="runs/demo_$world"
OUT="${1:-$default}"
install requirements.txt
python="$VENV/bin/python"
config="configs/shapes/$world.py"

step() { printf '\n== %s\n' "$*"; }

step "1/5 distil: the teacher becomes a 4-step generator"
"$python" -m dmdr_jax.train --config="$config" --workdir="$OUT/run"

step "2/5 sample: the student draws eight prompts"
"$python" -m dmdr_jax.sample --model "$OUT/run" --prompts launch/demo_prompts.txt --out "$OUT/samples"

step "3/5 evaluate: teacher and student on prompts neither was trained on, from the same noise"
"$python" -m dmdr_jax.evaluate --world small --per_tag 40 --out "$OUT/evaluation" \
  --model "teacher=shapes:$world,steps=25,guidance=3" \
  --model "teacher-4=shapes:$world,steps=4,guidance=3" \
  --model "DMDR=$OUT/run" \
  --baseline teacher-4

step "4/5 export: a diffusers folder"
"$python" -m dmdr_jax.export --checkpoint "$OUT/run" --out "$OUT/student" --overwrite

step "5/5 report"
"$python" -m dmdr_jax.report "$OUT/run" --evaluation "$OUT/evaluation" --out "$OUT/report.html"
echo
echo "Open $OUT/report.html"
