#!/usr/bin/env bash
# curl: chat, a stream, a response, a file, and an error as OpenAI has it.
set -euo pipefail
post() { curl -sSf -H 'content-type: application/json' "$OPENAI_BASE_URL/$1" -d "$2"; }
messages='[{"role": "user", "content": "Repeat after me: hello."}]'
post chat/completions "{\"model\": \"$MODEL\", \"messages\": $messages, \"max_tokens\": 5}" | grep >/dev/null '"object":"chat.completion"'
post chat/completions "{\"model\": \"$MODEL\", \"messages\": $messages, \"max_tokens\": 5, \"stream\": true}" | tail -2 | grep >/dev/null '^data: \[DONE\]$'
post responses "{\"model\": \"$MODEL\", \"input\": \"hello\", \"max_output_tokens\": 5, \"stream\": true}" | grep >/dev/null '^event: response.incomplete$'
printf 'some bytes' | curl -sSf "$OPENAI_BASE_URL/files" -F purpose=user_data -F 'file=@-;filename=few.txt' | grep >/dev/null '"object":"file"'
curl -sS "$OPENAI_BASE_URL/nowhere" | grep >/dev/null '"code":"unknown_url"'
