"""Stream a chat from a running server (`make serve`): python examples/openai_client.py"""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
stream = client.chat.completions.create(
    model="smollm2-135m-instruct",
    messages=[{"role": "user", "content": "Tell me about the sea in two sentences."}],
    max_tokens=80,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"min_p": 0.05},  # fields beyond OpenAI's own
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    else:
        print(f"\n{chunk.usage.completion_tokens} tokens")
