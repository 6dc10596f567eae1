"""The Python API without a server: python examples/offline.py"""

from tokenloom import LLM, SamplingParams

llm = LLM("smollm2-135m-instruct")

# Many prompts run together in one continuous batch.
prompts = ["The capital of France is", "def fibonacci(n):\n", "Water boils at"]
for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24)):
    print(repr(output.text))

# A seed makes an answer a function of the request; n answers share the prompt's keys and values.
conversation = [{"role": "user", "content": "Name a colour."}]
[answer] = llm.chat(conversation, SamplingParams(temperature=0.8, top_p=0.9, seed=7, n=3, max_tokens=20))
for choice in answer.completions:
    print(choice.index, choice.finish_reason, repr(choice.text))

# How likely does the model find a text?
for text in ("The sky is blue.", "The sky is loud."):
    print(f"{llm.score(text)[0].total:.2f}", text)
