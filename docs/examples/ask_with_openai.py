"""Ask a served model with the `openai` package: one answer, one that streams, one that is JSON.

forge serve yoda --detach
python docs/examples/ask_with_openai.py http://127.0.0.1:8080 "There is bacon in this sandwich."
"""

import os
import sys

from openai import OpenAI

url, question = sys.argv[1], sys.argv[2]
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("API_KEY", "none"))
model = client.models.list().data[0].id
messages = [{"role": "user", "content": question}]

answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=256)
print(answer.choices[0].message.content)

for event in client.chat.completions.create(
    model=model, messages=messages, temperature=0, max_tokens=256, stream=True
):
    for choice in event.choices:
        print(choice.delta.content or "", end="", flush=True)
print()

schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
answer = client.chat.completions.create(
    model=model, messages=messages, temperature=0, max_tokens=64, response_format=form
)
print(answer.choices[0].message.content)
