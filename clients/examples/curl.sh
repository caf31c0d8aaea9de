#!/usr/bin/env bash
# The whole life of a fine-tuned model with curl alone: bash clients/examples/curl.sh [BASE_URL]
set -euo pipefail
base_url=${1:-${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}}
here=$(cd "$(dirname "$0")" && pwd)

# The value of a string field of the JSON object on standard input; nothing when it is null or absent.
field() { python3 -c 'import json, sys; print(json.load(sys.stdin).get(sys.argv[1]) or "")' "$1"; }
call() { curl --silent --show-error --fail-with-body "$@"; }
ask() {
  call "$base_url/chat/completions" -H 'content-type: application/json' \
    -d "{\"model\": \"$1\", \"messages\": [{\"role\": \"user\", \"content\": \"switch on the lamp in the attic\"}], \"max_tokens\": 40}"
  echo
}

call "$base_url/models"; echo
ask tunegate-demo
file=$(call "$base_url/files" -F purpose=fine-tune -F "file=@$here/lamps.jsonl" | field id)
job=$(call "$base_url/fine_tuning/jobs" -H 'content-type: application/json' \
  -d "{\"model\": \"tunegate-demo\", \"training_file\": \"$file\", \"suffix\": \"curl\"}" | field id)
echo "job $job"
status=queued
while [[ $status != succeeded && $status != failed && $status != cancelled ]]; do
  sleep 1
  status=$(call "$base_url/fine_tuning/jobs/$job" | field status)
done
call "$base_url/fine_tuning/jobs/$job/events?limit=5"; echo
[[ $status == succeeded ]] || { echo "the job $status"; exit 1; }
tuned=$(call "$base_url/fine_tuning/jobs/$job" | field fine_tuned_model)
ask "$tuned"
call -X DELETE "$base_url/models/$tuned"; echo
