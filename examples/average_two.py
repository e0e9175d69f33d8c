"""The main job on two tiny reward models that are built here: inspect, average, load. Takes seconds, downloads nothing.

python examples/average_two.py [FOLDER]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification


def build_members(folder: Path) -> None:
    """Two members as a sweep would leave them: one start, two directions, another shard layout each."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    start = LlamaForSequenceClassification(config).to(torch.bfloat16)
    start.save_pretrained(folder / "start")
    for number, shard_size in ((1, "5GB"), (2, "50KB")):
        member = LlamaForSequenceClassification(config).to(torch.bfloat16)
        member.load_state_dict(start.state_dict())
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.add_(0.002 * torch.randn_like(parameter))
        member.save_pretrained(folder / f"member-{number}", max_shard_size=shard_size)


def warmerge(*arguments: object) -> None:
    """Runs the command as a user would, and shows it."""
    print(f"$ warmerge {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([sys.executable, "-m", "warmerge", *map(str, arguments)], check=True)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tiny-example")
    shutil.rmtree(folder, ignore_errors=True)
    build_members(folder)
    members = [folder / "member-1", folder / "member-2"]
    warmerge("inspect", *members, "--distances", "--base", folder / "start")
    warmerge("average", *members, "-o", folder / "average")
    model, report = AutoModelForSequenceClassification.from_pretrained(folder / "average", output_loading_info=True)
    assert not any(report.values()), report
    reward = model.eval()(torch.tensor([[5, 6, 7]])).logits[0, 0].item()
    print(f"{folder / 'average'} loads with no missing and no unexpected tensor; its reward for a text is {reward:.4f}")


if __name__ == "__main__":
    main()
