# shellcheck shell=bash disable=SC2154,SC2034  # variables of the script that sources this one, and for it
# Sourced by scripts that run published clients against a server with the quickstart's model, from the project's root.
# They set: python (an interpreter with this project), folder (for the clients' environments).

environment() { # NAME PACKAGE: an environment with that package alone in $folder/NAME; what is there of it is used
  [[ -e $folder/$1/done && $(< "$folder/$1/done") == "$2" ]] && return
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install -q "$2"
  echo "$2" > "$folder/$1/done"
}

start_server() { # LOG: sets url; the server ends with the script
  : > "$1"
  "$python" tools/run_text_generation_server.py --load examples/quickstart/model --dtype float32 --port 0 \
    --served-model-name quickstart \
    2>> "$1" &
  server=$!
  trap 'kill $server 2> /dev/null || true' EXIT
  until grep -q ' ready: ' "$1"; do
    kill -0 $server || { cat "$1"; exit 1; }
    sleep 0.5
  done
  url=$(grep -o 'http://127.0.0.1:[0-9]*' "$1" | head -1)
}
