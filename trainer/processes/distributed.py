"""One of the processes that train a job together: its rank, its share of each batch, and what all of them do in step.

Place in the flow: rank → **distributed** → loop, progress, witness. One rule: every process runs the same program, and each
call here that is marked "together" is made by all of them in the same order, or all of them hang. Files, events and the
job's result are the first rank's. A process on its own is `ALONE`, and costs nothing.

The sharding is that of the libraries: accelerate's FSDP2 or DeepSpeed's ZeRO, chosen through transformers' arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import distributed
from torch.distributed.tensor import DTensor

from gateway.jobdir import Sharding
from trainer.export.adapter import adapter_tensors
from trainer.export.folder import beside, complete_folder

COLLECTIVE_TIMEOUT_S = 1800  # one rank may load, or write, this much longer than the others


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world` of them."""

    rank: int = 0
    world: int = 1
    sharding: Sharding = "none"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def arguments(self) -> dict[str, Any]:
        """What transformers' TrainingArguments need to wrap the model as it is to be."""
        if self.world == 1:
            return {}
        shared: dict[str, Any] = {"ddp_timeout": COLLECTIVE_TIMEOUT_S}
        if self.sharding == "fsdp":
            return shared | {"fsdp": "full_shard", "fsdp_config": dict(_FSDP)}
        if self.sharding in ("zero2", "zero3"):
            return shared | {"deepspeed": zero_config(int(self.sharding[-1]))}
        return shared | {"ddp_find_unused_parameters": False}

    # together

    def each(self, values: list[float]) -> list[list[float]]:
        """The values of every rank, by rank. Together."""
        if self.world == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        found = [torch.empty_like(mine) for _ in range(self.world)]
        distributed.all_gather(found, mine)
        return [row.tolist() for row in found]

    def total(self, *values: float) -> list[float]:
        """Each value, summed over the ranks in their order, so that all get the same bits. Together."""
        return [sum(column) for column in zip(*self.each(list(values)), strict=True)]

    def first_says(self, answer: bool) -> bool:
        """What the first rank answers: of what may have changed between one rank's look and another's. Together."""
        return bool(self.each([float(answer)])[0][0])

    def share(self, count: int) -> list[int | None]:
        """Which of `count` like tasks this rank does; with None for those that only keep the ranks in step."""
        mine: list[int | None] = list(range(self.rank, count, self.world))
        return mine + [None] * (-(-count // self.world) - len(mine))

    def inside(self, model: torch.nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, run as the forward of `model`, whose hooks gather what is sharded. Together."""
        return function(*arguments) if self.world == 1 else model(function, *arguments)[1]

    def adapter(self, model: PeftModel) -> dict[str, torch.Tensor]:
        """The adapter's tensors, whole, by PEFT's names. Together."""
        if self.sharding == "zero3" and self.world > 1:
            import deepspeed

            with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
                return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
        return adapter_tensors(model, whole)

    @contextmanager
    def folder(self, path: Path) -> Iterator[Path]:
        """A folder that all may write into; complete or absent, as `complete_folder` has it. Together."""
        if self.world == 1:
            with complete_folder(path) as folder:
                yield folder
        elif self.is_first:
            with complete_folder(path) as folder:
                distributed.barrier()
                yield folder
                distributed.barrier()
        else:
            distributed.barrier()
            yield beside(path)
            distributed.barrier()


ALONE = Ranks()

_FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # the layers by which the model itself says it may be split
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",  # an adapter's optimiser is small: one file, written by the first rank
}


def join(sharding: Sharding) -> Ranks:
    """This process among those that torchrun started. Waits for all of them."""
    gpu = torch.cuda.is_available()
    if gpu:
        if (world := int(os.environ["WORLD_SIZE"])) > (gpus := torch.cuda.device_count()):
            raise ValueError(f"{world} processes train this job, one for a GPU, but this machine has {gpus} GPU(s)")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif sharding.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"  # before it is imported, which looks for more
    if not distributed.is_initialized():
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        distributed.init_process_group("nccl" if gpu else "gloo", timeout=timeout)
    return Ranks(distributed.get_rank(), distributed.get_world_size(), sharding)


def route(model: PeftModel) -> None:
    """From here on `model(function, *arguments)` runs that function as its forward (see `Ranks.inside`).

    The loop scores with parts of the model, and whatever wraps it (DDP, FSDP, DeepSpeed) does its work around the forward
    of the whole. The loss is given apart: FSDP hangs its hooks on the tensors that it finds in what comes back.
    """

    def forward(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
        found = function(*arguments)
        return getattr(found, "loss", None), found

    model.forward = forward


def shard_on_cpu(accelerator: Accelerator, plugin_args: dict[str, Any]) -> None:
    """FSDP on processors, as on GPUs: torch has it, but accelerate takes it for GPUs' alone and falls back to DDP."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP may have sharded, gathered. Together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def zero_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's: the optimiser and gradients are split (2), and the parameters too (3). "auto" is what transformers says."""
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": "auto",
    }
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # nothing is offloaded
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
