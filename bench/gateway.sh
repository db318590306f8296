#!/bin/bash
# Compares the gateway with nginx as a reverse proxy, in one run: both with one worker thread on
# one processor, both with kept connections, in turn in front of the same nginx that serves files.
#
#   bench/gateway.sh [ROUNDS] [SECONDS]      prints a table, and JSON on the last line
#
# Needs nginx, wrk, taskset, jq, curl. Listens on loopback only, leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${1:-5}
seconds=${2:-4}
connections=64
cores=$(nproc)
# The proxy under test has a processor of its own; load and files share the others.
proxy_core=0
others=$([ "$cores" -gt 1 ] && echo "1-$((cores - 1))" || echo 0)
folder=$(mktemp -d)
pids=()

stop_all() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  rm -rf "$folder"
}
trap stop_all EXIT

free_port() {
  python3 -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
files_port=$(free_port)
nginx_port=$(free_port)
gateway_port=$(free_port)

mkdir -p "$folder/www" "$folder/files" "$folder/proxy"
# Readable by the worker, which nginx runs as another user when started by root.
chmod 755 "$folder" "$folder/www"
head -c 1024 /dev/zero | tr '\0' x >"$folder/www/1k"
head -c 65536 /dev/zero | tr '\0' x >"$folder/www/64k"

common="daemon off; worker_processes 1; error_log /dev/null crit;
events { worker_connections 4096; }"
paths() {
  echo "access_log off; client_body_temp_path $1/body; proxy_temp_path $1/proxy;
  fastcgi_temp_path $1/fastcgi; uwsgi_temp_path $1/uwsgi; scgi_temp_path $1/scgi;"
}
cat >"$folder/files.conf" <<CONF
pid $folder/files/pid; $common
http { $(paths "$folder/files") sendfile on; tcp_nodelay on; keepalive_requests 100000000;
  open_file_cache max=16;
  server { listen 127.0.0.1:$files_port; root $folder/www; } }
CONF
cat >"$folder/proxy.conf" <<CONF
pid $folder/proxy/pid; $common
http { $(paths "$folder/proxy") tcp_nodelay on; keepalive_requests 100000000;
  upstream app { server 127.0.0.1:$files_port; keepalive 64; keepalive_requests 100000000; }
  server { listen 127.0.0.1:$nginx_port;
    proxy_buffers 32 8k; proxy_busy_buffers_size 128k;
    location / { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host \$host; proxy_set_header X-Forwarded-For \$remote_addr;
      proxy_set_header X-Request-Id \$request_id; } } }
CONF

cargo build --release --quiet -p spore-gateway --example fixed_upstream
binary=${CARGO_TARGET_DIR:-target}/release/examples/fixed_upstream

taskset -c "$others" nginx -p "$folder" -c "$folder/files.conf" & pids+=($!)
taskset -c "$proxy_core" nginx -p "$folder" -c "$folder/proxy.conf" & pids+=($!)
taskset -c "$proxy_core" "$binary" "127.0.0.1:$gateway_port" "127.0.0.1:$files_port" localhost &
pids+=($!)
for port in "$files_port" "$nginx_port" "$gateway_port"; do
  curl --silent --fail --retry 50 --retry-delay 1 --retry-connrefused --output /dev/null \
    --header 'Host: localhost' "http://127.0.0.1:$port/1k"
done

# Requests per second of one run; a run with an answer other than 200 counts as none.
measure() {
  local output
  output=$(taskset -c "$others" wrk -t1 -c"$connections" -d"${seconds}s" \
    --header 'Host: localhost' "http://127.0.0.1:$1/$2")
  if grep -q -e 'Non-2xx' -e 'Socket errors' <<<"$output"; then
    echo "$output" >&2
    echo 0
  else
    awk '/Requests\/sec/ { print $2 }' <<<"$output"
  fi
}

: >"$folder/results"
for size in 1k 64k; do
  measure "$nginx_port" "$size" >/dev/null
  measure "$gateway_port" "$size" >/dev/null
  for ((round = 0; round < rounds; round++)); do
    echo "$size $(measure "$nginx_port" "$size") $(measure "$gateway_port" "$size")" \
      >>"$folder/results"
  done
done

printf '%-6s %12s %12s %8s\n' size nginx/s gateway/s ratio
# The middle of the rounds' ratios, so that one disturbed round does not count.
jq -R -s -c --argjson connections "$connections" '
  def middle: sort | .[length / 2 | floor];
  [split("\n")[] | select(length > 0) | split(" ")
    | {size: .[0], nginx: (.[1] | tonumber), gateway: (.[2] | tonumber)}]
  | group_by(.size)
  | map({size: .[0].size, nginx_per_s: (map(.nginx) | middle),
      gateway_per_s: (map(.gateway) | middle),
      ratio: (map(.gateway / (if .nginx > 0 then .nginx else 1 end)) | middle
        | . * 1000 | round / 1000)})
  | {bench: "gateway", connections: $connections, results: .}' \
  "$folder/results" >"$folder/json"
jq -r '.results[] | [.size, .nginx_per_s, .gateway_per_s, .ratio] | @tsv' "$folder/json" |
  while IFS=$'\t' read -r size nginx gateway ratio; do
    printf '%-6s %12.0f %12.0f %8.3f\n' "$size" "$nginx" "$gateway" "$ratio"
  done
cat "$folder/json"
