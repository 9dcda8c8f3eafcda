#!/usr/bin/env bash
# Builds the container image and uses it as deploy/ does: non-root, on a read-only file system, without
# capabilities. Asks it over HTTP, gives it a batch, stops it while it answers, and runs a file of a mounted folder.
#
#   tools/container_test.sh [BASE]
#
# BASE is an image with Python 3.11 or newer; without it, one is made from Debian packages. Needs buildah,
# podman and runc, for the latter mmdebstrap, and root. WORK keeps images and layers for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."

WORK=${WORK:-build/container}
PORT=${PORT:-8765}
mkdir -p "$WORK"
WORK=$(realpath "$WORK")
STORAGE=(--root "$WORK/storage" --runroot "$WORK/run" --storage-driver "${STORAGE_DRIVER:-overlay}")
CONTAINER=smol-test-$$

podman() { command podman "${STORAGE[@]}" --runtime runc "$@"; }
fail() { echo "FAILED: $*" >&2; podman logs "$CONTAINER" >&2 || true; exit 1; }
cleanup() {
    podman rm -f -t 0 "$CONTAINER" >/dev/null 2>&1 || true
    podman volume rm -f "$CONTAINER" >/dev/null 2>&1 || true
}
trap cleanup EXIT

base=${1:-localhost/smol-base}
if [[ -z ${1:-} ]] && ! podman image exists "$base"; then
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
        bookworm "$WORK/base.tar"
    podman import "$WORK/base.tar" "$base" >/dev/null
fi

# pip in the build trusts the certificates of this machine, which may go through a proxy.
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' > "$WORK/pip.conf"
buildah "${STORAGE[@]}" build --format docker --isolation chroot --network host --layers \
    --volume /etc/ssl/certs:/etc/ssl/certs:ro --volume "$WORK/pip.conf:/etc/pip.conf:ro" \
    --build-arg BASE="$base" --tag localhost/smol .

# The limits of this shell, because a container must not have higher ones.
podman run --detach --name "$CONTAINER" --network host --env SMOL_PORT="$PORT" \
    --volume "$CONTAINER:/var/lib/smol/batches" \
    --read-only --cap-drop all --security-opt no-new-privileges \
    --ulimit "nofile=$(ulimit -Hn):$(ulimit -Hn)" --ulimit nproc=4096:4096 \
    localhost/smol >/dev/null

python3 - "$PORT" <<'PYTHON' || fail "no answer"
import json, sys, time, urllib.error, urllib.request

url = f"http://127.0.0.1:{sys.argv[1]}"
for _ in range(240):
    try:
        urllib.request.urlopen(f"{url}/ready", timeout=5).read()
        break
    except OSError:
        time.sleep(0.5)
query = {"chat_id": "1", "user_prompt": "What is the capital of France?"}
request = urllib.request.Request(
    f"{url}/chat", json.dumps(query).encode(), {"Content-Type": "application/json"}
)
answer = json.load(urllib.request.urlopen(request, timeout=120))
print(answer["response"])
assert "Paris" in answer["response"], answer

line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
line["body"] = {"model": answer.get("model", "HuggingFaceTB/SmolLM2-135M-Instruct"), "max_tokens": 16}
line["body"]["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
parts = [
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n',
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n',
    json.dumps(line).encode(),
    b"\n\r\n--x--\r\n",
]


def call(path, data=None, content_type="application/json"):
    headers = {"Content-Type": content_type}
    request = urllib.request.Request(f"{url}/v1{path}", data, headers)
    return urllib.request.urlopen(request, timeout=120).read()


uploaded = json.loads(call("/files", b"".join(parts), "multipart/form-data; boundary=x"))
batch = {"input_file_id": uploaded["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
batch = json.loads(call("/batches", json.dumps(batch).encode()))
for _ in range(240):
    batch = json.loads(call(f"/batches/{batch['id']}"))
    if batch["status"] not in ("validating", "in_progress", "finalizing"):
        break
    time.sleep(0.5)
assert batch["status"] == "completed" and batch["request_counts"]["completed"] == 1, batch
result = json.loads(call(f"/files/{batch['output_file_id']}/content"))
content = result["response"]["body"]["choices"][0]["message"]["content"]
print("batch:", content)
assert "Paris" in content, result
PYTHON

podman healthcheck run "$CONTAINER" || fail "unhealthy"
[[ $(podman exec "$CONTAINER" id -u) == 10001 ]] || fail "runs as root"
podman exec "$CONTAINER" sh -c 'touch /opt/smol/x 2>/dev/null' && fail "the root file system is writable"
podman exec "$CONTAINER" smol doctor || fail "smol doctor"
podman logs "$CONTAINER" 2>&1 | grep -q "packing in memory" && fail "the packed weights of the image are not used"

# A request that is running when SIGTERM arrives gets its answer.
curl -s "http://127.0.0.1:$PORT/chat" -H 'Content-Type: application/json' -o "$WORK/last.json" \
    -d '{"chat_id":"2","user_prompt":"Tell me a long story.","max_new_tokens":300}' &
request=$!
for _ in $(seq 100); do
    curl -s "http://127.0.0.1:$PORT/metrics" | grep -q '^smol_requests_running 1' && break
    sleep 0.1
done
podman stop --time 40 "$CONTAINER" >/dev/null
wait "$request"
grep -q '"finish_reason"' "$WORK/last.json" || fail "the running request was lost: $(cat "$WORK/last.json")"
code=$(podman inspect --format '{{.State.ExitCode}}' "$CONTAINER")
[[ $code == 0 ]] || fail "exit code $code after SIGTERM"

# A file of a mounted folder, which belongs to a user that the image does not know.
rm -rf "$WORK/data"
mkdir "$WORK/data"
head -3 sample_inputs/queries.jsonl > "$WORK/data/queries.jsonl"
chown -R 12345 "$WORK/data"
podman run --rm --network none --read-only --cap-drop all --security-opt no-new-privileges \
    --ulimit "nofile=$(ulimit -Hn):$(ulimit -Hn)" --ulimit nproc=4096:4096 \
    --volume "$WORK/data:/data" --user 12345 localhost/smol run --quiet /data/queries.jsonl || fail "smol run"
[[ $(grep -c '"response"' "$WORK/data/queries.results.jsonl") == 3 ]] || fail "smol run lost answers"
podman images localhost/smol
echo "1 passed, 0 failed"
