"""The training loop of every method: steps, checkpoints and resuming, through transformers' trainer.

Place in the flow: dataset, model, an objective → **loop** → events, checkpoints, the trained model. One rule: a run that was
killed and resumed ends in the same bytes as one that was not; so everything that a step depends on is in the checkpoint or
follows from the seed and the step's number.

Not through TRL's subclasses of it: `batches` pads and the objective computes the loss, which leaves them nothing to do but to
be imported for a second and to round a quantised base's adapter to bfloat16. The tests hold our losses to theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from gateway.jobdir import Check, JobDir, JobSpec, write_json
from trainer.arithmetic import EXACT, Arithmetic, needs_checkpointing
from trainer.checkpoints import drop_old, newest_checkpoint, open_checkpoints, served_checkpoints, step_of
from trainer.data.batches import FILLER, Batches, fitting_pass_size
from trainer.data.examples import Examples
from trainer.export.adapter import write_adapter, write_peft_files
from trainer.export.witness import Witness
from trainer.model import base_learning_rate, load_adapter, load_base
from trainer.processes.distributed import ALONE, Ranks, route, shard_on_cpu
from trainer.progress import Progress
from trainer.scoring import Objective, Score
from trainer.stopping import Diverged, Paused

_OBJECTIVE_FILE = "objective.safetensors"
_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


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
    arithmetic: Arithmetic = EXACT
    pass_tokens: int = 16_384  # that may go through the model at once; a larger batch comes in passes
    ranks: Ranks = ALONE

    def load_served_base(self) -> PreTrainedModel:
        """The base anew, with the very weights that the engine has."""
        return load_base(self.spec.base)


def train(run: Run, progress: Progress) -> Path:
    """Trains `run.model` to its end, from the newest checkpoint if there is one. Raises InvalidLoss, Diverged, Paused.

    Gives the adapter folder of the checkpoint that is the result: the last, or the best where early stopping was asked for.
    """
    open_checkpoints(run.job)
    if run.ranks.world > 1:
        route(run.model)
    witness = Witness(
        run.validation or run.training,
        run.spec.max_length,
        None if run.arithmetic.base_is_exact else run.load_served_base,
        run.ranks,
    )
    if run.ranks.world > 1:
        witness.see_base(run.model)  # while each rank has all of it
    trainer = LoopTrainer(run, witness, progress)
    newest = newest_checkpoint(run.job)
    if newest is not None:
        progress.resumed(step_of(newest), newest)
        load_adapter(run.model, load_file(newest / "adapter_model.safetensors"))
        for name, tensor in load_file(newest / _OBJECTIVE_FILE).items():
            run.objective.state[name].copy_(tensor)
    if not progress.stopping.is_over:  # else killed behind its last checkpoint
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if progress.paused:
        raise Paused(progress.metrics["step"])
    if progress.stopping.patience is None:
        return served_checkpoints(run.job) / f"step-{progress.metrics['step']}"
    progress.tell_best()
    return served_checkpoints(run.job) / f"step-{progress.stopping.best_step}"


def save_adapter(run: Run, witness: Witness, path: Path) -> None:
    """Writes the adapter as it is now: all ranks score the witness and gather the tensors, the first one writes.

    Raises Diverged for weights that went off in the step before, whose loss nobody has seen.
    """
    tensors = run.ranks.adapter(run.model)
    scored = witness.score(run.model, tensors)
    if run.ranks.is_first:
        if not all(math.isfinite(value) for item in scored["items"] for value in item["tuned_logprobs"]):
            raise Diverged(
                "The tuned model gives its replies no finite probability: the last steps made its weights too large. "
                "Set a lower learning_rate_multiplier"
            )
        write_adapter(path, run.model, run.job, run.spec, scored, tensors)


class LoopTrainer(Trainer):
    """transformers' trainer with our batches, our loss and our checkpoints."""

    loss_is_scaled_for_ga = True  # the loss of a pass is its share of the batch's

    def __init__(self, run: Run, witness: Witness, progress: Progress) -> None:
        self.run, self.witness, self.progress = run, witness, progress
        self.rank_size = math.ceil(run.check.batch_size / run.ranks.world)  # conversations of a batch for each rank
        self.pass_size = fitting_pass_size(self.rank_size, _most_tokens(run.training), run.pass_tokens)
        super().__init__(
            model=run.model,
            args=self._config(),
            train_dataset=range(len(run.training)),  # asked for; `get_train_dataloader` has the real one
            data_collator=lambda rows: rows,
            callbacks=[progress, _BaseSeen(run.model, witness, progress)],
        )
        self.remove_callback(PrinterCallback)
        if self.args.activation_checkpointing:  # else nothing that goes into a frozen layer asks for a gradient
            run.model.enable_input_require_grads()

    def get_train_dataloader(self) -> Batches:
        run = self.run
        width = None
        if run.arithmetic.flash_attention:  # it tells packed sequences apart in a single row only
            width = self.pass_size * _most_tokens(run.training)
        batches = Batches(
            run.training,
            run.check.batch_size,
            self.pass_size,
            run.spec.seed,
            packed=run.spec.options.packing,
            width=width,
            rank=run.ranks.rank,
            world=run.ranks.world,
        )
        self.progress.watch(run.training, batches.order.first_batch())
        return batches

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and self.args.use_cpu:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | int | None]:
        """The passes of a batch, and what its objective counts in all of them."""
        passes, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if passes:
            with self.run.arithmetic.autocast():
                self.run.objective.begin_batch(self.run.model, passes)
        return passes, count

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | int | None:
        counts = [self.run.objective.count(inputs) for inputs in batch_samples if FILLER not in inputs]
        return torch.tensor(self.run.ranks.total(sum(counts))[0], device=device)

    def compute_loss(
        self,
        model: PeftModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Summed over what the objective counts in this pass, divided by what it counts in the whole batch.

        Times the ranks, since their gradients are averaged.
        """
        run = self.run
        is_filler = inputs.pop(FILLER, None) is not None
        if run.ranks.world > 1:
            # What was computed once is known to one rank: all compute it again, and so stay in step.
            inputs.pop("numbers", None)
        with run.arithmetic.autocast():
            found: Score = run.ranks.inside(model, run.objective.score, run.model, inputs)
        if is_filler:
            found = Score(found.loss * 0.0, 0, 0, dict.fromkeys(found.extras, 0.0))
        self.progress.tally(found)
        assert num_items_in_batch is not None, "the loss is normalised by what is counted in the whole batch"
        return found.loss / max(1, int(num_items_in_batch)) * run.ranks.world

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nobody asks, and counting costs a walk over all parameters each step."""
        return 0

    def _config(self) -> TrainingArguments:
        run, check, options = self.run, self.run.check, self.run.spec.options
        rate = base_learning_rate(run.model.config.hidden_size, run.spec.method)
        return TrainingArguments(
            output_dir=str(run.job.checkpoints),
            use_cpu=not run.arithmetic.gpu,
            bf16=False,  # `compute_loss` opens the context itself: it calls parts of the model that accelerate does not wrap
            fp16=run.arithmetic.precision == "fp16",  # for its scaling of the loss
            activation_checkpointing=self._checkpoints_activations(),
            activation_checkpointing_kwargs={"use_reentrant": False},
            seed=run.spec.seed,
            num_train_epochs=check.n_epochs,
            per_device_train_batch_size=self.pass_size,
            gradient_accumulation_steps=self.rank_size // self.pass_size,
            learning_rate=check.learning_rate_multiplier * rate,
            lr_scheduler_type=_SCHEDULERS[options.scheduler],
            warmup_steps=math.ceil(options.warmup_ratio * check.total_steps),
            weight_decay=options.weight_decay,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",  # `Progress` says when
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **run.ranks.arguments(),
        )

    def _checkpoints_activations(self) -> bool:
        """On a GPU where they would not fit; a CPU has its swap, and time is what it lacks."""
        if not self.run.arithmetic.gpu:
            return False
        tokens = self.pass_size * _most_tokens(self.run.training)
        share = self.run.check.n_trained_tokens / max(1, self.run.check.n_tokens)
        config, model = self.run.model.config, self.run.model
        free_bytes = torch.cuda.mem_get_info()[0] - sum(p.nbytes for p in model.parameters() if not p.is_cuda)
        needed = needs_checkpointing(config, tokens, math.ceil(share * tokens), free_bytes, self.run.arithmetic)
        return self.run.ranks.first_says(needed)

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
            self._save_scaler(str(folder))
            if ranks.is_first:
                write_peft_files(folder, self.run.model, tensors)
                self.state.save_to_json(str(folder / "trainer_state.json"))
                save_file(self.run.objective.state, folder / _OBJECTIVE_FILE)
                write_json(folder / "progress.json", self.progress.state())
        self.progress.checkpoint_written()
        if ranks.is_first:
            stopping = self.progress.stopping
            drop_old(job, None if stopping.patience is None else stopping.best_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PeftModel | None = None) -> None:
        """Done before the model was wrapped: see `train`."""


class _BaseSeen(TrainerCallback):
    """Has the witness look at the base behind the first step, which then comes that much earlier."""

    def __init__(self, model: PeftModel, witness: Witness, progress: Progress) -> None:
        self._model, self._witness, self._progress = model, witness, progress
        self._seen = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._seen:
            self._seen, began = True, time.monotonic()
            self._witness.see_base(self._model)
            self._progress.forecast.saved(time.monotonic() - began)


def _most_tokens(examples: Examples) -> int:
    """What the largest conversation needs, all its sequences padded alike."""
    return int((np.diff(examples.conversations) * np.asarray(examples.lengths())).max())
