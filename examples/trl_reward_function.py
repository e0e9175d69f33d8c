"""WARM inside a TRL trainer of your own: GRPO on the average of several reward models. `pip install 'warmerge[train]'`.

    python examples/trl_reward_function.py --policy my-sft --rm runs/members/01 --rm runs/members/02 \\
        --prompts prompts.jsonl -o grpo

One --rm is used as it is; several are averaged first, after every check of `warmerge average`, into OUT/warm.
Prompts are rows with a column `prompt`. RLOOTrainer and RLOOConfig take the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL counts its runs on the Hub otherwise

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import warmerge

parser = argparse.ArgumentParser(description="GRPO with a WARM reward.")
parser.add_argument("--policy", required=True, help="causal language model to start from, after SFT")
parser.add_argument("--rm", required=True, action="append", help="reward model; give several to average them")
parser.add_argument("--prompts", required=True, type=Path, help="JSONL with a column prompt")
parser.add_argument("-o", "--out", required=True, type=Path, help="new folder for the average and the policy")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=32, help="answers in each step")
parser.add_argument("--answers", type=int, default=4, help="answers to each prompt")
parser.add_argument("--lr", type=float, default=1e-5)
parser.add_argument("--beta", type=float, default=0.05, help="weight of the KL divergence to the start")
parser.add_argument("--max-new-tokens", type=int, default=64)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

# The reward: one model, whose weights are the mean of the members'.
if len(args.rm) > 1:
    warmerge.average(args.rm, args.out / "warm")
reward = warmerge.reward_function(args.out / "warm" if len(args.rm) > 1 else args.rm[0])

# The policy reads prompts from the left; TRL pads with the end token where there is no padding token.
policy = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(args.policy, padding_side="left")
lines = args.prompts.read_text(encoding="utf-8").splitlines()
prompts = Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines])

config = GRPOConfig(
    output_dir=str(args.out / "working"), max_steps=args.steps, seed=args.seed, report_to="none",
    per_device_train_batch_size=args.batch, num_generations=args.answers, max_completion_length=args.max_new_tokens,
    learning_rate=args.lr, lr_scheduler_type="constant", beta=args.beta, temperature=0.9,
    bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    logging_steps=1, save_strategy="no", disable_dropout=True,
)  # fmt: skip
trainer = GRPOTrainer(
    model=policy, reward_funcs=[reward], args=config, train_dataset=prompts, processing_class=tokenizer
)
trainer.train()
trainer.save_model(str(args.out / "policy"))

# Watch the reward by something that it was not made from: `warmerge winrate`, or `warmerge rl --control`.
rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
print(f"reward: {rewards[0]:.3f} at step 1, {rewards[-1]:.3f} at step {len(rewards)}; {args.out / 'policy'}")
