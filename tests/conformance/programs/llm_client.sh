#!/usr/bin/env bash
# llm, the command: a prompt answered, whole and streamed.
set -euo pipefail
export LLM_USER_PATH; LLM_USER_PATH=$(mktemp -d)
trap 'rm -rf "$LLM_USER_PATH"' EXIT
whole=$(llm -m gpt-4o-mini --no-stream -o temperature 0 -o max_tokens 40 "Repeat after me: hello.")
streamed=$(llm -m gpt-4o-mini -o temperature 0 -o max_tokens 40 "Repeat after me: hello.")
test -n "$whole"
test "$whole" = "$streamed"
