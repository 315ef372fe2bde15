"""Greedy text of 20 chat prompts from this package and from transformers + torch, on one Hugging Face folder.

usage: python scripts/compare_transformers.py MODEL_DIR [NEW_TOKENS]
(needs torch; exit status 1 where a text differs)
"""

import sys

import jax
import torch
import transformers

from cz_jax.build.models import load_model
from cz_jax.parallel import make_mesh
from cz_jax.ports import SamplingMethod
from cz_jax.roles.prompts import solver_messages
from cz_jax.tasks import load_tasks

PROMPTS = 12  # of the built-in tasks; the others are plain questions
QUESTIONS = (
    "What is a list comprehension?", "Reverse a string in Python.", "Write a haiku about recursion.", "Count to ten.",
    "Explain binary search in two sentences.", "What does `yield` do?", "Sum the digits of 1234.", "Say hello.",
)  # fmt: skip


def main(folder: str, new_tokens: int = 64) -> int:
    model = load_model(folder, None, "float32", make_mesh(1, 1, 1, jax.devices()[:1]))
    engine = model.engine(make_mesh(1, 1, 1, jax.devices()[:1]), "float32", 20)
    chats = [solver_messages(task) for task in load_tasks("builtin@train").tasks[:PROMPTS]]
    chats += [[{"role": "user", "content": q}] for q in QUESTIONS]
    prompts = [engine.encode_chat(chat) for chat in chats]
    ours = [row[0] for row in engine.sample(prompts, [[0]] * len(prompts), new_tokens, SamplingMethod(temperature=0.0))]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    different = 0
    for chat, prompt, mine in zip(chats, prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, temperature=None,
            top_p=None, top_k=None, repetition_penalty=1.0, eos_token_id=list(model.tokenizer.eos_ids),
        )[0, len(prompt) :].tolist()  # fmt: skip
        same = out == list(mine.tokens)
        different += not same
        print("same" if same else "DIFFERENT", len(out), repr(chat[-1]["content"][:60]), flush=True)
    print(f"{len(prompts) - different} of {len(prompts)} greedy texts equal transformers'")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:3])))
