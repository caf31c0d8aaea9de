"""The training loop of every method: steps, checkpoints and resuming, through TRL's trainer.

Place in the flow: dataset, model, an objective → **loop** → events, checkpoints, the trained model. One rule: a run that was
killed and resumed ends in the same bytes as one that was not; so everything that a step depends on is in the checkpoint or
follows from the seed and the step's number.

TRL prepares no data here (`skip_prepare_dataset`), pads nothing and computes no loss: `batches` and the objective do.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from gateway.chat.bundle import TOKENIZER_FILE
from gateway.chat.render import IGNORED
from gateway.jobdir import Check, JobDir, JobSpec, write_json
from trainer.batches import FILLER, Batches, fitting_pass_size
from trainer.checkpoints import drop_old, newest_checkpoint, open_checkpoints, served_checkpoints, step_of
from trainer.distributed import ALONE, Ranks, route, shard_on_cpu
from trainer.examples import Examples
from trainer.export.adapter import write_adapter, write_peft_files
from trainer.export.witness import Witness
from trainer.model import base_learning_rate
from trainer.progress import Progress
from trainer.scoring import Objective, Score
from trainer.stopping import Paused

_WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Run:
    """All that one attempt works with."""

    job: JobDir
    spec: JobSpec
    check: Check
    model: PeftModel
    training: Examples
    validation: Examples | None
    objective: Objective
    ranks: Ranks = ALONE


def train(run: Run, progress: Progress) -> Trained:
    """Trains `run.model` to its end, from the newest checkpoint if there is one. Raises InvalidLoss, Diverged, Paused."""
    open_checkpoints(run.job)
    began = time.monotonic()
    witness = Witness(
        run.validation or run.training, run.model, run.spec.max_length, run.ranks
    )  # before the first step: the base's view of it
    progress.forecast.saved(time.monotonic() - began)
    trainer = LoopTrainer(run, witness, progress)
    newest = newest_checkpoint(run.job)
    if newest is not None:
        progress.resumed(step_of(newest), newest)
        set_peft_model_state_dict(run.model, load_file(newest / "adapter_model.safetensors"))
    if not progress.stopping.is_over:  # else killed behind its last checkpoint
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if progress.paused:
        raise Paused(progress.metrics["step"])
    best = None
    if progress.stopping.patience is not None:
        progress.tell_best()
        best = served_checkpoints(run.job) / f"step-{progress.stopping.best_step}"
    return Trained(witness, best)


@dataclass(frozen=True)
class Trained:
    """What a run came to: the model as it is now, or the adapter of an earlier, better checkpoint."""

    witness: Witness
    best: Path | None


def save_adapter(run: Run, witness: Witness, path: Path) -> None:
    """Writes the adapter as it is now: all ranks score the witness and gather the tensors, the first one writes."""
    scored, tensors = witness.score(run.model), run.ranks.adapter(run.model)
    if run.ranks.is_first:
        write_adapter(path, run.model, run.job, run.spec, scored, tensors)


class LoopTrainer(SFTTrainer):
    """TRL's trainer with our batches, our loss and our checkpoints."""

    def __init__(self, run: Run, witness: Witness, progress: Progress) -> None:
        self.run, self.witness, self.progress = run, witness, progress
        self.rank_size = math.ceil(run.check.batch_size / run.ranks.world)  # conversations of a batch for each rank
        self.pass_size = fitting_pass_size(self.rank_size, max(run.training.lengths()))
        super().__init__(
            model=run.model,
            args=self._config(),
            train_dataset=Dataset.from_dict({"conversation": [0]}),  # TRL asks for one; `get_train_dataloader` has ours
            processing_class=PreTrainedTokenizerFast(tokenizer_file=str(run.job.template / TOKENIZER_FILE)),
            data_collator=lambda rows: rows,
            callbacks=[progress],
        )
        self.remove_callback(PrinterCallback)
        if run.ranks.world > 1:
            route(run.model)

    def get_train_dataloader(self) -> Batches:
        run = self.run
        size, ranks = run.check.batch_size, run.ranks
        return Batches(run.training, size, self.pass_size, run.spec.seed, ranks.rank, ranks.world)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and self.args.use_cpu:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def compute_loss(
        self,
        model: PeftModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Summed over the trained tokens of this pass, divided by those of the whole batch, on whatever ranks they are.

        Times the ranks: their gradients are averaged.
        """
        run = self.run
        is_filler = inputs.pop(FILLER, None) is not None
        found: Score = run.ranks.inside(model, run.objective.score, run.model, inputs)
        assert num_items_in_batch is not None, "the loss is normalised by the trained tokens of the whole batch"
        if is_filler:
            return found.loss * 0.0
        self.progress.tally(found)
        return found.loss / max(1, int(num_items_in_batch)) * run.ranks.world

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """The trained tokens of the whole batch: transformers adds up those of the ranks, and a filler has none."""
        counted = [
            inputs | {"labels": torch.full_like(inputs["labels"], IGNORED)} if FILLER in inputs else inputs
            for inputs in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nobody asks, and counting costs a walk over all parameters each step."""
        return 0

    def _config(self) -> SFTConfig:
        check, spec = self.run.check, self.run.spec
        gpu = torch.cuda.is_available()
        return SFTConfig(
            output_dir=str(self.run.job.checkpoints),
            use_cpu=not gpu,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            seed=spec.seed,
            num_train_epochs=check.n_epochs,
            per_device_train_batch_size=self.pass_size,
            gradient_accumulation_steps=self.rank_size // self.pass_size,
            learning_rate=check.learning_rate_multiplier * base_learning_rate(self.run.model.config.hidden_size),
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(_WARMUP_SHARE * check.total_steps),
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",  # `Progress` says when
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **self.run.ranks.arguments(),
        )

    def _clip_grad_norm(self, model: PeftModel) -> torch.Tensor | float | None:
        norm: torch.Tensor | float | None = super()._clip_grad_norm(model)
        # With fp16 an infinite one is everyday: the scaler leaves that step out and scales less from then on.
        self.progress.gradient_norm = None if norm is None or self.args.fp16 else float(norm)
        return norm

    def _save_checkpoint(self, model: PeftModel, trial: Any) -> None:
        """The servable adapter first, then what resuming needs, then the event: each implies the one before."""
        step = self.state.global_step
        job, ranks = self.run.job, self.run.ranks
        if self.progress.is_listed:  # one that is only for a pause is nobody's model
            save_adapter(self.run, self.witness, served_checkpoints(job) / f"step-{step}")
        tensors = ranks.adapter(self.run.model)
        with ranks.folder(job.checkpoints / f"step-{step}") as folder:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            if ranks.is_first:
                write_peft_files(folder, self.run.model, tensors)
                self.state.save_to_json(str(folder / "trainer_state.json"))
                write_json(folder / "progress.json", self.progress.state())
        self.progress.checkpoint_written()
        if ranks.is_first:
            stopping = self.progress.stopping
            drop_old(job, None if stopping.patience is None else stopping.best_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PeftModel | None = None) -> None:
        """Done before the model was wrapped: see `train`."""
