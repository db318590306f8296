#!/bin/bash
# Compares the gateway with nginx as a reverse proxy, in one run: both with one worker thread on
# one processor, both with kept connections, in turn in front of the same nginx that serves files
# from a network namespace of its own.
#
#   bench/gateway.sh [ROUNDS] [SECONDS]      prints a table, and JSON on the last line
#
# nginx and the gateway (`gateway`) reach the namespace over the same veth: their ratio is checked,
# and the script fails when it is below the floor. `inside` is the gateway as it runs in earnest:
# its sockets are made inside the namespace and handed over, which no nginx can do.
#
# Needs root, nginx, wrk, taskset, ip, jq, curl. Visitors come over loopback; leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in nginx wrk taskset ip jq curl python3; do
  command -v "$tool" > /dev/null || {
    echo "there is no $tool: apt-get install nginx wrk util-linux iproute2 jq curl python3" >&2
    exit 1
  }
done
[ "$(id -u)" = 0 ] || { echo "namespaces need root: run it with sudo" >&2; exit 1; }

rounds=${1:-5}
seconds=${2:-4}
connections=64
floor=0.7
cores=$(nproc)
# The proxy under test has a processor of its own; load and files share the others.
proxy_core=0
others=$([ "$cores" -gt 1 ] && echo "1-$((cores - 1))" || echo 0)
folder=$(mktemp -d)
pids=()
# One of 256 small networks, so that two runs beside each other hardly ever meet.
namespace=spore-bench-$$
link=sb$$
network=10.213.$(($$ % 256))

stop_all() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  # The veth goes with the namespace.
  ip netns delete "$namespace" 2>/dev/null || true
  rm -rf "$folder"
}
trap stop_all EXIT
trap 'exit 130' INT TERM

ip netns add "$namespace"
ip link add "$link" type veth peer name "${link}p" netns "$namespace"
ip address add "$network.1/30" dev "$link"
ip link set "$link" up
ip -n "$namespace" address add "$network.2/30" dev "${link}p"
ip -n "$namespace" link set "${link}p" up
ip -n "$namespace" link set lo up

free_port() {
  python3 -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
files=$network.2:8000
nginx_port=$(free_port)
gateway_port=$(free_port)
inside_port=$(free_port)

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
  server { listen $files; root $folder/www; } }
CONF
cat >"$folder/proxy.conf" <<CONF
pid $folder/proxy/pid; $common
http { $(paths "$folder/proxy") tcp_nodelay on; keepalive_requests 100000000;
  upstream app { server $files; keepalive 64; keepalive_requests 100000000; }
  server { listen 127.0.0.1:$nginx_port;
    proxy_buffers 32 8k; proxy_busy_buffers_size 128k;
    location / { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host \$host; proxy_set_header X-Forwarded-For \$remote_addr;
      proxy_set_header X-Request-Id \$request_id; } } }
CONF

cargo build --release --quiet -p spore-gateway --example fixed_upstream
binary=${CARGO_TARGET_DIR:-target}/release/examples/fixed_upstream

# setns and exec in one process: the pid that is killed is nginx's own.
taskset -c "$others" nsenter --net="/run/netns/$namespace" \
  nginx -p "$folder" -c "$folder/files.conf" & pids+=($!)
taskset -c "$proxy_core" nginx -p "$folder" -c "$folder/proxy.conf" & pids+=($!)
taskset -c "$proxy_core" "$binary" "127.0.0.1:$gateway_port" "$files" localhost & pids+=($!)
taskset -c "$proxy_core" "$binary" "127.0.0.1:$inside_port" "$files" localhost \
  "/run/netns/$namespace" & pids+=($!)
for url in "$files" "127.0.0.1:$nginx_port" "127.0.0.1:$gateway_port" "127.0.0.1:$inside_port"; do
  curl --silent --fail --retry 50 --retry-delay 1 --retry-all-errors --output /dev/null \
    --header 'Host: localhost' "http://$url/1k"
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
  measure "$inside_port" "$size" >/dev/null
  for ((round = 0; round < rounds; round++)); do
    echo "$size $(measure "$nginx_port" "$size") $(measure "$gateway_port" "$size")" \
      "$(measure "$inside_port" "$size")" >>"$folder/results"
  done
done

printf '%-6s %12s %12s %8s %12s\n' size nginx/s gateway/s ratio inside/s
# The middle of the rounds' ratios, so that one disturbed round does not count.
jq -R -s -c --argjson connections "$connections" --argjson floor "$floor" '
  def middle: sort | .[length / 2 | floor];
  [split("\n")[] | select(length > 0) | split(" ")
    | {size: .[0], nginx: (.[1] | tonumber), gateway: (.[2] | tonumber),
        inside: (.[3] | tonumber)}]
  | group_by(.size)
  | map({size: .[0].size, nginx_per_s: (map(.nginx) | middle),
      gateway_per_s: (map(.gateway) | middle), inside_per_s: (map(.inside) | middle),
      ratio: (map(.gateway / (if .nginx > 0 then .nginx else 1 end)) | middle
        | . * 1000 | round / 1000)})
  | {bench: "gateway", connections: $connections, floor: $floor, results: .}' \
  "$folder/results" >"$folder/json"
jq -r '.results[] | [.size, .nginx_per_s, .gateway_per_s, .ratio, .inside_per_s] | @tsv' "$folder/json" |
  while IFS=$'\t' read -r size nginx gateway ratio inside; do
    printf '%-6s %12.0f %12.0f %8.3f %12.0f\n' "$size" "$nginx" "$gateway" "$ratio" "$inside"
  done
cat "$folder/json"
# A side that gave no figure counts as below the floor too.
jq -e 'all(.results[]; .nginx_per_s > 0 and .ratio >= $floor)' --argjson floor "$floor" \
  "$folder/json" >"$folder/verdict" || {
  echo "the gateway is below $floor times nginx" >&2
  exit 1
}
