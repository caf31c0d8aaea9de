"""Trackers: Weights & Biases, TensorBoard and MLflow are told what a job's folder says.

    trainer                                             one process for each tracker
    events.jsonl, predictions.jsonl, adapter/  ──────→  feed → follower → wandb_run | tensorboard_run | mlflow_run
    followers (starts, asks, ends)  ←── what went wrong ──┘

A tracker reads files that the trainer writes anyway, in a process of its own. So it cannot hold up a step, move a random
number or take the job along when it fails; and what it could not be told is told when it is there again.
"""
