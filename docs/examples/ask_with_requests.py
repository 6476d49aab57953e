"""Ask a served model with plain `requests`: one answer, then one that streams.

forge serve yoda --detach
python docs/examples/ask_with_requests.py http://127.0.0.1:8080 "There is bacon in this sandwich."
"""

import json
import os
import sys

import requests

url, question = sys.argv[1], sys.argv[2]
headers = {"Authorization": f"Bearer {os.environ['API_KEY']}"} if "API_KEY" in os.environ else {}
body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 256}

answer = requests.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=600)
if not answer.ok:
    sys.exit(f"{answer.status_code}: {answer.json()['error']['message']}")
print(answer.json()["choices"][0]["message"]["content"])

with requests.post(
    f"{url}/v1/chat/completions", json={**body, "stream": True}, headers=headers, timeout=600, stream=True
) as streamed:
    streamed.raise_for_status()
    # Not iter_lines' default: it would split at more than line feeds.
    for line in streamed.iter_lines(delimiter=b"\n"):
        data = line.removeprefix(b"data: ")
        if line.startswith(b"data: ") and data.strip() != b"[DONE]":
            for choice in json.loads(data)["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
print()
