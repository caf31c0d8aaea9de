"""LiteLLM as a client: chat whole and streamed, completions, embeddings. (Its `responses` needs more than it installs.)"""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # which it would download otherwise

import litellm

model = "openai/" + os.environ["MODEL"]
messages = [{"role": "user", "content": "Repeat after me: hello."}]
asked = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 40}
whole = litellm.completion(**asked).choices[0].message.content
chunks = litellm.completion(**asked, stream=True)
assert whole and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
assert (
    litellm.text_completion(model=f"text-completion-{model}", prompt="hello", max_tokens=5).choices[0].text is not None
)
made = litellm.embedding(model="openai/text-embedding-3-small", input=["one", "two"])
assert len(made.data) == 2
