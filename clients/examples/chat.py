"""Chat with a model on your own machine: the OpenAI SDK as it is, with another `base_url`."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
stream = client.chat.completions.create(
    model="tunegate-demo",
    messages=[{"role": "user", "content": "Repeat after me: hello."}],
    max_tokens=60,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
