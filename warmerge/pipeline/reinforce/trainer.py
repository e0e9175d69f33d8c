"""TRL's RLOOTrainer with everything said that it would choose by itself: what it samples, from what, and how it learns.

What is left to it: generation, log-probabilities of policy and start, the leave-one-out baseline and the update,

    A_i = R_i - 1/(k-1) sum_{j != i} R_j,  R_i = r_i - kl_coef sum_t log(pi / pi_start),  loss = -mean_i A_i log pi.

Its learned value function is what is left out of the paper's REINFORCE: TRL has none that is maintained.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError, plain
from warmerge.pipeline.reinforce.reward import Rewards
from warmerge.pipeline.reinforce.settings import RlSettings
from warmerge.pipeline.sampling.policy import Drawn, OpenedPolicy, Questions
from warmerge.rewards.config import set_dropout
from warmerge.rewards.model import own_weights
from warmerge.training.language_model import load_language_model
from warmerge.training.trainable import lora_config
from warmerge.weights.stream import refuse_changed

# What is called or replaced of TRL's own methods: it may rename them, and a method that nobody calls replaces nothing.
_METHODS = (
    "_tokenize_prompts", "_get_train_sampler", "_generate_single_turn", "_get_per_token_logps_and_entropies",
    "_send_telemetry", "create_model_card",
)  # fmt: skip


def need_trl() -> None:
    """Refuses to begin without TRL, or with one whose methods are others than those that are used.

    Raises:
        UsageError: it is missing, or cannot be used.
    """
    try:
        from trl import RLOOTrainer
    except ImportError as error:
        raise UsageError(f"rl needs TRL ({error}): pip install 'warmerge[train]'") from error
    gone = [name for name in _METHODS if not hasattr(RLOOTrainer, name)]
    if gone:
        from trl import __version__

        raise UsageError(
            f"rl: TRL {__version__} has no {', '.join(gone)}; pip install 'warmerge[train]' takes one that does"
        )


def join_ranks(use_cpu: bool = False) -> int:
    """How many ranks there are. Where several were started each takes its GPU here, before a model is put on one."""
    from accelerate import PartialState

    # As TrainingArguments makes it: on a CPU it would else not join the other ranks.
    return int(PartialState(cpu=use_cpu or not torch.accelerator.is_available()).num_processes)


def order_of(prompts: int, settings: RlSettings) -> list[int]:
    """Which prompt comes when, (steps * prompts_per_step,): epochs in another order each; a step has a prompt once.

    >>> order_of(5, RlSettings(steps=3, batch=4, answers=2))
    [2, 4, 3, 0, 1, 4]
    """
    share = settings.prompts_per_step
    per_epoch, order = prompts // share * share, []
    for epoch in range(-(-settings.steps * share // per_epoch)):
        order += numpy.random.default_rng([settings.seed, epoch]).permutation(prompts)[:per_epoch].tolist()
    return order[: settings.steps * share]


def make_trainer(
    policy: OpenedPolicy, training: Questions, rewards: Rewards, working: Path, use_cpu: bool = False
) -> Any:
    """The trainer of a policy on `training`, in the order of `order_of`, with its checkpoints in `working`.

    Args:
        use_cpu: even where there is a GPU.

    Raises:
        UsageError: a batch that cannot be split as asked; vLLM that is not installed.
        RefusedError: as `load_language_model`; a policy whose ends or whose class TRL would not know.
        WarmergeError: TRL refuses the model.
    """
    from datasets import Dataset
    from safetensors import SafetensorError
    from transformers import PrinterCallback

    settings = rewards.settings
    config = copy.deepcopy(policy.config)
    if not (settings.lora or config.architectures):
        what = "names no architectures in its config.json, by which TRL loads the start to compare with; add them"
        raise RefusedError([Finding(f"--policy {plain(policy.source.label)}", what)])
    set_dropout(config, 0.0)  # also where the model applies it by itself, which TRL does not see
    module = load_language_model(policy.source, config, torch.float32, settings.trust_remote_code, "optimised")
    tokenizer = _prepared(policy, module)
    adapters = lora_config(module, settings.lora, "CAUSAL_LM") if settings.lora else None
    functions, weights = rewards.functions()
    arguments = _arguments(settings, weights, working, use_cpu or not torch.accelerator.is_available())
    data = Dataset.from_dict({"prompt": [str(number) for number in order_of(len(training.texts), settings)]})
    try:
        trainer = _class(settings, training.ids)(
            model=module, reward_funcs=functions, args=arguments, train_dataset=data, processing_class=tokenizer,
            peft_config=adapters,
        )  # fmt: skip
    except ImportError as error:
        raise UsageError(f"--generator {settings.generator} cannot be used here: {error}") from error
    except (ValueError, TypeError, AttributeError, NotImplementedError, SafetensorError) as error:
        refuse_changed([policy.source])  # which would be why
        raise WarmergeError(f"TRL cannot optimise this policy: {error}") from error
    if trainer.ref_model is not None:  # TRL has loaded it itself, from the folder
        own_weights(trainer.ref_model)
        refuse_changed([policy.source])
    trainer.remove_callback(PrinterCallback)  # it prints rows to stdout
    return trainer


def _class(settings: RlSettings, ids: Sequence[list[int]]) -> Any:
    from trl import RLOOTrainer
    from trl.trainer.utils import RepeatSampler

    class Trainer(RLOOTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """Nothing: TRL pings the Hub from here, unless a variable was set before its first import."""

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """None for checkpoints to go on from."""

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            # A prompt is its number here: its tokens are those that sampling, too, asks a policy with.
            return [list(ids[int(number)]) for number in prompts], None, {}

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            if settings.baseline == "loo":
                return super()._get_train_sampler(dataset)
            # One answer to each prompt: the whole batch is one group, and so each other's baseline.
            return RepeatSampler(
                self.train_dataset if dataset is None else dataset, mini_repeat_count=1, batch_size=settings.batch,
                repeat_count=self.args.steps_per_generation, shuffle=False,
            )  # fmt: skip

    return Trainer


def _prepared(policy: OpenedPolicy, module: Any) -> Any:
    """A tokenizer of TRL's own, with a padding token; and the module with the ends of its answers, and nothing else of
    its generation_config.json."""
    from transformers import GenerationConfig

    tokenizer = copy.deepcopy(policy.tokenizer)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(policy.ends[0])
        if tokenizer.eos_token_id is None:
            what = f"ends answers with the token {policy.ends[0]}, which its tokenizer does not have"
            raise RefusedError([Finding(f"--policy {plain(policy.source.label)}", what)])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    module.generation_config = GenerationConfig(
        eos_token_id=list(policy.ends), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return tokenizer


def _arguments(settings: RlSettings, weights: Sequence[float], working: Path, use_cpu: bool) -> Any:
    from trl import RLOOConfig

    known = RLOOConfig.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    world = join_ranks(use_cpu)
    share, left = divmod(settings.batch, world)
    if left:
        raise UsageError(f"--batch: {settings.batch} answers cannot be split between {world} processes")
    micro = max(size for size in range(1, min(share, settings.micro_batch) + 1) if share % size == 0)
    arguments = RLOOConfig(
        output_dir=str(working), max_steps=settings.steps, learning_rate=settings.lr, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", seed=settings.seed,
        data_seed=settings.seed, use_cpu=use_cpu,
        bf16=settings.precision == "bfloat16", fp16=False, **{checkpointing: settings.gradient_checkpointing},
        per_device_train_batch_size=micro, gradient_accumulation_steps=share // micro,
        num_generations=settings.group, num_generations_eval=1, max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
        # Of the smallest number TRL still computes the KL divergence; times any KL it is 0 in float32.
        beta=settings.kl_coef or sys.float_info.min,
        num_iterations=1, reward_weights=list(weights), normalize_advantages=False, reward_clip_range=None,
        router_aux_loss_coef=0.0, mask_truncated_completions=False, disable_dropout=True, shuffle_dataset=False,
        sync_ref_model=False,
        trust_remote_code=settings.trust_remote_code, use_vllm=settings.generator == "vllm", vllm_mode="colocate",
        log_completions=False, ddp_find_unused_parameters=False, dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
        save_strategy="steps", save_steps=settings.save_every, eval_strategy="no", push_to_hub=False,
    )  # fmt: skip
    # The settings', not those of the environment which `accelerate launch` sets.
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    # One process, one device: with several in sight transformers would split each pass between them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    assert arguments.generation_batch_size == settings.batch, "all ranks together sample a batch"
    return arguments


def answers_to(trainer: Any, ids: Sequence[list[int]], ends: Sequence[int], seed: int) -> list[Drawn]:
    """An answer of the policy, as it is now, to each prompt (its token ids). The random numbers of training stay as
    they are. Under `accelerate launch` all ranks call this together, and all get all answers.

    Args:
        seed: of these answers.
    """
    from accelerate.utils import gather_object

    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    # Every rank as many, so that none waits for the others: some prompts are answered twice, and cut off again.
    share = -(-len(ids) // world)
    mine = [ids[i % len(ids)] for i in range(rank * share, (rank + 1) * share)]
    size = trainer.args.generation_batch_size // world
    was_training, drawn = trainer.model.training, []
    trainer.model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(int(numpy.random.SeedSequence([seed, rank]).generate_state(1)[0]))
        for i in range(0, len(mine), size):
            drawn += trainer._generate_single_turn(mine[i : i + size], None, {})
    trainer.model.train(was_training)
    gathered = gather_object(drawn) if world > 1 else drawn
    return [Drawn(list(row), row[-1] in ends) for row in gathered[: len(ids)]]
